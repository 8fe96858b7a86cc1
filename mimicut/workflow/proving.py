"""Measure a student on held-out images, against cheaper ways, and on its runtime."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor, nn

from mimicut.base.errors import MimicutError, one_line
from mimicut.base.progress import SpokenProgress
from mimicut.inputs.image_set import ImageSet, ImagesWithCall
from mimicut.planning.latency_search import compare_latency, missed_latency
from mimicut.proof.detections import DetectionAccuracy
from mimicut.proof.figures import BATCH, Accuracy, Figures, accuracy, detection_accuracy, figures
from mimicut.recovery.training import MimicLog
from mimicut.runtime.latency import Setting
from mimicut.surgery.plan import Plan
from mimicut.surgery.seam import Seam
from mimicut.workflow.alternatives import alternatives
from mimicut.workflow.deciding import Network
from mimicut.workflow.intake import Intake
from mimicut.workflow.request import Request

Say = Callable[[str], None]


@dataclass
class Proof:
    """Figures on the held-out images, accuracy on the labelled ones, cheaper alternatives, and notes."""

    figures: Figures
    accuracy: Accuracy | DetectionAccuracy | None
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure_student(
    model: nn.Module, student: nn.Module, seam: Seam, intake: Intake, say: Say, batch_size: int = BATCH
) -> Proof:
    """Measure `student`, which is under the head of `model`, the teacher."""
    held_out = figures(
        model, student, seam, intake.bound(intake.held_out), batch_size=batch_size,
        on_progress=SpokenProgress(say, "held-out image"),
    )  # fmt: skip
    if intake.labelled is None:
        return Proof(held_out, None)
    progress = SpokenProgress(say, "labelled image")
    images = intake.bound(intake.labelled)
    return Proof(held_out, measured_accuracy(model, student, images, intake.labels, batch_size, progress))


def measured_accuracy(
    model: nn.Module,
    student: nn.Module,
    images: ImageSet | ImagesWithCall,
    labels: list[int] | list[Tensor],
    batch_size: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> Accuracy | DetectionAccuracy:
    """Measure both networks on labelled images: by the marked boxes where `labels` are tensors, else by class."""
    measure: Any = detection_accuracy if labels and isinstance(labels[0], Tensor) else accuracy
    return measure(model, student, images, labels, batch_size=batch_size, on_progress=on_progress)


def add_alternatives(
    proof: Proof, network: Network, plan: Plan, intake: Intake, request: Request, log: MimicLog, say: Say
) -> None:
    """Measure cheaper ways on the same cut, with as many steps; an interruption keeps those already measured."""
    same: dict[str, Any] = {"steps": len(log.losses), "precision": log.config.precision, "layout": log.config.layout}

    def judge(student: nn.Module) -> Figures:
        return figures(network.model, student, plan.seam, intake.bound(intake.held_out), batch_size=network.batch_size)

    ways = alternatives(
        network.model, network.anatomy, plan, intake.bound(intake.few), replace(request.config, **same), judge, say=say,
        max_memory=request.pass_bytes,
    )  # fmt: skip
    try:
        proof.alternatives.extend(ways)
    except KeyboardInterrupt:  # the result itself is not affected
        proof.notes.append("the alternatives were interrupted")
        say(proof.notes[-1])


def measure_latency(
    network: Network, student: nn.Module, plan: Plan, intake: Intake, say: Say
) -> tuple[dict[str, Any] | None, list[str]]:
    """Measure the latency of both networks if the plan has a latency target; return it with notes."""
    if plan.latency is None:
        return None, []
    say("measuring the latency of teacher and student")
    try:
        setting = plan.latency.setting
        where = Setting(*(setting[f.name] for f in fields(Setting)))
        latency = compare_latency(network.model, student, intake.example, where)
    except (MimicutError, KeyError, TypeError) as error:  # the plan is of another machine or edited
        return None, [f"the latency was not measured: {one_line(error)}"]
    missed = missed_latency(plan, latency)
    return latency, [] if missed is None else [missed]
