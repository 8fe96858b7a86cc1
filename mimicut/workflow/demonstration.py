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
from mimicut.results import answers as said
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut
from mimicut.workflow.compress import Result, compress
from mimicut.workflow.request import OnStage, OnStep

SIDE = 160  # pixels that the real teachers are given. Source: assumption: two cores are quick enough at it.
HELD_OUT, HELD_OUT_SEED = 120, 0  # crops that certify a student of a real teacher
# Of a real teacher, where neither steps nor effort are given. Source: measured: EfficientNet-Lite0, everything takes
# 340 seconds of one thread, of which 180 are these steps, so that two cores are done in less than five minutes.
STEPS = 40
KEEP = 0.7  # of the MACs of a real teacher
SHOWN = 12  # images whose answers are shown


@dataclass(frozen=True)
class Demo:
    """cut_alone: percent that the cut without recovery gets right, of a real teacher agrees on. labelled: which of the
    two it is. answers: what both say of some held-out images. picture: where they are drawn."""

    result: Result
    cut_alone: float
    labelled: bool
    answers: list[said.Answer]
    picture: Path

    def to_json(self) -> dict[str, Any]:
        """What the JSON line says beside the report's figures."""
        return {"top1_cut" if self.labelled else "agreement_cut": self.cut_alone, "picture": str(self.picture)}

    def table(self) -> str:
        """The report's, the cut alone, and the answers, with the notes last."""
        what = "" if self.labelled else " agreement"
        own = [f"cut and not recovered:{what} {self.cut_alone:.2f} %", "", said.lines(self.answers)]
        return self.result.report.table(before_notes=[*own, f"picture of these answers: {self.picture}"])


def recipe_for(
    name: str, recipe: str = "default", effort: str | None = None, steps: int | None = None, seed: int | None = None
) -> MimicConfig:
    """The recipe for the demo teacher `name`: for a real one STEPS, to be done in minutes, where neither steps nor
    effort are given.

    Args:
        name: The teacher.
        recipe, effort, steps, seed: As `preset`.

    Raises:
        InputError: For impossible options.
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
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
) -> Demo:
    """Compress the demo teacher `name`, and draw what both answer: beside the result, or where temporary files go.

    Of the small teachers the patches to learn from, those the teacher was trained on and the 10,000 of the test come
    from disjoint tiles. Of a real teacher (`demo.imagenet`) the images are crops of photographs, the held-out ones of
    their other halves, without labels.

    Args:
        name: The teacher.
        config: How to mimic, by default `recipe_for(name)`; its views are the teacher's, its seed is that of the images
            too.
        keep, keep_width: The budget; by default KEEP of the MACs of a real teacher, half of the width of another.
        images: How many to learn from.
        out, force, on_stage, on_step: As `compress`.

    Raises:
        InputError: For unknown names and impossible options.
    """
    real = name in REAL
    size: PreprocessingFields = {"input_size": (3, SIDE, SIDE)} if real else {}
    teacher = load_teacher(f"demo:{name}", **size)
    config = replace(config or recipe_for(name), views=teacher.views)
    if keep is None and keep_width is None:
        keep, keep_width = (KEEP, None) if real else (None, 0.5)
    with _real_images(teacher, images, config.seed) if real else _patches(teacher, images, config.seed) as found:
        few, held_out, truth = found
        given: dict[str, Any] = {} if truth is None else {"labelled": held_out, "labels": truth.tolist()}
        result = compress(
            teacher, few, folder=out, force=force, config=config, held_out=held_out, keep=keep, keep_width=keep_width,
            on_stage=on_stage, on_step=on_step, **given,
        )  # fmt: skip
        told = said.answers(teacher.model, result.model, held_out, teacher.classes, SHOWN)
        saved = result.folder
        picture = Path(tempfile.gettempdir(), "mimicut-demo.png") if saved is None else saved.with_suffix(".png")
        _draw(picture, name, result, told, held_out)
        alone = _alone(teacher.model, cut(teacher.model, result.plan), held_out, truth)
    return Demo(result, alone, truth is not None, told, picture)


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


def _draw(path: Path, name: str, result: Result, told: list[said.Answer], images: ImageSet) -> None:
    report = result.report
    macs = 100 * report.macs_student / report.macs_teacher  # type: ignore[operator]  # `compress` counts both
    alike = 100 * report.top1_agreement  # type: ignore[operator]  # what a demo's teacher gives are class scores
    kept = f"{macs:.0f} % of the MACs"
    below = f"alike on {alike:.1f} % of {report.images_held_out:,} images that trained nothing"
    said.draw(path, told, images, f"{name} and its student with {kept}", below)


@torch.no_grad()
def _alone(teacher: nn.Module, student: nn.Module, images: ImageSet, truth: torch.Tensor | None) -> float:
    """Percent of the images on which the cut student is right, or agrees where there are no labels."""
    right = 0
    for where in torch.arange(len(images)).split(500 if truth is not None else 16):
        x = images.batch(where.tolist())
        wanted = teacher(x).argmax(1) if truth is None else truth[where]
        right += int((student(x).argmax(1) == wanted).sum())
    return 100 * right / len(images)
