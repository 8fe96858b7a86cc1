"""Everything that one run is asked to do, as a value that is checked before any work."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import nn

from mimicut.anatomy.tracing import as_example
from mimicut.base import memory, ranks
from mimicut.base.errors import InputError, PlanError, StoreError, unknown_option
from mimicut.base.guard import resolve_device
from mimicut.inputs.built_model import OWN_PREPROCESSING
from mimicut.inputs.extra_images import GENERATED, NONE
from mimicut.inputs.image_set import ImageSet, ImageSource
from mimicut.inputs.image_sources import floating_size
from mimicut.inputs.preprocessing import PreprocessingChanges
from mimicut.inputs.teacher import Teacher, own_teacher
from mimicut.planning.survey import setting_of
from mimicut.proof.certificate import check_max_error, check_threshold
from mimicut.proof.output_figures import OutputKinds, check_kinds
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.recovery.recover import check_seconds
from mimicut.results.folder import check_writable, finish_killed_save
from mimicut.results.stopped_runs import read_stopped, stopped_path
from mimicut.results.store import read, weights_digest
from mimicut.results.teachers import load_teacher
from mimicut.runtime.export import check_formats
from mimicut.runtime.int8_mimic import STEPS as INT8_STEPS
from mimicut.surgery.budget import Budget, BudgetOptions, or_whole, refuse_beside_plan
from mimicut.surgery.plan import Plan
from mimicut.surgery.seam import SeamPoint

OnStage = Callable[[str], None]
OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images that only measure: where they come from, and how they are set aside.

    Args:
        held_out: Images that only certify, as `read_images` takes them; None to set aside some of the given images.
        held_out_share: Share of the given images to set aside if `held_out` is None.
        labelled: Images that only measure accuracy: a folder of class folders, or anything readable with `labels`.
        labels: Class numbers, one for each of `labelled`.
        split_seed: Seed of the split.
    """

    held_out: ImageSource | ImageSet | None = None
    held_out_share: float = 0.2
    labelled: ImageSource | ImageSet | None = None
    labels: Sequence[int] | None = None
    split_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of `compress` except teacher and images; see there for each field. crossfit: the number of folds,
    if this is the main run of a crossfit; it is only recorded."""

    budget: Budget | None = None
    plan: Plan | None = None
    config: MimicConfig
    images: Images = Images()
    extra: ImageSource | ImageSet | str = GENERATED
    seam: tuple[SeamPoint | str, ...] | None = None
    example: Any = None
    max_seconds: float | None = None
    max_memory: int | None = None
    min_agreement: float | None = None
    max_error: float | None = None
    output: OutputKinds = None
    with_alternatives: bool = False
    export_to: tuple[str, ...] = ()
    int8: bool = False
    folder: Path | None = None
    force: bool = False
    resume: bool = False
    crossfit: int | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory bound of this process, in bytes: its share of the run's."""
        found = ranks.current()
        return memory.bound(self.max_memory) // (1 if found is None else ranks.count_here(found.count))

    @property
    def pass_bytes(self) -> int:
        """Memory that the passes of one stage may hold, in bytes."""
        return int(memory.PASSES * self.memory_bytes)

    @property
    def draws_extra(self) -> bool:
        """Whether no extra images are given: they are drawn, or there are none."""
        return isinstance(self.extra, str) and self.extra in (GENERATED, NONE)

    @property
    def int8_steps(self) -> int:
        """Steps in which the student mimics in INT8: none where nothing trains."""
        return min(INT8_STEPS, self.config.steps) if self.int8 else 0

    def formats_for(self, plan: Plan) -> tuple[str, ...]:
        """The formats to export to: without INT8 where the planner weighed it, and a cut alone loses less."""
        asked = self.int8 and self.budget is not None and self.budget.latency is not None
        weighed = asked and plan.latency is not None and plan.latency.setting.get("precision") != "int8"
        return tuple(name for name in self.export_to if not (weighed and name == "int8"))

    def check(self) -> None:
        """Check everything that does not depend on the teacher and the images.

        Raises:
            InputError, PlanError: A field cannot be used.
        """
        check_seconds(self.max_seconds)
        memory.bound(self.max_memory)
        share = self.images.held_out_share
        if not (isinstance(share, (int, float)) and 0 <= share < 1):
            raise InputError(f"setting images aside: held_out_share is {share!r}, expected at least 0 and below 1")
        check_threshold(self.min_agreement)
        check_max_error(self.max_error)
        check_kinds(self.output)
        if self.config.extra_share == 0 and not self.draws_extra:
            raise InputError(
                "recovering: extra images are given, and a recipe that uses none (its extra_share is 0, as that of the "
                "preset paper); expected no extra images, or a recipe such as the preset default"
            )
        if self.export_to:
            check_formats(self.export_to)
            if self.folder is None:
                raise InputError(
                    f"exporting to {', '.join(self.export_to)}: no folder is given; expected one for the result"
                )
        if self.int8 and self.max_error is not None:
            raise InputError(
                "compressing for INT8: found max_error, which is not measured in INT8; expected min_agreement, or none"
            )
        if self.config.device is not None:
            resolve_device(self.config.device)
        if self.budget is not None:
            setting = setting_of(self.budget)
            if self.int8 and setting is not None:
                replace(setting, precision="int8")  # refused on runtimes that have no INT8


class RunOptions(TypedDict, total=False):
    """The fields that every run's `Request` and its `Images` have, as flat keyword arguments."""

    config: MimicConfig | None
    held_out: ImageSource | ImageSet | None
    held_out_share: float
    labelled: ImageSource | ImageSet | None
    labels: Sequence[int] | None
    split_seed: int
    extra: ImageSource | ImageSet | str | None
    seam: Sequence[SeamPoint | str] | None
    example: Any
    max_memory: int | None
    min_agreement: float | None
    max_error: float | None
    output: OutputKinds
    export_to: Sequence[str]
    int8: bool
    folder: str | Path | None
    force: bool


class RequestOptions(RunOptions, BudgetOptions, total=False):
    """The same for a run that cuts: also a plan, or a budget or its fields."""

    budget: Budget | None
    plan: Plan | None
    max_seconds: float | None
    with_alternatives: bool
    resume: bool


_IMAGES = {f.name for f in fields(Images)}
_OWN = {f.name for f in fields(Request)} - {"images", "budget", "config"}


def request_of(teacher: Teacher, **options: Unpack[RequestOptions]) -> Request:
    """Make a request from flat options, with the default recipe if none is given.

    Raises:
        PlanError, InputError: As `Budget` and `Request.check`, before any work; also for misspelt names.
    """
    plan, budget = options.get("plan"), options.get("budget")
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"compressing: plan is {plan!r}, expected a Plan (read_plan reads one from a file)")
    if budget is not None and not isinstance(budget, Budget):
        raise InputError(f"compressing: budget is {budget!r}, expected a Budget, or its fields such as keep=0.5")
    known = RequestOptions.__annotations__
    faults = [unknown_option(name, known) for name in options if name not in known]
    given = {n: v for n, v in options.items() if n in BudgetOptions.__annotations__ and v is not None}
    asked = cast(BudgetOptions, given)
    if options.get("int8") and budget is None and plan is None:
        asked = or_whole(asked)
    if plan is not None:
        if budget is not None:
            faults.append("a plan and a budget are both given; expected one, since a plan already fixes what is kept")
        _collect(faults, lambda: refuse_beside_plan(asked))
    elif budget is None:
        budget = _collect(faults, lambda: Budget.of(**asked))
    elif asked:
        faults.append(f"{', '.join(asked)} given beside a Budget; set them in the Budget")
    if faults:
        raise PlanError("compressing: " + "; ".join(faults))
    return _checked(teacher, options, budget)


def _collect(faults: list[str], work: Callable[[], Budget | None]) -> Budget | None:
    try:
        return work()
    except PlanError as error:
        faults.append(str(error))
        return None


def run_request_of(teacher: Teacher, **options: Unpack[RunOptions]) -> Request:
    """Make the request of a run that cuts nothing.

    Raises:
        InputError: As `request_of`.
    """
    known = RunOptions.__annotations__
    faults = [unknown_option(name, known) for name in options if name not in known]
    if faults:
        raise InputError("recovering: " + "; ".join(faults))
    return _checked(teacher, options, None)


def _checked(teacher: Teacher, options: Mapping[str, Any], budget: Budget | None) -> Request:
    own: dict[str, Any] = {name: value for name, value in options.items() if name in _OWN}
    if own.get("int8"):
        own["export_to"] = dict.fromkeys([*(own.get("export_to") or ()), "int8"])
    for name in ("seam", "export_to"):
        if own.get(name) is not None:
            own[name] = tuple(own[name])
    if own.get("folder") is not None:
        own["folder"] = Path(own["folder"])
    config = options.get("config") or replace(PRESETS["default"], views=teacher.views)
    images = Images(**{name: value for name, value in options.items() if name in _IMAGES})
    if own.get("extra", GENERATED) is None:
        own["extra"] = NONE
    request = Request(**{**own, "budget": budget, "config": config, "images": images})
    request.check()
    return request


def teacher_of(model: Teacher | nn.Module | str, images: ImageSource | ImageSet, example: Any = None) -> Teacher:
    """Wrap a module as a teacher, load one by its name; return a teacher unchanged.

    Its images have the size of `example`, if that is given, or else of `images`, if these are floating-point; files and
    uint8 arrays are resized to the size in `own_teacher`, and a note says so.
    """
    if isinstance(model, Teacher):
        return model
    if isinstance(model, str):
        return load_teacher(model)
    if isinstance(images, ImageSet):
        return own_teacher(model, images.preprocessing)
    size = _example_size(example) or floating_size(images)
    if size is not None:
        notes: list[str] = []
        preprocessing = PreprocessingChanges(input_size=size).apply(OWN_PREPROCESSING, None, notes)
        made = own_teacher(model, preprocessing)
        return replace(made, notes=[*made.notes, *notes])
    made = own_teacher(model)
    if example is not None:  # of something else than images, which is taken as it is
        return made
    size = made.preprocessing.input_size
    made.notes.append(
        f"nothing says for which size the network is: images are resized to {'x'.join(map(str, size))}; give example=, "
        "a batch as it takes them, or the teacher own_teacher(module, Preprocessing(...))"
    )
    return made


def _example_size(example: Any) -> tuple[int, ...] | None:
    """(C, H, W) of the images in an example."""
    if example is None:
        return None
    args, kwargs = as_example(example)
    images = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim == 4), None)
    return None if images is None else tuple(images.shape[1:])


@dataclass(frozen=True)
class Destination:
    """Where the result goes. stopped: the checkpoint of the run that is resumed. finished: what the complete result
    that is in `folder` was made by (`run_record.digests`), if the run is to go on."""

    folder: Path | None
    force: bool
    stopped: Checkpoint | None = None
    finished: dict[str, str] | None = None

    def owns(self, folder: Path) -> bool:
        """Whether `folder` holds what the run that is resumed saved when it was stopped: it is replaced even without
        force."""
        if self.stopped is None:
            return False
        saved, made_by = self.stopped.data["saved"], _made_by(folder)
        mine = {"asked": digests(self.stopped.data["asked"]), "complete": False}
        return made_by == mine or (saved is not None and saved == weights_digest(folder))


def destination_of(request: Request, teacher: Teacher) -> Destination:
    """Check where the result goes, and read the stopped run to resume.

    Raises:
        StoreError: Nothing can be written there, or the file of a stopped run is in the way.
    """
    folder = request.folder
    if folder is None:
        return Destination(None, request.force)
    path = Path(folder).resolve()
    finish_killed_save(path)
    made_by = _made_by(path) if request.resume else {}
    stopped = read_stopped(folder) if request.resume else None
    found = Destination(folder, request.force, stopped)
    if made_by.get("complete"):
        return replace(found, finished=made_by["asked"])
    check_destination(found)
    if teacher.result is not None and path in (own := Path(teacher.spec).resolve(), *own.parents):
        raise StoreError(f"saving to {path}: the teacher {teacher.spec} is in it; name another folder")
    if stopped is None and not request.force and stopped_path(folder).exists():
        raise StoreError(
            f"saving to {folder}: found {stopped_path(folder).name}, of a run that was stopped; resume continues it, "
            "force discards it"
        )
    return found


def check_destination(destination: Destination) -> None:
    """Check that a result can be saved there.

    Raises:
        StoreError: It cannot.
    """
    if destination.folder is not None:
        check_writable(destination.folder, force=destination.force or destination.owns(destination.folder))


def digests(record: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made by (`run_record.record_of`), each entry as a digest, as a complete result keeps it; without
    the versions of packages."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in record.items() if name != "versions"}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _made_by(folder: Path) -> dict[str, Any]:
    """{"asked": digests of the run, "complete": False for the part of a stopped one}; empty where that is unknown."""
    try:
        found = read(folder)[2].get("run", {})
    except (StoreError, PlanError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("asked"), dict) else {}
