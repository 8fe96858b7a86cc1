"""REHEARSAL: is mimicking worth it, and with which steps? Asked of images that take no part in it, before it begins.

A quarter of the few images is left aside; a closed form and a few steps from the others show how both fare on these.
All of that is thrown away, and every image trains in the end: of fifty images those set aside for good would cost more
than any choice by them gains (docs/LOG.md). Where there are images to choose by already, they judge.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base import guard
from mimicut.base.errors import Diverged, Stopped
from mimicut.base.progress import SpokenProgress
from mimicut.recovery.batches import Batch, Source, count, image_keys, make_views, place_batch, subset
from mimicut.recovery.closed_form import closed_form
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.judge import Judge
from mimicut.recovery.mimic import mimic
from mimicut.surgery.plan import Plan

ASIDE = 0.25  # Share of the few images that judge. Source: assumption.
FEWEST = 4  # Distinct images from which some can be left aside. Source: assumption.
# Steps of a rehearsal: this share of the run's, but within these. Source: assumption, for time.
STEPS_SHARE, LEAST_STEPS, MOST_STEPS = 0.1, 5, 20
VIEWS_SHARE = 0.25  # Of the closed form's views, those of a rehearsal's. Source: assumption, for time.
VIEWS_EACH = 3  # Random views of each image aside, beside the plain one. Source: assumption.
# Shares of the rate that are tried, until one makes the error smaller: not the best one, since few steps flatter small
# rates. Source: assumption.
RATES = (1.0, 0.3, 0.1)


@dataclass(frozen=True)
class Rehearsal:
    """images: how many judged. error: at the seam on them, before any step, over the teacher's squared deviation.
    tried: (share of the rate, error after the steps: infinite, in JSON null, where the loss was not finite). rate: the
    share that was chosen, the last one tried; 0 where every one did harm."""

    images: int
    steps: int
    error: float
    tried: tuple[tuple[float, float], ...]

    @property
    def rate(self) -> float:
        share, error = self.tried[-1]
        return share if error < self.error else 0.0

    def to_json(self) -> dict[str, Any]:
        tried = [[share, error if isfinite(error) else None] for share, error in self.tried]
        return {**vars(self), "tried": tried, "rate": self.rate}

    def __str__(self) -> str:
        each = ", ".join(f"{error:.3f} with {share:g} of the rate" for share, error in self.tried)
        found = f"{self.images} images that took no part: error {self.error:.3f}, after {self.steps} steps {each}"
        return found if self.rate else f"{found}; mimicking does harm here and is left out"


def parts_of(few: Source | Tensor, seed: int) -> tuple[list[int], list[int]] | None:
    """Indices of the images that train, and of those aside; None where there are too few. Equal ones stay together."""
    alike: dict[Any, list[int]] = {}
    for index, key in enumerate(image_keys(few)):
        alike.setdefault(key, []).append(index)
    if len(alike) < FEWEST:
        return None
    groups = list(alike.values())
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = max(1, round(ASIDE * len(groups)))
    return (
        sorted(i for at in order[aside:] for i in groups[at]),
        sorted(groups[at][0] for at in order[:aside]),
    )


def rehearse(
    teacher: nn.Module,
    cut: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    most_views: int,
    max_memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rehearsal | None:
    """How the recipe `config`, its rate known, does from `cut` on, the student before anything was solved, which is
    changed. most_views: that the whole closed form sees. None where there are too few images to tell.

    Raises: as `closed_form` and `mimic`.
    """
    parts = parts_of(few, config.seed)
    if parts is None:
        return None
    rest, aside = (subset(few, part) for part in parts)
    closed_form(
        teacher, cut, anatomy, plan, rest, views=config.views, seed=config.seed,
        most_views=max(count(rest), round(VIEWS_SHARE * most_views)), max_memory=max_memory,
        on_layer=SpokenProgress(say, "layer"),
    )  # fmt: skip
    judge = Judge(teacher, plan.seam, views_of(aside, cut, config))
    return tried_on(judge, count(aside), teacher, cut, plan, rest, config, max_memory, say)


def tried_on(
    judge: Judge,
    images: int,
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    max_memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rehearsal:
    """By a judge of so many images, none of `few`. `student` is untouched."""
    steps = min(config.steps, max(LEAST_STEPS, min(MOST_STEPS, round(STEPS_SHARE * config.steps))))
    before, tried = judge.error(student), []
    for share in RATES:
        trial = guard.full_copy(student)
        short = replace(config, steps=steps, lr=config.lr * share)
        try:
            mimic(teacher, trial, plan.seam, few, short, on_step=SpokenProgress(say, "step"), max_memory=max_memory)
        except Stopped:
            raise KeyboardInterrupt from None  # of a rehearsal there is nothing to keep
        except Diverged:
            tried.append((share, inf))
            continue
        tried.append((share, judge.error(trial)))
        if tried[-1][1] < before:
            break
    return Rehearsal(images, steps, before, tuple(tried))


def views_of(few: Source | Tensor, model: nn.Module, config: MimicConfig) -> list[Batch]:
    """Every image as it is, and some random views of it, unmixed."""
    like = next(t for t in guard.named_tensors(model).values() if t.is_floating_point())
    draws = torch.Generator().manual_seed(config.seed)
    kinds = ["none"] + [config.views] * (VIEWS_EACH if config.views != "none" else 0)
    starts = range(0, count(few), config.batch_size)
    parts = [list(range(start, min(start + config.batch_size, count(few)))) for start in starts]
    return [
        place_batch(make_views(few, part, kind, draws), like.device, like.dtype) for kind in kinds for part in parts
    ]
