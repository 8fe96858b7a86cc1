"""The record of everything that decides a run's result, kept with its checkpoints to resume a stopped run."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mimicut.anatomy.tracing import as_example
from mimicut.base.environment import versions
from mimicut.base.errors import InputError, StoreError
from mimicut.base.guard import named_tensors
from mimicut.inputs.teacher import Teacher
from mimicut.proof.output_figures import check_kinds
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.results.stopped_runs import stopped_path, write_stopped
from mimicut.surgery.plan import Plan
from mimicut.workflow.intake import Intake
from mimicut.workflow.request import Destination, Request, digests


def record_of(teacher: Teacher, request: Request, intake: Intake) -> dict[str, Any]:
    """Collect everything that decides the result, as plain data."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(teacher.model).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    record = {
        "teacher": {**teacher.to_json(), "weights_sha256": digest.hexdigest()},
        "example": _shapes(intake.example),
        "images": intake.hashes,
        "extra": None if intake.extra is None else [len(intake.extra), intake.extra.pictures is None],
        "config": request.config.to_json() | {"device": _kind(request.config.device, teacher)},
        "plan": request.plan and request.plan.to_json(),
        "seam": None if request.seam is None else [str(point) for point in request.seam],
        "output": check_kinds(request.output),
        "call": intake.call,
        "crossfit": request.crossfit,
        "alternatives": request.with_alternatives or None,
        "budget": request.budget and request.budget.to_json(),
        "int8": request.int8 or None,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return json.loads(json.dumps(record, default=str))


def _kind(device: str | None, teacher: Teacher) -> str | None:
    """The kind of device: what several began, one that is left goes on with. None for the CPU, if it was not named."""
    if device is None:
        found = {tensor.device.type for tensor in named_tensors(teacher.model).values()}
        return next(iter(found - {"cpu"}), None)
    return device.partition(":")[0]


def _shapes(example: Any) -> list[Any]:
    args, kwargs = as_example(example)
    return [list(v.shape) if isinstance(v, torch.Tensor) else str(v) for v in (*args, *kwargs.values())]


def check_same(destination: Destination, record: dict[str, Any]) -> None:
    """Compare a stopped run with this one.

    Raises:
        InputError: The stopped run had other options.
    """
    assert destination.stopped is not None
    assert destination.folder is not None  # or there would be no stopped run
    before = _device_named(destination.stopped.data["asked"])
    record = _device_named(record)
    other = [name for name in record if before.get(name) != record[name]]
    for name in ("teacher", "config", "budget", "images", "versions"):
        if name in other and isinstance(before.get(name), dict) and isinstance(record[name], dict):
            keys = [key for key in {**before[name], **record[name]} if before[name].get(key) != record[name].get(key)]
            other[other.index(name)] = f"{name} ({', '.join(keys)})"
    if other:
        raise InputError(
            f"resuming {stopped_path(destination.folder)}: the run was stopped with other {', '.join(other)}; "
            "give the same ones, or start again without resume"
        )


def _device_named(record: dict[str, Any]) -> dict[str, Any]:
    """Several CPUs are always named, a single one may not be."""
    config = record.get("config") or {}
    return {**record, "config": {**config, "device": config.get("device") or "cpu"}}


def is_finished(destination: Destination, record: Mapping[str, Any]) -> bool:
    """Whether the complete result of this very run is there already, so that nothing is to be done.

    Raises:
        StoreError: A result of other options is there, and is not to be replaced.
    """
    if destination.finished is None:
        return False
    mine, its = digests(record), destination.finished
    other = [name for name in mine if its.get(name) != mine[name]]
    if other and not destination.force:
        raise StoreError(
            f"saving to {destination.folder}: it exists, and was made with other {', '.join(other)}; give the same "
            "ones, name another folder, or replace it with force (--force)"
        )
    return not other


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoints of a run beside its folder; without a folder it writes nothing."""

    destination: Destination
    record: dict[str, Any]
    plan: Plan
    say: Callable[[str], None]

    def __call__(self, checkpoint: Checkpoint, saved: str | None = None) -> None:
        """saved: digest of the result that this run saved when stopped; None for that of the run it resumes."""
        folder, stopped = self.destination.folder, self.destination.stopped
        if folder is None:
            return
        saved = saved or (None if stopped is None else stopped.data["saved"])
        more = {"asked": self.record, "plan": self.plan.to_json(), "saved": saved}
        try:
            write_stopped(folder, replace(checkpoint, data=checkpoint.data | more))
        except StoreError as error:  # the run itself is not affected
            self.say(f"{error}; if the run stops now, it cannot be resumed")
