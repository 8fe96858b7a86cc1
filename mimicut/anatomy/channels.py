"""Bookkeeping for reading channels: atoms, which of them live and die together, and which sizes depend on them.

Every position along an axis that carries channels holds an *atom* (an int). Operators join atoms; joined atoms must
be kept or removed together. An axis that carries no channels (batch, space, tokens) is None.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import Node

Ids = np.ndarray  # (size of the axis,) int64: the atom at each position
Axes = list[Ids | None]  # one entry per axis of a tensor


@dataclass(frozen=True, eq=False)
class Size:
    """A number in the running code that must equal how many positions of `ids` are kept.

    module, attribute, index: where it lives (index: position in a tuple or list, else None). `certain` sizes belong to
    a torch.nn layer; others were found by comparing what was traced with the module's attributes, and must be tried.
    attribute None: no module holds the number, so the code computes it or has it as a literal.
    axis: what the number was found on: `ids`, or them several times over. given: the row of numbers in which the
    operator was given it, and its place there.
    """

    module: str
    attribute: str | None
    index: int | None
    value: int
    ids: Ids
    certain: bool
    node: Node
    axis: Ids
    given: tuple[Sequence[Any], int]


@dataclass
class Channels:
    """Union-find over atoms, with pins (atoms that must stay, and why) and dependent sizes."""

    parent: list[int] = field(default_factory=list)
    pins: list[tuple[Ids, str]] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)

    def new(self, count: int) -> Ids:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, atom: int) -> int:
        parent = self.parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, ids: Ids) -> Ids:
        return np.fromiter((self.find(a) for a in ids.ravel().tolist()), np.int64, ids.size).reshape(ids.shape)

    def join(self, a: Ids | None, b: Ids | None, why: str = "") -> Ids | None:
        """Join position by position; where only one side is known, pin it with the reason `why`."""
        if a is None or b is None:
            known = a if b is None else b
            if known is not None:
                self.pin(known, why)
            return known
        if a is not b:
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                x, y = self.find(x), self.find(y)
                if x != y:
                    self.parent[max(x, y)] = min(x, y)
        return a

    def join_rows(self, table: np.ndarray) -> Ids:
        """Join everything in each row of `table` (rows, n); returns one atom per row."""
        for column in table.T[1:]:
            self.join(table[:, 0], column)
        return table[:, 0]

    def pin(self, ids: Ids | None, why: str) -> None:
        if ids is not None:
            self.pins.append((ids, why))
