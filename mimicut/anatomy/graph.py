"""The anatomy of a network: which channels live and die together, and which blocks stand between skip connections.

Read from the traced operator graph with the table in `operators`. What cannot be read is pinned, with the operator and
module named; nothing is assumed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.channels import Axes, Channels, Ids, Size
from mimicut.anatomy.operators import TABLE
from mimicut.anatomy.operators.rules import Given, Unforeseen, unknown_operator
from mimicut.anatomy.torch_calls import Heard, hear
from mimicut.anatomy.tracing import Traced, operator, shape
from mimicut.surgery.seam import Seam

_MAX_STEPS = 50  # back from a computed weight to the parameters it is made of


@dataclass(frozen=True)
class Member:
    """One axis of a tensor that a group cuts. units: for each position, the group's unit there, or -1 for another's."""

    tensor: str
    dim: int
    units: np.ndarray


@dataclass(frozen=True)
class Producer:
    """A weight that makes channels of a group: `units` along its axis `dim`. dense: it mixes all its inputs."""

    tensor: str
    dim: int
    units: np.ndarray
    dense: bool
    node: Node

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """Channels that are cut together: `width` units, each of them a set of positions in every member.

    name: the module that makes the channels first. channels: how many positions a producer has (a unit may hold
    several, as in a grouped convolution). pinned: why it must stay whole, or None.
    """

    name: str
    width: int
    channels: int
    members: tuple[Member, ...]
    producers: tuple[Producer, ...]
    pinned: str | None


@dataclass(frozen=True)
class Block:
    """What lies between a fork and the addition that joins it again. identity: one side is the fork's own value.

    name: the innermost module around it, or of several that one module holds the one around its layers. nodes: between
    fork and addition. outer: not inside another. end: what the branch gives to the addition; branch: what is computed
    for that alone. gone: (module, how) by which it is dropped, as `cut.without`. pinned: why it must stay, or None.
    streams: the groups to which the sum's channels belong. stage, place, last: which run of outer blocks on one stream
    it belongs to, its place there, and whether it ends it.
    """

    name: str
    identity: bool
    nodes: frozenset[Node]
    add: Node
    outer: bool = True
    end: Node | None = None
    branch: frozenset[Node] = frozenset()
    gone: tuple[tuple[str, str], ...] = ()
    pinned: str | None = None
    streams: tuple[str, ...] = ()
    stage: int = -1
    place: int = -1
    last: bool = False


@dataclass
class Anatomy:
    """All that is known of a network before anything is decided.

    groups: by name. blocks: in the order of their additions. unread: (operator, module) that the table does not hold,
    where channels met them. unused: parameters that no traced operator uses. sizes: numbers in modules that follow the
    cut. scales: names of the batch norms' scales. axes: the channels on every tensor's axes. heard: the torch calls of
    one pass. tells: whether, after a cut, the code gives numbers that do not follow by themselves. dropped: names of
    blocks or modules that it is without; gone: the modules by which they are left out, and how; whole: the network with
    them, and zeroed: what in it gives nothing then.
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
    heard: Heard = field(repr=False)
    dropped: tuple[str, ...] = ()
    gone: tuple[tuple[str, str], ...] = ()
    whole: Traced | None = None
    zeroed: frozenset[Node] = frozenset()
    tells: bool = False
    _known: dict[int, tuple[Ids, list, dict]] = field(default_factory=dict, repr=False)

    @property
    def only_blocks(self) -> bool:
        """Is all that it is without a block, of which `whole` knows where it ends?"""
        return bool(self.zeroed) and len(self.zeroed) == len(set(self.dropped))

    def units(self, ids: Ids) -> list[tuple[str, int] | None]:
        """(group, unit) at each position; None where no group can be cut."""
        return self._read(ids)[1]

    def _read(self, ids: Ids) -> tuple[Ids, list[tuple[str, int] | None], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The ids (which stay alive with what is known of them), their units, and group -> positions and units."""
        if id(ids) not in self._known:
            units = [self.unit_of.get(a) for a in self.channels.roots(ids).tolist()]
            groups: dict[str, list[int]] = {}
            for position, unit in enumerate(units):
                if unit is not None:
                    groups.setdefault(unit[0], []).append(position)
            found = {n: (np.array(at), np.array([units[i][1] for i in at])) for n, at in groups.items()}
            self._known[id(ids)] = ids, units, found
        return self._known[id(ids)]

    @cached_property
    def kinds(self) -> dict[str, set[frozenset[int]]]:
        """Of each group, the sets of its units of which some axis consists: one of each must stay."""
        found: dict[str, set[frozenset[int]]] = {}
        arrays = {id(ids): ids for ids in tree_leaves(list(self.axes.values())) if ids is not None}
        for ids in arrays.values():
            units = set(self.units(ids))
            names = {u and u[0] for u in units}
            if len(names) == 1 and None not in names:
                found.setdefault(names.pop(), set()).add(frozenset(u[1] for u in units))
        return found

    def kept(self, ids: Ids, keep: dict[str, Iterable[int]]) -> np.ndarray:
        """Boolean per position: does it stay when each named group keeps only the listed units?"""
        result = np.ones(len(ids), dtype=bool)
        for name, (positions, units) in self._read(ids)[2].items():
            if name in keep:
                result[positions] = np.isin(units, list(keep[name]))
        return result


class _Reader:
    """Walks the graph once; rules of the operator table speak to it."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.channels = Channels()
        self.produced: list[tuple[str, int, Ids, bool, Node]] = []
        self.scales: list[str] = []
        self.unread: list[tuple[str, str]] = []
        self._modules = dict(traced.model.named_modules())
        first = {id(module): name for name, module in self._modules.items()}
        every = traced.model.named_modules(remove_duplicate=False)
        self._first = {
            name: first[id(module)] for name, module in every
        }  # of a module that is held under several names
        self._axes: dict[Node, Any] = {}
        self._shared: dict[int, Axes] = {}
        named = dict([*traced.model.named_parameters(), *traced.model.named_buffers()])
        for node, name in traced.tensors.items():
            key = id(named[name]) if name in named else id(node)
            if key not in self._shared:  # tied tensors have one set of axes
                self._shared[key] = [self.channels.new(s) if s > 1 else None for s in shape(node)]
            self._axes[node] = self._shared[key]
        for node in traced.inputs:
            axes: Axes = [None] * len(shape(node))
            if len(axes) >= 2:
                axes[1] = self.channels.new(shape(node)[1])
                self.channels.pin(axes[1], "the network's input")
            self._axes[node] = axes

    def walk(self) -> None:
        for node in self.traced.nodes:
            self._axes[node] = self._read(node)
        self._tie_held()

    def _read(self, node: Node) -> Any:
        """The axes of what `node` returns; they carry no channels where no rule foresees this."""
        rule = TABLE.get(operator(node))
        if rule is not None and _returns_tensors(node):
            try:
                axes = rule(self, node)
                _check_lengths(node, axes)
                return axes
            except Unforeseen:
                pass
            except Exception as error:
                error.add_note(f"reading operator {node.target} in {self.where(node)} by the rule {rule.__name__}")
                raise
        self._note_unread(node)
        return unknown_operator(self, node)

    def _tie_held(self) -> None:
        """What one attribute counts in several places has one width there: it loses channels at the same positions."""
        choices: dict[tuple[Node, int], list[Size]] = {}
        for size in self.channels.sizes:
            if not size.certain and size.attribute is not None:
                choices.setdefault((size.node, id(size.axis)), []).append(size)
        held: dict[tuple[str, str, int | None], Ids] = {}
        for size, *others in choices.values():
            if not others:
                first = held.setdefault((size.module, size.attribute, size.index), size.ids)
                if len(first) == len(size.ids):
                    self.channels.join(first, size.ids)

    def _note_unread(self, node: Node) -> None:
        met = [a for v in node.all_input_nodes for a in (self.axes(v) or []) if a is not None]
        if met:
            self.unread.append((str(node.target), self.where(node)))

    def axes(self, value: Any) -> Any:
        if not isinstance(value, Node):
            return None
        if value not in self._axes:
            of = shape(value)
            self._axes[value] = None if of is None else [None] * len(of)
        return self._axes[value]

    def where(self, node: Node) -> str:
        return self.traced.where(node)

    def tensor(self, value: Any) -> str | None:
        return self.traced.tensors.get(value) if isinstance(value, Node) else None

    def produce(self, node: Node, weight: Any, dim: int, ids: Ids | None, dense: bool) -> None:
        while isinstance(weight, Node) and operator(weight) in ("getitem", "chunk") and dim == 0:
            weight, ids = weight.args[0], None  # a part of a weight, such as one of q, k and v
        name = self.tensor(weight)
        ids = self.axes(weight)[dim] if ids is None and name is not None else ids
        if ids is not None and name is None:
            name, dim = self._source(weight, ids)
        if ids is not None and name is not None:
            self.produced.append((name, dim, ids, dense, node))

    def _source(self, weight: Any, ids: Ids) -> tuple[str | None, int]:
        """The largest parameter from which a computed weight (standardised, scaled, a product) has these channels."""
        roots, todo, seen, found = self.channels.roots(ids), [weight], set(), []
        while todo and len(seen) < _MAX_STEPS:
            node = todo.pop(0)
            if node in seen or not isinstance(node, Node):
                continue
            seen.add(node)
            if node in self.traced.tensors:
                for dim, own in enumerate(self.axes(node)):
                    if own is not None and np.array_equal(self.channels.roots(own), roots):
                        found.append((math.prod(shape(node)), self.traced.tensors[node], dim))
            elif node not in self.traced.inputs:
                todo += node.all_input_nodes
        return max(found)[1:] if found else (None, 0)

    def scale(self, weight: Any) -> None:
        name = self.tensor(weight)
        if name is not None:
            self.scales.append(name)

    def size(
        self, node: Node, owner: str | None, attribute: str | None, value: int, ids: Ids | None, given: Given = None
    ) -> None:
        """Record that `value`, used by `node`, must equal the kept positions of `ids`, and find where it lives.
        given: the row of numbers in which the operator was given it, and its place there."""
        if ids is None:
            return
        calls = self.traced.calls.get(node, ())
        if attribute is not None:
            owner = owner if owner is not None or not calls else calls[-1].module
            name, _, index = attribute.partition(".")
            found = getattr(self._modules.get(owner), name, None)
            if index and isinstance(found, (tuple, list)):
                found = found[int(index)] if int(index) < len(found) else None
            if isinstance(found, int) and found == value:
                at = int(index) if index else None
                self.channels.sizes.append(Size(owner, name, at, value, ids, True, node, ids, ([value], 0)))
                return
            if name not in ("groups", "num_groups", "normalized_shape"):
                return  # no such attribute: the number describes the layer, and nothing computes with it
        given = given or ([value], 0)
        call = self.heard.of(node)
        places = {p for i in call.find(*given) for p in call.places[i]} if call is not None else set()
        found = [
            Size(p.module, p.attribute, p.index, p.value, held, False, node, ids, given)
            for p in sorted(places, key=lambda p: (p.module, p.attribute, p.index or 0))
            if (held := _counted(ids, p.value)) is not None
        ]
        module = self._first.get(calls[-1].module, calls[-1].module) if calls else ""
        self.channels.sizes += found or [Size(module, None, None, value, ids, False, node, ids, given)]

    @cached_property
    def heard(self) -> Heard:
        return hear(self.traced)


def _counted(ids: Ids, count: int) -> Ids | None:
    """The channels of an axis that `count` counts: all of them, or, where each stands there equally often (heads over
    all images, or times their width), each once."""
    if count == len(ids):
        return ids
    atoms, first, times = np.unique(ids, return_index=True, return_counts=True)
    return ids[np.sort(first)] if count == len(atoms) and len(set(times.tolist())) == 1 else None


def _returns_tensors(node: Node) -> bool:
    """Whether it returns tensors, not numbers that depend on their values."""
    value = node.meta.get("val")
    return any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (tuple, list)) else [value]))


def _check_lengths(node: Node, axes: Any) -> None:
    """Refuse a rule's answer that cannot be of this tensor: then the rule is wrong."""
    sizes = shape(node)
    if sizes is not None and (
        len(axes) != len(sizes) or any(i is not None and len(i) != s for i, s in zip(axes, sizes, strict=True))
    ):
        raise AssertionError(f"the rule's channels do not fit the shape {sizes}")


def read_anatomy(traced: Traced, seam: Seam, seam_nodes: list[Node]) -> Anatomy:
    """Groups and dependent sizes of a traced network. `seam_nodes`: the seam's points in the graph."""
    reader = _Reader(traced)
    reader.walk()
    for node in seam_nodes:
        for ids in reader.axes(node) or []:
            reader.channels.pin(ids, "the seam's own channels")
    for node in traced.outputs:
        for ids in reader.axes(node) or []:
            reader.channels.pin(ids, "the network's output")
    head = set(seam.head)
    for node, name in traced.tensors.items():
        if name in head:
            for ids in reader.axes(node):
                reader.channels.pin(ids, f"the head ({name})")
    groups, unit_of = _groups(reader)
    used = {name for node, name in traced.tensors.items() if node.users}
    shared = {id(p) for n, p in traced.model.named_parameters() if n in used}
    return Anatomy(
        traced,
        seam,
        tuple(seam_nodes),
        groups,
        (),
        tuple(dict.fromkeys(reader.unread)),
        tuple(n for n, p in traced.model.named_parameters() if id(p) not in shared),
        tuple(reader.channels.sizes),
        frozenset(reader.scales),
        {node: reader.axes(node) for node in [*traced.tensors, *traced.inputs, *traced.nodes]},
        unit_of,
        reader.channels,
        reader.heard,
    )


def _groups(reader: _Reader) -> tuple[dict[str, Group], dict[int, tuple[str, int]]]:
    channels = reader.channels
    families = Channels()  # a second union-find, over atoms' roots: axes made by one weight belong to one group
    families.parent = list(range(len(channels.parent)))
    made = [(name, dim, channels.roots(ids), dense, node) for name, dim, ids, dense, node in reader.produced]
    for _, _, roots, _, _ in made:
        families.join(roots, np.full_like(roots, roots[0]))
    reasons: dict[int, str] = {}
    for ids, why in channels.pins:
        for root in set(families.roots(channels.roots(ids)).tolist()):
            reasons.setdefault(root, why)
    producers: dict[int, list[tuple[str, int, np.ndarray, bool, Node]]] = {}
    for entry in made:
        for family in dict.fromkeys(families.roots(entry[2]).tolist()):
            producers.setdefault(family, []).append(entry)
    units: dict[int, dict[int, int]] = {}
    for family, entries in producers.items():
        for _, _, roots, _, _ in entries:
            table = units.setdefault(family, {})
            for root, fam in zip(roots.tolist(), families.roots(roots).tolist(), strict=True):
                if fam == family:
                    table.setdefault(root, len(table))
    members = _members(reader, families, units)
    names: dict[str, int] = {}
    groups, unit_of = {}, {}
    for family, entries in producers.items():
        base = entries[0][0].rpartition(".")[0] or entries[0][0]
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        table = units[family]
        made_by = tuple(
            Producer(t, dim, np.array([table.get(r, -1) for r in roots.tolist()]), dense, node)
            for t, dim, roots, dense, node in entries
        )
        pinned = reasons.get(family)
        if pinned is None and len(table) == 1:
            pinned = "all of its channels hang together"
        positions = max(int((p.units >= 0).sum()) for p in made_by)
        groups[name] = Group(name, len(table), positions, tuple(members.get(family, ())), made_by, pinned)
        unit_of.update({root: (name, unit) for root, unit in table.items()})
    return groups, unit_of


def _members(reader: _Reader, families: Channels, units: dict[int, dict[int, int]]) -> dict[int, list[Member]]:
    members: dict[int, list[Member]] = {}
    done = set()
    for node, tensor in reader.traced.tensors.items():
        if tensor in done:
            continue
        done.add(tensor)
        for dim, ids in enumerate(reader.axes(node)):
            if ids is None:
                continue
            roots = reader.channels.roots(ids)
            for family in dict.fromkeys(families.roots(roots).tolist()):
                if family in units:
                    found = np.array([units[family].get(r, -1) for r in roots.tolist()])
                    members.setdefault(family, []).append(Member(tensor, dim, found))
    return members
