"""Convolutions of one, two and three dimensions, transposed ones, and the same in parts: im2col and col2im.

Axes: the input is (N, C_in, space...) or, for one image, (C_in, space...). The weight of a convolution is
(C_out, C_in / groups, kernel...), of a transposed one (C_in, C_out / groups, kernel...).
"""

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes, Ids
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, foresee, owner_of, why
from mimicut.anatomy.tracing import shape

# Of more groups than this whole groups are cut, however wide they are; of as many or fewer, which are wide, each loses
# the same places. Source: assumption.
FEW_GROUPS = 8


def conv(reader: Reader, node: Node) -> Axes:
    """conv1d, conv2d, conv3d."""
    return _conv(reader, node, groups=argument(node, 6, "groups", 1), transposed=False)


def conv_transpose(reader: Reader, node: Node) -> Axes:
    """conv_transpose1d, conv_transpose2d, conv_transpose3d."""
    return _conv(reader, node, groups=argument(node, 6, "groups", 1), transposed=True)


def convolution(reader: Reader, node: Node) -> Axes:
    """Either kind, as its arguments say."""
    return _conv(reader, node, groups=node.args[8], transposed=node.args[6])


def _conv(reader: Reader, node: Node, groups: int, transposed: bool) -> Axes:
    x, weight = node.args[0], node.args[1]
    axes = reader.axes(x)
    at = len(axes) - (len(shape(weight)) - 1)
    source = axes[at]
    if groups == 1:
        made = _dense(reader, node, source, transposed)
    else:
        made = _grouped(reader, node, source, groups, transposed)
    bias = argument(node, 2, "bias")
    if bias is not None:
        reader.channels.join(made, reader.axes(bias)[0], _unread_weight(reader, node))
    owner = owner_of(reader, weight)
    reader.size(node, owner, "in_channels", shape(x)[at], source)
    reader.size(node, owner, "out_channels", shape(node)[at], made)
    reader.produce(node, weight, 1 if transposed and groups == 1 else 0, made, dense=groups == 1)
    result: Axes = [*axes[:at], made, *([None] * (len(axes) - at - 1))]
    for axis in range(at + 1, len(axes)):
        if not transposed and _is_pointwise(node, axis - at - 1):
            result[axis] = axes[axis]
        else:
            reader.channels.pin(axes[axis], why(reader, node, "convolved along its channels"))
    return result


def _unread_weight(reader: Reader, node: Node) -> str:
    return why(reader, node, "meets a convolution whose weight could not be followed")


def _dense(reader: Reader, node: Node, source: Ids | None, transposed: bool) -> Ids | None:
    """Tie the inputs `source` to the weight's input axis; returns the channels that the weight makes."""
    first, second = reader.axes(node.args[1])[:2]
    taken, made = (first, second) if transposed else (second, first)
    if shape(node.args[1])[0 if transposed else 1] > 1:
        reader.channels.join(source, taken, _unread_weight(reader, node))
    return made


def _grouped(reader: Reader, node: Node, source: Ids | None, groups: int, transposed: bool) -> Ids | None:
    """Tie inputs and outputs of a grouped convolution; returns the channels that the weight makes."""
    weight, channels = node.args[1], reader.channels
    made, per_group = reader.axes(weight)[:2]
    if transposed:  # only with one output a group has each output its own row
        channels.join(source, made, _unread_weight(reader, node))
        made = made if shape(weight)[:2] == (groups, 1) else None
    if not transposed and groups <= FEW_GROUPS and groups < shape(weight)[1] and made is not None:
        _tie_places(reader, node, source, groups, per_group)
        channels.join_rows(made.reshape(groups, -1).T)
    else:
        _tie_groups(reader, node, source, made, groups)
    return made


def _tie_places(reader: Reader, node: Node, source: Ids | None, groups: int, taken: Ids | None) -> None:
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


def _is_pointwise(node: Node, place: int) -> bool:
    """Whether a convolution leaves every position of its space axis number `place` to itself."""
    stride, padding = (
        v if isinstance(v, (int, str)) else v[place % len(v)]
        for v in (argument(node, 3, "stride", 1), argument(node, 4, "padding", 0))
    )
    return shape(node.args[1])[2 + place] == stride == 1 and padding in (0, "same", "valid")


def im2col(reader: Reader, node: Node) -> Axes:
    """Unfold (N, C, H, W) to (N, C x kernel, positions): a channel stands there once for each place of the kernel."""
    axes = reader.axes(node.args[0])
    foresee(len(axes) == 4, "a batch of images")
    for ids in axes[2:]:
        reader.channels.pin(ids, why(reader, node, "unfolded along its channels"))
    kernel = shape(node)[1] // shape(node.args[0])[1]
    return [axes[0], None if axes[1] is None else np.repeat(axes[1], kernel), None]


def col2im(reader: Reader, node: Node) -> Axes:
    """Fold (N, C x kernel, positions) to (N, C, H, W): the places of one kernel are one channel."""
    axes = reader.axes(node.args[0])
    foresee(len(axes) == 3, "a batch of unfolded images")
    reader.channels.pin(axes[2], why(reader, node, "folded along its channels"))
    made = None if axes[1] is None else reader.channels.join_rows(axes[1].reshape(shape(node)[1], -1))
    return [axes[0], made, None, None]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), conv_transpose),
    "convolution": convolution,
    "im2col": im2col,
    "col2im": col2im,
}
