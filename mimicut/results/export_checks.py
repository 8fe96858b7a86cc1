"""Exported files, checked where they will run: each in a process of its own, against the model; and counted.

A file that is larger than the model's tensors, or holds other numbers, is no export of it.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimicut.anatomy.tracing import as_example
from mimicut.base.errors import LawBroken
from mimicut.inputs.preprocessing import model_inputs
from mimicut.runtime import run_exported
from mimicut.runtime.edge_converter import arrays_of, calls_in
from mimicut.runtime.edge_formats import EDGE, run_edge
from mimicut.runtime.export import FILES, NOT_WANTED, Exported, difference, larger_images, outputs_of, run_onnx

FIXED = 2  # images that a file takes whose batch cannot be free
# A file may be so much larger than the model's tensors: names, the graph, alignment. Source: assumption.
OVERHEAD_BYTES, OVERHEAD = 4 * 2**20, 1.1
ONE_IMAGE = "files for phones and accelerators are made for one image at a time"
_OF_ONNX = ("onnx", "openvino", "int8")
EXTRA_NUMBERS = 2**14  # shapes, indices and scales that a graph holds beside the tensors. Source: assumption.
_RUNNER = Path(run_exported.__file__)


def check_exports(
    model: nn.Module,
    exported: Exported,
    formats: Sequence[str],
    batches: Mapping[str, Tensor],
    call: Mapping[str, Any] | None,
    tolerance: float,
) -> dict[str, dict[str, Any]]:
    """Run every file that can be run here in a process of its own, compare its outputs with the model's, and count what
    it holds.

    Args:
        model: What was exported.
        exported: The files.
        formats: Those of them that are checked.
        batches: Images (N, C, H, W) as the model takes them: "random", and "real" where there are some.
        call: How the model takes images, see `model_inputs`.
        tolerance: The largest difference that is allowed, as a share of the largest output.

    Returns:
        The entries of `Report.exports`, without "normalises".

    Raises:
        LawBroken: A file cannot be run, gives other outputs, or holds more than the model.
    """
    errors = {f: _errors_elsewhere(model, exported, f, batches, call, tolerance) for f in formats}
    sizes = {f: check_size(exported, exported.files[f], f) for f in formats}
    return {
        f: {
            "file": FILES[f], "bytes": sizes[f], "precision": "int8" if f == "int8" else exported.precision,
            "tolerance": None if f == "int8" else tolerance, "opset": exported.opset if f in _OF_ONNX else None,
            "batch": str(_images_of(exported, f) or "any"), "fixed_because": _fixed_because(exported, f),
            "size": "any" if _any_size(exported, f) else "that of the images it was made with",
            "size_fixed_because": None if exported.static_size in (None, NOT_WANTED) else exported.static_size,
            "call": call, "not_run": exported.not_run.get(f), **errors[f],
        }
        for f in formats
    }  # fmt: skip


def _images_of(exported: Exported, kind: str) -> int | None:
    """How many images a file takes; None where it may be any number."""
    if kind in EDGE:
        return exported.edge_images
    return None if exported.static is None else FIXED


def _fixed_because(exported: Exported, kind: str) -> str | None:
    return ONE_IMAGE if kind in EDGE and exported.edge_images == 1 else exported.static


def _any_size(exported: Exported, kind: str) -> bool:
    return exported.static_size is None and kind not in EDGE


def _errors_elsewhere(
    model: nn.Module,
    exported: Exported,
    kind: str,
    batches: Mapping[str, Tensor],
    call: Mapping[str, Any] | None,
    tolerance: float,
) -> dict[str, float | None]:
    """error_random and error_real (None without real images): the largest difference of any output, as a share of that
    output's largest value, of the file in a process of its own."""
    errors: dict[str, float | None] = {"random": None, "real": None}
    path, fixed = exported.files[kind], _images_of(exported, kind)
    parts = list[tuple[str, Tensor]]()
    for name, batch in {} if kind in exported.not_run else batches.items():
        parts += [(name, part) for part in batch.split(fixed or len(batch)) if len(part) == (fixed or len(batch))]
        if _any_size(exported, kind) and name == "random":
            parts.append((name, larger_images(as_example(batch[:FIXED]))[0][0]))
    if not parts:
        return {"error_random": None, "error_real": None}
    calls = [as_example(model_inputs(part, call)) for _, part in parts]
    # A process takes seconds to start: one for all.
    found = run_edge(kind, path, calls) if kind in EDGE else run_elsewhere(path, [[part] for _, part in parts], call)
    here = run_onnx(path, calls) if kind == "int8" else None
    for i, (name, _) in enumerate(parts):
        error = difference(found[i], outputs_of(model, *calls[i]))
        errors[name] = max(error, errors[name] or 0.0)
        if here is not None:  # what INT8 loses is reported; the file must give here what it gives elsewhere
            error = difference(found[i], here[i])
        if not error <= tolerance:
            raise LawBroken(
                f"comparing {path.name} in a process of its own with "
                f"{'what it gives here' if kind == 'int8' else 'the student'}, on {name} images: "
                f"outputs differ by {error:.1e} of the largest in float32, expected at most {tolerance:.1e}; do "
                "not deploy it, and please report the model"
            )
    return {f"error_{name}": error for name, error in errors.items()}


def run_elsewhere(path: Path, passes: Sequence[Sequence[Tensor]], call: Mapping[str, Any] | None) -> list[list[Tensor]]:
    """The outputs of an exported file in each of several passes, run in a process that imports nothing of mimicut.

    Args:
        path: The file.
        passes: What the inputs of the file take in each: images (N, C, H, W), and what further inputs there are.
        call: How the model takes images, see `model_inputs`.

    Raises:
        LawBroken: The process fails.
    """
    with tempfile.TemporaryDirectory(prefix="mimicut") as scratch:
        given, result = Path(scratch) / "given.npz", Path(scratch) / "result.npz"
        arrays: dict[str, Any] = arrays_of([[each.numpy() for each in inputs] for inputs in passes])
        np.savez(given, call=json.dumps(call or {"keyword": None, "options": {}}), **arrays)
        process = subprocess.run(
            [sys.executable, "-P", str(_RUNNER), str(path), str(given), str(result)], capture_output=True, text=True
        )
        if process.returncode:
            message = " / ".join(process.stderr.strip().splitlines()[-3:]) or f"exit code {process.returncode}"
            raise LawBroken(f"running {path.name} in a process of its own: {message[-600:]}; do not deploy it")
        return [[torch.from_numpy(array) for array in outputs] for outputs in calls_in(str(result))]


def check_size(exported: Exported, path: Path, kind: str) -> int:
    """Check that a file holds no more than the model's tensors.

    Args:
        exported: How much the trace of the model itself holds.
        path: The file.
        kind: Its format.

    Returns:
        Bytes of the file and of the data beside it.

    Raises:
        LawBroken: It holds more, or an INT8 file holds nothing in 8 bits.
    """
    size = sum(p.stat().st_size for p in files_of(path))
    most = OVERHEAD * exported.bytes + OVERHEAD_BYTES
    if size > most and kind != "tensorrt":  # an engine holds weights in the forms that its kernels want
        raise LawBroken(
            f"exporting {path.name}: it takes {size:,} bytes, expected at most {round(most):,} for the student's "
            "tensors; it holds more than the student"
        )
    if kind in EDGE:  # whose tensors are not read here
        return size
    if kind in ("onnx", "int8"):
        written, allowed, unit, slack = _onnx_numbers(path, kind), exported.numbers, "numbers", EXTRA_NUMBERS
    else:
        written, allowed, unit, slack = _tensor_bytes(path, kind), exported.bytes, "bytes of tensors", 8 * EXTRA_NUMBERS
    if written > OVERHEAD * allowed + slack:
        raise LawBroken(
            f"exporting {path.name}: it holds {written:,} {unit}, the student {allowed:,}; expected no more"
        )
    return size


def _onnx_numbers(path: Path, kind: str) -> int:
    import onnx

    weights = onnx.load(path, load_external_data=False).graph.initializer
    numbers = sum(int(np.prod(t.dims)) for t in weights)
    if kind == "int8" and not any(t.data_type == onnx.TensorProto.INT8 for t in weights):
        raise LawBroken(f"exporting {path.name}: found none of its {numbers:,} numbers in INT8; use the float32 file")
    return numbers


def _tensor_bytes(path: Path, kind: str) -> int:
    if kind == "openvino":
        return path.with_name(data_name(path.name)).stat().st_size
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    return sum(p.file_size for p in parts if "/weights/" in p.filename or "/constants/" in p.filename)


def files_of(path: Path) -> list[Path]:
    """An exported file and the data beside it, as far as they exist."""
    return [p for p in (path, path.with_name(data_name(path.name))) if p.exists()]


def data_name(name: str) -> str:
    """The name of the file beside an exported one that holds its weights where it does not hold them itself."""
    return "model.bin" if name == FILES["openvino"] else f"{name}.data"
