"""Jobs of a sweep, each in a process of its own: the unit of memory and of failure."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from mimicut.base import memory
from mimicut.base.environment import usable_cores
from mimicut.base.errors import InputError
from mimicut.base.interrupts import interrupts_counted

_LEAST_GPUS = 1e-4  # of a job. Source: the least that Ray tells apart.
RETRIES = 3  # of a job whose process, or the one that waits for it, was killed. Source: assumption.
INTERRUPTED = 130
_LOOK_SECONDS = 0.2  # between two looks at whether a job is to stop
_LAST_LINES = 20  # of a failed job's words


@dataclass(frozen=True)
class Share:
    """What one job has of the machine: threads, of a GPU (or of several), and bytes of memory, None for unknown."""

    threads: int
    gpus: float
    memory: int | None


@dataclass(frozen=True)
class Job:
    """One process, and those that it starts.

    Attributes:
        name: Of its row.
        folder: Where its result goes.
        arguments: Of Python, whose last line on stdout is one JSON document.
        share: What it has of the machine.
        processes: How many compute at once in it, and divide its threads.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    share: Share
    processes: int = 1

    @property
    def own_threads(self) -> int:
        """Those of each of its processes."""
        return max(1, self.share.threads // self.processes)


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: Exit code of its process; negative for a signal that ended it.
        line: Its last line on stdout; None if there is none.
        said: The last lines of its words.
        seconds: By the clock, of all its starts here.
        starts: How often its process was started by the one that saw the end.
    """

    code: int
    line: dict[str, Any] | None
    said: str
    seconds: float
    starts: int


class Machines(Protocol):
    """Where jobs run."""

    def share(self, threads: int | None) -> Share:
        """The share of a job that is to have so many threads.

        Raises:
            InputError: There is not as much.
        """

    def at_once(self, jobs: Sequence[Job]) -> int:
        """How many of the jobs run at once."""

    def execute(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Ended]]:
        """Run jobs, and yield each as it ends.

        Ctrl-C and SIGTERM are handed on to the jobs that run, and the others are not started; a second one kills them.
        """


class ThisMachine:
    """`Machines` that are this one alone.

    Args:
        count: Jobs at once.
        gpus: Those of each; below 1, several jobs share one.

    Raises:
        InputError: There are not as many.
    """

    def __init__(self, count: int, gpus: float = 0):
        check_gpus(gpus)
        self._count, self._gpus, self._free = count, gpus, memory.available()
        needed, there = _gpus_for(count, gpus), len(_visible_gpus()) if gpus else 0
        if needed > there:
            raise InputError(
                f"sharing this machine: {count} jobs at once with {gpus:g} GPUs each need {needed}, found "
                f"{there}; expected fewer --jobs or less of --gpus"
            )

    def share(self, threads: int | None) -> Share:
        cores = usable_cores()
        asked = max(1, cores // self._count) if threads is None else threads
        if self._count * asked > cores:
            raise InputError(
                f"sharing this machine: {self._count} jobs at once with {asked} threads each are more than its {cores} "
                "cores; expected fewer --jobs or --threads"
            )
        memory_bytes = None if self._free is None else min(memory.DEFAULT_BYTES, self._free // 2 // self._count)
        return Share(asked, self._gpus, memory_bytes)

    def at_once(self, jobs: Sequence[Job]) -> int:
        return min(self._count, len(jobs))

    def execute(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Ended]]:
        slots: queue.Queue[int] = queue.Queue()
        for number in range(self._count):
            slots.put(number)

        def work(job: Job) -> Ended:
            slot = slots.get()
            try:
                return run_job(job, Path.cwd(), lambda: len(heard), _gpu_environment(slot, job.share.gpus))
            finally:
                slots.put(slot)

        with interrupts_counted() as heard, ThreadPoolExecutor(self._count) as pool:
            waiting = {pool.submit(work, job): job for job in jobs}
            try:
                while waiting:  # a signal may reach another thread, and is handled when this one next runs
                    for ended in wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED).done:
                        yield waiting.pop(ended), ended.result()
            finally:
                heard += [0, 0] if waiting else []  # the caller failed: nothing runs on without it


def check_gpus(gpus: float) -> None:
    """Raises: InputError for a number of GPUs that no job can have."""
    whole = math.isfinite(gpus) and gpus == round(gpus)
    if not whole and not _LEAST_GPUS <= gpus < 1:
        raise InputError(
            f"sharing GPUs: found {gpus:g} for each job, expected a whole number, or a share below 1 (from "
            f"{_LEAST_GPUS:g} on)"
        )


def row_of(job: Job, end: Ended | None) -> dict[str, Any]:
    """A job as plain data: its share and how it ended.

    Args:
        job: The job.
        end: None for a job that is only planned.
    """
    share = job.share
    planned = {
        "job": job.name, "folder": str(job.folder), "threads": share.threads, "gpus": share.gpus,
        "max_memory": share.memory,
    }  # fmt: skip
    if end is None:
        return planned
    failed = end.line is None and end.code not in (0, INTERRUPTED)
    return {
        **planned, "exit_code": end.code, "starts": end.starts, "seconds": round(end.seconds, 2), "result": end.line,
        "said": end.said if failed else None,
    }  # fmt: skip


def run_job(
    job: Job, place: Path, interrupts: Callable[[], int], environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a job to its end, once more where its process is killed or stops without being asked to: one of its processes
    was killed, or somebody else stopped it.

    Args:
        job: The job.
        place: The current folder of its process.
        interrupts: How many interrupts there were: with one the job is asked to stop, with two it is killed.
        environment: Variables beside this process's own.
    """
    started, starts = time.perf_counter(), 0
    code, out, said = INTERRUPTED, "", ""
    while starts <= RETRIES and not interrupts():
        starts += 1
        code, out, said = _process(job, place, interrupts, environment or {})
        if code >= 0 and code != INTERRUPTED:
            break
    if interrupts() and code < 0:
        code = INTERRUPTED
    line = None
    with suppress(ValueError, IndexError):
        found = json.loads(out.splitlines()[-1])
        line = found if isinstance(found, dict) else None
    last = "\n".join(said.strip().splitlines()[-_LAST_LINES:])
    return Ended(code, line, last, time.perf_counter() - started, starts)


def _process(
    job: Job, place: Path, interrupts: Callable[[], int], environment: Mapping[str, str]
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    # Threads are fixed before torch is imported: the result of a sum depends on how many share it.
    own = {"OMP_NUM_THREADS": str(job.own_threads), **environment}
    its_end, our_end = os.pipe()  # which the job sees closed when this process ends
    try:
        # A session of its own: Ctrl-C on a terminal reaches this process alone, which hands it on once.
        process = subprocess.Popen(
            [sys.executable, *job.arguments], cwd=place, env={**os.environ, **own}, start_new_session=True,
            stdin=its_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        os.close(our_end)
        return 2, "", f"starting {sys.executable} in {place}: {error}"
    finally:
        os.close(its_end)
    asked = 0
    with process:
        try:
            while True:
                try:
                    out, said = process.communicate(timeout=_LOOK_SECONDS)
                    return process.returncode, out, said
                except subprocess.TimeoutExpired:
                    now = interrupts()
                    if now > 1 or (process.poll() or 0) < 0:  # what it started may hold its pipes open
                        _kill(process)
                    elif now > asked:
                        process.terminate()
                    asked = now
        finally:
            if process.returncode is None:  # the look at interrupts failed: nothing waits for the job any longer
                _kill(process)
            os.close(our_end)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a job with everything that it started in its session."""
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        return
    with suppress(ProcessLookupError, PermissionError):  # macOS's word for one that has ended
        os.killpg(process.pid, signal.SIGKILL)


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(takewhile(lambda name: name not in ("", "-1"), named.replace(" ", "").split(",")))  # as CUDA does
    return [str(number) for number in range(torch.cuda.device_count())]


def _gpus_for(count: int, gpus: float) -> int:
    """GPUs that so many jobs at once need: whole ones each, or as many to one as its shares allow.

    >>> _gpus_for(3, 2), _gpus_for(3, 0.5), _gpus_for(4, 0.5)
    (6, 2, 2)
    """
    if gpus >= 1:
        return count * round(gpus)
    return math.ceil(count / math.floor(1 / gpus)) if gpus else 0


def _gpu_environment(slot: int, gpus: float) -> dict[str, str]:
    """Which GPUs the job in a slot sees; without a share of them it sees what this process sees."""
    if not gpus:
        return {}
    seen = _visible_gpus()
    first = slot * round(gpus) if gpus >= 1 else slot // math.floor(1 / gpus)
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen[first : first + max(1, round(gpus))])}
