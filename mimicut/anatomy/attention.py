"""Rules for what attention is made of: products batched over heads, einsum, lookups of biases, moves along tokens.

Heads are cut whole: a head is a block of channels that a reshape sets apart and a batched product keeps apart.
"""

from collections.abc import Iterator

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes, Ids
from mimicut.anatomy.rules import Reader, Rule, argument, unknown_operator, why
from mimicut.anatomy.tracing import operator, shape

MAX_STEPS = 200  # of a look ahead; an attention is a few dozen operators
_PRODUCTS = ("matmul", "bmm", "baddbmm", "scaled_dot_product_attention")


def scaled_dot_product_attention(reader: Reader, node: Node) -> Axes:
    """Batched over heads. Without a scale of its own it divides by the root of a head's width, which is pinned then."""
    query, key, value = (reader.axes(a) for a in node.args[:3])
    unread = why(reader, node, "attends with a tensor that could not be followed")
    if node.kwargs.get("scale") is None:
        for ids in (query[-1], key[-1]):
            reader.channels.pin(ids, why(reader, node, "attention is scaled by the width of a head"))
    reader.channels.join(query[-1], key[-1], unread)
    for ids in (key[-2], value[-2]):
        reader.channels.pin(ids, why(reader, node, "a softmax runs over its channels"))
    batch: Axes = []
    for axis in range(len(query) - 2):
        ids = query[axis]
        for other, source in ((key, node.args[1]), (value, node.args[2])):
            if shape(source)[axis] == 1:
                continue  # the same for all heads
            if shape(source)[axis] == shape(node)[axis]:
                ids = reader.channels.join(ids, other[axis], unread)
            elif other[axis] is not None and ids is not None:  # grouped-query: several queries share a key
                shared = reader.channels.join_rows(ids.reshape(shape(source)[axis], -1))
                reader.channels.join(shared, other[axis], unread)
            else:
                reader.channels.join(ids, other[axis], unread)
        batch.append(ids)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        axes, size = reader.axes(mask), shape(mask)
        for axis in range(len(axes)):
            at = axis - len(axes) + len(query)
            if at < len(batch) and size[axis] == shape(node)[at] > 1:
                reader.channels.join(batch[at], axes[axis], unread)
            elif at >= len(batch):
                reader.channels.pin(axes[axis], unread)
    return [*batch, query[-2], value[-1]]


def einsum(reader: Reader, node: Node) -> Axes:
    """Axes that share a letter are one axis; a letter that the result lacks is summed over, as in a product."""
    given, _, out = node.args[0].replace(" ", "").partition("->")
    terms = given.split(",")
    if not out or "." in given or any(len(set(t)) < len(t) for t in terms):
        return unknown_operator(reader, node)
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
    axes = list(reader.axes(node.args[0]))
    dim = node.args[1] % len(axes)
    reader.channels.pin(axes[dim], why(reader, node, "picked by number"))
    axes[dim] = None
    return axes


def embedding(reader: Reader, node: Node) -> Axes:
    table = reader.axes(node.args[0])
    reader.channels.pin(table[0], why(reader, node, "looked up by number"))
    return [*([None] * (len(shape(node)) - 1)), table[1]]


def unbind(reader: Reader, node: Node) -> list[Axes]:
    axes = list(reader.axes(node.args[0]))
    reader.channels.pin(axes.pop(argument(node, 1, "dim", 0) % (len(axes) or 1)), why(reader, node, "taken apart"))
    return [list(axes) for _ in node.meta["val"]]


def along(reader: Reader, node: Node) -> Axes:
    """roll, flip: positions change places; harmless along space and tokens."""
    axes = list(reader.axes(node.args[0]))
    dims = argument(node, 2, "dims", []) if operator(node) == "roll" else node.args[1]
    for dim in dims or range(len(axes)):
        reader.channels.pin(axes[dim], why(reader, node, "its channels change places"))
    return axes


def repeat(reader: Reader, node: Node) -> Axes:
    """repeat, tile: channels that are repeated as a whole stand there several times."""
    axes, times = reader.axes(node.args[0]), list(node.args[1])
    times = [1] * (len(shape(node)) - len(times)) + times
    new: Axes = [None] * (len(times) - len(axes))
    return [*new, *(ids if ids is None else np.tile(ids, n) for ids, n in zip(axes, times[len(new) :], strict=True))]


def repeat_interleave(reader: Reader, node: Node) -> Axes:
    axes, times, dim = list(reader.axes(node.args[0])), node.args[1], argument(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return unknown_operator(reader, node)
    if axes[dim] is not None:
        axes[dim] = np.repeat(axes[dim], times)
    return axes


def glu(reader: Reader, node: Node) -> Axes:
    """The first half times the sigmoid of the second: a channel goes with its gate."""
    axes, dim = list(reader.axes(node.args[0])), argument(node, 1, "dim", -1)
    if axes[dim] is not None:
        first, second = np.split(axes[dim], 2)
        axes[dim] = reader.channels.join(first, second)
    return axes


def unfold(reader: Reader, node: Node) -> Axes:
    """im2col: (N, C, H, W) to (N, C x kernel, positions)."""
    axes = reader.axes(node.args[0])
    for ids in axes[2:]:
        reader.channels.pin(ids, why(reader, node, "unfolded along its channels"))
    kernel = shape(node)[1] // shape(node.args[0])[1]
    return [axes[0], None if axes[1] is None else np.repeat(axes[1], kernel), None]


def windows(reader: Reader, node: Node) -> Axes:
    """Tensor.unfold: windows along one axis, their inside as a new last axis."""
    axes = list(reader.axes(node.args[0]))
    dim = node.args[1] % len(axes)
    reader.channels.pin(axes[dim], why(reader, node, "unfolded along its channels"))
    axes[dim] = None
    return [*axes, None]


def fold(reader: Reader, node: Node) -> Axes:
    """col2im: (N, C x kernel, positions) to (N, C, H, W)."""
    axes, channels = reader.axes(node.args[0]), shape(node)[1]
    reader.channels.pin(axes[2], why(reader, node, "folded along its channels"))
    made = None if axes[1] is None else reader.channels.join_rows(axes[1].reshape(channels, -1))
    return [axes[0], made, None, None]


def constant(reader: Reader, node: Node) -> Axes:
    """zeros, ones, full...: every position holds the same, so any may go, as long as the code makes fewer of them."""
    sizes = node.args[1] if operator(node).startswith("new_") else node.args[0]
    axes: Axes = [reader.channels.new(size) if size > 1 else None for size in shape(node)]
    for position, ids in enumerate(axes):
        reader.size(node, None, None, sizes[position], ids, (sizes, position))
    return axes


def batched_later(node: Node, axis: int) -> bool:
    """Whether `axis` of what `node` returns is one that a later product is batched over, such as attention heads."""
    todo, seen = [(node, axis)], set()
    while todo and len(seen) < MAX_STEPS:
        value, axis = todo.pop()
        if (value, axis) in seen:
            continue
        seen.add((value, axis))
        for user in value.users:
            name = operator(user) if user.op == "call_function" else ""
            if name in _PRODUCTS:
                if value in user.args[:3] and axis < len(shape(value)) - 2:
                    return True
            elif name == "einsum":
                given, _, out = user.args[0].replace(" ", "").partition("->")
                terms = given.split(",")
                place = list(user.args[1]).index(value)
                letter = terms[place][axis] if "." not in given else ""
                if letter and letter in out and all(letter in term for term in terms):
                    return True
            else:
                todo += [(user, to) for to in _moved(user, value, axis)]
    return False


def _moved(user: Node, value: Node, axis: int) -> Iterator[int]:
    """Where `axis` of `value` stands in what `user` returns; nowhere if it is used up, or that is not known."""
    name, before, after = operator(user) if user.op == "call_function" else "", shape(value), shape(user)
    if name == "getitem" and before is None:
        yield axis
    elif name == "permute":
        yield [d % len(before) for d in user.args[1]].index(axis)
    elif name in ("transpose", "swapaxes", "swapdims", "mT"):
        a, b = (d % len(before) for d in (user.args[1:3] or (-2, -1)))
        yield {a: b, b: a}.get(axis, axis)
    elif name in ("unbind", "select"):
        dim = argument(user, 1, "dim", 0) % len(before)
        if dim != axis:
            yield axis - (axis > dim)
    elif name == "unsqueeze":
        yield axis + (axis >= user.args[1] % len(after))
    elif name in ("chunk", "split", "split_with_sizes"):
        yield axis
    elif name in ("view", "reshape", "flatten", "unflatten"):
        yield from _reshaped(before, after, axis)
    elif name == "linear" and axis == len(before) - 1:
        return
    elif after is not None and before is not None and len(after) == len(before):
        if after[axis] == before[axis] or name in ("cat", "slice", "repeat_interleave"):
            yield axis
    elif after is not None and before is not None and len(after) > len(before):
        yield axis + len(after) - len(before)


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> Iterator[int]:
    """The axis of `after` that holds `axis` of `before`: a whole number of it, or of it and those behind it."""
    inner = int(np.prod(before[axis + 1 :]))
    for place, size in enumerate(after):
        own = int(np.prod(after[place + 1 :]))
        if inner % own == 0 and own * size % (inner * before[axis]) == 0:
            yield place


RULES: dict[str, Rule] = {
    "col2im": fold,
    "einsum": einsum,
    "embedding": embedding,
    "flip": along,
    "glu": glu,
    "im2col": unfold,
    "index": index,
    "index_select": index_select,
    **dict.fromkeys(("empty", "full", "ones", "zeros", "new_empty", "new_full", "new_ones", "new_zeros"), constant),
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "roll": along,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "tile": repeat,
    "unbind": unbind,
    "unfold": windows,
}
