"""The operator table: what each operator does to the channels that pass through it.

A rule takes the reader and the node and returns the axes of what the node returns (a list of them for operators with
several results). What is not in the table is never guessed: its inputs are pinned with the operator's name.
"""

from typing import Any

import numpy as np
from torch.fx import Node

from mimicut.anatomy import attention, recurrent
from mimicut.anatomy.attention import batched_later
from mimicut.anatomy.channels import Axes, Ids
from mimicut.anatomy.rules import Reader, Rule, argument, owner_of, unknown_operator, why
from mimicut.anatomy.tracing import operator, shape

# --- what passes channels through unchanged ---------------------------------------------------------------------------


def same(reader: Reader, node: Node) -> Axes:
    """Each output position depends on the same channel of the input only; all axes keep their place."""
    axes = reader.axes(node.args[0])
    return list(axes) if len(axes) == len(shape(node)) else expand(reader, node)


def elementwise(reader: Reader, node: Node) -> Axes:
    """Any number of tensors, broadcast against each other."""
    out = shape(node)
    tensors = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node) and reader.axes(a) is not None]
    result: Axes = [None] * len(out)
    for axis, size in enumerate(out):
        full = []
        for tensor in tensors:
            at = axis - len(out) + len(shape(tensor))
            if at >= 0 and shape(tensor)[at] == size and size > 1:
                full.append(reader.axes(tensor)[at])
        for ids in full[1:]:
            full[0] = reader.channels.join(
                full[0], ids, why(reader, node, "combined with a tensor whose channels could not be followed")
            )
        result[axis] = full[0] if full else None
    return result


def expand(reader: Reader, node: Node) -> Axes:
    axes, before, out = reader.axes(node.args[0]), shape(node.args[0]), shape(node)
    pad = len(out) - len(before)
    result: Axes = [None] * pad + [ids if before[i] == out[pad + i] else None for i, ids in enumerate(axes)]
    if operator(node) == "expand":
        _literal(reader, node, result)
    elif operator(node) == "expand_as":  # what is the same for all channels of the other is so for those that stay
        result = _as_other(reader, node, result)
    return result


def _as_other(reader: Reader, node: Node, axes: Axes) -> Axes:
    """The size of each axis is taken from another tensor: it follows that one's channels."""
    unread = why(reader, node, "shaped like a tensor whose channels could not be followed")
    given = [1] * (len(axes) - len(shape(node.args[0]))) + list(shape(node.args[0]))
    result: Axes = []
    for i, (ids, other) in enumerate(zip(axes, reader.axes(node.args[1]), strict=True)):
        spread = operator(node) == "expand_as" and given[i] == 1
        result.append(other if spread else reader.channels.join(ids, other, unread))
    return result


def pool(reader: Reader, node: Node) -> Any:
    axes = list(reader.axes(node.args[0]))
    _space(reader, node, axes)
    values = node.meta["val"]
    return [axes] * len(values) if isinstance(values, (tuple, list)) else axes


def _space(reader: Reader, node: Node, axes: Axes) -> None:
    """Axes that an operator runs over as space cannot carry channels that are cut: pin them."""
    name = operator(node)
    count = 3 if "3d" in name or "trilinear" in name else 1 if "1d" in name else 2
    for axis in range(len(axes) - count, len(axes)):
        reader.channels.pin(axes[axis], why(reader, node, "pooled, resized or padded along its channels"))
        axes[axis] = None


def pad(reader: Reader, node: Node) -> Axes:
    axes, amounts = list(reader.axes(node.args[0])), node.args[1]
    for i in range(len(amounts) // 2):
        if amounts[2 * i] or amounts[2 * i + 1]:
            axis = len(axes) - 1 - i
            reader.channels.pin(axes[axis], why(reader, node, "padded along its channels"))
            axes[axis] = None
    return axes


# --- what mixes or produces channels ----------------------------------------------------------------------------------


def conv(reader: Reader, node: Node) -> Axes:
    return _conv(reader, node, groups=argument(node, 6, "groups", 1), transposed=False)


def conv_transpose(reader: Reader, node: Node) -> Axes:
    return _conv(reader, node, groups=argument(node, 6, "groups", 1), transposed=True)


def convolution(reader: Reader, node: Node) -> Axes:
    return _conv(reader, node, groups=node.args[8], transposed=node.args[6])


def _conv(reader: Reader, node: Node, groups: int, transposed: bool) -> Axes:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    channels, axes, w = reader.channels, reader.axes(x), reader.axes(weight)
    unknown = why(reader, node, "meets a convolution whose weight could not be followed")
    at = len(axes) - (len(w) - 1)
    source = axes[at]
    if groups == 1:
        taken, made = (w[0], w[1]) if transposed else (w[1], w[0])
        if shape(weight)[0 if transposed else 1] > 1:
            channels.join(source, taken, unknown)
    else:
        made = w[0]
        if transposed:  # its weight is (in, out / groups): only with one output a group has each output its own row
            channels.join(source, w[0], unknown)
            made = w[0] if shape(weight)[:2] == (groups, 1) else None
        if not transposed and groups <= FEW_GROUPS and groups < shape(weight)[1] and made is not None:
            made_in = shape(weight)[0] // groups
            _tie_across(reader, node, source, groups, taken=w[1])
            channels.join_rows(made.reshape(groups, made_in).T)
        else:
            _tie_groups(reader, node, source, made, groups)
    if bias is not None:
        channels.join(made, reader.axes(bias)[0], unknown)
    owner = owner_of(reader, weight)
    reader.size(node, owner, "in_channels", shape(x)[at], source)
    reader.size(node, owner, "out_channels", shape(node)[at], made)
    reader.produce(node, weight, 1 if transposed and groups == 1 else 0, made, dense=groups == 1)
    result: Axes = [*axes[:at], made, *([None] * (len(axes) - at - 1))]
    for axis in range(at + 1, len(axes)):
        if not transposed and _each_alone(node, axis - at - 1):
            result[axis] = axes[axis]
        else:
            reader.channels.pin(axes[axis], why(reader, node, "convolved along its channels"))
    return result


def _each_alone(node: Node, place: int) -> bool:
    """Whether a convolution leaves every position of its space axis number `place` to itself."""
    stride, padding = (
        v if isinstance(v, (int, str)) else v[place % len(v)]
        for v in (argument(node, 3, "stride", 1), argument(node, 4, "padding", 0))
    )
    return shape(node.args[1])[2 + place] == stride == 1 and padding in (0, "same", "valid")


FEW_GROUPS = 8  # of more groups than this whole ones go, however wide they are. Assumption.


def _tie_across(reader: Reader, node: Node, source: Ids | None, groups: int, taken: Ids | None) -> None:
    """Few wide groups: each loses the channels at the same places, so that all stay and finer widths are reached."""
    places = None if source is None else reader.channels.join_rows(source.reshape(groups, -1).T)
    reader.channels.join(places, taken, why(reader, node, "meets a grouped convolution that could not be followed"))


def _tie_groups(reader: Reader, node: Node, source: Ids | None, made: Ids | None, groups: int) -> None:
    """Whole groups go or stay: the inputs and the outputs of one group are one unit (depthwise: one channel each)."""
    channels = reader.channels
    if source is None or made is None:
        channels.join(source, made, why(reader, node, "meets a grouped convolution that could not be followed"))
        return
    table = np.concatenate([source.reshape(groups, -1), made.reshape(groups, -1)], axis=1)
    reader.size(node, owner_of(reader, node.args[1]), "groups", groups, channels.join_rows(table))


def linear(reader: Reader, node: Node) -> Axes:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
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


def added(reader: Reader, node: Node) -> Axes:
    """addmm, baddbmm: a product, and something added to it."""
    given, out, unread = node.args[0], matmul(reader, node), why(reader, node, "added to an unread tensor")
    for back, ids in enumerate(reversed(reader.axes(given)), start=1):
        if shape(given)[-back] > 1:
            out[-back] = reader.channels.join(out[-back], ids, unread)
    return out


def matmul(reader: Reader, node: Node) -> Axes:
    a, b = node.args[-2:] if operator(node) in ("addmm", "baddbmm") else node.args[:2]
    if len(shape(a)) < 2 or len(shape(b)) < 2:
        return unknown_operator(reader, node)
    x, y = reader.axes(a), reader.axes(b)
    turned = operator(b) in ("t", "transpose", "permute", "mT", "numpy_T")
    if reader.tensor(b.args[0] if turned else b) is not None:  # a linear layer by hand
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
                *sides, why(reader, node, "batched with a tensor that could not be followed")
            )
    out[-2], out[-1] = x[-2], y[-1]
    return out


# --- norms ------------------------------------------------------------------------------------------------------------


def batch_norm(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    for tensor in node.args[1:5]:
        if isinstance(tensor, Node):
            reader.channels.join(axes[1], reader.axes(tensor)[0], why(reader, node, "normalised by an unread tensor"))
    reader.scale(node.args[1])
    owner = next((o for t in node.args[1:5] if (o := owner_of(reader, t)) is not None), None)
    reader.size(node, owner, "num_features", shape(node.args[0])[1], axes[1])
    return axes


def layer_norm(reader: Reader, node: Node) -> Axes:
    """Its statistics run over the kept channels only: the check of the cut does the same."""
    axes, normalized = list(reader.axes(node.args[0])), node.args[1]
    first = len(axes) - len(normalized)
    tensors = [t for t in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(t, Node)]
    for tensor in tensors:
        for i, ids in enumerate(reader.axes(tensor)):
            if shape(tensor)[i] > 1:
                reader.channels.join(axes[first + i], ids, why(reader, node, "normalised by an unread tensor"))
    owner = owner_of(reader, tensors[0]) if tensors else None
    for i, value in enumerate(normalized):
        if axes[first + i] is not None:
            reader.size(node, owner, f"normalized_shape.{i}", value, axes[first + i])
    return axes


def group_norm(reader: Reader, node: Node) -> Axes:
    """Whole groups go or stay, so that each remaining group keeps its statistics; one group is a layer norm."""
    axes, groups = list(reader.axes(node.args[0])), node.args[1]
    tensors = [t for t in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(t, Node)]
    for tensor in tensors:
        reader.channels.join(axes[1], reader.axes(tensor)[0], why(reader, node, "normalised by an unread tensor"))
    if axes[1] is None:
        return axes
    owner = owner_of(reader, tensors[0]) if tensors else None
    if groups > 1:
        reader.size(node, owner, "num_groups", groups, reader.channels.join_rows(axes[1].reshape(groups, -1)))
    reader.size(node, owner, "num_channels", shape(node.args[0])[1], axes[1])
    return axes


def prelu(reader: Reader, node: Node) -> Axes:
    axes, weight = list(reader.axes(node.args[0])), node.args[1]
    if shape(weight)[0] > 1:
        reader.channels.join(axes[1], reader.axes(weight)[0], why(reader, node, "scaled by an unread tensor"))
        reader.size(node, owner_of(reader, weight), "num_parameters", shape(weight)[0], axes[1])
    return axes


def softmax(reader: Reader, node: Node) -> Axes:
    """Over channels it sees those that are kept."""
    return list(reader.axes(node.args[0]))


def reduce(reader: Reader, node: Node) -> Any:
    """mean, sum, amax...: an axis is reduced away. Over channels it sees those that are kept."""
    axes, dims, values = reader.axes(node.args[0]), statistics_axes(node), node.meta["val"]
    several = isinstance(values, (tuple, list))
    keep = len(values[0].shape if several else values.shape) == len(axes)
    left = [None if i in dims else ids for i, ids in enumerate(axes) if keep or i not in dims]
    return [left] * len(values) if several else left


def extreme(reader: Reader, node: Node) -> Any:
    """max, min: of two tensors, or over all axes, or over one; its place among channels is another after a cut."""
    if node.target._overloadname == "other":
        return elementwise(reader, node)
    if any(operator(u) == "getitem" and u.args[1] == 1 and u.users for u in node.users):
        for axis in statistics_axes(node):
            reader.channels.pin(reader.axes(node.args[0])[axis], why(reader, node, "one of its channels is picked"))
    return reduce(reader, node)


def statistics_axes(node: Node) -> list[int]:
    """Axes of its first input over which an operator takes statistics (norms, reductions, a softmax). Where they hold
    channels, a cut network takes them over the channels that it keeps, and the check of the cut does the same."""
    name, rank = operator(node), len(shape(node.args[0]))
    if name in REDUCTIONS or (name in EXTREMES and node.target._overloadname != "other"):
        dims = argument(node, 2 if name == "linalg_vector_norm" else 1, "dim")
        dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        return [d % rank for d in dims]
    if name in SOFTMAXES:
        return [node.args[1] % rank]
    if name in ("layer_norm", "rms_norm"):
        return list(range(rank - len(node.args[1]), rank))
    if name == "group_norm":  # of several groups each keeps its channels
        return [1] if node.args[1] == 1 else []
    if name == "batch_norm" and argument(node, 5, "training") is True:  # standardised weights do so
        return [axis for axis in range(rank) if axis != 1]
    if name == "instance_norm" and argument(node, 5, "use_input_stats") is True:
        return list(range(2, rank))
    return []


EXTREMES = ("max", "min")
REDUCTIONS = ("mean", "sum", "amax", "amin", "prod", "std", "var", "logsumexp", "any", "all", "linalg_vector_norm",
    "var_mean", "std_mean",
)  # fmt: skip
SOFTMAXES = ("softmax", "_softmax", "log_softmax", "_log_softmax")


# --- what moves channels about ----------------------------------------------------------------------------------------


def permute(reader: Reader, node: Node) -> Axes:
    axes = reader.axes(node.args[0])
    return [axes[d] for d in node.args[1]]


def transpose(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    if operator(node) == "numpy_T":
        return axes[::-1]
    a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (-2, -1)  # a matrix, or several
    axes[a], axes[b] = axes[b], axes[a]
    return axes


def movedim(reader: Reader, node: Node) -> Axes:
    axes, rank = reader.axes(node.args[0]), len(shape(node))
    given, to = ([d % rank for d in ([v] if isinstance(v, int) else v)] for v in node.args[1:3])
    result = dict(zip(to, given, strict=True))
    rest = iter(d for d in range(rank) if d not in given)
    return [axes[result[d] if d in result else next(rest)] for d in range(rank)]


def running(reader: Reader, node: Node) -> Axes:
    """cumsum, cumprod: what stands before counts."""
    axes = list(reader.axes(node.args[0]))
    reader.channels.pin(axes[node.args[1]], why(reader, node, "summed up along its channels"))
    return axes


def cat(reader: Reader, node: Node) -> Axes:
    tensors, dim = [t for t in node.args[0] if shape(t) != (0,)], argument(node, 1, "dim", 0)
    dim %= len(shape(node))
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
            if operator(node) != "chunk":  # a chunk is told how many pieces, a split how large they are
                reader.size(node, None, None, sizes[0], pieces[0])
    else:
        for position, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
            reader.size(node, None, None, size, piece, (sizes, position))
    return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces]


def getitem(reader: Reader, node: Node) -> Any:
    value = reader.axes(node.args[0])
    return value[node.args[1]] if value is not None else None


def slice_(reader: Reader, node: Node) -> Axes:
    axes, dim = list(reader.axes(node.args[0])), argument(node, 1, "dim", 0)
    ids, size = axes[dim], shape(node.args[0])[dim]
    if ids is None:
        return axes
    start, end, step = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    start, end, step = slice(start, end, step).indices(size)
    axes[dim] = ids[start:end:step]
    if step != 1:
        reader.channels.pin(ids, why(reader, node, "sliced with a step over its channels"))
    for border in {start, end} - {0, size}:
        reader.size(node, None, None, border, ids[:border])
    return axes


def select(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    dim = node.args[1] % len(axes)
    reader.channels.pin(axes.pop(dim), why(reader, node, "one of its channels is picked by number"))
    return axes


def unsqueeze(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    axes.insert(node.args[1] % len(shape(node)), None)
    return axes


def reshape(reader: Reader, node: Node) -> Axes:
    """view, reshape, flatten, unflatten, squeeze: axes are merged and split.

    A merged axis repeats its channels. A split one can keep its channels on one of the new axes only: they are put on
    the largest, and what stands on the others at the same place is joined.
    """
    before, after = shape(node.args[0]), shape(node)
    axes = reader.axes(node.args[0])
    result: Axes = [None] * len(after)
    for source, target in _blocks(before, after):
        ids = _merge(reader, node, [(before[i], axes[i]) for i in source])
        if ids is None:
            continue
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
        _literal(reader, node, result)
    return result


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes, longer than 1, that hold the same number of elements on both sides."""
    source = [i for i, s in enumerate(before) if s != 1]
    target = [i for i, s in enumerate(after) if s != 1]
    blocks, i, j = [], 0, 0
    while i < len(source) and j < len(target):
        a, b, left, right = [source[i]], [target[j]], before[source[i]], after[target[j]]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                a.append(source[i])
                left, i = left * before[source[i]], i + 1
            else:
                b.append(target[j])
                right, j = right * after[target[j]], j + 1
        blocks.append((a, b))
    return blocks


def _merge(reader: Reader, node: Node, parts: list[tuple[int, Ids | None]]) -> Ids | None:
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


def _literal(reader: Reader, node: Node, axes: Axes) -> None:
    """Sizes written into the call (not -1) on axes that carry channels must follow the cut."""
    sizes, first = node.args[1], 0
    if operator(node) == "unflatten":
        sizes, first = node.args[2], node.args[1] % len(shape(node.args[0]))
    for position, (size, ids) in enumerate(zip(sizes, axes[first:], strict=False)):
        if ids is not None and isinstance(size, int) and size != -1:
            reader.size(node, None, None, size, ids, (sizes, position))


def fourier(reader: Reader, node: Node) -> Axes:
    """fft, rfft2, irfftn...: what stands on the transformed axes is mixed, and often of another length."""
    axes, name = list(reader.axes(node.args[0])), operator(node)
    whole = None if name.endswith("n") else [-2, -1] if name.endswith("2") else [-1]
    dims = argument(node, 2, "dim", whole)
    for dim in range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims:
        reader.channels.pin(axes[dim], why(reader, node, "transformed along its channels"))
        axes[dim] = None
    return axes


def as_real(reader: Reader, node: Node) -> Axes:
    return [*reader.axes(node.args[0]), None]


def as_complex(reader: Reader, node: Node) -> Axes:
    *axes, last = reader.axes(node.args[0])
    reader.channels.pin(last, why(reader, node, "real and imaginary parts are no channels"))
    return axes


def ordered(reader: Reader, node: Node) -> Any:
    """sort, topk, argsort: one axis, tokens as a rule, is put in order."""
    axes, name = list(reader.axes(node.args[0])), operator(node)
    stable = node.target._overloadname == "stable"
    dim = node.kwargs.get("dim", -1) if stable else argument(node, 2 if name == "topk" else 1, "dim", -1)
    reader.channels.pin(axes[dim], why(reader, node, "put in order along its channels"))
    axes[dim] = None
    return axes if name == "argsort" else [axes, axes]


def triangle(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    for ids in axes[-2:]:
        reader.channels.pin(ids, why(reader, node, "a triangle of its channels is kept"))
    return axes


def grid_sampler(reader: Reader, node: Node) -> Axes:
    """(N, C, H, W) or (N, C, D, H, W) looked up at the places of a grid, the same for every channel."""
    axes, grid = reader.axes(node.args[0]), reader.axes(node.args[1])
    for ids in (axes[0], *axes[2:], *grid):
        reader.channels.pin(ids, why(reader, node, "sampled along its channels"))
    return [None, axes[1], *([None] * (len(axes) - 2))]


def pixel_shuffle(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    if axes[-3] is not None:
        axes[-3] = reader.channels.join_rows(axes[-3].reshape(shape(node)[-3], -1))
    return axes


def pixel_unshuffle(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    if axes[-3] is not None:
        axes[-3] = np.repeat(axes[-3], node.args[1] ** 2)
    return axes


def channel_shuffle(reader: Reader, node: Node) -> Axes:
    axes = list(reader.axes(node.args[0]))
    if axes[1] is not None:
        table = axes[1].reshape(node.args[1], -1)
        reader.channels.join_rows(table.T)
        axes[1] = table.T.ravel()
    return axes


def _table() -> dict[str, Rule]:
    unary = """abs alias celu ceil clone contiguous cos detach dropout elu erf exp expm1
        feature_dropout alpha_dropout floor gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu lift_fresh_copy
        log log1p log_sigmoid logical_not mish neg reciprocal relu relu6 round rsqrt seam_mark selu sigmoid sign silu
        sin softplus softshrink sqrt square tanh tanhshrink threshold to _to_copy type_as lift_fresh rrelu
        bernoulli nan_to_num positive logit softsign fill empty_like full_like ones_like rand_like zeros_like
        acos asin asinh atan bitwise_not conj _conj cosh erfc exp2 frac imag isfinite isinf isnan log10 log2 real
        resolve_conj sgn sinc sinh tan trunc"""
    many = """add sub mul div rsub pow maximum minimum where lerp addcmul addcdiv atan2 fmod remainder eq ne lt le gt ge
        logical_and logical_or clamp clamp_max clamp_min copy copysign floor_divide true_divide float_power
        masked_fill bitwise_and bitwise_or complex hypot logaddexp logical_xor polar xlogy"""
    pools = """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
        _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
        upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d adaptive_max_pool3d
        lp_pool2d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d"""
    table: dict[str, Rule] = {}
    table |= dict.fromkeys(unary.split(), same)
    table |= dict.fromkeys(many.split(), elementwise)
    table |= dict.fromkeys(pools.split(), pool)
    table |= dict.fromkeys(
        ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "reshape_as", "view_as"], reshape
    )
    table |= dict.fromkeys(REDUCTIONS, reduce)
    table |= dict.fromkeys(["conv1d", "conv2d", "conv3d"], conv)
    table |= dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], conv_transpose)
    table |= dict.fromkeys(["matmul", "bmm", "mm"], matmul)
    table |= dict.fromkeys(["addmm", "baddbmm"], added)
    table |= dict.fromkeys([f"fft_{i}{r}fft{n}" for i in ("", "i") for r in ("", "r") for n in ("", "2", "n")], fourier)
    table |= dict.fromkeys(["sort", "topk", "argsort"], ordered)
    table |= dict.fromkeys(["tril", "triu"], triangle)
    table |= dict.fromkeys(["grid_sampler", "grid_sampler_2d", "grid_sampler_3d"], grid_sampler)
    table |= dict.fromkeys(SOFTMAXES, softmax)
    table |= dict.fromkeys(["chunk", "split", "split_with_sizes", "tensor_split"], split)
    table |= dict.fromkeys(["batch_norm", "_native_batch_norm_legit_no_training", "instance_norm"], batch_norm)
    table |= dict.fromkeys(["cat", "concat", "concatenate"], cat)
    table |= dict.fromkeys(["transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T"], transpose)
    table |= dict.fromkeys(["movedim", "moveaxis"], movedim)
    table |= dict.fromkeys(["cumsum", "cumprod"], running)
    table |= dict.fromkeys(EXTREMES, extreme)
    table |= dict.fromkeys(["pad", "constant_pad_nd"], pad)
    return (
        table
        | attention.RULES
        | recurrent.RULES
        | {
            "channel_shuffle": channel_shuffle,
            "convolution": convolution,
            "expand": expand,
            "expand_as": expand,
            "rms_norm": layer_norm,
            "getitem": getitem,
            "group_norm": group_norm,
            "layer_norm": layer_norm,
            "linear": linear,
            "permute": permute,
            "pixel_shuffle": pixel_shuffle,
            "pixel_unshuffle": pixel_unshuffle,
            "prelu": prelu,
            "select": select,
            "slice": slice_,
            "stack": stack,
            "unsqueeze": unsqueeze,
            "view_as_complex": as_complex,
            "view_as_real": as_real,
        }
    )


TABLE: dict[str, Rule] = _table()
