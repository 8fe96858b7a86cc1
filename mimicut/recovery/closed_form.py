"""CLOSED FORM: the layers of a cut network are solved again for the teacher's outputs, by least squares, in one pass.

Layer by layer in the order in which they run: its inputs are the already solved student's, its targets the teacher's
outputs, so that each layer makes up for what is missing before it (He et al., ICCV 2017, arXiv 1707.06168); the last
layer of a branch makes up for the error of its shortcut too. `ridge` has the equation that is solved. A layer changes
only where that lowers the error on images that it was not solved from. Convolutions, also grouped and depthwise ones,
and linear layers with at most MOST_INPUTS inputs are solved; all else stays as the cut left it.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base import guard
from mimicut.base.layout import laid, layout_for
from mimicut.base.memory import trim
from mimicut.base.ranks import Ranks
from mimicut.inputs import augment
from mimicut.recovery.batches import Batch, Source, count
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.folds import PlannedBatch, make_batches, plan_batches
from mimicut.recovery.layers import Layer, layers_to_solve
from mimicut.recovery.lockstep import lockstep
from mimicut.recovery.moments import ROWS, CutTensors, Sampling, collect_moments
from mimicut.recovery.ridge import Solved, solve_layer
from mimicut.recovery.view_budget import (
    MEMORY_BYTES,
    affordable_views,
    layer_bytes,
    most_kept,
    tensor_bytes,
    useful_views,
    views_at_each,
    views_per_batch,
)
from mimicut.surgery.stand_ins import replace_multihead_attention

FOLDS = 4
_LEAST_RISE = 1.25  # Views join where so many times as many may be seen. Source: assumption, for time.


@dataclass(frozen=True)
class ClosedFormLog:
    """What the closed form did.

    layers: what was done to each. images, views: how many were used by the last layer, which sees the most. seconds:
    wall time. views_room: for how many views the memory has room at the layer where it has least, of `views_useful`,
    those that time allows and that would help.
    """

    layers: tuple[Solved, ...] = ()
    images: int = 0
    views: int = 0
    seconds: float = 0.0
    views_room: int = 0
    views_useful: int = 0

    @property
    def unsolved(self) -> str | None:
        """Why no layer was solved, for people; None where some were."""
        if self.layers:
            return None
        why = (
            f"{self.images} image(s) are too few, too alike, or too large for the memory"
            if self.images
            else "no layer from the first cut one on has a weight that is a plain parameter, used once"
        )
        return f"no layer was solved in closed form: {why}; mimicking starts from the cut itself"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "layers": [vars(each) for each in self.layers]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ClosedFormLog":
        return cls(**data | {"layers": tuple(Solved(**each) for each in data["layers"])})


@dataclass(frozen=True, kw_only=True)
class ClosedFormOptions:
    """How to solve.

    Args:
        views: A name in `augment.VIEWS`.
        mixing: A name in `augment.MIXES`; None: the one that goes with the views.
        seed: Of the views, folds and positions.
        count_views: How many views of the images; None: `view_budget.VIEWS`, more where that helps, and fewer for a
            network whose passes would cost more than `view_budget.MACS` or hold more than there is room for.
        max_seconds: Layers that are not solved by then stay as the cut left them.
        most_views: A bound on the views where count_views is not given.
        max_memory: Bytes that may be held besides the networks; None: `view_budget.MEMORY_BYTES`.
            `view_budget.needed_bytes` gives the least that is of use.
        folds: Into how many the images are divided to choose the ridge.
        rows: Positions, of all views, that a layer is solved from.
    """

    views: str = "none"
    mixing: str | None = None
    seed: int = 0
    count_views: int | None = None
    max_seconds: float | None = None
    most_views: int | None = None
    max_memory: int | None = None
    folds: int = FOLDS
    rows: int = ROWS

    @property
    def mixes(self) -> str:
        """The mixing, with the default applied."""
        own = augment.VIEWS[self.views].mixing if self.views in augment.VIEWS else "none"
        return self.mixing or own


@guard.exact_float32()
def closed_form(
    case: CutStudent,
    few: Source | Tensor,
    options: ClosedFormOptions = ClosedFormOptions(),
    *,
    ranks: Ranks | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> ClosedFormLog:
    """Solve the layers of the student, in place.

    Both networks are used in eval mode and come back as they were, but for weights, biases and batch norms' running
    means of the student; on an error these too are as before.

    Args:
        case: The networks; the student is changed.
        few: Images, as for `mimic`. Fewer than two different ones change nothing: none is left to judge.
        options: How.
        ranks: The processes that solve together; all make this call. Each runs its share of the batches, the first
            one solves, and all get its layers. Where there are fewer batches than processes, each solves by itself.
        on_layer: Called with (layers done, layers in all).

    Returns:
        What was done to each layer.

    Raises:
        InputError: The images do not fit.
    """
    layers = layers_to_solve(case.anatomy, case.plan, case.student)
    return solve(
        case.teacher, case.student, case.anatomy, layers, case.plan.slices, few, options, ranks=ranks, on_layer=on_layer
    )  # fmt: skip


@torch.no_grad()
def solve(
    teacher: nn.Module,
    student: nn.Module,
    anatomy: Anatomy,
    layers: Sequence[Layer],
    slices: Mapping[str, Mapping[int, list[int]]],
    few: Source | Tensor,
    options: ClosedFormOptions,
    *,
    ranks: Ranks | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> ClosedFormLog:
    """Solve these layers of `student`, in place, as `closed_form` does.

    Args:
        teacher: The network to imitate.
        student: The network to change.
        anatomy: Of the teacher.
        layers: Those to solve, in the order in which they run.
        slices: What the student keeps of each weight: name -> axis -> indices.
        few: The images.
        options: How.
        ranks, on_layer: As of `closed_form`.
    """
    started = time.perf_counter()
    images = count(few) if layers else 0
    if images < 2:  # there is no image to judge on
        return ClosedFormLog(images=images, seconds=time.perf_counter() - started)
    draws = torch.Generator().manual_seed(options.seed)
    schedule = _schedule(student, anatomy, layers, few, options, draws)
    if schedule.folds < 2 or not schedule.layers:  # copies of one image, or no layer that fits the memory
        return ClosedFormLog(images=images, seconds=time.perf_counter() - started)
    watchable = watchable_copy(teacher)
    tensors = CutTensors(guard.named_tensors(watchable), guard.named_tensors(student), slices)
    positions = torch.Generator().manual_seed(options.seed)
    batches = make_batches(schedule.batches, few, student, options.views, options.mixes, draws)
    if ranks is not None and ranks.count <= schedule.taking_part[0]:  # there is a batch for each
        schedule, batches = schedule.of(ranks), islice(batches, ranks.rank, None, ranks.count)
    else:
        ranks = None
    fold_of = [batch.fold for batch in schedule.batches]
    sampling = Sampling(fold_of, schedule.folds, options.rows, schedule.most_kept, positions, ranks)
    solved: list[Solved] = []

    def go_on(done: Solved) -> bool:
        solved.append(done)
        if on_layer:
            on_layer(len(solved), len(schedule.layers))
        return options.max_seconds is None or time.perf_counter() - started < options.max_seconds

    if on_layer:
        on_layer(0, len(schedule.layers))
    with _restored_on_error(tensors.student), guard.seeded(options.seed), guard.evaluating(teacher):
        _solve_in_lockstep(watchable, student, batches, schedule, tensors, sampling, go_on)
    trim()
    seconds = time.perf_counter() - started
    return ClosedFormLog(
        tuple(solved), images, schedule.views, seconds, schedule.views_room, schedule.views_useful
    )  # fmt: skip


def watchable_copy(teacher: nn.Module) -> nn.Module:
    """The teacher's own tensors in other modules, whose linear layers are all computed by torch functions."""
    copy = guard.structural_copy(teacher)
    replace_multihead_attention(copy)
    return copy


@dataclass(frozen=True)
class _Schedule:
    """What is solved from which views.

    layers: those that fit the memory. batches: all of them. taking_part: of each layer, how many of the batches.
    folds: how many there are. views: in the batches of the last layer. views_room, views_useful: as in the log.
    most_kept: how many inputs of rows may be kept of a layer that an activation follows.
    """

    layers: list[Layer]
    batches: list[PlannedBatch]
    taking_part: list[int]
    folds: int
    views: int
    views_room: int
    views_useful: int
    most_kept: int

    def of(self, ranks: Ranks) -> "_Schedule":
        """With the batches of this process alone."""
        batches = self.batches[ranks.rank :: ranks.count]
        taking_part = [len(range(ranks.rank, number, ranks.count)) for number in self.taking_part]
        return replace(self, batches=batches, taking_part=taking_part)


def _schedule(
    student: nn.Module,
    anatomy: Anatomy,
    layers: Sequence[Layer],
    few: Source | Tensor,
    options: ClosedFormOptions,
    draws: torch.Generator,
) -> _Schedule:
    tensors, folds = guard.named_tensors(student), min(options.folds, count(few))
    memory = MEMORY_BYTES if options.max_memory is None else options.max_memory
    memory -= tensor_bytes(tensors.values())  # a copy, to put back on an error
    bytes_of = {each.weight: layer_bytes(each, tensors, folds, options.rows, memory) for each in layers}
    # Half of it at the most for one layer's own matrices: a larger one stays as the cut left it.
    layers = [layer for layer in layers if bytes_of[layer.weight] <= memory // 2]
    names = [layer.weight for layer in layers]
    most_views = useful_views(anatomy, layers) if options.count_views is None else options.count_views
    most_views = most_views if options.most_views is None else min(most_views, options.most_views)
    views_at = views_at_each(anatomy, names, memory, bytes_of, most_views)
    if options.count_views is not None:
        views_at = [options.count_views] * len(names)
    batches = plan_batches(few, folds, _levels(views_at), views_per_batch(anatomy), draws)
    views_until = list(accumulate(len(batch.images) for batch in batches))
    taking_part = [max(bisect_right(views_until, seen), min(2 * folds, len(batches))) for seen in views_at]
    return _Schedule(
        layers, batches, taking_part, folds=len({batch.fold for batch in batches}),
        views=views_until[max(taking_part, default=1) - 1], views_room=min(views_at, default=0),
        views_useful=affordable_views(anatomy, most_views), most_kept=most_kept(memory),
    )  # fmt: skip


def _levels(views_at: Sequence[int]) -> list[int]:
    """The numbers of views at which more join, each clearly more than the one before."""
    levels: list[int] = []
    for views in views_at or [1]:
        levels += [views] if not levels or views >= _LEAST_RISE * levels[-1] else []
    return levels


@contextmanager
def _restored_on_error(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield
    except BaseException:
        guard.put_back((tensor, before[name]) for name, tensor in tensors.items())
        raise


def _solve_in_lockstep(
    watchable: nn.Module,
    student: nn.Module,
    batches: Iterator[Batch],
    schedule: _Schedule,
    tensors: CutTensors,
    sampling: Sampling,
    go_on: Callable[[Solved], bool],
) -> None:
    """Run both networks, and solve each layer where they halt, until `go_on` says no."""
    layers = schedule.layers
    held = {layer.weight: {layer.shortcut} for layer in layers if layer.shortcut}
    with guard.evaluating(watchable), guard.evaluating(student), ExitStack() as ends:
        first = next(batches)
        layout = layout_for(watchable, first)
        batches = (laid(batch, layout) for batch in chain([first], batches))
        del first  # the passes' own from here on
        networks, names = [(watchable, "after"), (student, "before")], [layer.weight for layer in layers]
        halts = ends.enter_context(closing(lockstep(networks, batches, names, held, schedule.taking_part)))
        ridge, remaining = None, iter(layers)
        for name, (wanted, found) in halts:
            layer = next(remaining)
            if layer.weight != name:
                raise RuntimeError(f"{name} runs where {layer.weight} was expected")
            moments = collect_moments(layer, wanted, found, tensors, sampling)
            del wanted, found  # else they would be held beside those of the next halt
            solved: Any = None
            if sampling.ranks is None or sampling.ranks.first:
                solved = solve_layer(layer, moments, tensors.student, ridge)
            del moments
            if sampling.ranks is not None:
                written = [name for name in (layer.weight, layer.constant) if name is not None]
                sampling.ranks.copy_first([tensors.student[name] for name in written])
                solved = sampling.ranks.of_first(solved)
            done, ridge = solved
            goes_on = go_on(done)
            if not (goes_on if sampling.ranks is None else sampling.ranks.of_first(goes_on)):
                break
