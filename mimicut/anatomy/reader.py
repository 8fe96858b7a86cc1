"""Reads the channels of a traced network: which positions of which tensors must be kept or removed together.

The method. Every position along an axis that carries channels is an atom. One walk through the operator graph lets the
rule of each operator state which atoms are one. With x of shape (N, C, H, W) and c a position on its channel axis:

    y = x + z               atom(y, c) = atom(x, c) = atom(z, c)
    y_o = sum_i W_oi x_i    atom(W axis 1, i) = atom(x, i),   atom(y, o) = atom(W axis 0, o)
    y = cat(x, z)           atom(y, c) = atom(x, c) for c < C, else atom(z, c - C)
    y = view(x, (N, g, d))  the atoms of the positions that the new axis puts together are one

The classes of the relation that these equations generate (a union-find, `channels.Channels`) are the units. Removing a
unit removes its positions from every tensor, so that all shapes still fit, and what remains computes what the whole
network computes with the removed channels set to zero (law 2). Classes that one weight makes belong to one group, as
one width is chosen for them; this is a second union-find, over the classes.

An atom is pinned, and its whole group with it, where something needs all channels or their order: the input, the seam,
the output, the head, an operator that cannot be read. A number in the code that counts atoms must follow a cut: it is
recorded as a `Size`, with the attributes of modules that may hold it. `probe` then tries whether the code follows.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.channels import Axes, Channels, Ids, Size
from mimicut.anatomy.graph import Anatomy, Group, Member, Producer
from mimicut.anatomy.operators import TABLE
from mimicut.anatomy.operators.rule_interface import Given, Unforeseen, unknown_operator
from mimicut.anatomy.other_methods import numbers_of_other_methods
from mimicut.anatomy.torch_calls import Place, RecordedPass, record_pass
from mimicut.anatomy.tracing import Traced, operator, shape
from mimicut.surgery.seam import Seam
from mimicut.surgery.sizes import may_be_size

_MAX_STEPS = 50  # back from a computed weight to the parameters it is made of


class _Reader:
    """Walks the graph once; rules of the operator table ask it and report to it: `operators.rule_interface.Reader`."""

    def __init__(self, traced: Traced):
        self.traced = traced
        self.channels = Channels()
        self.produced: list[tuple[str, int, Ids, bool, Node]] = []
        self.scales: list[str] = []
        self.unread: list[tuple[str, str]] = []
        self._modules = dict(traced.model.named_modules())
        first = {id(module): name for name, module in self._modules.items()}
        every = traced.model.named_modules(remove_duplicate=False)
        self._first_name = {name: first[id(module)] for name, module in every}  # a module may have several names
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
        """Read every operator, in the order in which they run."""
        for node in self.traced.nodes:
            self._axes[node] = self._read(node)
        self._tie_counted_by_one_attribute()

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

    def _tie_counted_by_one_attribute(self) -> None:
        """Where one attribute counts several axes, they have one width and lose channels at the same positions."""
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
        if any(ids is not None for value in node.all_input_nodes for ids in tree_leaves(self.axes(value))):
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
        given, axis = weight, dim
        while isinstance(weight, Node) and operator(weight) in ("getitem", "chunk") and dim == 0:
            weight, ids = weight.args[0], None  # a part of a weight, such as one of q, k and v
        name = self.tensor(weight)
        ids = self.axes(weight)[dim] if ids is None and name is not None else ids
        if ids is not None and name is None:
            name, dim = self._source(weight, ids)
        if ids is not None and name is not None:
            self.produced.append((name, dim, ids, dense, node))
        elif name is None and shape(given)[axis] > 1 and self._is_computed(weight):
            self.unread.append((str(weight.target), self.where(weight)))  # no parameter is seen through it

    def _is_computed(self, weight: Any) -> bool:
        """Whether a weight is computed from parameters alone."""
        todo, seen, held = [weight], set(), False
        while todo and len(seen) < _MAX_STEPS:
            node = todo.pop(0)
            if node in self.traced.inputs:
                return False
            held = held or node in self.traced.tensors
            todo += [n for n in node.all_input_nodes if n not in seen]
            seen.add(node)
        return held

    def _source(self, weight: Any, ids: Ids) -> tuple[str | None, int]:
        """The largest parameter, and its axis, that gives a computed weight (standardised, scaled, a product) the atoms
        `ids`."""
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
        if ids is None:
            return
        calls = self.traced.calls.get(node, ())
        if attribute is not None:
            owner = owner if owner is not None or not calls else calls[-1].module
            name, _, index = attribute.partition(".")
            position = int(index) if index else None
            if self._held(owner, name, position) == value:
                self.channels.sizes.append(Size(owner, name, position, value, ids, True, node, ids, ([value], 0)))
                return
            if name not in ("groups", "num_groups", "normalized_shape"):
                return  # no such attribute: the number describes the layer, and nothing computes with it
        given = given or ([value], 0)
        found = [
            Size(p.module, p.attribute, p.index, p.value, counted, False, node, ids, given)
            for p in self._places(node, given)
            if (counted := _counted(ids, p.value)) is not None
        ]
        module = self._first_name.get(calls[-1].module, calls[-1].module) if calls else ""
        self.channels.sizes += found or [Size(module, None, None, value, ids, False, node, ids, given)]

    def _held(self, module: str | None, attribute: str, position: int | None) -> int | None:
        """The whole number that a module holds in an attribute, or at a position of one."""
        found = getattr(self._modules.get(module), attribute, None)
        if position is not None and isinstance(found, (tuple, list)):
            found = found[position] if position < len(found) else None
        return found if isinstance(found, int) else None

    def _places(self, node: Node, given: tuple[Sequence[Any], int]) -> list[Place]:
        """Where modules hold the number that `node` was given."""
        call = self.recorded.call_of(node)
        places = {p for i in call.find(*given) for p in call.places[i]} if call is not None else set()
        places = {p for p in places if may_be_size(self._modules[p.module], p.attribute)}
        return sorted(places, key=lambda p: (p.module, p.attribute, p.index or 0))

    @cached_property
    def recorded(self) -> RecordedPass:
        return record_pass(self.traced)


def _counted(ids: Ids, count: int) -> Ids | None:
    """The atoms of an axis that `count` counts: all of them, or, where each stands there equally often (heads over all
    images, or times their width), each once."""
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


def read_anatomy(traced: Traced, seam: Seam, seam_nodes: Sequence[Node]) -> Anatomy:
    """Read groups and dependent sizes of a traced network; blocks are left empty.

    Args:
        traced: the operator graph.
        seam: where the body ends.
        seam_nodes: the seam's points in the graph.

    Returns:
        The anatomy, of which `probe.try_groups` has not tried any group yet.
    """
    reader = _Reader(traced)
    reader.walk()
    _pin_ends(reader, seam, seam_nodes)
    groups, unit_of = _groups(reader)
    used = {name for node, name in traced.tensors.items() if node.users}
    sizes, unclear = numbers_of_other_methods(traced, reader.axes, reader.channels)
    shared = {id(p) for n, p in traced.model.named_parameters() if n in used}
    return Anatomy(
        traced=traced,
        seam=seam,
        seam_nodes=tuple(seam_nodes),
        groups=groups,
        blocks=(),
        unread=tuple(dict.fromkeys(reader.unread)),
        unused=tuple(n for n, p in traced.model.named_parameters() if id(p) not in shared),
        sizes=(*reader.channels.sizes, *sizes),
        unclear=tuple(unclear),
        scales=frozenset(reader.scales),
        axes={node: reader.axes(node) for node in _held(traced)},
        unit_of=unit_of,
        channels=reader.channels,
        recorded=reader.recorded,
    )


def _held(traced: Traced) -> list[Node]:
    return [*traced.tensors, *traced.constants, *traced.inputs, *traced.nodes]


def _pin_ends(reader: _Reader, seam: Seam, seam_nodes: Sequence[Node]) -> None:
    """Pin the channels of the seam, of the output and of the head."""
    for node in seam_nodes:
        for ids in reader.axes(node) or []:
            reader.channels.pin(ids, "the seam's own channels")
    for node in reader.traced.outputs:
        for ids in reader.axes(node) or []:
            reader.channels.pin(ids, "the network's output")
    head = set(seam.head)
    for node, name in reader.traced.tensors.items():
        if name in head:
            for ids in reader.axes(node):
                reader.channels.pin(ids, f"the head ({name})")


@dataclass(frozen=True)
class _Made:
    """Channels that a weight makes, as `Producer`, but with the roots of their atoms in place of units."""

    tensor: str
    dim: int
    roots: Ids
    dense: bool
    node: Node


def _groups(reader: _Reader) -> tuple[dict[str, Group], dict[int, tuple[str, int]]]:
    """The groups by name, and root atom -> (group, unit)."""
    channels = reader.channels
    made = [_Made(name, dim, channels.roots(ids), dense, node) for name, dim, ids, dense, node in reader.produced]
    families = _families(channels, made)
    reasons: dict[int, str] = {}  # family -> the first reason for a pin
    for ids, why in channels.pins:
        for root in set(families.roots(channels.roots(ids)).tolist()):
            reasons.setdefault(root, why)
    makers: dict[int, list[_Made]] = {}
    for each in made:
        for family in dict.fromkeys(families.roots(each.roots).tolist()):
            makers.setdefault(family, []).append(each)
    units = {family: _units(families, family, entries) for family, entries in makers.items()}
    members = _members(reader, families, units)
    times: Counter[str] = Counter()
    groups, unit_of = {}, {}
    for family, entries in makers.items():
        base = entries[0].tensor.rpartition(".")[0] or entries[0].tensor
        times[base] += 1
        name = base if times[base] == 1 else f"{base}#{times[base]}"
        unit_at = units[family]
        producers = tuple(Producer(m.tensor, m.dim, _look_up(unit_at, m.roots), m.dense, m.node) for m in entries)
        pinned = reasons.get(family)
        if pinned is None and len(unit_at) == 1:
            pinned = "all of its channels hang together"
        positions = max(int((p.units >= 0).sum()) for p in producers)
        groups[name] = Group(name, len(unit_at), positions, tuple(members.get(family, ())), producers, pinned)
        unit_of.update({root: (name, unit) for root, unit in unit_at.items()})
    return groups, unit_of


def _families(channels: Channels, made: Sequence[_Made]) -> Channels:
    """A second union-find, over the roots of the atoms: what one weight makes belongs to one group."""
    families = Channels(parent=list(range(len(channels.parent))))
    for each in made:
        families.join(each.roots, np.full_like(each.roots, each.roots[0]))
    return families


def _units(families: Channels, family: int, makers: Sequence[_Made]) -> dict[int, int]:
    """Root atom -> unit, numbered in the order in which the weights make them."""
    found: dict[int, int] = {}
    for each in makers:
        for root, own in zip(each.roots.tolist(), families.roots(each.roots).tolist(), strict=True):
            if own == family:
                found.setdefault(root, len(found))
    return found


def _look_up(unit_at: dict[int, int], roots: Ids) -> np.ndarray:
    return np.array([unit_at.get(root, -1) for root in roots.tolist()])


def _members(reader: _Reader, families: Channels, units: dict[int, dict[int, int]]) -> dict[int, list[Member]]:
    """For each family, the axes of tensors on which it has channels."""
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
                    members.setdefault(family, []).append(Member(tensor, dim, _look_up(units[family], roots)))
    return members
