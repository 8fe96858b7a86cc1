"""mimicut recover"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mimicut.cli.config_file import ConfigFile
from mimicut.cli.option_values import formats_in, set_threads, teacher_from
from mimicut.cli.options import (
    ClassNames,
    Device,
    Effort,
    Extra,
    ForceResult,
    HeldOut,
    HeldOutShare,
    ImagesArg,
    InputSize,
    Labelled,
    Layout,
    LogTo,
    MaxError,
    MaxMemory,
    Mean,
    MinAgreement,
    NumClasses,
    OutputKind,
    Precision,
    Preset,
    Pretrained,
    Resize,
    Seam,
    Seed,
    Std,
    Steps,
    TeacherArg,
    Threads,
    Views,
    Weights,
)
from mimicut.cli.printing import answer, result_line, say
from mimicut.cli.terminal_progress import StepProgress, stages


def recover(
    teacher: TeacherArg,
    student: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION that returns the pruned network, with the teacher's module names")
    ],
    images: ImagesArg,
    out: Annotated[Path, typer.Option(help="Folder for the exported student and its report")],
    to: Annotated[str, typer.Option(help="Formats to store: pt2, onnx, openvino, separated by commas")] = "pt2",
    preset: Preset = "default",
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
    max_error: MaxError = None,
    output: OutputKind = None,
    extra: Extra = "generated",
    labelled: Labelled = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    class_names: ClassNames = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    seam: Seam = None,
    tensorboard: LogTo = None,
    force: ForceResult = False,
    threads: Threads = None,
    config: ConfigFile = None,
) -> None:
    """Recover a student that another tool pruned: it mimics the teacher, and is stored as exported files."""
    set_threads(threads)
    from mimicut.base.memory import parsed
    from mimicut.recovery.config import preset as recipe
    from mimicut.results.folder import check_writable, one_run
    from mimicut.results.teachers import load_teacher
    from mimicut.workflow.recover_pruned import recover_pruned

    check_writable(out, force=force)
    found = teacher_from(
        teacher, weights, pretrained, num_classes, "", input_size, mean, std, resize, views, class_names
    )
    how = recipe(
        preset, effort, steps=steps, seed=seed, device=device, precision=precision, layout=layout, views=found.views
    )
    most = None if max_memory is None else parsed(max_memory)
    progress = StepProgress(tensorboard)
    with one_run(out):
        _, report = recover_pruned(
            found, load_teacher(student).model, images, folder=out, force=force, named=student, config=how,
            export_to=formats_in(to), held_out=held_out, held_out_share=held_out_share, labelled=labelled, extra=extra,
            seam=seam, min_agreement=min_agreement, max_error=max_error, output=output,
            max_memory=most, on_stage=stages(), on_step=progress,
        )  # fmt: skip
    progress.end(report)
    say(report.table())
    answer(result_line(report, str(out)))
    if report.go is False:
        sys.exit(1)
