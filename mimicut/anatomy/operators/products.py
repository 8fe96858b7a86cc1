"""Linear layers, products of matrices, einsum and lookups in a table of embeddings."""

from torch.fx import Node

from mimicut.anatomy.channels import Axes, Ids
from mimicut.anatomy.operators.rule_interface import (
    Reader,
    Rule,
    argument,
    foresee,
    overload,
    owner_of,
    why,
)
from mimicut.anatomy.tracing import operator, shape

_TURNED = ("t", "transpose", "permute", "mT", "numpy_T")


def linear(reader: Reader, node: Node) -> Axes:
    """Input (..., C_in), weight (C_out, C_in): the weight makes the channels of the last axis."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    foresee(len(shape(weight)) == 2, "a weight of two axes")
    axes, w = reader.axes(x), reader.axes(weight)
    unknown = why(reader, node, "meets a linear layer whose weight could not be followed")
    if shape(x)[-1] > 1:
        reader.channels.join(axes[-1], w[1], unknown)
    if bias is not None:
        reader.channels.join(w[0], reader.axes(bias)[0], unknown)
    owner = owner_of(reader, weight)
    reader.size(node, owner, "in_features", shape(x)[-1], axes[-1])
    reader.size(node, owner, "out_features", shape(node)[-1], w[0])
    reader.produce(node, weight, 0, w[0], dense=True)
    return [*axes[:-1], w[0]]


def matmul(reader: Reader, node: Node) -> Axes:
    """(..., R, K) times (..., K, C): what is summed over is one axis, and so are the axes that are batched over."""
    return _product(reader, node, *node.args[:2])


def addmm(reader: Reader, node: Node) -> Axes:
    """addmm, baddbmm: a product, and something added to it."""
    foresee(overload(node) != "dtype", "a product of the type of its factors")
    given, out = node.args[0], _product(reader, node, *node.args[1:3])
    unread = why(reader, node, "added to an unread tensor")
    for back, ids in enumerate(reversed(reader.axes(given)), start=1):
        if shape(given)[-back] > 1:
            out[-back] = reader.channels.join(out[-back], ids, unread)
    return out


def _product(reader: Reader, node: Node, a: Node, b: Node) -> Axes:
    foresee(len(shape(a)) > 1 and len(shape(b)) > 1, "two matrices")
    x, y = reader.axes(a), reader.axes(b)
    if reader.tensor(b.args[0] if operator(b) in _TURNED else b) is not None:  # a linear layer by hand
        reader.produce(node, b, len(y) - 1, y[-1], dense=True)
    reader.channels.join(x[-1], y[-2], why(reader, node, "multiplied with a tensor that could not be followed"))
    out: Axes = [None] * len(shape(node))
    for axis in range(len(out) - 2):
        sides = []
        for tensor, axes in ((a, x), (b, y)):
            at = axis - len(out) + len(axes)
            if at >= 0 and shape(tensor)[at] > 1:
                sides.append(axes[at])
        out[axis] = sides[0] if sides else None
        if len(sides) == 2:
            out[axis] = reader.channels.join(
                sides[0], sides[1], why(reader, node, "batched with a tensor that could not be followed")
            )
    out[-2], out[-1] = x[-2], y[-1]
    return out


def einsum(reader: Reader, node: Node) -> Axes:
    """Axes that share a letter are one axis; a letter that the result lacks is summed over, as in a product."""
    given, _, out = node.args[0].replace(" ", "").partition("->")
    terms = given.split(",")
    plain = "." not in given and all(len(set(t)) == len(t) for t in terms)
    foresee(plain and bool(out), "letters, each once in a term, and a result with axes")
    known: dict[str, Ids | None] = {}
    for term, value in zip(terms, node.args[1], strict=True):
        for letter, ids, size in zip(term, reader.axes(value), shape(value), strict=True):
            if letter not in known:
                known[letter] = ids
            elif size > 1:
                known[letter] = reader.channels.join(
                    known[letter], ids, why(reader, node, "multiplied with a tensor that could not be followed")
                )
    return [known[letter] for letter in out]


def embedding(reader: Reader, node: Node) -> Axes:
    """Rows of a table (rows, C), picked by number."""
    table = reader.axes(node.args[0])
    reader.channels.pin(table[0], why(reader, node, "looked up by number"))
    return [*([None] * (len(shape(node)) - 1)), table[1]]


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "embedding": embedding,
}
