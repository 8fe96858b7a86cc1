"""From what names a teacher to a built model and its preprocessing: a library, the demo, or one's own function.

Only this file imports timm, torchvision.models and transformers. It reads no weights file that a user names (`weights`
does), and leaves the checks of the model, and what a user says about the images, to `teachers`.
"""

import difflib
import importlib
import importlib.util
import json
import re
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError, MimicutError, one_line
from mimicut.inputs.augment import VIEWS
from mimicut.inputs.preprocessing import INTERPOLATIONS, Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # Source: torchvision's presets.
IMAGENET_STD = (0.229, 0.224, 0.225)
OWN_PREPROCESSING = Preprocessing((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
PROBE_SECONDS = 5  # To find out whether a weights server answers; timm's own retries take 45 s to give up.
# Its ImageNet rescaling inside, as torchvision builds them with its weights; auxiliary heads never run in a teacher.
_TORCHVISION_KWARGS = {
    name: {"aux_logits": False, "init_weights": False, "transform_input": True}
    for name in ("googlenet", "inception_v3")
}
# Options of the libraries' builders that read files or the network: not for a builder, least of all from a folder.
_LOADING = ("weights", "weights_backbone", "checkpoint_path", "cache_dir", "progress")
# Frames of an error's path that a user cannot do anything about.
_OURS = {str(Path(__file__).with_name(f"{room}.py")) for room in ("builders", "teachers", "weights")}


@dataclass
class Built:
    """preprocessing: how its images are to be prepared. views: where it names them. options: what the name does not
    say, but building the same architecture without weights needs (JSON). notes: what a person should see. classes: what
    the outputs mean, in words, where the weights say so."""

    model: nn.Module
    preprocessing: Preprocessing
    views: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()


def build_model(spec: str, family: str, name: str, options: Mapping[str, Any], pretrained: bool) -> Built:
    kwargs = {k: options[k] for k in ("num_classes", "in_chans") if k in options}
    kwargs.update(options.get("model_kwargs", {}))
    loading = sorted(k for k in kwargs if k in _LOADING or k.startswith("pretrained"))
    if loading:
        raise InputError(f"building {spec}: found the options {loading}, which load files; use --weights for that")
    try:
        if family == "timm":
            return _timm(name, kwargs, pretrained)
        if family == "torchvision":
            return _torchvision(name, kwargs, pretrained, options.get("norm_eps"))
        if family == "hf":
            return _hugging_face(name, kwargs, pretrained, options.get("config"))
        if family == "demo":
            return _demo(name, kwargs, pretrained)
    except MimicutError:
        raise
    except Exception as error:
        raise InputError(
            f"building {spec} with {kwargs or 'no options'}: {one_line(error)}; check name and options"
        ) from error
    return call_builder(_function(spec), spec, options)


def _timm(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> Built:
    import timm
    from timm.data import infer_imagenet_subset, resolve_data_config

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
    mean, std = (per_channel(data[k], channels) for k in ("mean", "std"))
    interpolation = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bicubic"
    classes = _imagenet_classes(infer_imagenet_subset(model)) if pretrained else ()
    return Built(model, Preprocessing((channels, height, width), mean, std, resize, interpolation), classes=classes)


def _imagenet_classes(subset: str | None) -> tuple[str, ...]:
    """The first word for each class of timm's `subset` of ImageNet; nothing where it is none."""
    if subset is None:
        return ()
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i).split(",")[0] for i in range(info.num_classes()))


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


def _torchvision(name: str, kwargs: Mapping[str, Any], pretrained: bool, norm_eps: float | None) -> Built:
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = [n for room in (models, models.segmentation, models.detection) for n in models.list_models(module=room)]
    if architecture not in known:
        raise InputError(_unknown("torchvision", architecture, known))
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
    if architecture not in models.list_models(module=models):
        kwargs["weights_backbone"] = None  # what the whole network's own weights hold already
    if architecture.startswith("vit_"):  # its position table has the size of its weights' images, 224 by default
        kwargs.setdefault("image_size", weights.meta["min_size"][0])
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
    if hasattr(model, "aux_classifier"):
        model.aux_classifier = None
    said = detector_preprocessing(model)
    if said is not None:
        return Built(model, said, options=_thaw(model, norm_eps))
    preset = weights.transforms()
    resize = preset.resize_size[0]
    crop = preset.crop_size[0] if hasattr(preset, "crop_size") else resize  # segmentation: the whole of a square image
    if getattr(model, "image_size", crop) != crop:
        resize = crop = model.image_size
    classes = tuple(weights.meta["categories"]) if pretrained else ()
    said = Preprocessing((3, crop, crop), preset.mean, preset.std, resize, preset.interpolation.value)
    return Built(model, said, classes=classes)


def detector_preprocessing(model: nn.Module) -> Preprocessing | None:
    """What a torchvision detector does to its images before its backbone sees them; None for any other network.

    Squares of its shorter side stand for images of any shape.
    """
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    inside = getattr(model, "transform", None)
    if not isinstance(inside, GeneralizedRCNNTransform):
        return None
    height, width = inside.fixed_size[::-1] if inside.fixed_size else (inside.min_size[-1],) * 2
    resize = None if inside.fixed_size else height
    return Preprocessing((len(inside.image_mean), height, width), inside.image_mean, inside.image_std, resize)


def _thaw(model: nn.Module, norm_eps: float | None) -> dict[str, Any]:
    """Give a detector's backbone ordinary batch norms, in place; {"norm_eps"} where the name does not tell it.

    torchvision freezes them (and for its oldest weights sets eps to 0) where it loads weights, and only there: a
    stored result is built again without, and must be the same network. In eval mode both compute the same.
    """
    from torchvision.ops import FrozenBatchNorm2d

    found = {}
    for name, old in list(model.named_modules()):
        if isinstance(old, FrozenBatchNorm2d):
            found["norm_eps"] = old.eps
            new = nn.BatchNorm2d(len(old.weight), eps=old.eps)
            new.load_state_dict({**old.state_dict(), "num_batches_tracked": new.num_batches_tracked})
            model.set_submodule(name, new)
        elif norm_eps is not None and type(old) is nn.BatchNorm2d:
            old.eps = norm_eps
    return found


def _hugging_face(name: str, kwargs: dict[str, Any], pretrained: bool, record: Mapping[str, Any] | None) -> Built:
    """A folder, an id, or the name of a class (built from its configuration alone); `record`: the configuration of a
    teacher that was built before, which needs neither."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"loading hf:{name}: transformers is not installed; pip install 'mimicut[hf]'") from error
    for ours, theirs in (("num_classes", "num_labels"), ("in_chans", "num_channels")):
        if ours in kwargs:
            kwargs[theirs] = kwargs.pop(ours)
    if "_implementation" in json.dumps([record, kwargs]):
        raise InputError(
            f"building hf:{name}: found an option that names an implementation, which may be code from elsewhere; "
            "leave it out: the library's own is taken"
        )
    from_class = not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
    if record is not None:
        config = transformers.CONFIG_MAPPING[record["model_type"]].from_dict({**record, **kwargs})
    elif from_class:
        config = _hf_class(name, name).config_class(**kwargs, architectures=[name])
    else:
        config = _hf_read(name, transformers.AutoConfig, trust_remote_code=False)
        if pretrained:
            _refuse_new_head(f"hf:{name}", kwargs.get("num_labels", config.num_labels), config.num_labels)
        config = type(config).from_dict({**config.to_dict(), **kwargs})  # plain sizes: no choice of implementation
    unknown = [key for key in kwargs if not hasattr(type(config)(), key)]
    if unknown:
        raise InputError(f"building hf:{name}: {type(config).__name__} has no {', '.join(unknown)}; check model_kwargs")
    kind = _hf_class(name, (config.architectures or ["none"])[0])
    if not pretrained:
        model = kind(config)
    elif from_class:
        raise InputError(f"loading hf:{name}: a configuration has no weights; use --weights FILE or --no-pretrained")
    else:
        model, told = _hf_read(name, kind, config=config, use_safetensors=True, output_loading_info=True)
        missing = sorted(told["missing_keys"]) + [str(key) for key in told["mismatched_keys"]]
        if missing:
            raise InputError(
                f"loading hf:{name}: its weights lack {len(missing)} tensor(s) of {kind.__name__} (first: "
                f"{missing[0]}), which would be untrained; take a folder that was saved from this class"
            )
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    mean, std = (per_channel(v, channels) for v in (IMAGENET_MEAN, IMAGENET_STD))
    said, notes = Preprocessing((channels, height, width), mean, std), []
    if record is None and not from_class:
        try:
            processor = _hf_read(name, transformers.AutoImageProcessor, trust_remote_code=False)
            said = _hf_preprocessing(processor.to_dict(), said)
        except (OSError, InputError):
            notes.append("no preprocessor_config.json: ImageNet's mean and std are assumed (--mean, --std)")
    config.architectures = [kind.__name__]
    return Built(model, said, options={"config": json.loads(config.to_json_string(use_diff=False))}, notes=notes)


def _hf_class(name: str, kind: str) -> Any:
    """The model class of transformers that is called `kind`; code that comes with weights is never run."""
    import transformers

    found = getattr(transformers, kind, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if name != kind:
        raise InputError(
            f"loading hf:{name}: its config.json names the architecture {kind!r}, expected a class of transformers "
            "(code from elsewhere is never run: name a builder of your own, FILE.py:FUNCTION)"
        )
    near = difflib.get_close_matches(kind, [n for n in dir(transformers) if "For" in n], 3)
    raise InputError(
        f"loading hf:{name}: there is no such folder, nor such a model class in transformers; expected a folder, an id "
        f"with a slash, or a class such as {', '.join(near) or 'ViTForImageClassification'}"
    )


def _hf_read(name: str, kind: Any, **options: Any) -> Any:
    """What `kind` reads from a folder or from the local cache, else from the network."""
    folder = Path(name).is_dir()
    if folder and not Path(name, "config.json").is_file():
        raise InputError(f"loading hf:{name}: the folder holds no config.json; expected what save_pretrained wrote")
    try:
        return kind.from_pretrained(name, local_files_only=True, **options)
    except OSError:
        if folder:
            raise
    from huggingface_hub.constants import ENDPOINT

    _reach(f"hf:{name}", f"{ENDPOINT}/{name}", "there is no such folder, and no such id", "give hf:FOLDER")
    return kind.from_pretrained(name, **options)


def _hf_preprocessing(said: Mapping[str, Any], base: Preprocessing) -> Preprocessing:
    """What an image processor's settings come to; `base` where they are silent."""
    size, crop = said.get("size") or {}, said.get("crop_size") or {}
    edge = size.get("shortest_edge")
    if not said.get("do_resize", True) or not size:
        edge, (height, width) = None, base.input_size[1:]
    else:
        height, width = (edge, edge) if edge else (size.get(k, base.input_size[1]) for k in ("height", "width"))
    if said.get("do_center_crop") and crop:
        edge = edge or min(height, width)
        height, width = (crop["height"], crop["width"]) if "height" in crop else (crop["shortest_edge"],) * 2
        edge = edge if edge >= max(height, width) else None
    elif edge and said.get("crop_pct"):
        edge = int(edge / said["crop_pct"]) if edge < 384 else None  # Source: transformers' ConvNextImageProcessor
    share = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255
    normal = said.get("do_normalize", True)
    mean = said.get("image_mean") or base.mean if normal else (0.0,) * base.input_size[0]
    std = said.get("image_std") or base.std if normal else (1.0,) * base.input_size[0]
    mean, std = (tuple(v / share for v in values) for values in (mean, std))
    # Source: Pillow's numbers of its filters.
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(said.get("resample"), "bilinear")
    return Preprocessing((base.input_size[0], height, width), mean, std, edge, interpolation)


def _demo(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> Built:
    imagenet = importlib.import_module("mimicut.demo.imagenet")
    if name in imagenet.NAMES:
        model = _timm(imagenet.PACKED[name].architecture, kwargs, pretrained=False).model
        if pretrained:
            _refuse_new_head(f"demo:{name}", kwargs.get("num_classes", imagenet.CLASSES), imagenet.CLASSES)
            imagenet.load_into(model, name)
        classes = _imagenet_classes("imagenet-1k") if pretrained else ()
        return Built(model, Preprocessing.from_json(imagenet.preprocessing(name)), classes=classes)
    networks = importlib.import_module("mimicut.demo.networks")
    # Without trained weights nothing is read from a file: a result folder must load where only the code is.
    model, said = networks.load(name) if pretrained else (networks.build(name, **kwargs), networks.PREPROCESSING)
    classes = tuple(getattr(networks, "CLASSES", ())) if pretrained else ()
    return Built(model, Preprocessing.from_json(said), "patches", classes=classes)


def call_builder(build: Callable[..., Any], what: str, options: Mapping[str, Any]) -> Built:
    """What an own builder returned, in the form of the contract."""
    kwargs = {k: options[k] for k in ("num_classes", "in_chans") if k in options}
    try:
        made = build(**kwargs, **options.get("model_kwargs", {}))
    except MimicutError:
        raise
    except (Exception, SystemExit) as error:
        given = f" called with {kwargs}" if kwargs else ""
        raise InputError(f"building the teacher {what}{given}: {one_line(error)}{_where(error)}") from error
    model, said = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(said, (Preprocessing, Mapping, type(None))):
        found = type(made).__name__ + (f" of {[type(m).__name__ for m in made]}" if isinstance(made, tuple) else "")
        raise InputError(
            f"building the teacher {what}: it returned a {found}, expected an nn.Module, or a tuple of one and a "
            "Preprocessing (or a dict of its fields)"
        )
    if not isinstance(said, Mapping):
        return Built(model, said or detector_preprocessing(model) or OWN_PREPROCESSING)
    said = dict(said)
    views = said.pop("views", None)
    if views is not None and views not in VIEWS:
        raise InputError(f"building the teacher {what}: found views {views!r}, expected one of {', '.join(VIEWS)}")
    try:
        return Built(model, Preprocessing.from_json({**OWN_PREPROCESSING.to_json(), **said}), views)
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
        raise InputError(f"loading the teacher {spec}: importing {place}: {one_line(error)}{_where(error)}") from error
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
    name = f"mimicut_teacher_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
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


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _refuse_new_head(spec: str, asked: int, there: int) -> None:
    if asked not in (there, 0):
        raise InputError(
            f"loading {spec}: its pretrained weights have {there} classes, found num_classes {asked}: the head would "
            "be untrained; give --weights FILE with your own, or --no-pretrained"
        )


def _in_hub_cache(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file()


def _reach(
    spec: str,
    url: str,
    missing: str = "its pretrained weights are not",
    instead: str = "give --weights FILE, or --no-pretrained for random weights",
) -> None:
    """Raises InputError at once when the server does not answer; any answer, also a refusal, counts."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise InputError(
            f"loading {spec}: {missing} in the local cache, and {url} cannot be reached "
            f"({getattr(error, 'reason', error)}); {instead}"
        ) from error


def _unknown(library: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 5) or [n for n in known if n.startswith(name)][:5]
    return f"loading {library}:{name}: {library} has no such model" + (
        f"; close to it: {', '.join(near)}" if near else f"; it has {len(known)}, such as {', '.join(known[:3])}"
    )


def _where(error: BaseException) -> str:
    """The last line of the error's path that lies in a file, for someone to look at."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith("<") and f.filename not in _OURS
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
