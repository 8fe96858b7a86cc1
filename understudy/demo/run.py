"""The demonstration: one embedded teacher, a few unlabelled patches, ten thousand labelled ones to measure on."""

from pathlib import Path
from typing import Any

from understudy import demo
from understudy.compress import Result, compress
from understudy.cut import cut
from understudy.images import read_images
from understudy.recover.config import preset
from understudy.teachers import load_teacher
from understudy.verify import accuracy

STEPS = 1000  # half of the paper's 2,000, so that the demo takes two minutes; what it costs is in docs/LOG.md


def run(
    name: str,
    *,
    keep: float | None = None,
    keep_width: float | None = None,
    images: int = 50,
    steps: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
    force: bool = False,
    **progress: Any,
) -> tuple[Result, float]:
    """Compress the demo teacher `name`; returns the result and the accuracy (percent) of the cut without recovery.

    The patches to learn from, those the teacher was trained on and the 10,000 of the test come from disjoint tiles.
    seed: of the patches and of mimic. Raises: InputError for unknown names and impossible options.
    """
    if keep is None and keep_width is None:
        keep_width = 0.5
    teacher = load_teacher(f"demo:{name}")
    config = preset("paper", views=teacher.views, steps=STEPS if steps is None else steps, seed=seed)
    x, y = demo.test_set()
    test = read_images(x, teacher.preprocessing)
    few = read_images(demo.few_images(images, config.seed), teacher.preprocessing)
    result = compress(
        teacher, few, folder=out, force=force, config=config, held_out=test, labelled=test, labels=y.tolist(),
        keep=keep, keep_width=keep_width, **progress,
    )  # fmt: skip
    raw = accuracy(teacher.model, cut(teacher.model, result.plan), test, y.tolist())
    return result, raw.top1_student
