"""Real kills in forked processes, at changes of files that the code itself announces (`disk.observer`), and the counts.

A child that is killed before its nth change leaves on the disk what a `kill -9` at that moment leaves. A torn one first
loses the second half of the file that it has just written, as when it is killed inside the write.
"""

import json
import os
import signal
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mimicut.base import disk

SHARE = float(os.environ.get("ATTACKS", "1"))  # of the attacks of the whole suite
COUNTS = Path(__file__).parents[2] / "benchmarks" / "results" / "attacks.json"


def record(name, **counts):
    """Put the counts of one attack that was survived into the file, where all of it was made; several test processes
    may do so at once. `make attack` begins without the file, so that what was not survived is not in it."""
    import fcntl

    if SHARE < 1:
        return
    with COUNTS.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        found = {**(json.loads(text) if text else {}), name: counts}
        file.truncate(0)
        file.write(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def thinned(places, share=SHARE):
    """Every nth of the places, evenly; all of them for a share of 1."""
    number = max(1, round(len(places) * min(1.0, share)))
    return [places[i * len(places) // number] for i in range(number)]


def in_fresh_process(work, *arguments):
    """Run `work`, which forks, in a process that never ran a backward pass: after one, no forked child could."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(work, *arguments).result()


def in_child(work, observer=None):
    """Run `work` in a forked process; return its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(300)  # a child that hangs ends
            disk.observer = observer
            work()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes_of(work):
    """The changes that `work` makes, as (kind, path), in order."""
    found = []
    before, disk.observer = disk.observer, lambda when, kind, path: when == "before" and found.append((kind, path))
    try:
        work()
    finally:
        disk.observer = before
    return found


def killer(number, torn=False):
    """An observer that kills its process before change `number`."""
    left = [number]

    def observe(when, kind, path):
        if when == "after":
            return
        if not left[0]:
            if torn and path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return observe


def places_of(changes):
    """(number, torn) of every place at which to kill: before each change, and inside each write."""
    return [
        (n, torn) for n, (kind, _) in enumerate(changes) for torn in ((False, True) if kind == "sync" else (False,))
    ]


def tree(folder):
    """The content of every file below `folder`, without times in reports and pages."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else None
        if path.name == "report.json":
            content = without_times(json.loads(content))
        elif path.name in ("report.html", "README.md", "run.toml"):
            content = True  # they follow from the report, which has times, or name the folder
        found[str(path.relative_to(folder))] = content
    return found


def without_times(data):
    """A report without what differs between two equal runs: seconds, and what was measured of this machine."""
    if isinstance(data, dict):
        # A stopped run that goes on does not repeat what it had timed.
        return {k: without_times(v) for k, v in data.items() if "seconds" not in k and k not in ("ways", "parts")}
    return [without_times(v) for v in data] if isinstance(data, list) else data
