"""A result folder as files that deploy: each run in a process of its own and compared with the student there.

On random images, and on real ones where some are given. What the files hold is counted too: a file that is larger than
the student's tensors, or has other parameters, is no export of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from understudy import store
from understudy.errors import InputError, LawBroken, StoreError
from understudy.export import FILES, FORMATS, TOLERANCE, Exported, check_formats, export
from understudy.guard import evaluating, named_tensors
from understudy.images import ImageSet, read_images
from understudy.preprocessing import Preprocessing, handed
from understudy.report import Report
from understudy.teachers import code_of

REAL, RANDOM = 8, 4  # images that are compared: of those given, and random ones. Source: assumption.
# A file may be so much larger than the student's tensors: names, the graph, alignment. Source: assumption.
OVERHEAD_BYTES, OVERHEAD = 4 * 2**20, 1.1
PREPROCESSING = "preprocessing.json"
_RUN = Path(__file__).with_name("run_exported.py")


class Prepared(nn.Module):
    """`model` behind the normalisation: it takes images of values 0 to 1, as float32 (N, C, H, W)."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, call: dict[str, Any] | None):
        super().__init__()
        self.model, self._call = model, call
        # By other names, as values in the ONNX file have names such as mean.
        self.register_buffer("image_mean", torch.tensor(preprocessing.mean)[:, None, None])
        self.register_buffer("image_std", torch.tensor(preprocessing.std)[:, None, None])

    def forward(self, images: Tensor) -> Any:
        given = handed((images - self.image_mean) / self.image_std, self._call)
        args, kwargs = given if isinstance(given, tuple) else ((given,), {})
        return self.model(*args, **kwargs)


def export_folder(
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    images: str | Path | ImageSet | None = None,
    teacher: str | Callable[[], nn.Module] | None = None,
    normalise: bool = False,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Report:
    """Write the student of a result into its folder, in `formats` ("onnx", "openvino", "pt2").

    Beside them preprocessing.json: how each file wants its images. images: real ones to compare with, prepared as the
    teacher's. teacher: the code that builds the teacher's architecture, where it is your own ("file.py:build").
    normalise: the files subtract the mean and divide by the deviation themselves; they then take values of 0 to 1. Of a
    teacher that was compressed in part the part is written. Returns the report of the folder with `exports` in it, as
    it then stands in the folder.

    Raises: LawBroken where a file run by itself differs from the student by more than `tolerance` of the largest
    output, or does not hold its parameters; else as `export.export` and `store.load`. Nothing is then left behind.
    """
    formats = tuple(dict.fromkeys(formats))
    check_formats(formats)
    plan, report, _ = store.read(folder)
    path = Path(folder).resolve()
    names = [FILES[f] for f in formats] + ([] if report.exports else [PREPROCESSING])
    there = [path / name for name in names if (path / name).exists()]
    if there and not force:
        raise StoreError(f"exporting to {there[0]}: it exists; replace it with force (--force)")
    source = plan.teacher.get("source") or {}
    if "preprocessing" not in source:
        raise InputError(
            f"exporting {path}: the folder does not say what images its teacher takes; use understudy.export"
        )
    preprocessing, call = Preprocessing.from_json(source["preprocessing"]), plan.asked.get("call")
    model = store.load(folder, code_of(teacher) if isinstance(teacher, str) else teacher)
    if source.get("part"):
        model = model.get_submodule(source["part"])
    batches = _batches(preprocessing, images)
    if normalise:
        model = Prepared(model, preprocessing, call)
        scale = [torch.tensor(v)[:, None, None] for v in (preprocessing.std, preprocessing.mean)]
        batches, call = {name: batch * scale[0] + scale[1] for name, batch in batches.items()}, None
    with _scratch(path) as scratch:
        found = export(model, handed(batches["random"][:2], call), scratch, formats=formats, tolerance=tolerance)
        elsewhere = {f: _elsewhere(model, found, f, batches, call, tolerance) for f in formats}
        sizes = {f: _check_size(model, found.files[f], f) for f in formats}
        exports = {
            f: {
                "file": FILES[f], "bytes": sizes[f], "precision": found.precision, "tolerance": tolerance,
                "opset": found.opset if f != "pt2" else None, "batch": "any" if found.static is None else "fixed",
                "fixed_because": found.static, "normalises": normalise, "call": call, **elsewhere[f],
            }
            for f in formats
        }  # fmt: skip
        report = replace(report, exports={**report.exports, **exports})
        (Path(scratch) / PREPROCESSING).write_text(_told(preprocessing, report.exports), encoding="utf-8")
        _put(Path(scratch), path)
    store.put_report(folder, report)
    return report


def _batches(preprocessing: Preprocessing, images: str | Path | ImageSet | None) -> dict[str, Tensor]:
    """Prepared images, (N, C, H, W) float32."""
    draws = torch.Generator().manual_seed(0)
    found = {"random": torch.randn(RANDOM, *preprocessing.input_size, generator=draws)}
    if images is not None:
        real = images if isinstance(images, ImageSet) else read_images(images, preprocessing)
        found["real"] = real.batch(list(range(min(REAL, len(real)))))
    return found


def _elsewhere(
    model: nn.Module,
    found: Exported,
    kind: str,
    batches: dict[str, Tensor],
    call: dict[str, Any] | None,
    tolerance: float,
) -> dict[str, Any]:
    """error_random, error_real (None without real images): largest difference of any output over that output's largest
    value, the file run in a process of its own. Raises: LawBroken."""
    errors: dict[str, float | None] = {"random": None, "real": None}
    for name, batch in batches.items():
        # A file whose batch is fixed takes two images.
        parts = [batch] if found.static is None else list(batch.split(2))
        for part in (p for p in parts if found.static is None or len(p) == 2):
            error = _difference(_run(found.files[kind], part, call), _outputs(model, handed(part, call)))
            errors[name] = max(error, errors[name] or 0.0)
            if not error <= tolerance:
                raise LawBroken(
                    f"comparing {found.files[kind].name} in a process of its own with the student, on {name} images: "
                    f"outputs differ by {error:.1e} of the largest in float32, expected at most {tolerance:.1e}; do "
                    "not deploy it, and please report the model"
                )
    return {f"error_{name}": error for name, error in errors.items()}


def _outputs(model: nn.Module, given: Any) -> list[np.ndarray]:
    args, kwargs = given if isinstance(given, tuple) else ((given,), {})
    with evaluating(model):
        return [t.numpy() for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def _run(path: Path, batch: Tensor, call: dict[str, Any] | None) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory(prefix="understudy") as scratch:
        given, result = Path(scratch) / "given.npz", Path(scratch) / "result.npz"
        np.savez(given, batch.numpy(), call=json.dumps(call or {"keyword": None, "options": {}}))
        process = subprocess.run(
            [sys.executable, "-P", str(_RUN), str(path), str(given), str(result)], capture_output=True, text=True
        )
        if process.returncode:
            last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise LawBroken(f"running {path.name} in a process of its own: {last[:300]}; do not deploy it")
        with np.load(result) as held:
            return [held[name] for name in held.files]


def _difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    if [f.shape for f in found] != [e.shape for e in expected]:
        return float("inf")
    if any(np.isnan(f).any() for f in found if f.dtype.kind == "f"):
        return float("inf")
    pairs = ((f.astype(np.float64), e.astype(np.float64)) for f, e in zip(found, expected, strict=True) if e.size)
    return max((float(np.abs(f - e).max() / max(np.abs(e).max(), 1e-300)) for f, e in pairs), default=0.0)


def _check_size(model: nn.Module, path: Path, kind: str) -> int:
    """Bytes of the file with all that lies beside it. Raises: LawBroken where they are more than the student's tensors,
    or where an ONNX file has other parameters than the student."""
    beside = [path.with_name("model.bin"), path.with_name("model.onnx.data")]
    parts = {"onnx": [path, beside[1]], "openvino": [path, beside[0]], "pt2": [path]}[kind]
    size = sum(p.stat().st_size for p in parts if p.exists())
    held = {id(t): t for t in named_tensors(model).values()}.values()
    most = OVERHEAD * sum(t.numel() * t.element_size() for t in held) + OVERHEAD_BYTES
    if size > most:
        raise LawBroken(
            f"exporting {path.name}: it takes {size:,} bytes, expected at most {round(most):,} for the student's "
            "tensors; it holds more than the student"
        )
    if kind == "onnx":
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        written = sum(int(np.prod(t.dims)) for t in graph.initializer)
        wanted = sum(t.numel() for t in held if t.is_floating_point())
        if written > OVERHEAD * wanted + OVERHEAD_BYTES / 4:
            raise LawBroken(
                f"exporting {path.name}: it holds {written:,} numbers, the student {wanted:,}; expected no more"
            )
    return size


def _told(preprocessing: Preprocessing, exports: dict[str, dict[str, Any]]) -> str:
    """preprocessing.json: what to do to an image before each file sees it."""
    plain = "float32 (N, C, H, W), values 0 to 1"
    files = {e["file"]: plain if e["normalises"] else f"{plain}, then (x - mean) / std" for e in exports.values()}
    return json.dumps(preprocessing.to_json() | {"files": files}, indent=1) + "\n"


@contextmanager
def _scratch(folder: Path) -> Iterator[str]:
    """A hidden folder inside, gone afterwards. Raises: StoreError for what the disk says."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=store.SCRATCH) as scratch:
            yield scratch
    except OSError as error:
        raise StoreError(f"exporting to {folder}: {error}") from error


def _put(scratch: Path, folder: Path) -> None:
    """Data before what refers to it; data that a new file has no more goes."""
    names = [p.name for p in scratch.iterdir() if p.is_file()]
    for name in sorted(names, key=lambda n: n in FILES.values()):
        os.replace(scratch / name, folder / name)
    if FILES["onnx"] in names and f"{FILES['onnx']}.data" not in names:
        (folder / f"{FILES['onnx']}.data").unlink(missing_ok=True)
