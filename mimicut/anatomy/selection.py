"""What is left of every tensor, and of every number in a module, when groups keep some of their units."""

from typing import Any

import numpy as np

from mimicut.anatomy.graph import Anatomy, Group
from mimicut.base.errors import PlanError


def selections(
    anatomy: Anatomy, keep: dict[str, list[int]]
) -> tuple[dict[str, dict[int, list[int]]], list[dict[str, Any]]]:
    """Work out how tensors and numbers are cut.

    Args:
        anatomy: what is known of the network.
        keep: group -> units that it keeps; groups that are not named keep all.

    Returns:
        Slices (tensor -> axis -> positions that stay; only axes that lose some) and edits (`Plan.edits`).

    Raises:
        PlanError: an axis would be left with nothing, or one number would have to take two values.
    """
    slices: dict[str, dict[int, list[int]]] = {}
    for node, tensor in anatomy.traced.tensors.items():
        for dim, ids in enumerate(anatomy.axes[node]):
            if ids is None:
                continue
            kept = anatomy.kept(ids, keep)
            if not kept.any():
                raise PlanError(f"cutting {tensor}: nothing of axis {dim} would be left; keep more, or pin it")
            if not kept.all():
                slices.setdefault(tensor, {})[dim] = np.flatnonzero(kept).tolist()
    edits: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for size in anatomy.sizes:
        if size.attribute is None:
            continue
        to = int(anatomy.kept(size.ids, keep).sum())
        key = (size.module, size.attribute, size.index)
        edit = {"module": size.module, "attribute": size.attribute, "index": size.index, "from": size.value, "to": to}
        if edits.setdefault(key, edit)["to"] != to:
            raise PlanError(f"cutting {size.module}: its {size.attribute} would have to be {edits[key]['to']} and {to}")
    return slices, [e for e in edits.values() if e["from"] != e["to"]]


def required_units(anatomy: Anatomy, group: Group, rank: np.ndarray) -> list[int]:
    """The fewest units without which some tensor would be left with nothing.

    Queries and values from one layer, or what several layers hand to a concatenation, are one group, but each of these
    sets of units must keep one. One unit serves for every set that it is in.

    Args:
        anatomy: what is known of the network.
        group: the group.
        rank: (width,) units of low rank are kept first.

    Returns:
        Units, the one of lowest rank first; at least one.
    """
    chosen: list[int] = []
    for units in sorted(anatomy.unit_sets.get(group.name, ()), key=len):
        if not units & set(chosen):
            chosen.append(min(units, key=lambda u: rank[u]))
    return sorted(chosen, key=lambda u: rank[u]) or [int(np.argmin(rank))]
