"""A result folder as files that deploy: each run in a process of its own and compared with the student there.

On random images, and on real ones where some are given. What the files hold is counted too: a file that is larger than
the student's tensors, or has other parameters, is no export of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimicut.anatomy.tracing import as_example
from mimicut.base.errors import InputError, LawBroken, StoreError
from mimicut.inputs.image_set import ImageSet, bind_call, read_images, split
from mimicut.inputs.preprocessing import Preprocessing, handed
from mimicut.inputs.teacher import Teacher, own_teacher
from mimicut.proof.int8_table import int8_table
from mimicut.results import store
from mimicut.results.report import Report
from mimicut.results.teachers import code_of, load_again
from mimicut.runtime import run_exported
from mimicut.runtime.export import (
    FILES,
    FORMATS,
    TOLERANCE,
    Exported,
    check_formats,
    difference,
    export,
    outputs_of,
    run_onnx,
)
from mimicut.runtime.latency import Setting
from mimicut.surgery.head import check_head
from mimicut.surgery.plan import Plan, check_teacher

FIXED = 2  # images that a file takes whose batch cannot be free
REAL, RANDOM = 8, 4  # images that are compared: of those given, and random ones. Source: assumption.
# A file may be so much larger than the student's tensors: names, the graph, alignment. Source: assumption.
OVERHEAD_BYTES, OVERHEAD = 4 * 2**20, 1.1
EXTRA_NUMBERS = 2**14  # shapes, indices and scales that a graph holds beside the tensors. Source: assumption.
PREPROCESSING = "preprocessing.json"
_RUN = Path(run_exported.__file__)


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
    held_out: str | Path | ImageSet | None = None,
    teacher: str | Callable[[], nn.Module] | Teacher | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    normalise: bool = False,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Report:
    """Write the student of a result into its folder, in `formats` ("onnx", "openvino", "pt2", "int8").

    Beside them preprocessing.json: how each file wants its images. images: real ones to compare with, prepared as the
    teacher's; held_out: likewise, and preferred. teacher: the code that builds the teacher's architecture, where it is
    your own ("file.py:build"). normalise: the files subtract the mean and divide by the deviation themselves; they then
    take values of 0 to 1. Of a teacher that was compressed in part the part is written. Returns the report of the
    folder with `exports` in it, as it then stands in the folder.

    "int8" needs images; those among them that the student learned from say how large values become. It also puts `int8`
    into the report: teacher and student, each in float32 and in INT8 (`int8_table`), compared on `held_out`, or on
    those of `images` that the student did not learn from. Of images that it knows none of, a fifth is held out.
    teacher, weights, pretrained: the teacher itself, as in `compress.verify_folder`; where none is given and the
    teacher cannot be had, the table is of the student alone, and says why.

    Raises: LawBroken where a file run by itself differs by more than `tolerance` of the largest output from the student
    (in INT8: from what it gives here), or does not hold the student's parameters; else as `export.export` and
    `store.load`. Nothing is then left behind.
    """
    formats = tuple(dict.fromkeys(formats))
    check_formats(formats)
    if "int8" in formats and images is None:
        raise InputError(
            f"exporting {folder} to int8: found no images; expected a few (--images DIR), which say how large the "
            "values become"
        )
    path = Path(folder).resolve()
    with _alone(path):
        plan, report, _ = store.read(folder)
        names = [name for f in formats for name in (FILES[f], _beside(FILES[f]))]
        names += [] if report.exports else [PREPROCESSING]
        there = [path / name for name in names if (path / name).exists()]
        if there and not force:
            raise StoreError(f"exporting to {there[0]}: it exists; replace it with force (--force)")
        source = plan.teacher.get("source") or {}
        if "preprocessing" not in source:
            raise InputError(
                f"exporting {path}: the folder does not say what images its teacher takes; use mimicut.export"
            )
        preprocessing, call = Preprocessing.from_json(source["preprocessing"]), plan.asked.get("call")
        whole = store.load(folder, _architecture(teacher))
        real, proof = (None if some is None else _read(some, preprocessing) for some in (images, held_out))
        lead, without = None, None
        if "int8" in formats:
            real, proof = _parts(real, proof, report)
            lead, without = _lead(plan, whole, preprocessing, teacher, weights, pretrained)

        def wrapped(model: nn.Module) -> nn.Module:
            return Prepared(model, preprocessing, plan.asked.get("call")) if normalise else model

        def shown(images: ImageSet) -> ImageSet | _Plain:
            return _Plain(images) if normalise else images

        model = wrapped(whole.get_submodule(str(source.get("part", ""))))
        call = None if normalise else call
        random = _random(preprocessing)
        batches = {"random": _unnormalised(random, preprocessing) if normalise else random}
        judging = real if proof is None or len(proof) < FIXED else proof
        if judging is not None:
            batches["real"] = shown(judging).batch(range(min(REAL, len(judging))))
        example = handed(batches["random"][:FIXED], call)
        with _scratch(path) as scratch:
            options: dict[str, Any] = {"tolerance": tolerance, "formats": formats}
            if "int8" in formats:
                pairs = ([i, (i + 1) % len(real)] for i in range(0, len(real), 2))
                options["calibrate"] = [handed(shown(real).batch(pair), call) for pair in pairs]
                options["formats"] = tuple(dict.fromkeys((*formats, "onnx")))  # the table compares both
            found = export(model, example, scratch, **options)
            exports = _proved(model, found, formats, batches, call, tolerance, normalise)
            if "int8" in formats:
                networks = {"student": found}
                if lead is not None:
                    options["formats"] = ("onnx", "int8")
                    networks = {
                        "teacher": export(wrapped(lead), example, Path(scratch) / "teacher", **options),
                        **networks,
                    }
                table = int8_table(
                    networks,
                    model if lead is None else wrapped(lead),
                    proof and bind_call(shown(proof), call),
                    example,
                    _setting(report),
                )
                report = replace(report, int8={**table, "images_quantised_by": len(real), "without_teacher": without})
            report = replace(report, exports={**report.exports, **exports})
            for name in set(options["formats"]) - set(formats):
                for file in _parts_of(found.files[name]):
                    file.unlink()
            (Path(scratch) / PREPROCESSING).write_text(_told(preprocessing, report.exports), encoding="utf-8")
            _put(Path(scratch), path)
        store.put_report(folder, report)
        return report


def export_programs(
    model: nn.Module,
    folder: Path,
    formats: Sequence[str],
    preprocessing: Preprocessing,
    call: dict[str, Any] | None,
    images: ImageSet | None,
    tolerance: float = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """As `export_folder`, of a model in hand, into a folder that holds no result: `Report.exports` of it."""
    batches = {"random": _random(preprocessing)}
    if images:
        batches["real"] = images.batch(range(min(REAL, len(images))))
    found = export(model, handed(batches["random"][:FIXED], call), folder, formats=formats, tolerance=tolerance)
    exports = _proved(model, found, formats, batches, call, tolerance, False)
    (folder / PREPROCESSING).write_text(_told(preprocessing, exports), encoding="utf-8")
    return exports


def _random(preprocessing: Preprocessing) -> Tensor:
    return torch.randn(RANDOM, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))


def _proved(
    model: nn.Module,
    found: Exported,
    formats: Sequence[str],
    batches: dict[str, Tensor],
    call: dict[str, Any] | None,
    tolerance: float,
    normalises: bool,
) -> dict[str, dict[str, Any]]:
    """Every file run by itself and counted. Raises: LawBroken."""
    elsewhere = {f: _elsewhere(model, found, f, batches, call, tolerance) for f in formats}
    sizes = {f: check_size(found, found.files[f], f) for f in formats}
    return {
        f: {
            "file": FILES[f], "bytes": sizes[f], "precision": "int8" if f == "int8" else found.precision,
            "tolerance": None if f == "int8" else tolerance, "opset": found.opset if f != "pt2" else None,
            "batch": "any" if found.static is None else str(FIXED), "fixed_because": found.static,
            "normalises": normalises, "call": call, **elsewhere[f],
        }
        for f in formats
    }  # fmt: skip


@dataclass(frozen=True)
class _Plain:
    """Images of values 0 to 1."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return _unnormalised(self.images.batch(indices), self.images.preprocessing)


def _unnormalised(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return batch * std + mean


def _read(images: str | Path | ImageSet, preprocessing: Preprocessing) -> ImageSet:
    return images if isinstance(images, ImageSet) else read_images(images, preprocessing)


def _architecture(teacher: str | Callable[[], nn.Module] | Teacher | None) -> Any:
    if isinstance(teacher, Teacher):
        return teacher.architecture()
    return code_of(teacher) if isinstance(teacher, str) else teacher


def _parts(real: ImageSet, proof: ImageSet | None, report: Report) -> tuple[ImageSet, ImageSet | None]:
    """Images to quantise by, and those to compare on, which the student did not learn from: None where none are."""
    learnt = {h for use in ("fit", "choose") for h in report.image_hashes.get(use, [])}
    known = [i for i, h in enumerate(real.hashes) if h in learnt]
    if proof is None and not known and len(real.distinct()) > 1:
        parts = split(real, seed=0, held_out_share=0.2, choose_share=0.0)
        return real.subset(parts.fit), real.subset(parts.held_out)
    few = real.subset(known) if known else real
    rest = (real if proof is None else proof).distinct()
    own = set(few.contents)
    new = [i for i, h in enumerate(rest.hashes) if h not in learnt and rest.contents[i] not in own]
    return few, rest.subset(new) if new else None


def _lead(
    plan: Plan,
    student: nn.Module,
    preprocessing: Preprocessing,
    teacher: str | Callable[[], nn.Module] | Teacher | None,
    weights: str | Path | None,
    pretrained: bool,
) -> tuple[nn.Module | None, str | None]:
    """The network that was cut, with its weights; or why it cannot be had."""
    source = plan.teacher.get("source") or {}
    try:
        if isinstance(teacher, Teacher):
            lead = teacher
        elif callable(teacher):
            lead = own_teacher(teacher(), preprocessing, part=str(source.get("part", "")))
        else:
            lead = load_again(source, teacher, weights=weights, pretrained=pretrained)
        check_teacher(lead.model, plan)
        check_head(lead.model if lead.whole is None else lead.whole, student, plan.seam, lead.part)
    except (InputError, LawBroken) as error:
        if teacher is not None or weights is not None:
            raise
        return None, str(error)
    return lead.model, None


def _setting(report: Report) -> Setting:
    """Where the student's latency was measured, as far as INT8 runs there."""
    told = report.latency or {}
    if told.get("runtime") in ("onnxruntime", "openvino"):
        return Setting(told["runtime"], told["threads"], told["batch"])
    return Setting("onnxruntime", torch.get_num_threads(), 1)


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
        # A file whose batch is fixed takes FIXED images.
        parts = [batch] if found.static is None else list(batch.split(FIXED))
        for part in (p for p in parts if found.static is None or len(p) == FIXED):
            given = as_example(handed(part, call))
            alone, wanted = _run(found.files[kind], part, call), outputs_of(model, *given)
            error = difference(alone, wanted)
            errors[name] = max(error, errors[name] or 0.0)
            if kind == "int8":  # what is lost is told; what runs elsewhere has to be what was quantised here
                error = difference(alone, *run_onnx(found.files[kind], [given]))
            if not error <= tolerance:
                raise LawBroken(
                    f"comparing {found.files[kind].name} in a process of its own with "
                    f"{'what it gives here' if kind == 'int8' else 'the student'}, on {name} images: "
                    f"outputs differ by {error:.1e} of the largest in float32, expected at most {tolerance:.1e}; do "
                    "not deploy it, and please report the model"
                )
    return {f"error_{name}": error for name, error in errors.items()}


def _run(path: Path, batch: Tensor, call: dict[str, Any] | None) -> list[Tensor]:
    with tempfile.TemporaryDirectory(prefix="mimicut") as scratch:
        given, result = Path(scratch) / "given.npz", Path(scratch) / "result.npz"
        np.savez(given, batch.numpy(), call=json.dumps(call or {"keyword": None, "options": {}}))
        process = subprocess.run(
            [sys.executable, "-P", str(_RUN), str(path), str(given), str(result)], capture_output=True, text=True
        )
        if process.returncode:
            said = " / ".join(process.stderr.strip().splitlines()[-3:]) or f"exit code {process.returncode}"
            raise LawBroken(f"running {path.name} in a process of its own: {said[-600:]}; do not deploy it")
        with np.load(result) as held:
            return [torch.from_numpy(held[name]) for name in held.files]


def check_size(found: Exported, path: Path, kind: str) -> int:
    """Bytes of the file with all that lies beside it.

    found: what the student's own trace holds. Raises: LawBroken where the file holds more than that, or INT8 nothing in
    8 bits.
    """
    size = sum(p.stat().st_size for p in _parts_of(path))
    most = OVERHEAD * found.bytes + OVERHEAD_BYTES
    if size > most:
        raise LawBroken(
            f"exporting {path.name}: it takes {size:,} bytes, expected at most {round(most):,} for the student's "
            "tensors; it holds more than the student"
        )
    if kind in ("onnx", "int8"):
        import onnx

        weights = onnx.load(path, load_external_data=False).graph.initializer
        written, allowed, what = sum(int(np.prod(t.dims)) for t in weights), found.numbers, "numbers"
        slack = EXTRA_NUMBERS
        if kind == "int8" and not any(t.data_type == onnx.TensorProto.INT8 for t in weights):
            raise LawBroken(
                f"exporting {path.name}: found none of its {written:,} numbers in INT8; use the float32 file"
            )
    else:
        if kind == "openvino":
            written = path.with_name(_beside(path.name)).stat().st_size
        else:
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
            written = sum(p.file_size for p in parts if "/weights/" in p.filename or "/constants/" in p.filename)
        allowed, what, slack = found.bytes, "bytes of tensors", 8 * EXTRA_NUMBERS
    if written > OVERHEAD * allowed + slack:
        raise LawBroken(
            f"exporting {path.name}: it holds {written:,} {what}, the student {allowed:,}; expected no more"
        )
    return size


def _parts_of(path: Path) -> list[Path]:
    return [p for p in (path, path.with_name(_beside(path.name))) if p.exists()]


def _beside(name: str) -> str:
    """Where the weights of a file lie that does not hold them itself."""
    return "model.bin" if name == FILES["openvino"] else f"{name}.data"


def _told(preprocessing: Preprocessing, exports: dict[str, dict[str, Any]]) -> str:
    """preprocessing.json: what to do to an image before each file sees it."""
    plain = "float32 (N, C, H, W), values 0 to 1"
    files = {e["file"]: plain if e["normalises"] else f"{plain}, then (x - mean) / std" for e in exports.values()}
    return json.dumps(preprocessing.to_json() | {"files": files}, indent=1) + "\n"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process exports into `folder` meanwhile: files of one and the report of another would lie together.
    Not on Windows. Raises: StoreError where one does."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context((folder / store.PLAN).open())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"exporting to {folder}: another export into it is under way; wait for it") from None
            for left in folder.glob(f"{store.SCRATCH}*"):  # of an export that was killed
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
        yield


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
    for name in (FILES["onnx"], FILES["int8"]):
        if name in names and f"{name}.data" not in names:
            (folder / f"{name}.data").unlink(missing_ok=True)
