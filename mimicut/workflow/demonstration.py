"""The demonstration: a teacher that ships with mimicut, or a real one, and a few unlabelled images."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut import demo
from mimicut.demo.crops import write_crops
from mimicut.demo.imagenet import NAMES as REAL
from mimicut.inputs.image_set import ImageSet, read_images
from mimicut.inputs.preprocessing import PreprocessingFields
from mimicut.inputs.teacher import Teacher
from mimicut.recovery.config import MimicConfig, preset
from mimicut.results import answers as shown_answers
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut
from mimicut.workflow.compress import Result, compress
from mimicut.workflow.request import OnStage, OnStep

SIDE = 160  # side of the images for real teachers, in pixels. Source: assumption: fast enough on two cores.
HELD_OUT, HELD_OUT_SEED = 120, 0  # number of crops that certify a student of a real teacher, and their seed
# Steps for a real teacher if neither steps nor effort are given. Source: measured: with EfficientNet-Lite0 the whole
# run takes 340 seconds in one thread, 180 of them for these steps, so two cores finish in less than five minutes.
STEPS = 40
KEEP = 0.7  # share of the MACs of a real teacher
SHOWN = 12  # number of images whose answers are shown


@dataclass(frozen=True)
class Demo:
    """The result of the demonstration.

    Attributes:
        result: As `compress` returns it.
        cut_alone: Percent of the held-out images that the cut without recovery gets right, or, without labels, agrees
            on with the teacher.
        labelled: Whether the held-out images have labels.
        answers: The answers of teacher and student to some held-out images.
        picture: The file in which they are drawn.
    """

    result: Result
    cut_alone: float
    labelled: bool
    answers: list[shown_answers.Answer]
    picture: Path

    def to_json(self) -> dict[str, Any]:
        """The entries of the JSON line beside the report's figures."""
        return {"top1_cut" if self.labelled else "agreement_cut": self.cut_alone, "picture": str(self.picture)}

    def table(self) -> str:
        """The report's table, the cut alone, and the answers, with the notes last."""
        measure = "" if self.labelled else " agreement"
        own = [f"cut and not recovered:{measure} {self.cut_alone:.2f} %", "", shown_answers.lines(self.answers)]
        return self.result.report.table(before_notes=[*own, f"picture of these answers: {self.picture}"])


def recipe_for(
    name: str, recipe: str = "default", effort: str | None = None, steps: int | None = None, seed: int | None = None
) -> MimicConfig:
    """Return the recipe for the demo teacher `name`.

    For a real teacher without steps or effort it takes STEPS steps, so that it finishes in minutes.

    Args:
        name: The teacher.
        recipe, effort, steps, seed: As `preset`.

    Raises:
        InputError: The options are impossible.
    """
    if name in REAL and steps is None and effort is None:
        steps = STEPS
    return preset(recipe, effort, steps=steps, seed=seed)


def run(
    name: str,
    *,
    config: MimicConfig | None = None,
    keep: float | None = None,
    keep_width: float | None = None,
    images: int = 50,
    out: Path | None = None,
    force: bool = False,
    resume: bool = False,
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
) -> Demo:
    """Compress the demo teacher `name`, and draw both networks' answers beside the result or in the temporary folder.

    With a small teacher, the patches to learn from, those the teacher was trained on and the 10,000 of the test come
    from disjoint tiles. With a real teacher (`demo.imagenet`) the images are crops of photographs without labels; the
    held-out ones come from the other halves of the photographs.

    Args:
        name: The teacher.
        config: How to mimic, by default `recipe_for(name)`; its views are set to the teacher's, and its seed also draws
            the images.
        keep, keep_width: The budget; by default KEEP of the MACs of a real teacher, half of the widths of another.
        images: Number of images to learn from.
        out, force, resume, on_stage, on_step: As `compress`; out is its folder.

    Raises:
        InputError: The name is unknown, or the options are impossible.
    """
    real = name in REAL
    size: PreprocessingFields = {"input_size": (3, SIDE, SIDE)} if real else {}
    teacher = load_teacher(f"demo:{name}", **size)
    config = replace(config or recipe_for(name), views=teacher.views)
    if keep is None and keep_width is None:
        keep, keep_width = (KEEP, None) if real else (None, 0.5)
    with _real_images(teacher, images, config.seed) if real else _patches(teacher, images, config.seed) as drawn:
        few, held_out, truth = drawn
        given: dict[str, Any] = {} if truth is None else {"labelled": held_out, "labels": truth.tolist()}
        result = compress(
            teacher, few, folder=out, force=force, resume=resume, config=config, held_out=held_out, keep=keep,
            keep_width=keep_width, on_stage=on_stage, on_step=on_step, **given,
        )  # fmt: skip
        answers = shown_answers.answers(teacher.model, result.model, held_out, teacher.classes, SHOWN)
        saved = result.folder
        picture = Path(tempfile.gettempdir(), "mimicut-demo.png") if saved is None else saved.with_suffix(".png")
        _draw(picture, name, result, answers, held_out)
        cut_alone = _cut_alone(teacher.model, cut(teacher.model, result.plan), held_out, truth)
    return Demo(result, cut_alone, truth is not None, answers, picture)


Images = tuple[ImageSet, ImageSet, torch.Tensor | None]


@contextmanager
def _patches(teacher: Teacher, images: int, seed: int) -> Iterator[Images]:
    x, y = demo.test_set()
    yield read_images(demo.few_images(images, seed), teacher.preprocessing), read_images(x, teacher.preprocessing), y


@contextmanager
def _real_images(teacher: Teacher, images: int, seed: int) -> Iterator[Images]:
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for part, count, at in (("few", images, seed), ("held_out", HELD_OUT, HELD_OUT_SEED)):
            write_crops(Path(folder, part), part, count, at)
            parts.append(read_images(Path(folder, part), teacher.preprocessing))
        yield parts[0], parts[1], None


def _draw(path: Path, name: str, result: Result, answers: list[shown_answers.Answer], images: ImageSet) -> None:
    report = result.report
    macs = 100 * report.macs_student / report.macs_teacher  # type: ignore[operator]  # `compress` counts both
    same = 100 * report.top1_agreement  # type: ignore[operator]  # what a demo's teacher gives are class scores
    kept = f"{macs:.0f} % of the MACs"
    below = f"same answer on {same:.1f} % of {report.images_held_out:,} held-out images"
    shown_answers.draw(path, answers, images, f"{name} and its student with {kept}", below)


@torch.no_grad()
def _cut_alone(teacher: nn.Module, student: nn.Module, images: ImageSet, truth: torch.Tensor | None) -> float:
    """Percent of the images on which the cut student is right, or, without labels, agrees with the teacher."""
    right = 0
    for where in torch.arange(len(images)).split(500 if truth is not None else 16):
        x = images.batch(where.tolist())
        wanted = teacher(x).argmax(1) if truth is None else truth[where]
        right += int((student(x).argmax(1) == wanted).sum())
    return 100 * right / len(images)
