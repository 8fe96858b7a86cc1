"""Estimate from the few images, without training, how well the loss of a dropped block can be repaired.

The block is dropped, the next layers after the gap are solved in closed form for the teacher's outputs, and the error
at the seam that is left is measured on images that nothing was solved from. Where few layers are left after the gap,
an affine map of the seam's channels stands for what those before it can learn. PRACTISE (arXiv 2202.07861) trains
adaptors around every gap for 1,000 steps and more to learn the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.cost import count_traced, macs_in
from mimicut.anatomy.graph import Anatomy, Block
from mimicut.base import guard
from mimicut.recovery.batches import Batch, Source, copied, count, subset
from mimicut.recovery.closed_form import ClosedFormOptions, solve
from mimicut.recovery.folds import batches_of
from mimicut.recovery.judge import Judge, channels_at
from mimicut.recovery.layers import Layer, solvable_layers, weights_after
from mimicut.recovery.view_budget import affordable_views
from mimicut.surgery.cut import drop_modules
from mimicut.surgery.seam import Seam, capturing

# Layers after the gap that are solved, and of large networks. Source: measured (docs/LOG.md), the latter for time.
LAYERS, LAYERS_LARGE = 8, 4
# How trials solve: from how many views, from how many positions of them, and into how many folds the images are parted
# to choose a ridge. Source: measured (docs/LOG.md): half of the folds and positions change no error by a tenth.
VIEWS, ROWS, FOLDS = 200, 6_000, 2
_MOST_INPUTS = 1200  # of a layer that trials solve. Source: assumption, for time.
_JUDGED = 3  # every so many of the images judges, and nothing is solved from it, and of the views. Source: assumption.
_WIDEST = 4096  # seam for which such a map is found. Source: assumption, for time and memory.
_RIDGE = 1e-2  # of that map, in units of the mean squared feature. Source: assumption.
# What the passes of one trial may cost, which bounds the views of large networks, and what there is of them at least.
# Source: assumption, for a plan of ResNet-50 at 224 pixels in five minutes on two idle cores.
_MACS, _FEWEST = 1e11, 16


@dataclass(frozen=True)
class Recoverable:
    """A block that can be dropped.

    Attributes:
        block: Its name.
        error: Squared error at the seam over the teacher's squared deviation, after the closed form, on images that it
            was not solved from.
        bare: The same before the closed form.
        macs: MACs of one image that dropping it saves.
    """

    block: str
    error: float
    bare: float
    macs: int


@dataclass(frozen=True)
class Held:
    """Images to solve from, and a judge with others. small: of layers, those that a trial solves in no time."""

    fit: Source | Tensor
    judge: Judge

    @staticmethod
    def small(todo: Sequence[Layer], student: nn.Module) -> list[Layer]:
        own = guard.named_tensors(student)
        return [layer for layer in todo if own[layer.weight][0].numel() <= _MOST_INPUTS]


def trial_views(anatomy: Anatomy) -> int:
    """The number of views from which a trial is solved."""
    macs_each = max(1, count_traced(anatomy.traced).macs)
    return min(VIEWS, affordable_views(anatomy), max(_FEWEST, int(_MACS / (2 * macs_each))))


def hold_out(teacher: nn.Module, anatomy: Anatomy, few: Source | Tensor, *, views: str, seed: int) -> Held:
    """A third of the images judges what is solved from the others; of three or fewer all do both."""
    indices = list(range(count(few)))
    judging = indices[::_JUDGED] if len(indices) > _JUDGED else indices
    fitting = [i for i in indices if i not in set(judging)] if len(indices) > _JUDGED else indices
    total = -(-trial_views(anatomy) // _JUDGED)
    batches, _, _ = batches_of(subset(few, judging), teacher, views, "none", seed, 1, total)
    return Held(subset(few, fitting), Judge(teacher, anatomy.seam, batches))


def recoverability(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    views: str = "none",
    seed: int = 0,
    blocks: Sequence[Block] | None = None,
    held: Held | None = None,
    layers: int | None = None,
    most_views: int | None = None,
    on_block: Callable[[int, int], None] | None = None,
) -> list[Recoverable]:
    """Estimate, for every block that can be dropped, the error that is left after the closed form.

    Args:
        teacher: The network that was traced; it is left as it was.
        anatomy: The whole network.
        few, views, seed: As for `closed_form`.
        blocks: The blocks to consider; by default all that can be dropped.
        held: From `hold_out`, if already made.
        layers: Number of layers after the gap to solve; by default LAYERS, or LAYERS_LARGE for a network whose trials
            see fewer views.
        most_views: Number of views to solve from; by default VIEWS, or fewer for a large network.
        on_block: Receives (blocks done, blocks).

    Returns:
        The blocks in the order in which they run.

    Raises:
        InputError: The images do not fit the network.
    """
    todo = list(droppable(anatomy) if blocks is None else blocks)
    total = trial_views(anatomy) if most_views is None else most_views
    layers = layers or (LAYERS if trial_views(anatomy) == VIEWS else LAYERS_LARGE)
    held = held or (hold_out(teacher, anatomy, few, views=views, seed=seed) if todo else None)
    found: list[Recoverable] = []
    for block in todo:
        assert held is not None  # as there is something to do
        student = drop_modules(guard.full_copy(teacher), block.dropped_modules)
        errors = [held.judge.error(student)]
        after = held.small(gap_layers(anatomy, block, student), student)[:layers]
        solve(
            teacher, student, anatomy, after, {}, held.fit,
            ClosedFormOptions(views=views, seed=seed, most_views=total, folds=FOLDS, rows=ROWS),
        )  # fmt: skip
        errors.append(held.judge.error(student))
        if len(after) < layers and held.judge.widest <= _WIDEST:
            learned, _, _ = batches_of(held.fit, teacher, views, "none", seed, 1, total)
            errors.append(held.judge.error(student, _mapped(teacher, student, anatomy.seam, learned)))
        cost = round(macs_in(block.branch, anatomy.traced.batch))
        found.append(Recoverable(block.name, min(errors), errors[0], cost))
        if on_block:
            on_block(len(found), len(todo))
    return found


def gap_layers(anatomy: Anatomy, block: Block, student: nn.Module) -> list[Layer]:
    """The layers of `student`, `anatomy`'s network without `block`, that run after the gap."""
    own = guard.named_tensors(student)
    assert block.branch_end is not None  # as it can be dropped
    after = weights_after(anatomy.traced, anatomy.traced.nodes.index(block.branch_end))
    found = [layer for layer in solvable_layers(anatomy, own) if layer.weight in after]
    lost = {layer.weight for layer in found if layer.shortcut is not None and layer.shortcut[0] not in own}
    return [replace(layer, shortcut=None) if layer.weight in lost else layer for layer in found]


def _mapped(
    teacher: nn.Module, student: nn.Module, seam: Seam, batches: Sequence[Batch]
) -> Callable[[int, Tensor], Tensor]:
    """The affine map of a point's channels that brings the student's features nearest to the teacher's, by ridge."""
    grams: list[Tensor] = []
    cross: list[Tensor] = []
    with (
        guard.evaluating(teacher),
        guard.evaluating(student),
        capturing(teacher, seam) as target,
        capturing(student, seam) as learner,
    ):
        for args, kwargs in batches:
            pairs = [
                watch.features(*given, **named)
                for watch in (learner, target)
                for given, named in [copied((args, kwargs))]
            ]
            for point, (ours, theirs) in enumerate(zip(*pairs, strict=True)):
                x, y = _rows(ours), _rows(theirs)
                if point == len(grams):
                    grams.append(x.new_zeros(x.shape[1], x.shape[1]))
                    cross.append(x.new_zeros(x.shape[1], y.shape[1] - 1))
                grams[point] += x.T @ x
                cross[point] += x.T @ (y - x)[:, :-1]
    maps = []
    for gram, moment in zip(grams, cross, strict=True):
        hold = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        maps.append(torch.linalg.solve(gram + hold, moment))

    def change(point: int, feats: Tensor) -> Tensor:
        more = (_rows(feats) @ maps[point]).to(feats.dtype)
        axis = channels_at(feats)
        return feats + more.reshape(feats.movedim(axis, -1).shape).movedim(-1, axis)

    return change


def _rows(feats: Tensor) -> Tensor:
    """(positions, channels + 1) float64, the last always 1."""
    rows = feats.movedim(channels_at(feats), -1).flatten(0, -2).double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
