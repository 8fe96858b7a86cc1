"""Views of the few images, in batches that belong to folds: what is solved from some is judged on the others.

An image and its exact copies are in one fold, so that no image judges what was solved from it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.recovery.batches import Batch, Source, count, image_keys, make_views, mix_batch, place_batch

BATCH = 64  # Views of a batch, at most. Source: assumption.


def batches_of(
    few: Source | Tensor,
    model: nn.Module,
    views: str,
    mixing: str,
    seed: int,
    folds: int,
    total: int,
    size: int = BATCH,
) -> tuple[list[Batch], list[int], int]:
    """Make batches of views of the images, each batch from one fold.

    Every image is seen at least once if `total` is at least the number of images. Every second batch of a fold is
    mixed. No image is in two folds, neither mixed nor as a copy.

    Args:
        few: The images.
        model: The network that takes the batches: they are put where its tensors are, in their dtype.
        views: A name in `augment.VIEWS`.
        mixing: A name in `augment.MIXES`.
        seed: Of all random choices.
        folds: Into how many folds the images are divided.
        total: How many views to make.
        size: Views of a batch, at most.

    Returns:
        The batches, the fold of each, and the number of views in all of them.
    """
    draws = torch.Generator().manual_seed(seed)
    planned = plan_batches(few, folds, [total], size, draws)
    made = list(make_batches(planned, few, model, views, mixing, draws))
    return made, [batch.fold for batch in planned], sum(len(batch.images) for batch in planned)


def iterate_batches(
    few: Source | Tensor, model: nn.Module, views: str, mixing: str, seed: int, total: int, size: int = BATCH
) -> Iterator[tuple[Batch, int]]:
    """Yield each batch of one fold with its number of views, made only when it is asked for. Args: as `batches_of`."""
    draws = torch.Generator().manual_seed(seed)
    planned = plan_batches(few, 1, [total], size, draws)
    made = make_batches(planned, few, model, views, mixing, draws)
    yield from zip(made, (len(batch.images) for batch in planned), strict=True)


@dataclass(frozen=True)
class PlannedBatch:
    """A batch that is not made yet: its fold, the indices of its images, and whether they are mixed."""

    fold: int
    images: list[int]
    mixed: bool


def plan_batches(
    few: Source | Tensor, folds: int, levels: Sequence[int], size: int, draws: torch.Generator
) -> list[PlannedBatch]:
    """Decide which images are in which batch.

    Args:
        few: The images.
        folds: Into how many folds they are divided; fewer where there are fewer distinct images.
        levels: Rising numbers of views; a batch ends at each. The last one is the number of all views.
        size: Views of a batch, at most.
        draws: Random numbers.

    Returns:
        The batches in turn from each fold, so that the first of them represent all. Up to the first level there are
        two from each fold, so that one is mixed.
    """
    indices_of_key: dict[Any, list[int]] = {}
    keys = image_keys(few)
    for index in torch.randperm(count(few), generator=draws).tolist():
        indices_of_key.setdefault(keys[index], []).append(index)
    copies = list(indices_of_key.values())
    folds = min(folds, len(copies))
    of_fold = []
    for fold in range(folds):
        own = [index for images in copies[fold::folds] for index in images]
        share = max(1, round(levels[-1] / folds))
        indices = (own * -(-share // len(own)))[:share]
        ends = [*(max(1, min(share, level // folds)) for level in levels[:-1]), share]
        cuts = _cut_at(indices, ends, size)
        of_fold.append([PlannedBatch(fold, part, bool(n % 2) and len(part) > 1) for n, part in enumerate(cuts)])
    return [batch for batches in zip_longest(*of_fold) for batch in batches if batch is not None]


def _cut_at(indices: list[int], ends: Sequence[int], size: int) -> list[list[int]]:
    """Cut into runs of at most `size` that end at each of `ends`; two at least before the first end."""
    runs: list[list[int]] = []
    begin = 0
    for end in ends:
        each = max(1, size if begin else min(size, -(-end // 2)))
        runs += [indices[start : min(start + each, end)] for start in range(begin, end, each)]
        begin = end
    return runs


def make_batches(
    planned: Iterable[PlannedBatch],
    few: Source | Tensor,
    model: nn.Module,
    views: str,
    mixing: str,
    draws: torch.Generator,
) -> Iterator[Batch]:
    """Yield each planned batch, made only when it is asked for. Args: as `batches_of`."""
    like = next((t for t in guard.named_tensors(model).values() if t.is_floating_point()), torch.empty(0))
    for each in planned:
        batch = place_batch(make_views(few, each.images, views, draws), like.device, like.dtype)
        yield mix_batch(batch, mixing, draws) if each.mixed else batch
