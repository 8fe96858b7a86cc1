"""Finds out by trying whether numbers in a user's code follow a cut.

A size in a view or a split may be computed from the tensor at hand, held in an attribute, or written into the code. The
trace cannot tell. So each group that depends on such a number loses one unit, and the network is traced again: either
every operator gives the predicted shape, or the group is pinned.
"""

import dataclasses

from torch import nn

from understudy.errors import UnderstudyError
from understudy.graph import Anatomy, Group
from understudy.plan import Plan, describe
from understudy.planner import selections
from understudy.trace import operator, shape, trace_graph


def settle(teacher: nn.Module, anatomy: Anatomy) -> None:
    """Try every group that depends on an uncertain size; pin those that the code does not let shrink."""
    doubtful = _doubtful(anatomy)
    if not doubtful or _follows(teacher, anatomy, doubtful):
        return
    for group in doubtful:
        if _follows(teacher, anatomy, [group]):
            continue
        # An attribute that only happens to hold the same number was changed: try again with the code left to itself.
        certain = tuple(s for s in anatomy.sizes if s.certain or s.attribute is None or group.name not in _names(anatomy, s))
        before, anatomy.sizes = anatomy.sizes, certain
        if not _follows(teacher, anatomy, [group]):
            anatomy.sizes = before
            size = next(s for s in anatomy.sizes if not s.certain and group.name in _names(anatomy, s))
            why = f"size {size.value} is fixed in the code ({operator(size.node)} in {size.module or '<model>'})"
            anatomy.groups[group.name] = dataclasses.replace(group, pinned=why)


def _doubtful(anatomy: Anatomy) -> list[Group]:
    names = {n for s in anatomy.sizes if not s.certain for n in _names(anatomy, s)}
    return [g for n, g in anatomy.groups.items() if n in names and g.pinned is None]


def _names(anatomy: Anatomy, size: object) -> set[str]:
    return {u[0] for u in anatomy.units(size.ids) if u is not None}


def _follows(teacher: nn.Module, anatomy: Anatomy, groups: list[Group]) -> bool:
    """Does the network, with one unit less in each of `groups`, run with the shapes that are predicted?"""
    from understudy.cut import cut

    keep = {g.name: list(range(g.width - 1)) for g in groups}
    try:
        slices, edits = selections(anatomy, keep)
        plan = Plan(describe(teacher), anatomy.seam, {}, keep, slices, edits, list(anatomy.dropped))
        again = trace_graph(cut(teacher, plan), anatomy.traced.example, anatomy.seam.points if anatomy.traced.marks else ())
    except UnderstudyError:
        return False
    if len(again.nodes) != len(anatomy.traced.nodes):
        return False
    for old, new in zip(anatomy.traced.nodes, again.nodes, strict=True):
        if operator(old) != operator(new):
            return False
        if shape(old) is not None and shape(new) != _predicted(anatomy, old, keep):
            return False
    return True


def _predicted(anatomy: Anatomy, node: object, keep: dict[str, list[int]]) -> tuple[int, ...]:
    axes = anatomy.axes[node] or [None] * len(shape(node))
    return tuple(
        size if ids is None else int(anatomy.kept(ids, keep).sum()) for size, ids in zip(shape(node), axes, strict=True)
    )
