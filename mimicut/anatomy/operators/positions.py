"""Operators that pick or move positions: indices, sorting, rolling, flipping, triangles, channel shuffles, gates."""

from typing import Any

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, foresee, overload, why
from mimicut.anatomy.tracing import operator, shape


def index(reader: Reader, node: Node) -> Axes:
    """tensor[..., indices, ...]: the axes that are looked up must stay; the others keep their channels."""
    axes, indices = reader.axes(node.args[0]), list(node.args[1])
    where = [i for i, v in enumerate(indices) if v is not None]
    for i in where:
        reader.channels.pin(axes[i], why(reader, node, "picked by number"))
    if where != list(range(where[0], where[-1] + 1)):  # the results' axes would come first
        for ids in axes:
            reader.channels.pin(ids, why(reader, node, "picked by number"))
        return [None] * len(shape(node))
    new = len(shape(node)) - (len(axes) - len(where))
    return [*axes[: where[0]], *([None] * new), *axes[where[-1] + 1 :]]


def index_select(reader: Reader, node: Node) -> Axes:
    """Positions of one axis, by number."""
    axes = list(reader.axes(node.args[0]))
    dim = node.args[1] % len(axes)
    reader.channels.pin(axes[dim], why(reader, node, "picked by number"))
    axes[dim] = None
    return axes


def order(reader: Reader, node: Node) -> Any:
    """sort, topk, argsort: one axis, tokens as a rule, is put in order."""
    axes, name = list(reader.axes(node.args[0])), operator(node)
    foresee(bool(axes), "a tensor with axes")
    stable = overload(node) == "stable"
    dim = node.kwargs.get("dim", -1) if stable else argument(node, 2 if name == "topk" else 1, "dim", -1)
    reader.channels.pin(axes[dim], why(reader, node, "put in order along its channels"))
    axes[dim] = None
    return axes if name == "argsort" else [axes, axes]


def move(reader: Reader, node: Node) -> Axes:
    """roll, flip: positions change places; harmless along space and tokens."""
    axes = list(reader.axes(node.args[0]))
    dims = argument(node, 2, "dims", []) if operator(node) == "roll" else node.args[1]
    for dim in dims or range(len(axes)):
        reader.channels.pin(axes[dim], why(reader, node, "its channels change places"))
    return axes


def triangle(reader: Reader, node: Node) -> Axes:
    """tril, triu: a position along the last two axes counts."""
    axes = list(reader.axes(node.args[0]))
    for ids in axes[-2:]:
        reader.channels.pin(ids, why(reader, node, "a triangle of its channels is kept"))
    return axes


def channel_shuffle(reader: Reader, node: Node) -> Axes:
    """(N, G x C, ...) with its axis read as (C, G): the groups lose the channels at the same places."""
    axes = list(reader.axes(node.args[0]))
    if axes[1] is not None:
        table = axes[1].reshape(node.args[1], -1)
        reader.channels.join_rows(table.T)
        axes[1] = table.T.ravel()
    return axes


def glu(reader: Reader, node: Node) -> Axes:
    """The first half times the sigmoid of the second: a channel goes with its gate."""
    axes, dim = list(reader.axes(node.args[0])), argument(node, 1, "dim", -1)
    if axes[dim] is not None:
        first, second = np.split(axes[dim], 2)
        axes[dim] = reader.channels.join(first, second)
    return axes


RULES: dict[str, Rule] = {
    "index": index,
    "index_select": index_select,
    **dict.fromkeys(("sort", "topk", "argsort"), order),
    **dict.fromkeys(("roll", "flip"), move),
    **dict.fromkeys(("tril", "triu"), triangle),
    "channel_shuffle": channel_shuffle,
    "glu": glu,
}
