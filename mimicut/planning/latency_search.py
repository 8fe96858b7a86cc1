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

TRIES = 7  # students that are measured at the most. Source: assumption, for time.
NEAR, AIM = 0.95, 0.975  # of the target: near enough, and what a correction aims at. Source: assumption.
OVER = 1.03  # of the target: still met where nothing under it is found. Source: the precision of a measurement.
UNDER = 0.92  # of the target: a student below it gives away what was asked for. Source: assumption.
_PRECISION = 0.01  # standard error of a share that is about what was asked for. Source: assumption.
_NOISY = 0.03  # by which the teacher may differ from itself before it is said. Source: assumption.


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan, and what is known of its student.

    Args:
        plan: the plan.
        error: squared error at the seam over the teacher's squared deviation, which the closed form left on images that
            it was not solved from; None where nothing was tried.
        share: measured latency over the teacher's, in turn: median and quartiles.
        student_ms: its latency.
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
    """Limits that were tried, the students that they gave, and the next limit to try."""

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
        """No plan was within the limit."""
        self._low = max(self._low, self.limit)
        self.limit = (self._low + min(self._high, 4 * self._target)) / 2

    def measured(self, made: Candidate, say: Say) -> bool:
        """Measure a candidate, unless one of its widths was; False where the search cannot come nearer."""
        key = str(sorted(made.plan.widths.items()))
        if key not in self._seen:
            student_ms, share = measure_student(self._context, made.plan, self.wanted)
            self._seen[key] = share[0] / self.wanted
            self._tries.append((len(made.drop), made.plan.macs["student"], round(share[0], 4)))
            say(f"  measured {student_ms.ms_median:.3f} ms, {share[0]:.3f} of the teacher's; wanted {self.wanted:.3f}")
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
        """Set the next limit after a student took `value` times the target; False where that is near enough."""
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
    """Measures students, and corrects the prediction, until one takes `target` milliseconds; None where none does."""
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
    """The limit to plan for next, from (limit, measured share of the target): in proportion, or on the line through the
    last two, as part of the time does not depend on widths; a step on that line is at most three in proportion."""
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
    """The student's latency, and its share of the teacher's, measured in turn; where that is about `wanted`, what a
    second and longer measurement says."""
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
    """The message for a target that no student meets: what the smallest one took, with all these blocks dropped."""
    only_widths: dict[str, Any] = {"params": None, "size_mb": None, "latency": None, "depth": None}
    only_widths["scheme"] = "all" if budget.scheme == "auto" else budget.scheme
    every = tuple(blocks)
    least = None
    if budget.resolved_depth != "only":
        least = candidate_for(context, every, None, replace(budget, keep=None, keep_width=0.01, **only_widths))
    if least is None:  # no width may be cut
        least = candidate_for(context, every, None, replace(budget, keep=1.0, **only_widths), widths=False)
    said = ""
    if least is not None:
        ms, share = measure_student(context, least.plan)
        ways = ["all blocks dropped that can be"] if every else []
        ways += ["every width at its least"] if least.plan.widths else []
        said = f"; with {' and '.join(ways) or 'nothing cut'} it took {ms.ms_median:.3f} ms"
        said += f" ({share[0]:.2f} of the teacher's)"
    assert context.setting is not None  # as a latency is asked for
    assert context.teacher_ms is not None
    own = context.teacher_ms.ms_median
    return (
        f"making a plan: {target:.3f} ms on {context.setting.runtime} is out of reach: the teacher takes {own:.3f} ms"
        f"{said}; ask for more, or for another runtime"
    )


def with_latency(context: PlanningContext, found: MeasuredPlan, target: float) -> Plan:
    """The plan, with what was measured in it."""
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
    """A note where the last measurement is above what was asked for; None where it is not."""
    assert plan.latency is not None
    wanted = plan.latency.wanted_share
    if latency["share"] <= OVER * wanted:
        return None
    return (
        f"measured again at the end, the student took {latency['share']:.2f} of the teacher's latency; {wanted:.2f} "
        "was asked for, and met when it was planned; the teacher over itself has quartiles of "
        f"{latency['spread_low']:.2f} and {latency['spread_high']:.2f}: try again on a quieter machine"
    )


def compare_latency(teacher: nn.Module, student: nn.Module, example: Any, setting: Setting) -> dict[str, Any]:
    """Latency of both, measured in turn, and of the teacher over itself: for a report. Milliseconds, and shares with
    their quartiles over the rounds."""
    prepared = prepare(teacher, example, setting)
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
