"""Plans that mix depth and width to lose least within a budget, and meet a latency that is measured.

Which blocks go, and how much width, is chosen by the few images: blocks in the order of what they cost the seam for
what they save (`recoverability`), the widths of the rest as `planner` has them. Of the candidates, from width alone to
depth alone, the one is taken of which the closed form leaves the least error on images that it was not solved from. Of
small networks those that come near it mimic for a few steps first, as training makes good for one more than for
another. Time is first predicted by what the blocks were measured to take; then the student itself is measured on its
runtime beside the teacher, and the prediction corrected, until it fits.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from mimicut.anatomy.cost import count_traced
from mimicut.anatomy.graph import Anatomy
from mimicut.base.errors import OutOfReach, PlanError
from mimicut.planning.candidates import Candidate, NoneMet, candidate_for, candidates_for
from mimicut.planning.latency_search import (
    UNDER,
    MeasuredPlan,
    median_share,
    meet_latency,
    nearest_reachable,
    with_latency,
)
from mimicut.planning.survey import Findings, PlanningContext, Say, surveyed
from mimicut.planning.trials import SHORT, mimicked_error, trial_error
from mimicut.recovery.batches import Source, count
from mimicut.runtime.divisors import width_divisor
from mimicut.surgery.budget import Budget
from mimicut.surgery.plan import Plan

# A mixture that is predicted to lose so many times what another one was found to lose is not tried: predictions are
# sums over blocks and widths, each alone, and what a solution makes good for lies below them. Source: assumption.
HOPELESS = 4.0
# Candidates whose error is below so many times the least mimic for SHORT steps, and the least error then is taken;
# where one candidate's steps, teacher and gradients included, are at most so many MACs. Source: measured on four pairs
# (docs/LOG.md): 50 steps ordered three as 400 did, the closed form two; how near and the MACs: assumption, for time.
TIE, SHORT_MACS = 1.3, 1e12


def plan_mixture(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    budget: Budget,
    *,
    given: Findings | None = None,
    say: Say = lambda text: None,
) -> Plan:
    """The plan that loses least within one budget that has a latency or a depth.

    Args:
        teacher: the network that was traced.
        anatomy: of the whole network, traced with all blocks.
        few: the images that say what can be spared.
        budget: what is asked for.
        given: views, seed, evidence, and the recipe by which plans that are about as good mimic for a few steps.
        say: takes sentences about the progress.

    Raises: PlanError for patterns that match nothing; OutOfReach for budgets that cannot be met, naming the nearest
        that was found; InputError where the runtime is not there.
    """
    with surveyed(teacher, anatomy, few, budget, given, say) as context:
        return plan_within(context, budget, say=say).plan


def plan_within(context: PlanningContext, budget: Budget, *, say: Say = lambda text: None) -> MeasuredPlan:
    """As `plan_mixture`, with what a survey found.

    Without a divisor in a budget with a latency, widths are multiples of what was measured to be worth it on the
    runtime.
    """
    target = _target(context, budget)
    if target is not None and budget.divisor is None:
        assert context.setting is not None
        budget = replace(budget, divisor=width_divisor(context.setting))
    depth = budget.resolved_depth
    order = [r for r in context.order if r.block not in budget.drop] if depth != "never" else []
    try:
        ranked = _ranked(context, candidates_for(context, order, target, budget), say)
        if target is None:
            tried = [MeasuredPlan(candidate.plan, error) for error, candidate in ranked]
            return _decided(context, [each for each in tried if each.error is not None] or tried, say)
        found = _best_met(context, ranked, target, budget, say)
    except NoneMet as none:
        assert target is not None  # or there would be none to meet
        blocks = (*budget.drop, *(r.block for r in order))
        raise OutOfReach(nearest_reachable(context, target, blocks, budget)) from none
    assert context.teacher_ms is not None  # as a latency is asked for
    least = 0.0 if budget.sizes else UNDER * target / context.teacher_ms.ms_median
    while len(found.plan.drop) > len(budget.drop) and median_share(found) < least:
        # Depth alone is coarse: with one block more in the network, widths give the rest.
        fewer = candidate_for(context, tuple(found.plan.drop[:-1]), target, budget, widths=depth != "only")
        again = None if fewer is None else meet_latency(context, fewer, target, budget, say)
        if again is None or median_share(again) <= median_share(found):
            break
        found = again
    return replace(found, plan=with_latency(context, found, target))


def _best_met(
    context: PlanningContext,
    ranked: Sequence[tuple[float | None, Candidate]],
    target: float,
    budget: Budget,
    say: Say,
) -> MeasuredPlan:
    """The plan that loses least once its latency is met. What meets it may be smaller than was predicted, and lose
    more: then the next candidate is measured too, as long as it could be better. Raises: NoneMet."""
    met: list[MeasuredPlan] = []
    tie = _tie(context)
    for place, (predicted, candidate) in enumerate(ranked):
        least = min((found.error for found in met if found.error is not None), default=None)
        if met and (predicted is None or least is None or predicted >= tie * least):
            break
        found = meet_latency(context, candidate, target, budget, say)
        if found is None:
            continue
        error = predicted if found.plan.widths == candidate.plan.widths else None
        rivals = [
            other for other, _ in ranked[place + 1 :] if other is not None and other < HOPELESS * _known(predicted)
        ]
        if error is None and (rivals or met):
            error = trial_error(context, context.without(candidate.drop), found.plan)
        met.append(replace(found, error=error))
    if not met:
        raise NoneMet
    return _decided(context, met, say)


def _known(error: float | None) -> float:
    """Where there are several plans, each was tried."""
    assert error is not None
    return error


def _tie(context: PlanningContext) -> float:
    """How many times the least error is still near it: 1 where nothing is to mimic, or it would take too long."""
    if context.recipe is None or context.recipe.steps < SHORT:
        return 1.0
    batch = min(context.recipe.batch_size, count(context.few))
    cost = 4 * SHORT * batch * count_traced(context.anatomy.traced).macs
    return TIE if cost <= SHORT_MACS else 1.0


def _decided(context: PlanningContext, tried: Sequence[MeasuredPlan], say: Say) -> MeasuredPlan:
    """The one of the least error, or of those that are near it the one that is best after a few steps."""
    if len(tried) == 1:
        return tried[0]
    first, tie = min(tried, key=lambda found: _known(found.error)), _tie(context)
    least = _known(first.error)
    near = [found for found in tried if _known(found.error) <= tie * least]
    if tie == 1 or len(near) == 1 or not math.isfinite(least):
        return first
    say(f"mimicking with {len(near)} mixtures that are about as good, {SHORT} steps each")
    errors = []
    for found in near:
        errors.append(mimicked_error(context, found.plan))
        say(f"  {len(found.plan.drop)} blocks less: error {errors[-1]:.3f}")
    return near[errors.index(min(errors))]


def _ranked(
    context: PlanningContext, candidates: Sequence[Candidate], say: Say
) -> list[tuple[float | None, Candidate]]:
    """Error that the closed form leaves, and the candidate; the least first. Last those that were not tried."""
    if len(candidates) == 1:
        return [(None, candidates[0])]
    say(f"trying up to {len(candidates)} mixtures of depth and width")
    found: list[tuple[float, Candidate]] = []
    hopeless: list[tuple[None, Candidate]] = []
    for candidate in sorted(candidates, key=lambda c: c.loss):
        if found and candidate.loss > HOPELESS * min(found, key=lambda pair: pair[0])[0]:
            hopeless.append((None, candidate))
            continue
        error = trial_error(context, context.without(candidate.drop), candidate.plan)
        say(f"  {len(candidate.drop)} blocks less, {candidate.plan.macs['student']:,} MACs: error {error:.3f}")
        found.append((error, candidate))
    # Of equals the one with fewer blocks first: what is not there takes no time.
    return [*sorted(found, key=lambda pair: (round(pair[0], 4), -len(pair[1].drop))), *hopeless]


def _target(context: PlanningContext, budget: Budget) -> float | None:
    """Milliseconds; None without a latency."""
    latency = budget.latency
    if latency is None:
        return None
    if context.setting is None:
        raise PlanError("making a plan: a latency is asked for, but no runtime is given to measure it on")
    assert context.teacher_ms is not None
    own = context.teacher_ms.ms_median
    shares = [] if latency.share is None else [latency.share * own]
    return min([*shares, *([] if latency.ms is None else [latency.ms])])
