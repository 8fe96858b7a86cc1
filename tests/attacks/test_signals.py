"""SIGINT and SIGTERM at random moments: exit codes as documented, and the same command with --resume ends bit-equal."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from attack_scenarios import SCENARIOS
from attacks import changes_of, in_child, in_fresh_process, record, thinned

from mimicut.base.interrupts import raise_interrupts

ROOT = Path(__file__).parents[2]
COMMAND = ("compress", "net.py:build", "photos", "--keep", "0.5", "--steps", "6", "--out", "small", "--extra", "none",
           "--threads", "1")  # fmt: skip
EXPORTING = 5  # every so many runs also export, which takes far longer than all else
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


def command(place, *more, after=None, number=None):
    """Run the command in this (forked) process, which is sent a signal after some seconds."""
    from mimicut.cli.start import main

    os.chdir(place)
    sys.stdout = sys.stderr = (place / "said").open("a", buffering=1)
    if after is not None:
        threading.Thread(target=lambda: (time.sleep(after), os.kill(os.getpid(), number)), daemon=True).start()
    with mock.patch.object(sys, "argv", ["mimicut", *COMMAND, *more]):
        main()


def fresh(place, start):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(start, place)
    return place


def caught(process, number):
    """Whether a process handles a signal itself: it does neither before our first line nor when its work is done."""
    status = Path(f"/proc/{process.pid}/status").read_text()  # there until we have waited for the process
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def import_moments(place, number, attempts):
    """Signals while the process starts and imports; return how many came before our first line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "mimicut", *COMMAND]
    ready = time.perf_counter()
    probe = subprocess.Popen(run, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    probe.stderr.readline()  # of the first stage: the imports are done
    ready = time.perf_counter() - ready
    probe.kill()
    probe.communicate()
    shutil.rmtree(place / "small", ignore_errors=True)
    before = sorted(os.listdir(place))
    early, shares = 0, [random.Random(attempt).uniform(0.02, 1.0) for attempt in range(attempts)]
    while shares:
        process = subprocess.Popen(run, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
        time.sleep(ready * shares[-1])
        ours = caught(process, signal.SIGTERM)  # which is taken over with SIGINT, and which Python leaves alone
        process.send_signal(number)
        _, said = process.communicate(timeout=600)
        if process.returncode == 0 and not ours:  # it was at its end, as the machine is faster now: an earlier moment
            shares[-1] *= 0.7
        elif not ours and process.returncode in (-number, 130, 1):
            early += 1
            shares.pop()
        else:
            assert process.returncode == 130, (ours, said)
            assert "interrupted" in said or "stopped" in said
            shares.pop()
        shutil.rmtree(place / "small", ignore_errors=True)  # the signal may come after the imports
        for left in place.glob("small.stopped*"):
            left.unlink()
        assert sorted(os.listdir(place)) == before
    return early


def interrupted(number, place):
    """An observer that sends its process SIGTERM at the moment `place`: before or after a change."""
    left = [place]

    def observe(when, kind, path):
        if not left[0]:
            os.kill(os.getpid(), number)
        left[0] -= 1

    return observe


@SIGNALS
@pytest.mark.parametrize(
    "name",
    [
        "save Chain",
        *(pytest.param(name, marks=pytest.mark.attack) for name in ("replace Chain", "report Chain", "checkpoint")),
    ],
)
def test_signals_before_and_after_every_change_leave_nothing(name, number, tmp_path):
    scenario, changes = SCENARIOS[name], tmp_path / "changes"

    def whole(place):
        changes.write_text(repr([kind for kind, _ in changes_of(lambda: scenario.act(place))]))

    def act(place):
        raise_interrupts()
        try:
            scenario.act(place)
        except KeyboardInterrupt:
            sys.exit(130)

    start, place = tmp_path / "start", tmp_path / "place"
    start.mkdir()
    scenario.prepare(start)
    before, names = scenario.state(start), sorted(os.listdir(start))
    fresh(place, start)
    assert in_child(lambda: whole(place)) == 0
    after, ended = scenario.state(place), sorted(os.listdir(place))
    moments = 2 * len(eval(changes.read_text()))
    for moment in range(moments):
        fresh(place, start)
        code = in_child(lambda: act(place), interrupted(number, moment))
        assert code in (0, 130), moment
        assert scenario.state(place) in ((before, after) if code else (after,)), moment
        left = sorted(str(p.relative_to(place)) for p in place.rglob(".*"))
        assert left == [], moment
        assert sorted(os.listdir(place)) in (names, ended), moment


@pytest.mark.attack
@SIGNALS
def test_signals_while_it_imports(place, number):
    attempts = len(thinned(range(50)))
    early = import_moments(place, number, attempts)
    assert early < attempts / 2
    record(f"{number.name} while it imports", attacks=attempts, before_the_first_line=early)


def signals_at_work(start, here, number):
    """Signals at random moments of the run, which then goes on; return how many there were that stopped it."""
    import mimicut.cli.app
    import mimicut.workflow.compress  # noqa: F401

    seconds, expected = {}, {}
    for exports in ((), ("--to", "pt2")):
        for _ in range(2):  # the second time as quick as all others
            fresh(here, start)
            began = time.perf_counter()
            assert in_child(lambda exports=exports: command(here, *exports)) == 0
            seconds[exports] = time.perf_counter() - began
        expected[exports] = {
            name: (here / "small" / name).read_bytes() for name in ("weights.safetensors", "plan.json")
        }
    shares = [random.Random(attempt).uniform(0.02, 1.0) for attempt in range(len(thinned(range(50))))]
    stopped = 0
    while shares:
        fresh(here, start)
        exports = () if len(shares) % EXPORTING else ("--to", "pt2")
        after = seconds[exports] * shares[-1]
        code = in_child(lambda after=after, exports=exports: command(here, *exports, after=after, number=number))
        said = (here / "said").read_text()
        assert code in (0, 130), said
        assert "Traceback" not in said
        assert in_child(lambda exports=exports: command(here, *exports, "--resume")) == 0, (here / "said").read_text()
        for name, content in expected[exports].items():
            assert (here / "small" / name).read_bytes() == content, (len(shares), name)
        assert (here / "small" / "model.pt2").exists() == bool(exports)
        assert sorted(os.listdir(here)) == ["net.py", "photos", "said", "small"]
        if code:
            shares.pop()
            stopped += 1
        else:  # it was at its end: an earlier moment
            shares[-1] *= 0.7
    return stopped


@pytest.mark.attack
@SIGNALS
def test_signals_while_it_works(place, number, tmp_path_factory):
    start, here = tmp_path_factory.mktemp("start") / "start", tmp_path_factory.mktemp("here") / "here"
    shutil.copytree(place, start)
    attacks = in_fresh_process(signals_at_work, start, here, number)
    record(f"{number.name} while it works", attacks=attacks)
