"""The steps in order: read, plan, cut, mimic, replace, verify, save. No algorithm of its own."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.anatomy.cost import Cost, count, count_teacher
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.footprint import check_memory, images_within
from mimicut.anatomy.tracing import as_example
from mimicut.base import memory
from mimicut.base.environment import platform_kind, versions
from mimicut.base.errors import InputError, LawBroken, MimicutError, Stopped, StoreError, one_line
from mimicut.base.guard import evaluating, named_tensors, on_device, resolve_device, same_bits
from mimicut.base.progress import SpokenProgress
from mimicut.inputs.image_set import ImageSet, again_notes, base_of, bind_call, read_images, split, thumbnail
from mimicut.inputs.labels import labels_from_folders
from mimicut.inputs.teacher import Teacher, own_teacher
from mimicut.planning.budgets import MIXED, check_beside_plan, check_mixed, compared, missed, mixes, plan_by
from mimicut.planning.evidence import channel_evidence, needed_bytes
from mimicut.planning.planner import make_plan, replan
from mimicut.proof import laws
from mimicut.proof.certificate import check_threshold
from mimicut.proof.figures import Accuracy, Figures, accuracy, class_scores, figures
from mimicut.proof.image_check import ImageCheck, check_images, held_out_notes
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.recovery.mimic import MimicLog
from mimicut.recovery.recover import CHOOSE_FROM, CHOOSE_SHARE, EVIDENCE_SHARE, Recovery, about, check_seconds, recover
from mimicut.recovery.ways import emulated
from mimicut.results import store
from mimicut.results.exports import export_folder
from mimicut.results.folder import check_writable
from mimicut.results.loading import load
from mimicut.results.report import Report
from mimicut.results.stopped_runs import read_stopped, remove_stopped, stopped_path, write_stopped
from mimicut.results.teachers import code_of, load_again
from mimicut.runtime.export import check_formats
from mimicut.runtime.latency import Setting
from mimicut.surgery.cut import cut
from mimicut.surgery.head import check_head, put_under_head
from mimicut.surgery.plan import Plan, check_teacher
from mimicut.surgery.seam import SeamPoint
from mimicut.workflow.alternatives import alternatives

_FIGURES = (
    "top1_agreement", "top1_agreement_low", "top1_agreement_high", "feature_error_relative", "feature_cosine",
    "confidence_teacher", "confidence_student", "images_held_out",
)  # fmt: skip
OnStage = Callable[[str], None]
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Result:
    """model: the student under the teacher's head, in eval mode; of a teacher that is compressed in part, the whole.
    folder: where it was saved, or None. stopped: whether by Ctrl-C, before the last step."""

    model: nn.Module
    plan: Plan
    report: Report
    recovery: Recovery
    folder: Path | None
    stopped: bool = False


def compress(
    teacher: Teacher | nn.Module,
    images: Any,
    *,
    folder: str | Path | None = None,
    force: bool = False,
    plan: Plan | None = None,
    config: MimicConfig | None = None,
    held_out: Any = None,
    held_out_share: float = 0.2,
    labelled: Any = None,
    labels: Sequence[int] | None = None,
    seam: Sequence[SeamPoint | str] | None = None,
    drop: Sequence[str] = (),
    example: Any = None,
    split_seed: int = 0,
    max_seconds: float | None = None,
    max_memory: int | None = None,
    resume: bool = False,
    min_agreement: float | None = None,
    with_alternatives: bool = False,
    export_to: Sequence[str] = (),
    on_stage: OnStage | None = None,
    on_step: OnStep | None = None,
    **budget: Any,
) -> Result:
    """Make `teacher` smaller from a few unlabelled images, prove what was done, and save it.

    teacher: from `teachers.load_teacher`, or a module (then images are prepared as `teachers.own_teacher` says).
    images: whatever `images.read_images` reads; nothing but these trains. budget: options of `planner.make_plan`
    (keep=0.5, params=0.5, keep_width=0.5, scheme=...) and of `budgets.plan_by` (latency=0.6, latency_ms=12,
    runtime="openvino", threads=1, batch=1, depth="auto"), unless `plan` says what to keep; without a score in it the
    images say which channels matter, if config.start is "closed_form". config: how to recover; the default recipe if
    None. max_seconds: for the images' say and for recovering, which then takes as many steps as fit.
    max_memory: bytes, the most resident memory of this process meanwhile; by default 4 GB, or half of what is free.
    held_out: images that only certify, from another source; without it `held_out_share` of `images` is set aside for
    that. labelled: images that only measure accuracy: a folder of class folders, or anything readable with `labels`.
    seam: points where the features are taken, instead of the one that is found. drop: blocks to leave out whole.
    example: traced input, images first, or `((), {"pixel_values": images})` where the network takes them by that name;
    without it two blank images, as `Teacher.example` gives them. folder: where to save; an existing one is only
    replaced with force. resume: go on with the run that was stopped, if a file beside `folder` tells of one; with the
    same images and options, and as many threads, it comes to the same result, with as many steps as it had been given.
    on_stage(text), on_step(done, total, loss): progress.

    min_agreement: the lower end of the interval of the agreement that is asked for (`Report.go` says whether it was
    reached); refused before any work where even perfect agreement on the held-out images could not show it.
    with_alternatives: the report also has what cheaper ways come to on the same cut (`alternatives`). export_to:
    formats that the saved result is also written in, by `deploy.export_folder`, whose errors leave the result as it is.

    Where at least CHOOSE_FROM images are left to learn from, a tenth of them is set aside to choose by, unless
    config.start is "cut": the paper's recipe takes the last step.
    Raises: InputError, PlanError, StoreError before any work for what cannot be used; UnsupportedModel where the model
    is the reason; LawBroken where a law does not hold. Nothing is left half-written, and the teacher is as it was.
    Ctrl-C while the student mimics: what it has become is verified and saved like any result, where no other one
    stands, with the file to `resume` from; then Stopped is raised, a KeyboardInterrupt whose `log` is the Result.
    """
    started, say = time.perf_counter(), on_stage or (lambda text: None)
    teacher = teacher if isinstance(teacher, Teacher) else own_teacher(teacher)
    source, model = teacher.to_json(), teacher.model
    stood = read_stopped(folder) if resume and folder is not None else None
    if folder is not None:
        # What the stopped run saved, and nothing else, is replaced without force.
        part = (
            stood is not None
            and stood.data["saved"] is not None
            and stood.data["saved"] == store.weights_digest(folder)
        )
        path = check_writable(folder, force=force or part)
        if teacher.result is not None and path in (own := Path(teacher.spec).resolve(), *own.parents):
            raise StoreError(f"saving to {path}: the teacher {teacher.spec} is there; name another folder")
        if stood is None and not force and stopped_path(folder).exists():
            raise StoreError(
                f"saving to {folder}: {stopped_path(folder).name} tells of a run that was stopped; resume goes "
                "on with it, force gives it up"
            )
    config = config or replace(PRESETS["default"], views=teacher.views)
    check_seconds(max_seconds)
    limit = memory.bound(max_memory)
    of_passes = int(memory.PASSES * limit)
    check_threshold(min_agreement)
    if export_to:
        check_formats(export_to)
        if folder is None:
            raise InputError(f"exporting to {', '.join(export_to)}: there is no folder; expected one for the result")
    if config.device is not None:
        resolve_device(config.device)
    if plan is None:
        check_mixed({**budget, "drop": drop})
    else:
        check_beside_plan(**budget, drop=drop)

    say("reading images")
    few, choose, proof, notes = parted_images(teacher, images, held_out, held_out_share, split_seed, config, limit)
    check_threshold(min_agreement, len(proof))
    if example is None:
        example = teacher.example()
    call = call_of(example)
    test, truth = labelled_images(teacher, labelled, labels, call, limit)
    memory.trim()
    hashes = parted_hashes(few, choose, proof)
    asked = {} if folder is None else _asked(teacher, example, hashes, config, plan, seam, drop, call, budget)
    if stood is not None:
        _check_same(folder, stood, asked)
        plan = Plan.from_json(stood.data["plan"])

    notes += known_before(teacher, plan, proof.hashes, min_agreement)
    for note in notes:
        say(f"note: {note}")

    say("reading the network")
    mixed = {name: budget.pop(name) for name in MIXED if name in budget}
    mixing = plan is None and mixes(mixed)
    gone = plan.drop if plan else () if mixing else drop
    anatomy = trace(model, example, plan.seam if plan and not seam else None, points=seam, drop=gone)
    asks_images = plan is None and "score" not in budget and config.start == "closed_form"
    check_memory(anatomy, limit, asked=max_memory is not None, passes=needed_bytes(anatomy) if asks_images else 0)
    batch = images_within(anatomy, memory.MEASURING * limit)
    say("looking at the images")
    with on_device(model, config.device):
        looked = check_images(model, anatomy.seam, few, call, held_out=proof, beside=choose, batch_size=batch)
    notes += [*looked.notes, *emulated(config.precision, config.device)]
    for note in looked.notes:
        say(f"note: {note}")
    if asks_images:
        with on_device(model, config.device):
            given = bind_call(few, call)
            most = None if max_seconds is None else EVIDENCE_SHARE * max_seconds
            begun = time.perf_counter()
            budget["evidence"] = channel_evidence(
                model, anatomy, given, views=config.views, seed=config.seed, max_seconds=most,
                on_expected=lambda seconds: say(f"asking the images which channels matter, {about(seconds)}"),
                on_progress=SpokenProgress(say, "batch or group"), max_memory=of_passes,
            )  # fmt: skip
            memory.trim()
            max_seconds = None if max_seconds is None else max(0.0, max_seconds - (time.perf_counter() - begun))
    if mixing:
        begun = time.perf_counter()
        with on_device(model, config.device):
            options = {"views": config.views, "seed": config.seed, "drop": drop, "source": source, **mixed, **budget}
            recipe = config if max_seconds is None else None  # trials would take from the time that is left
            plan = plan_by(model, anatomy, bind_call(few, call), recipe=recipe, say=say, **options)
        max_seconds = None if max_seconds is None else max(0.0, max_seconds - (time.perf_counter() - begun))
        anatomy = trace(model, example, anatomy.seam, drop=plan.drop, whole=anatomy)
        plan = replace(plan, asked={**plan.asked, "call": call})
    elif stood is None:
        plan = replan(model, anatomy, plan, source) if plan else make_plan(model, anatomy, source=source, **budget)
        plan = replace(plan, asked={**plan.asked, "call": call})
    if not plan.slices and not plan.drop:
        config = replace(config, steps=0, start="cut")
        notes.append("nothing is cut: the model is the teacher, bit for bit, and mimics nothing")

    say("cutting")
    student = cut(model, plan)
    law = laws.check_cut(anatomy, plan, model, student)
    before, after = count_teacher(model, anatomy), count(student, example)
    laws.check_budget(plan, before, after)

    kept = {"asked": asked, "plan": plan.to_json(), "saved": stood and stood.data["saved"]}

    def keep(checkpoint: Checkpoint, **more: Any) -> None:
        if folder is not None:
            try:
                write_stopped(folder, replace(checkpoint, data=checkpoint.data | kept | more))
            except StoreError as error:  # the run itself is well
                say(f"{error}; a stopped run could not go on")

    stopped = None
    home = next((tensor.device for tensor in named_tensors(model).values()), None)
    with on_device(model, config.device):
        try:
            recovery = recover(
                model, student if config.device is None else student.to(config.device), anatomy, plan,
                bind_call(few, call), config, choose=choose and bind_call(choose, call), max_seconds=max_seconds,
                on_stage=on_stage, on_step=on_step, checkpoint=stood, on_checkpoint=keep,
                max_memory=of_passes,
            )  # fmt: skip
        except Stopped as error:
            stopped, recovery = error, error.log
            keep(error.checkpoint)
        log = recovery.mimic
        if stopped is not None:
            notes.append(f"stopped after {len(log.losses)} of {log.config.steps} steps")
            say(notes[-1])
        say("replacing and verifying")
        result = put_under_head(model, student, plan.seam)
        worth = figures(
            model, result, plan.seam, bind_call(proof, call), batch_size=batch,
            on_progress=SpokenProgress(say, "held-out image"),
        )  # fmt: skip
        score = None
        if test is not None:
            score = accuracy(
                model,
                result,
                bind_call(test, call),
                truth,
                batch_size=batch,
                on_progress=SpokenProgress(say, "labelled image"),
            )
        others = []
        if with_alternatives and stopped is None and (plan.slices or plan.drop):
            same = {"steps": len(log.losses), "precision": log.config.precision, "layout": log.config.layout}
            ways = alternatives(
                model, anatomy, plan, bind_call(few, call), replace(config, **same),
                lambda student: figures(model, student, plan.seam, bind_call(proof, call), batch_size=batch), say=say,
                max_memory=of_passes,
            )  # fmt: skip
            try:
                others.extend(ways)
            except KeyboardInterrupt:  # the result itself is well
                notes.append("the alternatives were interrupted")
                say(notes[-1])
    result = result.to(home)
    latency = None
    if plan.asked.get("latency"):
        say("measuring the latency of both")
        try:
            how = plan.asked["latency"]["setting"]
            latency = compared(model, result, example, Setting(*(how[f.name] for f in fields(Setting))))
            notes += filter(None, [missed(plan, latency)])
        except (
            MimicutError,
            KeyError,
            TypeError,
        ) as error:  # a plan of another machine, or edited: all else is well
            notes.append(f"the latency was not measured: {one_line(error)}")
    whole, lead = teacher.completed(result), model if teacher.whole is None else teacher.whole
    check_head(lead, whole, plan.seam, teacher.part)
    report = replace(
        reported(
            before, after, worth, score, log, few, choose, proof, looked, device=config.device, started=started,
            min_agreement=min_agreement, notes=[*teacher.notes, *notes, *plan.notes, *worth.notes],
        ),
        widths={name: [plan.widths.get(name, g.width), g.width] for name, g in anatomy.groups.items()},
        class_names=class_names(worth, teacher.classes),
        latency=latency,
        alternatives=tuple(others),
        config={
            "mimic": log.config.to_json(),
            "recovery": recovery.to_json(),
            "max_memory": limit,
            "cut_equals_zero": law,
            "loss_first": _at(log, 0),
            "loss_last": _at(log, -1),
        },
    )  # fmt: skip
    saved = None
    # What was stopped takes the place of nothing but an earlier part of itself.
    if folder is not None and (stopped is None or part or not Path(folder).exists() or not any(Path(folder).iterdir())):
        say("saving")
        saved = _save(Path(folder), whole, plan, report, force or part, teacher)
        if stopped is None:
            remove_stopped(folder)
        else:
            keep(stopped.checkpoint, saved=store.weights_digest(saved))
    if export_to and stopped is None:
        say(f"exporting; the result itself is in {saved}")
        report = export_folder(saved, export_to, images=few, held_out=proof if len(proof) else None, teacher=teacher)
    result = Result(whole, plan, report, recovery, saved, stopped is not None)
    if stopped is not None:
        raise Stopped(result, stopped.checkpoint)
    return result


def reported(
    before: Cost,
    after: Cost,
    worth: Figures,
    score: Accuracy | None,
    log: MimicLog,
    few: ImageSet,
    choose: ImageSet | None,
    proof: ImageSet,
    looked: ImageCheck,
    *,
    device: str | None,
    started: float,
    min_agreement: float | None,
    notes: Sequence[str],
) -> Report:
    """What a report has of any student that mimicked. before, after: what teacher and student cost."""
    return Report(
        params_teacher=before.params,
        params_student=after.params,
        macs_teacher=before.macs,
        macs_student=after.macs,
        macs_not_counted=tuple(f"{name} x{times}" for name, times in after.uncounted.items()),
        **report_fields(worth, proof),
        min_agreement=min_agreement,
        losses=thinned(log.losses),
        **({} if score is None else vars(score)),
        images_few=len(few),
        images_choose=len(choose or ()),
        image_hashes=parted_hashes(few, choose, proof),
        images_check=looked.to_json(),
        steps=len(log.losses),
        seconds=time.perf_counter() - started,
        config={"mimic": log.config.to_json()},
        versions=versions(),
        platform=platform_kind(torch.get_num_threads(), device or "cpu"),
        notes=tuple(dict.fromkeys(notes)),
    )


def known_before(teacher: Teacher, plan: Plan | None, hashes: Sequence[str], min_agreement: float | None) -> list[str]:
    """Notes on the images that are to certify, but trained the teacher or helped to make the plan.

    Raises: InputError where there are some and an agreement is asked for.
    """
    trained = set((teacher.result or {}).get("images", ())) & set(hashes)
    chose = set(() if plan is None else plan.asked.get("images", ())) & set(hashes)
    if min_agreement is not None and (trained or chose):
        raise InputError(
            f"asking for an agreement of {min_agreement}: {len(trained | chose)} of the held-out images trained the "
            "teacher or helped to make the plan, so that they cannot show it; hold out others (--held-out)"
        )
    said = {"trained the teacher": trained, "helped to make this plan": chose}
    return [
        f"{len(some)} held-out image(s) {what}: of it they prove less; hold out others"
        for what, some in said.items()
        if some
    ]


def parted_hashes(few: ImageSet, choose: ImageSet | None, proof: ImageSet) -> dict[str, list[str]]:
    return {"fit": few.hashes, "choose": choose.hashes if choose else [], "held_out": proof.hashes}


def report_fields(worth: Figures, proof: ImageSet) -> dict[str, Any]:
    """The figures as the report has them: images by their names."""
    found = {name: getattr(worth, name) for name in _FIGURES}
    found["agreement_by_class"] = {str(c): list(pair) for c, pair in worth.agreement_by_class.items()}
    found["disagreements"] = tuple(
        {**each, "image": proof.names[each["image"]], "thumbnail": thumbnail(proof, each["image"])}
        for each in worth.disagreements
    )
    return found


def class_names(worth: Figures, classes: Sequence[str]) -> dict[str, str]:
    """What the classes mean that the figures name, as far as `classes` says it."""
    named = {c for each in worth.disagreements for c in (each["teacher"][0], each["student"][0])}
    return {str(c): classes[c] for c in sorted(named | set(worth.agreement_by_class)) if c < len(classes)}


def thinned(losses: Sequence[float], most: int = 200) -> tuple[tuple[int, float], ...]:
    """(step, mean loss of the steps since the one before), at most so many."""
    each = max(1, -(-len(losses) // most))
    parts = [losses[i : i + each] for i in range(0, len(losses), each)]
    return tuple((i * each + len(part), sum(part) / len(part)) for i, part in enumerate(parts))


def _asked(
    teacher: Teacher,
    example: Any,
    hashes: dict[str, list[str]],
    config: MimicConfig,
    plan: Plan | None,
    seam: Sequence[SeamPoint | str] | None,
    drop: Sequence[str],
    call: dict[str, Any] | None,
    budget: dict[str, Any],
) -> dict[str, Any]:
    """All that decides what a run comes to, as plain data."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(teacher.model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    given = {
        "teacher": {**teacher.to_json(), "weights_sha256": digest.hexdigest()}, "example": _shapes(example),
        "images": hashes, "config": config.to_json(), "plan": plan and plan.to_json(),
        "seam": None if seam is None else [str(point) for point in seam], "drop": list(drop), "call": call,
        "budget": {name: value for name, value in budget.items() if name != "evidence"}, "versions": versions(),
    }  # fmt: skip
    return json.loads(json.dumps(given, default=str))


def _shapes(example: Any) -> list[Any]:
    args, kwargs = as_example(example)
    return [list(v.shape) if isinstance(v, torch.Tensor) else str(v) for v in (*args, *kwargs.values())]


def _check_same(folder: str | Path, stood: Checkpoint, asked: dict[str, Any]) -> None:
    before = stood.data["asked"]
    other = [name for name in asked if before.get(name) != asked[name]]
    for name in ("teacher", "config", "budget", "images", "versions"):  # what of it
        if name in other:
            parts = [key for key in {**before[name], **asked[name]} if before[name].get(key) != asked[name].get(key)]
            other[other.index(name)] = f"{name} ({', '.join(parts)})"
    if other:
        raise InputError(
            f"going on with {stopped_path(folder)}: it was stopped with other {', '.join(other)}; give the same "
            "ones, or start anew without resume"
        )


def parted_images(
    teacher: Teacher, images: Any, held_out: Any, share: float, seed: int, config: MimicConfig, most: int
) -> tuple[ImageSet, ImageSet | None, ImageSet, list[str]]:
    """The few images that fit, those to choose by, if any, those that only certify, and what to know of them. Of those
    that train their views are held in memory, of the others the evaluation view alone, as far as shares of `most` bytes
    allow."""
    keep, other = base_of(config.views), int(memory.OTHER_IMAGES * most)
    room = int(memory.TRAINING_IMAGES * most)
    given = isinstance(images, ImageSet)
    found = images if given else read_images(images, teacher.preprocessing, memory_bytes=room, keep=keep)
    notes = [note for note in found.notes if note not in again_notes(found, keep)]

    def parted(fit: ImageSet, choose: list[int], proof: ImageSet, more: list[str]) -> Any:
        few = fit.keeping(config.views, room)
        chosen = found.subset(choose).keeping(None, other) if choose else None
        return few, chosen, proof.keeping(None, other), [*notes, *more, *again_notes(few, keep)]

    if held_out is None:
        choosing = CHOOSE_SHARE if _chooses(len(found) * (1 - share), config) else 0.0
        parts = split(found, seed=seed, held_out_share=share, choose_share=choosing)
        return parted(found.subset(parts.fit), parts.choose, found.subset(parts.held_out), parts.notes)
    proof = _measuring(teacher, held_out, most)
    notes += [f"held out: {n}" for n in proof.notes]
    proof = proof.distinct()
    same = proof.shared_with(found)
    if same:
        raise InputError(
            f"reading the held-out images: {len(same)} of them are among the images to learn from (first: {same[0][0]} "
            f"is {same[0][1]}); held-out images must influence nothing: remove them from one side"
        )
    if not _chooses(len(found), config):
        return parted(found, [], proof, [])
    parts = split(found, seed=seed, held_out_share=0.0, choose_share=CHOOSE_SHARE)
    return parted(found.subset(parts.fit), parts.choose, proof, [])


def _measuring(teacher: Teacher, source: Any, most: int) -> ImageSet:
    """Images that only measure: the evaluation view alone is held, in a share of `most` bytes."""
    if isinstance(source, ImageSet):
        return source
    room = int(memory.OTHER_IMAGES * most)
    return read_images(source, teacher.preprocessing, memory_bytes=room, keep="evaluated")


def _chooses(images: float, config: MimicConfig) -> bool:
    return config.start == "closed_form" and images >= CHOOSE_FROM


def call_of(example: Any) -> dict[str, Any] | None:
    """How the network takes its images, as plain data for the plan: under which keyword, if any, and with which options
    beside them. None where they are all that it takes.

    Raises: InputError where there is more to it than that.
    """
    args, kwargs = as_example(example)
    options = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
    images = [*args, *(name for name in kwargs if name not in options)]
    if (
        len(images) != 1
        or not all(isinstance(a, torch.Tensor) for a in args)
        or not all(isinstance(v, (bool, int, float, str, type(None))) for v in options.values())
    ):
        raise InputError(
            f"reading the example: found {len(args)} arguments and the keywords {', '.join(kwargs) or 'none'}; "
            "expected images as the one tensor, (images,) or ((), {name: images}), with no options beside them but "
            "numbers and texts under their names. Wrap the network in a module whose forward takes images and fills in "
            "the rest, or call trace, make_plan, cut, mimic and replace yourself"
        )
    keyword = None if args else images[0]
    return {"keyword": keyword, "options": options} if keyword or options else None


def labelled_images(
    teacher: Teacher, source: Any, labels: Sequence[int] | None, call: dict[str, Any] | None, most: int
) -> tuple[ImageSet | None, list[int]]:
    if source is None:
        return None, []
    test = _measuring(teacher, source, most)
    if labels is not None:
        return test, list(labels)
    if not isinstance(source, (str, Path)):
        raise InputError("reading labelled images: they come without labels; give labels=[...] or a folder of classes")
    return test, labels_from_folders(test.names, source, _classes(teacher, bind_call(test, call)))


def _classes(teacher: Teacher, test: Any) -> int:
    batch = test.batch([0])
    args, kwargs = ((batch,), {}) if isinstance(batch, torch.Tensor) else batch
    with evaluating(teacher.model):
        scores = class_scores(teacher.model(*args, **kwargs), 1)
    if scores is None:
        raise InputError("measuring accuracy: the teacher's output is not one row of class scores an image")
    return scores.shape[1]


def _save(folder: Path, model: nn.Module, plan: Plan, report: Report, force: bool, teacher: Teacher) -> Path:
    """Save, load again by replaying the plan on the teacher's architecture, and compare every tensor."""
    saved = store.save(folder, model=model, plan=plan, report=report, force=force)
    again = load(saved, teacher.architecture())
    tensors = named_tensors(again)
    for name, tensor in named_tensors(model).items():
        if name not in tensors or not same_bits(tensor, tensors[name]):
            raise LawBroken(f"loading {saved} again: {name} is not bit-equal to what was saved; do not use this folder")
    return Path(saved)


def _at(log: Any, step: int) -> float | None:
    return log.losses[step] if log.losses else None


def verify_folder(
    folder: str | Path,
    images: Any,
    *,
    teacher: str | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    labelled: Any = None,
    device: str | None = None,
    min_agreement: float | None = None,
    max_memory: int | None = None,
) -> Report:
    """Measure a stored result against its teacher on `images`; the report that it was saved with, with new figures.

    teacher: how to build it, where the folder cannot say (a "file.py:build" is never run from a folder), or where the
    result is that was the teacher. weights, pretrained: the teacher's weights, as in `teachers.load_teacher`.
    max_memory: as in `compress`.
    Raises: LawBroken when the stored head is not this teacher's; StoreError, PlanError, InputError as `load`.
    """
    started = time.perf_counter()
    most = memory.bound(max_memory)
    check_threshold(min_agreement)
    plan, stored, _ = store.read(folder)
    source = plan.teacher.get("source") or {}
    model = load(folder, code_of(teacher))
    lead = load_again(source, teacher, weights=weights, pretrained=pretrained)
    check_teacher(lead.model, plan)
    check_head(lead.model if lead.whole is None else lead.whole, model, plan.seam, lead.part)
    model = model.get_submodule(lead.part)
    read = _measuring(lead, images, most)
    proof = read.distinct()
    known = {h for part in ("fit", "choose") for h in stored.image_hashes.get(part, [])}
    known |= set(source.get("result", {}).get("images", []))
    seen = sum(h in known for h in proof.hashes)
    notes = [f"{seen} of these images trained the student: they prove nothing of new ones"] if seen else []
    if seen and min_agreement is not None:
        proof = proof.subset([i for i, h in enumerate(proof.hashes) if h not in known])
        notes = [f"{seen} of these images trained the student and were left out: they prove nothing of new ones"]
    check_threshold(min_agreement, len(proof))
    notes += held_out_notes(proof)
    call = plan.asked.get("call")
    test, truth = labelled_images(lead, labelled, None, call, most)
    if device is not None:
        lead.model.to(device)
        model.to(device)
    worth = figures(lead.model, model, plan.seam, bind_call(proof, call))
    score = accuracy(lead.model, model, bind_call(test, call), truth) if test is not None else None
    return replace(
        stored,
        **report_fields(worth, proof),
        class_names=class_names(worth, lead.classes),
        min_agreement=min_agreement,
        **({f.name: None for f in fields(Accuracy)} if score is None else vars(score)),
        image_hashes={**stored.image_hashes, "held_out": proof.hashes},
        seconds=time.perf_counter() - started,
        versions=versions(),
        platform=platform_kind(torch.get_num_threads(), device or "cpu"),
        alternatives=(),  # they were judged on other images
        crossfit=None,
        notes=tuple([*notes, *read.notes, *worth.notes]),
    )
