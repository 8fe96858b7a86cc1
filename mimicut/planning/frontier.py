"""The frontier: what students of several sizes would lose."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base.errors import OutOfReach
from mimicut.planning.mixtures import plan_within
from mimicut.planning.survey import Findings, PlanningContext, Say, surveyed
from mimicut.planning.trials import trial_error
from mimicut.recovery.batches import Source
from mimicut.surgery.budget import Budget

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


def plan_frontier(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    budget: Budget,
    *,
    given: Findings | None = None,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """The rows of `frontier` for one teacher, with the arguments of `plan_mixture`."""
    if budget.depth is None:
        budget = replace(budget, depth="auto")
    with surveyed(teacher, anatomy, few, budget, given, say) as context:
        return frontier(context, budget, say=say)


def frontier(
    context: PlanningContext,
    budget: Budget,
    shares: Sequence[float] = SHARES,
    *,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Estimate what students of several sizes would lose.

    Args:
        context: From `survey`.
        budget: Everything but the size. With a latency the shares are of the latency, and students are measured;
            without one they are of the MACs.
        shares: Shares of the teacher's latency or MACs, falling.
        say: Receives sentences about the progress.

    Returns:
        A row for each share: "asked"; "error", as `MeasuredPlan.error`, for the closed form alone (mimicking lowers
        it); "macs_share"; "drop"; and, if measured, "latency_share" and "latency_ms". The rows end where no student is
        small enough.

    Raises:
        OutOfReach: Not even the largest share can be met.
    """
    rows: list[dict[str, Any]] = []
    for share in shares:
        say(f"planning for {share:g} of the {'latency' if context.setting else 'MACs'}")
        try:
            found = plan_within(context, _sized(budget, share), say=say)
        except OutOfReach:
            if not rows:
                raise
            break
        error = found.error
        if error is None:
            error = trial_error(context, context.without(tuple(found.plan.drop)), found.plan)
        macs_share = found.plan.macs["student"] / found.plan.macs["teacher"]
        row = {"asked": share, "error": round(error, 4), "macs_share": round(macs_share, 4), "drop": found.plan.drop}
        if found.share is not None:
            assert found.student_ms is not None
            ms = found.student_ms.ms_median
            row |= {"latency_share": round(found.share[0], 4), "latency_ms": round(ms, 4)}
        rows.append(row)
    return rows


def _sized(budget: Budget, share: float) -> Budget:
    if budget.latency is None:
        return replace(budget, keep=share)
    return replace(budget, latency=replace(budget.latency, share=share, ms=None))
