"""Finds out by trying whether numbers in a user's code follow a cut.

A size in a view or a split may be computed from the tensor at hand, held in an attribute, or written into the code. The
trace cannot tell. So each group that depends on such a number loses one unit, and the network is traced again: either
every operator gives the predicted shape, or the group is pinned.
"""

import dataclasses
import itertools

from torch import nn

from understudy.channels import Size
from understudy.errors import UnderstudyError
from understudy.graph import Anatomy, Group
from understudy.plan import Plan, describe
from understudy.planner import selections
from understudy.trace import operator, shape, trace_graph

MAX_TRIALS = 64  # each traces the network again; more than a few are only needed where attributes hold equal numbers


def settle(teacher: nn.Module, anatomy: Anatomy) -> None:
    """Try every group that depends on an uncertain size; pin those that the code does not let shrink.

    Where several attributes hold the number, they are tried in turn, and last none of them (the code computes it).
    """
    doubtful = _doubtful(anatomy)
    if not doubtful:
        return
    choices = _choices(anatomy)
    settled = tuple(s for s in anatomy.sizes if s.certain)
    anatomy.sizes = settled + tuple(c[0] for c in choices)
    if _follows(teacher, anatomy, doubtful):
        return
    for group in doubtful:
        mine = [c for c in choices if group.name in _names(anatomy, c[0])]
        for trial in itertools.islice(itertools.product(*mine), MAX_TRIALS):
            anatomy.sizes = settled + trial
            if _follows(teacher, anatomy, [group]):
                settled += tuple(s for s in trial if s not in settled)
                break
        else:
            size = mine[0][0]
            why = f"size {size.value} is fixed in the code ({operator(size.node)} in {size.module or '<model>'})"
            anatomy.groups[group.name] = dataclasses.replace(group, pinned=why)
    anatomy.sizes = settled


def _choices(anatomy: Anatomy) -> list[list[Size]]:
    """For each uncertain number, the places that may hold it, and at last none."""
    found: dict[tuple, list[Size]] = {}
    for size in anatomy.sizes:
        if not size.certain:
            found.setdefault((size.node, size.value, id(size.ids)), []).append(size)
    return [
        sizes if sizes[-1].attribute is None else [*sizes, dataclasses.replace(sizes[0], attribute=None, index=None)]
        for sizes in found.values()
    ]


def _doubtful(anatomy: Anatomy) -> list[Group]:
    names = {n for s in anatomy.sizes if not s.certain for n in _names(anatomy, s)}
    return [g for n, g in anatomy.groups.items() if n in names and g.pinned is None]


def _names(anatomy: Anatomy, size: object) -> set[str]:
    return {u[0] for u in anatomy.units(size.ids) if u is not None}


def _follows(teacher: nn.Module, anatomy: Anatomy, groups: list[Group]) -> bool:
    """Does the network, with one unit less in each of `groups`, run with the shapes that are predicted?"""
    from understudy.cut import cut

    keep = {g.name: list(range(1, g.width)) for g in groups}  # the first: the last may lie behind a slice's end
    try:
        slices, edits = selections(anatomy, keep)
        plan = Plan(describe(teacher), anatomy.seam, {}, keep, slices, edits, list(anatomy.dropped))
        again = trace_graph(
            cut(teacher, plan), anatomy.traced.example, anatomy.seam.points if anatomy.traced.marks else ()
        )
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
