"""Recover a student that another tool pruned: it mimics the teacher on the few images, is put under the teacher's head,
and is stored as files that run without its code."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from torch import nn

from mimicut.anatomy.cost import count
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError
from mimicut.base.guard import exact_float32, full_copy, memory_error, on_device
from mimicut.base.memory import own_garbage
from mimicut.inputs.computed_weights import fold_computed_weights
from mimicut.inputs.image_set import ImageSet, ImageSource
from mimicut.inputs.input_source import InputSource
from mimicut.inputs.teacher import Teacher
from mimicut.proof.image_check import check_images
from mimicut.recovery.folds import batches_of
from mimicut.recovery.mimic import mimic
from mimicut.recovery.norms import VIEWS, refit_norms
from mimicut.recovery.pair import Pair
from mimicut.recovery.precision_and_layout import describe_way, emulated
from mimicut.recovery.settle_options import settle
from mimicut.recovery.training import MimicLog
from mimicut.results import store
from mimicut.results.export_folder import export_programs
from mimicut.results.folder import check_writable
from mimicut.results.report import Report
from mimicut.runtime.export import FILES, check_formats
from mimicut.surgery.head import put_under_head
from mimicut.surgery.plan import Plan, describe
from mimicut.surgery.seam import Seam
from mimicut.workflow.deciding import settle_outputs
from mimicut.workflow.fill_report import Costs, report_of
from mimicut.workflow.intake import Intake, known_images, say_notes, take_in
from mimicut.workflow.proving import measure_student
from mimicut.workflow.request import OnStage, OnStep, Request, RunOptions, run_request_of, teacher_of
from mimicut.workflow.run_file import run_file


def recover_pruned(  # type: ignore[misc]  # of RunOptions it names export_to itself, with another default
    teacher: Teacher | nn.Module | str,
    student: nn.Module,
    images: ImageSource | ImageSet,
    *,
    named: str = "module",
    export_to: Sequence[str] = ("pt2",),
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    **options: Unpack[RunOptions],
) -> tuple[nn.Module, Report]:
    """Recover a student that another tool cut from `teacher`.

    With config.start "closed_form" (the default recipe) the batch norms are first re-estimated on the images, because
    pruning has changed their inputs. There is no closed form, which needs a plan.

    Args:
        teacher: The network that was pruned.
        student: Takes the teacher's inputs, has the teacher's features and module names at the seam, and a head with
            the teacher's names and shapes. It is not changed.
        images: As for `compress`.
        named: The student's name in the report: the code that builds it (FILE.py:FUNCTION), from which run.toml makes
            the result again.
        export_to: Formats in which the folder stores it, from "pt2", "onnx" and "openvino", with preprocessing.json,
            report and README.
        on_stage, on_step: As for `compress`.
        options: folder, force, config, held_out, held_out_share, labelled, labels, split_seed, extra, seam, example,
            min_agreement, max_error, output, max_memory: as for `compress`.

    Returns:
        The student under the teacher's head, and the report.

    Raises:
        InputError: The student's features or head do not match the teacher's.
        MimicutError: As `compress`.
    """
    started, say = time.perf_counter(), on_stage or (lambda text: None)
    teacher = teacher_of(teacher, images, options.get("example"))
    formats = _checked_formats(teacher, export_to)
    request = run_request_of(teacher, **options)
    if request.folder is not None:
        check_writable(request.folder, force=request.force)
    say("reading images")
    intake = take_in(teacher, images, request)
    if isinstance(intake.few, InputSource):
        raise InputError(
            "recovering a pruned student: the network takes other inputs than images, for which no program is written; "
            "call mimicut.mimic, put_under_head and export"
        )
    notes = [*intake.notes, *known_images(teacher, None, intake.held_out.hashes, request.min_agreement)]
    say_notes(say, notes)
    model = teacher.model
    anatomy = trace(model, intake.example, points=request.seam)
    settle_outputs(teacher, anatomy, request)
    seam = anatomy.seam
    student = full_copy(student).cpu().float().eval()
    fold_computed_weights(student, notes)  # as those of the teacher were
    costs = Costs(count(model, intake.example), count(student, intake.example))
    put_under_head(model, student, seam)  # fails before any work if the student does not fit
    device = request.config.device
    with memory_error("recovering a pruned student", device), own_garbage(), exact_float32(), on_device(model, device):
        looked = check_images(model, seam, intake.few, intake.call, held_out=intake.held_out, beside=intake.choose)
        say_notes(say, looked.notes)
        notes += [*looked.notes, *emulated(request.config.precision, device)]
        log = _mimicked(model, student, seam, intake, request, say, on_step)
        say("putting the student under the teacher's head and verifying it")
        result = put_under_head(model, student, seam)
        proof = measure_student(model, result, seam, intake, say)
    result = result.cpu()
    notes = [*teacher.notes, *notes, *proof.figures.notes]
    report = report_of(teacher, costs, proof, log, intake, looked, request, started, notes)
    if request.folder is None:
        return result, report
    plan = Plan(describe(model, teacher.to_json()), seam, {}, {}, {}, [], call=intake.call, pruned_by=named)

    def write(fresh: Path) -> Report:
        exports = export_programs(
            result, fresh, formats, teacher.preprocessing, intake.call, intake.held_out or intake.few
        )
        return replace(report, exports=exports)

    say("exporting and saving")
    text = run_file(teacher, images, replace(request, export_to=formats), student=named)
    saved = store.save_programs(request.folder, write=write, plan=plan, run_file=text, force=request.force)
    return result, saved[1]


def _checked_formats(teacher: Teacher, export_to: Sequence[str]) -> tuple[str, ...]:
    if teacher.whole is not None:
        raise InputError("recovering a pruned student: found a part of a teacher, expected a whole teacher (no --part)")
    formats = tuple(dict.fromkeys(export_to))
    check_formats(formats)
    if "int8" in formats:
        others = ", ".join(name for name in FILES if name != "int8")
        raise InputError(f"exporting a recovered student: found int8, expected one or more of {others}")
    return formats


def _mimicked(
    model: nn.Module,
    student: nn.Module,
    seam: Seam,
    intake: Intake,
    request: Request,
    say: OnStage,
    on_step: OnStep | None,
) -> MimicLog:
    """Train `student` in place to mimic the teacher."""
    config, few = request.config, intake.training
    if config.device is not None:
        student.to(config.device)
    if config.start == "closed_form":
        say("re-estimating batch norms")
        views = max(len(intake.few), VIEWS)
        batches, _, _ = batches_of(few, student, config.views, "none", config.seed, 1, views)
        refit_norms(student, seam.head, batches)
    config, tried = settle(Pair.of(model, student, seam), few, config, max_memory=request.pass_bytes)
    say(describe_way(config.precision, config.layout, tried))
    beside = "" if intake.extra is None else f" and {len(intake.extra)} extra ones"
    say(f"mimicking {config.steps} steps on {len(intake.few)} images{beside}")
    choose = intake.choose and intake.bound(intake.choose)
    return mimic(model, student, seam, few, config, choose=choose, on_step=on_step, max_memory=request.pass_bytes)
