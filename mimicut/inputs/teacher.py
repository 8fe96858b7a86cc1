"""A trained network as a teacher: in eval mode, on the CPU, in float32, with the preprocessing its weights expect.

`build_by_name` builds what a name stands for, `weights` reads files of weights, `model_checks` checks the model.
Results that are to be teachers are loaded by `results.teachers`. Nothing here knows of pruning.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.base.guard import full_copy, named_tensors, seeded
from mimicut.base.paths import usable_path
from mimicut.inputs.build_by_name import build_model, load_other_size, parse_spec, require_spec
from mimicut.inputs.built_model import OWN_PREPROCESSING
from mimicut.inputs.class_names import read_class_names
from mimicut.inputs.computed_weights import fold_computed_weights
from mimicut.inputs.file_names import quoted
from mimicut.inputs.input_source import inputs_of
from mimicut.inputs.model_checks import checked_model, network_in, refuse_damaged, require_float_modules
from mimicut.inputs.own_models import call_builder
from mimicut.inputs.preprocessing import NATIVE, Preprocessing, PreprocessingChanges, model_inputs
from mimicut.inputs.torchvision_models import detector_preprocessing
from mimicut.inputs.weights import load_weights

DEPTH = 16  # slices or frames of an example, where nothing says how many. Source: assumption.
SMALL_SIDE = 128  # Below it random resized crops hurt (measured at 32 pixels); the place of the line is an assumption.
Build = str | Callable[[], nn.Module] | None
"""What builds the architecture of a teacher that is the user's own: "FILE.py:FUNCTION", or the function itself."""


@dataclass
class Teacher:
    """A network to be compressed, with all that is known about it.

    Attributes:
        spec: The name by which it was given; "module" for a module in hand.
        model: The network that is compressed, in eval mode, on the CPU, in float32.
        preprocessing: How its images are to be prepared.
        views: A key of `VIEWS`: the random variants that its task allows.
        options: What besides `spec` builds the same architecture; plain data for JSON.
        notes: Sentences that a person should see.
        part: The name of `model` inside `whole`, where only that part is compressed; else "".
        whole: The whole network, where only a part is compressed; else None.
        call: How the network takes its images, where it takes more than images (`preprocessing.model_inputs`).
        result: For a teacher that is itself a result: what builds it again without its folder
            (`load_result.as_teacher`).
        build_teacher: The code that builds such a result's first teacher, where it is the user's own.
        classes: The name of each class, where its library or the user gives them; else empty.
        given: What the user said about it besides its name; None for a module in hand.
        depth: Slices or frames of a volume or clip, where the user named them.
        folded: Whether weights that its code computes were folded into plain ones (`computed_weights`).
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
    given: "TeacherOptions | None" = None
    folded: bool = False
    depth: int | None = None

    def example(self) -> Any:
        """Two blank images as the network takes them: a tensor (2, C, H, W), or (args, kwargs); for a network of
        volumes or clips two of these, (2, C, D, H, W)."""
        channels, *size = self.preprocessing.input_size
        inputs = None if self.call else inputs_of(self.model, None)
        volumes = self.depth is not None or (inputs is not None and inputs.keys == 1)
        between = [self.depth or DEPTH] if volumes else []
        return model_inputs(torch.zeros(2, channels, *between, *size), self.call)

    def architecture(self) -> Build:
        """What `mimicut.load` needs as build_teacher to load a result of this teacher in this process.

        It is a function that copies the network; for a teacher that is itself a result, the code that this one needed.
        """
        network = self.model if self.whole is None else self.whole
        return (lambda **_: full_copy(network)) if self.result is None else self.build_teacher

    def completed(self, model: nn.Module) -> nn.Module:
        """`model` in its place in a copy of the whole network; `model` itself where the teacher is not a part."""
        return model if self.whole is None else put_part(full_copy(self.whole), self.part, model)

    def to_json(self) -> dict[str, Any]:
        """All that is needed to build it again, and how images are to be prepared; no weights."""
        return {
            "spec": self.spec,
            "options": self.options,
            "preprocessing": self.preprocessing.to_json(),
            "views": self.views,
            **({"part": self.part} if self.part else {}),
            **({"folded": True} if self.folded else {}),
            **({"result": self.result} if self.result else {}),
        }


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """What a user says about a teacher besides its name.

    Attributes:
        weights: A file of tensors (as in `load_weights`), or a result that was made from this teacher; instead of the
            library's own weights.
        pretrained: Whether the library's own weights are loaded; False gives random ones, the same every time.
        num_classes: Number of classes that the model is built with.
        in_chans: Number of input channels that the model is built with.
        model_kwargs: Further options of its builder; plain data.
        preprocessing: Changes to the preprocessing that its weights expect.
        views: A key of `VIEWS`, instead of the one for its task.
        part: The name of the submodule to compress; "" for the whole.
        build_teacher: What builds the first teacher of a result, where that is the user's own code.
        class_names: As `read_class_names` takes them; None for those that the library knows.
    """

    weights: str | Path | None = None
    pretrained: bool = True
    num_classes: int | None = None
    in_chans: int | None = None
    model_kwargs: Mapping[str, Any] | None = None
    preprocessing: PreprocessingChanges = field(default_factory=PreprocessingChanges)
    views: str | None = None
    part: str = ""
    build_teacher: Build = None
    class_names: Sequence[str] | str | Path | None = None

    def classes(self) -> tuple[str, ...]:
        """The name of each class; empty where the user named none.

        Raises:
            InputError: As `read_class_names`.
        """
        return () if self.class_names is None else read_class_names(self.class_names)


def named_teacher(spec: str, given: TeacherOptions) -> Teacher:
    """The teacher that a library or the user's code builds under this name.

    Args:
        spec: A name in one of the forms of `build_by_name.parse_spec`.
        given: What the user says about it; build_teacher is not used.

    Raises:
        InputError: The name, an option or the weights cannot be used.
        UnsupportedModel: The model itself is the reason.
    """
    family, _ = require_spec(spec)
    named = given.classes()  # before what takes longer
    in_chans, size = given.in_chans, given.preprocessing.input_size
    if family in ("timm", "torchvision") and size and size[0] != 3:
        in_chans = in_chans or size[0]
    options = _builder_options(spec, given.num_classes, in_chans, given.model_kwargs)
    notes: list[str] = []
    with seeded(0):
        built = build_model(
            spec, options, given.pretrained and given.weights is None, None if size is None else _height_width(size)
        )
    notes += built.notes
    options = _with_options(options, built.options)
    preprocessing = given.preprocessing.apply(built.preprocessing, in_chans, notes)
    model = checked_model(built.model, spec, notes)
    if given.weights is not None:
        _load_weights(model, Path(given.weights), spec, options, notes)
    elif family != "own" and not given.pretrained:
        notes.append("random weights (no pretrained ones): the shapes are right, its answers mean nothing")
    teacher = make_teacher(spec, model, preprocessing, given.views or built.views, options, notes, given.part)
    return replace(teacher, classes=named or built.classes, call=built.call)


def _height_width(size: Sequence[int]) -> tuple[int, int] | None:
    """(H, W) of a size (C, H, W); None for what is no size, which is refused later."""
    return (size[1], size[2]) if len(size) == 3 and all(type(n) is int and n > 0 for n in size) else None


def _with_options(given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, and those found while the model was built."""
    both = {**given, **found}
    if "model_kwargs" in given and "model_kwargs" in found:
        both["model_kwargs"] = {**given["model_kwargs"], **found["model_kwargs"]}
    return both


def _load_weights(model: nn.Module, path: Path, spec: str, options: Mapping[str, Any], notes: list[str]) -> None:
    """As `load_weights`; also weights for images of the library's usual size, where the library can change that.

    Raises:
        InputError: They are neither.
    """
    before = len(notes)
    try:
        load_weights(model, path, spec, notes)
    except InputError as error:
        del notes[before:]
        try:
            with seeded(0):
                loaded = load_other_size(spec, options, model, lambda usual: load_weights(usual, path, spec, notes))
        except InputError:
            loaded = False
        if not loaded:
            raise error
        notes.append(f"the table of positions in {quoted(path.name)} is interpolated to another size of images")


def own_teacher(
    model: nn.Module, preprocessing: Preprocessing | None = None, *, views: str | None = None, part: str = ""
) -> Teacher:
    """A module in hand as a teacher: a copy in eval mode, float32, on the CPU; the caller's module stays as it is.

    Its spec is "module": whoever loads a result must name a builder.

    Args:
        model: The trained network.
        preprocessing: How its images are to be prepared. By default what a torchvision detector does itself, else
            3x224x224, images resized straight to it, with ImageNet's mean and standard deviation.
        views: A key of `VIEWS`; by default random resized crops from SMALL_SIDE pixels on, small shifts below, and
            plain crops where pictures are not resized.
        part: The name of the submodule to compress; "" for the whole.

    Raises:
        InputError: `model` is no nn.Module, or has no such part.
        UnsupportedModel: The model itself is the reason.
    """
    notes: list[str] = []
    found = network_in(model, "module", notes)  # before it is copied, as the object around it may not be copyable
    if isinstance(found, nn.Module):
        require_float_modules(found, "module")  # as those that are none may not be copyable either
    copied = checked_model(full_copy(found) if isinstance(found, nn.Module) else found, "module", notes)
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
    """A teacher of a checked model: the whole of it, or the submodule `part`. views: None chooses by the preprocessing.

    Raises:
        InputError: There is no such part.
        UnsupportedModel: The weights are damaged, the part shares a tensor with the rest, or the model is a detector
            and no part is named.
    """
    refuse_damaged(whole, spec)
    folded = fold_computed_weights(whole, notes)
    if preprocessing.resize == NATIVE:
        views = views or "crops"
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
        return Teacher(spec, model, preprocessing, views, options, notes, part, whole, folded=folded)
    if detector_preprocessing(whole) is not None:
        raise UnsupportedModel(
            f"loading the teacher {spec}: {type(whole).__name__} is a detector, whose boxes differ in number from "
            "image to image: it cannot be traced as a whole; give --part backbone (part='backbone' in Python)"
        )
    return Teacher(spec, whole, preprocessing, views, options, notes, folded=folded)


def part_of(whole: nn.Module, part: str) -> nn.Module:
    """The submodule of `whole` with the name `part`; `whole` itself where that is "".

    Raises:
        InputError: There is no such submodule; the message names the nearest ones.
    """
    modules = dict(whole.named_modules())
    if part not in modules:
        near = difflib.get_close_matches(part, modules, 3) or [name for name, _ in whole.named_children()][:8]
        raise InputError(
            f"taking the part {part!r} of {type(whole).__name__}: there is no such module; near it: {', '.join(near)}"
        )
    return modules[part]


def put_part(whole: nn.Module, part: str, model: nn.Module) -> nn.Module:
    """Put `model` into `whole`, in place, as its submodule `part`, and return `whole`; `model` where `part` is ""."""
    if part:
        whole.set_submodule(part, model)
    return whole if part else model


def build_architecture(
    record: Mapping[str, Any], build_teacher: str | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Build the architecture of a teacher again, in eval mode, without trained weights and without network access.

    Args:
        record: As `Teacher.to_json` gives it.
        build_teacher: "FILE.py:FUNCTION", "PACKAGE.MODULE:FUNCTION" or the function itself. Required where the record
            names such a teacher, because code that a folder names is never run.

    Raises:
        InputError: build_teacher is required and missing, or the model cannot be built.
    """
    spec, options = str(record.get("spec")), dict(record.get("options") or {})
    if callable(build_teacher):
        with seeded(0):
            built = call_builder(build_teacher, "the given builder", options)
        return checked_model(built.model, "the given builder", [])
    source = build_teacher or spec
    doing = "rebuilding the teacher"
    named = isinstance(build_teacher, str) and parse_spec(build_teacher) is None
    if named and usable_path(str(build_teacher), doing).is_dir():
        raise InputError(
            f"rebuilding the teacher: found the folder {source}, expected what builds the network that was compressed "
            "first: the plans of all results between it and this one are in this one"
        )
    family = "own" if source == "module" else require_spec(source)[0]
    if family == "own" and build_teacher is None:
        raise InputError(
            f"rebuilding the teacher: the folder names {spec!r}, the maker's own code, never run from a folder; "
            "name it again: --teacher FILE.py:FUNCTION, or load(folder, build_teacher=...); where the folder is to be "
            "the teacher, FILE.py:FUNCTION with --weights FOLDER, or load_teacher(folder, build_teacher=...)"
        )
    with seeded(0):
        built = build_model(source, options, pretrained=False)
    return checked_model(built.model, source, [])


def _builder_options(
    spec: str, num_classes: int | None, in_chans: int | None, model_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The options that were given, checked to survive JSON."""
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
