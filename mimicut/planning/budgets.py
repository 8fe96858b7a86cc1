"""Plans that mix depth and width to lose least within a budget, and meet a latency that is measured.

Which blocks go, and how much width, is chosen by the few images: blocks in the order of what they cost the seam for
what they save (`recoverability`), the widths of the rest as `planner` has them. Of the candidates, from width alone to
depth alone, the one is taken of which the closed form leaves the least error on images that it was not solved from. Of
small networks those that come near it mimic for a few steps first, as training makes good for one more than for
another. Time is first predicted by what the blocks were measured to take; then the student itself is measured on its
runtime beside the teacher, and the prediction corrected, until it fits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.cost import count_traced, macs, macs_in
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.graph import Anatomy, Block
from mimicut.anatomy.tracing import operator, shape
from mimicut.base import guard
from mimicut.base.errors import InputError, OutOfReach, PlanError, Stopped, UnsupportedModel
from mimicut.planning.limits import Pace
from mimicut.planning.planner import make_plan, matches
from mimicut.planning.recoverability import FOLDS, ROWS, VIEWS, Held, Recoverable, hold_out, recoverability, trial_views
from mimicut.planning.scores import Evidence
from mimicut.recovery.batches import Source, count
from mimicut.recovery.closed_form import solve, to_solve
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.recover import recover
from mimicut.runtime.divisors import width_divisor
from mimicut.runtime.latency import Latency, Prepared, Setting, available, measure, prepare
from mimicut.surgery.cut import cut, drop_modules
from mimicut.surgery.plan import Plan

DEPTHS = ("never", "auto", "only")
# Candidates that are tried with the closed form, width alone and depth alone among them: of small networks, and of
# those of which a trial sees fewer views. Source: assumption, for time.
CANDIDATES, CANDIDATES_LARGE = 5, 3
TRIES = 7  # students that are measured at the most. Source: assumption, for time.
NEAR, AIM = 0.95, 0.975  # of the target: near enough, and what a correction aims at. Source: assumption.
OVER = 1.03  # of the target: still met where nothing under it is found. Source: the precision of a measurement.
# A mixture that is predicted to lose so many times what another one was found to lose is not tried: predictions are
# sums over blocks and widths, each alone, and what a solution makes good for lies below them. Source: assumption.
HOPELESS = 4.0
# Candidates whose error is below so many times the least mimic for so many steps, and the least error then is taken;
# where one candidate's steps, teacher and gradients included, are at most so many MACs. Source: measured on four pairs
# (docs/LOG.md): 50 steps ordered three as 400 did, the closed form two; how near and the MACs: assumption, for time.
TIE, SHORT, SHORT_MACS = 1.3, 50, 1e12
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the frontier
UNDER = 0.92  # of the target: a student below it gives away what was asked for. Source: assumption.
_SIZES = {"keep", "params", "size_mb"}  # budgets that may keep a student below its latency
_SECONDS = 2.0  # of a measurement of two networks; each further one takes half of that. Source: assumption.
_PRECISION = 0.01  # standard error of a share that is about what was asked for. Source: assumption.
_NOISY = 0.03  # by which the teacher may differ from itself before it is said. Source: assumption.

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlanningContext:
    """What is found out once, for any number of budgets. order: blocks by what they cost for what they save, least
    first. recipe: by which mixtures that are about as good mimic for a few steps; None where they do not. pace: of the
    runtime in `setting`, with the teacher loaded there and measured; None without one."""

    teacher: nn.Module
    anatomy: Anatomy
    few: Source | Tensor
    views: str
    seed: int
    evidence: Evidence | None
    order: tuple[Recoverable, ...]
    held: Held | None
    recipe: MimicConfig | None = None
    setting: Setting | None = None
    pace: Pace | None = None
    lead: Prepared | None = None
    teacher_ms: Latency | None = None
    spread: tuple[float, float, float] | None = None
    _traced: dict[tuple[str, ...], Anatomy] = field(default_factory=dict, repr=False)

    def without(self, drop: tuple[str, ...]) -> Anatomy:
        """The anatomy without these blocks."""
        if drop and drop not in self._traced:
            home = next((t.device for t in guard.named_tensors(self.teacher).values()), None)
            example = tree_map(lambda v: v.to(home) if isinstance(v, Tensor) else v, self.anatomy.traced.example)
            self._traced[drop] = trace(self.teacher, example, self.anatomy.seam, drop=drop, whole=self.anatomy)
        return self._traced[drop] if drop else self.anatomy


@dataclass(frozen=True)
class MeasuredPlan:
    """error: squared error at the seam over the teacher's squared deviation, which the closed form left on images that
    it was not solved from; None where nothing was tried. share: measured latency over the teacher's, in turn (median,
    quartiles). tries: (blocks dropped, MACs, share) of the students that were measured."""

    plan: Plan
    error: float | None = None
    share: tuple[float, float, float] | None = None
    student_ms: Latency | None = None
    tries: tuple[tuple[int, int, float], ...] = ()


def survey(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    setting: Setting | None = None,
    depth: str = "auto",
    views: str = "none",
    seed: int = 0,
    evidence: Evidence | None = None,
    recipe: MimicConfig | None = None,
    stay: Callable[[str], bool] = lambda name: False,
    say: Say = lambda text: None,
) -> PlanningContext:
    """What planning within budgets needs: what blocks cost and save, and how fast the runtime is.

    setting: where latency is measured; without one nothing is, and blocks save MACs. stay(module): whether it must not
    change. few, views, evidence: as for `make_plan`.
    Raises: PlanError for an unknown depth; as `runtimes.prepare`.
    """
    _check_depth(depth)
    blocks = [] if depth == "never" and setting is None else droppable(anatomy)
    pace, lead, own, spread = None, None, None, None
    if setting is not None:
        say(f"measuring the teacher and its blocks on {setting.runtime}")
        lead = prepare(teacher, anatomy.traced.example, setting)
        try:
            pace, own, spread, saved = _paced(teacher, anatomy, lead, blocks, setting)
        except BaseException:
            lead.close()
            raise
    else:
        saved = {b.name: macs_in(b.branch, anatomy.traced.batch) for b in blocks}
    blocks = [b for b in blocks if not any(stay(module) for module, _ in b.dropped_modules)]
    order, held = (), None
    if depth != "never" and blocks:
        say(f"asking the images which of {len(blocks)} blocks can be spared")
        held = hold_out(teacher, anatomy, few, views=views, seed=seed)
        found = recoverability(teacher, anatomy, few, views=views, seed=seed, blocks=blocks, held=held)
        order = tuple(sorted(found, key=lambda r: r.error / max(saved[r.block], 1e-12)))
    return PlanningContext(
        teacher, anatomy, few, views, seed, evidence, order, held, recipe, setting, pace, lead, own, spread
    )


def _paced(
    teacher: nn.Module, anatomy: Anatomy, lead: Prepared, blocks: Sequence[Block], setting: Setting
) -> tuple[Pace, Latency, tuple[float, float, float], dict[str, float]]:
    """How long the MACs of each module take: one block of each kind is left out and the rest measured.

    Returns also the teacher's latency, itself over itself, and the milliseconds that each block saves."""
    kinds: dict[Any, list[Block]] = {}
    for block in blocks:
        kinds.setdefault(_kind(anatomy, block), []).append(block)
    networks: dict[str, Any] = {"teacher": lead, "again": lead}
    for of_kind in kinds.values():
        networks[of_kind[0].name] = drop_modules(guard.full_copy(teacher), of_kind[0].dropped_modules)
    example = anatomy.traced.example
    found = measure(networks, example, setting, seconds=_SECONDS * (1 + len(kinds) / 2))
    own = found["teacher"]
    total, rates, saved = own.ms_median, {}, {}
    for of_kind in kinds.values():
        gain = max(0.0, 1 - found[of_kind[0].name].over(own)[0]) * total
        for block in of_kind:
            saved[block.name] = gain
    scale = min(1.0, 0.95 * total / max(sum(saved.values()), 1e-12))  # noise may not leave the rest with nothing
    for block in blocks:
        for node in block.branch:
            if macs(node) is not None:
                rates[anatomy.traced.where(node)] = (
                    scale * saved[block.name] / max(macs_in(block.branch, anatomy.traced.batch), 1.0)
                )
    inside = {node for block in blocks for node in block.branch}
    others = max(1.0, count_traced(anatomy.traced).macs - macs_in(inside, anatomy.traced.batch))
    rest = (total - scale * sum(saved.values())) / others
    return Pace(rates, rest), own, found["again"].over(own), saved


def _kind(anatomy: Anatomy, block: Block) -> Any:
    """Blocks of one kind compute the same on tensors of the same shapes."""
    return tuple((operator(n), shape(n)) for n in anatomy.traced.nodes if n in block.branch)


def plan_within(
    known: PlanningContext,
    *,
    latency: float | None = None,
    latency_ms: float | None = None,
    depth: str = "auto",
    drop: Sequence[str] = (),
    say: Say = lambda text: None,
    **budget: Any,
) -> MeasuredPlan:
    """The plan that loses least within every budget that is given.

    latency: share of the teacher's, latency_ms: milliseconds, both measured as `known.setting` says. drop: blocks that
    go whatever they cost. depth: whether further blocks may go: "never", "auto", or "only", no widths then. budget:
    options of `make_plan`; without a divisor widths are multiples of what was measured to be worth it on the runtime.
    Raises: PlanError for budgets out of reach, naming the nearest that was found.
    """
    target = _target(known, latency, latency_ms)
    if target is not None and budget.get("divisor") is None:
        budget["divisor"] = width_divisor(known.setting)
    budget = {name: value for name, value in budget.items() if value is not None}
    order = [r for r in known.order if r.block not in drop] if depth != "never" else []
    try:
        ranked = _ranked(known, _candidates(known, order, tuple(drop), depth, target, budget), say)
        if target is None:
            found = [MeasuredPlan(candidate.plan, error) for error, candidate in ranked]
            return _decided(known, [each for each in found if each.error is not None] or found, say)
        found = _best_met(known, ranked, target, budget, say)
    except _NoneMet as none:
        raise OutOfReach(_unreachable(known, target, drop, order, depth, budget)) from none
    least = 0.0 if _SIZES & set(budget) else UNDER * target / known.teacher_ms.ms_median
    while len(found.plan.drop) > len(drop) and found.share[0] < least:
        # Depth alone is coarse: with one block more in the network, widths give the rest.
        fewer = _candidate(known, tuple(found.plan.drop[:-1]), target, budget, widths=depth != "only")
        again = None if fewer is None else _met(known, fewer, target, budget, say)
        if again is None or again.share[0] <= found.share[0]:
            break
        found = again
    return replace(found, plan=_told(known, found, latency, latency_ms, target))


def _best_met(
    known: PlanningContext,
    ranked: Sequence[tuple[float | None, "_Candidate"]],
    target: float,
    budget: Mapping[str, Any],
    say: Say,
) -> MeasuredPlan:
    """What loses least once its latency is met. What is met may be smaller than what was predicted, and lose more: then
    the next one is measured too, as long as it could be better. Raises: _NoneMet."""
    met: list[MeasuredPlan] = []
    tie = _tie(known)
    for place, (predicted, candidate) in enumerate(ranked):
        least = min((found.error for found in met if found.error is not None), default=None)
        if met and (predicted is None or least is None or predicted >= tie * least):
            break
        found = _met(known, candidate, target, budget, say)
        if found is None:
            continue
        error = predicted if found.plan.widths == candidate.plan.widths else None
        rivals = [other for other, _ in ranked[place + 1 :] if other is not None and other < HOPELESS * predicted]
        if error is None and (rivals or met):
            error = trial_error(known, known.without(candidate.drop), found.plan)
        met.append(replace(found, error=error))
    if not met:
        raise _NoneMet
    return _decided(known, met, say)


def _tie(known: PlanningContext) -> float:
    """How many times the least error is still near it: 1 where nothing is to mimic, or it would take too long."""
    if known.recipe is None or known.recipe.steps < SHORT:
        return 1.0
    batch = min(known.recipe.batch_size, count(known.few))
    cost = 4 * SHORT * batch * count_traced(known.anatomy.traced).macs
    return TIE if cost <= SHORT_MACS else 1.0


def _decided(known: PlanningContext, tried: Sequence[MeasuredPlan], say: Say) -> MeasuredPlan:
    """The one of the least error, or of those that are near it the one that is best after a few steps."""
    if len(tried) == 1:
        return tried[0]
    first, tie = min(tried, key=lambda found: found.error), _tie(known)
    near = [found for found in tried if found.error <= tie * first.error]
    if tie == 1 or len(near) == 1 or not math.isfinite(first.error):
        return first
    say(f"mimicking with {len(near)} mixtures that are about as good, {SHORT} steps each")
    errors = []
    for found in near:
        errors.append(mimicked_error(known, found.plan))
        say(f"  {len(found.plan.drop)} blocks less: error {errors[-1]:.3f}")
    return near[errors.index(min(errors))]


def mimicked_error(known: PlanningContext, plan: Plan, steps: int = SHORT) -> float:
    """Error at the seam after a short recovery by `known.recipe`, on images that it did not learn from (unless there
    are three or fewer); infinite where it diverges."""
    student = cut(known.teacher, plan)
    config = replace(known.recipe, steps=steps, device=None)
    try:
        recover(known.teacher, student, known.without(tuple(plan.drop)), plan, known.held.fit, config)
    except Stopped:  # of this trial nothing is to be kept
        raise KeyboardInterrupt from None
    except InputError:  # a loss that is no number: where it is the teacher's, the recovery itself will say so
        return math.inf
    return _finite(known.held.judge.error(student))


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf


class _NoneMet(Exception):
    """No candidate is within the budget."""


@dataclass(frozen=True)
class _Candidate:
    drop: tuple[str, ...]
    plan: Plan
    loss: float  # predicted
    widths: bool  # whether widths may go


def _candidate(
    known: PlanningContext, drop: tuple[str, ...], target: float | None, budget: Mapping[str, Any], widths: bool = True
) -> _Candidate | None:
    """None where no plan without these blocks meets the budget."""
    try:
        anatomy = known.without(drop)
    except UnsupportedModel:  # each of these can go, but not all together
        return None
    pin = list(budget.get("pin", ()))
    options = {**budget, "pin": pin if widths else ["*"]}
    try:
        plan = make_plan(
            known.teacher, anatomy, ms=target, pace=known.pace if target is not None else None,
            evidence=known.evidence, **options,
        )  # fmt: skip
    except OutOfReach:
        return None
    plan = replace(plan, asked={**plan.asked, "pin": pin})
    errors = {} if known.evidence is None else known.evidence.errors
    loss = sum(r.error for r in known.order if r.block in drop)
    loss += sum(float(errors[name][width]) for name, width in plan.widths.items() if width < len(errors.get(name, ())))
    return _Candidate(drop, plan, loss, widths)


def _candidates(
    known: PlanningContext,
    order: Sequence[Recoverable],
    drop: tuple[str, ...],
    depth: str,
    target: float | None,
    budget: Mapping[str, Any],
) -> list[_Candidate]:
    """From width alone to depth alone, one block more each; those of least predicted loss, and both ends."""
    found = []
    for number in range(len(order) + 1):
        gone = drop + tuple(r.block for r in order[:number])
        alone = _candidate(known, gone, target, budget, widths=False)
        made = alone or (None if depth == "only" else _candidate(known, gone, target, budget))
        if made is not None:
            found.append(made)
        if alone is not None:
            break
    if not found and target is not None:
        raise _NoneMet
    if not found:  # says what is nearest
        anatomy = known.without(drop + tuple(r.block for r in order))
        make_plan(known.teacher, anatomy, evidence=known.evidence, **budget)
        raise OutOfReach("making a plan: no blocks reach this budget by themselves; let widths go too (depth auto)")
    ends = [found[0], found[-1]] if len(found) > 1 else found
    most = CANDIDATES if trial_views(known.anatomy) == VIEWS else CANDIDATES_LARGE
    others = sorted((c for c in found if c not in ends), key=lambda c: c.loss)[: most - len(ends)]
    return [c for c in found if c in ends or c in others]


def _ranked(
    known: PlanningContext, candidates: Sequence[_Candidate], say: Say
) -> list[tuple[float | None, _Candidate]]:
    """Error that the closed form leaves, and the candidate; the least first. Last those that were not tried."""
    if len(candidates) == 1:
        return [(None, candidates[0])]
    say(f"trying up to {len(candidates)} mixtures of depth and width")
    found: list[tuple[float, _Candidate]] = []
    hopeless: list[tuple[None, _Candidate]] = []
    for candidate in sorted(candidates, key=lambda c: c.loss):
        if found and candidate.loss > HOPELESS * min(found, key=lambda pair: pair[0])[0]:
            hopeless.append((None, candidate))
            continue
        error = trial_error(known, known.without(candidate.drop), candidate.plan)
        say(f"  {len(candidate.drop)} blocks less, {candidate.plan.macs['student']:,} MACs: error {error:.3f}")
        found.append((error, candidate))
    # Of equals the one with fewer blocks first: what is not there takes no time.
    return [*sorted(found, key=lambda pair: (round(pair[0], 4), -len(pair[1].drop))), *hopeless]


def trial_error(known: PlanningContext, anatomy: Anatomy, plan: Plan) -> float:
    """Error at the seam that the closed form leaves of `plan`, on images that it was not solved from."""
    held = known.held or hold_out(known.teacher, known.anatomy, known.few, views=known.views, seed=known.seed)
    student = cut(known.teacher, plan)
    todo = held.small(to_solve(anatomy, plan, student), student)
    bare = held.judge.error(student)
    solve(
        known.teacher, student, anatomy, todo, plan.slices, held.fit, views=known.views, seed=known.seed,
        most_views=trial_views(known.anatomy), folds=FOLDS, rows=ROWS,
    )  # fmt: skip
    return min(_finite(bare), _finite(held.judge.error(student)))


def _target(known: PlanningContext, latency: float | None, latency_ms: float | None) -> float | None:
    """Milliseconds."""
    if latency is None and latency_ms is None:
        return None
    if known.setting is None:
        raise PlanError("making a plan: a latency is asked for, but no runtime is given to measure it on")
    more = f"; on {known.setting.runtime} the teacher takes {known.teacher_ms.ms_median:.3f} ms"
    _check_latencies({"latency": latency, "latency_ms": latency_ms}, more)
    own = known.teacher_ms.ms_median
    return min(math.inf if latency is None else latency * own, math.inf if latency_ms is None else latency_ms)


def _met(
    known: PlanningContext, start: _Candidate, target: float, budget: Mapping[str, Any], say: Say
) -> MeasuredPlan | None:
    """Measures students, and corrects the prediction, until one fits."""
    low, high, limit = 0.0, math.inf, target
    best: MeasuredPlan | None = None
    nearest: MeasuredPlan | None = None
    seen: dict[str, float] = {}
    points: list[tuple[float, float]] = []
    tries: list[tuple[int, int, float]] = []
    wanted = target / known.teacher_ms.ms_median
    for _ in range(TRIES):
        made = start if limit == target else _candidate(known, start.drop, limit, budget, start.widths)
        if made is None:
            low = max(low, limit)
            limit = (low + min(high, 4 * target)) / 2
            continue
        key = str(sorted(made.plan.widths.items()))
        if key not in seen:
            student_ms, share = _measured(known, made.plan, wanted)
            seen[key] = share[0] / wanted
            tries.append((len(made.drop), made.plan.macs["student"], round(share[0], 4)))
            say(f"  measured {student_ms.ms_median:.3f} ms, {share[0]:.3f} of the teacher's; wanted {wanted:.3f}")
            if nearest is None or share[0] < nearest.share[0]:
                nearest = MeasuredPlan(made.plan, None, share, student_ms)
            if seen[key] <= 1 and (best is None or share[0] > best.share[0]):
                best = MeasuredPlan(made.plan, None, share, student_ms)
        elif high - low < 0.01 * target or all(w == known.anatomy.groups[g].width for g, w in made.plan.widths.items()):
            break
        value = seen[key]
        if NEAR <= value <= 1:
            break
        low, high = (max(low, limit), high) if value <= 1 else (low, min(high, limit))
        points.append((limit, value))
        limit = _corrected(points)
        if not low < limit < high:
            limit = (low + high) / 2 if high < math.inf else low * 1.1
    if best is None and nearest is not None and nearest.share[0] <= OVER * wanted:
        best = nearest
    return None if best is None else replace(best, tries=tuple(tries))


def _corrected(points: Sequence[tuple[float, float]]) -> float:
    """The limit to plan for next, from (limit, measured share of the target): in proportion, or on the line through the
    last two, as part of the time is no width's; a step of the latter is at most three of the former."""
    (limit, value), before = points[-1], points[-2] if len(points) > 1 else None
    step = AIM / value
    found = limit * step
    if before is not None and (value - before[1]) * (limit - before[0]) > 0:
        found = limit + (AIM - value) * (limit - before[0]) / (value - before[1])
    low, high = sorted((limit * step, limit * step**3))
    return min(max(found, low), high)


def _measured(
    known: PlanningContext, plan: Plan, wanted: float = math.inf
) -> tuple[Latency, tuple[float, float, float]]:
    """The student's latency, and its share of the teacher's, measured in turn; where that is about `wanted`, what a
    second and longer measurement says."""
    example, setting = known.anatomy.traced.example, known.setting
    student = prepare(cut(known.teacher, plan), example, setting)
    try:
        networks = {"teacher": known.lead, "student": student}
        found = measure(networks, example, setting, seconds=_SECONDS)
        share = found["student"].over(found["teacher"])
        if UNDER <= share[0] / wanted <= 2 - UNDER:
            found = measure(networks, example, setting, seconds=2 * _SECONDS, precision=_PRECISION)
            share = found["student"].over(found["teacher"])
    finally:
        student.close()
    return found["student"], share


def _unreachable(
    known: PlanningContext,
    target: float,
    drop: Sequence[str],
    order: Sequence[Recoverable],
    depth: str,
    budget: Mapping[str, Any],
) -> str:
    every = (*drop, *(r.block for r in order))
    smallest = {name: value for name, value in budget.items() if name not in _SIZES}
    if smallest.get("scheme", "auto") == "auto":
        smallest["scheme"] = "all"
    least = None
    if depth != "only":
        least = _candidate(known, every, None, {**smallest, "keep_width": 0.01})
    if least is None:  # no width may go
        least = _candidate(known, every, None, {**smallest, "keep": 1.0}, widths=False)
    said = ""
    if least is not None:
        ms, share = _measured(known, least.plan)
        ways = ["all blocks dropped that can be"] if every else []
        ways += ["every width at its least"] if least.plan.widths else []
        said = f"; with {' and '.join(ways) or 'nothing that could go'} it took {ms.ms_median:.3f} ms"
        said += f" ({share[0]:.2f} of the teacher's)"
    own = known.teacher_ms.ms_median
    return (
        f"making a plan: {target:.3f} ms on {known.setting.runtime} is out of reach: the teacher takes {own:.3f} ms"
        f"{said}; ask for more, or for another runtime"
    )


def _told(
    known: PlanningContext, found: MeasuredPlan, latency: float | None, latency_ms: float | None, target: float
) -> Plan:
    """The plan, with what was asked and measured in it."""
    told = {
        "share": latency, "ms": latency_ms, "wanted_share": round(target / known.teacher_ms.ms_median, 4),
        "setting": known.setting.to_json(),
        "teacher_ms": round(known.teacher_ms.ms_median, 4), "student_ms": round(found.student_ms.ms_median, 4),
        "measured_share": [round(v, 4) for v in found.share], "spread": [round(v, 4) for v in known.spread],
        "tries": [list(each) for each in found.tries],
    }  # fmt: skip
    notes = list(found.plan.notes)
    low, high = known.spread[1:]
    if max(1 - low, high - 1) > _NOISY:
        notes.append(
            f"this machine is noisy: the teacher measured against itself spreads from {low:.2f} to {high:.2f} "
            "(quartiles)"
        )
    return replace(found.plan, asked={**found.plan.asked, "ms": None, "latency": told}, notes=notes)


def mixes(budget: Mapping[str, Any]) -> bool:
    """Does this budget need more than `make_plan`: a latency, or a depth that the images choose?"""
    latency = any(budget.get(name) is not None for name in ("latency", "latency_ms", "runtime", "batch"))
    return latency or budget.get("depth") not in (None, "never")


MIXED = ("latency", "latency_ms", "runtime", "threads", "batch", "depth")  # what `make_plan` knows nothing of


# What a plan holds the answer to.
_CHOICES = {*_SIZES, "keep_width", "spare_ends", "drop", "pin", "exclude", "score", *MIXED} - {"threads"}


def _check_depth(depth: str) -> None:
    if depth not in DEPTHS:
        raise PlanError(f"making a plan: depth is {depth!r}, expected one of {', '.join(DEPTHS)}")


def _check_latencies(asked: Mapping[str, float | None], more: str = "") -> None:
    """more: what else is known, for the message."""
    for name, value in asked.items():
        if value is not None and not 0 < value < math.inf:
            what = "a share of the teacher's above 0" if name == "latency" else "milliseconds above 0"
            raise PlanError(f"making a plan: {name} is {value}, expected {what}{more}")


def check_mixed(budget: Mapping[str, Any]) -> Setting | None:
    """Call it before any work. Where latency is measured; None where none is asked for.

    Raises: PlanError and InputError for what is impossible, or needs what is not given or not installed.
    """
    found = {name: budget.get(name) for name in (*MIXED, "keep_width", "drop")}
    asked = {name: found[name] for name in ("latency", "latency_ms") if found[name] is not None}
    _check_latencies(asked)
    if found["depth"] is not None:
        _check_depth(found["depth"])
    if not asked and (found["runtime"] is not None or found["batch"] is not None):
        raise PlanError("making a plan: a runtime or batch is given without a latency; expected latency or latency_ms")
    if mixes(found) and found["keep_width"] is not None:
        raise PlanError("making a plan: keep_width says the widths itself; expected no latency and no depth beside it")
    if not asked:
        budgets = [name for name in _SIZES if budget.get(name) is not None]
        if mixes(found) and not budgets and not found["drop"]:
            raise PlanError(
                "making a plan: a depth is given without a budget; expected keep, params, size_mb or latency"
            )
        return None
    threads, batch = found["threads"], found["batch"]
    threads = torch.get_num_threads() if threads is None else threads
    setting = Setting(found["runtime"] or "torch", threads, 1 if batch is None else batch)
    reason = available(setting.runtime)
    if reason is not None:
        raise InputError(f"measuring latency on {setting.runtime}: {reason}")
    return setting


def check_beside_plan(**budget: Any) -> None:
    """Raises: PlanError for a budget, or a part of one, beside a plan, which says itself what stays."""
    plain = {"scheme": ("auto",), "min_channels": (1,), "divisor": (None, 1)}  # the defaults
    said = [n for n, v in budget.items() if n in plain and v not in plain[n]]
    said += [n for n, v in budget.items() if n in _CHOICES and v not in (None, False, (), [])]
    if said:
        raise PlanError(
            f"reading the plan: {', '.join(said)} given beside it; a plan says itself what stays: leave one of both out"
        )


def several(**options: Any) -> dict[str, dict[str, Any]]:
    """Name of a folder -> one budget. Of keep, latency and latency_ms, lists of values, one may have several: one
    budget each. With one budget the name is empty. Raises: PlanError where two have several."""
    lists = {name: list(options.pop(name) or []) for name in ("keep", "latency", "latency_ms")}
    fixed = {name: values[0] for name, values in lists.items() if len(values) == 1}
    many = {name: values for name, values in lists.items() if len(values) > 1}
    options = {name: value for name, value in {**options, **fixed}.items() if value is not None}
    if len(many) > 1:
        raise PlanError(f"making plans: {' and '.join(many)} have several values each, expected one that has")
    for name, values in many.items():
        if len(set(values)) < len(values):
            raise PlanError(f"making plans: {name} is given twice as {values}, expected different values")
        return {f"{name.replace('_', '-')}-{value:.12g}": {**options, name: value} for value in values}
    return {"": options}


def required(few: Any) -> Any:
    """Raises: PlanError where there are no images."""
    if few is None:
        raise PlanError("making a plan: which blocks go is said by images; give a few (--images DIR)")
    return few


def plan_by(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    latency: float | None = None,
    latency_ms: float | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    depth: str | None = None,
    views: str = "none",
    seed: int = 0,
    drop: Sequence[str] = (),
    evidence: Evidence | None = None,
    recipe: MimicConfig | None = None,
    say: Say = lambda text: None,
    **budget: Any,
) -> Plan:
    """`survey`, then `plan_within`, of one budget. anatomy: of the whole network; recipe: as for `survey`.

    runtime: by default "torch"; threads: by default as many as torch has; batch: by default 1.
    """
    mixed = {"latency": latency, "latency_ms": latency_ms, "runtime": runtime, "threads": threads, "batch": batch}
    setting = check_mixed({**mixed, "depth": depth, "drop": drop, **budget})
    depth = depth or ("auto" if setting else "never")
    facts = {"setting": setting, "depth": depth, "views": views, "seed": seed, "evidence": evidence, "say": say}
    with _learnt(teacher, anatomy, few, budget, recipe=recipe, **facts) as known:
        found = plan_within(
            known, latency=latency, latency_ms=latency_ms, depth=depth, drop=drop, say=say, seed=seed, **budget
        )
    return found.plan


def frontier_by(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    depth: str | None = None,
    views: str = "none",
    seed: int = 0,
    evidence: Evidence | None = None,
    say: Say = lambda text: None,
    **budget: Any,
) -> list[dict[str, Any]]:
    """`survey`, then `frontier`; of MACs where no runtime is named."""
    setting = None
    if runtime:
        setting = check_mixed({"runtime": runtime, "threads": threads, "batch": batch, "latency": 1.0, "depth": depth})
    depth = depth or "auto"
    facts = {"setting": setting, "depth": depth, "views": views, "seed": seed, "evidence": evidence, "say": say}
    with _learnt(teacher, anatomy, few, budget, **facts) as known:
        return frontier(known, depth=depth, say=say, seed=seed, **budget)


@contextmanager
def _learnt(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    budget: Mapping[str, Any],
    **facts: Any,
) -> Iterator[PlanningContext]:
    """`survey` with `facts`, of blocks that `budget` lets go; the teacher is let go of the runtime afterwards."""
    options = {name: value for name, value in budget.items() if name not in _SIZES | {"keep_width"}}
    make_plan(teacher, anatomy, keep=1, **{n: v for n, v in options.items() if v is not None})  # are they possible?
    kept = [*budget.get("exclude", ()), *budget.get("pin", ())]
    names = [name for name, _ in teacher.named_modules()]

    def stay(gone: str) -> bool:
        inside = [name for name in names if name == gone or name.startswith(f"{gone}.")]
        return any(matches(name, pattern) for name in inside for pattern in kept)

    known = survey(teacher, anatomy, few, stay=stay, **facts)
    try:
        yield known
    finally:
        if known.lead is not None:
            known.lead.close()


def missed(plan: Plan, latency: Mapping[str, Any]) -> str | None:
    """What is to be said where a last measurement is above what was asked for."""
    wanted = plan.asked["latency"]["wanted_share"]
    if latency["share"] <= OVER * wanted:
        return None
    return (
        f"measured again at the end, the student took {latency['share']:.2f} of the teacher's latency; {wanted:.2f} "
        "was asked for, and met when it was planned; the teacher over itself has quartiles of "
        f"{latency['spread_low']:.2f} and {latency['spread_high']:.2f}: try again on a quieter machine"
    )


def compared(teacher: nn.Module, student: nn.Module, example: Any, setting: Setting) -> dict[str, Any]:
    """Latency of both, measured in turn, and of the teacher over itself: for a report. Milliseconds, and shares with
    their quartiles over the rounds."""
    lead = prepare(teacher, example, setting)
    try:
        networks = {"teacher": lead, "again": lead, "student": student}
        found = measure(networks, example, setting, seconds=2 * _SECONDS, precision=_PRECISION)
    finally:
        lead.close()
    share, spread = (found[name].over(found["teacher"]) for name in ("student", "again"))
    return {
        **setting.to_json(), "teacher_ms": found["teacher"].ms_median, "student_ms": found["student"].ms_median,
        **dict(zip(("share", "share_low", "share_high"), share, strict=True)),
        **dict(zip(("spread", "spread_low", "spread_high"), spread, strict=True)),
    }  # fmt: skip


def frontier(
    known: PlanningContext,
    shares: Sequence[float] = SHARES,
    *,
    depth: str = "auto",
    say: Say = lambda text: None,
    **budget: Any,
) -> list[dict[str, Any]]:
    """What students of several sizes would lose: of each share of the latency, measured, or without a runtime of the
    MACs. error: as `MeasuredPlan.error`, predicted for the closed form alone; mimicking lowers it. Ends where no
    student is.
    """
    rows = []
    for share in shares:
        say(f"planning for {share:g} of the {'latency' if known.setting else 'MACs'}")
        try:
            asked = {"latency": share} if known.setting else {"keep": share}
            found = plan_within(known, **asked, depth=depth, say=say, **budget)
        except OutOfReach:
            if not rows:
                raise
            break
        error = found.error
        if error is None:
            error = trial_error(known, known.without(tuple(found.plan.drop)), found.plan)
        macs_share = found.plan.macs["student"] / found.plan.macs["teacher"]
        row = {"asked": share, "error": round(error, 4), "macs_share": round(macs_share, 4), "drop": found.plan.drop}
        if found.share is not None:
            ms = found.student_ms.ms_median
            row |= {"latency_share": round(found.share[0], 4), "latency_ms": round(ms, 4)}
        rows.append(row)
    return rows
