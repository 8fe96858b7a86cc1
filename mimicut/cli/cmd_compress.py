"""mimicut compress"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimicut.cli.config_file import ConfigFile
from mimicut.cli.option_values import bytes_in, formats_in, set_threads, teacher_from
from mimicut.cli.options import (
    FORMATS_HELP,
    Batch,
    ClassNames,
    Depth,
    Device,
    Devices,
    Divisor,
    Drop,
    Effort,
    Exclude,
    Extra,
    ForceResult,
    HeldOut,
    HeldOutShare,
    ImagesArg,
    Importance,
    InputSize,
    Keeps,
    KeepWidth,
    Labelled,
    Latencies,
    LatenciesMs,
    Layout,
    LogTo,
    MaxError,
    MaxMemory,
    MaxSeconds,
    Mean,
    MinAgreement,
    MinChannels,
    NumClasses,
    OutputKind,
    Params,
    Part,
    Pin,
    Precision,
    Preset,
    Pretrained,
    Resize,
    Runtime,
    Scheme,
    Seam,
    Seed,
    SizeMb,
    SpareEnds,
    Std,
    Steps,
    TeacherArg,
    Threads,
    Views,
    Weights,
)
from mimicut.cli.printing import INTERRUPTED, answer, end_interrupted, result_line, say
from mimicut.cli.terminal_progress import StepProgress, stages

if TYPE_CHECKING:
    from mimicut.inputs.teacher import Teacher
    from mimicut.recovery.config import ConfigChanges, MimicConfig
    from mimicut.results.report import Report
    from mimicut.surgery.budget import BudgetOptions
    from mimicut.workflow.request import RequestOptions


Crossfit = Annotated[
    int | None, typer.Option(help="Folds: all images train, and each certifies once; takes this many times longer")
]
Alternatives = Annotated[
    bool, typer.Option(help="Also report what cheaper ways reach on the same cut; takes as long again")
]


def compress(
    teacher: TeacherArg,
    images: ImagesArg,
    out: Annotated[Path, typer.Option(help="Folder for the result; with several budgets, for their folders")],
    keep: Keeps = None,
    keep_width: KeepWidth = None,
    params: Params = None,
    size_mb: SizeMb = None,
    latency: Latencies = None,
    latency_ms: LatenciesMs = None,
    runtime: Runtime = None,
    batch: Batch = None,
    depth: Depth = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan (edited or not) instead of a budget", rich_help_panel="Budget")
    ] = None,
    scheme: Scheme = None,
    spare_ends: SpareEnds = False,
    drop: Drop = None,
    pin: Pin = None,
    exclude: Exclude = None,
    min_channels: MinChannels = None,
    divisor: Divisor = None,
    importance: Importance = None,
    preset: Preset = "default",
    effort: Effort = None,
    steps: Steps = None,
    max_seconds: MaxSeconds = None,
    seed: Seed = None,
    device: Device = None,
    devices: Devices = None,
    precision: Precision = "auto",
    layout: Layout = "auto",
    max_memory: MaxMemory = None,
    views: Views = None,
    held_out: HeldOut = None,
    held_out_share: HeldOutShare = 0.2,
    crossfit: Crossfit = None,
    min_agreement: MinAgreement = None,
    max_error: MaxError = None,
    output: OutputKind = None,
    alternatives: Alternatives = False,
    to: Annotated[str, typer.Option(help=f"Also write the result, into its folder, as {FORMATS_HELP}")] = "",
    int8: Annotated[
        bool, typer.Option(help="The student is for INT8: it mimics in INT8 too; for a latency quantise, cut, or both")
    ] = False,
    extra: Extra = "generated",
    labelled: Labelled = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    class_names: ClassNames = None,
    part: Part = "",
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    seam: Seam = None,
    tensorboard: LogTo = None,
    force: ForceResult = False,
    resume: Annotated[bool, typer.Option(help="Continue a stopped run into OUT, if there is one")] = False,
    threads: Threads = None,
    config: ConfigFile = None,
) -> None:
    """Cut a teacher to a budget, make the student mimic it on a few images, verify and save the student."""
    given = dict(locals())  # every argument by its name
    set_threads(threads)
    from mimicut.base.ranks import is_first, joined
    from mimicut.recovery.config import preset as recipe
    from mimicut.results.folder import one_run

    budgets, options, asked = refuse_early(given)
    places = budgets if is_first() else ()
    with one_run(*places), joined(devices, device, sys.argv[1:], threads) as own_device:
        asked["device"] = own_device
        recipe(preset, effort, **asked)  # refuses impossible options before the teacher is loaded
        found = teacher_from(
            teacher, weights, pretrained, num_classes, part, input_size, mean, std, resize, views, class_names
        )
        asked["views"] = found.views
        options["config"] = recipe(preset, effort, **asked)
        _Runs(found, images, options, crossfit, tensorboard, len(budgets) > 1).all(budgets, out)


_OF_BUDGET = """params size_mb keep_width runtime threads batch depth scheme spare_ends drop pin exclude min_channels
    divisor seed"""
_OF_REQUEST = "force resume held_out held_out_share labelled extra seam max_seconds min_agreement max_error output int8"


def refuse_early(
    given: Mapping[str, Any], *, elsewhere: bool = False
) -> "tuple[dict[Path, BudgetOptions], RequestOptions, ConfigChanges]":
    """Refuse what can be refused before the teacher is loaded.

    Args:
        given: Every argument of the command, by its name.
        elsewhere: Whether another machine will run it, whose devices are not known here.

    Returns:
        Folder -> options of its budget, the options of every run, and those of the recipe.

    Raises:
        MimicutError: As `compress`.
    """
    from mimicut.recovery.config import preset as recipe

    def some(names: str) -> Any:
        return {name: given[name] for name in names.split()}

    shared: BudgetOptions = some(_OF_BUDGET)
    shared["score"] = given["importance"]
    options: RequestOptions = some(_OF_REQUEST)
    options["with_alternatives"], options["export_to"] = given["alternatives"], formats_in(given["to"])
    options["max_memory"] = bytes_in(given["max_memory"])
    budgets = _checked_budgets(shared, some("keep latency latency_ms"), given["plan"], given["out"], options)
    asked: ConfigChanges = some("steps seed device precision layout")
    _check_devices(given, recipe(given["preset"], given["effort"], **asked), len(budgets), elsewhere)
    return budgets, options, asked


def _check_devices(given: Mapping[str, Any], config: "MimicConfig", budgets: int, elsewhere: bool) -> None:
    """Refuse devices that are not there, and what several of them cannot do together."""
    import torch

    from mimicut.base.errors import InputError
    from mimicut.base.guard import resolve_device
    from mimicut.base.ranks import Ranks, asked_count, checked_kind, count_here
    from mimicut.recovery.mimic import check_ranks

    count = asked_count(given["devices"])
    if count != 1:
        checked_kind(count_here(count), config.device, elsewhere=elsewhere)
        check_ranks(config, Ranks(0, count))
        for several, what in ((given["crossfit"] is not None, "crossfit"), (budgets > 1, "several budgets")):
            if several:
                raise InputError(
                    f"working on {count} devices: found {what}, whose runs follow one another on one device; expected "
                    "one run, or no --devices"
                )
    elif config.device is not None and not elsewhere:
        device = torch.device(config.device)
        # A GPU that is there is not touched: in a sweep it is for the jobs.
        if device.type != "cuda" or torch.cuda.device_count() <= (device.index or 0):
            resolve_device(config.device)


def _checked_budgets(
    shared: "BudgetOptions",
    lists: dict[str, list[float] | None],
    plan: Path | None,
    out: Path,
    options: "RequestOptions",
) -> dict[Path, "BudgetOptions"]:
    """For each folder the options of its budget; a plan is put into `options`. Refuses everything that can be refused
    before the teacher is loaded."""
    from mimicut.proof.certificate import check_max_error, check_threshold
    from mimicut.proof.output_figures import check_kinds
    from mimicut.recovery.recover import check_seconds
    from mimicut.results.folder import check_writable
    from mimicut.runtime.export import check_formats
    from mimicut.surgery.budget import Budget, or_whole, refuse_beside_plan, several_budgets
    from mimicut.surgery.plan import read_plan

    if options["export_to"]:
        check_formats(options["export_to"])
    budgets = several_budgets(shared, **{name: values or () for name, values in lists.items()})
    if options["int8"] and plan is None:
        budgets = {name: or_whole(budget) for name, budget in budgets.items()}
    if plan is not None:
        options["plan"] = read_plan(plan)
    found = {out / name if name else out: budget for name, budget in budgets.items()}
    check_seconds(options["max_seconds"])
    check_threshold(options["min_agreement"])
    check_max_error(options["max_error"])
    check_kinds(options["output"])
    for place, budget in found.items():
        if plan is not None:
            refuse_beside_plan(budget)
        else:
            Budget.of(**budget)
        if not (options["resume"] and place.exists()):  # then compress checks it
            check_writable(place, force=options["force"])
    return found


class _Runs:
    """Runs of one or several budgets, one after the other."""

    def __init__(
        self,
        teacher: "Teacher",
        images: Path,
        options: "RequestOptions",
        crossfit: int | None,
        tensorboard: Path | None,
        several: bool,
    ):
        self._teacher, self._images, self._options = teacher, images, options
        self._crossfit, self._tensorboard, self._several = crossfit, tensorboard, several
        self._lines: list[dict[str, Any]] = []
        self._stopped: Any = None
        self._reason = ""
        self._code = 0

    def all(self, budgets: "dict[Path, BudgetOptions]", out: Path) -> None:
        """Run every budget, until the user stops one; print the JSON line, and exit with the worst code."""
        from mimicut.base.ranks import NotFirst

        try:
            for place, budget in budgets.items():
                if self.one(place, budget):
                    break
        except NotFirst:
            return
        self.end(out)

    def one(self, place: Path, budget: "BudgetOptions") -> bool:
        """Run one budget into `place`; True if the user stopped it."""
        from mimicut.base.errors import MimicutError, Stopped
        from mimicut.results.store import weights_digest

        if self._several:
            say(f"{place.name}:")
        before = weights_digest(place)
        progress = StepProgress(
            self._tensorboard / place.name if self._tensorboard and self._several else self._tensorboard
        )
        try:
            result = self._run(place, budget, progress)
        except MimicutError as error:
            if not self._several:
                raise
            say(f"mimicut: {error}")  # the other budgets may be met
            self._lines.append({"folder": str(place), "error": str(error)})
            self._code = max(self._code, error.exit_code)
            return False
        except Stopped as stopped:
            result = self._stopped = stopped.log
            self._reason = stopped.reason
        except KeyboardInterrupt:
            end_interrupted(place, weights_digest(place) != before)
        progress.end(result.report)
        say(result.report.table())
        self._add(result.report, None if result.folder is None else str(result.folder))
        return self._stopped is not None

    def _run(self, place: Path, budget: "BudgetOptions", progress: StepProgress) -> Any:
        from mimicut.workflow.compress import compress
        from mimicut.workflow.crossfit import crossfit

        run = compress if self._crossfit is None else partial(crossfit, folds=self._crossfit)
        options: Any = {**budget, **self._options}
        return run(self._teacher, self._images, folder=place, on_stage=stages(), on_step=progress, **options)

    def _add(self, report: "Report", folder: str | None) -> None:
        self._lines.append(result_line(report, folder))
        self._code = max(self._code, int(report.go is False))

    def end(self, out: Path) -> None:
        """Print the JSON line, and exit with the code of the runs."""
        answer({"results": self._lines} if self._several else self._lines[0])
        if self._stopped is not None:
            saved = "the student is saved as it is now"
            where = saved if self._stopped.folder else f"{out} holds another result and was not changed"
            why = f" ({self._reason})" if self._reason else ""
            say(f"mimicut: stopped{why}; {where}; the same command with --resume continues")
            sys.exit(INTERRUPTED)
        if self._code:
            sys.exit(self._code)
