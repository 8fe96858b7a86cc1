"""A student that another tool pruned: it mimics the teacher from the few images, goes under its head, and is stored as
files that run without its code."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mimicut.anatomy.cost import count
from mimicut.anatomy.find_seam import find_seam
from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.base.guard import full_copy, on_device, resolve_device
from mimicut.inputs.image_set import bind_call
from mimicut.inputs.teacher import Teacher, own_teacher
from mimicut.proof.certificate import check_threshold
from mimicut.proof.figures import accuracy, figures
from mimicut.proof.image_check import check_images
from mimicut.recovery.closed_form import batches_of
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.recovery.mimic import mimic, settled
from mimicut.recovery.norms import VIEWS, measured_norms
from mimicut.recovery.ways import describe_way, emulated
from mimicut.results import store
from mimicut.results.exports import export_programs
from mimicut.results.folder import check_writable
from mimicut.results.report import Report
from mimicut.runtime.export import check_formats
from mimicut.surgery.head import put_under_head
from mimicut.surgery.plan import Plan, describe
from mimicut.surgery.seam import SeamPoint
from mimicut.workflow.compress import OnStage, OnStep, call_of, known_before, labelled_images, parted_images, reported


def recover_pruned(
    teacher: Teacher | nn.Module,
    student: nn.Module,
    images: Any,
    *,
    folder: str | Path | None = None,
    force: bool = False,
    named: str = "module",
    config: MimicConfig | None = None,
    export_to: Sequence[str] = ("pt2",),
    held_out: Any = None,
    held_out_share: float = 0.2,
    labelled: Any = None,
    labels: Sequence[int] | None = None,
    seam: Sequence[SeamPoint | str] | None = None,
    example: Any = None,
    split_seed: int = 0,
    min_agreement: float | None = None,
    max_memory: int | None = None,
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
) -> tuple[nn.Module, Report]:
    """Recover `student`, cut from `teacher` by whatever tool, and return it under the teacher's head, with the report.

    student: takes what the teacher takes; at the seam it has the teacher's features and the teacher's names, its head
    the teacher's names and shapes. It is untouched. config: how; with config.start "closed_form" (the default recipe)
    batch norms are first measured anew on the images, as what was cut away has moved what reaches them; there is no
    closed form without a plan. named: what the report calls it. folder: where the files of `export_to` are stored, with
    preprocessing.json, report and README. Everything else as in `compress.compress`.

    Raises: as `compress`; InputError where features or head are not the teacher's.
    """
    started, say = time.perf_counter(), on_stage or (lambda text: None)
    teacher = teacher if isinstance(teacher, Teacher) else own_teacher(teacher)
    model, config = teacher.model, config or replace(PRESETS["default"], views=teacher.views)
    if teacher.whole is not None:
        raise InputError("recovering a student of a part: expected a teacher as a whole (no --part)")
    formats = tuple(dict.fromkeys(export_to))
    check_formats(formats)
    if "int8" in formats:
        raise InputError("exporting a recovered student: found int8, expected of pt2, onnx, openvino")
    if folder is not None:
        check_writable(folder, force=force)
    check_threshold(min_agreement)
    most = memory.bound(max_memory)
    if config.device is not None:
        resolve_device(config.device)
    say("reading images")
    few, choose, proof, notes = parted_images(teacher, images, held_out, held_out_share, split_seed, config, most)
    check_threshold(min_agreement, len(proof))
    notes += known_before(teacher, None, proof.hashes, min_agreement)
    for note in notes:
        say(f"note: {note}")
    example = teacher.example() if example is None else example
    call = call_of(example)
    test, truth = labelled_images(teacher, labelled, labels, call, most)
    memory.trim()
    found = find_seam(model, example, points=seam)
    student = full_copy(student).cpu().float().eval()
    before, after = count(model, example), count(student, example)
    put_under_head(model, student, found)  # before any work: can it be?

    with on_device(model, config.device):
        looked = check_images(model, found, few, call, held_out=proof, beside=choose)
        notes += [*looked.notes, *emulated(config.precision, config.device)]
        for note in looked.notes:
            say(f"note: {note}")
        student = student if config.device is None else student.to(config.device)
        given = bind_call(few, call)
        if config.start == "closed_form":
            say("measuring batch norms")
            batches, _, _ = batches_of(given, student, config.views, "none", config.seed, 1, max(len(few), VIEWS))
            measured_norms(student, found.head, batches)
        room = int(memory.PASSES * most)
        config, tried = settled(model, student, found, given, config, max_memory=room)
        say(describe_way(config.precision, config.layout, tried))
        say(f"mimicking {config.steps} steps on {len(few)} images")
        judged = choose and bind_call(choose, call)
        log = mimic(model, student, found, given, config, choose=judged, on_step=on_step, max_memory=room)
        say("replacing and verifying")
        result = put_under_head(model, student, found)
        worth = figures(model, result, found, bind_call(proof, call))
        score = accuracy(model, result, bind_call(test, call), truth) if test is not None else None
    result = result.cpu()
    report = reported(
        before, after, worth, score, log, few, choose, proof, looked, device=config.device, started=started,
        min_agreement=min_agreement, notes=[*teacher.notes, *notes, *worth.notes],
    )  # fmt: skip
    if folder is None:
        return result, report
    asked = {"pruned": named, "seed": config.seed, "call": call}
    plan = Plan(describe(model, teacher.to_json()), found, {}, {}, {}, [], asked=asked)

    def write(fresh: Path) -> Report:
        exports = export_programs(result, fresh, formats, teacher.preprocessing, call, proof or few)
        return replace(report, exports=exports)

    say("exporting and saving")
    return result, store.save_programs(folder, write=write, plan=plan, force=force)[1]
