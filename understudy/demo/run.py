"""The demonstration: one embedded teacher, a few unlabelled patches, ten thousand labelled ones to measure on."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy import demo
from understudy.compress import Result, compress
from understudy.cut import cut
from understudy.images import read_images
from understudy.recover.config import preset
from understudy.teachers import load_teacher


def run(
    name: str,
    *,
    keep: float | None = None,
    keep_width: float | None = None,
    images: int = 50,
    recipe: str = "default",
    effort: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
    force: bool = False,
    **progress: Any,
) -> tuple[Result, float]:
    """Compress the demo teacher `name`; returns the result and the accuracy (percent) of the cut without recovery.

    The patches to learn from, those the teacher was trained on and the 10,000 of the test come from disjoint tiles.
    recipe, effort, steps: as `recover.config.preset`. seed: of the patches and of all else.
    Raises: InputError for unknown names and impossible options.
    """
    if keep is None and keep_width is None:
        keep_width = 0.5
    teacher = load_teacher(f"demo:{name}")
    config = preset(recipe, effort, views=teacher.views, steps=steps, seed=seed)
    x, y = demo.test_set()
    test = read_images(x, teacher.preprocessing)
    few = read_images(demo.few_images(images, config.seed), teacher.preprocessing)
    result = compress(
        teacher, few, folder=out, force=force, config=config, held_out=test, labelled=test, labels=y.tolist(),
        keep=keep, keep_width=keep_width, **progress,
    )  # fmt: skip
    return result, _top1(cut(teacher.model, result.plan), x, y)


@torch.no_grad()
def _top1(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(y)
