"""The layers of a network that are linear in their input, read from its graph: what each sees and what follows it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import Traced, operator, shape
from mimicut.base.guard import named_tensors
from mimicut.recovery.lockstep import Seen

LINEAR = ("conv1d", "conv2d", "conv3d", "linear")
_NORMS = ("batch_norm", "layer_norm", "group_norm")
# Between a layer and the addition behind it: in eval mode these change nothing.
_VIEWS = ("view", "reshape", "unsqueeze", "alias", "slice", "flatten")  # of a parameter: the same numbers
_IDLE = ("dropout", "alias", "clone", "contiguous", "identity")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer before the seam whose weight is a parameter that one call uses.

    weight, bias: names of its tensors. constant: a tensor of its own that can take up a constant: the bias, or the
    running mean of the batch norm that alone reads its output; None where there is none. scales: of its output on the
    way to the addition or activation behind it: parameters, and batch norms as (weight, bias, running mean, running
    variance, epsilon). shortcut: where the other side of that addition can be seen, as (weight, "input" | "output"), or
    None. gate: the range in which the activation behind all that tells values apart, or None where there is none such.
    """

    weight: str
    bias: str | None
    constant: str | None
    scales: tuple[Any, ...]
    shortcut: tuple[str, str] | None
    gate: tuple[float, float] | None


def layers(anatomy: Anatomy) -> list[Layer]:
    """In the order in which they run."""
    traced = anatomy.traced
    behind, todo = set(), list(anatomy.seam_nodes)
    while todo:
        node = todo.pop()
        if node not in behind:
            behind.add(node)
            todo += node.all_input_nodes
    parameters = dict(traced.model.named_parameters())
    tensors, once = named_tensors(traced.model), _used_once(traced)
    head = {id(tensors[name]) for name in anatomy.seam.head if name in tensors}

    def free(name: str | None) -> bool:
        return name in once and id(tensors[name]) not in head

    places: dict[tuple[Node, str], Node] = {}  # a value and whether it is the input or output -> the call that shows it
    order = {node: i for i, node in enumerate(traced.nodes)}
    weighted = {}
    for node in traced.nodes:
        weight = _weight(anatomy, node)
        if weight in once:
            weighted[node] = weight
            places.setdefault((node.args[0], "input"), node)
            places[node, "output"] = node
    found = []
    for node, weight in weighted.items():
        if operator(node) not in LINEAR or node not in behind or weight not in parameters or not free(weight):
            continue
        rank = len(shape(node.args[0]) or ())
        if rank < 2 or (operator(node) != "linear" and rank != tensors[weight].ndim):
            continue  # no batch of inputs
        bias = traced.tensors.get(_argument(node, 2, "bias"))
        constant, scales, end = bias if free(bias) else None, [], node
        while len(end.users) == 1:
            after = next(iter(end.users))
            step = _step(anatomy, end, after, 1 if operator(node) != "linear" else len(shape(node)) - 1)
            if step is None:
                break
            if end is node and bias is None and operator(after) == "batch_norm":
                mean = traced.tensors.get(_argument(after, 3, "running_mean"))
                constant = mean if free(mean) else None
            scales += step
            end = after
        shortcut, gate = None, _gate(end)
        add = next(iter(end.users)) if len(end.users) == 1 else None
        if add is not None and operator(add) == "add" and not add.kwargs and len(add.all_input_nodes) == 2:
            other = next(n for n in add.all_input_nodes if n is not end)
            for side in ("output", "input"):
                call = places.get((other, side))
                if call is not None and order[call] <= order[node] and _same(other, node):
                    shortcut, gate = (weighted[call], side), _gate(add)
                    break
        found.append(Layer(weight, bias, constant, tuple(scales), shortcut, gate))
    return found


def _gate(node: Node) -> tuple[float, float] | None:
    """Of the activation that alone reads `node`."""
    after = next(iter(node.users)) if len(node.users) == 1 else None
    kind = None if after is None else operator(after)
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
    uses = Counter()
    for node, name in traced.tensors.items():
        uses[id(tensors.get(name))] += len(node.users)
    return frozenset(name for name, tensor in tensors.items() if uses[id(tensor)] == 1)


def _weight(anatomy: Anatomy, node: Node) -> str | None:
    """The weight of a layer or norm, where it is a tensor of the network's."""
    kind = operator(node)
    if kind not in (*LINEAR, *_NORMS) or not node.args or not isinstance(node.args[0], Node):
        return None
    weight = _argument(node, {"layer_norm": 2, "group_norm": 2}.get(kind, 1), "weight")
    name = anatomy.traced.tensors.get(weight) if isinstance(weight, Node) else None
    return name


def _step(anatomy: Anatomy, before: Node, after: Node, axis: int) -> list[Any] | None:
    """By what `after` scales the channels (`axis`) of `before`, if it does no more than that and adding to them."""
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
        if factor is None:
            return None
        along = axis - (len(shape(after)) - len(factor))  # the channels among the factor's own axes
        if any(size != 1 and at != along for at, size in enumerate(factor)):
            return None
        while isinstance(other, Node) and operator(other) in _VIEWS and other.all_input_nodes:
            other = other.all_input_nodes[0]
        name = anatomy.traced.tensors.get(other)
        return [name] if name is not None and math.prod(shape(other)) == math.prod(factor) else None
    return None


def affine_of(layer: Layer, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Factor of each output channel on the way to the addition or activation, and what is added to it on that way,
    (channels,) float64 each, on the CPU; None where they cannot be read."""
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
    """How one call of a linear layer reads its input. size: of the output's positions, () for a linear layer."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int


def geometry(seen: Seen, weight: Tensor) -> Geometry:
    """Of the call that `seen` tells of."""
    if weight.ndim == 2:
        return Geometry((), (), (), (), 1)
    axes = weight.ndim - 2
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
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
    """Positions before channels: (n, positions, channels). spatial: axes of positions behind the channels; 0 where the
    channels stand last."""
    if spatial:
        return value.flatten(2).transpose(1, 2)
    return value.reshape(value.shape[0], -1, value.shape[-1]) if value.ndim > 2 else value[:, None]


def columns(x: Tensor, how: Geometry, positions: Callable[[int], Tensor], size: tuple[int, ...]) -> Tensor:
    """What the output positions see: (n, positions, groups, inputs of a group x kernel), as in a row of the weight.

    positions(count): which of `count` flattened output positions. size: of the output.
    """
    if not how.kernel:
        rows = channels_last(x, 0)
        return rows[:, positions(rows.shape[1]).to(x.device)][:, :, None]
    left = positions(math.prod(size))
    places = []
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
    if x.stride(1) == 1:  # channels stand together: whole rows of them are taken
        found = x.movedim(1, -1).flatten(1, -2).index_select(1, flat.flatten()).unflatten(1, flat.shape).transpose(2, 3)
    else:
        found = x.flatten(2).index_select(2, flat.flatten()).unflatten(2, flat.shape).transpose(1, 2)
    if not bool(inside.all()):
        found = found * inside[:, None]  # (n, positions, channels, taps)
    return found.unflatten(2, (how.groups, -1)).flatten(3)
