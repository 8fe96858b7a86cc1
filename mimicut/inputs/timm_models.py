"""Teachers from timm, with the preprocessing of their weights. Only this file imports timm."""

import inspect
from collections.abc import Mapping
from typing import Any

from mimicut.base.errors import InputError
from mimicut.base.guard import seeded
from mimicut.inputs.built_model import BuiltModel, check_reachable, in_hub_cache, refuse_new_head, unknown_model
from mimicut.inputs.preprocessing import INTERPOLATIONS, Preprocessing, per_channel


def build_timm(
    name: str, kwargs: Mapping[str, Any], pretrained: bool, size_hw: tuple[int, int] | None = None
) -> BuiltModel:
    """Build a model of timm.

    Args:
        name: Its name, with or without the tag of its weights ("resnet18", "resnet18.a1_in1k").
        kwargs: Options of `timm.create_model`.
        pretrained: Whether it gets the library's weights.
        size_hw: Height and width of the images, where they may differ from those of its weights.

    Raises:
        InputError: timm has no such model or weights, or the weights cannot be had.
    """
    import timm
    from timm.data import infer_imagenet_subset

    _check_name(name)
    overlay = None
    if pretrained:
        config = timm.models.get_pretrained_cfg(name)
        assert config is not None  # as of every model of timm's own
        refuse_new_head(f"timm:{name}", kwargs.get("num_classes", config.num_classes), config.num_classes)
        overlay = _weights_source(name, config)
    sized = {} if "img_size" in kwargs else _size_option(name, kwargs, size_hw)
    model = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs, **sized)
    classes = imagenet_classes(infer_imagenet_subset(model)) if pretrained else ()
    preprocessing = _preprocessing(model, {**kwargs, **sized}.get("img_size"))
    notes = ["its table of positions is interpolated to this size by timm"] if sized and pretrained else []
    return BuiltModel(
        model, preprocessing, classes=classes, notes=notes, options={"model_kwargs": sized} if sized else {}
    )


def _size_option(name: str, kwargs: Mapping[str, Any], size_hw: tuple[int, int] | None) -> dict[str, Any]:
    """The option that builds the model for images of this size; empty where it takes them anyway."""
    import timm

    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if size_hw is None or (config is not None and tuple(config.input_size[1:]) == size_hw):
        return {}
    with seeded(0):  # the same random weights as without this look
        kind = type(timm.create_model(name, pretrained=False, **kwargs))
    return {"img_size": list(size_hw)} if "img_size" in inspect.signature(kind).parameters else {}


def resize_timm(usual: Any, model: Any, size: Any) -> bool:
    """Fill `model` with the weights of the same network for the usual size, in place; False where timm cannot.

    Args:
        usual: The network of the usual size; it becomes one of the other size.
        model: One of that size.
        size: The pixels of a side, or (H, W).
    """
    if not hasattr(usual, "set_input_size"):
        return False
    usual.set_input_size(img_size=(size, size) if isinstance(size, int) else tuple(size))
    model.load_state_dict(usual.state_dict())
    return True


def imagenet_classes(subset: str | None) -> tuple[str, ...]:
    """The first word for each class of a subset of ImageNet by timm's name ("imagenet-1k"); empty for None."""
    if subset is None:
        return ()
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i).split(",")[0] for i in range(info.num_classes()))


def _check_name(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown_model("timm", architecture, timm.list_models())
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"loading timm:{name}: there are no weights {tag!r}, expected one of {', '.join(tags) or 'none'}"
        )


def _preprocessing(model: Any, size: Any) -> Preprocessing:
    """How the model's configuration prepares images for evaluation. size: What it was built for, where that differs."""
    from timm.data import resolve_data_config

    data = resolve_data_config({}, model=model)
    channels, height, width = data["input_size"]
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
    resize: int | None = int(min(height, width) / data["crop_pct"])  # rounded down, as timm's own transforms do
    if data["crop_mode"] != "center" or height != width:
        resize = None  # "squash" is exactly this at crop_pct 1; "border" is not imitated
    mean, std = (per_channel(data[k], channels) for k in ("mean", "std"))
    interpolation = data["interpolation"] if data["interpolation"] in INTERPOLATIONS else "bicubic"
    return Preprocessing((channels, height, width), mean, std, resize, interpolation)


def _weights_source(name: str, config: Any) -> dict[str, Any] | None:
    """Where timm is to take its weights from: a file that an earlier download left, or None for timm's own way."""
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

        check_reachable(f"timm:{name}", f"{ENDPOINT}/{config.hf_hub_id}")
    elif not in_hub_cache(config.url):
        check_reachable(f"timm:{name}", config.url)
    return None
