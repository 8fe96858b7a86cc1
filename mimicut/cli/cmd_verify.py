"""mimicut verify"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mimicut.cli.option_values import set_threads
from mimicut.cli.options import (
    Device,
    ImagesArg,
    Labelled,
    MaxError,
    MaxMemory,
    MinAgreement,
    Pretrained,
    Threads,
    Weights,
)
from mimicut.cli.printing import answer, result_line, say


def verify(
    folder: Annotated[Path, typer.Argument(help="A result folder")],
    images: ImagesArg,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher; needed if it is your own code, or a folder that has moved")
    ] = None,
    labelled: Labelled = None,
    weights: Weights = None,
    pretrained: Pretrained = True,
    device: Device = None,
    max_memory: MaxMemory = None,
    min_agreement: MinAgreement = None,
    max_error: MaxError = None,
    threads: Threads = None,
) -> None:
    """Measure a stored result against its teacher on other images, and check the laws that can be checked."""
    set_threads(threads)
    from mimicut.base.memory import parsed
    from mimicut.workflow.verify import verify_folder

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
        max_error=max_error,
    )
    say(report.table())
    answer(result_line(report, str(folder)))
    if report.go is False:
        sys.exit(1)
