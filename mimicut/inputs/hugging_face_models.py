"""Teachers from Hugging Face transformers: folders, ids and classes. Only this file imports transformers.

Code that comes with weights is never run.
"""

import difflib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimicut.base.errors import InputError
from mimicut.inputs.built_model import IMAGENET_MEAN, IMAGENET_STD, BuiltModel, check_reachable, refuse_new_head
from mimicut.inputs.class_names import named_by_number
from mimicut.inputs.preprocessing import Preprocessing, per_channel

_INTERPOLATE = "interpolate_pos_encoding"
_THEIR_NAMES = {"num_classes": "num_labels", "in_chans": "num_channels"}


def build_hugging_face(
    name: str,
    kwargs: Mapping[str, Any],
    pretrained: bool,
    record: Mapping[str, Any] | None = None,
    size_hw: tuple[int, int] | None = None,
) -> BuiltModel:
    """Build a model of transformers.

    Args:
        name: A folder, an id with a slash, or the name of a model class, which is built from its configuration alone.
        kwargs: Fields of the configuration that replace its own.
        pretrained: Whether it gets the weights of that folder or id.
        record: The configuration of a teacher that was built before; then neither folder nor id is read.
        size_hw: Height and width of the images, where they may differ from those of its configuration. With weights
            its table of positions stays, and is interpolated in every call, by an option of the model's.

    Returns:
        The model. Its options hold "config"; for an id, which can look like a folder, also "hub": whether the weights
        are those of the id.

    Raises:
        InputError: transformers is not installed, the name or an option does not fit, or the weights cannot be had or
            do not hold every tensor of the model.
    """
    _check_installed(name)
    kwargs = {_THEIR_NAMES.get(key, key): value for key, value in kwargs.items()}
    if "_implementation" in json.dumps([record, kwargs]):
        raise InputError(
            f"building hf:{name}: found an option that names an implementation, which may be code from elsewhere; "
            "leave it out: the library's own is taken"
        )
    from_class = not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
    config = _configuration(name, kwargs, pretrained, record, from_class)
    other_size = _other_size(config, size_hw)
    if other_size is not None and not pretrained and "image_size" not in kwargs:
        config = type(config).from_dict({**config.to_dict(), "image_size": other_size})
    unknown = [key for key in kwargs if not hasattr(type(config)(), key)]
    if unknown:
        raise InputError(f"building hf:{name}: {type(config).__name__} has no {', '.join(unknown)}; check model_kwargs")
    kind = _model_class(name, (config.architectures or ["none"])[0])
    if not pretrained:
        model = kind(config)
    elif from_class:
        raise InputError(f"loading hf:{name}: a configuration has no weights; use --weights FILE or --no-pretrained")
    else:
        model = _with_weights(name, kind, config)
    preprocessing, notes = _preprocessing(name, config, look_up=record is None and not from_class)
    config.architectures = [kind.__name__]
    options: dict[str, Any] = {"config": json.loads(config.to_json_string(use_diff=False))}
    if record is None and not from_class and not Path(name).is_dir():
        options["hub"] = pretrained
    call = None
    if other_size is not None and pretrained and _INTERPOLATE in inspect.signature(model.forward).parameters:
        call = {"keyword": None, "options": {_INTERPOLATE: True}}
        notes.append(f"its table of positions is interpolated to this size in every call ({_INTERPOLATE})")
    return BuiltModel(model, preprocessing, options=options, notes=notes, call=call, classes=_classes(config))


def _classes(config: Any) -> tuple[str, ...]:
    """The names of its classes; empty where the configuration has those that transformers makes up."""
    names = named_by_number(getattr(config, "id2label", None) or {})
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def _other_size(config: Any, size_hw: tuple[int, int] | None) -> int | list[int] | None:
    """The size asked for, as a configuration gives it; None where it is the configuration's, or that has none."""
    size = getattr(config, "image_size", None)
    if size is None or size_hw is None or size_hw == ((size, size) if isinstance(size, int) else tuple(size)):
        return None
    return size_hw[0] if size_hw[0] == size_hw[1] else list(size_hw)


def _check_installed(name: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(f"loading hf:{name}: transformers is not installed; pip install 'mimicut[hf]'") from error


def _configuration(
    name: str, kwargs: Mapping[str, Any], pretrained: bool, record: Mapping[str, Any] | None, from_class: bool
) -> Any:
    """The configuration that `record`, the class, or the folder or id gives, changed by `kwargs`."""
    import transformers

    if record is not None:
        return transformers.CONFIG_MAPPING[record["model_type"]].from_dict({**record, **kwargs})
    if from_class:
        return _model_class(name, name).config_class(**kwargs, architectures=[name])
    config = _read(name, transformers.AutoConfig, trust_remote_code=False)
    if pretrained:
        refuse_new_head(f"hf:{name}", kwargs.get("num_labels", config.num_labels), config.num_labels)
    return type(config).from_dict({**config.to_dict(), **kwargs})  # plain sizes: no choice of implementation


def _model_class(name: str, kind: str) -> Any:
    """The model class of transformers with the name `kind`."""
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


def _with_weights(name: str, kind: Any, config: Any) -> Any:
    """The model with the weights of a folder or id, which must hold every tensor of its class."""
    model, loading = _read(name, kind, config=config, use_safetensors=True, output_loading_info=True)
    missing = sorted(loading["missing_keys"]) + [str(key) for key in loading["mismatched_keys"]]
    if missing:
        raise InputError(
            f"loading hf:{name}: its weights lack {len(missing)} tensor(s) of {kind.__name__} (first: "
            f"{missing[0]}), which would be untrained; take a folder that was saved from this class"
        )
    return model


def _read(name: str, kind: Any, **options: Any) -> Any:
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

    check_reachable(f"hf:{name}", f"{ENDPOINT}/{name}", "there is no such folder, and no such id", "give hf:FOLDER")
    return kind.from_pretrained(name, **options)


def _preprocessing(name: str, config: Any, *, look_up: bool) -> tuple[Preprocessing, list[str]]:
    """How images are to be prepared, and what to know of that. look_up: whether a folder or id may say it."""
    import transformers

    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    mean, std = (per_channel(v, channels) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assumed = Preprocessing((channels, height, width), mean, std)
    if not look_up:
        return assumed, []
    try:
        processor = _read(name, transformers.AutoImageProcessor, trust_remote_code=False)
        return _processor_preprocessing(processor.to_dict(), assumed), []
    except (OSError, InputError):
        return assumed, ["no preprocessor_config.json: ImageNet's mean and std are assumed (--mean, --std)"]


def _processor_preprocessing(settings: Mapping[str, Any], base: Preprocessing) -> Preprocessing:
    """What an image processor with these settings does; `base` where they say nothing."""
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    edge = size.get("shortest_edge")
    if not settings.get("do_resize", True) or not size:
        edge, (height, width) = None, base.input_size[1:]
    else:
        height, width = (edge, edge) if edge else (size.get(k, base.input_size[1]) for k in ("height", "width"))
    if settings.get("do_center_crop") and crop:
        edge = edge or min(height, width)
        height, width = (crop["height"], crop["width"]) if "height" in crop else (crop["shortest_edge"],) * 2
        edge = edge if edge >= max(height, width) else None
    elif edge and settings.get("crop_pct"):
        # Source: transformers' ConvNextImageProcessor.
        edge = int(edge / settings["crop_pct"]) if edge < 384 else None
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    normalises = settings.get("do_normalize", True)
    mean = settings.get("image_mean") or base.mean if normalises else (0.0,) * base.input_size[0]
    std = settings.get("image_std") or base.std if normalises else (1.0,) * base.input_size[0]
    mean, std = (tuple(v / scale for v in values) for values in (mean, std))
    # Source: Pillow's numbers of its filters.
    filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    interpolation = filters.get(settings.get("resample", 2), "bilinear")
    return Preprocessing((base.input_size[0], height, width), mean, std, edge, interpolation)
