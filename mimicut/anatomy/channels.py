"""Bookkeeping for reading channels: atoms, which of them must be kept or removed together, and numbers that count them.

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

    Attributes:
        module: the module that holds it, or whose code uses it.
        attribute: the attribute that holds it; None if the code computes it or has it as a literal.
        index: its position, if the attribute is a tuple or a list.
        value: the number before a cut.
        ids: the atoms that it counts.
        certain: it belongs to a layer of torch.nn; other numbers were found by comparing what was traced with the
            attributes of modules, and must be tried.
        node: the operator that uses it.
        axis: the atoms on the axis where it was found: `ids`, or the same several times over.
        given: the row of numbers in which the operator was given it, and its position there.
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
    """Union-find over atoms, with pins and dependent sizes.

    Attributes:
        parent: for each atom one that it is joined with; a root is its own parent.
        pins: atoms that must stay, and why.
        sizes: numbers that count atoms.

    >>> channels = Channels()
    >>> made, taken = channels.new(2), channels.new(2)
    >>> _ = channels.join(made, taken)
    >>> channels.roots(taken).tolist()
    [0, 1]
    """

    parent: list[int] = field(default_factory=list)
    pins: list[tuple[Ids, str]] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)

    def new(self, count: int) -> Ids:
        """Atoms for an axis of `count` positions."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, atom: int) -> int:
        """The root of the atoms that `atom` is joined with; the same for all of them."""
        parent = self.parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def roots(self, ids: Ids) -> Ids:
        """The root of every atom, in the same shape."""
        return np.fromiter((self.find(a) for a in ids.ravel().tolist()), np.int64, ids.size).reshape(ids.shape)

    def join(self, a: Ids | None, b: Ids | None, why: str = "") -> Ids | None:
        """Join two axes position by position.

        Args:
            a: (n,) atoms of one axis, or None where they could not be followed.
            b: (n,) atoms of the other.
            why: the reason for pinning the known side, where only one is known.

        Returns:
            The side that is known, `a` where both are; None where neither is.
        """
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
        """Join all atoms in each row of `table` (rows, n).

        Returns:
            (rows,) one atom of each row.
        """
        for column in table.T[1:]:
            self.join(table[:, 0], column)
        return table[:, 0]

    def pin(self, ids: Ids | None, why: str) -> None:
        """Let `ids` stay, for the reason `why`; None pins nothing."""
        if ids is not None:
            self.pins.append((ids, why))
