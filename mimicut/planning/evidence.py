"""Channel evidence: how much worse the features become without each channel, after the best repair.

Of each layer that reads a group the second moments of its inputs and how strongly its output acts on the seam; then the
units are taken away one after the other (`elimination`). Unlike `score`, it needs images, and its figures can be
compared from group to group.
Source: whole channels as in ZipLM (Kurtic et al., arXiv 2302.04089); the weighting by gradients at the seam is measured
here (docs/LOG.md).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import shape
from mimicut.base import guard
from mimicut.base.layout import laid, layout_for
from mimicut.base.memory import trim
from mimicut.base.ranks import Ranks
from mimicut.planning.elimination import Reader, eliminate
from mimicut.planning.importance import Evidence
from mimicut.recovery.batches import Batch, Source, copied
from mimicut.recovery.closed_form import watchable_copy
from mimicut.recovery.folds import iterate_batches
from mimicut.recovery.layers import MOST_INPUTS, channels_last, columns, geometry, layers
from mimicut.recovery.lockstep import Seen, Watch, ids_of
from mimicut.recovery.view_budget import (
    MEMORY_BYTES,
    affordable_views,
    matrix_seconds,
    measure_view_seconds,
    views_within,
)
from mimicut.surgery.seam import Capture, capturing

# Inputs x kernel up to which the place in the kernel distinguishes a layer's inputs; above it one repair serves
# all places. Source: assumption, for time.
_WITH_KERNEL = 1200
_POSITIONS = 64  # of a view, of which second moments are taken. Source: assumption.
# Of the views, those of which gradients are taken: a quarter, but so many. Source: assumption.
_LEAST_GRADIENT_VIEWS = 32
_PART = 16  # Views that run at once, where their gradients find room. Source: measured, more are no faster.
_A_LAYER = 0.2  # seconds of a layer whatever its size, to tell how long it will take. Source: as in closed_form.


@guard.exact_float32()
def channel_evidence(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    views: str = "none",
    mixing: str = "mixup",
    seed: int = 0,
    max_seconds: float | None = None,
    max_memory: int | None = None,
    ranks: Ranks | None = None,
    on_expected: Callable[[float], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evidence:
    """Measure on the few images how much each channel of every group that can be cut matters.

    Args:
        teacher: The network that was traced; it is left as it was.
        anatomy: As `trace` reads it.
        few, views, mixing, seed: As for `closed_form`.
        max_seconds: Time limit; groups not reached by then get no evidence.
        max_memory: Bytes to hold besides the network, by default MEMORY_BYTES. To keep to it fewer views run at once;
            one view is always run, whatever it needs (`needed_bytes`).
        ranks: The processes that measure together; all make this call. Each takes its share of the views and of the
            groups; the first one decides how many views there is time for; all get the whole evidence. Where there
            are fewer parts of views than processes, the first one measures alone and the others get none.
        on_expected: Receives the expected seconds before the work.
        on_progress: Receives (done, total) of batches and groups.

    Raises:
        InputError: The images do not fit the network.
    """
    started = time.perf_counter()

    def late() -> bool:
        return max_seconds is not None and time.perf_counter() - started >= max_seconds

    reads = _readers(anatomy)
    names = list(dict.fromkeys(name for members in reads.values() for name, _ in members))
    if not names:
        return Evidence({}, {})
    lead = watchable_copy(teacher)
    tensors = guard.named_tensors(lead)
    views_made = max(1, affordable_views(anatomy) // 2)
    size = _part_size(anatomy, tensors, names, MEMORY_BYTES if max_memory is None else max_memory)
    first = ranks is None or ranks.first
    if first and (on_expected or max_seconds is not None):
        a_view = measure_view_seconds(teacher, few, views)
        cubes = sum(_size(tensors[name]) ** 3 for name in names)
        expected = 2 * views_made * a_view + matrix_seconds(cubes, anatomy, a_view) + _A_LAYER * len(names)
        if ranks is not None and -(-views_made // size) >= ranks.count:
            expected /= ranks.count
        if max_seconds is not None:
            expected, views_made = min(expected, max_seconds), min(views_made, views_within(max_seconds, a_view))
        if on_expected:
            on_expected(expected)
    if ranks is not None:
        views_made, size, max_seconds = ranks.of_first((views_made, size, max_seconds))
        if -(-views_made // size) < ranks.count:  # there is not a part for each
            ranks = None
    if not (views_made and (first or ranks)):
        return Evidence({}, {})
    made = iterate_batches(few, lead, views, mixing, seed, views_made)
    parts = (part for batch, _ in made for part in _parts(batch, size))
    count = ranks.count if ranks else 1
    total, done = -(-views_made // (count * size)) + -(-len(reads) // count), 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(min(done, total), total)

    least = max(-(-views_made // 4), min(views_made, _LEAST_GRADIENT_VIEWS))
    with guard.seeded(seed), guard.evaluating(teacher), guard.evaluating(lead):
        moments, force = _listen(lead, anatomy, names, parts, least, seed, late, step, ranks)
    trim()
    done = total - -(-len(reads) // count)
    scores, errors = {}, {}
    for number, (name, members) in enumerate(reads.items()):
        if ranks and not ranks.owns(number):
            continue
        group, read = anatomy.groups[name], [(n, units) for n, units in members if n in moments]
        if read and not late():
            layers_of = [
                each for n, units in read for each in _readers_in(group.width, units, tensors[n], moments[n], force[n])
            ]
            scores[name], errors[name] = eliminate(layers_of, group.width)
        step()
    del moments, force
    trim()
    return Evidence(scores, errors) if ranks is None else _of_all(ranks, Evidence(scores, errors), reads, anatomy, lead)


def _of_all(ranks: Ranks, own: Evidence, reads: Iterable[str], anatomy: Anatomy, lead: nn.Module) -> Evidence:
    """The evidence of all processes together. Sent as one row: for each group 1 if it was found, its scores, errors."""
    sizes = [1 + 2 * anatomy.groups[name].width + 1 for name in reads]
    like = next(iter(guard.named_tensors(lead).values()))
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=like.device)
    for name, place in zip(reads, flat.split(sizes), strict=True):
        if name in own.scores:
            place.copy_(torch.from_numpy(np.concatenate([[1.0], own.scores[name], own.errors[name]])))
    ranks.add_up([flat])
    scores, errors = {}, {}
    for name, place in zip(reads, flat.cpu().split(sizes), strict=True):
        if place[0]:
            scores[name], errors[name] = np.split(place[1:].numpy(), [anatomy.groups[name].width])
    return Evidence(scores, errors)


def needed_bytes(anatomy: Anatomy) -> int:
    """The least that `channel_evidence` holds besides the network: one view's gradients, and what is kept of layers."""
    tensors = guard.named_tensors(anatomy.traced.model)
    names = {name for members in _readers(anatomy).values() for name, _ in members}
    return _view_bytes(anatomy) + _kept_bytes(tensors, names)


def _readers(anatomy: Anatomy) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Group that can be cut -> (weight, unit of each of its inputs) of the layers that read it."""
    found = {layer.weight for layer in layers(anatomy)}
    reads: dict[str, list[tuple[str, np.ndarray]]] = {}
    for group in anatomy.groups.values():
        members = [
            (m.tensor, m.units)
            for m in group.members
            if m.dim == 1 and m.tensor in found and len(m.units) <= MOST_INPUTS
        ]
        if group.pinned is None and members and group.width > 1:
            reads[group.name] = members
    return reads


def _size(weight: Tensor) -> int:
    """Inputs that the moments of its layer tell apart, of each of its groups."""
    return weight[0].numel() if weight[0].numel() <= _WITH_KERNEL else weight.shape[1]


def _view_bytes(anatomy: Anatomy) -> int:
    """What the gradients of one view need: all that the network computes."""
    traced = anatomy.traced
    made = sum(math.prod(size) for node in traced.nodes if (size := shape(node)) is not None)
    return 4 * made // traced.batch


def _kept_bytes(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    """Moments of all these layers, and what the elimination adds for the largest of them."""
    sizes = [_size(tensors[name]) for name in names]
    return 8 * (sum(size**2 for size in sizes) + 5 * max(sizes, default=0) ** 2)


def _part_size(anatomy: Anatomy, tensors: Mapping[str, Tensor], names: list[str], most: int) -> int:
    """How many views run at once."""
    room = (most - _kept_bytes(tensors, names)) // max(1, _view_bytes(anatomy))
    return int(min(_PART, max(1, room)))


def _listen(
    lead: nn.Module,
    anatomy: Anatomy,
    names: list[str],
    parts: Iterator[Batch],
    least: int,
    seed: int,
    late: Callable[[], bool],
    step: Callable[[], None],
    ranks: Ranks | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """weight -> second moments of its inputs (groups, channels x kernel, again) or (groups, channels, channels), and
    the squared gradient of the features at each output, summed over positions, over the teacher's squared deviation
    (outputs,). parts: the first `least` views are those of which gradients are taken. late(): whether the views that
    are left are too many. step(): called after each part of this process."""
    tensors = guard.named_tensors(lead)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    energy: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(seed)

    def positions(total: int) -> Tensor:
        return torch.randperm(total, generator=draws)[:_POSITIONS]

    def note(name: str, seen: Seen) -> None:
        weight = tensors[name]
        how = geometry(seen, weight)
        spatial = len(how.kernel)
        if weight[0].numel() <= _WITH_KERNEL:
            x = columns(seen.input.detach(), how, positions, tuple(seen.output.shape[2:]))
        else:
            x = channels_last(seen.input.detach(), spatial)
            x = x[:, positions(x.shape[1]).to(x.device)].unflatten(2, (how.groups, -1))
        x = x.flatten(0, 1).transpose(0, 1)  # (groups, rows, inputs)
        x = x if x.dtype == torch.float64 else x.float()
        sums[name] = sums.get(name, 0) + (x.mT @ x).double()
        rows[name] = rows.get(name, 0) + x.shape[1]
        if seen.output.requires_grad:
            seen.output.register_hook(lambda grad: weigh(name, grad, spatial))

    def weigh(name: str, grad: Tensor, spatial: int) -> None:
        others = [axis for axis in range(grad.ndim) if axis != (1 if spatial else grad.ndim - 1)]
        exact = grad if grad.dtype == torch.float64 else grad.float()
        energy[name] = energy.get(name, 0) + torch.linalg.vector_norm(exact, dim=others).double().square()

    first = next(parts)
    layout = layout_for(lead, first)
    parts = (laid(part, layout) for part in chain([first], parts))
    spread, units, seen = _Spread(), [1.0] * len(anatomy.seam.points), 0
    with capturing(lead, anatomy.seam) as capture:
        if len(units) > 1:  # what counts how much must be known before
            parts, units = _weighed(capture, parts, least)
        for number, (args, kwargs) in enumerate(parts):
            begun, seen = seen, seen + _length(args, kwargs)
            if ranks is not None and not ranks.owns(number):
                continue
            if rows and late():
                break
            draws.manual_seed(seed + number)  # the same in whichever process
            if begun >= least:
                with Watch(ids_of(lead, names), after=note):
                    feats = capture.features(*args, **kwargs)
                if ranks is not None:  # a process may have such parts alone, and its sums need their shapes
                    spread.add([f[:0] for f in feats])
            else:
                with guard.backward_pass(lead), Watch(ids_of(lead, names), after=note):
                    spread.add(_pushed(capture, args, kwargs, units, draws))
            step()
    if ranks is not None:
        spread.add_up(ranks)
        for name in [name for name in names if name in sums]:
            force = energy.get(name, sums[name].new_zeros(len(tensors[name])))
            counts = sums[name].new_tensor([rows[name], name in energy])
            ranks.add_up([sums[name], force, counts])
            rows[name] = int(counts[0])
            energy |= {name: force} if counts[1] else {}
    if len(units) == 1:
        energy = {name: each / spread.values()[0] for name, each in energy.items()}
    return {name: total / rows[name] for name, total in sums.items() if name in energy}, energy


def _pushed(
    capture: Capture, args: tuple, kwargs: dict, units: Sequence[float], draws: torch.Generator
) -> list[Tensor]:
    """The features of a part, after gradients of them, in a random direction at each point, ran through the network."""
    images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    with torch.enable_grad():
        for image in images:
            image.requires_grad_(True)
        given, named = copied((args, kwargs))
        feats = capture.features(*given, **named)
        noise = [torch.randn(f.shape, generator=draws).to(f) for f in feats]
        total = sum((f * n).sum() / u**0.5 for f, n, u in zip(feats, noise, units, strict=True))
        if total.requires_grad:
            torch.autograd.grad(total, images, allow_unused=True)
    return [f.detach() for f in feats]


def _weighed(capture: Capture, parts: Iterator[Batch], least: int) -> tuple[Iterator[Batch], list[float]]:
    """`parts` again, and the teacher's squared deviation at each seam point over the first `least` views."""
    spread, ahead, seen = _Spread(), [], 0
    while seen < least and (part := next(parts, None)) is not None:
        args, kwargs = copied(part)
        ahead.append(part)
        seen += _length(args, kwargs)
        spread.add(capture.features(*args, **kwargs))
    return chain(ahead, parts), spread.values()


class _Spread:
    """The teacher's squared deviation from its mean feature, at each seam point, over the views that were added."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._squares: list[float] = []
        self._views = 0

    def add(self, feats: list[Tensor]) -> None:
        self._views += len(feats[0])
        feats = [f.double() for f in feats]
        none: list[Any] = [(0.0, 0.0)] * len(feats)
        old = zip(self._sums, self._squares, strict=True) if self._sums else none
        found = [(s + f.sum(0), q + f.square().sum().item()) for f, (s, q) in zip(feats, old, strict=True)]
        self._sums, self._squares = [s for s, _ in found], [q for _, q in found]

    def add_up(self, ranks: Ranks) -> None:
        """Over the views of all processes, each of which has added some, be it none."""
        numbers = self._sums[0].new_tensor([self._views, *self._squares])
        ranks.add_up([*self._sums, numbers])
        self._views, self._squares = int(numbers[0]), numbers[1:].tolist()

    def values(self) -> list[float]:
        pairs = zip(self._sums, self._squares, strict=True)
        spread = [(q - s.square().sum().item() / self._views, q) for s, q in pairs]
        return [d if d > 1e-9 * q else max(q, 1e-30) for d, q in spread]


def _length(args: tuple, kwargs: dict) -> int:
    return next(len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of `size` views; copies, since gradients are taken for them."""
    args, kwargs = batch
    whole = _length(args, kwargs)

    def part(value: object, at: slice) -> object:
        return value[at].clone() if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    for start in range(0, whole, size):
        at = slice(start, start + size)
        yield tuple(part(a, at) for a in args), {k: part(v, at) for k, v in kwargs.items()}


def _readers_in(width: int, units: np.ndarray, weight: Tensor, moments: Tensor, force: Tensor) -> Iterator[Reader]:
    """A layer as it reads a group: itself, or each of its own groups. units: of the group, for each of its inputs."""
    groups, inputs = len(moments), weight.shape[1]
    apart = moments.shape[1] > inputs  # by their place in the kernel
    taps = weight[0, 0].numel() if apart else 1
    where = [np.flatnonzero(units == unit) for unit in range(width)]
    at = np.full((width, max(map(len, where)), taps), -1)
    for unit, found in enumerate(where):
        at[unit, : len(found)] = found[:, None] * taps + np.arange(taps)
    weight = weight.detach().to(moments).unflatten(0, (groups, -1))
    for gram, rows, acts in zip(moments, weight, force.to(moments).unflatten(0, (groups, -1)), strict=True):
        rows = rows.reshape(*rows.shape[:2], -1) * acts.sqrt()[:, None, None]  # (outputs, inputs, kernel)
        rows = rows.flatten(1) if apart else rows.transpose(1, 2).flatten(0, 1)
        yield Reader(gram, rows.mT @ rows, at.reshape(width, -1))
