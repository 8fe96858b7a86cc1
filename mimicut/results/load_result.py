"""A stored result as a model again: the architecture is built, the plan replayed, the stored tensors filled in.

The architecture comes without pretrained weights and is cut by the plan's resolved slices: nothing is traced, and no
code in the folder is run. Where the teacher was itself a result, its plan lies in the new one and is replayed first:
the folder of the teacher is not needed.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.base.errors import PlanError, StoreError
from mimicut.base.guard import named_tensors, same_bits, seeded
from mimicut.base.paths import result_path
from mimicut.inputs.class_names import named_by_number
from mimicut.inputs.computed_weights import fold_computed_weights
from mimicut.inputs.teacher import build_architecture, part_of, put_part
from mimicut.results.files import PLAN, WEIGHTS
from mimicut.results.folder import existing_result, previous_path
from mimicut.results.stopped_runs import read_stopped, stopped_path
from mimicut.results.store import digest_notes, read, weights_digest
from mimicut.results.weights_file import read_weights
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan


def load(
    folder: str | Path,
    build_teacher: str | Callable[[], nn.Module] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load the model of a result, equal to the saved one to the bit. The caller's random state is untouched.

    Args:
        folder: The result.
        build_teacher: A function that returns the teacher's architecture with any weights, or its name
            ("FILE.py:FUNCTION"). Required unless the teacher has a name of the kind `timm:...`, `torchvision:...`,
            `hf:...`, `onnx:...` or `demo:...`: code that a folder names is never run.
        device: Where the model is put.

    Returns:
        The model in eval mode; the whole network where a part of the teacher was compressed.

    Raises:
        StoreError: The folder is not a whole result, was saved by a newer release, or its weights do not fit; the first
            difference is named.
        PlanError: The plan is nonsense, or the teacher that was built is another one.
        InputError: build_teacher is required and missing.

    Warns:
        UserWarning: The result was saved by a release that kept no digest of its plan.
    """
    model = load_model(folder, build_teacher, device=device)
    for note in digest_notes(folder):
        warnings.warn(note, stacklevel=2)
    return model


def load_model(
    folder: str | Path,
    build_teacher: str | Callable[[], nn.Module] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """As `load`, for callers that report `digest_notes` by themselves."""
    plan, _, _ = read(folder)
    path = existing_result(folder)
    weights = read_weights(path / WEIGHTS, weights_digest(path))
    with seeded(0):
        model = _student_architecture(plan, build_teacher)
    _fill(model, weights, path / WEIGHTS)
    return model.eval().to(device)


def is_result(folder: str | Path) -> bool:
    """Whether `folder` is a result, or would be one, had a run or a save not been stopped."""
    path = result_path(folder, "loading")
    return (path / PLAN).is_file() or previous_path(path).is_dir() or stopped_path(path).exists()


def as_teacher(
    folder: str | Path, build_teacher: str | Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a result to use it as a teacher.

    Returns:
        The model as `load` gives it; how its own teacher is built (`Teacher.to_json`); and fields of a `Teacher`:
        "call", "classes", and "result" with its plan, by which `load` builds it again without `folder`, the digest of
        its weights, and the hashes of all images that it, or a teacher of its own, learned from.

    Raises:
        StoreError: As `load`; also for the result of a run that was stopped and can go on.
        PlanError, InputError: As `load`.
    """
    path = result_path(folder, "loading")
    checkpoint = read_stopped(path)
    if checkpoint is not None and (not path.exists() or checkpoint.data["saved"] == weights_digest(path)):
        raise StoreError(
            f"loading {path} as a teacher: the run that makes it was stopped; resume it first (--resume), or use "
            f"the result as it is by removing {stopped_path(path).name}"
        )
    plan, report, _ = read(folder)
    source = plan.teacher.get("source") or {}
    hashes = [*source.get("result", {}).get("images", []), *report.learned_hashes]
    result = {
        "plan": plan.to_json(),
        "weights_sha256": weights_digest(existing_result(folder)),
        "images": list(dict.fromkeys(hashes)),
    }
    fields = {"call": plan.call, "classes": named_by_number(report.class_names), "result": result}
    return load_model(folder, build_teacher), source, fields


def _student_architecture(plan: Plan, build_teacher: str | Callable[[], nn.Module] | None) -> nn.Module:
    """The whole network that `plan` leaves, without its weights."""
    source = plan.teacher.get("source") or {"spec": "module"}
    part = str(source.get("part", ""))
    if "result" not in source:
        whole = build_architecture(source, build_teacher)
    else:
        try:
            earlier = Plan.from_json(source["result"]["plan"])
        except PlanError as error:
            raise PlanError(f"reading the plan of the teacher {source.get('spec')}: {error}") from error
        whole = _student_architecture(earlier, build_teacher)
        _restore_buffer_shapes(part_of(whole, part), plan)
    if source.get("folded"):
        fold_computed_weights(whole, [])
    return put_part(whole, part, cut(part_of(whole, part), plan))


def _restore_buffer_shapes(model: nn.Module, plan: Plan) -> None:
    """Give the buffers that state dicts leave out the shapes that they had when `plan` was made, see `_fill`."""
    for name in _volatile_buffers(model):
        recorded = re.fullmatch(r"(scalar|\d+(?:x\d+)*) \w+", plan.teacher["tensors"].get(name, ""))
        if recorded is not None:
            shape = [] if recorded[1] == "scalar" else [int(n) for n in recorded[1].split("x")]
            buffer = model.get_buffer(name)
            if list(buffer.shape) != shape:
                _set_buffer(model, name, buffer.new_zeros(shape))


def _volatile_buffers(model: nn.Module) -> set[str]:
    """The names of buffers that a state dict leaves out."""
    return set(dict(model.named_buffers())) - set(model.state_dict())


def _set_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, buffer)


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy every saved tensor into `model`; names, shapes and dtypes must agree. A buffer that state dicts leave
    out may have another shape: some networks make it anew when they first see an image."""
    targets = named_tensors(model)
    for name in _volatile_buffers(model):
        if name in weights and weights[name].shape != targets[name].shape:
            _set_buffer(model, name, weights[name])
            targets[name] = weights[name]
    for name in [*targets, *weights]:
        target, value = targets.get(name), weights.get(name)
        if target is None or value is None or (target.shape, target.dtype) != (value.shape, value.dtype):
            raise StoreError(
                f"loading {path}: the first difference is {name!r}: the model has {_describe(target)}, the file "
                f"{_describe(value)}; plan.json and weights.safetensors must come from one result"
            )
        # Expanded tensors cannot be written to, and need not be: they come right out of the constructor.
        if not same_bits(target, value):
            with torch.no_grad():
                target.copy_(value)


def _describe(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
