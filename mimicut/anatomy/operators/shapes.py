"""Views and shapes: axes that are merged, split, expanded, added or put in another order. No number changes."""

from collections.abc import Sequence

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes, Ids
from mimicut.anatomy.operators.heads import batched_later
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, foresee, overload, why
from mimicut.anatomy.tracing import operator, shape


def reshape(reader: Reader, node: Node) -> Axes:
    """view, reshape, flatten, unflatten, squeeze: axes are merged and split.

    A merged axis repeats its channels. A split one can keep its channels on one of the new axes only: they are put on
    the largest, and what stands on the others at the same place is joined.
    """
    foresee(overload(node) != "dtype", "a view of the same numbers")
    before, after = shape(node.args[0]), shape(node)
    axes = reader.axes(node.args[0])
    result: Axes = [None] * len(after)
    for source, target in _matching_runs(before, after):
        ids = _merge(reader, node, [(before[i], axes[i]) for i in source])
        if ids is None:
            continue
        foresee(len(ids) > 0, "a tensor that holds something")
        sizes = [after[i] for i in target]
        table = reader.channels.roots(ids).reshape(sizes)
        live = [i for i in range(len(sizes)) if sizes[i] > 1 and not (table == table.take([0], axis=i)).all()]
        # Where several of the new axes tell channels apart, heads are kept apart, else the largest axis.
        heads = [i for i in live if batched_later(node, target[i])] if len(live) > 1 else live
        chosen = heads[0] if heads else max(range(len(sizes)), key=lambda i: sizes[i])
        rows = np.moveaxis(ids.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1)
        result[target[chosen]] = reader.channels.join_rows(rows) if len(live) > 1 else rows[:, 0]
    if operator(node) in ("reshape_as", "view_as"):
        result = _as_other(reader, node, result)
    elif operator(node) not in ("flatten", "squeeze"):
        _record_sizes(reader, node, result)
    return result


def _matching_runs(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes, longer than 1, that hold the same number of elements on both sides."""
    source = [i for i, s in enumerate(before) if s != 1]
    target = [i for i, s in enumerate(after) if s != 1]
    runs, i, j = [], 0, 0
    while i < len(source) and j < len(target):
        a, b, left, right = [source[i]], [target[j]], before[source[i]], after[target[j]]
        i, j = i + 1, j + 1
        while left != right:
            foresee(i < len(source) if left < right else j < len(target), "a tensor that holds something")
            if left < right:
                a.append(source[i])
                left, i = left * before[source[i]], i + 1
            else:
                b.append(target[j])
                right, j = right * after[target[j]], j + 1
        runs.append((a, b))
    return runs


def _merge(reader: Reader, node: Node, parts: list[tuple[int, Ids | None]]) -> Ids | None:
    """The atoms along one axis made of several, each given as its size and its atoms."""
    known = [i for i, (_, ids) in enumerate(parts) if ids is not None]
    if len(known) > 1:
        for i in known[1:]:  # heads and what is in them: heads stand first
            reader.channels.pin(parts[i][1], why(reader, node, "merged with another axis of channels"))
    if not known:
        return None
    sizes = [size for size, _ in parts]
    view = [1] * len(parts)
    view[known[0]] = -1
    return np.broadcast_to(parts[known[0]][1].reshape(view), sizes).ravel()


def _record_sizes(reader: Reader, node: Node, axes: Axes) -> None:
    """Sizes written into the call (not -1) on axes that carry channels must follow the cut."""
    sizes, first = node.args[1], 0
    if operator(node) == "unflatten":
        sizes, first = node.args[2], node.args[1] % len(shape(node.args[0]))
    for position, (size, ids) in enumerate(zip(sizes, axes[first:], strict=False)):
        if ids is not None and isinstance(size, int) and size != -1:
            reader.size(node, None, None, size, ids, (sizes, position))


def _as_other(reader: Reader, node: Node, axes: Axes) -> Axes:
    """The size of each axis is taken from another tensor: it follows that one's channels."""
    unread = why(reader, node, "shaped like a tensor whose channels could not be followed")
    given = [1] * (len(axes) - len(shape(node.args[0]))) + list(shape(node.args[0]))
    result: Axes = []
    for i, (ids, other) in enumerate(zip(axes, reader.axes(node.args[1]), strict=True)):
        spread = operator(node) == "expand_as" and given[i] == 1
        result.append(other if spread else reader.channels.join(ids, other, unread))
    return result


def expand(reader: Reader, node: Node) -> Axes:
    """expand, expand_as: an axis of length 1 is repeated, and then carries no channels of its own."""
    axes, before, out = reader.axes(node.args[0]), shape(node.args[0]), shape(node)
    pad = len(out) - len(before)
    own: Axes = [ids if before[i] == out[pad + i] else None for i, ids in enumerate(axes)]
    result: Axes = [*[None] * pad, *own]
    if operator(node) == "expand":
        _record_sizes(reader, node, result)
    elif operator(node) == "expand_as":  # what is the same for all channels of the other is so for those that stay
        result = _as_other(reader, node, result)
    return result


def permute(reader: Reader, node: Node) -> Axes:
    """Any order of all axes."""
    axes = reader.axes(node.args[0])
    return [axes[d] for d in node.args[1]]


def transpose(reader: Reader, node: Node) -> Axes:
    """Two axes change places; numpy_T turns all of them round."""
    axes = list(reader.axes(node.args[0]))
    if operator(node) == "numpy_T":
        return axes[::-1]
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)  # a matrix, or several
    foresee(len(axes) > 1, "a tensor of two axes or more")
    axes[a], axes[b] = axes[b], axes[a]
    return axes


def movedim(reader: Reader, node: Node) -> Axes:
    """Some axes go to other places; the rest keep their order."""
    axes, rank = reader.axes(node.args[0]), len(shape(node))
    given, to = ([d % rank for d in ([v] if isinstance(v, int) else v)] for v in node.args[1:3])
    result = dict(zip(to, given, strict=True))
    rest = iter(d for d in range(rank) if d not in given)
    return [axes[result[d] if d in result else next(rest)] for d in range(rank)]


def unsqueeze(reader: Reader, node: Node) -> Axes:
    """A new axis of length 1."""
    axes = list(reader.axes(node.args[0]))
    axes.insert(node.args[1] % len(shape(node)), None)
    return axes


def repeat(reader: Reader, node: Node) -> Axes:
    """repeat, tile: channels that are repeated as a whole stand there several times."""
    axes, times = reader.axes(node.args[0]), list(node.args[1])
    foresee(_all_known(times), "numbers that do not depend on values")
    times = [1] * (len(shape(node)) - len(times)) + times
    new: Axes = [None] * (len(times) - len(axes))
    return [*new, *(ids if ids is None else np.tile(ids, n) for ids, n in zip(axes, times[len(new) :], strict=True))]


def _all_known(numbers: Sequence[object]) -> bool:
    return all(isinstance(n, int) for n in numbers)


def repeat_interleave(reader: Reader, node: Node) -> Axes:
    """Each position of one axis several times in a row."""
    foresee(overload(node) != "Tensor", "something to repeat")
    axes, times, dim = list(reader.axes(node.args[0])), node.args[1], argument(node, 2, "dim")
    foresee(isinstance(times, int) and dim is not None, "one number of times, along one axis")
    if axes[dim] is not None:
        axes[dim] = np.repeat(axes[dim], times)
    return axes


def as_real(reader: Reader, node: Node) -> Axes:
    """A complex tensor as a real one with a last axis of two."""
    return [*reader.axes(node.args[0]), None]


def as_complex(reader: Reader, node: Node) -> Axes:
    """A real tensor with a last axis of two as a complex one."""
    *axes, last = reader.axes(node.args[0])
    reader.channels.pin(last, why(reader, node, "real and imaginary parts are no channels"))
    return axes


_RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "reshape_as", "view_as")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_RESHAPES, reshape),
    **dict.fromkeys(("expand", "expand_as"), expand),
    "permute": permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T"), transpose),
    **dict.fromkeys(("movedim", "moveaxis"), movedim),
    "unsqueeze": unsqueeze,
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    "view_as_real": as_real,
    "view_as_complex": as_complex,
}
