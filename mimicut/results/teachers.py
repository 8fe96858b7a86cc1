"""From a name to a teacher: the model in eval mode, on the CPU, in float32, with the preprocessing its weights expect.

    timm:resnet18.a1_in1k              timm's model, weights (tag optional) and configuration
    torchvision:resnet34.IMAGENET1K_V1 torchvision's; also its segmentation networks, and its detectors (by a part)
    hf:FOLDER or hf:ORGANISATION/NAME  a model of Hugging Face transformers: a folder of save_pretrained, or an id
    hf:ViTForImageClassification       a class of theirs, from its configuration (and model_kwargs), without weights
    path/to/file.py:build              your own: a function that returns an nn.Module, or (module, Preprocessing | dict)
    package.module:build               the same, importable
    demo:NAME                          the teachers that ship with mimicut
    path/to/folder                     a result of mimicut, to be compressed again

**Parts.** `part` names the submodule that is compressed where the whole cannot be: a detector's backbone. It takes
the prepared images as its only argument. Everything outside stays as it is, bit for bit; a result is the whole again.

**Own teachers, the contract.** `build()` is called without arguments, or with num_classes and in_chans where they were
asked for. Without a Preprocessing of its own (or flags): input 3x224x224, images resized straight to it, bilinear,
ImageNet's mean and std. A dict has the fields of Preprocessing, and may add "views". Naming a file runs it: only name
files that you trust. A result folder never does (see `build_architecture`).

**Results.** What `mimicut.load` gives, with the preprocessing, views, part and call of the teacher that it was made
of. Where that is code of one's own, the code is named and the folder is its weights: "file.py:build" with
weights="folder" (in Python also the folder with build_teacher=...).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimicut.base.errors import InputError
from mimicut.inputs.augment import VIEWS
from mimicut.inputs.builders import OWN_PREPROCESSING, detector_preprocessing
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import Build, Teacher, checked_model, form_of, make_teacher, named_teacher, overridden
from mimicut.results import store


def load_teacher(
    spec: str | Path,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: int | str | None = None,
    interpolation: str | None = None,
    views: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    part: str = "",
    build_teacher: Build = None,
) -> Teacher:
    """The teacher that `spec` names (forms: see the head of this file).

    weights: a file of tensors (.safetensors, or a state dict that torch reads with weights_only), or a result that was
    made of what `spec` names; instead of the library's own. pretrained: the library's own weights; False: random ones,
    the same every time. The rest overrides what the weights' configuration says: input_size (C, H, W); mean and std per
    channel on the scale 0..1; resize in pixels of the shorter side, or "exact" (straight to H x W); views: a key of
    VIEWS. model_kwargs go to the builder. part: the submodule to compress, if not the whole (of a result: what was
    compressed before). build_teacher: of a result, as in `store.load`.

    The caller's random state is left as it was. Raises InputError for names, files and options that do not fit, and
    when weights cannot be had; UnsupportedModel when the model itself is the reason; StoreError and PlanError where a
    result cannot be loaded.
    """
    spec = str(spec)
    if views is not None and views not in VIEWS:
        raise InputError(f"loading {spec}: found views {views!r}, expected one of {', '.join(VIEWS)}")
    folder = _result_folder(spec, weights)
    if folder is not None:
        fixed = {
            "weights": str(weights) if weights is not None and folder == spec else None,
            "pretrained": None if pretrained or folder != spec else False,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "model_kwargs": dict(model_kwargs or {}) or None,
        }
        _refuse_fixed(folder, fixed)
        build_teacher = spec if build_teacher is None and folder != spec else build_teacher
        said = (input_size, mean, std, resize, interpolation)
        return _result(folder, build_teacher, said, views, part)
    if build_teacher is not None:
        raise InputError(f"loading {spec}: found build_teacher, which is for a result folder; leave it out")
    return named_teacher(
        spec, weights=weights, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans,
        input_size=input_size, mean=mean, std=std, resize=resize, interpolation=interpolation, views=views,
        model_kwargs=model_kwargs, part=part,
    )  # fmt: skip


def load_again(
    record: Mapping[str, Any],
    named: str | None = None,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
) -> Teacher:
    """The teacher that a `Teacher.to_json()` tells of, with its weights.

    named: how it is named now, where the record is not enough; of a teacher that was a result, its folder, or the code
    that was built first (its folder may then be `weights`). Raises InputError as `load_teacher` does, and where that
    folder is gone or has other weights.
    """
    options, part = dict(record.get("options") or {}), str(record.get("part", ""))
    if "result" in record:
        code = code_of(named)
        folder = str(named if code != named else weights or record.get("spec"))
        where = "say where it is: --teacher FOLDER, or of one's own code --teacher FILE.py:FUNCTION --weights FOLDER"
        if not store.is_result(folder):
            raise InputError(f"loading the teacher again: it was a result, and there is none at {folder}; {where}")
        other = weights if code != named else None
        _refuse_fixed(folder, {"weights": other and str(other), "pretrained": None if pretrained else False})
        lead = _result(folder, code, (None,) * 5, None, part)
        if lead.result["weights_sha256"] != record["result"].get("weights_sha256"):
            raise InputError(
                f"loading the teacher again: the result {folder} is not what it was as the teacher (it has other "
                f"weights); {where}"
            )
    else:
        lead = load_teacher(
            named or str(record.get("spec")), weights=weights, pretrained=pretrained, part=part,
            **{name: options.get(name) for name in ("num_classes", "in_chans", "model_kwargs")},
        )  # fmt: skip
    if "preprocessing" in record:
        lead = replace(lead, preprocessing=Preprocessing.from_json(record["preprocessing"]))
    return lead


def _result_folder(spec: str, weights: str | Path | None) -> str | None:
    """The folder of a result that is named, as the teacher itself or as its weights; None where there is none."""
    if weights is not None and store.is_result(weights):
        return str(weights)
    return spec if spec and form_of(spec) is None and (Path(spec).is_dir() or store.is_result(spec)) else None


def code_of(named: str | None) -> str | None:
    """`named`, how a teacher is named, where that is not a folder."""
    return None if named is None or _result_folder(named, None) is not None else named


def _refuse_fixed(folder: str, found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        if value is not None:
            raise InputError(
                f"loading the teacher {folder}: found {name} {value!r}; a result has its own weights and its own "
                "architecture: leave that out, or compress the network that it was made of again"
            )


def _result(folder: str, build_teacher: Build, said: Sequence[Any], views: str | None, part: str) -> Teacher:
    """said: what overrides the recorded preprocessing, in the order of `overridden`."""
    if not store.is_result(folder) and Path(folder, "config.json").is_file():
        raise InputError(
            f"loading the teacher {folder}: it is no result of mimicut; a model of transformers is named hf:{folder}"
        )
    model, source, told = store.as_teacher(folder, build_teacher)
    notes = [f"the teacher is itself a result, made of {source.get('spec', 'a module')}: figures are against it"]
    if "preprocessing" in source:
        base = Preprocessing.from_json(source["preprocessing"])
    else:
        base = detector_preprocessing(model) or OWN_PREPROCESSING
        notes.append("the folder does not say how its teacher wanted images: as of a module in hand is assumed")
    preprocessing = overridden(base, None, *said, notes)
    if preprocessing.input_size[0] != base.input_size[0]:
        _refuse_fixed(folder, {"input_size": preprocessing.input_size})
    views = views or source.get("views")
    if views not in (None, *VIEWS):
        raise InputError(f"loading {folder}: its plan has views {views!r}, expected one of {', '.join(VIEWS)}")
    model = checked_model(model, folder, notes)
    teacher = make_teacher(folder, model, preprocessing, views, {}, notes, part or str(source.get("part", "")))
    return replace(teacher, build_teacher=build_teacher, **told)
