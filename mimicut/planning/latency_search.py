"""Plans that meet a latency: predicted, measured on the runtime beside the teacher, and corrected until one fits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mimicut.planning.candidates import Candidate, candidate_for
from mimicut.planning.survey import MEASURED_SECONDS, PlanningContext, Say
from mimicut.runtime.latency import MeasuredLatency, Prepared, Setting, measure, prepare
from mimicut.surgery.budget import Budget
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan, PlannedLatency

TRIES = 7  # most students that are measured. Source: assumption, for time.
NEAR, AIM = 0.95, 0.975  # shares of the target: close enough, and the aim of a correction. Source: assumption.
OVER = 1.03  # share of the target that still counts as met if none below is found. Source: precision of measurement.
UNDER = 0.92  # share of the target below which a student is smaller than it need be. Source: assumption.
_PRECISION = 0.01  # standard error of a share close to the target. Source: assumption.
_NOISY = 0.03  # spread of the teacher against itself above which a note says so. Source: assumption.


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan, with the measurements of its student.

    Attributes:
        plan: The plan.
        error: Squared error at the seam after the closed form, over the teacher's squared deviation, on images that it
            was not solved from; None if it was not tried.
        share: Latency over the teacher's, measured in turn: median and quartiles.
        student_ms: The student's latency.
        tries: (blocks dropped, MACs, share) of the students that were measured.
    """

    plan: Plan
    error: float | None = None
    share: tuple[float, float, float] | None = None
    student_ms: MeasuredLatency | None = None
    tries: tuple[tuple[int, int, float], ...] = ()


def median_share(measured: MeasuredPlan) -> float:
    """Its latency over the teacher's."""
    assert measured.share is not None
    return measured.share[0]


class _Search:
    """The limits tried so far, the students they gave, and the next limit to try."""

    def __init__(self, context: PlanningContext, target: float):
        self._context, self._target = context, target
        assert context.teacher_ms is not None  # as a latency is asked for
        self.wanted = target / context.teacher_ms.ms_median
        self._low, self._high, self.limit = 0.0, math.inf, target
        self._best: MeasuredPlan | None = None
        self._nearest: MeasuredPlan | None = None
        self._seen: dict[str, float] = {}
        self._points: list[tuple[float, float]] = []
        self._tries: list[tuple[int, int, float]] = []

    def loosen(self) -> None:
        """Raise the limit, since no plan was within it."""
        self._low = max(self._low, self.limit)
        self.limit = (self._low + min(self._high, 4 * self._target)) / 2

    def measured(self, made: Candidate, say: Say) -> bool:
        """Measure a candidate, unless one with its widths was measured; False if the search can get no closer."""
        key = str(sorted(made.plan.widths.items()))
        if key not in self._seen:
            student_ms, share = measure_student(self._context, made.plan, self.wanted)
            self._seen[key] = share[0] / self.wanted
            self._tries.append((len(made.drop), made.plan.macs["student"], round(share[0], 4)))
            say(f"  measured {student_ms.ms_median:.3f} ms, {share[0]:.3f} of the teacher's; target {self.wanted:.3f}")
            if self._nearest is None or share[0] < median_share(self._nearest):
                self._nearest = MeasuredPlan(made.plan, None, share, student_ms)
            if self._seen[key] <= 1 and (self._best is None or share[0] > median_share(self._best)):
                self._best = MeasuredPlan(made.plan, None, share, student_ms)
        elif self._high - self._low < 0.01 * self._target or self._is_whole(made):
            return False
        return self._adjust(self._seen[key])

    def _is_whole(self, made: Candidate) -> bool:
        return all(width == self._context.anatomy.groups[name].width for name, width in made.plan.widths.items())

    def _adjust(self, value: float) -> bool:
        """Set the next limit after a student took `value` times the target; False if that is close enough."""
        if NEAR <= value <= 1:
            return False
        if value <= 1:
            self._low = max(self._low, self.limit)
        else:
            self._high = min(self._high, self.limit)
        self._points.append((self.limit, value))
        limit = _corrected(self._points)
        if not self._low < limit < self._high:
            limit = (self._low + self._high) / 2 if self._high < math.inf else self._low * 1.1
        self.limit = limit
        return True

    def found(self) -> MeasuredPlan | None:
        best = self._best
        if best is None and self._nearest is not None and median_share(self._nearest) <= OVER * self.wanted:
            best = self._nearest
        return None if best is None else replace(best, tries=tuple(self._tries))


def meet_latency(
    context: PlanningContext, start: Candidate, target: float, budget: Budget, say: Say
) -> MeasuredPlan | None:
    """Measure students, and correct the prediction, until one takes `target` milliseconds; None if none does."""
    search = _Search(context, target)
    for _ in range(TRIES):
        limit = search.limit
        made = start if limit == target else candidate_for(context, start.drop, limit, budget, start.widths)
        if made is None:
            search.loosen()
        elif not search.measured(made, say):
            break
    return search.found()


def _corrected(points: Sequence[tuple[float, float]]) -> float:
    """The next limit to plan for, from pairs (limit, measured share of the target).

    It is found in proportion, or on the line through the last two points, since part of the time does not depend on
    widths; a step on that line is at most the cube of the proportional step.
    """
    (limit, value), before = points[-1], points[-2] if len(points) > 1 else None
    step = AIM / value
    found = limit * step
    if before is not None and (value - before[1]) * (limit - before[0]) > 0:
        found = limit + (AIM - value) * (limit - before[0]) / (value - before[1])
    low, high = sorted((limit * step, limit * step**3))
    return min(max(found, low), high)


def measure_student(
    context: PlanningContext, plan: Plan, wanted: float = math.inf
) -> tuple[MeasuredLatency, tuple[float, float, float]]:
    """Measure the student's latency, and its share of the teacher's, in turn; if the share is close to `wanted`, for
    longer."""
    example, setting = context.anatomy.traced.example, context.setting
    assert setting is not None  # as a latency is asked for
    assert context.prepared is not None
    student = prepare(cut(context.teacher, plan), example, setting)
    try:
        networks = {"teacher": context.prepared, "student": student}
        found = measure(networks, example, setting, seconds=MEASURED_SECONDS)
        share = found["student"].over(found["teacher"])
        if UNDER <= share[0] / wanted <= 2 - UNDER:
            found = measure(networks, example, setting, seconds=2 * MEASURED_SECONDS, precision=_PRECISION)
            share = found["student"].over(found["teacher"])
    finally:
        student.close()
    return found["student"], share


def nearest_reachable(context: PlanningContext, target: float, blocks: Sequence[str], budget: Budget) -> str:
    """The message for a target that no student meets, with the latency of the smallest student."""
    only_widths: dict[str, Any] = {"params": None, "size_mb": None, "latency": None, "depth": None}
    only_widths["scheme"] = "all" if budget.scheme == "auto" else budget.scheme
    every = tuple(blocks)
    least = None
    if budget.resolved_depth != "only":
        least = candidate_for(context, every, None, replace(budget, keep=None, keep_width=0.01, **only_widths))
    if least is None:  # no width may be cut
        least = candidate_for(context, every, None, replace(budget, keep=1.0, **only_widths), widths=False)
    smallest = ""
    if least is not None:
        ms, share = measure_student(context, least.plan)
        ways = ["every droppable block dropped"] if every else []
        ways += ["every width at its least"] if least.plan.widths else []
        smallest = f"; with {' and '.join(ways) or 'nothing cut'} the student took {ms.ms_median:.3f} ms"
        smallest += f" ({share[0]:.2f} of the teacher's)"
    assert context.setting is not None  # as a latency is asked for
    assert context.teacher_ms is not None
    own = context.teacher_ms.ms_median
    return (
        f"making a plan: {target:.3f} ms on {context.setting.runtime} is out of reach: the teacher takes {own:.3f} ms"
        f"{smallest}; allow more time, or name another runtime"
    )


def with_latency(context: PlanningContext, found: MeasuredPlan, target: float) -> Plan:
    """The plan, with its measurements added."""
    teacher, student, share, spread = context.teacher_ms, found.student_ms, found.share, context.spread
    assert context.setting is not None
    assert teacher is not None
    assert student is not None
    assert share is not None
    assert spread is not None
    measured = PlannedLatency(
        setting=context.setting.to_json(),
        wanted_share=round(target / teacher.ms_median, 4),
        teacher_ms=round(teacher.ms_median, 4),
        student_ms=round(student.ms_median, 4),
        measured_share=(round(share[0], 4), round(share[1], 4), round(share[2], 4)),
        spread=(round(spread[0], 4), round(spread[1], 4), round(spread[2], 4)),
        tries=found.tries,
    )
    notes = list(found.plan.notes)
    _, low, high = spread
    if max(1 - low, high - 1) > _NOISY:
        notes.append(
            f"this machine is noisy: the teacher measured against itself spreads from {low:.2f} to {high:.2f} "
            "(quartiles)"
        )
    return replace(found.plan, latency=measured, notes=notes)


def missed_latency(plan: Plan, latency: Mapping[str, Any]) -> str | None:
    """A note if the last measurement is above the target, else None."""
    assert plan.latency is not None
    wanted = plan.latency.wanted_share
    if latency["share"] <= OVER * wanted:
        return None
    return (
        f"measured again at the end, the student took {latency['share']:.2f} of the teacher's latency; the target of "
        f"{wanted:.2f} was met during planning. The teacher measured against itself spreads from "
        f"{latency['spread_low']:.2f} to {latency['spread_high']:.2f} (quartiles); try again on a quieter machine"
    )


def compare_latency(teacher: nn.Module, student: nn.Module, example: Any, setting: Setting) -> dict[str, Any]:
    """Measure both latencies in turn, the teacher's always in float32, and the teacher against itself, for a report:
    milliseconds, and shares with their quartiles over the rounds."""
    prepared = prepare(teacher, example, replace(setting, precision="float32"))
    try:
        networks: dict[str, nn.Module | Prepared] = {"teacher": prepared, "again": prepared, "student": student}
        found = measure(networks, example, setting, seconds=2 * MEASURED_SECONDS, precision=_PRECISION)
    finally:
        prepared.close()
    share, spread = (found[name].over(found["teacher"]) for name in ("student", "again"))
    return {
        **setting.to_json(), "teacher_ms": found["teacher"].ms_median, "student_ms": found["student"].ms_median,
        **dict(zip(("share", "share_low", "share_high"), share, strict=True)),
        **dict(zip(("spread", "spread_low", "spread_high"), spread, strict=True)),
    }  # fmt: skip
