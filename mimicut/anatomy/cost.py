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
from mimicut.anatomy.operators.rule_interface import argument
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
    """What a network costs.

    Attributes:
        macs: multiply-accumulates for one image.
        params: numbers in parameters.
        uncounted: operator -> how many times it runs in one pass.
        bytes: of all parameters and buffers.
    """

    macs: int
    params: int
    uncounted: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class Term:
    """MACs of one operator for one image, as a product.

    Attributes:
        node: the operator.
        fixed: the factor that no cut changes.
        axes: the axes whose lengths are the other factors, as atoms (`channels.Ids`).
    """

    node: Node
    fixed: float
    axes: tuple[np.ndarray, ...]

    @property
    def macs(self) -> float:
        """`fixed` times the length of each axis."""
        return self.fixed * math.prod(len(a) for a in self.axes)


def count(model: nn.Module, example: Any) -> Cost:
    """Count what a network costs.

    Args:
        model: the network.
        example: a tensor (N, C, H, W), a tuple of arguments, or (args, kwargs).

    Returns:
        The cost for one of the images in `example`.

    Raises:
        UnsupportedModel: torch.export cannot follow the network.

    >>> import torch
    >>> count(nn.Linear(3, 2), torch.zeros(4, 3)).macs
    6
    """
    return count_traced(trace_graph(model, example))


def count_traced(traced: Traced) -> Cost:
    """Count what a network that is already traced costs, for one image."""
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
    """Bytes of the parameters and buffers of a network, each counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in named_tensors(model).values()}.values())


def macs_in(nodes: Iterable[Node], batch: int) -> float:
    """MACs of some operators of a trace for one of its `batch` images."""
    return sum(macs(node) or 0 for node in nodes) / batch


def count_teacher(teacher: nn.Module, anatomy: Anatomy) -> Cost:
    """Count what the uncut teacher costs, with the blocks that its anatomy leaves out."""
    return count_traced(anatomy.full_trace or anatomy.traced)


def terms(anatomy: Anatomy) -> list[Term]:
    """Write the MACs of every counted operator as a product of a factor and lengths of axes.

    Args:
        anatomy: what is known of the network.

    Returns:
        One term for each operator, two for an attention, one for each weight of a recurrent layer.
    """
    found = []
    for node in anatomy.traced.nodes:
        for total, axes in _products(anatomy, node):
            axes = [a for a in axes if a is not None]
            fixed = total / anatomy.traced.batch / math.prod(len(a) for a in axes)
            found.append(Term(node, fixed, tuple(axes)))
    return found


def _products(anatomy: Anatomy, node: Node) -> list[tuple[int, list[np.ndarray | None]]]:
    """MACs of `node` with the axes that they are a product of: two products for an attention, q k^T and the weights
    times v; for a recurrent layer one with each weight."""
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
    """Count the MACs of one operator on the traced batch.

    With out the shape of the result, k the kernel, and prod(s) the product of a shape:

        convolution             prod(out) x C_in / groups x prod(k)
        transposed convolution  prod(in) x C_out / groups x prod(k)
        linear, matmul          prod(out) x C_in
        einsum                  product of the sizes of all letters
        attention               B H T S (D_qk + D_v), for T queries and S keys in each of H heads
        recurrent layer         steps x numbers in the weights (biases left out)

    Args:
        node: an operator of a traced graph.

    Returns:
        The MACs; None where the operator is not counted.
    """
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
    """The weights of a recurrent layer, each with its MACs: a product with every step of every sequence."""
    steps = math.prod(shape(node.args[0])[:2])
    return [(w, steps * math.prod(shape(w))) for w in node.args[2] if len(shape(w)) == 2]


def _letters(node: Node, known: Any) -> dict[str, Any]:
    """For each letter of an einsum what `known` has for it, from the operand in which that letter is longest."""
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for term, value in zip(node.args[0].replace(" ", "").partition("->")[0].split(","), node.args[1], strict=True):
        for letter, size, this in zip(term, shape(value), known[value], strict=True):
            if size > sizes.get(letter, 0):
                sizes[letter], found[letter] = size, this
    return found


def _cut_axes(anatomy: Anatomy, node: Node) -> list[np.ndarray | None]:
    """The axes whose lengths are factors of the MACs of one product."""
    name = operator(node)
    if name.startswith("conv"):
        x, weight = node.args[0], node.args[1]
        at = len(shape(node)) - (len(shape(weight)) - 1)
        groups = node.args[8] if name == "convolution" else argument(node, 6, "groups", 1)
        if name.startswith("conv_transpose") or (name == "convolution" and node.args[6]):
            # Of several groups whole ones are cut: each input that is left has as many outputs as before.
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
