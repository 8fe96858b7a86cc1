"""Give back what the cut took: closed form, norms, a rehearsal, then mimic.

With images to choose by, each is kept only where they say so. Without, a rehearsal on some of the few images, left
aside for it alone, decides on the rate and on whether to mimic at all: training never leaves a student worse.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count as count_from
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base import guard, memory
from mimicut.base.errors import InputError, Stopped
from mimicut.base.progress import SpokenProgress
from mimicut.recovery.batches import Source, count, make_views, place_batch
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.closed_form import ClosedFormLog, closed_form
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.folds import batches_of
from mimicut.recovery.judge import Judge
from mimicut.recovery.mimic import MimicLog, mimic, settled
from mimicut.recovery.norms import VIEWS, settle_norms
from mimicut.recovery.rehearsal import MOST_STEPS, Rehearsal, parts_of, rehearse, tried_on
from mimicut.recovery.rehearsal import VIEWS_SHARE as REHEARSED_VIEWS
from mimicut.recovery.view_budget import expected_seconds
from mimicut.recovery.view_budget import measure_view_seconds as view_seconds
from mimicut.recovery.view_budget import views_within as views_for
from mimicut.recovery.ways import describe_way
from mimicut.surgery.plan import Plan

# Of fewer images none are set aside to choose by: of 50 every tenth costs 0.7 points, more than the choices gain, and
# the closed form chooses by cross-validation as it is. Source: measured on the demo's teachers (docs/LOG.md).
CHOOSE_FROM = 200
CHOOSE_SHARE = 0.1
# Of max_seconds, what may go into asking the images and into the closed form, at the most. Source: assumption.
EVIDENCE_SHARE, CLOSED_SHARE = 0.25, 0.5
REHEARSAL_SHARE = 0.2  # Of the time that is left, what a rehearsal may take. Source: assumption.
_PASSES = 3  # forward passes of the teacher that a step takes as long as, for each image. Source: assumption.
_STILL = 1e-12  # rate of the steps that are only timed
_PACED = 3  # steps that a trial takes to learn how long one is
_BATCH = 64


@dataclass(frozen=True)
class Recovery:
    """closed_form: what it did, None where it was not asked for. errors: squared error at the seam over the teacher's
    squared deviation, on the images to choose by, of the student as "cut", in "closed_form" and after "norms"; empty
    without such images. norms_share: of the few images' own statistics in the batch norms. rehearsal: what decided on
    the rate (`rehearsal.Rehearsal`, as JSON); None where nothing was rehearsed."""

    mimic: MimicLog
    closed_form: ClosedFormLog | None = None
    errors: dict[str, float] | None = None
    norms_share: float | None = None
    rehearsal: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        closed = None if self.closed_form is None else self.closed_form.to_json()
        own = {name: getattr(self, name) for name in ("errors", "norms_share", "rehearsal")}
        return {"closed_form": closed, **own, **_brief(self.mimic)}


def _brief(log: MimicLog) -> dict[str, Any]:
    choose = [list(pair) for pair in log.errors]
    return {"choose": choose, "kept_step": log.kept, "step_seconds_tried": log.ways, "batch_parts": log.parts}


def recover(
    teacher: nn.Module,
    student: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    choose: Source | Tensor | None = None,
    on_stage: Callable[[str], None] | None = None,
    max_seconds: float | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
    on_checkpoint: Callable[[Checkpoint], None] | None = None,
    max_memory: int | None = None,
) -> Recovery:
    """Bring `student`, the cut of `teacher` by `plan`, back towards the teacher, IN PLACE.

    few: images to fit. choose: images, none of `few`, that decide what is kept; without them the closed form is kept
    as it is, batch norms keep the cut's statistics, and mimic its last step. max_seconds: for all of it; the steps are
    as many as fit, by the pace of three; the closed form gets CLOSED_SHARE of it at most. max_memory: bytes that the
    passes of a stage may hold. config.start "cut": only `mimic` runs, as the paper has it. on_checkpoint, checkpoint:
    as in `mimic`; going on starts where mimic stood, with as many steps as had been decided on.
    Raises: as `mimic`; the log of Stopped is a Recovery.
    """
    check_seconds(max_seconds)
    say, begun = on_stage or (lambda text: None), time.perf_counter()
    closed, errors, share, tried, rehearsed = None, None, None, {}, None
    raw = guard.full_copy(student) if config.start == "closed_form" and checkpoint is None and choose is None else None
    timed = checkpoint is None and (config.start == "closed_form" or max_seconds is not None)
    a_view = view_seconds(teacher, few, config.views) if timed else 0.0
    if checkpoint is not None:
        done = checkpoint.data["before"]
        config = replace(config, steps=checkpoint.data["steps"])
        closed = done["closed_form"] and ClosedFormLog.from_json(done["closed_form"])
        errors, share, tried = done["errors"], done["norms_share"], done.get("ways", {})
        rehearsed = done.get("rehearsal")
        say(f"going on after {len(checkpoint.data['losses'])} of {config.steps} steps")
    elif config.start == "closed_form":
        expected = expected_seconds(anatomy, plan, student, a_view)
        most = None if max_seconds is None else CLOSED_SHARE * max_seconds
        if most is not None and not views_for(most, a_view):
            say("no time for the closed form")
        else:
            say(f"solving the layers in closed form, {about(expected if most is None else min(expected, most))}")
            closed, errors, share = _solved(
                teacher,
                student,
                anatomy,
                plan,
                few,
                config,
                choose,
                most,
                a_view,
                SpokenProgress(say, "layer"),
                max_memory,
            )
            if closed.views_room < min(closed.images, closed.views_useful):
                say(
                    f"the memory had room for {closed.views_room} views of {closed.images} images in the first layers "
                    "that were solved; with more of it (--max-memory) they see every image"
                )
    if config.steps and checkpoint is None and max_seconds is not None:
        # The trial that tells the pace takes steps too: none where there is no time for more than that.
        step = _PASSES * min(config.batch_size, count(few)) * a_view
        if max_seconds - (time.perf_counter() - begun) < 2 * (1 + _PACED) * step:
            say("no time to mimic")
            config = replace(config, steps=0)
    if config.steps and checkpoint is None:
        say("measuring how long a step is to be, and how long it takes")
        told_steps, trial_steps = SpokenProgress(say, "trial step"), count_from(1)

        def on_trial_step(*_: float) -> None:
            told_steps(next(trial_steps), 0)

        config, tried = settled(
            teacher, student, plan.seam, few, config, max_memory=max_memory, on_trial_step=on_trial_step
        )
        say(describe_way(config.precision, config.layout, tried))
        memory.trim()
        pace = _pace(teacher, student, plan, few, config, max_memory, on_trial_step)
        memory.trim()
        if closed is not None:
            left = None if max_seconds is None else max_seconds - (time.perf_counter() - begun)
            cost = REHEARSED_VIEWS * closed.seconds + MOST_STEPS * pace
            if choose is None and parts_of(few, config.seed) is None:
                say(f"{count(few)} images are too few, or too much alike, to rehearse on some of them")
            elif left is not None and cost >= REHEARSAL_SHARE * left:
                say("no time to rehearse")
            else:
                say(f"rehearsing on images left aside, {about(cost)}")
                found = _rehearsed(
                    teacher, student, raw, anatomy, plan, few, config, choose, closed.views, max_memory, say
                )
                if found is not None:
                    say(str(found))
                    rehearsed = found.to_json()
                    config = replace(config, lr=config.lr * found.rate) if found.rate else replace(config, steps=0)
        raw = None
        memory.trim()
        if max_seconds is not None:
            left = max_seconds - (time.perf_counter() - begun)
            config = replace(config, steps=max(0, min(config.steps, int(left / pace))))
        say(f"mimicking {config.steps} steps on {count(few)} images, {about(config.steps * pace)}")

    def whole(part: Checkpoint) -> Checkpoint:
        before = {"closed_form": closed and closed.to_json(), "errors": errors, "norms_share": share, "ways": tried}
        before["rehearsal"] = rehearsed
        return replace(part, data=part.data | {"before": before})

    try:
        log = mimic(
            teacher, student, plan.seam, few, config, choose=choose, on_step=on_step, checkpoint=checkpoint,
            on_checkpoint=on_checkpoint and (lambda part: on_checkpoint(whole(part))), max_memory=max_memory,
        )  # fmt: skip
    except Stopped as stopped:
        log = replace(stopped.log, ways=tried)
        raise Stopped(Recovery(log, closed, errors, share, rehearsed), whole(stopped.checkpoint)) from stopped
    return Recovery(replace(log, ways=tried), closed, errors, share, rehearsed)


def check_seconds(max_seconds: float | None) -> None:
    """Raises: InputError."""
    if max_seconds is not None and not (isfinite(max_seconds) and max_seconds >= 0):
        raise InputError(f"recovering: max_seconds is {max_seconds}, expected a finite number of 0 or more")


def _solved(
    teacher: nn.Module,
    student: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    choose: Source | Tensor | None,
    max_seconds: float | None,
    a_view: float,
    on_layer: Callable[[int, int], None],
    max_memory: int | None,
) -> tuple[ClosedFormLog, dict[str, float], float | None]:
    """The closed form, and norms, where there are images to choose by."""
    judge = None if choose is None else _judge(teacher, student, plan, choose)
    errors = {} if judge is None else {"cut": judge.error(student)}
    start = [(t, t.detach().clone()) for t in guard.named_tensors(student).values()]
    closed = closed_form(
        teacher, student, anatomy, plan, few, views=config.views, seed=config.seed, max_seconds=max_seconds,
        most_views=None if max_seconds is None else views_for(max_seconds, a_view), on_layer=on_layer,
        max_memory=max_memory,
    )  # fmt: skip
    memory.trim()
    if judge is None:
        return closed, errors, None
    errors["closed_form"] = judge.error(student)
    if not errors["closed_form"] < errors["cut"]:
        guard.put_back(start)
    batches, _, _ = batches_of(few, student, config.views, "none", config.seed, 1, VIEWS)
    with guard.untouched(student):
        student.eval()
        share = settle_norms(student, plan.seam.head, batches, lambda: judge.error(student))
    errors["norms"] = judge.error(student)
    return closed, errors, share


def _rehearsed(
    teacher: nn.Module,
    student: nn.Module,
    raw: nn.Module | None,
    anatomy: Anatomy,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    choose: Source | Tensor | None,
    views: int,
    max_memory: int | None,
    say: Callable[[str], None],
) -> Rehearsal | None:
    """raw: the student before the closed form, which is changed; not needed with images to choose by."""
    if choose is None:
        return rehearse(teacher, raw, anatomy, plan, few, config, most_views=views, max_memory=max_memory, say=say)
    judge = _judge(teacher, student, plan, choose)
    return tried_on(judge, count(choose), teacher, student, plan, few, config, max_memory, say)


def _pace(
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    max_memory: int | None,
    on_step: Callable[[int, int, float], None],
) -> float:
    """Seconds a step, of a copy of the student; one step warms up, and what comes before a first step counts too."""
    trial, config = guard.full_copy(student), replace(config, lr=_STILL)
    try:
        options = {"max_memory": max_memory, "on_step": on_step}
        mimic(teacher, trial, plan.seam, few, replace(config, steps=1), **options)
        log = mimic(teacher, trial, plan.seam, few, replace(config, steps=_PACED), **options)
        return max(log.seconds / _PACED, 1e-6)
    except Stopped:
        raise KeyboardInterrupt from None  # of the trial there is nothing to keep


def about(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


def _judge(teacher: nn.Module, student: nn.Module, plan: Plan, choose: Source | Tensor) -> Judge:
    like = next(t for t in guard.named_tensors(student).values() if t.is_floating_point())
    batches = []
    for start in range(0, count(choose), _BATCH):
        indices = list(range(start, min(start + _BATCH, count(choose))))
        batches.append(place_batch(make_views(choose, indices, "none", torch.Generator()), like.device, like.dtype))
    return Judge(teacher, plan.seam, batches)
