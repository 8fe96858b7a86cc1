"""Plans that mix depth and width to lose least within a budget, and that meet a measured latency.

The few images decide which blocks to drop and how much width to cut: blocks in the order of their error at the seam
relative to what they save (`recoverability`), the widths of the rest as in `planner`. Among the candidates, from width
alone to depth alone, the one with the least error after the closed form wins, on images that it was not solved from.
For small networks, candidates with an error close to the least first mimic for a few steps, since training helps some
of them more than others. Time is first predicted from the measured times of the blocks; then the student itself is
measured on its runtime beside the teacher, and the prediction corrected, until it fits.
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

# A mixture whose predicted loss is this many times the measured loss of another one is not tried. Predictions add up
# blocks and widths that were measured one by one, so they overestimate the loss after a solution. Source: assumption.
HOPELESS = 4.0
# Candidates whose error is below TIE times the least one mimic for SHORT steps, and the one with the least error then
# wins; only if one candidate's steps, teacher and gradients included, take at most SHORT_MACS. Source: measured on four
# pairs (docs/LOG.md): 50 steps ordered three as 400 did, the closed form two; both numbers: assumption, for time.
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
    """Make the plan that loses least within a budget that has a latency or a depth.

    Args:
        teacher: The network that was traced.
        anatomy: The whole network, traced with all blocks.
        few: The images that decide what can be spared.
        budget: The budget.
        given: Views, seed, evidence, and the recipe by which plans with similar errors mimic for a few steps.
        say: Receives sentences about the progress.

    Raises:
        PlanError: A pattern matches nothing.
        OutOfReach: The budget cannot be met; the message names the nearest that was found.
        InputError: The runtime is not available.
    """
    with surveyed(teacher, anatomy, few, budget, given, say) as context:
        return plan_within(context, budget, say=say).plan


def plan_within(context: PlanningContext, budget: Budget, *, say: Say = lambda text: None) -> MeasuredPlan:
    """As `plan_mixture`, from the results of a survey.

    If a budget with a latency has no divisor, widths are rounded to the multiples that were measured to pay off on the
    runtime.
    """
    target = target_ms(context, budget)
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
        # Depth alone is coarse: keep one more block, and cut widths for the rest.
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
    """The plan that loses least among those that meet the latency.

    A student that meets it may be smaller than predicted, and lose more; then the next candidate is measured too, as
    long as it could be better.

    Raises:
        NoneMet: No candidate meets the latency.
    """
    met: list[MeasuredPlan] = []
    tie = tie_of(context)
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


def tie_of(context: PlanningContext) -> float:
    """The factor TIE; 1 if there is no recipe to mimic with, or mimicking would take too long."""
    if context.recipe is None or context.recipe.steps < SHORT:
        return 1.0
    batch = min(context.recipe.batch_size, count(context.few))
    cost = 4 * SHORT * batch * count_traced(context.anatomy.traced).macs
    return TIE if cost <= SHORT_MACS else 1.0


def _decided(context: PlanningContext, tried: Sequence[MeasuredPlan], say: Say) -> MeasuredPlan:
    """The plan with the least error; among close ones, the best after a few steps of mimicking."""
    if len(tried) == 1:
        return tried[0]
    first, tie = min(tried, key=lambda found: _known(found.error)), tie_of(context)
    least = _known(first.error)
    near = [found for found in tried if _known(found.error) <= tie * least]
    if tie == 1 or len(near) == 1 or not math.isfinite(least):
        return first
    say(f"comparing {len(near)} mixtures with similar errors by {SHORT} steps of mimicking each")
    errors = []
    for found in near:
        errors.append(mimicked_error(context, found.plan))
        say(f"  {len(found.plan.drop)} blocks dropped: error {errors[-1]:.3f}")
    return near[errors.index(min(errors))]


def _ranked(
    context: PlanningContext, candidates: Sequence[Candidate], say: Say
) -> list[tuple[float | None, Candidate]]:
    """Each candidate with its error after the closed form, least first; those that were not tried come last."""
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
        say(f"  {len(candidate.drop)} blocks dropped, {candidate.plan.macs['student']:,} MACs: error {error:.3f}")
        found.append((error, candidate))
    # Among equals the one with more dropped blocks comes first: it is the fastest.
    return [*sorted(found, key=lambda pair: (round(pair[0], 4), -len(pair[1].drop))), *hopeless]


def target_ms(context: PlanningContext, budget: Budget) -> float | None:
    """The latency to meet in milliseconds; None without one."""
    latency = budget.latency
    if latency is None:
        return None
    if context.setting is None:
        raise PlanError("making a plan: found a latency but no runtime to measure it on; give one (--runtime)")
    assert context.teacher_ms is not None
    return latency.target(context.teacher_ms.ms_median)
