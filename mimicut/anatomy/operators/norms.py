"""Norms: batch and instance norm, layer and RMS norm, group norm.

A cut network takes its statistics over the channels that it keeps; the check of a cut does the same.
"""

from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, owner_of, why
from mimicut.anatomy.tracing import shape


def batch_norm(reader: Reader, node: Node) -> Axes:
    """Input (N, C, ...), with up to four tensors (C): scale, shift, mean and variance."""
    axes = list(reader.axes(node.args[0]))
    for tensor in node.args[1:5]:
        if isinstance(tensor, Node):
            reader.channels.join(axes[1], reader.axes(tensor)[0], why(reader, node, "normalised by an unread tensor"))
    reader.scale(node.args[1])
    owner = next((o for t in node.args[1:5] if (o := owner_of(reader, t)) is not None), None)
    reader.size(node, owner, "num_features", shape(node.args[0])[1], axes[1])
    return axes


def layer_norm(reader: Reader, node: Node) -> Axes:
    """layer_norm, rms_norm: over the last axes, with weights of their shape."""
    axes, normalized = list(reader.axes(node.args[0])), node.args[1]
    first = len(axes) - len(normalized)
    tensors = _weights(node)
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
    tensors = _weights(node)
    for tensor in tensors:
        reader.channels.join(axes[1], reader.axes(tensor)[0], why(reader, node, "normalised by an unread tensor"))
    if axes[1] is None:
        return axes
    owner = owner_of(reader, tensors[0]) if tensors else None
    if groups > 1:
        reader.size(node, owner, "num_groups", groups, reader.channels.join_rows(axes[1].reshape(groups, -1)))
    reader.size(node, owner, "num_channels", shape(node.args[0])[1], axes[1])
    return axes


def _weights(node: Node) -> list[Node]:
    return [t for t in (argument(node, 2, "weight"), argument(node, 3, "bias")) if isinstance(t, Node)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("batch_norm", "instance_norm"), batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "group_norm": group_norm,
}
