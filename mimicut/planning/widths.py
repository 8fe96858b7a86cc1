"""How wide each group stays within limits: one share for all, or what costs the seam least by the images' evidence."""

import heapq
import math
from collections.abc import Callable

from mimicut.anatomy.graph import Group
from mimicut.base.errors import OutOfReach
from mimicut.planning.importance import Evidence
from mimicut.planning.limits import Limits, relief
from mimicut.surgery.budget import Budget

# With evidence: no group is cut to less than this share of the width that all would have alike, so that a choice made
# on few images cannot ruin a group. Source: measured (docs/LOG.md).
LEAST_OF_UNIFORM = 0.35
STEPS = 32  # in which a group gives up its width. Source: assumption, for time.


def rounded(group: Group, units: int, budget: Budget) -> int:
    """Units of `group`, raised to the floor of channels and to the divisor; never above its width."""
    each = group.channels / group.width  # channels that one unit holds
    channels = max(units * each, budget.min_channels)
    divisor = budget.divisor or 1
    if divisor > 1:
        channels = math.ceil(channels / divisor - 1e-9) * divisor
    return min(group.width, max(1, math.ceil(channels / each - 1e-9)))


def uniform_widths(groups: list[Group], floors: dict[str, int], limits: Limits, budget: Budget) -> dict[str, int]:
    if limits.load(floors) > 1:
        raise OutOfReach(_out_of_reach(floors, limits, budget))

    def at(share: float) -> dict[str, int]:
        return {g.name: max(floors[g.name], rounded(g, math.ceil(g.width * share - 1e-9), budget)) for g in groups}

    low, high = 0.0, 1.0
    if limits.load(at(high)) <= 1:
        return at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if limits.load(at(middle)) <= 1 else (low, middle)
    widths = at(low)
    return _given_back(groups, widths, limits, budget, lambda g: widths[g.name] / g.width)


def _out_of_reach(floors: dict[str, int], limits: Limits, budget: Budget) -> str:
    name, least, limit = limits.tightest(floors)
    if name == "MACs":
        assert budget.keep is not None
        total = limit / budget.keep
        said = f"keep {budget.keep} of {round(total):,} MACs is out of reach with scheme {budget.scheme}: the nearest "
        said += f"is keep {math.ceil(least / total * 1e4) / 1e4}"
    else:
        digits = 0 if name in ("parameters", "bytes") else 3
        said = f"{limit:,.{digits}f} {name} are out of reach with scheme {budget.scheme}: the nearest is "
        said += f"{least:,.{digits}f} {name}"
    more = "; scheme all may reach further" if budget.scheme == "mid" else ""
    return f"making a plan: {said}{more}; `mimicut inspect` tells what is pinned and why"


def _given_back(
    groups: list[Group],
    widths: dict[str, int],
    limits: Limits,
    budget: Budget,
    key: Callable[[Group], float],
) -> dict[str, int]:
    """`widths`, changed in place: rounding leaves a remainder, which is given back where `key` is smallest, until no
    group's next step fits."""
    open_ = list(groups)
    while open_:
        group = min(open_, key=key)
        step = rounded(group, widths[group.name] + 1, budget)
        trial = {**widths, group.name: step}
        if step > widths[group.name] and limits.load(trial) <= 1:
            widths[group.name] = step
        else:
            open_.remove(group)
    return widths


def widths_by_evidence(
    groups: list[Group],
    floors: dict[str, int],
    uniform: dict[str, int],
    limits: Limits,
    budget: Budget,
    evidence: Evidence,
) -> dict[str, int]:
    """Widths within the limits: from full width down, always the step that adds least error for what it saves.

    uniform: the widths that fit the limits with one share for all; groups without evidence keep those.
    """
    with_evidence = {g.name: g for g in groups if len(evidence.errors.get(g.name, ())) == g.width + 1}
    least = {
        n: max(floors[n], rounded(g, math.floor(LEAST_OF_UNIFORM * uniform[n]), budget))
        for n, g in with_evidence.items()
    }
    widths = {g.name: g.width if g.name in with_evidence else uniform[g.name] for g in groups}
    used = limits.used(widths)

    def step(name: str) -> tuple[float, int] | None:
        """Error for what the next step saves, and the width that it leaves."""
        group, width = with_evidence[name], widths[name]
        for fewer in range(width - max(1, group.width // STEPS), least[name] - 1, -1):
            left = rounded(group, fewer, budget)
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
    return _given_back(groups, widths, limits, budget, lambda g: _regret(evidence, g, widths[g.name]))


def _regret(evidence: Evidence, group: Group, width: int) -> float:
    """Less for a group that gains more from one more unit."""
    errors = evidence.errors.get(group.name)
    return 0.0 if errors is None or width >= group.width else errors[width + 1] - errors[width]
