"""Tensors put together (cat, stack) and taken apart (split, chunk, unbind, slice, select)."""

from typing import Any

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes, Ids
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, foresee, why
from mimicut.anatomy.tracing import operator, shape


def cat(reader: Reader, node: Node) -> Axes:
    """Along one axis the channels of all stand one after the other; along the rest they are the same channels."""
    tensors = [t for t in node.args[0] if shape(t) != (0,)]
    foresee(bool(tensors), "a tensor that holds something")
    dim = argument(node, 1, "dim", 0) % len(shape(node))
    result: Axes = []
    for axis in range(len(shape(node))):
        parts = [reader.axes(t)[axis] for t in tensors]
        if axis != dim:
            for ids in parts[1:]:
                parts[0] = reader.channels.join(parts[0], ids, why(reader, node, "joined with an unread tensor"))
            result.append(parts[0])
        elif any(ids is not None for ids in parts):
            result.append(
                _concatenate(reader, node, [(shape(t)[axis], ids) for t, ids in zip(tensors, parts, strict=True)])
            )
        else:
            result.append(None)
    return result


def _concatenate(reader: Reader, node: Node, parts: list[tuple[int, Ids | None]]) -> Ids:
    filled = []
    for size, ids in parts:
        if ids is None:  # it has no channels that could be cut, but its place among the others must be known
            ids = reader.channels.new(size)
            reader.channels.pin(ids, why(reader, node, "an unread tensor"))
        filled.append(ids)
    return np.concatenate(filled)


def stack(reader: Reader, node: Node) -> Axes:
    """Tensors of the same channels, along a new axis."""
    dim = argument(node, 1, "dim", 0) % len(shape(node))
    tensors = [reader.axes(t) for t in node.args[0]]
    axes = list(tensors[0])
    for other in tensors[1:]:
        axes = [
            reader.channels.join(a, b, why(reader, node, "stacked with an unread tensor"))
            for a, b in zip(axes, other, strict=True)
        ]
    return [*axes[:dim], None, *axes[dim:]]


def split(reader: Reader, node: Node) -> list[Axes]:
    """chunk, split by one size, split by many. Pieces of one size stay equal, so their channels are joined."""
    axes, arg = list(reader.axes(node.args[0])), node.args[1]
    dim = argument(node, 2, "dim", 0) % len(axes)
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    ids = axes[dim]
    if ids is None:
        return [list(axes) for _ in sizes]
    pieces = np.split(ids, np.cumsum(sizes)[:-1])
    if isinstance(arg, int):
        if len(set(sizes)) > 1:
            reader.channels.pin(ids, why(reader, node, "split into unequal pieces"))
        else:
            for piece in pieces[1:]:
                reader.channels.join(pieces[0], piece)
            if operator(node) != "chunk":  # a chunk is given how many pieces there are, a split how large they are
                reader.size(node, None, None, sizes[0], pieces[0])
    else:
        for position, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
            reader.size(node, None, None, size, piece, (sizes, position))
    return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces]


def unbind(reader: Reader, node: Node) -> list[Axes]:
    """One tensor for each position of an axis, which must keep them all."""
    axes = list(reader.axes(node.args[0]))
    reader.channels.pin(axes.pop(argument(node, 1, "dim", 0) % len(axes)), why(reader, node, "taken apart"))
    return [list(axes) for _ in node.meta["val"]]


def getitem(reader: Reader, node: Node) -> Any:
    """One of the results of an operator that returns several."""
    value = reader.axes(node.args[0])
    foresee(value is not None, "an operator whose results were read")
    return value[node.args[1]]


def slice_axis(reader: Reader, node: Node) -> Axes:
    """tensor[..., start:end:step, ...]: its borders count the channels before them."""
    axes, dim = list(reader.axes(node.args[0])), argument(node, 1, "dim", 0)
    ids, size = axes[dim], shape(node.args[0])[dim]
    if ids is None:
        return axes
    borders = [argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))]
    foresee(all(b is None or isinstance(b, int) for b in borders), "borders that do not depend on values")
    start, end, step = slice(*borders).indices(size)
    axes[dim] = ids[start:end:step]
    if step != 1:
        reader.channels.pin(ids, why(reader, node, "sliced with a step over its channels"))
    for border in {start, end} - {0, size}:
        reader.size(node, None, None, border, ids[:border])
    return axes


def select(reader: Reader, node: Node) -> Axes:
    """One position of an axis, by number."""
    axes = list(reader.axes(node.args[0]))
    dim = node.args[1] % len(axes)
    reader.channels.pin(axes.pop(dim), why(reader, node, "one of its channels is picked by number"))
    return axes


RULES: dict[str, Rule] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), split),
    "unbind": unbind,
    "getitem": getitem,
    "slice": slice_axis,
    "select": select,
}
