"""Runs the cells that a results file lacks, one after the other or on Ray, and appends a line for each."""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from benchmarks.protocol import Cell

RESULTS = Path(__file__).parent / "results"
RETRIES = 3  # of a cell whose worker was killed
Run = Callable[[Cell], dict[str, Any]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; of a cell that stands there twice the last one. A torn last line is passed over."""
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
            found[Cell(**line["cell"]).key] = line
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
    return list(found.values())


def missing(cells: Sequence[Cell], path: Path, retry_failed: bool = False) -> list[Cell]:
    """The cells that have no line yet; with retry_failed also those that ended in an error."""
    done = {Cell(**line["cell"]).key for line in read_lines(path) if not (retry_failed and "error" in line)}
    return [cell for cell in cells if cell.key not in done]


@contextmanager
def results_file(path: Path) -> Iterator[TextIO]:
    """`path` open for appending whole lines, by one sweep at a time. Raises: BlockingIOError while another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        written = path.read_bytes()
        tail = written.rpartition(b"\n")[2]
        if tail:
            try:
                json.loads(tail)
                file.write("\n")
            except ValueError:  # stopped in the middle of a line: that cell is run again
                file.truncate(len(written) - len(tail))
        yield file


def sweep(
    cells: Sequence[Cell], path: Path, execute: Callable[[Sequence[Cell]], Iterator[tuple[Cell, dict[str, Any]]]]
) -> dict[str, int]:
    """Append the line of each of `cells` as it comes; words on stderr. Returns how many ended well and how many not."""
    started, count = time.perf_counter(), {"done": 0, "failed": 0}
    with results_file(path) as file:
        for number, (cell, line) in enumerate(execute(cells), start=1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            count["failed" if "error" in line else "done"] += 1
            said = line["error"] if "error" in line else f"{_first_figure(line['figures'])} in {line['seconds']} s"
            left = (time.perf_counter() - started) / number * (len(cells) - number)
            print(f"{number}/{len(cells)} {cell}: {said}; {left / 60:.0f} min left", file=sys.stderr, flush=True)
    return count


def _first_figure(figures: dict[str, Any]) -> str:
    return f"{figures['top1']:.2f} %" if "top1" in figures else f"agreement {figures['agreement']:.1%}"


def in_turn(run: Run) -> Callable[[Sequence[Cell]], Iterator[tuple[Cell, dict[str, Any]]]]:
    """One cell after the other, in this process."""

    def execute(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        for cell in cells:
            yield cell, run(cell)

    return execute


def on_ray(
    run: Run, *, address: str | None = None, cpus: float = 1, gpus: float = 0, jobs: int | None = None
) -> Callable[[Sequence[Cell]], Iterator[tuple[Cell, dict[str, Any]]]]:
    """Every cell a Ray task with `cpus` cores and `gpus` of a GPU; on this machine (`jobs` of them at once) or the
    cluster at `address`, whose machines get this checkout. A cell whose worker dies is run again, up to 3 times."""

    def execute(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        import ray

        root = str(Path(__file__).parents[1])
        # Threads are fixed before torch is imported: the results of a sum depend on how many share it.
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        environment: dict[str, Any] = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus))), "PYTHONPATH": root}}
        if address is None:
            local = {} if jobs is None else {"num_cpus": max(1, math.ceil(jobs * cpus))}
            ray.init("local", runtime_env=environment, include_dashboard=False, **quiet, **local)
        else:
            del environment["env_vars"]["PYTHONPATH"]
            away = {"working_dir": root, "excludes": [".git", ".venv", "**/results/*.jsonl"]}
            ray.init(address, runtime_env=environment | away, **quiet)
        try:
            there = ray.cluster_resources()
            if cpus > there.get("CPU", 0) or gpus > there.get("GPU", 0):
                raise ValueError(
                    f"a cell asks for {cpus:g} cores and {gpus:g} of a GPU, Ray has {there.get('CPU', 0):g} and "
                    f"{there.get('GPU', 0):g}"
                )
            task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(lambda cell: run(cell))
            waiting = {task.remote(cell): cell for cell in cells}
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                cell = waiting.pop(ready)
                try:
                    yield cell, ray.get(ready)
                except (ray.exceptions.RayError, OSError) as error:
                    said = str(error).strip().splitlines()[0]
                    yield cell, {"cell": asdict(cell), "error": f"{type(error).__name__}: {said}"}
        finally:
            ray.shutdown()

    return execute
