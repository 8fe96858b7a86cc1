"""The steps in order: read, plan, cut, recover, replace, verify, save. No algorithm of its own."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Unpack

from torch import nn

from mimicut.anatomy.cost import count, count_teacher
from mimicut.base.errors import LawBroken, Stopped
from mimicut.base.guard import exact_float32, memory_error, named_tensors, on_device, same_bits
from mimicut.base.interrupts import interrupts_held
from mimicut.base.memory import own_garbage
from mimicut.base.ranks import NotFirst, Ranks, current
from mimicut.inputs.extra_images import GENERATED
from mimicut.inputs.image_set import ImageSet, ImageSource
from mimicut.inputs.teacher import Teacher
from mimicut.proof import laws
from mimicut.proof.image_check import ImageCheck
from mimicut.proof.output_figures import OutputKinds
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.mimic import check_ranks
from mimicut.recovery.precision_and_layout import emulated
from mimicut.recovery.recover import Recovery, recover
from mimicut.results import store
from mimicut.results.export_folder import export_folder, finish_killed_export
from mimicut.results.files import PLAN
from mimicut.results.folder import existing_result, one_run
from mimicut.results.load_result import load_model
from mimicut.results.report import Report
from mimicut.results.stopped_runs import remove_stopped, stopped_path
from mimicut.surgery.budget import Budget, BudgetOptions
from mimicut.surgery.cut import cut
from mimicut.surgery.head import check_head, put_under_head
from mimicut.surgery.plan import Plan
from mimicut.surgery.seam import SeamPoint
from mimicut.workflow.deciding import (
    SHARE_EVIDENCE,
    Allowance,
    Network,
    asks_images,
    decide,
    look_at_images,
    read_network,
    share_evidence,
)
from mimicut.workflow.fill_report import Costs, report_of
from mimicut.workflow.intake import Intake, known_images, say_notes, take_in
from mimicut.workflow.proving import Proof, add_alternatives, measure_latency, measure_student
from mimicut.workflow.request import (
    Destination,
    OnStage,
    OnStep,
    Request,
    check_destination,
    destination_of,
    digests,
    request_of,
    teacher_of,
)
from mimicut.workflow.run_file import run_file
from mimicut.workflow.run_record import CheckpointWriter, check_same, is_finished, record_of

# The share of the time left for recovery that is kept for mimicking in INT8, where that follows. Source: assumption:
# 100 steps, and up to 20 that try a rate, follow 400 by default.
INT8_SHARE = 0.25


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        model: The student under the teacher's head, in eval mode; with a part of a teacher, the whole network.
        plan: What was kept.
        report: What was measured.
        recovery: How the student was recovered; None where the same run had made the result before (`resume`).
        folder: Where it was saved, or None.
        stopped: Whether Ctrl-C stopped the run before the last step.
    """

    model: nn.Module
    plan: Plan
    report: Report
    recovery: Recovery | None
    folder: Path | None
    stopped: bool = False


@dataclass(frozen=True)
class Recorded:
    """The images and the request that run.toml records."""

    images: ImageSource | ImageSet
    request: Request


def compress(
    teacher: Teacher | nn.Module | str,
    images: ImageSource | ImageSet,
    *,
    budget: Budget | None = None,
    plan: Plan | None = None,
    config: MimicConfig | None = None,
    folder: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    held_out: ImageSource | ImageSet | None = None,
    held_out_share: float = 0.2,
    labelled: ImageSource | ImageSet | None = None,
    labels: Sequence[int] | None = None,
    split_seed: int = 0,
    extra: ImageSource | ImageSet | str | None = GENERATED,
    seam: Sequence[SeamPoint | str] | None = None,
    example: Any = None,
    max_seconds: float | None = None,
    max_memory: int | None = None,
    min_agreement: float | None = None,
    max_error: float | None = None,
    output: OutputKinds = None,
    with_alternatives: bool = False,
    export_to: Sequence[str] = (),
    int8: bool = False,
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    **options: Unpack[BudgetOptions],
) -> Result:
    """Make `teacher` smaller from a few unlabelled images, prove what was done, and save it.

    Nothing is left half-written, and the teacher is not changed.

    Args:
        teacher: From `load_teacher`, or the name that it takes, or a module: its images then have the size of
            `example` or of floating-point `images`, and are else prepared as in `own_teacher`.
        images: Anything that `read_images` reads. For a network that takes several inputs an `InputSource`, or a list
            or Dataset of dictionaries or tuples (`input_source.inputs_of` says which of their entries are taken); for
            volumes and clips what `volumes.read_volumes` reads.
        budget: The budget; or give its fields as keyword arguments: keep=0.5, latency=0.6, runtime="openvino", ...
        plan: What to keep, instead of a budget.
        config: How to recover; the default recipe if None.
        folder, force: Where to save, and whether to replace an existing result there.
        resume: Continue the stopped run whose file lies beside `folder`, if there is one; with the same images,
            options and threads the result is the same. If the run was complete, return what is in `folder`.
        held_out, held_out_share, split_seed: Images that only certify, or the share of `images` to set aside for that.
        labelled, labels: Images that only measure accuracy: a folder of class folders, or any images with class
            numbers.
        extra: Pictures of anything, which help to mimic beside `images` and are never used for anything else: a source
            as for `images`, "generated" for drawn ones, "none" (or None) for none.
        seam: Points where the features are taken, instead of those found automatically.
        example: Input to trace with, images first, or `((), {"pixel_values": images})`; by default two blank images,
            or two of the samples.
        max_seconds: Time limit for evidence, planning, recovery and mimicking in INT8, which take as many steps as fit.
        max_memory: Bound on the resident memory of this process, in bytes; by default 4 GB, or half of what is free.
        min_agreement: Required lower end of the agreement's interval (`Report.go` says whether it is reached), for
            every output that is classes.
        max_error: Allowed upper end of the relative error's interval, for every output that is no classes.
        output: What the outputs are, where mimicut cannot see it: one of OUTPUT_KINDS, or {part: kind}.
        with_alternatives: Whether to report also how well cheaper ways recover the same cut.
        export_to: Formats in which `export_folder` also writes the saved result.
        int8: The student is meant for INT8: after it was saved it mimics once more, seeing its own rounding, and is
            written as model.int8.onnx; min_agreement holds for that file, too. With a latency (onnxruntime or openvino)
            the planner weighs INT8 alone, a cut alone, and both. Without a budget nothing is cut.
        on_stage, on_step: Receive a sentence at each stage, and (steps done, steps, loss) after each step.

    Returns:
        The result. If nothing is cut, its model is the teacher, bit for bit.

    Raises:
        InputError, PlanError, StoreError: An argument cannot be used; raised before any work.
        UnsupportedModel: This model cannot be compressed.
        LawBroken: A law does not hold.
        Stopped: Ctrl-C while the student mimics. The student is first verified and saved as it is, unless another
            result is in `folder`, with the file to `resume` from. Stopped is a KeyboardInterrupt whose `log` is the
            Result.
        NotFirst: This process is one of an initialised `torch.distributed` group, and not its first one: its part is
            done, and the first one alone has a Result.

    In an initialised `torch.distributed` group of two processes or more, all of them must make this call with the same
    arguments but the device: they work together (`base.ranks`).
    """
    teacher = teacher_of(teacher, images, example)
    request = request_of(
        teacher, budget=budget, plan=plan, config=config, folder=folder, force=force, resume=resume, held_out=held_out,
        held_out_share=held_out_share, labelled=labelled, labels=labels, split_seed=split_seed, extra=extra,
        seam=seam, example=example, max_seconds=max_seconds, max_memory=max_memory, min_agreement=min_agreement,
        max_error=max_error, output=output,
        with_alternatives=with_alternatives, export_to=export_to, int8=int8, **options,
    )  # fmt: skip
    return run_request(teacher, images, request, on_stage or (lambda text: None), on_step)


@dataclass(frozen=True)
class _Begun:
    """A run whose images have been read."""

    teacher: Teacher
    recorded: Recorded
    request: Request
    destination: Destination
    intake: Intake
    record: dict[str, Any]
    say: OnStage
    on_step: OnStep | None
    started: float


@dataclass(frozen=True)
class _Run(_Begun):
    """What all later steps share, once the network has been read, too."""

    network: Network
    looked: ImageCheck
    given_plan: Plan | None
    notes: list[str]

    @property
    def plan(self) -> Plan:
        """Once it is decided."""
        assert self.given_plan is not None
        return self.given_plan


def run_request(
    teacher: Teacher,
    images: ImageSource | ImageSet,
    request: Request,
    say: OnStage,
    on_step: OnStep | None = None,
    *,
    recorded: Recorded | None = None,
) -> Result:
    """Run `compress` from a request. recorded: what run.toml records, if different from the arguments here."""

    def going_on() -> str:
        kept = None if request.folder is None else stopped_path(request.folder)
        return f"; {kept} has its last steps: with --resume it goes on from there" if kept and kept.exists() else ""

    ranks = current()
    place = None if ranks is not None and not ranks.first else request.folder
    with memory_error("compressing", request.config.device, going_on), own_garbage(), exact_float32(), one_run(place):
        return _run_request(teacher, images, request, recorded or Recorded(images, request), say, on_step)


def _run_request(
    teacher: Teacher,
    images: ImageSource | ImageSet,
    request: Request,
    recorded: Recorded,
    say: OnStage,
    on_step: OnStep | None,
) -> Result:
    ranks = current()
    check_ranks(request.config, ranks)
    if ranks is not None and not ranks.first:
        _help(teacher, images, request, ranks)
    run = _begun(teacher, images, request, recorded, say, on_step)
    if is_finished(run.destination, run.record):
        if ranks is not None:
            ranks.of_first(None)  # there is nothing to help with
        return _finished(run)
    run = _read(run)
    allowance = Allowance(request.max_seconds)
    if run.destination.stopped is None:
        plan, anatomy = decide(teacher, run.network, run.intake, request, run.given_plan, allowance, say, ranks)
        run = replace(run, given_plan=plan, network=replace(run.network, anatomy=anatomy))
    if ranks is not None:
        ranks.of_first(run.plan.to_json())
    if not run.plan.slices and not run.plan.drop:
        run = replace(run, request=replace(request, config=replace(request.config, steps=0, start="cut")))
        run.notes.append("nothing is cut: the model is the teacher, bit for bit, and there is nothing to mimic")
    say("cutting")
    student, law, costs = _cut(run)
    recovered = _recover(run, student, allowance)
    latency, missed = measure_latency(run.network, recovered.model, run.plan, run.intake, say)
    run.notes.extend([*recovered.proof.notes, *missed])
    report = replace(
        _report(run, recovered, costs),
        latency=latency,
        config=_config(recovered.recovery, run.request, law),
    )
    result = Result(_completed(run, recovered.model), run.plan, report, recovered.recovery, None)
    return _kept(run, result, recovered.stopped, allowance)


def _help(teacher: Teacher, images: ImageSource | ImageSet, request: Request, ranks: Ranks) -> NoReturn:
    """What a process that is not the first one does: its share of evidence, closed form and mimicking, by the first
    one's plan. It writes nothing.

    Raises:
        NotFirst: It is done.
    """
    request = replace(request, folder=None, export_to=(), resume=False)
    begun = _begun(teacher, images, request, Recorded(images, request), lambda text: None, None)
    # Read now, while the first one does so too.
    whole = read_network(teacher, request, begun.intake, None) if asks_images(request, request.plan) else None
    decided = ranks.of_first(None)  # SHARE_EVIDENCE, if there is any; then the plan, or None where there is a result
    if decided == SHARE_EVIDENCE:
        assert whole is not None  # the first one was asked for the same
        share_evidence(whole, begun.intake, request, None, begun.say, ranks)
        decided = ranks.of_first(None)
    if decided is None:  # the result is there already
        raise NotFirst
    plan = Plan.from_json(decided)
    if plan.slices or plan.drop:
        network = read_network(teacher, request, begun.intake, plan)
        looked = ImageCheck()
        run = _Run(**vars(begun), network=network, looked=looked, given_plan=plan, notes=[])
        with on_device(network.model, request.config.device):
            _recovered_student(run, cut(network.model, plan).to(request.config.device or "cpu"), Allowance(None), ranks)
    raise NotFirst


def _begun(
    teacher: Teacher,
    images: ImageSource | ImageSet,
    request: Request,
    recorded: Recorded,
    say: OnStage,
    on_step: OnStep | None,
) -> _Begun:
    """Read the images."""
    started = time.perf_counter()
    destination = destination_of(request, teacher)
    say("reading images")
    # A threshold that cannot be reached is refused before work; a result that is there is measured against it.
    asked = request if destination.finished is None else replace(request, min_agreement=None, max_error=None)
    intake = take_in(teacher, images, asked)
    record = {} if request.folder is None else record_of(teacher, recorded.request, intake)
    return _Begun(teacher, recorded, request, destination, intake, record, say, on_step, started)


def _finished(run: _Begun) -> Result:
    """The result that the same run made before, with the exported files that are missing."""
    request = run.request
    assert request.folder is not None  # or nothing would be there
    folder = existing_result(request.folder)
    remove_stopped(folder)
    finish_killed_export(folder)
    plan, report, _ = store.read(folder)
    missing = [name for name in request.formats_for(plan) if name not in report.exports]
    run.say("already complete" + (f", but not yet exported as {', '.join(missing)}" if missing else ""))
    if missing:
        report = _exported(run, folder, missing, request.max_seconds)
    report = replace(report, min_agreement=request.min_agreement, max_error=request.max_error)
    return Result(load_model(folder, run.teacher.architecture()), plan, report, None, folder)


def _read(begun: _Begun) -> _Run:
    """Read the network, and check it and the images before any work."""
    teacher, request, destination = begun.teacher, begun.request, begun.destination
    intake, say, plan = begun.intake, begun.say, request.plan
    if destination.finished is not None:
        check_destination(destination)  # where force replaces the result of another run
    if destination.stopped is not None:
        check_same(destination, begun.record)
        plan = Plan.from_json(destination.stopped.data["plan"])
    notes = [*intake.notes, *known_images(teacher, plan, intake.held_out.hashes, request.min_agreement)]
    say_notes(say, notes)
    say("reading the network")
    network = read_network(teacher, request, intake, plan)
    say("checking the images")
    looked = look_at_images(network, request, intake)
    notes += [*looked.notes, *emulated(request.config.precision, request.config.device)]
    say_notes(say, looked.notes)
    return _Run(**vars(begun), network=network, looked=looked, given_plan=plan, notes=notes)


def _cut(run: _Run) -> tuple[nn.Module, Any, Costs]:
    """Cut the student; return it with the record of the checked law and the costs.

    Raises:
        LawBroken: The cut network does not equal the teacher with zeros, or misses the budget.
    """
    model, anatomy = run.network.model, run.network.anatomy
    student = cut(model, run.plan)
    law = laws.check_cut(anatomy, run.plan, model, student)
    costs = Costs(count_teacher(model, anatomy), count(student, run.intake.example))
    laws.check_budget(run.plan, costs.teacher, costs.student)
    return student, law, costs


@dataclass(frozen=True)
class _Recovered:
    """model: the student under the teacher's head, on the teacher's original device. stopped: by Ctrl-C, else None."""

    model: nn.Module
    recovery: Recovery
    proof: Proof
    stopped: Stopped | None


def _recover(run: _Run, student: nn.Module, allowance: Allowance) -> _Recovered:
    """Recover the student, put it under the teacher's head, and measure it."""
    request, model = run.request, run.network.model
    original_device = next((tensor.device for tensor in named_tensors(model).values()), None)
    with on_device(model, request.config.device):
        if request.config.device is not None:
            student = student.to(request.config.device)
        recovery, stopped = _recovered_student(
            run, student, allowance, current() if run.plan.slices or run.plan.drop else None
        )
        log = recovery.mimic
        if stopped is not None:
            why = f": {stopped.reason}" if stopped.reason else ""
            run.notes.append(f"stopped after {len(log.losses)} of {log.config.steps} steps{why}")
            run.say(run.notes[-1])
        if log.halved:
            run.notes.append(
                f"the memory of {request.config.device or 'the device'} was not enough for a batch of {log.batch} at "
                f"once: it went through in {log.parts} parts, whose gradients add up to those of the whole batch"
            )
            run.say(run.notes[-1])
        run.say("putting the student under the teacher's head and verifying it")
        result = put_under_head(model, student, run.plan.seam)
        proof = measure_student(model, result, run.plan.seam, run.intake, run.say, run.network.batch_size)
        if request.with_alternatives and stopped is None and (run.plan.slices or run.plan.drop):
            add_alternatives(proof, run.network, run.plan, run.intake, request, log, run.say)
    return _Recovered(result.to(original_device), recovery, proof, stopped)


def _recovered_student(
    run: _Run, student: nn.Module, allowance: Allowance, ranks: Ranks | None
) -> tuple[Recovery, Stopped | None]:
    """Train `student` in place. After Ctrl-C, or where another process ended, return the recovery so far, and the
    exception."""
    request, intake, keep = run.request, run.intake, _checkpoints(run)
    max_seconds = allowance.left
    if max_seconds is not None and run.recorded.request.int8_steps and "int8" in request.formats_for(run.plan):
        max_seconds *= 1 - INT8_SHARE
    case = CutStudent(run.network.model, student, run.network.anatomy, run.plan)

    def recovered() -> Recovery:
        return recover(
            case, intake.training, request.config, choose=intake.choose and intake.bound(intake.choose),
            max_seconds=max_seconds, on_stage=run.say, on_step=run.on_step, checkpoint=run.destination.stopped,
            on_checkpoint=keep, max_memory=request.pass_bytes, ranks=ranks,
        )  # fmt: skip

    try:
        recovery = allowance.run(recovered)
    except Stopped as error:
        keep(error.checkpoint)
        return error.log, error
    return recovery, None


def _checkpoints(run: _Run) -> CheckpointWriter:
    return CheckpointWriter(run.destination, run.record, run.plan, run.say)


def _completed(run: _Run, model: nn.Module) -> nn.Module:
    """Put `model` in its place in the whole network.

    Raises:
        LawBroken: The head is not the teacher's.
    """
    teacher = run.teacher
    whole = teacher.completed(model)
    check_head(run.network.model if teacher.whole is None else teacher.whole, whole, run.plan.seam, teacher.part)
    return whole


def _report(run: _Run, recovered: _Recovered, costs: Costs) -> Report:
    proof, plan, log = recovered.proof, run.plan, recovered.recovery.mimic
    closed = recovered.recovery.closed_form
    unsolved = [closed.unsolved] if closed is not None and closed.unsolved else []
    notes = [*run.teacher.notes, *run.notes, *plan.notes, *unsolved, *proof.figures.notes]
    groups = run.network.anatomy.groups
    return replace(
        report_of(run.teacher, costs, proof, log, run.intake, run.looked, run.request, run.started, notes),
        widths={name: [plan.widths.get(name, group.width), group.width] for name, group in groups.items()},
        alternatives=tuple(proof.alternatives),
    )


def _config(recovery: Recovery, request: Request, law: Any) -> dict[str, Any]:
    losses = recovery.mimic.losses
    return {
        "mimic": recovery.mimic.config.to_json(),
        "recovery": recovery.to_json(),
        "max_memory": request.memory_bytes,
        "cut_equals_zero": law,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
    }


def _kept(run: _Run, result: Result, stopped: Stopped | None, allowance: Allowance) -> Result:
    """Save and export the result, as far as the request says.

    Raises:
        Stopped: The run was stopped; raised after saving.
    """
    request, folder = run.request, run.request.folder
    # A stopped run replaces nothing but an earlier part of itself.
    free = folder is not None and (not folder.exists() or not any(folder.iterdir()) or run.destination.owns(folder))
    if folder is not None and (stopped is None or free):
        run.say("saving")
        with interrupts_held():
            result = replace(result, folder=_save(folder, result, run, complete=stopped is None))
            if stopped is None:
                remove_stopped(folder)
            else:
                _checkpoints(run)(stopped.checkpoint, saved=store.weights_digest(folder))
    if stopped is not None:
        result = replace(result, stopped=True)
        raise Stopped(result, stopped.checkpoint, stopped.reason)
    formats = request.formats_for(run.plan)
    if formats:
        run.say(f"exporting; the result itself is already saved in {result.folder}")
        assert result.folder is not None  # or the request is refused
        result = replace(result, report=_exported(run, result.folder, formats, allowance.left))
    return result


def _exported(run: _Begun, folder: Path, formats: Sequence[str], max_seconds: float | None) -> Report:
    held_out = run.intake.held_out if len(run.intake.held_out) else None
    asked = run.recorded.request
    int8 = "int8" in formats
    return export_folder(
        folder, formats, images=run.intake.few, held_out=held_out, teacher=run.teacher,
        int8_steps=asked.int8_steps if int8 else 0, extra=asked.extra, device=asked.config.device,
        max_memory=asked.max_memory, max_seconds=max_seconds, on_stage=run.say, int8_required=asked.int8 and int8,
    )  # fmt: skip


def _save(folder: Path, result: Result, run: _Run, complete: bool) -> Path:
    """Save; before the folder takes its place, load it by replaying the plan on the teacher's architecture, and compare
    every tensor."""

    def check(fresh: Path) -> None:
        tensors = named_tensors(load_model(fresh, run.teacher.architecture()))
        for name, tensor in named_tensors(result.model).items():
            if name not in tensors or not same_bits(tensor, tensors[name]):
                raise LawBroken(
                    f"loading what is to be saved to {folder}: {name} is not bit-equal to what was written; nothing "
                    "was changed there"
                )

    text = run_file(run.teacher, run.recorded.images, run.recorded.request, str(folder / PLAN))
    made_by = {"asked": digests(run.record), "complete": complete}
    return store.save(
        folder, model=result.model, plan=result.plan, report=result.report, extra={"run": made_by}, run_file=text,
        force=run.request.force, replaceable=run.destination.owns, check=check,
    )  # fmt: skip
