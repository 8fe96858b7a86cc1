"""A trained network as a teacher: in eval mode, on the CPU, in float32, with the preprocessing its weights expect.

`builders` builds what a name stands for, `weights` reads files of weights; what a user says is applied and the model is
checked here. Results that are to be teachers are loaded by `results.teachers`. Nothing here knows of pruning.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.base.guard import full_copy, named_tensors, seeded
from mimicut.inputs.builders import OWN_PREPROCESSING, build_model, call_builder, detector_preprocessing, per_channel
from mimicut.inputs.preprocessing import Preprocessing, handed
from mimicut.inputs.weights import load_weights

SMALL_SIDE = 128  # Below it random resized crops hurt (measured at 32 pixels); the place of the line is an assumption.
_FORMS = "timm:NAME, torchvision:NAME, hf:FOLDER, FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, demo:NAME"
Build = str | Callable[[], nn.Module] | None


@dataclass
class Teacher:
    """spec: as it was named. model: eval mode, CPU, float32. preprocessing: what it expects. views: a key of VIEWS.

    options: what besides `spec` builds the same architecture (JSON). notes: sentences a person should see.
    part: where `model` is in `whole`, when only that part is compressed; else "" and None.
    call: how it takes images, if with more beside them (`preprocessing.handed`). result: of a teacher that is a result,
    what builds it again without its folder (`store.as_teacher`). build_teacher: the code that this takes, if any.
    classes: what its outputs mean, in words, where its library says so; else empty.
    """

    spec: str
    model: nn.Module
    preprocessing: Preprocessing
    views: str
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    part: str = ""
    whole: nn.Module | None = None
    call: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    build_teacher: Build = None
    classes: tuple[str, ...] = ()

    def example(self) -> Any:
        """Two blank images as it takes them: a tensor, or (args, kwargs)."""
        return handed(torch.zeros(2, *self.preprocessing.input_size), self.call)

    def architecture(self) -> Build:
        """What `store.load` needs to load a result of this teacher here: a copy of it, or of a teacher that is itself
        a result, what its code is named by."""
        lead = self.model if self.whole is None else self.whole
        return (lambda **_: full_copy(lead)) if self.result is None else self.build_teacher

    def completed(self, model: nn.Module) -> nn.Module:
        """`model` in its place in a copy of the whole; `model` itself where there is no other whole."""
        return model if self.whole is None else put_part(full_copy(self.whole), self.part, model)

    def to_json(self) -> dict[str, Any]:
        """All that `build_architecture` needs, and how images are to be prepared; no weights."""
        return {
            "spec": self.spec,
            "options": self.options,
            "preprocessing": self.preprocessing.to_json(),
            "views": self.views,
            **({"part": self.part} if self.part else {}),
            **({"result": self.result} if self.result else {}),
        }


def named_teacher(
    spec: str,
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
) -> Teacher:
    """The teacher that a library or code builds under this name; arguments as `results.teachers.load_teacher`."""
    family, name = _parse(spec)
    if family in ("timm", "torchvision") and input_size and input_size[0] != 3:
        in_chans = in_chans or input_size[0]
    options = _options(spec, num_classes, in_chans, model_kwargs)
    notes: list[str] = []
    with seeded(0):
        built = build_model(spec, family, name, options, pretrained and weights is None)
    notes += built.notes
    preprocessing = overridden(built.preprocessing, in_chans, input_size, mean, std, resize, interpolation, notes)
    model = checked_model(built.model, spec, notes)
    if weights is not None:
        load_weights(model, Path(weights), spec, notes)
    elif family != "own" and not pretrained:
        notes.append("random weights (no pretrained ones): the shapes are right, what it says is not")
    found = make_teacher(spec, model, preprocessing, views or built.views, options | built.options, notes, part)
    return replace(found, classes=built.classes)


def own_teacher(
    model: nn.Module, preprocessing: Preprocessing | None = None, *, views: str | None = None, part: str = ""
) -> Teacher:
    """A module in hand as a teacher: a copy in eval mode, float32, on the CPU; the caller's module stays as it is.

    Its spec is "module": whoever loads a result must name a builder. part: the submodule to compress, if not the whole.
    Raises UnsupportedModel as `load_teacher` does.
    """
    notes: list[str] = []
    copied = checked_model(full_copy(model) if isinstance(model, nn.Module) else model, "module", notes)
    preprocessing = preprocessing or detector_preprocessing(copied) or OWN_PREPROCESSING
    return make_teacher("module", copied, preprocessing, views, {}, notes, part)


def make_teacher(
    spec: str,
    whole: nn.Module,
    preprocessing: Preprocessing,
    views: str | None,
    options: dict[str, Any],
    notes: list[str],
    part: str,
) -> Teacher:
    _refuse_broken(whole, spec)
    views = views or ("imagenet" if min(preprocessing.input_size[1:]) >= SMALL_SIDE else "pad_crop")
    if part:
        model = part_of(whole, part)
        tensors, inside = named_tensors(whole), {id(t) for t in named_tensors(model).values()}
        tied = next((n for n, t in tensors.items() if id(t) in inside and not n.startswith(f"{part}.")), None)
        if tied is not None:
            raise UnsupportedModel(
                f"taking the part {part!r} of {spec}: it shares the tensor {tied} with the rest, which would be cut "
                "too; name a part that holds both"
            )
        rest = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in model.parameters())
        notes.append(f"figures are of the part {part!r}; the other {rest:,} parameters stay as they are")
        return Teacher(spec, model, preprocessing, views, options, notes, part, whole)
    if detector_preprocessing(whole) is not None:
        raise UnsupportedModel(
            f"loading the teacher {spec}: {type(whole).__name__} is a detector, whose boxes differ in number from "
            "image to image: it cannot be traced as a whole; give --part backbone (part='backbone' in Python)"
        )
    return Teacher(spec, whole, preprocessing, views, options, notes)


def part_of(whole: nn.Module, part: str) -> nn.Module:
    """The submodule `part` of `whole`; `whole` itself where it is "". InputError names what there is instead."""
    modules = dict(whole.named_modules())
    if part not in modules:
        near = difflib.get_close_matches(part, modules, 3) or [name for name, _ in whole.named_children()][:8]
        raise InputError(
            f"taking the part {part!r} of {type(whole).__name__}: there is no such module; near it: {', '.join(near)}"
        )
    return modules[part]


def put_part(whole: nn.Module, part: str, model: nn.Module) -> nn.Module:
    """`whole`, changed in place, with `model` as its submodule `part`; `model` where that is ""."""
    if part:
        whole.set_submodule(part, model)
    return whole if part else model


def build_architecture(
    record: Mapping[str, Any], build_teacher: str | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """The architecture of a `Teacher.to_json()`, eval mode, without trained weights and without the network.

    build_teacher: "file.py:build", "package.module:build" or a function; required when the record names such a teacher,
    because code that a folder names is never run; without one InputError is raised.
    """
    spec, options = str(record.get("spec")), dict(record.get("options") or {})
    if callable(build_teacher):
        with seeded(0):
            built = call_builder(build_teacher, "the given builder", options)
        return checked_model(built.model, "the given builder", [])
    given = build_teacher or spec
    if isinstance(build_teacher, str) and form_of(build_teacher) is None and Path(build_teacher).is_dir():
        raise InputError(
            f"rebuilding the teacher: found the folder {given}, expected what builds the network that was compressed "
            "first: the plans of all results between it and this one are in this one"
        )
    family, name = _parse(given) if given != "module" else ("own", "")
    if family == "own" and build_teacher is None:
        raise InputError(
            f"rebuilding the teacher: the folder names {spec!r}, the maker's own code, never run from a folder; "
            "name it again: --teacher FILE.py:FUNCTION, or load(folder, build_teacher=...); where the folder is to be "
            "the teacher, FILE.py:FUNCTION with --weights FOLDER, or load_teacher(folder, build_teacher=...)"
        )
    with seeded(0):
        built = build_model(given, family, name, options, pretrained=False)
    return checked_model(built.model, given, [])


def _options(
    spec: str, num_classes: int | None, in_chans: int | None, model_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Only what was asked for, checked to survive JSON."""
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    for name, value in options.items():
        headless = name == "num_classes" and value == 0 and spec.startswith("timm:")
        if value is not None and (type(value) is not int or (value < 1 and not headless)):
            also = ", or of timm 0 for a network without a head" if name == "num_classes" else ""
            raise InputError(f"loading {spec}: found {name} {value!r}, expected a whole number above 0{also}")
    options["model_kwargs"] = dict(model_kwargs or {}) or None
    options = {k: v for k, v in options.items() if v is not None}
    try:
        return json.loads(json.dumps(options))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"loading {spec}: model_kwargs {model_kwargs!r} are not plain JSON values ({error})"
        ) from error


def form_of(spec: str) -> tuple[str, str] | None:
    """("timm" | "torchvision" | "hf" | "demo" | "own", what follows); None of anything else."""
    family, colon, name = spec.partition(":")
    if family in ("timm", "torchvision", "hf", "demo") and name:
        return family, name
    return ("own", spec) if ".py:" in spec or (colon and re.fullmatch(r"[\w.]+:\w+", spec)) else None


def _parse(spec: str) -> tuple[str, str]:
    """As `form_of`. Raises InputError where there is none."""
    found = form_of(spec)
    if found is not None:
        return found
    hint = f"; did you mean timm:{spec} or torchvision:{spec}?" if re.fullmatch(r"[\w.]+", spec) else ""
    hint = f"; name the function in it, {spec}:build" if spec.endswith(".py") else hint
    raise InputError(f"loading a teacher: found {spec!r}, expected {_FORMS}, or the folder of a result{hint}")


def overridden(
    base: Preprocessing,
    in_chans: int | None,
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resize: int | str | None,
    interpolation: str | None,
    notes: list[str],
) -> Preprocessing:
    """`base` with what the user said. Another size keeps the crop's share; other channels get the average mean, std."""
    size = (in_chans or base.input_size[0], *base.input_size[1:]) if input_size is None else tuple(input_size)
    if in_chans and size and size[0] != in_chans:
        raise InputError(
            f"loading a teacher: found in_chans {in_chans} and input_size {size}, expected the same channels"
        )
    changes: dict[str, Any] = {"input_size": size, "interpolation": interpolation or base.interpolation}
    changes["resize"] = None if resize == "exact" else resize or base.resize
    whole = len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    if whole and resize is None and base.resize and size[1:] != base.input_size[1:]:
        changes["resize"] = size[1] * base.resize // base.input_size[1] if size[1] == size[2] else None
    for key, said in (("mean", mean), ("std", std)):
        changes[key] = getattr(base, key) if said is None else said
        if said is None and whole and size[0] != base.input_size[0]:
            changes[key] = per_channel(changes[key], size[0])
            notes.append(
                f"{key}: the average of the usual ones, {changes[key][0]:.3g} for each of {size[0]} channel(s)"
            )
    return replace(base, **changes)


def checked_model(model: Any, spec: str, notes: list[str]) -> nn.Module:
    """`model` itself, unwrapped, in eval mode, on the CPU, in float32; refused where that is impossible."""
    for wrapper, inner in ((nn.DataParallel, "module"), (nn.parallel.DistributedDataParallel, "module")):
        if isinstance(model, wrapper):
            model = getattr(model, inner)
            notes.append(f"taken out of its {wrapper.__name__} wrapper")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
        notes.append("taken out of its torch.compile wrapper")
    if not isinstance(model, nn.Module):
        raise InputError(f"loading the teacher {spec}: found a {type(model).__name__}, expected an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(
            f"loading the teacher {spec}: found a TorchScript module, which cannot be cut; give the Python module"
        )
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedModel(
                f"loading the teacher {spec}: {name} has no shape yet; run one forward pass in the builder"
            )
        if tensor.is_meta:
            raise UnsupportedModel(
                f"loading the teacher {spec}: {name} is on the meta device, without data; build it on the CPU"
            )
    if not any(isinstance(t, nn.Parameter) for t in tensors.values()):
        raise UnsupportedModel(
            f"loading the teacher {spec}: {type(model).__name__} has no parameters, nothing to compress"
        )
    other = sorted({str(t.dtype) for t in tensors.values() if t.is_floating_point() and t.dtype != torch.float32})
    if other:
        notes.append(f"converted from {', '.join(other)} to float32")
    return model.to(device="cpu", dtype=torch.float32).eval()


def _refuse_broken(model: nn.Module, spec: str) -> None:
    learnt = dict(model.named_parameters())
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        # A buffer may hold infinities by intent (masks, limits of a clamp), but no statistics do.
        finite = name in learnt or name.rpartition(".")[2].startswith("running_")
        broken = ~torch.isfinite(tensor) if finite else tensor.isnan()
        if bool(broken.any()):
            bad = int(broken.sum())
            raise UnsupportedModel(
                f"loading the teacher {spec}: {name} holds {bad} NaN or infinite values, expected none; "
                "the weights are damaged, take another copy"
            )
