"""Operators that work position by position: activations, arithmetic with broadcasting, copies, casts and constants."""

from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.rule_interface import Reader, Rule, foresee, owner_of, why
from mimicut.anatomy.operators.shapes import expand
from mimicut.anatomy.tracing import operator, shape


def keep_axes(reader: Reader, node: Node) -> Axes:
    """Each position depends on the same position of the first input alone: all axes keep their channels."""
    axes = reader.axes(node.args[0])
    return list(axes) if len(axes) == len(shape(node)) else expand(reader, node)


def broadcast(reader: Reader, node: Node) -> Axes:
    """Any number of tensors, broadcast against each other: channels that meet at one position are one."""
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


def prelu(reader: Reader, node: Node) -> Axes:
    """One slope for each channel (N, C, ...), or one for all."""
    axes, weight = list(reader.axes(node.args[0])), node.args[1]
    foresee(len(shape(weight)) == 1, "slopes in one axis")
    if shape(weight)[0] > 1:
        reader.channels.join(axes[1], reader.axes(weight)[0], why(reader, node, "scaled by an unread tensor"))
        reader.size(node, owner_of(reader, weight), "num_parameters", shape(weight)[0], axes[1])
    return axes


def constant(reader: Reader, node: Node) -> Axes:
    """zeros, ones, full...: every position holds the same, so any may go, as long as the code makes fewer of them."""
    sizes = node.args[1] if operator(node).startswith("new_") else node.args[0]
    axes: Axes = [reader.channels.new(size) if size > 1 else None for size in shape(node)]
    for position, ids in enumerate(axes):
        reader.size(node, None, None, sizes[position], ids, (sizes, position))
    return axes


_ONE_TENSOR = """_conj _to_copy abs acos alias alpha_dropout asin asinh atan bernoulli bitwise_not ceil celu clone conj
    contiguous cos cosh detach dropout elu empty_like erf erfc exp exp2 expm1 feature_dropout fill floor frac full_like
    gelu hardshrink hardsigmoid hardswish hardtanh imag isfinite isinf isnan leaky_relu lift_fresh lift_fresh_copy log
    log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg ones_like positive rand_like real reciprocal relu
    relu6 resolve_conj round rrelu rsqrt seam_mark selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign
    sqrt square tan tanh tanhshrink threshold to trunc type_as zeros_like""".split()
_SEVERAL_TENSORS = """add addcdiv addcmul atan2 bitwise_and bitwise_or clamp clamp_max clamp_min complex copy copysign
    div eq float_power floor_divide fmod ge gt hypot le lerp logaddexp logical_and logical_or logical_xor lt masked_fill
    maximum minimum mul ne polar pow remainder rsub sub true_divide where xlogy""".split()
_CONSTANTS = ("empty", "full", "ones", "zeros", "new_empty", "new_full", "new_ones", "new_zeros")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ONE_TENSOR, keep_axes),
    **dict.fromkeys(_SEVERAL_TENSORS, broadcast),
    **dict.fromkeys(_CONSTANTS, constant),
    "prelu": prelu,
}
