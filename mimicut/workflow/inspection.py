"""Inspect a network without changing it: seam, groups, pins, and what budgets would give."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import networkx
from torch import nn
from torch.fx import Node

from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.cost import count_traced, macs_in, terms
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import operator
from mimicut.base.errors import PlanError
from mimicut.planning.planner import eligible_groups, make_plan, reachable_macs, uniform_cost
from mimicut.surgery.seam import SeamPoint

SHARES = (0.75, 0.5, 0.25)


def inspect(teacher: nn.Module, example: Any, *, seam: Sequence[SeamPoint | str] | None = None) -> dict[str, Any]:
    """Describe `teacher` as plain data, from one forward pass.

    Args:
        teacher: The network; it is not changed.
        example: Input to trace with.
        seam: Points of the seam, instead of those found automatically.

    Returns:
        As `facts`.
    """
    return facts(teacher, trace(teacher, example, points=seam))


def facts(teacher: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """Describe `teacher` from its `anatomy`, as plain data.

    Returns:
        A dictionary with these entries:
        seam, seam_shapes, head: points, shapes and head;
        headless: whether the network returns features and predicts nothing;
        outputs: each tensor that it returns: part, kind, final activation, whether it is imitated;
        macs, params, macs_not_counted: the costs;
        groups: name, width in units, channels, whether in scheme "mid", share of the MACs that depend on the group, and
        why it is pinned;
        layers: each counted operator in the order of the pass: name of its module, operator, share of the MACs, and
        part: "cut" where channels of it can be cut, "head" after the seam, "pinned" elsewhere;
        macs_share_pinned: share of the MACs in operators of which no channel can be cut;
        blocks: residual branches, their share of the MACs, and why one cannot be dropped;
        unread: operators that pinned something;
        unused_parameters: parameters that no operator reads;
        smallest_keep: the smallest share of MACs that each scheme reaches;
        keep_width: share of the MACs left when every group keeps that share of its channels;
        keep: for that share of the MACs, the student that `make_plan` plans: scheme, MACs, parameters, and megabytes
        (10**6 bytes) of its parameters in float32; or why there is none.
    """
    cost, shares = count_traced(anatomy.traced), _shares(anatomy)
    layers = _layers(anatomy)
    mid = {g.name for g in eligible_groups(anatomy, "mid")}
    free = {s: eligible_groups(anatomy, s) for s in ("mid", "all")}
    return {
        "model": type(teacher).__qualname__,
        "seam": [str(p) for p in anatomy.seam.points],
        "seam_shapes": [list(s) for s in anatomy.seam.shapes],
        "head": list(anatomy.seam.head),
        "headless": anatomy.seam.headless,
        "outputs": [asdict(output) for output in anatomy.seam.outputs],
        "macs": cost.macs,
        "params": cost.params,
        "macs_not_counted": cost.uncounted,
        "layers": layers,
        "macs_share_pinned": round(sum(each["macs_share"] for each in layers if each["part"] != "cut"), 4),
        "groups": [
            {
                "name": g.name, "width": g.width, "channels": g.channels, "mid": g.name in mid,
                "macs_share": round(shares[g.name], 4), "pinned": g.pinned,
            }
            for g in anatomy.groups.values()
        ],
        "pinned": dict(Counter(g.pinned for g in anatomy.groups.values() if g.pinned)),
        "blocks": _blocks(anatomy, cost.macs),
        "unread": [f"{op} in {where}" for op, where in anatomy.unread],
        "unused_parameters": list(anatomy.unused),
        "smallest_keep": {s: round(reachable_macs(anatomy, g) / cost.macs, 4) for s, g in free.items() if g},
        "keep_width": {
            s: {str(share): round(uniform_cost(anatomy, g, share) / cost.macs, 4) for share in SHARES}
            for s, g in free.items()
            if g
        },
        "keep": {str(share): _predicted(teacher, anatomy, share) for share in SHARES},
    }  # fmt: skip


def _blocks(anatomy: Anatomy, total: int) -> list[dict[str, Any]]:
    free = {b.name for b in droppable(anatomy)}
    found = []
    for block in anatomy.blocks:
        share = macs_in(block.branch or block.nodes, anatomy.traced.batch) / max(total, 1)
        pinned = None if block.name in free else block.pinned or "its code does not run without it"
        found.append({"name": block.name, "macs_share": round(share, 4), "pinned": pinned})
    return found


def _predicted(teacher: nn.Module, anatomy: Anatomy, keep: float) -> dict[str, Any]:
    """Plan the student with that share of the MACs. Scores hardly change its size, so channels are not scored."""
    try:
        plan = make_plan(teacher, anatomy, keep=keep, score="random")
    except PlanError as error:
        return {"unreachable": str(error)}
    left = [{d: len(kept) for d, kept in plan.slices.get(n, {}).items()} for n, _ in teacher.named_parameters()]
    params = sum(
        math.prod(kept.get(d, size) for d, size in enumerate(p.shape))
        for kept, p in zip(left, teacher.parameters(), strict=True)
    )
    scheme, macs = plan.scheme, plan.macs["student"]
    return {"scheme": scheme, "macs": macs, "params": params, "mb": round(params * 4 / 1e6, 2)}


def _shares(anatomy: Anatomy) -> dict[str, float]:
    """For each group, the share of all MACs in operators that read or make its channels."""
    found, total = dict.fromkeys(anatomy.groups, 0.0), 0.0
    for term in terms(anatomy):
        total += term.macs
        for name in {u[0] for ids in term.axes for u in anatomy.units(ids) if u is not None}:
            found[name] += term.macs
    return {name: macs / max(total, 1.0) for name, macs in found.items()}


def _layers(anatomy: Anatomy) -> list[dict[str, Any]]:
    """The counted operators in the order of the pass; see `facts`."""
    free = {g.name for g in eligible_groups(anatomy)}
    flow = anatomy.traced.flow()
    head = set().union(*(networkx.descendants(flow, node) for node in anatomy.seam_nodes))
    macs: dict[Node, float] = {}
    cut = set()
    for term in terms(anatomy):
        macs[term.node] = macs.get(term.node, 0.0) + term.macs
        if free & {u[0] for ids in term.axes for u in anatomy.units(ids) if u is not None}:
            cut.add(term.node)
    total = max(sum(macs.values()), 1.0)
    return [
        {
            "name": anatomy.traced.where(node),
            "operator": operator(node),
            "macs_share": counted / total,
            "part": "cut" if node in cut else "head" if node in head else "pinned",
        }
        for node, counted in macs.items()
    ]
