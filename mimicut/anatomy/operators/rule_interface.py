"""What the rules of all operators share: what a rule is given, how it refuses, and what is done without a rule.

A rule takes the reader of the graph and one node, and returns the axes of the tensor that the node returns: a list with
one entry per axis, either the atoms along it or None where it carries no channels (batch, space, tokens). For a node
that returns several tensors it returns a list of such lists. On the way it may join atoms that must be kept or removed
together, pin atoms that must stay, and record numbers that have to follow a cut.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.channels import Axes, Channels, Ids
from mimicut.anatomy.tracing import operator

Given = tuple[Sequence[Any], int] | None  # a row of numbers, and the place of one of them


class Reader(Protocol):
    """What a rule may ask of the reader of the graph, and report to it."""

    channels: Channels

    def axes(self, value: Any) -> Axes | None:
        """The axes of what a node returns; None for anything that is no tensor."""
        ...

    def where(self, node: Node) -> str:
        """The innermost module in which `node` runs."""
        ...

    def tensor(self, value: Any) -> str | None:
        """The name of the parameter or buffer that `value` is; None for anything else."""
        ...

    def produce(self, node: Node, weight: Any, dim: int, ids: Ids | None, dense: bool) -> None:
        """Report that `weight` makes the channels `ids` along its axis `dim`; `dense`: each from all of its inputs."""
        ...

    def scale(self, weight: Any) -> None:
        """Report that `weight` scales the channels of a batch norm."""
        ...

    def size(
        self, node: Node, owner: str | None, attribute: str | None, value: int, ids: Ids | None, given: Given = None
    ) -> None:
        """Report that the number `value` must equal how many positions of `ids` a cut keeps.

        Args:
            node: the operator that uses the number.
            owner: the module whose attribute holds it, where that is known.
            attribute: the attribute; None where it has to be found.
            value: the number before a cut.
            ids: the atoms that it counts; with None nothing is recorded.
            given: the row of numbers in which the operator was given it, and its position there.
        """
        ...


Rule = Callable[[Reader, Node], Any]


class Unforeseen(Exception):
    """A rule met an overload or an argument that it does not know: the operator is read as one without a rule."""


def foresee(condition: bool, what: str) -> None:
    """Refuse an operator unless `condition` holds.

    Args:
        condition: whether the rule knows how to read this use of the operator.
        what: what the rule expects, in words.

    Raises:
        Unforeseen: the condition does not hold.
    """
    if not condition:
        raise Unforeseen(f"expected {what}")


def overload(node: Node) -> str:
    """The operator's overload, such as "dim" of `max.dim`; "" for a function of Python."""
    return getattr(node.target, "_overloadname", "")


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An operator's argument, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def why(reader: Reader, node: Node, what: str) -> str:
    """The reason for a pin, with the operator and the module that it runs in."""
    return f"{what} ({operator(node)} in {reader.where(node)})"


def owner_of(reader: Reader, weight: Any) -> str | None:
    """The module that holds the parameter `weight`; None if it is no parameter."""
    name = reader.tensor(weight)
    return None if name is None else name.rpartition(".")[0]


def unknown_operator(reader: Reader, node: Node) -> Any:
    """Read an operator without a rule: all channels that reach it must stay, and what it returns carries none."""
    reason = why(reader, node, f"operator {node.target} cannot be read")
    for given in node.all_input_nodes:
        for ids in tree_leaves(reader.axes(given)):
            reader.channels.pin(ids, reason)
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [[None] * v.dim() if hasattr(v, "dim") else None for v in value]
    return [None] * value.dim() if hasattr(value, "dim") else None
