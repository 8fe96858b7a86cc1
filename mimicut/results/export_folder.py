"""A result folder as files that deploy: exported, each checked in a process of its own, and described beside them."""

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.base import memory
from mimicut.base.disk import make_folder, remove, write
from mimicut.base.errors import InputError, LawBroken, StoreError, UnsupportedModel
from mimicut.base.progress import SpokenProgress
from mimicut.base.scratch import locked, replace_files
from mimicut.inputs.extra_images import GENERATED, NONE, read_extra
from mimicut.inputs.image_set import ImageSet, ImageSource, ImagesWithCall, bind_call, read_images, split
from mimicut.inputs.preprocessing import Preprocessing, model_inputs
from mimicut.inputs.teacher import Build, Teacher, own_teacher
from mimicut.proof.image_check import refuse_shared
from mimicut.proof.int8_table import int8_table
from mimicut.recovery.batches import WithExtra
from mimicut.recovery.config import preset
from mimicut.results.export_checks import FIXED, check_exports, data_name, files_of
from mimicut.results.folder import existing_result
from mimicut.results.layer_errors import layer_errors
from mimicut.results.load_result import load_model
from mimicut.results.report import Report
from mimicut.results.store import put_report, read, write_report
from mimicut.results.teachers import code_of, load_again
from mimicut.runtime.edge_formats import EDGE
from mimicut.runtime.export import FILES, FORMATS, TOLERANCE, Exported, check_formats, export_into
from mimicut.runtime.int8 import weight_bits
from mimicut.runtime.int8_mimic import mimic_int8
from mimicut.runtime.latency import Setting
from mimicut.surgery.head import check_head
from mimicut.surgery.plan import Plan, check_teacher
from mimicut.surgery.seam import Seam

REAL, RANDOM = 8, 4  # images that are compared: of those given, and random ones. Source: assumption.
PREPROCESSING = "preprocessing.json"


class NormalisingModel(nn.Module):
    """`model` after the normalisation: it takes images of values 0 to 1, as float32 (N, C, H, W)."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, call: Mapping[str, Any] | None):
        super().__init__()
        self.model, self._call = model, call
        # By other names, as values in the ONNX file have names such as mean.
        self.register_buffer("image_mean", torch.tensor(preprocessing.mean)[:, None, None])
        self.register_buffer("image_std", torch.tensor(preprocessing.std)[:, None, None])

    def forward(self, images: Tensor) -> Any:
        given = model_inputs((images - self.image_mean) / self.image_std, self._call)
        args, kwargs = given if isinstance(given, tuple) else ((given,), {})
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class _PlainImages:
    """Images of values 0 to 1: before the normalisation."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return _unnormalised(self.images.batch(indices), self.images.preprocessing)


@dataclass(frozen=True)
class _InputForm:
    """How exported files take their images: normalised ones as the model does, or, where the files normalise
    themselves, values 0 to 1."""

    preprocessing: Preprocessing
    model_call: Mapping[str, Any] | None
    normalises: bool

    @property
    def call(self) -> Mapping[str, Any] | None:
        return None if self.normalises else self.model_call

    def wrapped(self, model: nn.Module) -> nn.Module:
        return NormalisingModel(model, self.preprocessing, self.model_call) if self.normalises else model

    def images(self, images: ImageSet) -> ImageSet | _PlainImages:
        return _PlainImages(images) if self.normalises else images

    def bound(self, images: ImageSet | None) -> ImageSet | ImagesWithCall | _PlainImages | None:
        if not images:
            return images
        return _PlainImages(images) if self.normalises else bind_call(images, self.call)

    def random_batch(self) -> Tensor:
        batch = _random_batch(self.preprocessing)
        return _unnormalised(batch, self.preprocessing) if self.normalises else batch

    def inputs(self, batch: Tensor) -> Any:
        return model_inputs(batch, self.call)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `export_folder`, described there."""

    formats: tuple[str, ...]
    images: ImageSource | ImageSet | None
    held_out: ImageSource | ImageSet | None
    teacher: str | Callable[[], nn.Module] | Teacher | None
    weights: str | Path | None
    pretrained: bool
    normalise: bool
    dynamic_size: bool
    tolerance: float
    explain: bool
    int8_steps: int
    extra: ImageSource | ImageSet | str
    device: str | None
    max_memory: int | None
    max_seconds: float | None
    say: Callable[[str], None]
    int8_required: bool
    force: bool


@dataclass(frozen=True)
class _Int8Comparison:
    """What INT8 and its table need: the seam, which knows the outputs; the images by which values are quantised, those
    on which networks are compared, if any, and the teacher, or why there is none."""

    seam: Seam
    quantise_by: ImageSet
    compare_on: ImageSet | None
    teacher_model: nn.Module | None
    without_teacher: str | None


def export_folder(
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    images: ImageSource | ImageSet | None = None,
    held_out: ImageSource | ImageSet | None = None,
    teacher: str | Callable[[], nn.Module] | Teacher | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    normalise: bool = False,
    dynamic_size: bool = False,
    tolerance: float = TOLERANCE,
    explain: bool = False,
    int8_steps: int = 0,
    extra: ImageSource | ImageSet | str | None = GENERATED,
    device: str | None = None,
    max_memory: int | None = None,
    max_seconds: float | None = None,
    on_stage: Callable[[str], None] | None = None,
    int8_required: bool = False,
    force: bool = False,
) -> Report:
    """Export the student of a result into its folder, with preprocessing.json, which says what images each file takes.

    Where a part of the teacher was compressed, the part is exported. "int8" also adds the table `Report.int8`: teacher
    and student, each in float32 and in INT8 (`int8_table`), compared on `held_out`, or on those of `images` that the
    student did not learn from. If the student learned from none of them, a fifth of `images` is held out.

    Args:
        folder: The result.
        formats: Any of "onnx", "openvino", "pt2", "int8", and of `edge_formats.EDGE`: "litert", "executorch", "coreml",
            "tensorrt".
        images: Real images to compare with, prepared as the teacher's. "int8" requires some: those that the student
            learned from show how large values become.
        held_out: Further real images, preferred for comparisons.
        teacher: What builds the teacher's architecture, where it is your own code; for the table also the teacher.
        weights: For the table: the weights of the teacher, as in `load_teacher`.
        pretrained: For the table: as in `load_teacher`. If none of the three is given and the teacher cannot be had,
            the table is of the student alone and says why.
        normalise: Whether the files subtract the mean and divide by the deviation themselves; they then take values
            0 to 1.
        dynamic_size: Whether files take images of any height and width, where the network allows it.
        tolerance: The largest difference that is allowed, as a share of the largest output.
        explain: Whether each layer of each file is compared with the student's too (`explain_export`); the files stay
            the same. Not of those for phones, which must not be all that are asked for.
        int8_steps: Steps in which the student learns in INT8, seeing its own rounding (`int8_mimic`); 0 to round it
            as it is. `compress` takes `int8_mimic.STEPS`.
        extra, device, max_memory: For these steps, as of `compress`.
        max_seconds: For all that these steps need: they are as many as fit.
        on_stage: Receives a sentence at each stage of them.
        int8_required: Whether the report's threshold holds for the INT8 file, too.
        force: Whether existing files are replaced.

    Returns:
        The report of the folder with `exports` in it, as it is then stored there.

    Raises:
        LawBroken: A file in a process of its own gives other outputs than the student (in INT8: than here), or does
            not hold the student's parameters.
        InputError, StoreError, UnsupportedModel, PlanError: As `export.export` and `load`. Nothing is left behind.
    """
    formats = tuple(dict.fromkeys(formats))
    check_formats(formats)
    if explain:
        _refuse_layers(formats)
    if "int8" in formats and images is None:
        raise InputError(
            f"exporting {folder} to int8: found no images; expected a few (--images DIR), from which it takes the "
            "ranges of the values"
        )
    if int8_steps and (normalise or "int8" not in formats):
        found = "files that normalise themselves" if normalise else f"the formats {', '.join(formats)}"
        raise InputError(
            f"exporting {folder}: found {int8_steps} steps in INT8 and {found}; expected the format int8 (--to int8), "
            "without --normalise"
        )
    asked = _Asked(
        formats, images, held_out, teacher, weights, pretrained, normalise, dynamic_size, tolerance, explain,
        int8_steps, NONE if extra is None else extra, device, max_memory, max_seconds, on_stage or (lambda text: None),
        int8_required, force,
    )  # fmt: skip
    path = existing_result(folder)
    try:
        with locked(path) as begun:
            return _exported(path, asked, begun)
    except BlockingIOError:
        raise StoreError(f"exporting to {path}: another export into it is under way; wait for it") from None
    except OSError as error:
        raise StoreError(f"exporting to {path}: {error}; nothing was changed there") from error


def explain_export(
    folder: str | Path,
    format: str,
    images: ImageSource | ImageSet | None = None,
    *,
    teacher: str | Callable[[], nn.Module] | Teacher | None = None,
) -> Report:
    """Compare an exported file of a result with its student layer by layer, and keep what is found in its report.

    The file runs in a process of its own, the student in float32; the file stays as it is.

    Args:
        folder: The result.
        format: That of the file: "onnx", "openvino", "pt2" or "int8".
        images: Real images to compare on; else random ones. "int8" requires some.
        teacher: What builds the teacher's architecture, where it is your own code.

    Returns:
        The report of the folder, as it is then stored there: `report.exports[format]["layers"]` is what
        `results.layer_errors.layer_errors` describes.

    Raises:
        InputError: There is no such format or file, or there are no images for INT8.
        UnsupportedModel: No layer can be found in the file.
        StoreError, PlanError: As `load`; or the report cannot be written.
    """
    check_formats([format])
    _refuse_layers([format])
    path = existing_result(folder)
    plan, report, _ = read(path)
    file, entry = path / FILES[format], report.exports.get(format)
    if entry is None or not file.is_file():
        raise InputError(
            f"explaining {file}: found no exported file; expected one that was exported into this folder "
            f"(mimicut export {path} --to {format})"
        )
    if format == "int8" and images is None:
        raise InputError(
            f"explaining {file}: found no images; expected a few real ones, whose ranges are those of INT8"
        )
    form = _InputForm(_preprocessing_of(path, plan), plan.call, bool(entry["normalises"]))
    model = form.wrapped(_exported_part(plan, load_model(path, _architecture(teacher))))
    batches = _batches(form, None if images is None else _read(images, form.preprocessing))
    entry = _with_layers(model, file, format, batches, form, entry)
    report = replace(report, exports={**report.exports, format: entry})
    put_report(path, report)
    return report


def _refuse_layers(formats: Sequence[str]) -> None:
    """Refuse formats of which none can be compared layer by layer."""
    if set(formats) <= set(EDGE):
        raise InputError(
            f"comparing layers: found {', '.join(formats)}, whose files show no values of their layers; expected one "
            f"of {', '.join(f for f in FILES if f not in EDGE)}"
        )


def _with_layers(
    model: nn.Module, file: Path, kind: str, batches: Mapping[str, Tensor], form: _InputForm, entry: dict[str, Any]
) -> dict[str, Any]:
    """The entry of a file in `Report.exports`, with the errors of its layers."""
    free = [axis for axis in ("batch", "size") if entry.get(axis) == "any"]
    return {**entry, "layers": layer_errors(model, file, kind, batches, form.call, free, form.normalises)}


def _exported_part(plan: Plan, whole: nn.Module) -> nn.Module:
    """What is exported of a network: the part that was compressed."""
    return whole.get_submodule(str((plan.teacher.get("source") or {}).get("part", "")))


def finish_killed_export(folder: str | Path) -> None:
    """Finish what a killed export, or a killed `put_report`, began.

    Raises:
        StoreError: The disk refuses, or an export is under way.
    """
    path = existing_result(folder)
    try:
        with locked(path):
            pass
    except OSError as error:
        raise StoreError(f"working in {path}: {error}") from error


def _exported(path: Path, asked: _Asked, begun: Set[str]) -> Report:
    """`export_folder` in a folder that is locked. begun: the files of a killed export, which are replaced."""
    plan, report, _ = read(path)
    if not asked.force:
        _refuse_existing(path, asked.formats, report, begun)
    form = _InputForm(_preprocessing_of(path, plan), plan.call, asked.normalise)
    whole = load_model(path, _architecture(asked.teacher))
    sources = (asked.images, asked.held_out)
    real, compared = (None if some is None else _read(some, form.preprocessing) for some in sources)
    comparison = None
    if "int8" in asked.formats:
        assert real is not None  # refused above
        real, compared = _parts(real, compared, report)
        found = _teacher_model(plan, whole, form.preprocessing, asked.teacher, asked.weights, asked.pretrained)
        comparison = _Int8Comparison(plan.seam, real, compared, *found)
    model = form.wrapped(_exported_part(plan, whole))
    batches = _batches(form, real if compared is None or len(compared) < FIXED else compared)

    def fill(fresh: Path) -> Report:
        made = _export(model, fresh, asked, form, batches, comparison, report)
        for name in (FILES["onnx"], FILES["int8"]):
            data = f"{name}.data"
            if (fresh / name).exists() and (path / data).exists() and not (fresh / data).exists():
                write(fresh / data, "")  # which removes the old one
        write_report(fresh, path, made)
        return made

    return replace_files(path, fill)


def export_programs(
    model: nn.Module,
    folder: Path,
    formats: Sequence[str],
    preprocessing: Preprocessing,
    call: Mapping[str, Any] | None,
    images: ImageSet | None,
    tolerance: float = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """Export a model in hand, as `export_folder` does, into a folder that holds no result.

    Returns:
        The entries of `Report.exports`.

    Raises:
        LawBroken, UnsupportedModel, StoreError: As `export_folder`.
    """
    form = _InputForm(preprocessing, call, False)
    batches = _batches(form, images or None)
    example = form.inputs(batches["random"][:FIXED])
    exported = export_into(model, example, folder, formats=formats, tolerance=tolerance)
    exports = _checked(model, exported, formats, batches, form, tolerance)
    write(folder / PREPROCESSING, _description(preprocessing, exports))
    return exports


def _export(
    model: nn.Module,
    scratch: Path,
    asked: _Asked,
    form: _InputForm,
    batches: Mapping[str, Tensor],
    comparison: _Int8Comparison | None,
    report: Report,
) -> Report:
    """Fill `scratch` with the checked files and their description, and return the report with them in it."""
    example, formats = form.inputs(batches["random"][:FIXED]), asked.formats
    options: dict[str, Any] = {"tolerance": asked.tolerance, "dynamic_size": asked.dynamic_size}
    if comparison is None:
        exported = export_into(model, example, scratch, formats=formats, **options)
        exports = _checked(model, exported, formats, batches, form, asked.tolerance)
    else:
        both = tuple(dict.fromkeys((*formats, "onnx")))  # the table compares INT8 with float32
        calibrate = _calibration(form, comparison.quantise_by)
        exported = export_into(model, example, scratch, formats=both, calibrate=calibrate, **options)
        mimicked = (
            None if not asked.int8_steps else _mimicked(model, exported, example, form, comparison, asked, report)
        )
        exports = _checked(model, exported, formats, batches, form, asked.tolerance)
        table = _int8_table(model, exported, scratch, form, example, comparison, calibrate, report, asked.tolerance)
        required = asked.int8_required or bool((report.int8 or {}).get("required"))
        more = {"weight_bits": weight_bits(), "mimic": mimicked, "required": required}
        report = replace(report, int8={**table, **more})
        if "onnx" not in formats:
            for file in files_of(exported.files["onnx"]):
                remove(file)
    if asked.explain:
        exports = {
            kind: e if kind in EDGE else _with_layers(model, exported.files[kind], kind, batches, form, e)
            for kind, e in exports.items()
        }
    report = replace(report, exports={**report.exports, **exports})
    write(scratch / PREPROCESSING, _description(form.preprocessing, report.exports))
    return report


def _mimicked(
    model: nn.Module,
    exported: Exported,
    example: Any,
    form: _InputForm,
    comparison: _Int8Comparison,
    asked: _Asked,
    report: Report,
) -> dict[str, Any]:
    """Let the INT8 file learn, in place; return what was done, or {"failed": why it was not}."""
    few, seam, memory_bytes = comparison.quantise_by, comparison.seam, memory.bound(asked.max_memory)
    if exported.static is not None:
        return {"failed": f"the file has a fixed batch size: {exported.static}"}
    own = report.config.get("mimic") or {}
    views = str(own.get("views", "none"))
    config = preset("default", steps=asked.int8_steps, views=views, seed=own.get("seed"), device=asked.device)
    config = replace(config, extra_share=own.get("extra_share", config.extra_share))
    free = ["batch", *(["size"] if exported.static_size is None else [])]
    most = config.steps * config.batch_size
    beside = read_extra(asked.extra, few, views, seed=config.seed, memory_bytes=memory_bytes, most=most)
    images: Any = bind_call(few, form.call)
    if beside is not None and beside.pictures is not None:
        refuse_shared(beside.pictures, {"held-out": comparison.compare_on})
    if beside is not None:
        images = WithExtra(images, replace(beside, call=form.call))
    asked.say(f"mimicking {config.steps} steps in INT8, on {len(few)} images")
    try:
        return mimic_int8(
            exported.files["int8"], model, example, seam, images, config, free=free,
            on_step=SpokenProgress(asked.say, "step in INT8"), max_memory=int(memory.PASSES * memory_bytes),
            max_seconds=asked.max_seconds,
        ).to_json()  # fmt: skip
    except UnsupportedModel as error:
        asked.say(f"note: INT8 as rounded, without mimicking: {error}")
        return {"failed": str(error).removeprefix("mimicking in INT8: ")}


def _int8_table(
    model: nn.Module,
    exported: Exported,
    scratch: Path,
    form: _InputForm,
    example: Any,
    comparison: _Int8Comparison,
    calibrate: Sequence[Any],
    report: Report,
    tolerance: float,
) -> dict[str, Any]:
    """`Report.int8`: the student, and the teacher where it can be had, each in float32 and in INT8."""
    networks, reference = {"student": exported}, model
    if comparison.teacher_model is not None:
        reference = form.wrapped(comparison.teacher_model)
        kinds = ("onnx", "int8")
        folder = scratch / "teacher"
        make_folder(folder)
        files = export_into(reference, example, folder, formats=kinds, calibrate=calibrate, tolerance=tolerance)
        networks = {"teacher": files, **networks}
    compare_on: Any = form.bound(comparison.compare_on)  # plain images too have its length and batches
    table = int8_table(networks, reference, compare_on, example, _setting(report), comparison.seam)
    return {
        **table, "images_quantised_by": len(comparison.quantise_by), "without_teacher": comparison.without_teacher,
    }  # fmt: skip


def _checked(
    model: nn.Module,
    exported: Exported,
    formats: Sequence[str],
    batches: Mapping[str, Tensor],
    form: _InputForm,
    tolerance: float,
) -> dict[str, dict[str, Any]]:
    exports = check_exports(model, exported, formats, batches, form.call, tolerance)
    return {kind: {**entry, "normalises": form.normalises} for kind, entry in exports.items()}


def _calibration(form: _InputForm, images: ImageSet) -> list[Any]:
    """The images in pairs, as the exported example has two; the last one is paired with the first."""
    pairs = ([i, (i + 1) % len(images)] for i in range(0, len(images), 2))
    return [form.inputs(form.images(images).batch(pair)) for pair in pairs]


def _batches(form: _InputForm, images: ImageSet | None) -> dict[str, Tensor]:
    """Random images, and the first of the real ones, where there are some."""
    batches = {"random": form.random_batch()}
    if images is not None:
        batches["real"] = form.images(images).batch(range(min(REAL, len(images))))
    return batches


def _random_batch(preprocessing: Preprocessing) -> Tensor:
    return torch.randn(RANDOM, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))


def _refuse_existing(path: Path, formats: Sequence[str], report: Report, begun: Set[str]) -> None:
    names = [name for f in formats for name in (FILES[f], data_name(FILES[f]))]
    names += [] if report.exports else [PREPROCESSING]
    existing = [path / name for name in names if name not in begun and (path / name).exists()]
    if existing:
        raise StoreError(f"exporting to {existing[0]}: it exists; replace it with force (--force)")


def _preprocessing_of(path: Path, plan: Plan) -> Preprocessing:
    source = plan.teacher.get("source") or {}
    if "preprocessing" not in source:
        raise InputError(f"exporting {path}: the folder does not say how images are prepared; use mimicut.export")
    return Preprocessing.from_json(source["preprocessing"])


def _unnormalised(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return batch * std + mean


def _read(images: ImageSource | ImageSet, preprocessing: Preprocessing) -> ImageSet:
    return images if isinstance(images, ImageSet) else read_images(images, preprocessing)


def _architecture(teacher: str | Callable[[], nn.Module] | Teacher | None) -> Build:
    if isinstance(teacher, Teacher):
        return teacher.architecture()
    return code_of(teacher) if isinstance(teacher, str) else teacher


def _parts(real: ImageSet, held_out: ImageSet | None, report: Report) -> tuple[ImageSet, ImageSet | None]:
    """Images to quantise by, and images to compare on, which the student did not learn from; None without any."""
    learned = {h for use in ("fit", "choose") for h in report.image_hashes.get(use, [])}
    known = [i for i, h in enumerate(real.hashes) if h in learned]
    trained = set(report.learned_hashes)
    if held_out is None and not trained & set(real.hashes) and len(real.distinct()) > 1:
        parts = split(real, seed=0, held_out_share=0.2, choose_share=0.0)
        return real.subset(parts.fit), real.subset(parts.held_out)
    few = real.subset(known) if known else real
    rest = (real if held_out is None else held_out).distinct()
    own = set(few.contents)
    new = [i for i, h in enumerate(rest.hashes) if h not in trained and rest.contents[i] not in own]
    return few, rest.subset(new) if new else None


def _teacher_model(
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
            found = teacher
        elif callable(teacher):
            found = own_teacher(teacher(), preprocessing, part=str(source.get("part", "")))
        else:
            found = load_again(source, teacher, weights=weights, pretrained=pretrained)
        check_teacher(found.model, plan)
        check_head(found.model if found.whole is None else found.whole, student, plan.seam, found.part)
    except (InputError, LawBroken) as error:
        if teacher is not None or weights is not None:
            raise
        return None, str(error)
    return found.model, None


def _setting(report: Report) -> Setting:
    """Where the student's latency was measured, as far as INT8 runs there."""
    latency = report.latency or {}
    if latency.get("runtime") in ("onnxruntime", "openvino"):
        return Setting(latency["runtime"], latency["threads"], latency["batch"])
    return Setting("onnxruntime", torch.get_num_threads(), 1)


def _description(preprocessing: Preprocessing, exports: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of preprocessing.json: what to do to an image before each file sees it."""
    plain = "float32 (N, C, H, W), values 0 to 1"
    files = {e["file"]: plain if e["normalises"] else f"{plain}, then (x - mean) / std" for e in exports.values()}
    return json.dumps(preprocessing.to_json() | {"files": files}, indent=1) + "\n"
