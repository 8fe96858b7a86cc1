"""Make a plan for an anatomy under a budget."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from torch import nn

from mimicut.anatomy.cost import count_teacher
from mimicut.anatomy.graph import Anatomy, Group
from mimicut.anatomy.probe import call_edits
from mimicut.anatomy.selection import required_units, selections
from mimicut.base.errors import OutOfReach, PlanError
from mimicut.base.guard import named_tensors
from mimicut.planning.importance import SCORES, Evidence
from mimicut.planning.limits import Limits, TimeLimit, limits_of, macs_of
from mimicut.planning.widths import rounded, uniform_widths, widths_by_evidence
from mimicut.surgery.budget import Budget, BudgetOptions
from mimicut.surgery.plan import Plan, check_teacher, describe
from mimicut.surgery.plan_check import EVIDENCE

# Scheme auto takes all in place of mid where the images say that it loses less than this share of what mid loses.
# Source: measured (docs/LOG.md): at 0.71 to 0.84 (three cuts of three networks) students of scheme all are better, at
# 0.89 (two) they are level.
ALL_BELOW = 0.87


def make_plan(
    teacher: nn.Module,
    anatomy: Anatomy,
    budget: Budget | None = None,
    *,
    evidence: Evidence | None = None,
    source: dict[str, Any] | None = None,
    **options: Unpack[BudgetOptions],
) -> Plan:
    """Make the plan that keeps most of `teacher` within the budget.

    The same share of every group's channels is kept, and what the budget then still allows is given back unit by unit.
    With evidence each group gives up the channels with the least error at the seam relative to what they save, but no
    group is cut to less than LEAST_OF_UNIFORM of that same share.

    Args:
        teacher: The network that was traced.
        anatomy: The teacher's, traced without the blocks that are dropped.
        budget: The budget; or its fields as keyword arguments: `make_plan(model, anatomy, keep=0.5)`.
        evidence: From `channel_evidence`, instead of a score; groups without evidence are ranked by the score.
        source: How to build the teacher, for `load`.

    Raises:
        PlanError: A value is impossible, a pattern matches nothing, or there is a latency or depth, which needs images
            (`plan_mixture`).
        OutOfReach: A PlanError; the budget cannot be met, and the message names the nearest.
    """
    if budget is not None and not isinstance(budget, Budget):
        raise PlanError(f"making a plan: budget is {budget!r}, expected a Budget, or its fields such as keep=0.5")
    beside = [name for name, value in options.items() if value is not None]
    if budget is not None and beside:
        raise PlanError(f"making a plan: {', '.join(beside)} given beside a Budget; set them in the Budget")
    if budget is None:
        given: BudgetOptions = {**options}
        if anatomy.dropped and not given.get("drop"):
            given["drop"] = list(anatomy.dropped)
        budget = Budget.of(**given)
    if budget.searches:
        raise PlanError("making a plan: a latency or depth needs images and measurements; use plan_mixture or compress")
    there = [name for name in budget.drop if name not in anatomy.dropped]
    if there:
        raise PlanError(
            f"making a plan: drop names {there[0]!r}, but the anatomy was traced with it; leave it out with trace(..., "
            "drop=[...])"
        )
    return plan_widths(teacher, anatomy, budget, evidence=evidence, source=source)


def plan_widths(
    teacher: nn.Module,
    anatomy: Anatomy,
    budget: Budget,
    *,
    evidence: Evidence | None = None,
    source: dict[str, Any] | None = None,
    time_limit: TimeLimit | None = None,
) -> Plan:
    """As `make_plan`, ignoring latency and depth. time_limit: predicted milliseconds that a forward pass may take."""
    score = budget.score or "l1"
    ranks = _ranks(teacher, anatomy, score, budget.seed, evidence)
    least = {
        g.name: len(required_units(anatomy, g, ranks[g.name])) for g in anatomy.groups.values() if g.pinned is None
    }
    parts = _Parts(teacher, anatomy, ranks, least, time_limit)
    notes: list[str] = []
    resolved = budget
    if budget.scheme == "auto":
        scheme, notes = _choose_scheme(parts, budget)
        resolved = replace(budget, scheme=scheme)
    widths = _widths(parts, resolved, evidence)
    if budget.scheme == "auto" and resolved.scheme == "mid" and evidence is not None and time_limit is None:
        every = _widths_of_all(parts, budget, widths, evidence)
        if every is not None:
            resolved, widths = replace(budget, scheme="all"), every
            notes = ["by what the images say, cutting every width loses less than cutting inside blocks: scheme all"]
    return resolve(
        teacher, anatomy, widths, ranks, budget=budget, scheme=resolved.scheme,
        score=score if evidence is None else EVIDENCE, source=source, notes=notes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Parts:
    """What the steps of planning share. ranks: group -> rank of each unit. least: group -> units that must stay."""

    teacher: nn.Module
    anatomy: Anatomy
    ranks: dict[str, np.ndarray]
    least: dict[str, int]
    time_limit: TimeLimit | None

    def limits(self, groups: Sequence[Group], budget: Budget) -> Limits:
        ranks = {g.name: self.ranks[g.name] for g in groups}
        return limits_of(self.teacher, self.anatomy, ranks, budget, self.time_limit)

    def floors(self, groups: Sequence[Group], budget: Budget) -> dict[str, int]:
        return {g.name: rounded(g, self.least[g.name], budget) for g in groups}


def _widths(parts: _Parts, budget: Budget, evidence: Evidence | None) -> dict[str, int]:
    eligible = _eligible(parts.anatomy, budget)
    free = parts.limits([], budget).load({}) <= 1 and budget.keep_width in (None, 1)
    if not eligible and not free:
        raise OutOfReach(_nothing_to_cut(parts.anatomy, budget))
    floors = parts.floors(eligible, budget)
    if budget.keep_width is not None:
        share = budget.keep_width
        return {g.name: max(floors[g.name], rounded(g, math.ceil(g.width * share - 1e-9), budget)) for g in eligible}
    if free:
        return {g.name: g.width for g in eligible}
    limits = parts.limits(eligible, budget)
    widths = uniform_widths(eligible, floors, limits, budget)
    return widths if evidence is None else widths_by_evidence(eligible, floors, widths, limits, budget, evidence)


def _widths_of_all(parts: _Parts, budget: Budget, mid: dict[str, int], evidence: Evidence) -> dict[str, int] | None:
    """The widths of scheme all, where the images clearly say that they lose less than `mid`, those of scheme mid."""
    if budget.keep_width is not None or budget.spare_ends:
        return None
    every = _widths(parts, replace(budget, scheme="all"), evidence)
    if any(w < parts.anatomy.groups[n].width and n not in evidence.errors for n, w in {**mid, **every}.items()):
        return None  # evidence that time or size left out would count as no loss
    lost = [_lost(evidence, widths) for widths in (every, mid)]
    return every if lost[0] < ALL_BELOW * lost[1] else None


def _lost(evidence: Evidence, widths: dict[str, int]) -> float:
    """What the images say that these widths lose, as if the groups' errors added up."""
    return float(sum(evidence.errors[name][width] for name, width in widths.items() if name in evidence.errors))


def replan(teacher: nn.Module, anatomy: Anatomy, plan: Plan, source: dict[str, Any] | None = None) -> Plan:
    """`plan` resolved again for `teacher`, after its widths or dropped blocks may have been edited by hand.

    Groups whose width was not edited keep the units that the plan lists; the others are chosen by the plan's score.

    Raises:
        PlanError: The plan is for another teacher, names unknown groups, has widths out of range, or edited slices.
    """
    check_teacher(teacher, plan)
    other = [list(each) for each in anatomy.dropped_modules] != plan.dropped_modules
    widths = {name: width for name, width in plan.widths.items() if not other or name in anatomy.groups}
    for name, width in widths.items():
        group = anatomy.groups.get(name)
        if group is None:
            close = ", ".join(list(anatomy.groups)[:5])
            raise PlanError(f"reading widths: there is no group {name!r}; the groups are {close}, ...")
        if not 1 <= width <= group.width:
            raise PlanError(f"reading widths: {name} is {width}, expected 1 to {group.width}")
        if group.pinned is not None and width != group.width:
            raise PlanError(f"reading widths: {name} cannot be cut to {width} of {group.width}: {group.pinned}")
    # For widths edited by hand there is no evidence now.
    score = "l1" if plan.score in (None, EVIDENCE) else plan.score
    if score not in SCORES:
        raise PlanError(f"reading the plan: score is {score!r}, expected one of {', '.join(SCORES)}")
    ranks = _ranks(teacher, anatomy, score, 0 if plan.budget is None else plan.budget.seed)
    as_planned = not other
    for name, width in widths.items():
        units = plan.keep.get(name, [])
        if len(units) == width:
            if len(set(units)) != width or max(units) >= anatomy.groups[name].width:
                raise PlanError(
                    f"reading keep: {name} lists units that are repeated or above {anatomy.groups[name].width - 1}"
                )
            order = [*sorted(units), *(u for u in range(anatomy.groups[name].width) if u not in set(units))]
            ranks[name] = np.argsort(np.array(order))
        else:
            as_planned = False
    new = resolve(
        teacher, anatomy, dict(widths), ranks, budget=plan.budget, scheme=plan.scheme, score=plan.score,
        source=source or plan.teacher.get("source"),
    )  # fmt: skip
    kept = {name: getattr(plan, name) for name in ("call", "latency", "images", "pruned_by")}
    new = replace(new, **kept, edited=plan.edited or not as_planned)
    if (
        as_planned
        and new.macs["student"] == plan.macs.get("student")
        # Plans of earlier versions have no edits of numbers that only other methods read.
        and (new.slices, [e for e in new.edits if e in plan.edits], new.calls)
        != (plan.slices, plan.edits, plan.calls or new.calls)
    ):
        raise PlanError(
            "reading the plan: its slices, edits or calls do not match its widths; edit only widths and drop"
        )
    return new


def resolve(
    teacher: nn.Module,
    anatomy: Anatomy,
    widths: dict[str, int],
    ranks: dict[str, np.ndarray],
    *,
    budget: Budget | None = None,
    scheme: str | None = None,
    score: str | None = None,
    source: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that keeps, in each group of `widths`, that many units of lowest rank."""
    keep = {n: np.flatnonzero(ranks[n] < w).tolist() for n, w in widths.items()}
    slices, edits = selections(anatomy, keep)
    calls = call_edits(anatomy, keep) if anatomy.needs_call_edits else []
    before = count_teacher(teacher, anatomy).macs
    after = macs_of(anatomy, {n: ranks[n] for n in widths}).of(widths)
    return Plan(
        teacher=describe(teacher, source),
        seam=anatomy.seam,
        widths=dict(widths),
        keep=keep,
        slices=slices,
        edits=edits,
        drop=list(anatomy.dropped),
        dropped_modules=[list(each) for each in anatomy.dropped_modules],
        budget=budget,
        scheme=scheme,
        score=score,
        macs={"teacher": before, "student": round(after)},
        notes=[*notes, *_unclear(anatomy, keep)],
        calls=calls,
    )


def _unclear(anatomy: Anatomy, keep: dict[str, list[int]]) -> list[str]:
    """A note on numbers that may be widths of what is cut, and that only methods outside the pass read."""
    cut = [n for n in anatomy.unclear if any(not anatomy.kept(ids, keep).all() for ids in n.axes)]
    if not cut:
        return []
    first = ", ".join(f"{n.attribute} = {n.value} of {n.module or '<model>'}, read by {n.method}" for n in cut[:3])
    more = f" and {len(cut) - 3} more" if len(cut) > 3 else ""
    return [
        "numbers that may be widths stay as they were, as only methods outside the forward pass read them: "
        f"{first}{more}; before you call such a method of the student, check them"
    ]


def eligible_groups(anatomy: Anatomy, scheme: str = "all", spare_ends: bool = False) -> list[Group]:
    """Groups that a scheme may cut."""
    return [
        g for g in anatomy.groups.values() if g.pinned is None and (scheme == "all" or _mid(anatomy, g, spare_ends))
    ]


def reachable_macs(anatomy: Anatomy, groups: Sequence[Group]) -> int:
    """MACs when every one of `groups` keeps as little as it can."""
    widths = {g.name: len(required_units(anatomy, g, np.arange(g.width))) for g in groups}
    return round(macs_of(anatomy, {g.name: np.arange(g.width) for g in groups}).of(widths))


def uniform_cost(anatomy: Anatomy, groups: Sequence[Group], share: float) -> int:
    """MACs when every one of `groups` keeps `share` of its units."""
    widths = {g.name: max(1, math.ceil(g.width * share - 1e-9)) for g in groups}
    return round(macs_of(anatomy, {g.name: np.arange(g.width) for g in groups}).of(widths))


def _mid(anatomy: Anatomy, group: Group, spare_ends: bool) -> bool:
    for block in anatomy.blocks:
        if block.outer and group.name not in block.streams and all(p.node in block.nodes for p in group.producers):
            return not (spare_ends and (block.place == 0 or block.last))
    return False


def _eligible(anatomy: Anatomy, budget: Budget) -> list[Group]:
    groups = eligible_groups(anatomy, budget.scheme, budget.spare_ends)
    named = {n for g in anatomy.groups.values() for p in g.producers for n in (p.module, g.name)}
    modules = {n for n, _ in anatomy.traced.model.named_modules()}
    for option, patterns, known in (("pin", budget.pin, named), ("exclude", budget.exclude, modules)):
        for pattern in patterns:
            if not any(matches(n, pattern) for n in known):
                raise PlanError(
                    f"reading --{option} {pattern!r}: it matches no module"
                    + (" that makes channels" if option == "pin" else "")
                    + "; `mimicut inspect` lists the groups"
                )
    return [
        g
        for g in groups
        if not any(matches(n, p) for p in budget.pin for n in (g.name, *(q.module for q in g.producers)))
        and not any(matches(m.tensor.rpartition(".")[0], p) for p in budget.exclude for m in g.members)
    ]


def matches(name: str, pattern: str) -> bool:
    """A pattern names a module, everything inside it, or matches with * and ?."""
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def _choose_scheme(parts: _Parts, budget: Budget) -> tuple[str, list[str]]:
    budget = replace(budget, scheme="mid")
    mid = _eligible(parts.anatomy, budget)
    if not mid:
        return "all", ["no residual block has inner channels: scheme all is used"]
    floors, limits = parts.floors(mid, budget), parts.limits(mid, budget)
    full = {g.name: g.width for g in mid}
    for (name, _, _), most, floor in zip(limits.parts, limits.used(full), limits.used(floors), strict=True):
        # Close to its floor a block has almost nothing left, so mid must leave a tenth of its range.
        if floor + 0.1 * (most - floor) > 1:
            return "all", [f"scheme mid cannot go below {floor:.2f} times the allowed {name}: scheme all is used"]
    return "mid", []


def _nothing_to_cut(anatomy: Anatomy, budget: Budget) -> str:
    pinned = {g.name: g.pinned for g in anatomy.groups.values() if g.pinned}
    reasons = "; ".join(f"{n}: {w}" for n, w in list(pinned.items())[:4])
    if budget.scheme == "mid" and eligible_groups(anatomy, "all"):
        return "making a plan: scheme mid finds no residual block whose inner channels could be cut; use scheme all"
    if budget.pin or budget.exclude:
        return "making a plan: pin and exclude leave nothing to cut; name fewer modules"
    text = f"making a plan: nothing can be cut: {reasons or 'the network makes no channels before its seam'}"
    if not anatomy.unread:
        return f"{text}; `mimicut inspect` lists the groups"
    unread = ", ".join(f"{op} in {where}" for op, where in anatomy.unread[:4])
    return (
        f"{text}. Operators that cannot be read: {unread}. Where one computes a weight, put its value into a plain "
        "parameter; otherwise compress a submodule without it (--part MODULE; part= in Python)"
    )


def _ranks(
    teacher: nn.Module, anatomy: Anatomy, score: str, seed: int, evidence: Evidence | None = None
) -> dict[str, np.ndarray]:
    """For each group, the rank of every unit by score, best first (ties: lower index first), after the
    `required_units`."""
    tensors = named_tensors(teacher)
    ranks = {}
    for group in anatomy.groups.values():
        if group.pinned is None:
            found = evidence.scores.get(group.name) if evidence is not None else None
            known = found is not None and len(found) == group.width
            scores: Any = found if known else SCORES[score](group, tensors, anatomy, seed)
            order = np.argsort(-scores, kind="stable")
            rank = np.argsort(order, kind="stable")
            first = required_units(anatomy, group, rank)
            order = np.array([*first, *(u for u in order.tolist() if u not in set(first))])
            ranks[group.name] = np.argsort(order, kind="stable")
        else:
            ranks[group.name] = np.arange(group.width)
    return ranks
