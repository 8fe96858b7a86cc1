"""mimicut export"""

from pathlib import Path
from typing import Annotated

import typer

from mimicut.cli.option_values import formats_in, set_threads
from mimicut.cli.options import FORMATS_HELP, Device, Extra, Pretrained, Threads, Weights
from mimicut.cli.printing import answer, say
from mimicut.cli.terminal_progress import stages


def export(
    folder: Annotated[Path, typer.Argument(help="A result folder; the files are written into it")],
    to: Annotated[str, typer.Option(help=FORMATS_HELP[0].upper() + FORMATS_HELP[1:])] = "onnx",
    images: Annotated[
        Path | None,
        typer.Option(help="Real images: files are compared with the student on them, and INT8 takes its ranges there"),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Images to compare all files on; default: those of --images that trained nothing"),
    ] = None,
    normalise: Annotated[
        bool, typer.Option(help="Files subtract the mean and divide by the deviation, and take values 0 to 1")
    ] = False,
    dynamic_size: Annotated[
        bool, typer.Option(help="Files take images of any height and width, where the network allows it")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION that builds the teacher, if it is your own code"),
    ] = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    explain: Annotated[
        bool, typer.Option(help="Compare every layer of each file with the student's: where it differs first")
    ] = False,
    int8_steps: Annotated[
        int, typer.Option(min=0, help="Steps in which the student learns in INT8, seeing its own rounding; try 100")
    ] = 0,
    extra: Extra = "generated",
    device: Device = None,
    force: Annotated[bool, typer.Option(help="Replace previously exported files")] = False,
    threads: Threads = None,
) -> None:
    """Write a result as files that run without its code; each is run by itself and compared with the student."""
    set_threads(threads)
    from mimicut.results.export_folder import export_folder
    from mimicut.results.layer_table import layer_table

    formats = formats_in(to)
    report = export_folder(
        folder, formats, images=images, held_out=held_out, teacher=teacher, weights=weights, pretrained=pretrained,
        normalise=normalise, dynamic_size=dynamic_size, explain=explain, int8_steps=int8_steps, extra=extra,
        device=device, on_stage=stages(), force=force,
    )  # fmt: skip
    say(report.table())
    if explain:
        say(layer_table(report, formats))
    table = {"int8": report.int8} if "int8" in formats else {}
    answer({"folder": str(folder), "exports": {name: report.exports[name] for name in formats}, **table})
