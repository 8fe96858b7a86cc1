"""What to keep under a budget: from an anatomy to a plan."""

import fnmatch
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from mimicut.anatomy.cost import count_teacher
from mimicut.anatomy.graph import Anatomy, Group
from mimicut.anatomy.probe import call_edits
from mimicut.anatomy.selection import required_units, selections
from mimicut.base.errors import OutOfReach, PlanError
from mimicut.base.guard import named_tensors
from mimicut.planning.limits import Limits, Pace, macs_of, relief, size_of, time_of
from mimicut.planning.scores import RECONSTRUCTION, SCORES, Evidence
from mimicut.surgery.plan import Plan, check_teacher, describe

SCHEMES = ("auto", "mid", "all")
# With evidence: no group is cut to less than this share of the width that all would have alike, so that a choice made
# on few images cannot ruin a group. Source: measured (docs/LOG.md).
LEAST_OF_UNIFORM = 0.35
STEPS = 32  # in which a group gives up its width. Source: assumption, for time.


def make_plan(
    teacher: nn.Module,
    anatomy: Anatomy,
    *,
    keep: float | None = None,
    keep_width: float | None = None,
    params: float | None = None,
    size_mb: float | None = None,
    pace: Pace | None = None,
    ms: float | None = None,
    scheme: str = "auto",
    spare_ends: bool = False,
    pin: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_channels: int = 1,
    divisor: int = 1,
    score: str = "l1",
    seed: int = 0,
    evidence: Evidence | None = None,
    source: dict[str, Any] | None = None,
) -> Plan:
    """The plan that keeps most of `teacher` within the budget.

    keep: share of the teacher's MACs, 0 < keep <= 1; params: share of its parameters up to 1, or else how many there
    may be; size_mb: megabytes (10**6 bytes) of all its tensors; ms: milliseconds as `pace` predicts them. Of several
    every one is met. The same share of every group's channels is kept, and what the budget then still allows is given
    back unit by unit; with `evidence` each group gives what costs the seam least for what it saves, but no group is cut
    to less than LEAST_OF_UNIFORM of that same share. keep_width: share of each group's channels instead; of C channels
    ceil(C * keep_width) stay.
    scheme: "mid" cuts channels inside residual blocks and leaves residual widths alone (MiR's); "all" cuts every group
    that does not reach the seam; "auto" is "mid" where that reaches the budget, else "all". spare_ends: with "mid",
    leave the first and last block of each stage whole. pin: patterns of modules whose outputs keep all channels.
    exclude: patterns of modules that must not change at all. min_channels, divisor: no group is cut below, and widths
    are rounded up to a multiple of. score: a name in `score.SCORES`. evidence: from `reconstruction`, instead of a
    score; groups that it does not tell of take the score. source: how to build the teacher, for `load`.
    Raises: PlanError for impossible values and patterns that match nothing; of it OutOfReach for budgets that cannot be
    met, naming the nearest.
    """
    asked = {
        "keep": keep, "keep_width": keep_width, "scheme": scheme, "spare_ends": spare_ends, "pin": list(pin),
        "exclude": list(exclude), "min_channels": min_channels, "divisor": divisor, "score": score, "seed": seed,
        "params": params, "size_mb": size_mb, "ms": ms,
    }  # fmt: skip
    _check_asked(asked, anatomy)
    ranks = _ranks(teacher, anatomy, score, seed, evidence)
    if evidence is not None:
        asked["score"] = RECONSTRUCTION
    least = {
        g.name: len(required_units(anatomy, g, ranks[g.name])) for g in anatomy.groups.values() if g.pinned is None
    }
    notes: list[str] = []
    if scheme == "auto":
        asked["scheme"], notes = _choose_scheme(teacher, anatomy, asked, ranks, least, pace)
    eligible = _eligible(anatomy, asked)
    whole = _limits(teacher, anatomy, {}, asked, pace)
    free = whole.load({}) <= 1 and keep_width in (None, 1)
    if not eligible and not free:
        raise OutOfReach(_nothing_to_cut(anatomy, asked))
    floors = {g.name: _round(g, least[g.name], asked) for g in eligible}
    widths = {g.name: g.width for g in eligible}
    if keep_width is not None:
        widths = {
            g.name: max(floors[g.name], _round(g, math.ceil(g.width * keep_width - 1e-9), asked)) for g in eligible
        }
    elif not free:
        limits = _limits(teacher, anatomy, {g.name: ranks[g.name] for g in eligible}, asked, pace)
        widths = _fit(eligible, floors, limits, asked)
        if evidence is not None:
            widths = _by_evidence(eligible, floors, widths, limits, asked, evidence)
    return resolve(teacher, anatomy, widths, ranks, asked=asked, source=source, notes=notes)


def replan(teacher: nn.Module, anatomy: Anatomy, plan: Plan, source: dict[str, Any] | None = None) -> Plan:
    """`plan` resolved again for `teacher`, after its widths or dropped blocks may have been edited by hand.

    Groups whose width was not edited keep the units the plan lists; the others are chosen by the plan's score.
    Raises: PlanError for another teacher's plan, unknown groups, widths out of range, or edited slices.
    """
    check_teacher(teacher, plan)
    other = [list(each) for each in anatomy.dropped_modules] != plan.gone
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
    asked = plan.asked
    score = asked.get("score", "l1")
    score = "l1" if score == RECONSTRUCTION else score  # for widths edited by hand, now that there are no images
    if score not in SCORES:
        raise PlanError(f"reading asked: score is {score!r}, expected one of {', '.join(SCORES)}")
    ranks = _ranks(teacher, anatomy, score, int(asked.get("seed", 0)))
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
    if not as_planned:
        asked = {**asked, "edited": True}
    new = resolve(teacher, anatomy, dict(widths), ranks, asked=asked, source=source or plan.teacher.get("source"))
    if (
        as_planned
        and new.macs["student"] == plan.macs.get("student")
        and (new.slices, new.edits, new.calls) != (plan.slices, plan.edits, plan.calls or new.calls)
    ):
        raise PlanError(
            "reading the plan: its slices, edits or calls are not those of its widths; edit widths and drop only"
        )
    return new


def resolve(
    teacher: nn.Module,
    anatomy: Anatomy,
    widths: dict[str, int],
    ranks: dict[str, np.ndarray],
    *,
    asked: dict[str, Any],
    source: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan that keeps, of each group in `widths`, that many units of lowest rank."""
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
        gone=[list(each) for each in anatomy.dropped_modules],
        asked=asked,
        macs={"teacher": before, "student": round(after)},
        notes=list(notes),
        calls=calls,
    )


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


def _eligible(anatomy: Anatomy, asked: dict[str, Any]) -> list[Group]:
    groups = eligible_groups(anatomy, asked["scheme"], asked["spare_ends"])
    named = {n for g in anatomy.groups.values() for p in g.producers for n in (p.module, g.name)}
    modules = {n for n, _ in anatomy.traced.model.named_modules()}
    for option, known in (("pin", named), ("exclude", modules)):
        for pattern in asked[option]:
            if not any(matches(n, pattern) for n in known):
                raise PlanError(
                    f"reading --{option} {pattern!r}: it matches no module"
                    + (" that makes channels" if option == "pin" else "")
                    + "; `mimicut inspect` lists the groups"
                )
    return [
        g
        for g in groups
        if not any(matches(n, p) for p in asked["pin"] for n in (g.name, *(q.module for q in g.producers)))
        and not any(matches(m.tensor.rpartition(".")[0], p) for p in asked["exclude"] for m in g.members)
    ]


def matches(name: str, pattern: str) -> bool:
    """A pattern names a module, everything inside it, or matches with * and ?."""
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def _choose_scheme(
    teacher: nn.Module,
    anatomy: Anatomy,
    asked: dict[str, Any],
    ranks: dict[str, np.ndarray],
    least: dict[str, int],
    pace: Pace | None,
) -> tuple[str, list[str]]:
    mid = _eligible(anatomy, {**asked, "scheme": "mid"})
    if not mid:
        return "all", ["no residual blocks with channels of their own: scheme all"]
    floors = {g.name: _round(g, least[g.name], asked) for g in mid}
    limits = _limits(teacher, anatomy, {g.name: ranks[g.name] for g in mid}, asked, pace)
    full = {g.name: g.width for g in mid}
    for (name, _, _), most, floor in zip(limits.parts, limits.used(full), limits.used(floors), strict=True):
        # Close to its floor a block has next to nothing left: the last tenth of what mid can take is left alone.
        if floor + 0.1 * (most - floor) > 1:
            return "all", [f"scheme mid reaches {floor:.2f} times the {name} asked for at the very least: scheme all"]
    return "mid", []


def _check_asked(asked: dict[str, Any], anatomy: Anatomy) -> None:
    faults = []
    budgets = [name for name in ("keep", "params", "size_mb", "ms") if asked[name] is not None]
    if not budgets and asked["keep_width"] is None and not anatomy.dropped:
        faults.append(
            "no budget is given, expected keep (share of MACs), params, size_mb, latency, keep_width (share of "
            "channels) or drop (blocks)"
        )
    if budgets and asked["keep_width"] is not None:
        faults.append(f"{budgets[0]} and keep_width are both given, expected one budget, or the widths themselves")
    for name in ("keep", "keep_width"):
        value = asked[name]
        if value is not None and not (isinstance(value, (int, float)) and 0 < value <= 1):
            faults.append(f"{name} is {value}, expected a share above 0 and up to 1")
    for name in ("params", "size_mb", "ms"):
        value = asked[name]
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            faults.append(f"{name} is {value}, expected a number above 0")
    if asked["scheme"] not in SCHEMES:
        faults.append(f"scheme is {asked['scheme']!r}, expected one of {', '.join(SCHEMES)}")
    if asked["score"] not in SCORES:
        faults.append(f"score is {asked['score']!r}, expected one of {', '.join(SCORES)}")
    for name in ("min_channels", "divisor"):
        if not isinstance(asked[name], int) or asked[name] < 1:
            faults.append(f"{name} is {asked[name]}, expected a whole number of 1 or more")
    if faults:
        raise PlanError("making a plan: " + "; ".join(faults))


def _nothing_to_cut(anatomy: Anatomy, asked: dict[str, Any]) -> str:
    pinned = {g.name: g.pinned for g in anatomy.groups.values() if g.pinned}
    reasons = "; ".join(f"{n}: {w}" for n, w in list(pinned.items())[:4])
    if asked["scheme"] == "mid" and eligible_groups(anatomy, "all"):
        return "making a plan: scheme mid finds no residual block whose inner channels could be cut; use scheme all"
    if asked["pin"] or asked["exclude"]:
        return "making a plan: pin and exclude leave nothing to cut; name fewer modules"
    return f"making a plan: nothing can be cut: {reasons or 'the network makes no channels before its seam'}"


def _ranks(
    teacher: nn.Module, anatomy: Anatomy, score: str, seed: int, evidence: Evidence | None = None
) -> dict[str, np.ndarray]:
    """Of each group, the place of every unit when sorted by score, best first (ties: lower index first), but for those
    that are `required_units`: they come before all others."""
    tensors = named_tensors(teacher)
    ranks = {}
    for group in anatomy.groups.values():
        if group.pinned is None:
            found = evidence.scores.get(group.name) if evidence is not None else None
            known = found is not None and len(found) == group.width
            scores = found if known else SCORES[score](group, tensors, anatomy, seed)
            order = np.argsort(-scores, kind="stable")
            rank = np.argsort(order, kind="stable")
            first = required_units(anatomy, group, rank)
            order = np.array([*first, *(u for u in order.tolist() if u not in set(first))])
            ranks[group.name] = np.argsort(order, kind="stable")
        else:
            ranks[group.name] = np.arange(group.width)
    return ranks


def _round(group: Group, units: int, asked: dict[str, Any]) -> int:
    """Units of `group`, raised to the floor of channels and to the divisor; never above its width."""
    each = group.channels / group.width  # channels that one unit holds
    channels = max(units * each, asked["min_channels"])
    if asked["divisor"] > 1:
        channels = math.ceil(channels / asked["divisor"] - 1e-9) * asked["divisor"]
    return min(group.width, max(1, math.ceil(channels / each - 1e-9)))


def _limits(
    teacher: nn.Module, anatomy: Anatomy, ranks: dict[str, np.ndarray], asked: dict[str, Any], pace: Pace | None
) -> Limits:
    """What was asked for, as functions of the widths of the groups in `ranks`; all others are whole."""
    found = Limits()
    if asked["keep"] is not None:
        whole = count_teacher(teacher, anatomy).macs
        found.parts.append(("MACs", macs_of(anatomy, ranks), asked["keep"] * whole))
    if asked["params"] is not None:
        most = asked["params"] * (sum(p.numel() for p in teacher.parameters()) if asked["params"] <= 1 else 1)
        found.parts.append(("parameters", size_of(anatomy, ranks, in_bytes=False), most))
    if asked["size_mb"] is not None:
        found.parts.append(("bytes", size_of(anatomy, ranks, in_bytes=True), asked["size_mb"] * 1e6))
    if asked["ms"] is not None:
        found.parts.append(("milliseconds", time_of(anatomy, ranks, pace), asked["ms"]))
    return found


def _fit(groups: list[Group], floors: dict[str, int], limits: Limits, asked: dict[str, Any]) -> dict[str, int]:
    if limits.load(floors) > 1:
        raise OutOfReach(_out_of_reach(floors, limits, asked))

    def at(share: float) -> dict[str, int]:
        return {g.name: max(floors[g.name], _round(g, math.ceil(g.width * share - 1e-9), asked)) for g in groups}

    low, high = 0.0, 1.0
    if limits.load(at(high)) <= 1:
        return at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if limits.load(at(middle)) <= 1 else (low, middle)
    widths = at(low)
    return _given_back(groups, widths, limits, asked, lambda g: widths[g.name] / g.width)


def _out_of_reach(floors: dict[str, int], limits: Limits, asked: dict[str, Any]) -> str:
    name, least, limit = limits.tightest(floors)
    if name == "MACs":
        total = limit / asked["keep"]
        said = (
            f"keep {asked['keep']} of {round(total):,} MACs is out of reach with scheme {asked['scheme']}: the nearest "
        )
        said += f"is keep {math.ceil(least / total * 1e4) / 1e4}"
    else:
        digits = 0 if name in ("parameters", "bytes") else 3
        said = f"{limit:,.{digits}f} {name} are out of reach with scheme {asked['scheme']}: the nearest is "
        said += f"{least:,.{digits}f} {name}"
    more = "; scheme all may reach further" if asked["scheme"] == "mid" else ""
    return f"making a plan: {said}{more}; `mimicut inspect` tells what is pinned and why"


def _given_back(
    groups: list[Group],
    widths: dict[str, int],
    limits: Limits,
    asked: dict[str, Any],
    key: Callable[[Group], float],
) -> dict[str, int]:
    """`widths`, changed in place: rounding leaves a remainder, which is given back where `key` is smallest, until no
    group's next step fits."""
    open_ = list(groups)
    while open_:
        group = min(open_, key=key)
        step = _round(group, widths[group.name] + 1, asked)
        trial = {**widths, group.name: step}
        if step > widths[group.name] and limits.load(trial) <= 1:
            widths[group.name] = step
        else:
            open_.remove(group)
    return widths


def _by_evidence(
    groups: list[Group],
    floors: dict[str, int],
    uniform: dict[str, int],
    limits: Limits,
    asked: dict[str, Any],
    evidence: Evidence,
) -> dict[str, int]:
    """Widths within the limits: from full width down, always the step that adds least error for what it saves.

    uniform: the widths that fit the limits with one share for all; groups without evidence keep those.
    """
    with_evidence = {g.name: g for g in groups if len(evidence.errors.get(g.name, ())) == g.width + 1}
    least = {
        n: max(floors[n], _round(g, math.floor(LEAST_OF_UNIFORM * uniform[n]), asked)) for n, g in with_evidence.items()
    }
    widths = {g.name: g.width if g.name in with_evidence else uniform[g.name] for g in groups}
    used = limits.used(widths)

    def step(name: str) -> tuple[float, int] | None:
        """Error for what the next step saves, and the width that it leaves."""
        group, width = with_evidence[name], widths[name]
        for fewer in range(width - max(1, group.width // STEPS), least[name] - 1, -1):
            left = _round(group, fewer, asked)
            if least[name] <= left < width:
                saved = relief(used, limits.used({**widths, name: left}))
                added = evidence.errors[name][left] - evidence.errors[name][width]
                return (added / saved, left) if saved > 0 else None
        return None

    # What one group costs depends on the widths of others: a step that comes up is weighed again before it is taken.
    heap = [(found[0], name) for name in with_evidence if (found := step(name)) is not None]
    heapq.heapify(heap)
    while max(used) > 1 and heap:
        _, name = heapq.heappop(heap)
        found = step(name)
        if found is None:
            continue
        if heap and found[0] > heap[0][0]:
            heapq.heappush(heap, (found[0], name))
            continue
        widths[name] = found[1]
        used = limits.used(widths)
        if (found := step(name)) is not None:
            heapq.heappush(heap, (found[0], name))
    if max(used) > 1:
        return uniform
    return _given_back(groups, widths, limits, asked, lambda g: _regret(evidence, g, widths[g.name]))


def _regret(evidence: Evidence, group: Group, width: int) -> float:
    """Less for a group that gains more from one more unit."""
    errors = evidence.errors.get(group.name)
    return 0.0 if errors is None or width >= group.width else errors[width + 1] - errors[width]
