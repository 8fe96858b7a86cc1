"""Loading a teacher by its name: a model of a library, of the user's own code, of the demo, or a result.

    timm:resnet18.a1_in1k              timm's model, weights (tag optional) and configuration
    torchvision:resnet34.IMAGENET1K_V1 torchvision's; also its segmentation networks, and its detectors (by a part)
    hf:FOLDER or hf:ORGANISATION/NAME  a model of Hugging Face transformers: a folder of save_pretrained, or an id
    hf:ViTForImageClassification       a class of theirs, from its configuration (and model_kwargs), without weights
    onnx:FILE                          the network in an ONNX file (see below)
    path/to/file.py:build              your own: a function that returns an nn.Module, or (module, Preprocessing | dict)
    package.module:build               the same, importable
    demo:NAME                          the teachers that ship with mimicut
    path/to/folder                     a result of mimicut, to be compressed again

**Parts.** `part` names the submodule that is compressed where the whole cannot be: a detector's backbone. It takes
the prepared images as its only argument. Everything outside stays as it is, bit for bit; a result is the whole again.

**Own teachers.** `build()` gets no arguments, or num_classes and in_chans where they were given. It returns an
nn.Module, or a tuple of one and a Preprocessing or a dict of its fields; the dict may add "views". Without a
preprocessing (or flags) it is: input 3x224x224, images resized straight to it, bilinear, ImageNet's mean and std.
Naming a file runs it: only name files that you trust. A result folder never runs code (see `build_architecture`).

**ONNX files.** Their nodes become ordinary modules (`inputs.onnx_models`); no code runs, and an operator that is not
read is named. The file fixes the size of the images, or leaves height and width free: then give input_size. It does not
say how images are prepared: give mean and std, or ImageNet's are assumed. A result holds the list of steps and loads
without the file, which is needed to verify; another file under that name is refused, by its sha256.

**Results.** The model is what `mimicut.load` gives; preprocessing, views, part and call are those of the teacher that
it was made from. Where that teacher is your own code, name the code, and give the folder as its weights:
"file.py:build" with weights="folder" (in Python also the folder with build_teacher=...).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mimicut.base.errors import InputError, unknown_option
from mimicut.base.paths import usable_path
from mimicut.inputs.augment import VIEWS
from mimicut.inputs.build_by_name import parse_spec
from mimicut.inputs.built_model import OWN_PREPROCESSING
from mimicut.inputs.file_names import quoted, short_spec
from mimicut.inputs.model_checks import checked_model
from mimicut.inputs.preprocessing import Preprocessing, PreprocessingChanges, PreprocessingFields
from mimicut.inputs.teacher import Build, Teacher, TeacherOptions, make_teacher, named_teacher
from mimicut.inputs.torchvision_models import detector_preprocessing
from mimicut.results.load_result import as_teacher, is_result
from mimicut.results.store import digest_notes


def load_teacher(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    views: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    part: str = "",
    build_teacher: Build = None,
    class_names: Sequence[str] | str | Path | None = None,
    **preprocessing: Unpack[PreprocessingFields],
) -> Teacher:
    """Load the teacher that `spec` names. The caller's random state is left as it was.

    Args:
        spec: A name in one of the forms at the head of this file.
        weights: A file of tensors (.safetensors, or what torch.save wrote, of which no code is run; "FILE:KEY" takes
            one of several networks in it), or a result that was made from what `spec` names; instead of the library's
            own weights.
        pretrained: Whether the library's own weights are loaded; False gives random ones, the same every time.
        num_classes: Number of classes that the model is built with.
        in_chans: Number of input channels that the model is built with.
        views: A key of `VIEWS`, instead of the one for its task.
        model_kwargs: Further options of the builder; plain data.
        part: The name of the submodule to compress, if not the whole; for a result, what was compressed before.
        build_teacher: For a result, as in `mimicut.load`.
        class_names: The name of each class, for the report: a list, or a file (`class_names.read_class_names`); by
            default those that the library gives.
        preprocessing: Instead of what the weights' configuration says: input_size (C, H, W); mean and std, per channel,
            on the scale 0..1; resize, pixels of the shorter side, or "exact" for straight to (H, W), or "none" for
            crops at the pictures' own scale; interpolation, one of `preprocessing.INTERPOLATIONS`.

    Raises:
        InputError: A name, a file or an option cannot be used, or weights cannot be had.
        UnsupportedModel: The model itself is the reason.
        StoreError, PlanError: A result cannot be loaded.
    """
    own = PreprocessingFields.__annotations__
    known = {*inspect.signature(load_teacher).parameters, *own} - {"spec", "preprocessing"}
    unknown = [unknown_option(name, known) for name in preprocessing if name not in own]
    if unknown:
        raise InputError(f"loading {spec}: " + "; ".join(unknown))
    options = TeacherOptions(
        weights=weights, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, model_kwargs=model_kwargs,
        preprocessing=PreprocessingChanges(**preprocessing), views=views, part=part, build_teacher=build_teacher,
        class_names=class_names,
    )  # fmt: skip
    return _load(str(spec), options)


def load_again(
    record: Mapping[str, Any],
    named: str | None = None,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
) -> Teacher:
    """Load the teacher of a result again, with its weights.

    Args:
        record: As `Teacher.to_json` gave it when the result was made.
        named: Its name now, where the record is not enough: for a teacher that was itself a result, its folder, or the
            code that was built first (its folder may then be `weights`).
        weights: As in `load_teacher`.
        pretrained: As in `load_teacher`.

    Raises:
        InputError: As `load_teacher`; also where the folder of a teacher that was a result is missing or has other
            weights.
    """
    if "result" in record:
        teacher = _result_again(record, named, weights, pretrained)
    else:
        options = dict(record.get("options") or {})
        built_with: dict[str, Any] = {name: options.get(name) for name in ("num_classes", "in_chans", "model_kwargs")}
        given = TeacherOptions(weights=weights, pretrained=pretrained, part=str(record.get("part", "")), **built_with)
        if named is None:
            _refuse_absent(str(record.get("spec")))
        teacher = _load(named or str(record.get("spec")), given)
    if "preprocessing" in record:
        teacher = replace(teacher, preprocessing=Preprocessing.from_json(record["preprocessing"]))
    return teacher


def _refuse_absent(spec: str) -> None:
    """Refuse the name of an ONNX file, as a result recorded it, where the file is not there any more."""
    family, name = parse_spec(spec) or ("", "")
    if family == "onnx" and not usable_path(name, f"loading {spec}").is_file():
        raise InputError(
            f"loading the teacher again: there is no file {name}, from which the result was made; if it was moved, "
            "say where it is: --teacher onnx:FILE"
        )


def code_of(named: str | None) -> str | None:
    """The name of a teacher where it names code or a library; None where it names a folder."""
    return None if named is None or _result_folder(named, None) is not None else named


def _load(spec: str, given: TeacherOptions) -> Teacher:
    if given.views is not None and given.views not in VIEWS:
        raise InputError(f"loading {spec}: found views {given.views!r}, expected one of {', '.join(VIEWS)}")
    folder = _result_folder(spec, given.weights)
    if folder is None:
        if given.build_teacher is not None:
            raise InputError(f"loading {spec}: found build_teacher, which is for a result folder; leave it out")
        return replace(named_teacher(spec, given), given=given)
    named_itself = folder == spec
    fixed = {
        "weights": str(given.weights) if given.weights is not None and named_itself else None,
        "pretrained": None if given.pretrained or not named_itself else False,
        "num_classes": given.num_classes,
        "in_chans": given.in_chans,
        "model_kwargs": dict(given.model_kwargs or {}) or None,
    }
    _refuse_fixed(folder, fixed)
    if given.build_teacher is None and not named_itself:
        given = replace(given, build_teacher=spec)
    return replace(_load_result(folder, given), given=given)


def _result_again(
    record: Mapping[str, Any], named: str | None, weights: str | Path | None, pretrained: bool
) -> Teacher:
    """A teacher that was itself a result, which must still have the weights that it had."""
    code = code_of(named)
    folder = str(named if code != named else weights or record.get("spec"))
    where = "say where it is: --teacher FOLDER, or for your own code --teacher FILE.py:FUNCTION --weights FOLDER"
    if not is_result(folder):
        raise InputError(f"loading the teacher again: it was a result, and there is none at {folder}; {where}")
    other = weights if code != named else None
    _refuse_fixed(folder, {"weights": other and str(other), "pretrained": None if pretrained else False})
    teacher = _load_result(folder, TeacherOptions(build_teacher=code, part=str(record.get("part", ""))))
    assert teacher.result is not None  # as of every teacher from a result
    if teacher.result["weights_sha256"] != record["result"].get("weights_sha256"):
        raise InputError(
            f"loading the teacher again: the result {folder} is not what it was as the teacher (it has other "
            f"weights); {where}"
        )
    return teacher


def _result_folder(spec: str, weights: str | Path | None) -> str | None:
    """The folder of a result that is named, as the teacher itself or as its weights; None where there is none."""
    if weights is not None and is_result(usable_path(weights, f"loading the weights of {spec}")):
        return str(weights)
    return spec if spec and parse_spec(spec) is None and (is_result(spec) or Path(spec).is_dir()) else None


def _refuse_fixed(folder: str, found: Mapping[str, Any]) -> None:
    """Refuse the first option that is given although a result fixes it."""
    for name, value in found.items():
        if value is not None:
            raise InputError(
                f"loading the teacher {folder}: found {name} {value!r}; a result has its own weights and its own "
                "architecture: leave that out, or compress again the network that it was made from"
            )


def _load_result(folder: str, given: TeacherOptions) -> Teacher:
    if not is_result(folder) and Path(folder, "config.json").is_file():
        raise InputError(
            f"loading the teacher {folder}: it is no result of mimicut; a model of transformers is named hf:{folder}"
        )
    model, source, fields = as_teacher(folder, given.build_teacher)
    spec = str(source.get("spec", "a module"))
    made_from = spec if short_spec({"spec": "a module", **source}) == spec else quoted(spec)
    notes = [f"the teacher is itself a result, made from {made_from}: figures are against it"]
    notes += digest_notes(folder)
    if "preprocessing" in source:
        base = Preprocessing.from_json(source["preprocessing"])
    else:
        base = detector_preprocessing(model) or OWN_PREPROCESSING
        notes.append(
            "the folder does not say how its teacher expects images: the defaults for a plain module are assumed"
        )
    preprocessing = given.preprocessing.apply(base, None, notes)
    if preprocessing.input_size[0] != base.input_size[0]:
        _refuse_fixed(folder, {"input_size": preprocessing.input_size})
    views = given.views or source.get("views")
    if views not in (None, *VIEWS):
        raise InputError(f"loading {folder}: its plan has views {views!r}, expected one of {', '.join(VIEWS)}")
    model = checked_model(model, folder, notes)
    part = given.part or str(source.get("part", ""))
    teacher = make_teacher(folder, model, preprocessing, views, {}, notes, part)
    teacher = replace(teacher, build_teacher=given.build_teacher, **fields)
    return replace(teacher, classes=given.classes() or teacher.classes)
