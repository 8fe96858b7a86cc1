"""What is known of a network before anything is decided: groups of channels, blocks, and the numbers that follow a cut.

Three words carry all of it. An *atom* is one position along an axis that carries channels, of any tensor; atoms that
must be kept or removed together form a *unit*; units among which a plan is free to choose form a *group*, whose width
is how many units it has. `reader` explains how they are found.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.channels import Channels, Ids, Size
from mimicut.anatomy.other_methods import UnclearNumber
from mimicut.anatomy.torch_calls import RecordedPass
from mimicut.anatomy.tracing import Traced
from mimicut.surgery.seam import Seam


@dataclass(frozen=True)
class Member:
    """One axis of a tensor that a group cuts.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: the axis.
        units: (length of the axis,) the group's unit at each position; -1 where it belongs to another group.
    """

    tensor: str
    dim: int
    units: np.ndarray


@dataclass(frozen=True)
class Producer:
    """A weight that makes channels of a group.

    Attributes:
        tensor: name of the weight.
        dim: the axis along which its outputs stand.
        units: (length of that axis,) the group's unit at each position; -1 where it belongs to another group.
        dense: each output depends on all inputs, as in a linear layer or a convolution of one group.
        node: the operator that uses the weight.
    """

    tensor: str
    dim: int
    units: np.ndarray
    dense: bool
    node: Node

    @property
    def module(self) -> str:
        """The module that holds the weight."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """Channels among which a plan chooses.

    Attributes:
        name: the module that makes the channels first.
        width: how many units it has; each is a set of positions in every member.
        channels: the most positions that one producer has; a unit may hold several, as in a grouped convolution.
        members: the axes of tensors that it cuts.
        producers: the weights that make its channels.
        pinned: why it must stay whole, or None.
    """

    name: str
    width: int
    channels: int
    members: tuple[Member, ...]
    producers: tuple[Producer, ...]
    pinned: str | None


@dataclass(frozen=True)
class Block:
    """What lies between a fork of the data flow and the addition that joins it again.

    Attributes:
        name: the innermost module around it; where one module holds several, the one around its layers.
        identity: one side of the addition is the fork's own value.
        nodes: the operators between fork and addition.
        add: the addition.
        outer: it lies inside no other block.
        branch_end: the node that the branch gives to the addition.
        branch: the operators that are computed for `branch_end` alone.
        dropped_modules: (module, what takes its place) by which the block is dropped, as `cut.drop_modules` reads it.
        pinned: why it must stay, or None.
        streams: the groups to which the sum's channels belong.
        stage: the run of outer blocks on one stream that it belongs to; -1 for a block inside another.
        place: its place in that run; -1 for a block inside another.
        last: it ends that run.
    """

    name: str
    identity: bool
    nodes: frozenset[Node]
    add: Node
    outer: bool = True
    branch_end: Node | None = None
    branch: frozenset[Node] = frozenset()
    dropped_modules: tuple[tuple[str, str], ...] = ()
    pinned: str | None = None
    streams: tuple[str, ...] = ()
    stage: int = -1
    place: int = -1
    last: bool = False


@dataclass
class Anatomy:
    """All that is known of a network before anything is decided.

    Attributes:
        traced: the operator graph, without the blocks that are dropped.
        seam: where the body ends.
        seam_nodes: the seam's points in the graph.
        groups: groups of channels by name.
        blocks: in the order of their additions.
        unread: (operator, module) that the table does not hold, where channels met them.
        unused: parameters that no traced operator uses.
        sizes: numbers in modules that follow the cut.
        scales: names of the batch norms' scales.
        axes: for each node the atoms on every axis of what it returns.
        unit_of: atom -> (group, unit).
        channels: the atoms and which of them are joined.
        recorded: the torch calls of one pass.
        dropped: names of the blocks or modules that are left out.
        dropped_modules: (module, what takes its place) by which they are.
        full_trace: the operator graph with them; None where nothing is dropped.
        zeroed_nodes: nodes of `full_trace` that give zeros once they are dropped.
        unclear: numbers that other methods than those of the pass read, and that may be widths.
        needs_call_edits: after a cut the code gives torch functions numbers that do not follow by themselves.
    """

    traced: Traced
    seam: Seam
    seam_nodes: tuple[Node, ...]
    groups: dict[str, Group]
    blocks: tuple[Block, ...]
    unread: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    sizes: tuple[Size, ...]
    scales: frozenset[str]
    axes: dict[Node, Any] = field(repr=False)
    unit_of: dict[int, tuple[str, int]] = field(repr=False)
    channels: Channels = field(repr=False)
    recorded: RecordedPass = field(repr=False)
    dropped: tuple[str, ...] = ()
    dropped_modules: tuple[tuple[str, str], ...] = ()
    full_trace: Traced | None = None
    zeroed_nodes: frozenset[Node] = frozenset()
    unclear: tuple[UnclearNumber, ...] = ()
    needs_call_edits: bool = False
    _cache: dict[int, tuple[Ids, list, dict]] = field(default_factory=dict, repr=False)

    @property
    def only_blocks(self) -> bool:
        """Whether all that is left out are blocks, of which `full_trace` shows where they end."""
        return bool(self.zeroed_nodes) and len(self.zeroed_nodes) == len(set(self.dropped))

    def units(self, ids: Ids) -> list[tuple[str, int] | None]:
        """The units along an axis.

        Args:
            ids: (length of the axis,) the atom at each position.

        Returns:
            (group, unit) at each position; None where no group can be cut.
        """
        return self._read(ids)[1]

    def _read(self, ids: Ids) -> tuple[Ids, list[tuple[str, int] | None], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """`ids` themselves (so that their id stays theirs), their units, and group -> positions and units there."""
        if id(ids) not in self._cache:
            units = [self.unit_of.get(a) for a in self.channels.roots(ids).tolist()]
            groups: dict[str, list[int]] = {}
            for position, unit in enumerate(units):
                if unit is not None:
                    groups.setdefault(unit[0], []).append(position)
            found = {n: (np.array(at), np.array([units[i][1] for i in at])) for n, at in groups.items()}
            self._cache[id(ids)] = ids, units, found
        return self._cache[id(ids)]

    @cached_property
    def unit_sets(self) -> dict[str, set[frozenset[int]]]:
        """For each group the sets of units that make up a whole axis: one unit of each set must stay."""
        found: dict[str, set[frozenset[int]]] = {}
        arrays = {id(ids): ids for ids in tree_leaves(list(self.axes.values())) if ids is not None}
        for ids in arrays.values():
            units = set(self.units(ids))
            names = {u and u[0] for u in units}
            if len(names) == 1 and None not in names:
                found.setdefault(names.pop(), set()).add(frozenset(u[1] for u in units))
        return found

    def kept(self, ids: Ids, keep: Mapping[str, Iterable[int]]) -> np.ndarray:
        """Which positions of an axis stay.

        Args:
            ids: (length of the axis,) the atom at each position.
            keep: group -> units that it keeps; groups that are not named keep all.

        Returns:
            (length of the axis,) true where the position stays.
        """
        result = np.ones(len(ids), dtype=bool)
        for name, (positions, units) in self._read(ids)[2].items():
            if name in keep:
                result[positions] = np.isin(units, list(keep[name]))
        return result
