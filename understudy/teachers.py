"""From a name to a teacher: the model in eval mode, on the CPU, in float32, with the preprocessing its weights expect.

    timm:resnet18.a1_in1k              timm's model, weights (tag optional) and configuration
    torchvision:resnet34.IMAGENET1K_V1 torchvision's
    path/to/file.py:build              your own: a function that returns an nn.Module, or (module, Preprocessing | dict)
    package.module:build               the same, importable
    demo:NAME                          the teachers that ship with understudy

**Own teachers, the contract.** `build()` is called without arguments, or with num_classes and in_chans where they were
asked for. Without a Preprocessing of its own (or flags): input 3x224x224, images resized straight to it, bilinear,
ImageNet's mean and std. A dict has the fields of Preprocessing, and may add "views". Naming a file runs it: only name
files that you trust. A result folder never does (see `build_architecture`).

Only this file imports timm and torchvision.models. It knows nothing of pruning.
"""

import copy
import difflib
import importlib
import importlib.util
import json
import re
import sys
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.augment import VIEWS
from understudy.errors import InputError, UnderstudyError, UnsupportedModel
from understudy.guard import seeded
from understudy.images import INTERPOLATIONS, Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # Source: torchvision's presets.
IMAGENET_STD = (0.229, 0.224, 0.225)
OWN_PREPROCESSING = Preprocessing((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
SMALL_SIDE = 128  # Below it random resized crops hurt (measured at 32 pixels); the place of the line is an assumption.
PROBE_SECONDS = 5  # To find out whether a weights server answers; timm's own retries take 45 s to give up.
# Its ImageNet rescaling inside, as torchvision builds them with its weights; auxiliary heads never run in a teacher.
_TORCHVISION_KWARGS = {
    name: {"aux_logits": False, "init_weights": False, "transform_input": True}
    for name in ("googlenet", "inception_v3")
}
# Options of the libraries' builders that read files or the network: not for a builder, least of all from a folder.
_LOADING = ("weights", "weights_backbone", "checkpoint_path", "cache_dir", "progress")
_FORMS = "timm:NAME, torchvision:NAME, FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION or demo:NAME"


@dataclass
class Teacher:
    """spec: as it was named. model: eval mode, CPU, float32. preprocessing: what it expects. views: a key of VIEWS.

    options: what besides `spec` builds the same architecture (JSON). notes: sentences a person should see.
    """

    spec: str
    model: nn.Module
    preprocessing: Preprocessing
    views: str
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All that `build_architecture` needs, and how images are to be prepared; no weights."""
        return {
            "spec": self.spec,
            "options": self.options,
            "preprocessing": self.preprocessing.to_json(),
            "views": self.views,
        }


def load_teacher(
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
) -> Teacher:
    """The teacher that `spec` names (forms: see the head of this file).

    weights: a file of tensors (.safetensors, or a state dict that torch reads with weights_only); instead of the
    library's own. pretrained: the library's own weights; False: random ones, the same every time. The rest overrides
    what the weights' configuration says: input_size (C, H, W); mean and std per channel on the scale 0..1; resize in
    pixels of the shorter side, or "exact" (straight to H x W); views: a key of VIEWS. model_kwargs go to the builder.

    The caller's random state is left as it was. Raises InputError for names, files and options that do not fit, and
    when weights cannot be had; UnsupportedModel when the model itself is the reason.
    """
    family, name = _parse(spec)
    if views is not None and views not in VIEWS:
        raise InputError(f"loading {spec}: found views {views!r}, expected one of {', '.join(VIEWS)}")
    if family in ("timm", "torchvision") and input_size and input_size[0] != 3:
        in_chans = in_chans or input_size[0]
    options = _options(spec, num_classes, in_chans, model_kwargs)
    notes: list[str] = []
    with seeded(0):
        model, preprocessing, own_views = _build(spec, family, name, options, pretrained and weights is None)
    preprocessing = _override(preprocessing, in_chans, input_size, mean, std, resize, interpolation, notes)
    model = _checked(model, spec, notes)
    if weights is not None:
        _load_weights(model, Path(weights), spec, notes)
    elif family != "own" and not pretrained:
        notes.append("random weights (no pretrained ones): the shapes are right, what it says is not")
    _refuse_broken(model, spec)
    views = views or own_views or ("imagenet" if min(preprocessing.input_size[1:]) >= SMALL_SIDE else "pad_crop")
    return Teacher(spec, model, preprocessing, views, options, notes)


def own_teacher(model: nn.Module, preprocessing: Preprocessing | None = None, *, views: str | None = None) -> Teacher:
    """A module in hand as a teacher: a copy in eval mode, float32, on the CPU; the caller's module stays as it is.

    Its spec is "module": whoever loads a result must name a builder. Raises UnsupportedModel as `load_teacher` does.
    """
    notes: list[str] = []
    copied = _checked(copy.deepcopy(model) if isinstance(model, nn.Module) else model, "module", notes)
    _refuse_broken(copied, "module")
    preprocessing = preprocessing or OWN_PREPROCESSING
    small = min(preprocessing.input_size[1:]) < SMALL_SIDE
    return Teacher("module", copied, preprocessing, views or ("pad_crop" if small else "imagenet"), {}, notes)


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
            model, _, _ = _called(build_teacher, "the given builder", options)
        return _checked(model, "the given builder", [])
    given = build_teacher or spec
    family, name = _parse(given) if given != "module" else ("own", "")
    if family == "own" and build_teacher is None:
        raise InputError(
            f"rebuilding the teacher: the folder names {spec!r}, the maker's own code, never run from a folder; "
            'name it again: load(folder, build_teacher="FILE.py:FUNCTION" or a function)'
        )
    with seeded(0):
        model, _, _ = _build(given, family, name, options, pretrained=False)
    return _checked(model, given, [])


_Built = tuple[nn.Module, Preprocessing, str | None]


def _options(
    spec: str, num_classes: int | None, in_chans: int | None, model_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Only what was asked for, checked to survive JSON."""
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    for name, value in options.items():
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"loading {spec}: found {name} {value!r}, expected a whole number above 0")
    options["model_kwargs"] = dict(model_kwargs or {}) or None
    options = {k: v for k, v in options.items() if v is not None}
    try:
        return json.loads(json.dumps(options))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"loading {spec}: model_kwargs {model_kwargs!r} are not plain JSON values ({error})"
        ) from error


def _parse(spec: str) -> tuple[str, str]:
    """("timm" | "torchvision" | "demo" | "own", what follows)."""
    family, colon, name = spec.partition(":")
    if family in ("timm", "torchvision", "demo") and name:
        return family, name
    if ".py:" in spec or (colon and re.fullmatch(r"[\w.]+:\w+", spec)):
        return "own", spec
    hint = f"; did you mean timm:{spec} or torchvision:{spec}?" if re.fullmatch(r"[\w.]+", spec) else ""
    hint = f"; name the function in it, {spec}:build" if spec.endswith(".py") else hint
    raise InputError(f"loading a teacher: found {spec!r}, expected {_FORMS}{hint}")


def _build(spec: str, family: str, name: str, options: Mapping[str, Any], pretrained: bool) -> _Built:
    kwargs = {k: options[k] for k in ("num_classes", "in_chans") if k in options}
    kwargs.update(options.get("model_kwargs", {}))
    loading = sorted(k for k in kwargs if k in _LOADING or k.startswith("pretrained"))
    if loading:
        raise InputError(f"building {spec}: found the options {loading}, which load files; use --weights for that")
    try:
        if family == "timm":
            return _timm(name, kwargs, pretrained)
        if family == "torchvision":
            return _torchvision(name, kwargs, pretrained)
        if family == "demo":
            return _demo(name, kwargs, pretrained)
    except UnderstudyError:
        raise
    except Exception as error:
        raise InputError(
            f"building {spec} with {kwargs or 'no options'}: {_said(error)}; check name and options"
        ) from error
    return _called(_function(spec), spec, options)


def _timm(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> _Built:
    import timm
    from timm.data import resolve_data_config

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise InputError(_unknown("timm", architecture, timm.list_models()))
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"loading timm:{name}: there are no weights {tag!r}, expected one of {', '.join(tags) or 'none'}"
        )
    overlay = None
    if pretrained:
        config = timm.models.get_pretrained_cfg(name)
        classes = kwargs.get("num_classes", config.num_classes)
        _refuse_new_head(f"timm:{name}", classes, config.num_classes)
        overlay = _timm_source(name, config)
    model = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    data = resolve_data_config({}, model=model)
    channels, height, width = data["input_size"]
    resize: int | None = int(min(height, width) / data["crop_pct"])  # rounded down, as timm's own transforms do
    if data["crop_mode"] != "center" or height != width:
        resize = None  # "squash" is exactly this at crop_pct 1; "border" is not imitated
    mean, std = (_per_channel(data[k], channels) for k in ("mean", "std"))
    interpolation = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bicubic"
    return model, Preprocessing((channels, height, width), mean, std, resize, interpolation), None


def _timm_source(name: str, config: Any) -> dict[str, Any] | None:
    """Where timm shall take its weights from: a file that an earlier download left, or None (its own way)."""
    if config.hf_hub_id and not config.custom_load:
        from huggingface_hub import try_to_load_from_cache

        names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        repo, _, revision = config.hf_hub_id.partition("@")
        for file in names:
            cached = try_to_load_from_cache(repo, file, revision=revision or None)
            if isinstance(cached, str):
                return {"file": cached}
    if not (config.hf_hub_id or config.url or config.file):
        raise InputError(f"loading timm:{name}: timm has no weights for it; use --weights FILE or --no-pretrained")
    if config.hf_hub_id:
        from huggingface_hub.constants import ENDPOINT

        _reach(f"timm:{name}", f"{ENDPOINT}/{config.hf_hub_id}")
    elif not _in_hub_cache(config.url):
        _reach(f"timm:{name}", config.url)
    return None


def _torchvision(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> _Built:
    from torchvision import models

    architecture, _, tag = name.partition(".")
    if architecture not in models.list_models(module=models):
        raise InputError(_unknown("torchvision", architecture, models.list_models(module=models)))
    if "in_chans" in kwargs:
        raise InputError(
            f"loading torchvision:{name}: torchvision builds no other input than 3 channels, found in_chans "
            f"{kwargs['in_chans']}; use the timm model, or a builder of your own"
        )
    available = models.get_model_weights(architecture)
    if tag and tag not in available.__members__:
        tags = ", ".join(available.__members__)
        raise InputError(f"loading torchvision:{name}: there are no weights {tag!r}, expected one of {tags}")
    weights = available[tag] if tag else available.DEFAULT
    kwargs = {**_TORCHVISION_KWARGS.get(architecture, {}), **kwargs}
    if pretrained:
        classes = len(weights.meta["categories"])
        _refuse_new_head(f"torchvision:{name}", kwargs.get("num_classes", classes), classes)
        if not _in_hub_cache(weights.url):
            _reach(f"torchvision:{name}", weights.url)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("aux_logits", "init_weights")}
    model = models.get_model(architecture, weights=weights if pretrained else None, **kwargs)
    for head in ("aux1", "aux2", "AuxLogits"):
        if pretrained and hasattr(model, head):
            model.aux_logits = False
            setattr(model, head, None)
    preset = weights.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    interpolation = preset.interpolation.value
    return model, Preprocessing((3, crop, crop), preset.mean, preset.std, resize, interpolation), None


def _demo(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> _Built:
    networks = importlib.import_module("understudy.demo.networks")
    # Without trained weights nothing is read from a file: a result folder must load where only the code is.
    model, said = networks.load(name) if pretrained else (networks.build(name, **kwargs), networks.PREPROCESSING)
    return model, Preprocessing.from_json(said), "patches"


def _called(build: Callable[..., Any], what: str, options: Mapping[str, Any]) -> _Built:
    """What an own builder returned, in the form of the contract."""
    kwargs = {k: options[k] for k in ("num_classes", "in_chans") if k in options}
    try:
        made = build(**kwargs, **options.get("model_kwargs", {}))
    except UnderstudyError:
        raise
    except (Exception, SystemExit) as error:
        given = f" called with {kwargs}" if kwargs else ""
        raise InputError(f"building the teacher {what}{given}: {_said(error)}{_where(error)}") from error
    model, said = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(said, (Preprocessing, Mapping, type(None))):
        found = type(made).__name__ + (f" of {[type(m).__name__ for m in made]}" if isinstance(made, tuple) else "")
        raise InputError(
            f"building the teacher {what}: it returned a {found}, expected an nn.Module, or a tuple of one and a "
            "Preprocessing (or a dict of its fields)"
        )
    if not isinstance(said, Mapping):
        return model, said or OWN_PREPROCESSING, None
    said = dict(said)
    views = said.pop("views", None)
    if views is not None and views not in VIEWS:
        raise InputError(f"building the teacher {what}: found views {views!r}, expected one of {', '.join(VIEWS)}")
    try:
        return model, Preprocessing.from_json({**OWN_PREPROCESSING.to_json(), **said}), views
    except InputError as error:
        raise InputError(f"building the teacher {what}: {error}") from error


def _function(spec: str) -> Callable[..., Any]:
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        raise InputError(f"loading the teacher {spec}: there is no file {place}; check the path")
    try:
        with _importable(path.parent if place.endswith(".py") else Path()):
            module = _run_file(path) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise InputError(f"loading the teacher {spec}: importing {place}: {_said(error)}{_where(error)}") from error
    build = getattr(module, name, None)
    if not callable(build):
        functions = [
            k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InputError(
            f"loading the teacher {spec}: found no function {name!r} in {place}, expected one of its own: "
            f"{', '.join(functions[:5]) or 'it has none'}"
        )

    def build_there(**kwargs: Any) -> Any:
        with _importable(path.parent if place.endswith(".py") else Path()):  # for imports inside the function
            return build(**kwargs)

    return build_there


def _run_file(path: Path) -> Any:
    # The name depends on the file's name only, so that a class is called the same wherever the file lies.
    name = f"understudy_teacher_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside a user's file can be imported inside; the search path is as before afterwards."""
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


def _override(
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
            changes[key] = _per_channel(changes[key], size[0])
            notes.append(
                f"{key}: the average of the usual ones, {changes[key][0]:.3g} for each of {size[0]} channel(s)"
            )
    return replace(base, **changes)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _checked(model: Any, spec: str, notes: list[str]) -> nn.Module:
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
    tensors = _tensors(model)
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _refuse_broken(model: nn.Module, spec: str) -> None:
    for name, tensor in _tensors(model).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UnsupportedModel(
                f"loading the teacher {spec}: {name} holds {bad} NaN or infinite values, expected none; "
                "the weights are damaged, take another copy"
            )


def _load_weights(model: nn.Module, path: Path, spec: str, notes: list[str]) -> None:
    """Read `path` into `model`; InputError names the first difference and leaves the model as it was."""
    own, found = model.state_dict(), _stripped(_read_weights(path, notes), model.state_dict(), notes)
    absent = [k for k in own if k not in found and k.endswith("num_batches_tracked")]  # absent before torch 0.4.1
    found.update({k: own[k] for k in absent})
    auxiliary = [k for k in found if k not in own and re.match(r"(aux\d*|AuxLogits)\.", k)]
    if auxiliary:
        notes.append(f"{len(auxiliary)} tensors of auxiliary heads in {path.name} are not used")
        found = {k: v for k, v in found.items() if k not in auxiliary}
    differences = list(_differences(own, found))
    if differences:
        resized = [found[k].shape for k, _ in differences if k in own and k in found and found[k].shape != own[k].shape]
        heads = {shape[0] if shape else 0 for shape in resized} if len(resized) == len(differences) else set()
        hint = f"build it with --num-classes {heads.pop()}" if len(heads) == 1 else ""
        raise InputError(
            f"loading the weights {path} into {spec}: {len(differences)} difference(s) ({len(own)} tensors expected, "
            f"{len(found)} found); the first: {differences[0][1]}; {hint or 'these are the weights of another network'}"
        )
    other = sorted({str(t.dtype) for t in found.values() if t.is_floating_point() and t.dtype != torch.float32})
    if other:
        notes.append(f"weights in {path.name} converted from {', '.join(other)} to float32")
    model.load_state_dict(found)


def _differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(key, sentence), in the model's order, unexpected ones last."""
    for key, tensor in own.items():
        if key not in found:
            near = difflib.get_close_matches(key, found, 1)
            yield key, f"{key} is missing" + (f" (nearest: {near[0]})" if near else "")
        elif found[key].shape != tensor.shape:
            yield key, f"{key} has shape {tuple(found[key].shape)}, expected {tuple(tensor.shape)}"
        elif found[key].is_floating_point() != tensor.is_floating_point():
            yield key, f"{key} is {found[key].dtype}, expected {tensor.dtype}"
    yield from ((key, f"{key} is not expected") for key in found if key not in own)


def _read_weights(path: Path, notes: list[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"loading weights: there is no file {path}; check the path")
    with path.open("rb") as stream:
        start = stream.read(9)
    try:
        if start[8:9] == b"{":  # by content: a safetensors file begins with a length and a JSON header
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says what a TorchScript archive is
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        whole = "Unsupported" in str(error) or "TorchScript" in str(error)
        raise InputError(
            f"loading the weights {path}: "
            + (
                "it holds a whole model or other objects, which run code when read, expected tensors only; where you "
                "trust it, torch.save(model.state_dict(), FILE) or safetensors.torch.save_file"
                if whole
                else f"{_said(error)}; damaged, or neither .safetensors nor a state dict saved by torch.save"
            )
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            notes.append(f"weights taken from {key!r} inside {path.name}")
            loaded = loaded[key]
    strangers = [k for k, v in loaded.items() if not isinstance(v, Tensor)] if isinstance(loaded, Mapping) else []
    if not isinstance(loaded, Mapping) or strangers or not loaded:
        found = f"a mapping with {strangers[:3]}" if strangers else f"an empty or other {type(loaded).__name__}"
        raise InputError(f"loading the weights {path}: found {found}, expected a state dict: names and tensors")
    return dict(loaded)


def _stripped(found: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """`found` under the model's own names: without the prefixes that wrappers add."""
    again = True
    while again and not own.keys() & found.keys():
        again = False
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "backbone."):
            if all(k.startswith(prefix) for k in found):
                notes.append(f"prefix {prefix!r} removed from the names of the weights")
                found, again = {k.removeprefix(prefix): v for k, v in found.items()}, True
    # torchvision's published densenets still carry names with dots that attributes cannot have.
    # Source: torchvision.models.densenet, which renames them in the same way.
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", k): v for k, v in found.items()}


def _refuse_new_head(spec: str, asked: int, there: int) -> None:
    if asked != there:
        raise InputError(
            f"loading {spec}: its pretrained weights have {there} classes, found num_classes {asked}: the head would "
            "be untrained; give --weights FILE with your own, or --no-pretrained"
        )


def _in_hub_cache(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file()


def _reach(spec: str, url: str) -> None:
    """Raises InputError at once when the server does not answer; any answer, also a refusal, counts."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise InputError(
            f"loading {spec}: its pretrained weights are not in the local cache, and {url} cannot be reached "
            f"({getattr(error, 'reason', error)}); give --weights FILE, or --no-pretrained for random weights"
        ) from error


def _unknown(library: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 5) or [n for n in known if n.startswith(name)][:5]
    return f"loading {library}:{name}: {library} has no such classifier" + (
        f"; close to it: {', '.join(near)}" if near else f"; it has {len(known)}, such as {', '.join(known[:3])}"
    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _where(error: BaseException) -> str:
    """The last line of the error's path that lies in a file, for someone to look at."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith("<") and f.filename != __file__
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
