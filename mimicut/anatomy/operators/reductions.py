"""Reductions (mean, sum, max...), softmax, and running sums; and the axes over which an operator takes statistics."""

from typing import Any

from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.elementwise import broadcast
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, foresee, overload, why
from mimicut.anatomy.tracing import operator, shape

_EXTREMES = ("max", "min")
_REDUCTIONS = ("mean", "sum", "amax", "amin", "prod", "std", "var", "logsumexp", "any", "all", "linalg_vector_norm",
    "var_mean", "std_mean",
)  # fmt: skip
_SOFTMAXES = ("softmax", "_softmax", "log_softmax", "_log_softmax")


def softmax(reader: Reader, node: Node) -> Axes:
    """Over channels it sees those that are kept."""
    return list(reader.axes(node.args[0]))


def reduce(reader: Reader, node: Node) -> Any:
    """mean, sum, amax...: an axis is reduced away. Over channels it sees those that are kept."""
    given = node.args[1:2] if operator(node) in ("std", "var", "std_mean", "var_mean") else ()
    foresee(not given or not isinstance(given[0], bool), "axes, not whether the variance is unbiased")
    axes, dims, values = reader.axes(node.args[0]), statistics_axes(node), node.meta["val"]
    several = isinstance(values, (tuple, list))
    keep = len(values[0].shape if several else values.shape) == len(axes)
    left = [None if i in dims else ids for i, ids in enumerate(axes) if keep or i not in dims]
    return [left] * len(values) if several else left


def extreme(reader: Reader, node: Node) -> Any:
    """max, min: of two tensors, or over all axes, or over one; its place among channels is another after a cut."""
    if overload(node) == "other":
        return broadcast(reader, node)
    if any(operator(u) == "getitem" and u.args[1] == 1 and u.users for u in node.users):
        for axis in statistics_axes(node):
            reader.channels.pin(reader.axes(node.args[0])[axis], why(reader, node, "one of its channels is picked"))
    return reduce(reader, node)


def cumulative(reader: Reader, node: Node) -> Axes:
    """cumsum, cumprod: what stands before a position counts, so the channels along that axis must stay."""
    axes = list(reader.axes(node.args[0]))
    foresee(bool(axes), "a tensor with axes")
    reader.channels.pin(axes[node.args[1]], why(reader, node, "summed up along its channels"))
    return axes


def statistics_axes(node: Node) -> list[int]:
    """Axes of its first input over which an operator takes statistics (norms, reductions, a softmax).

    Where they hold channels, a cut network takes the statistics over the channels that it keeps.

    Args:
        node: an operator of a traced graph.

    Returns:
        Axes from 0, in no particular order; none for an operator that takes no statistics.
    """
    name, rank = operator(node), len(shape(node.args[0]))
    if name in _REDUCTIONS or (name in _EXTREMES and overload(node) != "other"):
        dims = argument(node, 2 if name == "linalg_vector_norm" else 1, "dim")
        dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        return [d % rank for d in dims]
    if name in _SOFTMAXES:
        dim: Any = node.args[1]
        return [dim % rank]
    if name in ("layer_norm", "rms_norm"):
        return list(range(rank - len(node.args[1]), rank))
    if name == "group_norm":  # of several groups each keeps its channels
        return [1] if node.args[1] == 1 else []
    if name == "batch_norm" and argument(node, 5, "training") is True:  # standardised weights do so
        return [axis for axis in range(rank) if axis != 1]
    if name == "instance_norm" and argument(node, 5, "use_input_stats") is True:
        return list(range(2, rank))
    return []


RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCTIONS, reduce),
    **dict.fromkeys(_EXTREMES, extreme),
    **dict.fromkeys(_SOFTMAXES, softmax),
    **dict.fromkeys(("cumsum", "cumprod"), cumulative),
}
