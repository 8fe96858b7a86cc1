"""How many views of the images the closed form uses: as many as help, fit the memory and take no more than the time.

Two networks run side by side and halt at each layer (`lockstep`), so that all views are in memory at once. A network's
maps are large where it begins; its last layers have few positions in each view and need many views: so later layers may
see more views than earlier ones.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from torch import Tensor, nn

from mimicut.anatomy.cost import count_traced
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import shape
from mimicut.base import guard
from mimicut.base.memory import SLACK_BYTES
from mimicut.recovery.batches import Source, copied
from mimicut.recovery.folds import BATCH, batches_of
from mimicut.recovery.gated import ROUNDS
from mimicut.recovery.layers import Layer, layers_to_solve
from mimicut.recovery.moments import LARGE, LEAST_POSITIONS, ROWS, ROWS_AT_ONCE
from mimicut.surgery.plan import Plan

# Views of the few images in all, half of them mixed. Source: measured (docs/LOG.md): 16 for each image are better than
# 8 by a point, 32 no better than 16.
VIEWS = 800
# Of networks with few positions: rows for each input of a layer, and views in all. Source: measured (docs/LOG.md).
ROWS_PER_INPUT, MOST_VIEWS = 35, 1600
# What the passes may cost in all, which bounds the views of large networks. Source: measured on ResNet-50 at 224
# pixels, so that all of it stays under a minute and a half on two cores (benchmarks/studies/closed_form_cost.py).
MACS = 1e12
MEMORY_BYTES = 2**31  # What may be held besides the two networks. Source: assumption, for 3 GB in all.
# Inputs of all rows of a layer, kept where an activation follows it. Source: assumption.
MOST_KEPT = 50_000_000
_MAP_BYTES = 2**26  # Views that run at once: fewer than BATCH where a map of theirs is larger. Source: assumption.
_FEWEST = 8  # Views that are better than none. Source: assumption.
# How long it will take: solves of a layer, in cubes of its inputs; how much slower a multiplication is in them than in
# the network's own layers; seconds for each layer; views that are timed. Source: measured, of five networks all are
# within a factor of two (docs/LOG.md).
_SOLVES, _SLOWER, _SECONDS_PER_LAYER, _TIMED = 4, 1.5, 0.15, 4
# The most tries of a view's time, and the seconds after which no further one begins. Source: assumption.
_TRIES, _TRIES_SECONDS = 10, 0.2


def views_per_batch(anatomy: Anatomy) -> int:
    """How many views run at once."""
    return max(4, min(BATCH, _MAP_BYTES // (4 * max(1, _largest_map(anatomy)))))


def _largest_map(anatomy: Anatomy) -> int:
    """Numbers in the largest feature map of one image."""
    traced = anatomy.traced
    sizes = (math.prod(size) for node in traced.nodes if (size := shape(node)) is not None)
    return max(sizes, default=1) // traced.batch


def affordable_views(anatomy: Anatomy, most: int = VIEWS) -> int:
    """How many views two passes may see for what they cost (MACS), `most` at the most and at least 1."""
    return max(1, min(most, int(MACS / (2 * max(1, count_traced(anatomy.traced).macs)))))


def useful_views(anatomy: Anatomy, layers: Iterable[Layer]) -> int:
    """How many views help: more than VIEWS where a layer with many inputs has few positions in each."""
    traced, wanted = anatomy.traced, VIEWS
    names = {layer.weight for layer in layers}
    for node, name in traced.tensors.items():
        for user in node.users:
            size, weight = shape(user), shape(node)
            if name in names and size and weight:
                positions = max(1, math.prod(size) // (traced.batch * weight[0]))
                wanted = max(wanted, math.ceil(ROWS_PER_INPUT * math.prod(weight[1:]) / positions))
    return min(wanted, MOST_VIEWS)


def views_at_each(
    anatomy: Anatomy,
    halts: Sequence[str],
    most_bytes: int = MEMORY_BYTES,
    taken: Mapping[str, int] | None = None,
    views: int = VIEWS,
) -> list[int]:
    """How many views two passes may hold at each halt.

    Args:
        anatomy: Of the teacher.
        halts: Names of the weights at which the passes halt, in the order in which they run.
        most_bytes: What there is for the passes.
        taken: Weight -> bytes of these that are needed for other things at its halt.
        views: More are of no use.

    Returns:
        Of each halt, how many views; never fewer than at the one before.
    """
    bytes_at, free = bytes_per_view(anatomy, halts), most_bytes - running_bytes(anatomy)
    room = [(free - (taken or {}).get(name, 0)) // bytes_at[name] for name in halts]
    from_the_end = accumulate(reversed(room), min, initial=affordable_views(anatomy, views))
    return [max(1, seen) for seen in from_the_end][:0:-1]


def needed_bytes(anatomy: Anatomy, plan: Plan, student: nn.Module) -> int:
    """The least memory with which `closed_form` is of any use, besides the networks.

    It has room for a few views, and none for layers so large that they alone would take more.
    """
    halts = [layer.weight for layer in layers_to_solve(anatomy, plan, student)]
    held = tensor_bytes(guard.named_tensors(student).values()) + running_bytes(anatomy)
    return held + _FEWEST * max(bytes_per_view(anatomy, halts).values(), default=0)


def bytes_per_view(anatomy: Anatomy, halts: Sequence[str]) -> dict[str, int]:
    """What two passes hold of one view at each halt: the image, and the values that are still needed.

    A value is needed until its last operator has run, and as long as a module runs that was given it: the caller holds
    it. The student is taken to be as large as the teacher, but it halts before it computes.

    Returns:
        Weight -> bytes.
    """
    traced, weights = anatomy.traced, set(halts)
    order = {node: i for i, node in enumerate(traced.nodes)}
    last_in = {call: i for node, i in order.items() for call in traced.calls.get(node, ())}
    change = [0] * (len(order) + 1)  # by how many numbers more is held from each operator on
    for node, i in order.items():
        inside, end = set(traced.calls.get(node, ())), i
        for user in node.users:
            end = max(end, order.get(user, len(order) - 1))
            end = max([end, *(last_in[call] for call in traced.calls.get(user, ()) if call not in inside)])
        numbers = shape(node)
        size = 0 if numbers is None else math.prod(numbers)
        change[i] += size
        change[end + 1] -= size
    held = list(accumulate(change))
    image = sum(math.prod(numbers) for node in traced.inputs if (numbers := shape(node)) is not None)
    return {
        name: 4 * (2 * held[order[user]] - math.prod(shape(user) or (0,)) + 2 * image) // traced.batch
        for node, name in traced.tensors.items()
        if name in weights
        for user in node.users
        if user in order
    }


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def running_bytes(anatomy: Anatomy) -> int:
    """What the one pass that runs adds: feature maps of a batch, and memory that was freed and not returned."""
    return 2 * SLACK_BYTES + 4 * min(_MAP_BYTES, BATCH * 4 * max(1, _largest_map(anatomy)))


def layer_bytes(layer: Layer, student: Mapping[str, Tensor], folds: int, rows: int, most_bytes: int) -> int:
    """What solving a layer holds: moments of every part, four matrices of their size to solve with, and rows.

    Args:
        layer: The layer.
        student: The student's tensors by name.
        folds: Into how many the images are divided.
        rows: Positions of all views that a layer is solved from.
        most_bytes: What there is for everything.
    """
    outputs, inputs = len(student[layer.weight]), student[layer.weight][0].numel()
    parts = folds if inputs <= LARGE else 2
    depthwise = student[layer.weight].ndim > 2 and student[layer.weight].shape[1] == 1
    groups = outputs if depthwise else 1
    kept = min(rows, parts * ROWS_AT_ONCE)
    if layer.gate is not None:
        kept = min(max(rows, LEAST_POSITIONS * MOST_VIEWS), most_kept(most_bytes) // (groups * inputs))
    moments = groups * (parts + 4) * inputs**2 + (parts + 2) * inputs * outputs
    return 8 * moments + 4 * kept * (groups * inputs + 2 * outputs)


def most_kept(most_bytes: int) -> int:
    """How many inputs of all rows may be kept of a layer that an activation follows, with `most_bytes` for all."""
    return min(MOST_KEPT, most_bytes // 40)  # a tenth of them


def measure_view_seconds(model: nn.Module, few: Source | Tensor, views: str) -> float:
    """Measure the seconds of a forward pass for each of a few views: the best of two tries, or of _TRIES where they are
    short, as another process may hold one up."""
    batch, _, made = batches_of(few, model, views, "none", 0, 1, _TIMED)
    tries: list[float] = []
    with guard.seeded(0), guard.evaluating(model):
        begun = time.perf_counter()
        while len(tries) < 2 or (len(tries) < _TRIES and time.perf_counter() - begun < _TRIES_SECONDS):
            started = time.perf_counter()
            for args, kwargs in map(copied, batch):
                model(*args, **kwargs)
            tries.append((time.perf_counter() - started) / made)
    return min(tries)


def expected_seconds(
    anatomy: Anatomy, plan: Plan, student: nn.Module, view_seconds: float, processes: int = 1
) -> float:
    """About how many seconds `closed_form` will take.

    Args:
        anatomy: Of the teacher.
        plan: By which the student was cut.
        student: The student.
        view_seconds: Of the teacher, as `measure_view_seconds` gives them.
        processes: How many share the passes; one alone solves.
    """
    tensors = guard.named_tensors(student)
    layers = layers_to_solve(anatomy, plan, student)
    sizes = [(len(tensors[layer.weight]), tensors[layer.weight][0].numel(), layer.gate) for layer in layers]
    work = sum(ROWS * size * (size + outputs * (4 * ROUNDS if gate else 1)) for outputs, size, gate in sizes)
    work += sum(_SOLVES * size**3 for _, size, _ in sizes)
    passes = 2 * affordable_views(anatomy, useful_views(anatomy, layers)) * view_seconds
    return passes / processes + matrix_seconds(work, anatomy, view_seconds) + _SECONDS_PER_LAYER * len(layers)


def matrix_seconds(macs: float, anatomy: Anatomy, view_seconds: float) -> float:
    """About how many seconds so many multiplications of matrices take, from those that the network takes for a view."""
    return _SLOWER * macs * view_seconds / max(1, count_traced(anatomy.traced).macs)


def views_within(seconds: float, view_seconds: float) -> int:
    """How many views two passes, and as long again for solving, may see in that time; 0 where that is too few.

    >>> views_within(8.0, 0.02), views_within(0.1, 0.02)
    (100, 0)
    """
    views = min(float(MOST_VIEWS), seconds / (4 * max(view_seconds, 1e-9)))
    return int(views) if views >= _FEWEST else 0
