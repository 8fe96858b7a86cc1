"""The layers of a network that are linear in their input, read from its graph: what each sees and what follows it."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import Traced, operator, shape
from mimicut.base.guard import named_tensors
from mimicut.recovery.lockstep import Seen
from mimicut.surgery.plan import Plan

# Inputs x kernel above which a layer is left alone: its moments alone would take gigabytes. Source: assumption.
MOST_INPUTS = 6000
LINEAR = ("conv1d", "conv2d", "conv3d", "linear")
_NORMS = ("batch_norm", "layer_norm", "group_norm")
_VIEWS = ("view", "reshape", "unsqueeze", "alias", "slice", "flatten")  # of a parameter: the same numbers
# Between a layer and the addition that follows, these change nothing in eval mode.
_IDLE = ("dropout", "alias", "clone", "contiguous", "identity")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer before the seam whose weight is a parameter that one call uses.

    weight, bias: names of its tensors. constant: a tensor of its own that can take up a constant: the bias, or the
    running mean of the batch norm that alone reads its output; None where there is none. scales: what scales its output
    on the way to the addition or activation that follows: parameters, and batch norms as (weight, bias, running mean,
    running variance, epsilon). shortcut: where the other side of that addition can be seen, as (weight, "input" |
    "output"), or None. gate: the range in which the activation that follows distinguishes values, or None.
    """

    weight: str
    bias: str | None
    constant: str | None
    scales: tuple[Any, ...]
    shortcut: tuple[str, str] | None
    gate: tuple[float, float] | None


def layers(anatomy: Anatomy) -> list[Layer]:
    """The layers before the seam that can be solved, in the order in which they run."""
    return _Reader(anatomy).layers()


def solvable_layers(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> list[Layer]:
    """The layers of `anatomy` whose weights are in `tensors` and have at most MOST_INPUTS inputs."""
    return [
        layer
        for layer in layers(anatomy)
        if layer.weight in tensors and tensors[layer.weight][0].numel() <= MOST_INPUTS
    ]


def layers_to_solve(anatomy: Anatomy, plan: Plan, student: nn.Module) -> list[Layer]:
    """The layers of `student` from the first one on that the plan touches, or that runs after a dropped block."""
    found = solvable_layers(anatomy, named_tensors(student))
    touched = {i for i, layer in enumerate(found) if layer.weight in plan.slices}
    if plan.drop and not anatomy.only_blocks:
        return found
    if plan.drop:
        assert anatomy.full_trace is not None  # as blocks are left out
        after = weights_after(anatomy.full_trace, min(map(anatomy.full_trace.nodes.index, anatomy.zeroed_nodes)))
        touched |= {i for i, layer in enumerate(found) if layer.weight in after}
    return found[min(touched, default=len(found)) :]


def weights_after(traced: Traced, place: int) -> set[str]:
    """Names of the tensors that the operators after that place in `traced.nodes` take."""
    later = traced.nodes[place + 1 :]
    return {traced.tensors[t] for node in later for t in node.all_input_nodes if t in traced.tensors}


class _Reader:
    """Reads the layers from the graph of a network."""

    def __init__(self, anatomy: Anatomy):
        self._anatomy, self._traced = anatomy, anatomy.traced
        self._tensors, self._used_once = named_tensors(self._traced.model), _used_once(self._traced)
        self._head = {id(self._tensors[name]) for name in anatomy.seam.head if name in self._tensors}
        self._order = {node: i for i, node in enumerate(self._traced.nodes)}
        self._weights: dict[Node, str] = {}  # of calls of layers and norms, where one call alone uses it
        # A value and whether it is that call's input or output -> the call, where `lockstep` can see the value.
        self._seen_at: dict[tuple[Node, str], Node] = {}
        for node in self._traced.nodes:
            weight = _weight(anatomy, node)
            if weight in self._used_once:
                self._weights[node] = weight
                given: Any = node.args[0]
                self._seen_at.setdefault((given, "input"), node)
                self._seen_at[node, "output"] = node

    def layers(self) -> list[Layer]:
        before_seam, parameters = self._before_seam(), dict(self._traced.model.named_parameters())
        return [
            self._layer(node, weight)
            for node, weight in self._weights.items()
            if operator(node) in LINEAR and node in before_seam and weight in parameters
            if self._free(weight) and self._takes_batches(node, weight)
        ]

    def _before_seam(self) -> set[Node]:
        before, todo = set(), list(self._anatomy.seam_nodes)
        while todo:
            node = todo.pop()
            if node not in before:
                before.add(node)
                todo += node.all_input_nodes
        return before

    def _free(self, name: str | None) -> bool:
        """Whether a tensor may change: one call uses it, and it is not the head's."""
        return name in self._used_once and id(self._tensors[name]) not in self._head

    def _takes_batches(self, node: Node, weight: str) -> bool:
        rank = len(shape(node.args[0]) or ())
        return rank >= 2 and (operator(node) == "linear" or rank == self._tensors[weight].ndim)

    def _layer(self, node: Node, weight: str) -> Layer:
        bias = self._traced.tensors.get(_argument(node, 2, "bias"))
        constant, scales, end = bias if self._free(bias) else None, [], node
        while len(end.users) == 1:
            after = next(iter(end.users))
            step = _step(self._anatomy, end, after, 1 if operator(node) != "linear" else len(shape(node) or ()) - 1)
            if step is None:
                break
            if end is node and bias is None and operator(after) == "batch_norm":
                mean = self._traced.tensors.get(_argument(after, 3, "running_mean"))
                constant = mean if self._free(mean) else None
            scales += step
            end = after
        shortcut, gate = self._shortcut(node, end)
        return Layer(weight, bias, constant, tuple(scales), shortcut, gate)

    def _shortcut(self, node: Node, end: Node) -> tuple[tuple[str, str] | None, tuple[float, float] | None]:
        """Where the other side of the addition after `end` can be seen, and the range of the activation after that."""
        add = next(iter(end.users)) if len(end.users) == 1 else None
        if add is not None and operator(add) == "add" and not add.kwargs and len(add.all_input_nodes) == 2:
            other = next(n for n in add.all_input_nodes if n is not end)
            for side in ("output", "input"):
                call = self._seen_at.get((other, side))
                if call is not None and self._order[call] <= self._order[node] and _same(other, node):
                    return (self._weights[call], side), _gate(add)
        return None, _gate(end)


def _gate(node: Node) -> tuple[float, float] | None:
    """The range of the activation that alone reads `node`; None for anything else."""
    if len(node.users) != 1:
        return None
    after = next(iter(node.users))
    kind = operator(after) or ""
    if kind == "hardtanh":
        low, high = _argument(after, 1, "min_val"), _argument(after, 2, "max_val")
        return (-1.0 if low is None else float(low), 1.0 if high is None else float(high))
    return {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(kind)


def _same(one: Node, other: Node) -> bool:
    return shape(one) is not None and shape(one) == shape(other)


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _used_once(traced: Traced) -> frozenset[str]:
    """Names of the tensors that one call uses, under whatever name."""
    tensors = named_tensors(traced.model)
    uses: Counter[int] = Counter()
    for node, name in traced.tensors.items():
        uses[id(tensors.get(name))] += len(node.users)
    return frozenset(name for name, tensor in tensors.items() if uses[id(tensor)] == 1)


def _weight(anatomy: Anatomy, node: Node) -> str | None:
    """The name of the weight of a layer or norm, where it is a tensor of the network."""
    kind = operator(node)
    if kind not in (*LINEAR, *_NORMS) or not node.args or not isinstance(node.args[0], Node):
        return None
    weight = _argument(node, {"layer_norm": 2, "group_norm": 2}.get(kind, 1), "weight")
    name = anatomy.traced.tensors.get(weight) if isinstance(weight, Node) else None
    return name


def _step(anatomy: Anatomy, before: Node, after: Node, axis: int) -> list[Any] | None:
    """What `after` scales the channels (`axis`) of `before` with; None if it does more than scale and shift them."""
    kind = operator(after)
    if kind in _IDLE:
        return []
    if kind == "batch_norm":
        asked = ((1, "weight"), (2, "bias"), (3, "running_mean"), (4, "running_var"))
        names = [anatomy.traced.tensors.get(_argument(after, *each)) for each in asked]
        return [(*names, after.args[7])] if None not in names and len(after.args) > 7 else None
    if kind == "mul":
        other = next((n for n in after.all_input_nodes if n is not before), None)
        factor = shape(other) if other is not None else None
        if other is None or factor is None:
            return None
        along = axis - (len(shape(after) or ()) - len(factor))  # the channels among the factor's own axes
        if any(size != 1 and at != along for at, size in enumerate(factor)):
            return None
        while isinstance(other, Node) and operator(other) in _VIEWS and other.all_input_nodes:
            other = other.all_input_nodes[0]
        name = anatomy.traced.tensors.get(other)
        return [name] if name is not None and math.prod(shape(other) or ()) == math.prod(factor) else None
    return None


def affine_of(layer: Layer, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The factor and the offset of each output channel between the layer and the addition or activation that follows.

    Args:
        layer: The layer.
        tensors: Of the network, by name.

    Returns:
        s and t, so that s y + t arrives where the layer gives y: (channels,) float64 each, on the CPU. None where they
        cannot be read.
    """
    channels = len(tensors[layer.weight])
    scale, offset = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for each in layer.scales:
        names = (each,) if isinstance(each, str) else each[:4]
        values = [tensors[name].detach().double().flatten().cpu() for name in names]
        if any(value.numel() not in (1, channels) for value in values):
            return None
        factor, shift = values[0], 0.0
        if len(values) > 1:
            weight, bias, mean, variance = values
            factor = weight / (variance + each[4]).sqrt()
            shift = bias - mean * factor
        scale, offset = scale * factor, offset * factor + shift
    return scale, offset


@dataclass(frozen=True)
class Geometry:
    """How one call of a layer reads its input; the tuples have an entry for each spatial axis, none for `linear`."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int


def geometry(seen: Seen, weight: Tensor) -> Geometry:
    """Read the geometry from the arguments of a call of the layer with this weight."""
    if weight.ndim == 2:
        return Geometry((), (), (), (), 1)
    axes = weight.ndim - 2
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, seen.args, strict=False)) | seen.kwargs
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_each(given[n], axes) for n in ("stride", "dilation"))
    if given["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in _each(0 if given["padding"] == "valid" else given["padding"], axes))
    return Geometry(kernel, stride, dilation, padding, given["groups"])


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * axes if len(values) == 1 else values


def channels_last(value: Tensor, spatial: int) -> Tensor:
    """Put positions before channels: (n, positions, channels).

    Args:
        value: (n, channels, *positions) where `spatial` is not 0, else (n, ..., channels).
        spatial: How many axes of positions follow the channels; 0 where the channels are last.

    >>> channels_last(torch.zeros(2, 3, 4, 5), 2).shape, channels_last(torch.zeros(2, 7), 0).shape
    (torch.Size([2, 20, 3]), torch.Size([2, 1, 7]))
    """
    if spatial:
        return value.flatten(2).transpose(1, 2)
    return value.reshape(value.shape[0], -1, value.shape[-1]) if value.ndim > 2 else value[:, None]


def columns(x: Tensor, how: Geometry, positions: Callable[[int], Tensor], size: tuple[int, ...]) -> Tensor:
    """What the output positions see of the input, in the order of a row of the weight.

    Args:
        x: (n, channels, *positions) of a convolution, (n, ..., channels) of a linear layer.
        how: Of the layer's call.
        positions: From the number of output positions to the flattened indices of those wanted.
        size: The output's positions along each spatial axis, () for a linear layer.

    Returns:
        (n, positions wanted, groups, inputs of a group x kernel).
    """
    if not how.kernel:
        rows = channels_last(x, 0)
        return rows[:, positions(rows.shape[1]).to(x.device)][:, :, None]
    left = positions(math.prod(size))
    places: list[Tensor] = []
    for side in reversed(size):
        places.insert(0, left % side)
        left = left // side
    flat, inside = torch.zeros(len(left), 1, dtype=torch.long), torch.ones(len(left), 1, dtype=torch.bool)
    axes = zip(places, how.kernel, how.stride, how.dilation, how.padding, x.shape[2:], strict=True)
    for place, taps, stride, dilation, (before, _), side in axes:  # (positions, taps so far) x (1, taps) of this axis
        at = (place * stride - before)[:, None, None] + dilation * torch.arange(taps)
        flat = (flat[:, :, None] * side + at.clamp(0, side - 1)).flatten(1)
        inside = (inside[:, :, None] & (at >= 0) & (at < side)).flatten(1)
    flat, inside = flat.to(x.device), inside.to(x.device)
    if x.stride(1) == 1:  # the channels of a pixel are adjacent in memory: whole rows of them are taken
        found = x.movedim(1, -1).flatten(1, -2).index_select(1, flat.flatten()).unflatten(1, flat.shape).transpose(2, 3)
    else:
        found = x.flatten(2).index_select(2, flat.flatten()).unflatten(2, flat.shape).transpose(1, 2)
    if not bool(inside.all()):
        found = found * inside[:, None]  # (n, positions, channels, taps)
    return found.unflatten(2, (how.groups, -1)).flatten(3)
