"""Try a plan on copies: its error after the closed form, and after a few steps of mimicking."""

import math
from dataclasses import replace

from torch import nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base.errors import InputError, Stopped
from mimicut.planning.recoverability import FOLDS, ROWS, hold_out, trial_views
from mimicut.planning.survey import PlanningContext
from mimicut.recovery.closed_form import ClosedFormOptions, solve
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.layers import layers_to_solve
from mimicut.recovery.recover import recover
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan

SHORT = 50  # steps of a trial that mimics. Source: as TIE in `mixtures`.


def trial_error(context: PlanningContext, anatomy: Anatomy, plan: Plan) -> float:
    """Error of `plan` at the seam after the closed form, on images that it was not solved from."""
    held = context.held or hold_out(
        context.teacher, context.anatomy, context.few, views=context.views, seed=context.seed
    )
    student = cut(context.teacher, plan)
    todo = held.small(layers_to_solve(anatomy, plan, student), student)
    bare = held.judge.error(student)
    options = ClosedFormOptions(
        views=context.views, seed=context.seed, most_views=trial_views(context.anatomy), folds=FOLDS, rows=ROWS
    )
    solve(context.teacher, student, anatomy, todo, plan.slices, held.fit, options)
    return min(finite(bare), finite(held.judge.error(student)))


def mimicked_error(context: PlanningContext, plan: Plan, steps: int = SHORT) -> float:
    """Error at the seam after a short recovery by `context.recipe`, on images that it did not learn from (unless there
    are three or fewer); infinite if it diverges."""
    student = mimicked_student(context, plan, steps)
    assert context.held is not None
    return math.inf if student is None else finite(context.held.judge.error(student))


def mimicked_student(context: PlanningContext, plan: Plan, steps: int = SHORT) -> nn.Module | None:
    """The student after a short recovery by `context.recipe`, from the images of `context.held` that do not judge; None
    if it diverges."""
    assert context.recipe is not None
    assert context.held is not None
    student = cut(context.teacher, plan)
    config = replace(context.recipe, steps=steps, device=None)
    try:
        case = CutStudent(context.teacher, student, context.without(tuple(plan.drop)), plan)
        recover(case, context.held.fit, config, max_memory=context.max_memory)
    except Stopped:  # a trial leaves nothing to keep
        raise KeyboardInterrupt from None
    except InputError:  # the loss is not a number; if the teacher is the cause, the recovery itself will say so
        return None
    return student


def finite(error: float) -> float:
    """The error; infinite where it is not a number."""
    return error if math.isfinite(error) else math.inf
