"""Cheaper ways to recover the same cut from the same images, each on its own, to compare the result with."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mimicut.anatomy.find_seam import find_seam
from mimicut.anatomy.graph import Anatomy
from mimicut.base import guard
from mimicut.base.errors import MimicutError, UnsupportedModel
from mimicut.proof.figures import Figures
from mimicut.recovery.batches import Source, count
from mimicut.recovery.closed_form import ClosedFormOptions, closed_form
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.folds import batches_of
from mimicut.recovery.mimic import mimic
from mimicut.recovery.norms import VIEWS, refit_norms
from mimicut.surgery.cut import cut
from mimicut.surgery.head import put_under_head
from mimicut.surgery.plan import Plan
from mimicut.surgery.seam import Seam


def alternatives(
    teacher: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    few: Source | Tensor,
    config: MimicConfig,
    judge: Callable[[nn.Module], Figures],
    *,
    say: Callable[[str], None] = lambda text: None,
    max_memory: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield name, agreement with its interval, feature error and seconds of each cheaper way.

    The ways: the cut alone; batch norms re-estimated; the closed form alone; logits distilled; features mimicked as in
    MiR (the last two for `config.steps` steps). Ways that do not apply to this network are left out. If a way fails,
    its figures are None and "failed" holds the reason. The teacher is restored to its original state.

    Args:
        teacher: The network that was cut.
        anatomy: As `trace` reads it.
        plan: How it was cut.
        few: The images to learn from.
        config: The recipe; steps, views, seed, device, precision and layout are taken from it.
        judge: Measures a whole student on the held-out images.
        say: Receives a sentence for each way.
        max_memory: Bytes that passes may hold.
    """
    for name, run in _WAYS.items():
        say(f"alternative: {name}")
        student, begun = cut(teacher, plan), time.perf_counter()
        student = student.to(next((t.device for t in guard.named_tensors(teacher).values()), None))
        measured, failed = Figures(None, None, None, None, 0, ()), None
        try:
            if run(_Case(teacher, student, anatomy, plan, few, config, max_memory)) is False:
                continue
            seconds = time.perf_counter() - begun
            measured = judge(put_under_head(teacher, student, plan.seam))
        except MimicutError as error:  # the result itself is not affected
            seconds, failed = time.perf_counter() - begun, str(error)
            say(f"  {error}")
        yield {
            "name": name, "seconds": round(seconds, 2), "top1_agreement": measured.top1_agreement,
            "top1_agreement_low": measured.top1_agreement_low, "top1_agreement_high": measured.top1_agreement_high,
            "feature_error_relative": measured.feature_error_relative, "failed": failed,
        }  # fmt: skip


@dataclass(frozen=True)
class _Case(CutStudent):
    """The starting point of every way; each way changes `student`, the cut network."""

    few: Source | Tensor
    config: MimicConfig
    max_memory: int | None


def _nothing(*_: Any) -> None:
    pass


def _norms(case: _Case) -> bool:
    few, config = case.few, case.config
    batches, _, _ = batches_of(few, case.student, config.views, "none", config.seed, 1, max(count(few), VIEWS))
    return refit_norms(case.student, case.plan.seam.head, batches)


def _solved(case: _Case) -> bool:
    log = closed_form(
        case,
        case.few,
        ClosedFormOptions(views=case.config.views, seed=case.config.seed, max_memory=case.max_memory),
    )
    return bool(log.layers)


def _mimicked(case: _Case) -> bool:
    if case.config.steps:
        _mimic_at(case.plan.seam, case)
    return case.config.steps > 0


def _distilled(case: _Case) -> bool:
    """Mimic the network's output instead of its seam features; the head stays the teacher's."""
    if case.plan.seam.headless or not case.config.steps:
        return False
    try:
        output = find_seam(case.teacher, case.anatomy.traced.example, points=[":output"])
        _mimic_at(replace(output, head=case.plan.seam.head), case)
    except UnsupportedModel:  # its output is more than one tensor
        return False
    return True


def _mimic_at(seam: Seam, case: _Case) -> None:
    mimic(case.teacher, case.student, seam, case.few, _paper(case.config), max_memory=case.max_memory)


def _paper(config: MimicConfig) -> MimicConfig:
    return replace(
        PRESETS["paper"], steps=config.steps, views=config.views, seed=config.seed, device=config.device,
        precision=config.precision, layout=config.layout,
    )  # fmt: skip


_WAYS: dict[str, Callable[..., Any]] = {
    "the cut alone": _nothing,
    "batch norms alone": _norms,
    "closed form alone": _solved,
    "logits distilled": _distilled,
    "mimicked (MiR)": _mimicked,
}
