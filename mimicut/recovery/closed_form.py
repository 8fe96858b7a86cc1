"""CLOSED FORM: each layer of the cut network is solved anew for the teacher's outputs, by least squares, in one pass.

Layers in the order in which they run, inputs from the already solved student, targets from the teacher, so that a layer
makes up for what is missing before it (He et al., ICCV 2017, arXiv 1707.06168); the last layer of a branch also for the
error of its shortcut. Ridge towards the weights that the cut left, its strength by cross-validation over images. A
layer changes only where that lowers the error on images that it was not solved from, and is solved anew for what an
activation behind it lets through only where that too does (`gated`). Convolutions, grouped and
depthwise ones, and linear layers of at most MOST_INPUTS inputs; all else stays as the cut left it.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import accumulate, chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.cost import count_traced
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import Traced, shape
from mimicut.base import guard
from mimicut.base.layout import laid, layout_for
from mimicut.base.memory import SLACK_BYTES, trim
from mimicut.inputs import augment
from mimicut.recovery.batches import Batch, Source, copied, count, mixed, placed, told_apart, view
from mimicut.recovery.gated import ROUNDS, Gated
from mimicut.recovery.layers import Layer, affine_of, channels_last, columns, geometry, layers
from mimicut.recovery.lockstep import Seen, lockstep
from mimicut.surgery.plan import Plan
from mimicut.surgery.stand_ins import replace_multihead_attention

# In units of the mean squared input of a layer. Source: measured on the demo's networks, where all but the first are
# chosen somewhere.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# Views of the few images in all, half of them mixed. Source: measured (docs/LOG.md): 16 a picture are better than 8 by
# a point, 32 no better than 16.
VIEWS = 800
# Of networks with few positions: rows for each input of a layer, and views in all. Source: measured (docs/LOG.md).
ROWS_PER_INPUT, MOST_VIEWS = 35, 1600
# What the passes may cost in all, which bounds the views of large networks. Source: measured on ResNet-50 at 224
# pixels, so that all of it stays under a minute and a half on two cores (benchmarks/closed_form_cost.py).
MACS = 1e12
MEMORY_BYTES = 2**31  # What it may hold besides the two networks. Source: assumption, for 3 GB in all.
# Positions that a layer is solved from, of all views. Source: measured, 4 times as many change nothing.
ROWS, LEAST_POSITIONS = 12_500, 16
HELD = 50_000_000  # Inputs of all those positions, of a layer that has an activation behind it. Source: assumption.
_LEAST_SCALE = 1e-3  # An output that what follows all but removes can make up for nothing. Source: assumption.
FOLDS = 4
# Inputs x kernel above which a layer is left alone: its moments alone would take gigabytes. Source: assumption.
MOST_INPUTS = 6000
# Inputs of a layer above which half of the images alone judge what is solved from the others, and there are two rounds
# behind an activation. Source: assumption, for time.
_LARGE = 600
# Views that run at once: so many, or fewer where a feature map of theirs would be larger. Source: assumption.
_BATCH, _BATCH_BYTES = 64, 2**26
_LEAST_RISE = 1.25  # Views join where so many times as many may be seen. Source: assumption, for time.
# Random sums of the outputs by which a ridge is judged against others, of layers that have more than twice as many
# outputs. Source: measured, the ridges chosen are those of all outputs but for neighbours (docs/LOG.md).
_SKETCH = 64
# Positions that are added to a layer's moments at once. Source: assumption, for time.
_ROWS_AT_ONCE = 2048
_BLOCK = 512  # Columns of a product X'X that are made at once, since half of it mirrors the other. Source: measured.
# How long it will take: solves of a layer, in cubes of its inputs; how much slower a multiplication is in them than in
# the network's own layers; seconds for each layer; views that are timed. Source: measured, of five networks all are
# within a factor of two (docs/LOG.md).
_FEWEST = 8  # views that are better than none. Source: assumption.
_FACTORED, _SLOWER, _A_LAYER, _TIMED = 4, 1.5, 0.15, 4
_EXACT = 1e-10  # relative squared error of a layer that nothing is missing from


@dataclass(frozen=True)
class Solved:
    """One layer. ridge: the strength chosen; None where the cut's own weights were not beaten. error_cut, error: its
    squared error over the teacher's squared output, on images left out of the solution, before and after. gated:
    whether it was then solved anew for what the activation behind it lets through, which the error does not count."""

    layer: str
    ridge: float | None
    error_cut: float
    error: float
    gated: bool = False


@dataclass(frozen=True)
class ClosedFormLog:
    """images, views: how many were used, by the last layer, which sees the most; seconds: wall time. views_room: for
    how many views the memory has room at the layer where it has least, of `views_useful`, those that time allows and
    that would help."""

    layers: tuple[Solved, ...] = ()
    images: int = 0
    views: int = 0
    seconds: float = 0.0
    views_room: int = 0
    views_useful: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "layers": [vars(each) for each in self.layers]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ClosedFormLog":
        return cls(**data | {"layers": tuple(Solved(**each) for each in data["layers"])})


def closed_form(
    teacher: nn.Module,
    student: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    few: Source | Tensor,
    *,
    views: str = "none",
    mixing: str | None = None,
    seed: int = 0,
    count_views: int | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    max_seconds: float | None = None,
    most_views: int | None = None,
    max_memory: int | None = None,
) -> ClosedFormLog:
    """Solve the layers of `student`, the cut of `teacher` by `plan`, IN PLACE; return what was done to each.

    few: images as for `mimic`. views, mixing: names in `augment.VIEWS` and `augment.MIXES`; by default the mixing that
    goes with the views. count_views: how many views of the images; by default VIEWS, or fewer for a network whose
    passes would cost more than MACS or hold more than there is room for. on_layer(done, total): progress. max_seconds:
    layers that are not solved by then stay as the cut left them. most_views: a bound on what there is by default.
    max_memory: bytes that it may hold besides the networks, by default MEMORY_BYTES; `needed_bytes` says what it takes
    at the least. Both networks are used in eval mode and come back as they were, but for weights, biases and batch
    norms' running means of the student; on an error these too are as before.

    Raises: InputError for images that do not fit.
    """
    return solve(
        teacher, student, anatomy, to_solve(anatomy, plan, student), plan.slices, few, views=views, mixing=mixing,
        seed=seed, count_views=count_views, on_layer=on_layer, max_seconds=max_seconds, most_views=most_views,
        max_memory=max_memory,
    )  # fmt: skip


@torch.no_grad()
def solve(
    teacher: nn.Module,
    student: nn.Module,
    anatomy: Anatomy,
    todo: Sequence[Layer],
    slices: Mapping[str, Mapping[int, list[int]]],
    few: Source | Tensor,
    *,
    views: str,
    mixing: str | None = None,
    seed: int = 0,
    count_views: int | None = None,
    on_layer: Callable[[int, int], None] | None = None,
    max_seconds: float | None = None,
    most_views: int | None = None,
    max_memory: int | None = None,
    folds: int = FOLDS,
    rows: int = ROWS,
) -> ClosedFormLog:
    """As `closed_form`, of the layers in `todo`. slices: what the student keeps of each weight. folds: into which the
    images are parted to choose the ridge; rows: positions that a layer is solved from, of all views."""
    started = time.perf_counter()
    if not todo:
        return ClosedFormLog(seconds=time.perf_counter() - started)
    images = count(few)
    if images < 2:  # there is no image to judge on
        return ClosedFormLog(images=images, seconds=time.perf_counter() - started)
    lead = seen_through(teacher)
    tensors, own = guard.named_tensors(lead), guard.named_tensors(student)
    folds = min(folds, images)
    mixing = mixing or (augment.VIEWS[views].mixing if views in augment.VIEWS else "none")
    most = (MEMORY_BYTES if max_memory is None else max_memory) - _bytes(own.values())  # a copy, to put back
    # Half of it at the most for one layer's own matrices: a larger one stays as the cut left it.
    todo = [layer for layer in todo if _layer_bytes(layer, own, folds, rows, most) <= most // 2]
    names = [layer.weight for layer in todo]
    taken = {layer.weight: _layer_bytes(layer, own, folds, rows, most) for layer in todo}
    most_seen = most_useful(anatomy, todo) if count_views is None else count_views
    most_seen = most_seen if most_views is None else min(most_seen, most_views)
    at_each = views_at(anatomy, names, most, taken, most_seen)
    if count_views is not None:
        at_each = [count_views] * len(names)
    room, useful = min(at_each, default=0), affordable(anatomy, most_seen)
    draws = torch.Generator().manual_seed(seed)
    levels: list[int] = []
    for seen in at_each or [1]:
        levels += [seen] if not levels or seen >= _LEAST_RISE * levels[-1] else []
    parts = _parts(few, folds, levels, batch_size(anatomy), draws)
    made = _made(parts, few, student, views, mixing, draws)
    sums = list(accumulate(len(part.images) for part in parts))
    taking_part = [max(bisect_right(sums, seen), min(2 * folds, len(parts))) for seen in at_each]
    fold_of, used = [part.fold for part in parts], sums[max(taking_part, default=1) - 1]
    folds = len(set(fold_of))
    if folds < 2 or not todo:  # one image, over and over
        return ClosedFormLog(images=images, seconds=time.perf_counter() - started)
    held = {layer.weight: {layer.shortcut} for layer in todo if layer.shortcut}
    positions = torch.Generator().manual_seed(seed)
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    solved: list[Solved] = []
    near = len(RIDGES) // 2
    if on_layer:
        on_layer(0, len(todo))
    try:
        with (
            guard.seeded(seed), guard.evaluating(teacher), guard.evaluating(lead), guard.evaluating(student),
            ExitStack() as ends,
        ):  # fmt: skip
            first = next(made)
            layout = layout_for(lead, first)
            batches = (laid(batch, layout) for batch in chain([first], made))
            del first  # the passes' own from here on
            halts = ends.enter_context(
                closing(lockstep([(lead, "after"), (student, "before")], batches, names, held, taking_part))
            )
            for name, (wanted, found) in halts:
                layer = todo[len(solved)]
                if layer.weight != name:
                    raise RuntimeError(f"{name} runs where {layer.weight} was expected")
                kept = slices.get(name, {}).get(0)
                stats = _statistics(
                    layer, wanted, found, kept, tensors, own, fold_of[: len(found)], folds, rows, _most_held(most),
                    positions,
                )  # fmt: skip
                del wanted, found  # else they would stand beside those of the next halt
                done, near = _solve(layer, stats, own, near)
                del stats
                solved.append(done)
                if on_layer:
                    on_layer(len(solved), len(todo))
                if max_seconds is not None and time.perf_counter() - started >= max_seconds:
                    break
    except BaseException:
        guard.put_back((tensor, before[name]) for name, tensor in own.items())
        raise
    trim()
    return ClosedFormLog(tuple(solved), images, used, time.perf_counter() - started, room, useful)


def seen_through(teacher: nn.Module) -> nn.Module:
    """The teacher's own tensors, in modules whose linear layers can all be seen."""
    lead = guard.structural_copy(teacher)
    replace_multihead_attention(lead)
    return lead


def to_solve(anatomy: Anatomy, plan: Plan, student: nn.Module) -> list[Layer]:
    """From the first layer on that the plan touches, or that runs behind a dropped block."""
    own = guard.named_tensors(student)
    found = solvable(anatomy, own)
    touched = {i for i, layer in enumerate(found) if layer.weight in plan.slices}
    if plan.drop and not anatomy.only_blocks:
        return found
    if plan.drop:
        behind = runs_behind(anatomy.full_trace, min(map(anatomy.full_trace.nodes.index, anatomy.zeroed_nodes)))
        touched |= {i for i, layer in enumerate(found) if layer.weight in behind}
    return found[min(touched, default=len(found)) :]


def solvable(anatomy: Anatomy, own: Mapping[str, Tensor]) -> list[Layer]:
    """The layers of `anatomy` whose weights are in `own` and not too large."""
    return [layer for layer in layers(anatomy) if layer.weight in own and own[layer.weight][0].numel() <= MOST_INPUTS]


def runs_behind(traced: Traced, place: int) -> set[str]:
    """Names of the tensors that the operators behind that place take."""
    later = traced.nodes[place + 1 :]
    return {traced.tensors[t] for node in later for t in node.all_input_nodes if t in traced.tensors}


def batches_of(
    few: Source | Tensor,
    model: nn.Module,
    views: str,
    mixing: str,
    seed: int,
    folds: int,
    total: int,
    size: int = _BATCH,
) -> tuple[list[Batch], list[int], int]:
    """Batches of `total` views, for `model`; the fold of each; how many views there are. Every image has one at least
    of as many as there may be. Every second batch of a fold is mixed. No image is in two folds, not even mixed or
    twice. size: of a batch, at most."""
    draws = torch.Generator().manual_seed(seed)
    parts = _parts(few, folds, [total], size, draws)
    made = list(_made(parts, few, model, views, mixing, draws))
    return made, [part.fold for part in parts], sum(len(part.images) for part in parts)


def made_batches(
    few: Source | Tensor, model: nn.Module, views: str, mixing: str, seed: int, total: int, size: int = _BATCH
) -> Iterator[tuple[Batch, int]]:
    """As `batches_of` of one fold, one after the other: batch, how many views it has."""
    draws = torch.Generator().manual_seed(seed)
    parts = _parts(few, 1, [total], size, draws)
    yield from zip(_made(parts, few, model, views, mixing, draws), (len(part.images) for part in parts), strict=True)


@dataclass(frozen=True)
class _Part:
    """A batch that is yet to be made: its fold, the indices of its images, and whether they are mixed."""

    fold: int
    images: list[int]
    mixed: bool


def _parts(few: Source | Tensor, folds: int, levels: Sequence[int], size: int, draws: torch.Generator) -> list[_Part]:
    """All folds in turn, so that the first of them are as good as all. levels: rising numbers of views, the last one of
    all; a batch ends at each. There are two of each fold up to the first one, so that one is mixed."""
    same: dict[Any, list[int]] = {}
    names = told_apart(few)
    for index in torch.randperm(count(few), generator=draws).tolist():
        same.setdefault(names[index], []).append(index)
    alike = list(same.values())
    folds = min(folds, len(alike))
    of_fold = []
    for fold in range(folds):
        mine = [index for images in alike[fold::folds] for index in images]
        share = max(1, round(levels[-1] / folds))
        indices = (mine * -(-share // len(mine)))[:share]
        cuts: list[list[int]] = []
        begin = 0
        for end in [*(max(1, min(share, level // folds)) for level in levels[:-1]), share]:
            each = max(1, size if begin else min(size, -(-end // 2)))
            cuts += [indices[start : min(start + each, end)] for start in range(begin, end, each)]
            begin = end
        of_fold.append([_Part(fold, part, bool(n % 2) and len(part) > 1) for n, part in enumerate(cuts)])
    return [part for parts in zip_longest(*of_fold) for part in parts if part is not None]


def _made(
    parts: Iterable[_Part], few: Source | Tensor, model: nn.Module, views: str, mixing: str, draws: torch.Generator
) -> Iterator[Batch]:
    like = next((t for t in guard.named_tensors(model).values() if t.is_floating_point()), torch.empty(0))
    for part in parts:
        batch = placed(view(few, part.images, views, draws), like.device, like.dtype)
        yield mixed(batch, mixing, draws) if part.mixed else batch


def batch_size(anatomy: Anatomy) -> int:
    """Views that run at once."""
    return max(4, min(_BATCH, _BATCH_BYTES // (4 * max(1, _largest(anatomy)))))


def _largest(anatomy: Anatomy) -> int:
    """Numbers in the largest feature map of one image."""
    traced = anatomy.traced
    sizes = (math.prod(shape(node)) for node in traced.nodes if shape(node) is not None)
    return max(sizes, default=1) // traced.batch


def affordable(anatomy: Anatomy, most: int = VIEWS) -> int:
    """How many views two passes may see, of `most`, for what they cost."""
    return max(1, min(most, int(MACS / (2 * max(1, count_traced(anatomy.traced).macs)))))


def views_at(
    anatomy: Anatomy,
    halts: Sequence[str],
    most: int = MEMORY_BYTES,
    taken: Mapping[str, int] | None = None,
    views: int = VIEWS,
) -> list[int]:
    """How many views two passes may hold that halt at these weights, at each of them, never fewer than at one before.

    most: bytes that there are for them; taken: of these, what is needed for other things at a halt. views: more are of
    no use. Maps are large where a network begins, and its last layers, which have few positions of a view, need many.
    """
    bytes_at, free = view_bytes(anatomy, halts), most - _running_bytes(anatomy)
    room = [(free - (taken or {}).get(name, 0)) // bytes_at[name] for name in halts]
    from_the_end = accumulate(reversed(room), min, initial=affordable(anatomy, views))
    return [max(1, seen) for seen in from_the_end][:0:-1]


def most_useful(anatomy: Anatomy, todo: Iterable[Layer]) -> int:
    """How many views are of use: more than VIEWS where a layer of many inputs has few positions in each."""
    traced, wanted = anatomy.traced, VIEWS
    names = {layer.weight for layer in todo}
    for node, name in traced.tensors.items():
        for user in node.users:
            size, weight = shape(user), shape(node)
            if name in names and size and weight:
                positions = max(1, math.prod(size) // (traced.batch * weight[0]))
                wanted = max(wanted, math.ceil(ROWS_PER_INPUT * math.prod(weight[1:]) / positions))
    return min(wanted, MOST_VIEWS)


def needed_bytes(anatomy: Anatomy, plan: Plan, student: nn.Module) -> int:
    """The least that `closed_form` holds besides the networks to be of any use: with a few views, and without layers so
    large that they alone would take more."""
    halts = [layer.weight for layer in to_solve(anatomy, plan, student)]
    held = _bytes(guard.named_tensors(student).values()) + _running_bytes(anatomy)
    return held + _FEWEST * max(view_bytes(anatomy, halts).values(), default=0)


def expected_seconds(anatomy: Anatomy, plan: Plan, student: nn.Module, a_view: float) -> float:
    """About how long `closed_form` will take. a_view: seconds of the teacher's for one view (`view_seconds`)."""
    own = guard.named_tensors(student)
    todo = to_solve(anatomy, plan, student)
    sizes = [(len(own[layer.weight]), own[layer.weight][0].numel(), layer.gate) for layer in todo]
    work = sum(ROWS * size * (size + outputs * (4 * ROUNDS if gate else 1)) for outputs, size, gate in sizes)
    work += sum(_FACTORED * size**3 for _, size, _ in sizes)
    views = affordable(anatomy, most_useful(anatomy, todo))
    return 2 * views * a_view + seconds_of(work, anatomy, a_view) + _A_LAYER * len(todo)


def views_for(seconds: float, a_view: float) -> int:
    """How many views two passes and as long again may see in that time; 0 where it is too short for any good."""
    views = min(float(MOST_VIEWS), seconds / (4 * max(a_view, 1e-9)))
    return int(views) if views >= _FEWEST else 0


def seconds_of(macs: float, anatomy: Anatomy, a_view: float) -> float:
    """About how long so many multiplications of matrices take where the network takes `a_view` seconds a view."""
    return _SLOWER * macs * a_view / max(1, count_traced(anatomy.traced).macs)


def view_seconds(model: nn.Module, few: Source | Tensor, views: str) -> float:
    """Seconds of a forward pass for each of a few views, the better of two tries."""
    batch, _, made = batches_of(few, model, views, "none", 0, 1, _TIMED)
    tries = []
    with guard.seeded(0), guard.evaluating(model):
        for _ in range(2):
            started = time.perf_counter()
            for args, kwargs in map(copied, batch):
                model(*args, **kwargs)
            tries.append((time.perf_counter() - started) / made)
    return min(tries)


def view_bytes(anatomy: Anatomy, halts: Sequence[str]) -> dict[str, int]:
    """What two passes hold of one view at each halt: the image, and values that are still needed.

    A value is needed until its last operator has run, and as long as a module runs that was given it: the caller holds
    it. The student is taken to be as large as the teacher, but halts before it computes.
    """
    traced, weights = anatomy.traced, set(halts)
    order = {node: i for i, node in enumerate(traced.nodes)}
    last_in = {call: i for node, i in order.items() for call in traced.calls.get(node, ())}
    held = [0] * (len(order) + 1)  # by how much more is held from each operator on
    for node, i in order.items():
        inside, end = set(traced.calls.get(node, ())), i
        for user in node.users:
            end = max(end, order.get(user, len(order) - 1))
            end = max([end, *(last_in[call] for call in traced.calls.get(user, ()) if call not in inside)])
        size = math.prod(shape(node)) if shape(node) is not None else 0
        held[i] += size
        held[end + 1] -= size
    at = list(accumulate(held))
    image = sum(math.prod(shape(node)) for node in traced.inputs if shape(node) is not None)
    return {
        name: 4 * (2 * at[order[user]] - math.prod(shape(user) or (0,)) + 2 * image) // traced.batch
        for node, name in traced.tensors.items()
        if name in weights
        for user in node.users
        if user in order
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _running_bytes(anatomy: Anatomy) -> int:
    """What the one pass that runs adds: feature maps of a batch, and what was freed and lies about."""
    return 2 * SLACK_BYTES + 4 * min(_BATCH_BYTES, _BATCH * 4 * max(1, _largest(anatomy)))


def _layer_bytes(layer: Layer, own: Mapping[str, Tensor], folds: int, rows: int, most: int) -> int:
    """What solving `layer` holds: moments of every part, four matrices of their size to solve with, and rows."""
    outputs, inputs = len(own[layer.weight]), own[layer.weight][0].numel()
    parts = folds if inputs <= _LARGE else 2
    groups = outputs if own[layer.weight].ndim > 2 and own[layer.weight].shape[1] == 1 else 1  # depthwise
    kept = min(rows, parts * _ROWS_AT_ONCE)
    if layer.gate is not None:
        kept = min(max(rows, LEAST_POSITIONS * MOST_VIEWS), _most_held(most) // (groups * inputs))
    moments = groups * (parts + 4) * inputs**2 + (parts + 2) * inputs * outputs
    return 8 * moments + 4 * kept * (groups * inputs + 2 * outputs)


def _most_held(most: int) -> int:
    """Inputs of all positions of a layer that has an activation behind it, where there are `most` bytes for all."""
    return min(HELD, most // 40)  # a tenth of them


@dataclass
class _Statistics:
    """Moments of a layer's inputs X, with a last one that is always 1 where a constant is free, and of what its prior
    weights leave over, R = Y - X prior', of each part of the images.

    gram: X'X (parts, groups, D, D). cross: X'R (parts, groups, D, outputs of a group). square: of R (parts,). whole: of
    Y (parts,). rows: (parts,). prior: what the cut left (groups, outputs of a group, D). gated: the rows themselves,
    where an activation is behind. A part is a fold, or of a large layer every second fold.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    whole: Tensor
    rows: Tensor
    prior: Tensor
    free: bool
    inputs: int
    gated: Gated | None
    sums: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def gram_of(self, parts: Sequence[int]) -> Tensor:
        """(groups, D, D) over these parts."""
        at = tuple(parts)
        if len(at) == 1:
            return self.gram[at[0]]
        if at not in self.sums:
            self.sums[at] = self.gram[list(at)].sum(0) if len(at) < len(self.gram) else self.gram.sum(0)
        return self.sums[at]

    def cross_of(self, parts: Sequence[int]) -> Tensor:
        """(groups, D, outputs of a group) over these parts."""
        return self.cross[parts[0]] if len(parts) == 1 else self.cross[list(parts)].sum(0)


def _statistics(
    layer: Layer,
    wanted: list[Seen],
    found: list[Seen],
    kept: list[int] | None,
    tensors: dict[str, Tensor],
    own: dict[str, Tensor],
    fold_of: list[int],
    folds: int,
    most: int,
    most_held: int,
    draws: torch.Generator,
) -> _Statistics:
    weight = own[layer.weight]
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32  # of rows; sums of them are in float64
    how = geometry(found[0], weight)
    spatial = len(how.kernel)
    free = layer.constant is not None
    prior = weight.detach().double().flatten(1).unflatten(0, (how.groups, -1))
    inputs = prior.shape[2]
    views = sum(len(seen.input) for seen in found)
    each = max(LEAST_POSITIONS, -(-most // views))
    if layer.gate is not None:
        each = max(1, min(each, most_held // (prior[:, 0].numel() * views)))
    chosen: dict[int, Tensor] = {}

    def positions(total: int) -> Tensor:
        if total not in chosen:
            chosen[total] = torch.randperm(total, generator=draws)[:each]
        return chosen[total]

    def sampled(value: Tensor) -> Tensor:
        """(images, positions, channels)."""
        value = channels_last(value, spatial)
        return value[:, positions(value.shape[1]).to(value.device)].to(exact)

    def grouped(value: Tensor) -> Tensor:
        """(groups, rows, outputs of a group), of the channels that stay."""
        value = value if index is None else value[..., index]
        return value.flatten(0, -2).unflatten(1, (how.groups, -1)).transpose(0, 1)

    index = None if kept is None else torch.tensor(kept, device=weight.device)
    affine = affine_of(layer, tensors) if layer.shortcut or layer.gate else None
    scale, offset = (None, None) if affine is None else (each_.to(weight.device, exact) for each_ in affine)
    back = None if scale is None else torch.where(scale.abs() > _LEAST_SCALE, 1 / scale, 0.0)
    gated = None
    if layer.gate is not None and scale is not None:
        gated = Gated(layer.gate, grouped(torch.where(back == 0, 0.0, scale)[None]), grouped(back[None]))
    parts = folds if inputs <= _LARGE else min(2, folds)
    size, outputs = inputs + free, prior.shape[1]
    gram = prior.new_zeros(parts, how.groups, size, size)
    cross = prior.new_zeros(parts, how.groups, size, outputs)
    square, whole, rows_of = (prior.new_zeros(parts) for _ in range(3))
    bias = None if layer.bias is None else own[layer.bias].detach().to(exact).unflatten(0, (how.groups, -1))[:, None]
    before = prior.mT.to(exact)
    waiting: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {}

    def add(part: int) -> None:
        """What waits of this part, in one go: each addition to the moments costs as much as they are large."""
        found = waiting.pop(part)
        x, y = (torch.cat([each[at] for each in found], 1) for at in (0, 1))
        over = y - x @ before
        if free:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        _add_square(gram[part], x)
        cross[part] += x.mT @ over
        square[part] += over.square().sum((0, 1)).double().sum()
        whole[part] += y.square().sum((0, 1)).double().sum()
        rows_of[part] += x.shape[1]
        if gated is not None:
            gated.add(part, x, over, torch.cat([ahead for *_, ahead in found], 1))

    for fold, lead, learner in zip(fold_of, wanted, found, strict=True):
        part = fold % parts
        x = columns(learner.input, how, positions, tuple(lead.output.shape[2:]) if spatial else ()).to(exact)
        rows = sampled(lead.output)
        ahead = None if gated is None else scale * rows + offset
        if layer.shortcut is not None and scale is not None:
            error = _shortcut_error(layer, lead, learner, sampled, index)
            if error is not None:
                rows = rows + error * back
            if gated is not None:
                gated, ahead = (None, None) if error is None else (gated, ahead + sampled(lead.held[layer.shortcut]))
        y = grouped(rows)
        if bias is not None:
            y = y - bias
        x = x.flatten(0, 1).transpose(0, 1)  # (groups, rows, inputs)
        waiting.setdefault(part, []).append((x, y, None if ahead is None else grouped(ahead)))
        if sum(x.shape[1] for x, *_ in waiting[part]) >= _ROWS_AT_ONCE:
            add(part)
    for part in list(waiting):
        add(part)
    for start in range(_BLOCK, size, _BLOCK):  # the other half, as `_add_square` leaves it
        gram[..., start:, start - _BLOCK : start] = gram[..., start - _BLOCK : start, start:].mT
    if free:
        prior = torch.cat([prior, prior.new_zeros(*prior.shape[:2], 1)], 2)
    return _Statistics(gram, cross, square, whole, rows_of, prior, free, inputs, gated)


def _add_square(gram: Tensor, x: Tensor) -> None:
    """Add x'x to gram (groups, D, D), of large ones what is above the diagonal. x: (groups, rows, D)."""
    size = x.shape[2]
    if size <= _BLOCK:
        gram += x.mT @ x
        return
    for start in range(0, size, _BLOCK):
        gram[:, start : start + _BLOCK, start:] += x[:, :, start : start + _BLOCK].mT @ x[:, :, start:]


def _shortcut_error(
    layer: Layer, lead: Seen, learner: Seen, sampled: Callable[[Tensor], Tensor], index: Tensor | None
) -> Tensor | None:
    """The teacher's shortcut minus the student's, (images, positions, channels); None where they cannot be compared."""
    theirs, ours = lead.held.get(layer.shortcut), learner.held.get(layer.shortcut)
    if theirs is None or ours is None or theirs.shape != lead.output.shape:
        return None
    error, ours = sampled(theirs), sampled(ours)
    if ours.shape == error.shape:
        return error - ours
    if index is None or ours.shape[-1] != len(index):
        return None
    error[..., index] -= ours
    return error


def _solve(layer: Layer, stats: _Statistics, own: dict[str, Tensor], near: int) -> tuple[Solved, int]:
    """The ridge with the least error on images left out, and the weights by it; in place in `own`. near: where to look
    for it first; returned for the next layer."""
    parts = list(range(len(stats.gram)))
    left_out = [[part] for part in parts] if stats.inputs <= _LARGE else [parts[:1]]
    rests = [[part for part in parts if part not in members] for members in left_out]
    total = sum(stats.whole[members].sum() for members in left_out).clamp_min(1e-300)
    left = sum(stats.square[members].sum() for members in left_out)
    relative = float(left / total)
    if relative < _EXACT or not math.isfinite(relative):
        return Solved(layer.weight, None, relative, relative), near
    at, solvers = _search(stats, left_out, rests, near)
    changes = [solver(stats.cross_of(rest)) for solver, rest in zip(solvers, rests, strict=True)]
    error = float((left + _gained(stats, left_out, changes, stats.cross)) / total)
    if not error < relative:
        return Solved(layer.weight, None, relative, relative), near
    whole, gated = _solver(stats, parts, RIDGES[at]), False
    change = whole(stats.cross_of(parts))
    if stats.gated is not None:
        known, new = parts[1::2], parts[::2]
        solver = solvers[rests.index(known)] if known in rests else _solver(stats, known, RIDGES[at])
        plain = changes[rests.index(known)] if known in rests else solver(stats.cross_of(known))
        rounds = ROUNDS if stats.inputs <= _LARGE else 2
        better = stats.gated.solved(known, plain, solver, rounds)
        gated = stats.gated.error(new, better) < stats.gated.error(new, plain)
        if gated:
            change = stats.gated.solved(parts, change, whole, rounds)
    _put(layer, stats.prior + change, stats, own)
    return Solved(layer.weight, RIDGES[at], relative, error, gated), at


def _search(
    stats: _Statistics, left_out: list[list[int]], rests: list[list[int]], near: int
) -> tuple[int, list[Callable[[Tensor], Tensor]]]:
    """Which ridge has the least error on the parts left out, and the solvers with it over the others.

    The error is all but convex in the logarithm of the ridge: it is walked downhill, from `near` on. Many outputs are
    judged by random sums of them.
    """
    cross = stats.cross
    if cross.shape[-1] > 2 * _SKETCH:
        signs = torch.randint(0, 2, (cross.shape[-1], _SKETCH), generator=torch.Generator().manual_seed(0))
        cross = cross @ (2 * signs - 1).to(cross)
    errors: dict[int, float] = {}
    best: list[Any] = [near, []]
    at = near
    while True:
        for i in (at, at - 1, at + 1):
            if not 0 <= i < len(RIDGES) or i in errors:
                continue
            solvers = [_solver(stats, rest, RIDGES[i]) for rest in rests]
            changes = [
                solver(cross[rest].sum(0)) if rest else torch.zeros_like(cross[0].mT)
                for solver, rest in zip(solvers, rests, strict=True)
            ]
            errors[i] = float(_gained(stats, left_out, changes, cross))
            if i == best[0] or errors[i] < errors[best[0]]:
                best = [i, solvers]
            del solvers
        if best[0] == at:
            return at, best[1]
        at = best[0]


def _solver(stats: _Statistics, parts: Sequence[int], ridge: float) -> Callable[[Tensor], Tensor]:
    """From cross moments X'R (groups, D, targets) over `parts` to what is to be added to the prior for them, (groups,
    targets, D); with ridge 0 it would leave the least squares."""
    held = stats.gram_of(parts).clone()
    unit = held.diagonal(dim1=1, dim2=2)[:, : stats.inputs].mean(1).clamp_min(1e-300)
    hold = (ridge * unit)[:, None].expand(-1, held.shape[-1]).clone()
    if stats.free:
        hold[:, -1] = 1e-6 * stats.rows[list(parts)].sum()  # the constant is all but free
    held.diagonal(dim1=1, dim2=2).add_(hold)
    factor, failed = torch.linalg.cholesky_ex(held)
    del held
    if bool(failed.any()):
        return lambda cross: torch.zeros_like(cross.mT)
    return lambda cross: torch.cholesky_solve(cross, factor).mT


def _gained(stats: _Statistics, members: list[list[int]], changes: list[Tensor], cross: Tensor) -> Tensor:
    """By how much the squared error on these parts changes with what is added to the prior for each. cross: (parts,
    groups, D, targets), of the same targets as the changes."""
    total = torch.zeros((), dtype=cross.dtype, device=cross.device)
    for parts, change in zip(members, changes, strict=True):
        for part in parts:
            total += ((change @ stats.gram[part] - 2 * cross[part].mT) * change).sum()
    return total


def _put(layer: Layer, weights: Tensor, stats: _Statistics, own: dict[str, Tensor]) -> None:
    weight = own[layer.weight]
    weight.copy_(weights[..., : stats.inputs].flatten(0, 1).reshape(weight.shape))
    if not stats.free:
        return
    constant = weights[..., -1].flatten()
    # A batch norm subtracts its running mean.
    into = own[layer.constant]
    into.add_(constant.to(into), alpha=1 if layer.constant == layer.bias else -1)
