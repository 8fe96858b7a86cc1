"""What the rules of the operator table share: what they are given, and what stands in for a rule that is missing."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.fx import Node

from mimicut.anatomy.channels import Axes, Channels, Ids
from mimicut.anatomy.tracing import operator

Given = tuple[Sequence[Any], int] | None  # a row of numbers, and the place of one of them


class Reader(Protocol):
    channels: Channels

    def axes(self, value: Any) -> Axes | None: ...

    def where(self, node: Node) -> str: ...

    def tensor(self, value: Any) -> str | None: ...

    def produce(self, node: Node, weight: Any, dim: int, ids: Ids | None, dense: bool) -> None: ...

    def scale(self, weight: Any) -> None: ...

    def size(
        self, node: Node, owner: str | None, attribute: str | None, value: int, ids: Ids | None, given: Given = None
    ) -> None: ...


Rule = Callable[[Reader, Node], Any]


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def why(reader: Reader, node: Node, what: str) -> str:
    return f"{what} ({operator(node)} in {reader.where(node)})"


def owner_of(reader: Reader, weight: Any) -> str | None:
    name = reader.tensor(weight)
    return None if name is None else name.rpartition(".")[0]


def unknown_operator(reader: Reader, node: Node) -> Any:
    """Not in the table: whatever channels reach it must stay, and what it returns carries none."""
    reason = why(reader, node, f"operator {node.target} cannot be read")
    for value in node.all_input_nodes:
        axes = reader.axes(value)
        for each in axes if axes and isinstance(axes[0], list) else [axes]:
            for ids in each or []:
                reader.channels.pin(ids, reason)
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [[None] * v.dim() if hasattr(v, "dim") else None for v in value]
    return [None] * value.dim() if hasattr(value, "dim") else None
