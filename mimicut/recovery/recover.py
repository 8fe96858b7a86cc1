"""Recover what a cut took: closed form, norms, a rehearsal, then mimic.

With images to choose by, each is kept only where they say so. Without, a rehearsal on some of the few images, set aside
for it alone, decides on the rate and on whether to mimic at all: training never leaves a student worse.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count as count_from
from math import isfinite
from typing import Any

from torch import Tensor, nn

from mimicut.base import guard, memory
from mimicut.base.errors import InputError, Stopped
from mimicut.base.progress import SpokenProgress
from mimicut.base.ranks import Ranks
from mimicut.recovery.batches import Source, WithExtra, count, images_in_batch, on_accelerator, plain_batches
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.closed_form import ClosedFormLog, ClosedFormOptions, closed_form
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.folds import batches_of
from mimicut.recovery.judge import Judge
from mimicut.recovery.mimic import check_ranks, check_same, mimic
from mimicut.recovery.norms import VIEWS, settle_norms
from mimicut.recovery.pair import Pair, device_for
from mimicut.recovery.precision_and_layout import describe_way
from mimicut.recovery.rehearsal import LONGER_SHARE, MOST_STEPS, Rehearsal, divide, rehearse, try_rates
from mimicut.recovery.rehearsal import VIEWS_SHARE as REHEARSED_VIEWS
from mimicut.recovery.settle_options import settle
from mimicut.recovery.training import MimicLog
from mimicut.recovery.view_budget import expected_seconds, measure_view_seconds, views_within

# Of fewer images none are set aside to choose by: of 50 every tenth costs 0.7 points, more than the choices gain, and
# the closed form chooses by cross-validation as it is. Source: measured on the demo's teachers (docs/LOG.md).
CHOOSE_FROM = 200
CHOOSE_SHARE = 0.1
# The shares of max_seconds that the evidence and the closed form may take at the most. Source: assumption.
EVIDENCE_SHARE, CLOSED_SHARE = 0.25, 0.5
REHEARSAL_SHARE = 0.2  # The share of the time left that a rehearsal may take. Source: assumption.
_PASSES = 3  # Forward passes of the teacher that a step takes as long as, for each image. Source: assumption.
_NO_RATE = 1e-12  # Rate of the steps that are only timed.
_TIMED_STEPS = 3
_BATCH = 64


@dataclass(frozen=True)
class Recovery:
    """What the recovery did.

    Attributes:
        mimic: The log of mimicking.
        closed_form: The log of the closed form; None if it was not run.
        errors: Squared error at the seam over the teacher's squared deviation, on the images to choose by: of the
            student as "cut", after "closed_form" and after "norms"; empty without such images.
        norms_share: The weight of the few images' own statistics in the batch norms.
        rehearsal: The rehearsal that decided on the rate (`rehearsal.Rehearsal`, as JSON); None if there was none.
    """

    mimic: MimicLog
    closed_form: ClosedFormLog | None = None
    errors: dict[str, float] | None = None
    norms_share: float | None = None
    rehearsal: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        closed = None if self.closed_form is None else self.closed_form.to_json()
        own = {name: getattr(self, name) for name in ("errors", "norms_share", "rehearsal")}
        return {"closed_form": closed, **own, **_log_fields(self.mimic)}


def _log_fields(log: MimicLog) -> dict[str, Any]:
    choose = [list(pair) for pair in log.errors]
    return {"choose": choose, "kept_step": log.kept, "step_seconds_tried": log.ways, "batch_parts": log.parts}


@guard.exact_float32()
def recover(
    case: CutStudent,
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
    ranks: Ranks | None = None,
) -> Recovery:
    """Bring a cut student back towards its teacher, in place.

    Args:
        case: The networks.
        few: Images to fit.
        config: How to mimic; with start "cut" only `mimic` runs, as the paper has it.
        choose: Images, none of `few`, that decide what is kept. Without them the closed form is kept as it is, batch
            norms keep the cut's statistics, and mimic its last step.
        on_stage: Called with a sentence about each stage.
        max_seconds: For all of it. The steps are as many as fit, by the pace of three; the closed form gets
            CLOSED_SHARE at the most.
        on_step: As of `mimic`.
        checkpoint: As of `mimic`; continuing starts where mimic was, with as many steps as had been decided on.
        on_checkpoint: As of `mimic`.
        max_memory: Bytes that the passes of a stage may hold.
        ranks: The processes that solve the closed form and mimic together, as of `closed_form` and `mimic`. All else is
            done by the first one alone, with its images to choose by, and shared.

    Returns:
        What was done.

    Raises:
        InputError: max_seconds is not a finite number from 0.
        Stopped: As `mimic` raises it; its log is a Recovery. And all else that `mimic` raises.
    """
    check_seconds(max_seconds)
    say = on_stage or (lambda text: None)
    check_ranks(config, ranks)
    few = on_accelerator(few, config.views, device_for(config.device, case.student))
    if ranks is not None:
        check_same(ranks, case.teacher, few)
        checkpoint = ranks.of_first(checkpoint)
        choose = choose if ranks.first else None
    if checkpoint is not None:
        before = _Before.from_checkpoint(checkpoint)
        config = replace(config, steps=checkpoint.data["steps"])
        say(f"continuing after {len(checkpoint.data['losses'])} of {config.steps} steps")
    elif ranks is None:
        before, config = _Preparation(case, few, choose, max_seconds, max_memory, say, None).prepare(config)
    else:
        found = None
        if ranks.first:
            found = _Preparation(case, few, choose, max_seconds, max_memory, say, ranks).prepare(config)
        # What the first one sends the others: how to solve, if it does, and then what it decided.
        while isinstance(decided := ranks.of_first(found), ClosedFormOptions):
            closed_form(case, few, decided, ranks=ranks)
        before, shared = decided
        config = replace(shared, device=config.device)
    few = before.images(few)
    on_part = on_checkpoint and (lambda part: on_checkpoint(before.added_to(part)))
    try:
        log = mimic(
            case.teacher, case.student, case.plan.seam, few, config, choose=choose, on_step=on_step,
            checkpoint=checkpoint, on_checkpoint=on_part, max_memory=max_memory, ranks=ranks,
        )  # fmt: skip
    except Stopped as stopped:
        done, here = before.recovery(stopped.log), before.added_to(stopped.checkpoint)
        raise Stopped(done, here, stopped.reason) from stopped
    return before.recovery(log)


def check_seconds(max_seconds: float | None) -> None:
    """Check a time limit.

    Raises:
        InputError: It is not a finite number of at least 0.
    """
    if max_seconds is not None and not (isfinite(max_seconds) and max_seconds >= 0):
        raise InputError(f"recovering: max_seconds is {max_seconds}, expected a finite number of at least 0")


def about(seconds: float) -> str:
    """A duration in words.

    >>> about(90.4), about(200)
    ('about 90 s', 'about 3 min')
    """
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


@dataclass(frozen=True)
class _Before:
    """What was done before mimicking, as in `Recovery`.

    ways: seconds of a trial's step in each precision and layout.
    """

    closed_form: ClosedFormLog | None = None
    errors: dict[str, float] | None = None
    norms_share: float | None = None
    ways: dict[str, float] = field(default_factory=dict)
    rehearsal: dict[str, Any] | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "_Before":
        data = checkpoint.data["before"]
        closed = data["closed_form"] and ClosedFormLog.from_json(data["closed_form"])
        return cls(closed, data["errors"], data["norms_share"], data.get("ways", {}), data.get("rehearsal"))

    def images(self, few: Source | Tensor) -> Source | Tensor:
        """What mimicking is to learn from: `few`, without extra images where the rehearsal left them out."""
        dropped = (self.rehearsal or {}).get("alone") is not None
        return few.few if dropped and isinstance(few, WithExtra) else few

    def added_to(self, checkpoint: Checkpoint) -> Checkpoint:
        before = vars(self) | {"closed_form": self.closed_form and self.closed_form.to_json()}
        return replace(checkpoint, data=checkpoint.data | {"before": before})

    def recovery(self, log: MimicLog) -> Recovery:
        log = replace(log, ways=self.ways)
        return Recovery(log, self.closed_form, self.errors, self.norms_share, self.rehearsal)


class _Preparation:
    """Everything before mimicking, within the time limit."""

    def __init__(
        self,
        case: CutStudent,
        few: Source | Tensor,
        choose: Source | Tensor | None,
        max_seconds: float | None,
        max_memory: int | None,
        say: Callable[[str], None],
        ranks: Ranks | None,
    ):
        self._case, self._few, self._choose, self._say, self._ranks = case, few, choose, say, ranks
        self._processes = 1 if ranks is None else ranks.count
        self._max_seconds, self._max_memory, self._begun = max_seconds, max_memory, time.perf_counter()

    def _seconds_left(self) -> float | None:
        return None if self._max_seconds is None else self._max_seconds - (time.perf_counter() - self._begun)

    def prepare(self, config: MimicConfig) -> tuple[_Before, MimicConfig]:
        """Do everything before mimicking; return its record, and the config with everything decided."""
        say, solves = self._say, config.start == "closed_form"
        # The rehearsal without images to choose by starts from the cut, as it is now.
        cut = guard.full_copy(self._case.student) if solves and self._choose is None else None
        timed = solves or self._max_seconds is not None
        view_seconds = measure_view_seconds(self._case.teacher, self._few, config.views) if timed else 0.0
        before = self._solve(config, view_seconds) if solves else _Before()
        if config.steps and not self._has_time_to_mimic(config, view_seconds):
            say("there is no time left to mimic")
            config = replace(config, steps=0)
        if not config.steps:
            return before, config
        config, ways, step_seconds = self._settle(config)
        before = replace(before, ways=ways)
        if before.closed_form is not None:
            slower = self._expected(view_seconds, 1) / max(1e-9, self._expected(view_seconds, self._processes))
            rehearsal = self._rehearse(cut, config, before.closed_form, slower, step_seconds)
            if rehearsal is not None:
                before = replace(before, rehearsal=rehearsal.to_json())
                rate = rehearsal.rate
                assert config.lr is not None  # it is decided
                config = replace(config, lr=config.lr * rate) if rate else replace(config, steps=0)
        del cut
        memory.trim()
        left = self._seconds_left()
        if left is not None:
            config = replace(config, steps=max(0, min(config.steps, int(left / step_seconds))))
        few = before.images(self._few)
        beside = f" and {count(few.extra)} extra ones" if isinstance(few, WithExtra) else ""
        seconds = about(config.steps * step_seconds)
        say(f"mimicking {config.steps} steps on {count(self._few)} images{beside}, {seconds}")
        return before, config

    def _expected(self, view_seconds: float, processes: int) -> float:
        """Seconds of the closed form."""
        return expected_seconds(self._case.anatomy, self._case.plan, self._case.student, view_seconds, processes)

    def _solve(self, config: MimicConfig, view_seconds: float) -> _Before:
        """Run the closed form, and settle the norms if there are images to choose by."""
        case, say = self._case, self._say
        expected = self._expected(view_seconds, self._processes)
        most = None if self._max_seconds is None else CLOSED_SHARE * self._max_seconds
        most_views = None if most is None else views_within(most, view_seconds)
        if most is not None and not most_views:
            say("there is no time for the closed form")
            return _Before()
        say(f"solving the layers in closed form, {about(expected if most is None else min(expected, most))}")
        judge = None if self._choose is None else self._judge()
        errors = {} if judge is None else {"cut": judge.error(case.student)}
        start = [(t, t.detach().clone()) for t in guard.named_tensors(case.student).values()]
        options = ClosedFormOptions(
            views=config.views, seed=config.seed, max_seconds=most, most_views=most_views, max_memory=self._max_memory
        )
        if self._ranks is not None:
            self._ranks.of_first(options)  # for which the others wait
        closed = closed_form(case, self._few, options, ranks=self._ranks, on_layer=SpokenProgress(say, "layer"))
        memory.trim()
        if closed.unsolved:
            say(f"note: {closed.unsolved}")
        share = None
        if judge is not None:
            errors["closed_form"] = judge.error(case.student)
            if not errors["closed_form"] < errors["cut"]:
                guard.put_back(start)
            share = self._settle_norms(config, judge)
            errors["norms"] = judge.error(case.student)
        if closed.views_room < min(closed.images, closed.views_useful):
            say(
                f"for lack of memory the first layers were solved from only {closed.views_room} views of "
                f"{closed.images} images; with more (--max-memory) they see every image"
            )
        return _Before(closed, errors, share)

    def _settle_norms(self, config: MimicConfig, judge: Judge) -> float:
        student = self._case.student
        batches, _, _ = batches_of(self._few, student, config.views, "none", config.seed, 1, VIEWS)
        with guard.untouched(student):
            student.eval()
            return settle_norms(student, self._case.plan.seam.head, batches, lambda: judge.error(student))

    def _judge(self) -> Judge:
        assert self._choose is not None
        like = next(t for t in guard.named_tensors(self._case.student).values() if t.is_floating_point())
        batches = plain_batches(self._choose, _BATCH, like.device, like.dtype)
        return Judge(self._case.teacher, self._case.plan.seam, batches)

    def _has_time_to_mimic(self, config: MimicConfig, view_seconds: float) -> bool:
        """Whether there is time for more than the steps that are only timed."""
        images = sum(images_in_batch(self._few, config.batch_size, config.extra_share))
        step_seconds, left = _PASSES * images * view_seconds, self._seconds_left()
        return left is None or left >= 2 * (1 + _TIMED_STEPS) * step_seconds

    def _settle(self, config: MimicConfig) -> tuple[MimicConfig, dict[str, float], float]:
        """The config with everything decided, seconds of a trial's step in each precision and layout, and seconds of a
        step."""
        self._say("measuring the learning rate and the time of a step")
        progress, numbers = SpokenProgress(self._say, "trial step"), count_from(1)

        def on_trial_step(*_: float) -> None:
            progress(next(numbers), 0)

        case = self._case
        config, ways = settle(
            Pair.of(case.teacher, case.student, case.plan.seam), self._few, config, max_memory=self._max_memory,
            on_trial_step=on_trial_step,
        )  # fmt: skip
        self._say(describe_way(config.precision, config.layout, ways))
        memory.trim()
        step_seconds = self._measure_step(config, on_trial_step)
        memory.trim()
        return config, ways, step_seconds

    def _measure_step(self, config: MimicConfig, on_step: Callable[[int, int, float], None]) -> float:
        """Seconds of a step on one device's share of a batch, of a copy of the student; one step warms up, and what
        precedes a first step counts too."""
        case, share = self._case, -(-config.batch_size // self._processes)
        trial, config = guard.full_copy(case.student), replace(config, lr=_NO_RATE, batch_size=share)
        options: dict[str, Any] = {"max_memory": self._max_memory, "on_step": on_step}
        try:
            mimic(case.teacher, trial, case.plan.seam, self._few, replace(config, steps=1), **options)
            log = mimic(case.teacher, trial, case.plan.seam, self._few, replace(config, steps=_TIMED_STEPS), **options)
            return max(log.seconds / _TIMED_STEPS, 1e-6)
        except Stopped:
            raise KeyboardInterrupt from None  # a trial leaves nothing to keep

    def _rehearse(
        self, cut: nn.Module | None, config: MimicConfig, closed: ClosedFormLog, slower: float, step_seconds: float
    ) -> Rehearsal | None:
        """cut: the student before the closed form, which is changed; not needed with images to choose by. slower: how
        much longer the closed form takes one process, which rehearses alone."""
        case, few, say = self._case, self._few, self._say
        step_seconds *= self._processes  # as it rehearses alone
        left, cost = self._seconds_left(), REHEARSED_VIEWS * slower * closed.seconds + MOST_STEPS * step_seconds
        if self._choose is None and divide(few, config.seed) is None:
            say(f"not rehearsing: {count(few)} images are too few, or too similar, to set some aside")
            return None
        if left is not None and cost >= REHEARSAL_SHARE * left:
            say("there is no time to rehearse")
            return None
        longer = left is None or cost + LONGER_SHARE * config.steps * step_seconds < REHEARSAL_SHARE * left
        say(f"rehearsing on images set aside, {about(cost)}")
        if self._choose is None:
            assert cut is not None
            found = rehearse(
                replace(case, student=cut), few, config, most_views=closed.views, longer=longer,
                max_memory=self._max_memory, say=say,
            )  # fmt: skip
        else:
            judge, images = self._judge(), count(self._choose)
            found = try_rates(judge, images, case, few, config, longer=longer, max_memory=self._max_memory, say=say)
        if found is not None:
            say(str(found))
        return found
