"""Rehearsal: try on images set aside, before mimicking begins, whether it helps and with which step length.

A quarter of the few images is set aside; a closed form and a few steps from the others show what both do for these. All
of that is thrown away, and every image trains in the end: of fifty images those set aside for good would cost more than
any choice by them gains (docs/LOG.md). Where there are images to choose by already, they judge.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.errors import Diverged, Stopped
from mimicut.base.progress import SpokenProgress
from mimicut.recovery.batches import Batch, Source, WithExtra, count, image_keys, make_views, place_batch, subset
from mimicut.recovery.closed_form import ClosedFormOptions, closed_form
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.judge import Judge
from mimicut.recovery.mimic import mimic

ASIDE = 0.25  # The share of the few images that judges. Source: assumption.
FEWEST = 4  # Distinct images from which some can be set aside. Source: assumption.
# Steps of a rehearsal: this share of the run's, but within these bounds. Source: assumption, for time.
STEPS_SHARE, LEAST_STEPS, MOST_STEPS = 0.1, 5, 20
VIEWS_SHARE = 0.25  # The share of the closed form's views that a rehearsal has. Source: assumption, for time.
VIEWS_EACH = 3  # Random views of each image set aside, beside the plain one. Source: assumption.
# Shares of the rate that are tried, until one makes the error smaller: not the best one, since few steps flatter small
# rates. Source: assumption.
RATES = (1.0, 0.3, 0.1)
# Where every one did harm, the whole rate is tried again for this share of the run's steps: a recipe that gains in the
# end may begin with a loss. Source: measured (docs/LOG.md): resnet14 at half its widths, 20 images: 0.312 before, 0.352
# after 20 steps, 0.251 after 100.
LONGER_SHARE = 0.25


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

    Attributes:
        images: Number of images that judged.
        steps: Number of steps in each try.
        error: Error at the seam on these images before any step, over the teacher's squared deviation.
        tried: (share of the rate, error after the steps); the error is infinite, in JSON null, if the loss was not
            finite.
        longer: (steps, error after them at the whole rate), where each of `tried` did harm.
        without_extra: Error after as many steps at the rate that was chosen, without the extra images; None where there
            are none. Nothing is decided by it: a few steps on few images do not show what extra images are worth.
        alone: (share of the rate, error after the steps) on the few images alone, where every try with the extra ones
            did harm: the first that does none, else None. The extra ones are then left out.
    """

    images: int
    steps: int
    error: float
    tried: tuple[tuple[float, float], ...]
    longer: tuple[int, float] | None = None
    without_extra: float | None = None
    alone: tuple[float, float] | None = None

    @property
    def rate(self) -> float:
        """The share of the rate that was chosen, the last one tried; 0 where every one did harm."""
        if self.alone is not None:
            return self.alone[0]
        share, error = self.tried[-1] if self.longer is None else (RATES[0], self.longer[1])
        return share if error < self.error else 0.0

    def to_json(self) -> dict[str, Any]:
        def known(error: float | None) -> float | None:
            return error if error is not None and isfinite(error) else None

        tried = [[share, known(error)] for share, error in self.tried]
        longer = self.longer and [self.longer[0], known(self.longer[1])]
        return {
            **vars(self), "tried": tried, "longer": longer, "without_extra": known(self.without_extra),
            "rate": self.rate,
        }  # fmt: skip

    def __str__(self) -> str:
        each = ", ".join(f"{error:.3f} with {share:g} times the rate" for share, error in self.tried)
        found = f"{self.images} images set aside: error {self.error:.3f}; after {self.steps} steps {each}"
        if self.longer is not None:
            found += f"; after {self.longer[0]} steps at the whole rate {self.longer[1]:.3f}"
        if self.alone is not None:
            share, error = self.alone
            return f"{found}; {error:.3f} with {share:g} times the rate without the extra images, which are left out"
        if not self.rate:
            return f"{found}; mimicking makes the student worse and is left out"
        return found if self.without_extra is None else f"{found} (without extra images {self.without_extra:.3f})"


def divide(few: Source | Tensor, seed: int) -> tuple[list[int], list[int]] | None:
    """Divide the images into those that train and those set aside. Copies of an image stay together.

    Returns:
        The indices of both; None where there are too few distinct images.
    """
    indices_of_key: dict[Any, list[int]] = {}
    for index, key in enumerate(image_keys(few)):
        indices_of_key.setdefault(key, []).append(index)
    if len(indices_of_key) < FEWEST:
        return None
    copies = list(indices_of_key.values())
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = max(1, round(ASIDE * len(copies)))
    return (
        sorted(i for at in order[aside:] for i in copies[at]),
        sorted(copies[at][0] for at in order[:aside]),
    )


def rehearse(
    case: CutStudent,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    most_views: int,
    longer: bool = True,
    max_memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rehearsal | None:
    """Try what a recipe does, on some of the images set aside.

    Args:
        case: The networks. Its student is the cut before anything was solved, which is changed.
        few: The images.
        config: The recipe, its rate decided.
        most_views: How many views the whole closed form sees.
        longer: As of `try_rates`.
        max_memory: As of `closed_form` and `mimic`.
        say: Called with sentences about the progress.

    Returns:
        What was found; None where there are too few distinct images.

    Raises:
        As `closed_form` and `mimic`.
    """
    divided = divide(few, config.seed)
    if divided is None:
        return None
    rest, aside = (subset(few, indices) for indices in divided)
    closed_form(
        case,
        rest,
        ClosedFormOptions(
            views=config.views, seed=config.seed, most_views=max(count(rest), round(VIEWS_SHARE * most_views)),
            max_memory=max_memory,
        ),
        on_layer=SpokenProgress(say, "layer"),
    )  # fmt: skip
    judge = Judge(case.teacher, case.plan.seam, _views_to_judge(aside, case.student, config))
    return try_rates(judge, count(aside), case, rest, config, longer=longer, max_memory=max_memory, say=say)


def try_rates(
    judge: Judge,
    images: int,
    case: CutStudent,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    longer: bool = True,
    max_memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rehearsal:
    """Try shares of the rate until one makes the error smaller.

    Args:
        judge: Of students, by images that are none of `few`.
        images: How many these are.
        case: The networks; none is changed.
        longer: Whether there is time to try LONGER_SHARE of the run's steps, where each share does harm.
        few, config, max_memory, say: As of `rehearse`.
    """
    assert config.lr is not None  # it is decided
    steps = min(config.steps, max(LEAST_STEPS, min(MOST_STEPS, round(STEPS_SHARE * config.steps))))
    rate, before = config.lr, judge.error(case.student)

    def error_after(images: Source | Tensor, share: float, steps: int = steps) -> float:
        trial = guard.full_copy(case.student)
        short, progress = replace(config, steps=steps, lr=rate * share), SpokenProgress(say, "step")
        try:
            mimic(case.teacher, trial, case.plan.seam, images, short, on_step=progress, max_memory=max_memory)
        except Stopped:
            raise KeyboardInterrupt from None  # a rehearsal leaves nothing to keep
        except Diverged:
            return inf
        return judge.error(trial)

    tried: list[tuple[float, float]] = []
    for share in RATES:
        tried.append((share, error_after(few, share)))
        if tried[-1][1] < before:
            break
    found, more = Rehearsal(images, steps, before, tuple(tried)), round(LONGER_SHARE * config.steps)
    if not found.rate and longer and more > steps and isfinite(tried[0][1]):
        say(f"each did harm; trying {more} steps")
        found = replace(found, longer=(more, error_after(few, RATES[0], more)))
    if isinstance(few, WithExtra) and found.rate:
        found = replace(
            found, without_extra=error_after(few.few, found.rate, found.longer[0] if found.longer else steps)
        )
    elif isinstance(few, WithExtra):
        say("each did harm; trying without the extra images")
        alone = ((share, error_after(few.few, share)) for share in RATES)
        found = replace(found, alone=next((each for each in alone if each[1] < before), None))
    return found


def _views_to_judge(few: Source | Tensor, model: nn.Module, config: MimicConfig) -> list[Batch]:
    """Every image as it is, and some random views of each, unmixed."""
    like = next(t for t in guard.named_tensors(model).values() if t.is_floating_point())
    draws = torch.Generator().manual_seed(config.seed)
    kinds = ["none"] + [config.views] * (VIEWS_EACH if config.views != "none" else 0)
    starts = range(0, count(few), config.batch_size)
    parts = [list(range(start, min(start + config.batch_size, count(few)))) for start in starts]
    views = (make_views(few, part, kind, draws) for kind in kinds for part in parts)
    return [place_batch(each, like.device, like.dtype) for each in views]
