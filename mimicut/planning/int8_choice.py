"""Quantise, cut, or both: which of them loses least within a latency, by measurement.

Three ways to one latency on one runtime: INT8 alone, which cuts nothing; a cut alone, in float32; and a cut that is
quantised, which may be milder for it. The latency of each is measured beside the teacher in float32, its error at the
seam on images that it did not learn from.
"""

import math
import tempfile
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base.errors import LawBroken, MimicutError, OutOfReach, UnsupportedModel
from mimicut.planning.latency_search import OVER, MeasuredPlan, measure_student, median_share, with_latency
from mimicut.planning.mixtures import plan_within, target_ms, tie_of
from mimicut.planning.planner import plan_widths
from mimicut.planning.recoverability import hold_out
from mimicut.planning.survey import MEASURED_SECONDS, Findings, PlanningContext, Say, setting_of, surveyed
from mimicut.planning.trials import SHORT, finite, mimicked_error, mimicked_student
from mimicut.recovery.batches import Source, count, plain_batches, subset
from mimicut.recovery.config import preset
from mimicut.recovery.pair import device_for
from mimicut.runtime.export import export, traced_as_exported
from mimicut.runtime.int8_network import TrainableInt8
from mimicut.runtime.latency import INT8_RUNTIMES, Prepared, measure, prepare
from mimicut.surgery.budget import Budget
from mimicut.surgery.head import put_under_head
from mimicut.surgery.plan import Plan

ALONE, CUT, BOTH = "INT8 alone", "a cut alone", "a cut and INT8"
_RANGES = 64  # images from which a trial takes the ranges of INT8. Source: assumption.


def note_on_int8(teacher: nn.Module, anatomy: Anatomy, budget: Budget) -> str | None:
    """A note where INT8 alone would meet the latency for which a network was cut; None where it would not, or cannot be
    measured."""
    setting = setting_of(budget)
    if setting is None or setting.runtime not in INT8_RUNTIMES or budget.sizes or budget.drop:
        return None
    networks: dict[str, Prepared] = {}
    example = anatomy.traced.example
    try:
        networks["teacher"] = prepare(teacher, example, setting)
        networks["int8"] = prepare(teacher, example, replace(setting, precision="int8"))
        found = measure(networks, example, setting, seconds=MEASURED_SECONDS)
    except MimicutError:
        return None
    finally:
        for network in networks.values():
            network.close()
    share, own = found["int8"].over(found["teacher"])[0], found["teacher"].ms_median
    assert budget.latency is not None  # as there is a setting
    if share * own > budget.latency.target(own):
        return None
    return (
        f"INT8 alone takes {share:.2f} of the teacher's latency and cuts nothing: --int8 (int8=True) weighs it against "
        "this cut"
    )


@dataclass(frozen=True)
class _Way:
    """A way to the latency: what was measured of it, or why it is none."""

    name: str
    found: MeasuredPlan | None = None
    error: float = math.inf
    reason: str = ""

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.name}: {self.reason}"
        return f"{self.name}: {median_share(self.found):.2f} of the teacher's latency, error {self.error:.3f}"


def plan_int8(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    budget: Budget,
    *,
    given: Findings | None = None,
    say: Say = lambda text: None,
) -> Plan:
    """Make the plan that loses least within a latency where the student may be quantised.

    Args:
        teacher, anatomy, few, budget, given, say: As for `plan_mixture`; the budget has a latency on a runtime that
            reads INT8 files (`latency.INT8_RUNTIMES`).

    Returns:
        The plan. The precision in `plan.latency.setting` says whether its student is to be quantised; a note says what
        was measured of each way.

    Raises:
        OutOfReach: No way meets the latency.
        PlanError, InputError: As `plan_mixture`.
    """
    with surveyed(teacher, anatomy, few, budget, given, say) as context:
        context = _ready_for_trials(context, given or Findings())
        assert context.setting is not None  # as the budget has a latency
        in_int8 = replace(context, setting=replace(context.setting, precision="int8"))

        share_in_int8 = 0.0

        def alone() -> tuple[MeasuredPlan, float]:
            nonlocal in_int8, share_in_int8
            whole = _whole(in_int8, budget)
            share_in_int8 = median_share(whole)
            assert in_int8.pace is not None  # as there is a setting
            in_int8 = replace(in_int8, pace=in_int8.pace.times(share_in_int8))  # by which cuts are predicted
            return _alone(in_int8, budget, whole)

        def both() -> tuple[MeasuredPlan, float]:
            if share_in_int8 >= 1:
                raise UnsupportedModel("INT8 is no faster than float32, so a cut alone is milder")
            return _cut(in_int8, budget, say)

        say("weighing INT8 alone, a cut alone, and both")
        refused: OutOfReach | None = None
        ways = []
        for name, find in (
            (ALONE, alone),
            (CUT, lambda: _cut(context, budget, say)),
            (BOTH, both),
        ):
            try:
                ways.append(_Way(name, *find()))
            except OutOfReach as error:
                refused = error if name == CUT else refused
                ways.append(_Way(name, reason=str(error) if name == ALONE else "out of reach"))
            except (UnsupportedModel, LawBroken) as error:  # of INT8; a cut that breaks a law is found out later
                ways.append(_Way(name, reason=str(error)))
            say(f"  {ways[-1]}")
    best = min(ways, key=lambda way: (way.error, way.found is None))
    if best.found is None:
        raise refused or UnsupportedModel(f"making a plan: {'; '.join(map(str, ways))}; expected one that meets it")
    plan = best.found.plan
    assert context.recipe is not None
    judged = f"after {steps} steps" if (steps := context.recipe.steps) else "before mimicking, which helps cuts alone"
    note = f"{best.name} loses least (errors {judged}): {'; '.join(map(str, ways))}"
    return replace(plan, notes=[*plan.notes, note])


def _ready_for_trials(context: PlanningContext, given: Findings) -> PlanningContext:
    """The context with images that judge, and a recipe: without mimicking where that would take too long."""
    held = context.held or hold_out(
        context.teacher, context.anatomy, context.few, views=context.views, seed=context.seed
    )
    recipe = context.recipe or preset("default", views=given.views, seed=given.seed)
    steps = SHORT if tie_of(context) > 1 else 0
    return replace(context, held=held, recipe=replace(recipe, steps=steps))


def _whole(context: PlanningContext, budget: Budget) -> MeasuredPlan:
    """The plan that cuts nothing, and how fast it is in INT8."""
    whole = replace(budget, keep=1.0, params=None, size_mb=None, keep_width=None, drop=())
    plan = plan_widths(context.teacher, context.anatomy, whole)
    student_ms, share = measure_student(context, plan, _wanted(context, budget))
    return MeasuredPlan(plan, None, share, student_ms)


def _wanted(context: PlanningContext, budget: Budget) -> float:
    """The latency to meet as a share of the teacher's: the machine may be slower by now."""
    target = target_ms(context, budget)
    assert target is not None
    assert context.teacher_ms is not None
    return target / context.teacher_ms.ms_median


def _alone(context: PlanningContext, budget: Budget, whole: MeasuredPlan) -> tuple[MeasuredPlan, float]:
    """`_whole` as a plan for this latency, and its error in INT8.

    Raises:
        OutOfReach: INT8 alone misses the latency or a size.
    """
    share, target = median_share(whole), target_ms(context, budget)
    assert target is not None
    smaller = [name for name in ("keep_width", *budget.sizes) if getattr(budget, name) is not None]
    if share > OVER * _wanted(context, budget) or smaller or budget.drop:
        missed = [f"the budget of {name}" for name in smaller] + (["the blocks to drop"] if budget.drop else [])
        raise OutOfReach(f"{share:.2f} of the teacher's latency; it misses {(missed or ['the latency'])[0]}")
    return replace(whole, plan=with_latency(context, whole, target)), _int8_error(context, context.teacher)


def _cut(context: PlanningContext, budget: Budget, say: Say) -> tuple[MeasuredPlan, float]:
    """The best cut within the latency, in the precision of the context, and its error after a short recovery."""
    found = plan_within(context, budget, say=say)
    assert context.recipe is not None
    assert context.setting is not None
    if context.setting.precision == "float32":
        return found, mimicked_error(context, found.plan, context.recipe.steps)
    student = mimicked_student(context, found.plan, context.recipe.steps)
    if student is None:  # it diverged
        return found, math.inf
    return found, _int8_error(context, put_under_head(context.teacher, student, context.anatomy.seam))


def _int8_error(context: PlanningContext, network: nn.Module) -> float:
    """The error of a whole network in INT8 on the images that judge; its ranges are those of the others.

    Raises:
        UnsupportedModel: It cannot be quantised, or its file has a fixed batch size.
    """
    assert context.held is not None
    example, seam = context.anatomy.traced.example, context.anatomy.seam
    images = min(_RANGES, count(context.held.fit))
    few = subset(context.held.fit, [i % images for i in range(images + images % 2)])  # in pairs
    batches = list(plain_batches(few, 2, torch.device("cpu"), torch.float32))
    with tempfile.TemporaryDirectory(prefix="mimicut") as folder:
        made = export(network, example, folder, formats=("int8",), calibrate=batches)
        if made.static is not None:
            raise UnsupportedModel(f"weighing INT8: its file has a fixed batch size ({made.static})")
        ready, call, program = traced_as_exported(network, example, ("batch",))
        rounded = TrainableInt8(made.files["int8"], ready, call, program, seam).network
    device = device_for(None, context.teacher)
    rounded.create_tensors_on(device)
    rounded = rounded.to(device)
    return finite(context.held.judge.error(rounded, seam=rounded.seam))
