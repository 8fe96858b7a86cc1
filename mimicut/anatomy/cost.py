"""What a network costs: multiply-accumulates and parameters, and which operators were not counted.

One MAC is one multiplication with its addition. Counted: convolutions, linear and recurrent layers, matrix products,
attention, for one image, head included. Everything else (norms, activations, pooling, additions) is listed, not
counted.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.operators.recurrent import RECURRENT
from mimicut.anatomy.operators.rules import argument
from mimicut.anatomy.tracing import Traced, operator, shape, trace_graph
from mimicut.base.guard import named_tensors

# Operators that move or copy numbers, or do nothing here: there is nothing to count.
_FREE = frozenset(
    """alias chunk clone contiguous detach dropout expand expand_as flatten getitem mT moveaxis movedim permute reshape
    reshape_as seam_mark select slice split split_with_sizes squeeze swapaxes swapdims t to transpose unflatten
    unsqueeze view view_as""".split()
)


@dataclass(frozen=True)
class Cost:
    """macs: of one image. params: numbers in parameters. uncounted: operator -> how many times it runs. bytes: of all
    tensors."""

    macs: int
    params: int
    uncounted: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class Term:
    """MACs of one operator: `fixed` times the length of each axis in `axes` (channels that a cut may shorten)."""

    node: Node
    fixed: float
    axes: tuple[np.ndarray, ...]

    @property
    def macs(self) -> float:
        return self.fixed * math.prod(len(a) for a in self.axes)


def count(model: nn.Module, example: Any) -> Cost:
    """Cost of `model` for one of the images in `example` (a tensor, a tuple of arguments, or (args, kwargs))."""
    return count_traced(trace_graph(model, example))


def count_traced(traced: Traced) -> Cost:
    """Cost of a network that is already traced."""
    total, uncounted = 0, Counter()
    for node in traced.nodes:
        counted = macs(node)
        if counted is not None:
            total += counted
        elif operator(node) not in _FREE:
            uncounted[operator(node)] += 1
    params = sum(p.numel() for p in traced.model.parameters())
    return Cost(round(total / traced.batch), params, dict(sorted(uncounted.items())), bytes_of(traced.model))


def bytes_of(model: nn.Module) -> int:
    """Of every tensor once."""
    return sum({id(t): t.numel() * t.element_size() for t in named_tensors(model).values()}.values())


def macs_in(nodes: Iterable[Node], batch: int) -> float:
    """MACs of some operators of a trace, of one of its `batch` images."""
    return sum(macs(node) or 0 for node in nodes) / batch


def count_teacher(teacher: nn.Module, anatomy: Anatomy) -> Cost:
    """Cost of the uncut teacher, with the blocks that its anatomy leaves out."""
    return count_traced(anatomy.whole or anatomy.traced)


def terms(anatomy: Anatomy) -> list[Term]:
    """The counted operators with the axes on which their cost depends."""
    found = []
    for node in anatomy.traced.nodes:
        for total, axes in _products(anatomy, node):
            axes = [a for a in axes if a is not None]
            fixed = total / anatomy.traced.batch / math.prod(len(a) for a in axes)
            found.append(Term(node, fixed, tuple(axes)))
    return found


def _products(anatomy: Anatomy, node: Node) -> list[tuple[int, list[np.ndarray | None]]]:
    """MACs of `node` and the channels they are a product of; attention is two products, a recurrent layer one of each
    weight."""
    total = macs(node)
    if total is None:
        return []
    if operator(node) in RECURRENT:
        return [(m, [*anatomy.axes[w], anatomy.axes[node.args[0]][int(not node.args[8])]]) for w, m in _weights(node)]
    if operator(node) != "scaled_dot_product_attention":
        return [(total, _cut_axes(anatomy, node))]
    query, key, value = node.args[:3]
    pairs = math.prod(shape(query)[:-1]) * shape(key)[-2]
    heads = anatomy.axes[query][:-2]
    return [(pairs * shape(v)[-1], [*heads, anatomy.axes[v][-1]]) for v in (query, value)]


def macs(node: Node) -> int | None:
    """MACs of one operator on the traced batch; None where it is not counted."""
    name, out = operator(node), shape(node)
    if name in ("conv1d", "conv2d", "conv3d"):
        return math.prod(out) * math.prod(shape(node.args[1])[1:])
    if name.startswith("conv_transpose"):
        return math.prod(shape(node.args[0])) * math.prod(shape(node.args[1])[1:])
    if name == "convolution":
        transposed = node.args[6]
        return math.prod(shape(node.args[0]) if transposed else out) * math.prod(shape(node.args[1])[1:])
    if name == "linear":
        return math.prod(out) * shape(node.args[1])[-1]
    if name in ("matmul", "bmm", "mm"):
        return math.prod(out) * shape(node.args[0])[-1]
    if name in ("addmm", "baddbmm"):
        return math.prod(out) * shape(node.args[1])[-1]
    if name == "einsum" and "." not in node.args[0]:
        return math.prod(_letters(node, {a: shape(a) for a in node.args[1]}).values())
    if name == "scaled_dot_product_attention":
        query, key, value = (shape(node.args[i]) for i in range(3))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if name in RECURRENT and node.target._overloadname == "input":
        return sum(counted for _, counted in _weights(node))
    return None


def _weights(node: Node) -> list[tuple[Node, int]]:
    """The weights of a recurrent layer, and the MACs of each: a product with every step of every sequence."""
    steps = math.prod(shape(node.args[0])[:2])
    return [(w, steps * math.prod(shape(w))) for w in node.args[2] if len(shape(w)) == 2]


def _letters(node: Node, known: Any) -> dict[str, Any]:
    """What `known` has of each letter of an einsum, of the operand in which that letter is longest."""
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for term, value in zip(node.args[0].replace(" ", "").partition("->")[0].split(","), node.args[1], strict=True):
        for letter, size, this in zip(term, shape(value), known[value], strict=True):
            if size > sizes.get(letter, 0):
                sizes[letter], found[letter] = size, this
    return found


def _cut_axes(anatomy: Anatomy, node: Node) -> list[np.ndarray | None]:
    name = operator(node)
    if name.startswith("conv"):
        x, weight = node.args[0], node.args[1]
        at = len(shape(node)) - (len(shape(weight)) - 1)
        groups = node.args[8] if name == "convolution" else argument(node, 6, "groups", 1)
        if name.startswith("conv_transpose") or (name == "convolution" and node.args[6]):
            # Of several groups whole ones go: what each input gives stays as it is.
            return [anatomy.axes[x][at], anatomy.axes[node][at] if groups == 1 else None]
        return [anatomy.axes[node][at], anatomy.axes[weight][1], *anatomy.axes[node][at + 1 :]]
    if name == "linear":
        return [anatomy.axes[node][-1], anatomy.axes[node.args[0]][-1], *anatomy.axes[node][:-1]]
    if name in ("matmul", "bmm", "mm"):
        return [*anatomy.axes[node], anatomy.axes[node.args[0]][-1]]
    if name in ("addmm", "baddbmm"):
        return [*anatomy.axes[node], anatomy.axes[node.args[1]][-1]]
    if name == "einsum":
        return list(_letters(node, anatomy.axes).values())
    return []
