"""Turn figures into a report."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from mimicut.anatomy.cost import Cost
from mimicut.base.environment import platform_kind, versions
from mimicut.inputs.class_names import numbered
from mimicut.inputs.image_set import ImageSet, grey_picture, thumbnail
from mimicut.inputs.teacher import Teacher
from mimicut.proof.detections import DetectionAccuracy
from mimicut.proof.figures import Accuracy, Figures
from mimicut.proof.image_check import ImageCheck
from mimicut.recovery.training import MimicLog
from mimicut.results.report import Report
from mimicut.workflow.intake import Intake
from mimicut.workflow.proving import Proof
from mimicut.workflow.request import Request

_FIGURES = (
    "top1_agreement", "top1_agreement_low", "top1_agreement_high", "feature_error_relative", "feature_cosine",
    "confidence_teacher", "confidence_student", "images_held_out",
)  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Parameters and MACs of teacher and student."""

    teacher: Cost
    student: Cost


def report_of(
    teacher: Teacher,
    costs: Costs,
    proof: Proof,
    log: MimicLog,
    intake: Intake,
    looked: ImageCheck,
    request: Request,
    started: float,
    notes: Sequence[str],
) -> Report:
    """Fill the report of any student that mimicked. started: start of the run, by `time.perf_counter`."""
    return Report(
        params_teacher=costs.teacher.params,
        params_student=costs.student.params,
        macs_teacher=costs.teacher.macs,
        macs_student=costs.student.macs,
        macs_not_counted=tuple(f"{name} x{times}" for name, times in costs.student.uncounted.items()),
        **report_fields(proof.figures, intake.held_out),
        min_agreement=request.min_agreement,
        max_error=request.max_error,
        losses=thinned(log.losses),
        **accuracy_fields(proof.accuracy),
        images_few=len(intake.few),
        images_choose=len(intake.choose or ()),
        **_extra_fields(intake, log),
        image_hashes=intake.hashes if _extra_used(log) else {**intake.hashes, "extra": []},
        images_check=looked.to_json(),
        class_names=numbered(teacher.classes),
        steps=len(log.losses),
        seconds=time.perf_counter() - started,
        config={"mimic": log.config.to_json()},
        versions=versions(),
        platform=platform_kind(torch.get_num_threads(), request.config.device or "cpu"),
        notes=tuple(dict.fromkeys([*notes, *_untrained_notes(log), *_unused_extra_notes(intake, log)])),
    )


def _untrained_notes(log: MimicLog) -> list[str]:
    """A sentence where mimicking could not change a part of the network; else nothing."""
    if not log.untrained:
        return []
    return [
        f"not trained: {', '.join(log.untrained)}, as no gradient reaches them: forward cuts it off (torch.no_grad, "
        "detach), or they act past the seam; closed forms still solve them. Take that out of forward to train them"
    ]


def _unused_extra_notes(intake: Intake, log: MimicLog) -> list[str]:
    """A sentence where given pictures, or drawn ones that did harm, helped to do nothing; else nothing."""
    if intake.extra is None or _extra_used(log) or not (log.losses or intake.extra.pictures):
        return []
    why = "they made the student worse in the rehearsal" if log.losses else "nothing was mimicked"
    return [f"the extra images were not used: {why}"]


def _extra_used(log: MimicLog) -> bool:
    return bool(log.losses and log.extra)


def _extra_fields(intake: Intake, log: MimicLog) -> dict[str, Any]:
    if intake.extra is None or not _extra_used(log):
        return {}
    pictures = intake.extra.pictures
    fields = {"images_extra": len(intake.extra), "extra": "generated" if pictures is None else "given"}
    return fields if pictures is None else fields | {"pictures_extra": len(pictures)}


def accuracy_fields(found: Accuracy | DetectionAccuracy | None) -> dict[str, Any]:
    """The accuracy on labelled images as fields of the report; all of them None where there are none."""
    data: dict[str, Any] = {f.name: None for kind in (Accuracy, DetectionAccuracy) for f in fields(kind)}
    return data if found is None else data | vars(found)


def report_fields(found: Figures, held_out: ImageSet) -> dict[str, Any]:
    """The figures as fields of the report, with images by their names."""
    data = {name: getattr(found, name) for name in _FIGURES}
    data["outputs"] = tuple(asdict(each) for each in found.outputs)
    data["detections"] = None if found.detections is None else asdict(found.detections)
    data["agreement_by_class"] = {str(c): list(pair) for c, pair in found.agreement_by_class.items()}
    data["disagreements"] = tuple(
        {**each, "image": held_out.names[each["image"]], "thumbnail": thumbnail(held_out, each["image"])}
        for each in found.disagreements
    )
    data["feature_maps"] = tuple(
        {
            "image": held_out.names[each["image"]], "thumbnail": thumbnail(held_out, each["image"]),
            **{who: grey_picture(each[who]) for who in ("teacher", "student")},
        }
        for each in found.feature_maps
    )  # fmt: skip
    return data


def thinned(losses: Sequence[float], most: int = 200) -> tuple[tuple[int, float], ...]:
    """Thin out the losses to at most `most` pairs (step, mean loss since the previous pair).

    >>> thinned([3.0, 1.0, 2.0], most=2)
    ((2, 2.0), (3, 2.0))
    """
    each = max(1, -(-len(losses) // most))
    parts = [losses[i : i + each] for i in range(0, len(losses), each)]
    return tuple((i * each + len(part), sum(part) / len(part)) for i, part in enumerate(parts))
