"""Finds out by trying whether numbers in a user's code follow a cut.

A size in a view or a split may be computed from the tensor at hand, held in an attribute, or written into the code. The
trace cannot tell. So each group that depends on such a number loses some units, and the network is traced again: either
every operator gives the predicted shape, and arithmetic sees the same numbers, or the group is pinned.
"""

import dataclasses
import itertools

import numpy as np
from torch import nn
from torch.fx import Node

from understudy.channels import Size
from understudy.errors import UnderstudyError
from understudy.graph import Anatomy, Group
from understudy.operators import REDUCTIONS, statistics_axes
from understudy.plan import Plan, describe
from understudy.planner import needed, selections
from understudy.trace import operator, shape, trace_graph

MAX_TRIALS = 24  # each traces the network again; more than a few are only needed where attributes hold equal numbers


def settle(teacher: nn.Module, anatomy: Anatomy) -> None:
    """Try every group that depends on an uncertain size; pin those that the code does not let shrink.

    Where a number was computed from several attributes, they are tried in turn.
    """
    doubtful = _doubtful(anatomy)
    if not doubtful:
        return
    choices = _choices(anatomy)
    settled = tuple(s for s in anatomy.sizes if s.certain)
    anatomy.sizes = settled + tuple(c[0] for c in choices)
    if all(_follows(teacher, anatomy, keep) for keep in _subsets(anatomy, doubtful)):
        return
    trials = _Trials(teacher, anatomy, choices, settled)
    for first, *rest in _alike(anatomy, doubtful, choices):
        pick = trials.search(first)
        # The same code does with the others what it did with the first: only where it does not, each is tried alone.
        pinned = [first, *rest] if pick is None else []
        if pick is not None and rest and not trials.follow(rest, pick):
            pinned = [group for group in rest if trials.search(group, pick) is None]
        for group in pinned:
            reason = _why(_of(anatomy, group, choices))
            anatomy.groups[group.name] = dataclasses.replace(group, pinned=reason)
    anatomy.sizes = trials.settled
    if any(anatomy.groups[group.name].pinned for group in doubtful):
        # A number that does not follow its own group may come from another one's width, as in view(x.shape).
        for group in _culprits(teacher, anatomy, [g for g in anatomy.groups.values() if g.pinned is None]):
            anatomy.groups[group.name] = dataclasses.replace(group, pinned=_why([]))


def _culprits(teacher: nn.Module, anatomy: Anatomy, groups: list[Group]) -> list[Group]:
    """Those of `groups` without which the code would follow."""
    if not groups or _follows(teacher, anatomy, _subsets(anatomy, groups)[-1]):
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return _culprits(teacher, anatomy, groups[:half]) + _culprits(teacher, anatomy, groups[half:])


def _alike(anatomy: Anatomy, groups: list[Group], choices: list[list[Size]]) -> list[list[Group]]:
    """Groups whose uncertain numbers stand in the same code: in modules of one class, found in the same attributes."""
    modules, found = dict(anatomy.traced.model.named_modules()), {}
    for group in groups:
        places = [
            (type(modules[c[0].module]), operator(c[0].node), tuple(s.attribute for s in c))
            for c in _of(anatomy, group, choices)
        ]
        found.setdefault(tuple(places), []).append(group)
    return list(found.values())


def _of(anatomy: Anatomy, group: Group, choices: list[list[Size]]) -> list[list[Size]]:
    return [c for c in choices if group.name in _names(anatomy, c[0])]


def _likely(lengths: list[int]) -> list[tuple[int, ...]]:
    """Picks of one place out of so many for each number: all the first, all the last, or all but one."""
    ends = [tuple(0 for _ in lengths), tuple(n - 1 for n in lengths)]
    return ends + [
        (*end[:i], other, *end[i + 1 :])
        for end in ends
        for i, n in enumerate(lengths)
        for other in range(n)
        if other != end[i]
    ]


class _Trials:
    """settled: sizes whose place is known. Groups that follow the cut are added to them one after the other."""

    def __init__(self, teacher: nn.Module, anatomy: Anatomy, choices: list[list[Size]], settled: tuple[Size, ...]):
        self.settled = settled
        self._teacher, self._anatomy, self._choices = teacher, anatomy, choices
        self._accepted: list[Group] = []

    def search(self, group: Group, *first: tuple[int, ...]) -> tuple[int, ...] | None:
        """Which place of each of its numbers makes the code follow; None if none does. first: what is tried first."""
        lengths = [len(c) for c in _of(self._anatomy, group, self._choices)]
        every = dict.fromkeys(
            [*first, *_likely(lengths), *itertools.islice(itertools.product(*map(range, lengths)), 8)]
        )
        for pick in itertools.islice(every, MAX_TRIALS):
            if self.follow([group], pick):
                return pick
        return None

    def follow(self, groups: list[Group], pick: tuple[int, ...]) -> bool:
        """Does the code follow when each number of each of `groups` is at the picked place? If so they are accepted."""
        places = [c[i] for g in groups for c, i in zip(_of(self._anatomy, g, self._choices), pick, strict=True)]
        before, self._anatomy.sizes = self.settled, self.settled + tuple(s for s in places if s not in self.settled)
        together = _subsets(self._anatomy, [*self._accepted, *groups])[-1:] if self._accepted else []
        trials = [*_subsets(self._anatomy, groups), *together]
        if not all(_follows(self._teacher, self._anatomy, keep) for keep in trials):
            self._anatomy.sizes = before
            return False
        self.settled = self._anatomy.sizes
        self._accepted += groups
        return True


def _why(mine: list[list[Size]]) -> str:
    if not mine:
        return "a number in the code depends on how many channels there are"
    size = next((c[0] for c in mine if c[0].attribute is None), mine[0][0])
    what = f"size {size.value} is fixed in the code, not an attribute of a module"
    if size.attribute is not None:
        what = f"size {size.value} is held in {size.attribute}, but another with it is no attribute of a module"
    return f"{what} ({operator(size.node)} in {size.module or '<model>'})"


def _subsets(anatomy: Anatomy, groups: list[Group]) -> list[dict[str, list[int]]]:
    """What is tried: without the first unit and the last, and uneven halves at random, so that neither a slice's end, a
    number that rounding happens to leave right, nor a number that two groups share goes unseen."""
    uneven, inner = {}, {}
    for i, g in enumerate(groups):
        random = np.random.default_rng([i, g.width])
        count = (g.width // 2 + i) % max(g.width - 1, 1)  # groups of one width lose different numbers
        stay = set(needed(anatomy, g, np.arange(g.width)))
        # The first stays, so that a slice of the first few is not left with nothing.
        uneven[g.name] = sorted({0, *stay, *(1 + random.permutation(g.width - 1)[:count]).tolist()})
        stay = set(needed(anatomy, g, abs(np.arange(g.width) - g.width / 2)))  # if it may, another one
        inner[g.name] = sorted({*range(1, max(g.width - 1, 2)), *stay})
    return [inner, uneven]


def _choices(anatomy: Anatomy) -> list[list[Size]]:
    """For each uncertain number, the places that may hold it."""
    found: dict[tuple, list[Size]] = {}
    for size in anatomy.sizes:
        if not size.certain:
            found.setdefault((size.node, id(size.axis)), []).append(size)
    free = {name for name, group in anatomy.groups.items() if group.pinned is None}
    return [sizes for sizes in found.values() if _names(anatomy, sizes[0]) & free]


def _doubtful(anatomy: Anatomy) -> list[Group]:
    names = {n for s in anatomy.sizes if not s.certain for n in _names(anatomy, s)}
    for node in anatomy.traced.nodes:
        axes = (anatomy.axes[node] or []) if _numbers(node) else []
        if operator(node) in REDUCTIONS:  # what they give may be divided by how many channels there were
            axes = [anatomy.axes[node.args[0]][axis] for axis in statistics_axes(node)]
        for ids in axes:
            names |= {u[0] for u in anatomy.units(ids) if u is not None} if ids is not None else set()
    return [g for n, g in anatomy.groups.items() if n in names and g.pinned is None]


def _names(anatomy: Anatomy, size: object) -> set[str]:
    return {u[0] for u in anatomy.units(size.ids) if u is not None}


def _numbers(node: Node) -> tuple[float, ...]:
    """Numbers that arithmetic in the code brings in: one may come from a count of channels."""
    if operator(node) not in ("add", "sub", "mul", "div", "pow", "rsub"):
        return ()
    return tuple(a for a in node.args if isinstance(a, (int, float)))


def _follows(teacher: nn.Module, anatomy: Anatomy, keep: dict[str, list[int]]) -> bool:
    """Does the network run with the predicted shapes, and the same numbers, when groups keep only these units?"""
    from understudy.cut import cut

    try:
        slices, edits = selections(anatomy, keep)
        plan = Plan(describe(teacher), anatomy.seam, {}, keep, slices, edits, list(anatomy.dropped))
        again = trace_graph(
            cut(teacher, plan), anatomy.traced.example, anatomy.seam.points if anatomy.traced.marks else ()
        )
    except UnderstudyError:
        return False
    # A tensor of one head or channel is contiguous already: the trace has one operator less.
    before, after = ([n for n in nodes if operator(n) != "contiguous"] for nodes in (anatomy.traced.nodes, again.nodes))
    if len(before) != len(after):
        return False
    for old, new in zip(before, after, strict=True):
        if operator(old) != operator(new) or _numbers(old) != _numbers(new):
            return False
        if shape(old) is not None and shape(new) != _predicted(anatomy, old, keep):
            return False
    return True


def _predicted(anatomy: Anatomy, node: object, keep: dict[str, list[int]]) -> tuple[int, ...]:
    axes = anatomy.axes[node] or [None] * len(shape(node))
    return tuple(
        size if ids is None else int(anatomy.kept(ids, keep).sum()) for size, ids in zip(shape(node), axes, strict=True)
    )
