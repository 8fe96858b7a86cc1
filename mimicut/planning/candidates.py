"""Plans that meet a budget with more or fewer blocks: from width alone to depth alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mimicut.base.errors import OutOfReach, UnsupportedModel
from mimicut.planning.limits import TimeLimit
from mimicut.planning.planner import plan_widths
from mimicut.planning.recoverability import VIEWS, Recoverable, trial_views
from mimicut.planning.survey import PlanningContext
from mimicut.surgery.budget import Budget
from mimicut.surgery.plan import Plan

# Candidates that are tried with the closed form, width alone and depth alone among them: of small networks, and of
# those of which a trial sees fewer views. Source: assumption, for time.
CANDIDATES, CANDIDATES_LARGE = 5, 3


class NoneMet(Exception):
    """No candidate is within the budget."""


@dataclass(frozen=True)
class Candidate:
    """drop: blocks that are left out. loss: predicted error. widths: whether widths may be cut too."""

    drop: tuple[str, ...]
    plan: Plan
    loss: float
    widths: bool


def candidate_for(
    context: PlanningContext, drop: tuple[str, ...], target: float | None, budget: Budget, widths: bool = True
) -> Candidate | None:
    """The plan without these blocks that meets the budget, and is predicted to take `target` milliseconds at most; None
    where there is none."""
    try:
        anatomy = context.without(drop)
    except UnsupportedModel:  # each of these can be dropped, but not all together
        return None
    limit = None
    if target is not None:
        assert context.pace is not None
        limit = TimeLimit(context.pace, target)
    try:
        plan = plan_widths(
            context.teacher, anatomy, budget if widths else replace(budget, pin=("*",)), evidence=context.evidence,
            time_limit=limit,
        )  # fmt: skip
    except OutOfReach:
        return None
    plan = replace(plan, budget=budget)
    errors = {} if context.evidence is None else context.evidence.errors
    loss = sum(r.error for r in context.order if r.block in drop)
    loss += sum(float(errors[name][width]) for name, width in plan.widths.items() if width < len(errors.get(name, ())))
    return Candidate(drop, plan, loss, widths)


def candidates_for(
    context: PlanningContext, order: Sequence[Recoverable], target: float | None, budget: Budget
) -> list[Candidate]:
    """From width alone to depth alone, one block of `order` more each; those of least predicted loss, and both ends.

    Raises: NoneMet where no candidate is fast enough; OutOfReach where none is small enough, naming the nearest.
    """
    found = []
    only_blocks = budget.resolved_depth == "only"
    for number in range(len(order) + 1):
        drop = budget.drop + tuple(r.block for r in order[:number])
        alone = candidate_for(context, drop, target, budget, widths=False)
        made = alone or (None if only_blocks else candidate_for(context, drop, target, budget))
        if made is not None:
            found.append(made)
        if alone is not None:
            break
    if not found and target is not None:
        raise NoneMet
    if not found:
        anatomy = context.without(budget.drop + tuple(r.block for r in order))
        plan_widths(context.teacher, anatomy, budget, evidence=context.evidence)  # says what is nearest
        raise OutOfReach("making a plan: dropping blocks alone does not meet this budget; cut widths too (depth auto)")
    ends = [found[0], found[-1]] if len(found) > 1 else found
    most = CANDIDATES if trial_views(context.anatomy) == VIEWS else CANDIDATES_LARGE
    others = sorted((c for c in found if c not in ends), key=lambda c: c.loss)[: most - len(ends)]
    return [c for c in found if c in ends or c in others]
