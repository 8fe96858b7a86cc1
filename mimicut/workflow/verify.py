"""Measure a stored result against its teacher on other images."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from mimicut.base import memory
from mimicut.base.environment import platform_kind, versions
from mimicut.base.guard import exact_float32, memory_error
from mimicut.inputs.class_names import numbered
from mimicut.inputs.image_set import ImageSet, ImageSource, bind_call
from mimicut.inputs.input_source import recorded_inputs
from mimicut.proof.certificate import check_max_error, check_threshold
from mimicut.proof.figures import figures
from mimicut.proof.image_check import held_out_notes
from mimicut.proof.output_figures import check_fit
from mimicut.results.load_result import load_model
from mimicut.results.report import Report
from mimicut.results.store import digest_notes, read
from mimicut.results.teachers import code_of, load_again
from mimicut.surgery.head import check_head
from mimicut.surgery.plan import check_teacher
from mimicut.workflow.fill_report import accuracy_fields, report_fields
from mimicut.workflow.intake import labelled_images, measuring_images
from mimicut.workflow.proving import measured_accuracy


@exact_float32()
def verify_folder(
    folder: str | Path,
    images: ImageSource | ImageSet,
    *,
    teacher: str | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    labelled: ImageSource | ImageSet | None = None,
    device: str | None = None,
    min_agreement: float | None = None,
    max_error: float | None = None,
    max_memory: int | None = None,
) -> Report:
    """Measure a stored result against its teacher.

    Args:
        folder: The result.
        images: As `read_images` takes them.
        teacher: How to build the teacher, if the folder cannot say it ("file.py:build" is never run from a folder), or
            the result folder that was the teacher.
        weights, pretrained: Of the teacher, as in `load_teacher`.
        labelled: Images that measure accuracy, as a folder of class folders.
        device: Where to measure.
        min_agreement, max_error, max_memory: As in `compress`.

    Returns:
        The stored report, with new figures.

    Raises:
        LawBroken: The stored head is not this teacher's.
        StoreError, PlanError, InputError: As `load`.
    """
    started = time.perf_counter()
    memory_bytes = memory.bound(max_memory)
    check_threshold(min_agreement)
    check_max_error(max_error)
    plan, stored, _ = read(folder)
    check_fit(plan.seam, min_agreement, max_error, stored.detections is not None)
    source = plan.teacher.get("source") or {}
    model = load_model(folder, code_of(teacher))
    original = load_again(source, teacher, weights=weights, pretrained=pretrained)
    check_teacher(original.model, plan)
    check_head(original.model if original.whole is None else original.whole, model, plan.seam, original.part)
    model = model.get_submodule(original.part)
    inputs = recorded_inputs(plan.call)
    given = measuring_images(original, images, memory_bytes, inputs)
    trained = set(stored.learned_hashes) | set(source.get("result", {}).get("images", []))
    held_out, notes = _untrained(given.distinct(), trained, min_agreement)
    check_threshold(min_agreement, len(held_out))
    notes += [*held_out_notes(held_out), *digest_notes(folder)]
    images_labelled, labels = labelled_images(original, labelled, None, plan.call, memory_bytes, inputs)
    with memory_error(f"verifying {folder}", device):
        if device is not None:
            original.model.to(device)
            model.to(device)
        found = figures(original.model, model, plan.seam, bind_call(held_out, plan.call))
        measured = None
        if images_labelled is not None:
            measured = measured_accuracy(original.model, model, bind_call(images_labelled, plan.call), labels)
    return replace(
        stored,
        **report_fields(found, held_out),
        class_names={**numbered(original.classes), **stored.class_names},
        min_agreement=min_agreement,
        max_error=max_error,
        **accuracy_fields(measured),
        image_hashes={**stored.image_hashes, "held_out": held_out.hashes},
        seconds=time.perf_counter() - started,
        versions=versions(),
        platform=platform_kind(torch.get_num_threads(), device or "cpu"),
        alternatives=(),  # these were measured on other images
        crossfit=None,
        notes=tuple([*notes, *given.notes, *found.notes]),
    )


def _untrained(images: ImageSet, trained: set[str], min_agreement: float | None) -> tuple[ImageSet, list[str]]:
    """Note the images that trained the student; with a threshold, leave them out."""
    seen = sum(h in trained for h in images.hashes)
    if not seen:
        return images, []
    if min_agreement is None:
        return images, [f"{seen} of these images trained the student, so they prove nothing about new images"]
    left = images.subset([i for i, h in enumerate(images.hashes) if h not in trained])
    return left, [f"{seen} of these images trained the student and were left out: they prove nothing about new images"]
