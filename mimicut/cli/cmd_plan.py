"""mimicut plan"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimicut.cli.option_values import blank_example, set_threads, teacher_from
from mimicut.cli.options import (
    Batch,
    Depth,
    Divisor,
    Drop,
    Exclude,
    Importance,
    InputSize,
    Keep,
    KeepWidth,
    MinChannels,
    NumClasses,
    Params,
    Part,
    Pin,
    Pretrained,
    Runtime,
    Scheme,
    Seam,
    Seed,
    SizeMb,
    SpareEnds,
    TeacherArg,
    Threads,
    Weights,
)
from mimicut.cli.printing import answer, frontier_table, say

if TYPE_CHECKING:
    from mimicut.anatomy.graph import Anatomy
    from mimicut.inputs.teacher import Teacher
    from mimicut.surgery.budget import Budget
    from mimicut.surgery.plan import Plan


def plan(
    teacher: TeacherArg,
    out: Annotated[Path | None, typer.Option(help="File for the plan, as JSON to read and edit")] = None,
    keep: Keep = None,
    keep_width: KeepWidth = None,
    params: Params = None,
    size_mb: SizeMb = None,
    latency: Annotated[
        float | None, typer.Option(help="Share of the teacher's latency", rich_help_panel="Budget")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of a forward pass", rich_help_panel="Budget")
    ] = None,
    runtime: Runtime = None,
    batch: Batch = None,
    depth: Depth = None,
    picture: Annotated[
        Path | None, typer.Option(help="Without a budget: file for a drawing of the frontier, .png or .svg")
    ] = None,
    scheme: Scheme = None,
    spare_ends: SpareEnds = False,
    drop: Drop = None,
    pin: Pin = None,
    exclude: Exclude = None,
    min_channels: MinChannels = None,
    divisor: Divisor = None,
    importance: Importance = None,
    images: Annotated[
        Path | None, typer.Option(help="A few images, which decide what channels matter", rich_help_panel="Budget")
    ] = None,
    seed: Seed = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    part: Part = "",
    input_size: InputSize = None,
    seam: Seam = None,
    force: Annotated[bool, typer.Option(help="Replace an existing plan file")] = False,
    threads: Threads = None,
) -> None:
    """Decide what to keep under a budget, and print or write the plan; nothing is trained.

    With images and without a budget: estimate what students of several sizes would lose, on a runtime if one is named.
    """
    set_threads(threads)
    from mimicut.results.picture import check_picture
    from mimicut.surgery.budget import Budget, BudgetOptions
    from mimicut.surgery.plan import check_plan_file

    if out is not None:
        check_plan_file(out, force=force)
    if picture is not None:
        check_picture(picture)
    asked: BudgetOptions = {
        "keep": keep, "params": params, "size_mb": size_mb, "keep_width": keep_width, "latency": latency,
        "latency_ms": latency_ms,
    }  # fmt: skip
    others: BudgetOptions = {
        "runtime": runtime, "threads": threads, "batch": batch, "depth": depth, "scheme": scheme,
        "spare_ends": spare_ends, "drop": drop, "pin": pin, "exclude": exclude,
        "min_channels": min_channels, "divisor": divisor, "score": importance, "seed": seed,
    }  # fmt: skip
    showing = images is not None and not drop and all(value is None for value in asked.values())
    _check_showing(showing, picture, out, asked)
    size: BudgetOptions = {"keep": 1.0} if runtime is None else {"latency": 1.0}  # where a frontier begins
    options: BudgetOptions = {**others, **(size if showing else asked)}
    budget = Budget.of(**options)
    found = teacher_from(teacher, weights, pretrained, num_classes, part, input_size)
    known = _read(found, images, seam, budget, seed or 0, showing)
    if showing:
        return _show_frontier(teacher, known, budget, picture)
    return _write_plan(teacher, known, _planned(known, budget), out, force)


def _check_showing(showing: bool, picture: Path | None, out: Path | None, asked: Any) -> None:
    from mimicut.base.errors import InputError

    if picture is not None and any(value is not None for value in asked.values()):
        raise InputError("reading --picture: found a budget; expected none, since it draws the frontier of all sizes")
    if showing and out is not None:
        raise InputError("reading --out: found no budget to make a plan for; give one (--keep, --latency, ...)")


@dataclass(frozen=True)
class _Known:
    """The teacher's network, the images and their evidence; `few` and `evidence` are None without images."""

    teacher: "Teacher"
    anatomy: "Anatomy"
    few: Any
    hashes: list[str]
    evidence: Any
    seed: int


def _read(
    teacher: "Teacher", images: Path | None, seam: list[str] | None, budget: "Budget", seed: int, showing: bool
) -> _Known:
    from mimicut.anatomy.find_seam import trace
    from mimicut.base.errors import PlanError
    from mimicut.inputs.image_set import bind_call
    from mimicut.planning.evidence import channel_evidence
    from mimicut.planning.survey import setting_of
    from mimicut.workflow.intake import images_to_plan

    searching = showing or budget.searches
    setting_of(budget)
    if images is None and searching:
        raise PlanError("making a plan: a latency or a depth needs images; add --images DIR")
    read, example = (None, blank_example(teacher)) if images is None else images_to_plan(teacher, images)
    anatomy = trace(teacher.model, example, points=seam, drop=() if searching else budget.drop)
    if read is None:
        return _Known(teacher, anatomy, None, [], None, seed)
    few, evidence = bind_call(read, teacher.call), None
    if budget.score is None:
        evidence = channel_evidence(teacher.model, anatomy, few, views=teacher.views, seed=seed)
    return _Known(teacher, anatomy, few, read.hashes, evidence, seed)


def _findings(known: _Known, **more: Any) -> Any:
    from mimicut.planning.survey import Findings

    return Findings(views=known.teacher.views, seed=known.seed, evidence=known.evidence, **more)


def _show_frontier(teacher: str, known: _Known, budget: "Budget", picture: Path | None) -> None:
    from mimicut.planning.frontier import plan_frontier
    from mimicut.results.picture import draw_frontier

    rows = plan_frontier(known.teacher.model, known.anatomy, known.few, budget, given=_findings(known), say=say)
    say(frontier_table(rows))
    if picture is not None:
        draw_frontier(picture, rows, teacher)
    answer({"teacher": teacher, "frontier": rows, "picture": picture and str(picture)})


def _planned(known: _Known, budget: "Budget") -> "Plan":
    from mimicut.planning.mixtures import plan_mixture
    from mimicut.planning.planner import make_plan
    from mimicut.recovery.config import preset

    teacher, source = known.teacher, known.teacher.to_json()
    if budget.searches:
        given = _findings(known, recipe=preset("default", views=teacher.views, seed=known.seed))
        made = plan_mixture(teacher.model, known.anatomy, known.few, budget, given=given, say=say)
        made = replace(made, teacher={**made.teacher, "source": source})
    else:
        made = make_plan(teacher.model, known.anatomy, budget, evidence=known.evidence, source=source)
    return replace(made, images=known.hashes)


def _write_plan(teacher: str, known: _Known, made: "Plan", out: Path | None, force: bool) -> None:
    from mimicut.base.disk import write
    from mimicut.base.scratch import replace_file
    from mimicut.surgery.plan import check_plan_file

    groups = known.anatomy.groups
    widths = {name: [width, groups[name].width] for name, width in made.widths.items() if name in groups}
    say("\n".join(f"{n}: {w} of {full}" for n, (w, full) in widths.items() if w != full))
    say("\n".join([f"dropped: {d}" for d in made.drop] + [f"note: {n}" for n in made.notes]))
    if out is not None:
        check_plan_file(out, force=force)  # again: another process may have written it
        replace_file(out, lambda fresh: write(fresh, made.dumps()))
    answer(
        {
            "teacher": teacher, "macs_teacher": made.macs["teacher"], "macs_student": made.macs["student"],
            "scheme": made.scheme, "widths": widths, "drop": made.drop,
            "latency": made.latency and made.latency.to_json(), "plan": out and str(out),
        }
    )  # fmt: skip
