"""mimicut sweep"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimicut.cli.cmd_compress import compress, refuse_early
from mimicut.cli.option_values import bytes_in
from mimicut.cli.printing import INTERRUPTED, answer, say

if TYPE_CHECKING:
    from mimicut.workflow.jobs import Ended, Job, Machines, Share

_PROCESS = ("-m", "mimicut.cli.job_process", "compress", "--resume")
_CODES = (0, 1, 2, 3, INTERRUPTED)  # of compress; anything else is a crash, which counts as 1


def sweep(
    file: Annotated[
        Path, typer.Argument(help="TOML file: a table \\[\\[job]] of options of compress for each, and \\[defaults]")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the table, the page and, by their names, the jobs' folders")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Jobs at once; default 1, on a cluster as many as it holds")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each job; default: its share of the cores, on a cluster 1"),
    ] = None,
    gpus: Annotated[
        float, typer.Option(min=0, help="GPUs of each job, such as 1 or 0.5; its --device is then cuda")
    ] = 0.0,
    max_memory: Annotated[
        str | None, typer.Option(help="Memory limit of each job, such as 3G; default: its share, 4G at the most")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Run on Ray: ray://HOST:PORT, auto, or local for one that is started on this machine"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the table and page of another sweep in --out")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file, say each job's share of the machine, and run nothing")
    ] = False,
) -> None:
    """Run a file of compress jobs, each in a process of its own, here or on a Ray cluster; the same command goes on."""
    from mimicut.results.folder import one_run
    from mimicut.results.sweep_table import check_replaceable, make_place, summary, table, write_table
    from mimicut.workflow.jobs import row_of

    found = _checked(file, out, on_ray=address is not None, elsewhere=address not in (None, "local"), gpus=gpus)
    started = time.perf_counter()
    alone = one_run(None if dry_run else out, doing="saving the table of the sweep", what="sweep or run")
    with alone, _machines(address, jobs, gpus) as machines:
        ready = [_job(name, options, machines, threads, bytes_in(max_memory)) for name, options in found.items()]
        planned = [row_of(job, None) for job in ready]
        check_replaceable(out, planned, force)
        shares = _shares(ready, machines.at_once(ready))
        for line in shares:
            say(line)
        if dry_run:
            answer({"jobs": planned})
            return
        make_place(out)
        ended: dict[str, Ended] = {}
        for job, end in machines.execute(ready):
            ended[job.name] = end
            _say_end(row_of(job, end), len(ended), len(ready), time.perf_counter() - started)
        rows = [row_of(job, ended[job.name]) for job in ready]
        say(table(rows))
        write_table(out, rows, shares, time.perf_counter() - started)
    answer({"jobs": rows, "folder": str(out)})
    code = max(row["exit_code"] if row["exit_code"] in _CODES else 1 for row in rows)
    if code == INTERRUPTED:
        say(f"mimicut: stopped, {summary(rows)}; the same command goes on with those that are not done")
    sys.exit(code)


def _checked(path: Path, out: Path, on_ray: bool, elsewhere: bool, gpus: float) -> dict[str, dict[str, Any]]:
    """Name -> options of each job.

    Raises:
        InputError: The file has faults; all of them are named.
    """
    from mimicut.base.errors import InputError
    from mimicut.cli.jobs_file import read_jobs

    holder = typer.Typer(add_completion=False)
    holder.command()(compress)
    command = typer.main.get_command(holder)
    jobs, faults = read_jobs(path, command)
    found: dict[str, dict[str, Any]] = {}
    places = _Places(out)
    for job in jobs:
        options = {"out": str(out / job.name), **job.options}
        if "tensorboard" in options:
            options["tensorboard"] = str(Path(options["tensorboard"]) / job.name)
        wrong = [f"{name} is {text!r}, and no process can be given that" for name, text in _unsayable(job.options)]
        sayable = not wrong and "\0" not in job.name
        if job.name in ("", ".", "..") or Path(job.name).name != job.name or "\0" in job.name:
            wrong.append(f"its name is {job.name!r}, expected one that a folder can have")
        if sayable:
            wrong += _faults(command, options, on_ray and not gpus, elsewhere)
            taken = places.take(Path(options["out"]), f"{job.name} ({job.where})")
            if taken is not None or job.name in found:
                wrong.append(
                    f"{job.name} goes to {options['out']}, as {taken or 'another job of that name'} does; give one of "
                    "them another name or out"
                )
        faults += [f"{job.where}: {fault}" for fault in wrong]
        found[job.name] = options
    if faults:
        count = f"{len(faults)} faults" if len(faults) > 1 else "one fault"
        raise InputError("\n  ".join([f"reading the jobs {path}: {count}; nothing was run", *faults]))
    return found


class _Places:
    """Folders of jobs, none of which may hold another's files or the sweep's own."""

    def __init__(self, out: Path):
        from mimicut.results.sweep_table import PAGE, TABLE

        whole = out.resolve()
        self._taken = {whole / name: f"the sweep's own {name}" for name in (TABLE, PAGE)}
        self._above = {each: "the sweep's own table" for each in (whole, *whole.parents)}

    def take(self, folder: Path, who: str) -> str | None:
        """Who is there already, above it or below it; None if nobody is."""
        whole = folder.resolve()
        by = next((self._taken[each] for each in (whole, *whole.parents) if each in self._taken), None)
        by = by or self._above.get(whole)
        self._taken.setdefault(whole, who)
        for each in whole.parents:
            self._above.setdefault(each, who)
        return by


def _unsayable(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        texts = [str(each) for each in (value if isinstance(value, list) else [value])]
        yield from ((name, text) for text in texts if "\0" in text)


def _faults(command: Any, options: dict[str, Any], without_gpu: bool, elsewhere: bool) -> Iterator[str]:
    """What `compress` would refuse before it loads the teacher, and what no job could run with."""
    from mimicut.base.environment import usable_cores
    from mimicut.base.errors import MimicutError
    from mimicut.cli.jobs_file import arguments

    for name in () if elsewhere else ("images", "held_out", "labelled"):
        if name in options and not Path(options[name]).exists():
            yield f"{name} is {options[name]}, and there is no such file or folder"
    threads = options.get("threads", 1)
    if threads < 1 or (threads > usable_cores() and not elsewhere):
        most = "" if elsewhere else f" to {usable_cores()}, which are the cores of this machine"
        yield f"threads is {threads}, expected a number from 1{most}"
    devices = options.get("devices", 1)
    if devices < 1:
        yield f"devices is {devices}, expected a number from 1"
        options = {**options, "devices": 1}
    if without_gpu and str(options.get("device", "")).startswith("cuda"):
        yield f"device is {options['device']}, and no job gets a GPU; expected --gpus"
    try:
        with command.make_context("compress", ["--resume", *arguments(options)]) as context:
            refuse_early(context.params, elsewhere=elsewhere)
    except MimicutError as error:
        yield str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer says of a value
            raise
        yield error.format_message()


@contextmanager
def _machines(address: str | None, at_once: int | None, gpus: float) -> "Iterator[Machines]":
    from mimicut.workflow.jobs import ThisMachine

    if address is None:
        yield ThisMachine(at_once or 1, gpus)
        return
    from mimicut.workflow.jobs_on_ray import connected

    with connected(address, at_once, gpus) as cluster:
        yield cluster


def _job(name: str, options: dict[str, Any], machines: "Machines", threads: int | None, memory: int | None) -> "Job":
    """The job with its share of the machines, which its process is given."""
    from dataclasses import replace

    from mimicut.base.errors import InputError
    from mimicut.cli.jobs_file import arguments
    from mimicut.workflow.jobs import Job

    devices = options.get("devices", 1)
    share = machines.share(options.get("threads", threads))
    if share.threads < devices:  # each device has a process, which needs a core
        try:
            share = machines.share(devices)
        except InputError as error:
            raise InputError(
                f"sharing the machines: the job {name} has devices = {devices}, each with a core of its own, and there "
                "are not as many for it; expected fewer devices or --jobs"
            ) from error
    if "max_memory" in options or memory is not None:
        share = replace(share, memory=bytes_in(str(options["max_memory"])) if "max_memory" in options else memory)
    job = Job(name, Path(options["out"]), (), share, devices)
    more: dict[str, Any] = {"threads": share.threads}  # which its processes divide
    if share.memory is not None:
        more["max_memory"] = share.memory
    if share.gpus:
        more["device"] = options.get("device", "cuda")
        if more["device"] != "cpu" and devices > share.gpus:
            raise InputError(
                f"sharing the machines: the job {name} has {devices} devices and {share.gpus:g} GPUs; expected --gpus "
                f"{devices}, or fewer devices"
            )
    return replace(job, arguments=(*_PROCESS, *arguments({**options, **more})))


def _shares(jobs: "Sequence[Job]", at_once: int) -> list[str]:
    """A sentence for all jobs, or for each kind of them, on what they have of the machines."""
    from mimicut.base.memory import size_text

    kinds: dict[Share, list[str]] = {}
    for job in jobs:
        kinds.setdefault(job.share, []).append(job.name)
    lines = [f"{len(jobs)} jobs, {at_once} at once"]
    for share, names in kinds.items():
        whose = "each" if len(kinds) == 1 else ", ".join(names[:5]) + (f", {len(names) - 5} more" if names[5:] else "")
        lines.append(
            f"{whose}: {share.threads} thread{'s' * (share.threads > 1)}, "
            + (f"{share.gpus:g} GPU{'s' * (share.gpus > 1)}, " if share.gpus else "")
            + ("half of the free memory" if share.memory is None else f"{size_text(share.memory)} of memory")
        )
    return lines


def _say_end(row: dict[str, Any], done: int, count: int, seconds: float) -> None:
    from mimicut.results.sweep_table import cells

    name, agreement, macs, _, _, word, where = cells(row)
    left = seconds / done * (count - done)
    more = where if word == "failed" else ", ".join(
        text for text in (agreement and f"agreement {agreement}", macs and f"{macs} of the MACs") if text
    )  # fmt: skip
    say(f"{done}/{count} {name}: {word}{': ' if more else ''}{more}; {left / 60:.0f} min left")
