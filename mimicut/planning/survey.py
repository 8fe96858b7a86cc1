"""Measurements that serve any number of budgets: what blocks cost and save, and how fast a runtime is."""

from collections.abc import Callable, Iterator, Sequence
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
from mimicut.base.errors import InputError
from mimicut.planning.importance import Evidence
from mimicut.planning.limits import Pace
from mimicut.planning.planner import matches, plan_widths
from mimicut.planning.recoverability import Held, Recoverable, hold_out, recoverability
from mimicut.recovery.batches import Source
from mimicut.recovery.config import MimicConfig
from mimicut.runtime.latency import MeasuredLatency, Prepared, Setting, available, measure, prepare
from mimicut.surgery.budget import Budget
from mimicut.surgery.cut import drop_modules

MEASURED_SECONDS = 2.0  # to measure two networks; each further one adds half of it. Source: assumption.
Say = Callable[[str], None]


@dataclass(frozen=True)
class PlanningContext:
    """The context of planning: one teacher, its few images, and what a survey measured.

    Attributes:
        teacher, anatomy, few, views, seed, evidence: As given to `survey`.
        order: Blocks by their error at the seam relative to what they save, least first.
        held: The images on which trials are judged; None if no block may be dropped.
        recipe: The recipe by which mixtures with similar errors mimic for a few steps; None if they do not.
        max_memory: Bytes that passes of these trials may hold; None for the defaults of `recover`.
        setting: Where latency is measured; None, like all that follow, if it is not.
        pace: Predicted milliseconds of the MACs of each module.
        prepared: The teacher, loaded on the runtime.
        teacher_ms: The teacher's latency.
        spread: The teacher's latency over itself: median and quartiles.
    """

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
    prepared: Prepared | None = None
    teacher_ms: MeasuredLatency | None = None
    spread: tuple[float, float, float] | None = None
    max_memory: int | None = None
    _traced: dict[tuple[str, ...], Anatomy] = field(default_factory=dict, repr=False)

    def without(self, drop: tuple[str, ...]) -> Anatomy:
        """The anatomy without these blocks."""
        if drop and drop not in self._traced:
            device = next((t.device for t in guard.named_tensors(self.teacher).values()), None)
            example = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, self.anatomy.traced.example)
            self._traced[drop] = trace(self.teacher, example, self.anatomy.seam, drop=drop, whole=self.anatomy)
        return self._traced[drop] if drop else self.anatomy

    def close(self) -> None:
        """Unload the teacher from its runtime."""
        if self.prepared is not None:
            self.prepared.close()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a survey takes beside the network and its images. views, seed: of random views. evidence: as for
    `make_plan`. recipe, max_memory: as in `PlanningContext`."""

    views: str = "none"
    seed: int = 0
    evidence: Evidence | None = None
    recipe: MimicConfig | None = None
    max_memory: int | None = None


def setting_of(budget: Budget) -> Setting | None:
    """Where the budget's latency is measured; None if it has no latency.

    Raises:
        InputError: The runtime is not installed or not available.
    """
    latency = budget.latency
    if latency is None:
        return None
    threads = torch.get_num_threads() if latency.threads is None else latency.threads
    setting = Setting(latency.runtime, threads, latency.batch)
    reason = available(setting.runtime)
    if reason is not None:
        raise InputError(f"measuring latency on {setting.runtime}: {reason}")
    return setting


def survey(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    *,
    setting: Setting | None = None,
    depth: str = "auto",
    given: Findings | None = None,
    fixed: Callable[[str], bool] = lambda name: False,
    say: Say = lambda text: None,
) -> PlanningContext:
    """Measure what planning needs: what blocks cost and save, and how fast the runtime is.

    Args:
        teacher: The network that was traced.
        anatomy: The whole network, traced with all blocks.
        few: The images that decide which blocks matter.
        setting: Where latency is measured; None to measure nothing and to count the MACs that blocks save.
        depth: As in `Budget`; with "never" no block is considered.
        given: Views, seed, evidence, recipe and memory.
        fixed: Whether the module of that name must not change.
        say: Receives sentences about the progress.

    Raises:
        MimicutError: As `latency.prepare`.
    """
    given = given or Findings()
    blocks = [] if depth == "never" and setting is None else droppable(anatomy)
    pace, prepared, teacher_ms, spread = None, None, None, None
    if setting is not None:
        say(f"measuring the teacher and its blocks on {setting.runtime}")
        prepared = prepare(teacher, anatomy.traced.example, setting)
        try:
            pace, teacher_ms, spread, saved = _paced(teacher, anatomy, prepared, blocks, setting)
        except BaseException:
            prepared.close()
            raise
    else:
        saved = {b.name: macs_in(b.branch, anatomy.traced.batch) for b in blocks}
    blocks = [b for b in blocks if not any(fixed(module) for module, _ in b.dropped_modules)]
    order: tuple[Recoverable, ...] = ()
    held = None
    if depth != "never" and blocks:
        say(f"measuring on the images which of {len(blocks)} blocks can be spared")
        images: dict[str, Any] = {"views": given.views, "seed": given.seed}
        held = hold_out(teacher, anatomy, few, **images)
        found = recoverability(teacher, anatomy, few, blocks=blocks, held=held, **images)
        order = tuple(sorted(found, key=lambda r: r.error / max(saved[r.block], 1e-12)))
    return PlanningContext(
        teacher, anatomy, few, given.views, given.seed, given.evidence, order, held, given.recipe, setting, pace,
        prepared, teacher_ms, spread, given.max_memory,
    )  # fmt: skip


@contextmanager
def surveyed(
    teacher: nn.Module,
    anatomy: Anatomy,
    few: Source | Tensor,
    budget: Budget,
    given: Findings | None = None,
    say: Say = lambda text: None,
) -> Iterator[PlanningContext]:
    """`survey` for a budget and the blocks that it allows to drop; unloads the teacher from its runtime at the end.

    Raises:
        PlanError: A pattern matches nothing; raised before anything is measured.
        MimicutError: As `survey`.
    """
    setting = setting_of(budget)
    plan_widths(teacher, anatomy, replace(budget, keep=1.0, params=None, size_mb=None, keep_width=None))
    names = [name for name, _ in teacher.named_modules()]

    def fixed(dropped: str) -> bool:
        inside = [name for name in names if name == dropped or name.startswith(f"{dropped}.")]
        return any(matches(name, pattern) for name in inside for pattern in (*budget.exclude, *budget.pin))

    context = survey(
        teacher, anatomy, few, setting=setting, depth=budget.resolved_depth, given=given, fixed=fixed, say=say
    )
    try:
        yield context
    finally:
        context.close()


def _paced(
    teacher: nn.Module, anatomy: Anatomy, prepared: Prepared, blocks: Sequence[Block], setting: Setting
) -> tuple[Pace, MeasuredLatency, tuple[float, float, float], dict[str, float]]:
    """Measure how long the MACs of each module take, by leaving out one block of each kind.

    Returns:
        The pace, the teacher's latency, the teacher over itself, and the milliseconds that each block saves.
    """
    kinds: dict[Any, list[Block]] = {}
    for block in blocks:
        kinds.setdefault(_kind(anatomy, block), []).append(block)
    networks: dict[str, Any] = {"teacher": prepared, "again": prepared}
    for of_kind in kinds.values():
        networks[of_kind[0].name] = drop_modules(guard.full_copy(teacher), of_kind[0].dropped_modules)
    example = anatomy.traced.example
    found = measure(networks, example, setting, seconds=MEASURED_SECONDS * (1 + len(kinds) / 2))
    own = found["teacher"]
    total, rates, saved = own.ms_median, {}, {}
    for of_kind in kinds.values():
        gain = max(0.0, 1 - found[of_kind[0].name].over(own)[0]) * total
        for block in of_kind:
            saved[block.name] = gain
    scale = min(1.0, 0.95 * total / max(sum(saved.values()), 1e-12))  # noise must not leave nothing for the rest
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
