"""Teachers from torchvision: networks for classes, segmentation, detection and video. Only this file imports them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mimicut.base.errors import InputError
from mimicut.inputs.built_model import BuiltModel, check_reachable, in_hub_cache, refuse_new_head, unknown_model
from mimicut.inputs.preprocessing import Preprocessing

# Their ImageNet rescaling is inside, as torchvision builds them with its weights; a teacher never runs auxiliary heads.
_KWARGS = {
    name: {"aux_logits": False, "init_weights": False, "transform_input": True}
    for name in ("googlenet", "inception_v3")
}


def build_torchvision(
    name: str,
    kwargs: Mapping[str, Any],
    pretrained: bool,
    norm_eps: float | None = None,
    size_hw: tuple[int, int] | None = None,
) -> BuiltModel:
    """Build a model of torchvision, without auxiliary heads.

    Args:
        name: Its name, with or without its weights ("resnet34", "resnet34.IMAGENET1K_V1").
        kwargs: Options of the library's builder.
        pretrained: Whether it gets the library's weights.
        norm_eps: For a detector that is built again without weights: the epsilon that its batch norms had with them.
        size_hw: Height and width of the images, where they may differ from those of its weights.

    Raises:
        InputError: torchvision has no such model or weights, or the weights cannot be had.
    """
    from torchvision import models

    architecture = name.partition(".")[0]
    weights = _weights_entry(name, kwargs)
    kwargs = {**_KWARGS.get(architecture, {}), **kwargs}
    if architecture in (*models.list_models(module=models.segmentation), *models.list_models(module=models.detection)):
        kwargs["weights_backbone"] = None  # what the whole network's own weights hold already
    usual, sized = None, dict[str, Any]()
    if architecture.startswith("vit_"):  # its position table has the size of its weights' images, 224 by default
        usual = weights.meta["min_size"][0]
        if size_hw is not None and size_hw != (usual, usual) and "image_size" not in kwargs:
            sized = {"image_size": _square(name, size_hw)}
        kwargs = {"image_size": usual, **kwargs, **sized}
    if pretrained:
        outputs = len(weights.meta["categories"])
        refuse_new_head(f"torchvision:{name}", kwargs.get("num_classes", outputs), outputs)
        if not in_hub_cache(weights.url):
            check_reachable(f"torchvision:{name}", weights.url)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("aux_logits", "init_weights")}
    other_size = pretrained and kwargs.get("image_size") != usual
    model = models.get_model(architecture, weights=weights if pretrained and not other_size else None, **kwargs)
    if other_size:
        others = {key: value for key, value in kwargs.items() if key != "image_size"}
        resize_torchvision(models.get_model(architecture, weights=weights, **others), model, kwargs["image_size"])
    _drop_auxiliary_heads(model, pretrained)
    detector = detector_preprocessing(model)
    if detector is not None:
        return BuiltModel(model, detector, options=_unfreeze_norms(model, norm_eps))
    classes = tuple(weights.meta["categories"]) if pretrained else ()
    return BuiltModel(
        model,
        _preprocessing(model, weights),
        options={"model_kwargs": sized} if sized else {},
        notes=["its table of positions is interpolated to this size by torchvision"] if other_size else [],
        classes=classes,
    )


def _square(name: str, size_hw: tuple[int, int]) -> int:
    height, width = size_hw
    if height != width:
        raise InputError(
            f"loading torchvision:{name}: it takes square images only, found {height}x{width}; give a square "
            "--input-size, or take timm's vision transformer"
        )
    return height


def resize_torchvision(usual: Any, model: Any, size: int) -> bool:
    """Fill a vision transformer with the weights of the same one for the usual size, in place.

    Args:
        usual: The network of the usual size.
        model: One of another size.
        size: The pixels of its side.
    """
    from torchvision.models.vision_transformer import interpolate_embeddings

    state = interpolate_embeddings(size, model.patch_size, usual.state_dict())
    model.load_state_dict(state)
    return True


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


def _modules() -> tuple[Any, ...]:
    from torchvision import models

    return models, models.segmentation, models.detection, models.video


def _weights_entry(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The library's entry for the weights that `name` says, or for the best ones of that model."""
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = [n for module in _modules() for n in models.list_models(module=module)]
    if architecture not in known:
        raise unknown_model("torchvision", architecture, known)
    if "in_chans" in kwargs:
        raise InputError(
            f"loading torchvision:{name}: torchvision builds no other input than 3 channels, found in_chans "
            f"{kwargs['in_chans']}; use the timm model, or a builder of your own"
        )
    available = models.get_model_weights(architecture)
    if tag and tag not in available.__members__:
        tags = ", ".join(available.__members__)
        raise InputError(f"loading torchvision:{name}: there are no weights {tag!r}, expected one of {tags}")
    return available[tag] if tag else available.DEFAULT


def _drop_auxiliary_heads(model: nn.Module, pretrained: bool) -> None:
    for head in ("aux1", "aux2", "AuxLogits"):
        if pretrained and hasattr(model, head):
            model.aux_logits = False  # type: ignore[assignment]  # no module, but a flag
            setattr(model, head, None)
    if hasattr(model, "aux_classifier"):
        model.aux_classifier = None  # type: ignore[assignment]  # as where the model is built without


def _preprocessing(model: nn.Module, weights: Any) -> Preprocessing:
    """How the preset of these weights prepares images, at the size that the model was built for."""
    preset = weights.transforms()
    resize = preset.resize_size[0]
    crop = preset.crop_size[0] if hasattr(preset, "crop_size") else resize  # segmentation: the whole of a square image
    if getattr(model, "image_size", crop) != crop:
        resize = crop = model.image_size
    return Preprocessing((3, crop, crop), preset.mean, preset.std, resize, preset.interpolation.value)


def _unfreeze_norms(model: nn.Module, norm_eps: float | None) -> dict[str, Any]:
    """Give a detector's backbone ordinary batch norms, in place; {"norm_eps"} where the name does not imply it.

    torchvision freezes them (and for its oldest weights sets eps to 0) where it loads weights, and only there: a
    stored result is built again without, and must be the same network. In eval mode both compute the same.
    """
    from torchvision.ops import FrozenBatchNorm2d

    options = {}
    for name, old in list(model.named_modules()):
        if isinstance(old, FrozenBatchNorm2d):
            options["norm_eps"] = old.eps
            new = nn.BatchNorm2d(len(old.weight), eps=old.eps)
            new.load_state_dict({**old.state_dict(), "num_batches_tracked": new.num_batches_tracked})
            model.set_submodule(name, new)
        elif norm_eps is not None and type(old) is nn.BatchNorm2d:
            old.eps = norm_eps
    return options
