"""Teachers from open_clip: CLIP networks whole. Called with images alone they run their image tower, which is what is
compressed; the text tower stays as it is. Only this file imports open_clip."""

from collections.abc import Mapping
from typing import Any

from mimicut.base.errors import InputError
from mimicut.inputs.built_model import BuiltModel, check_reachable, unknown_model
from mimicut.inputs.preprocessing import INTERPOLATIONS, Preprocessing


def build_open_clip(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> BuiltModel:
    """Build a model of open_clip.

    Args:
        name: Its name, with or without the tag of its weights after a slash ("ViT-B-32", "ViT-B-32/laion2b_s34b_b79k").
        kwargs: Options of `open_clip.create_model`.
        pretrained: Whether it gets the weights of that tag.

    Raises:
        InputError: open_clip is not installed, has no such model or weights, or the weights cannot be had.
    """
    try:
        import open_clip
    except ImportError as error:
        raise InputError(
            f"loading open_clip:{name}: open_clip cannot be imported ({error}); pip install open-clip-torch"
        ) from error
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise unknown_model("open_clip", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (tag or pretrained) and tag not in tags:
        raise InputError(
            f"loading open_clip:{name}: found weights {tag or 'of no name'!r}, expected {architecture}/TAG with one of "
            f"{', '.join(tags) or 'none'}; or give --weights FILE, or --no-pretrained for random weights"
        )
    if pretrained:
        source = open_clip.get_pretrained_cfg(architecture, tag)
        place = f"https://huggingface.co/{source['hf_hub'].rstrip('/')}" if source.get("hf_hub") else source["url"]
        check_reachable(f"open_clip:{name}", place)
    # Without weights of its own it would download those of its towers' backbones.
    towers = {} if pretrained else {"pretrained_image": False, "pretrained_text": False}
    model = open_clip.create_model(architecture, pretrained=tag if pretrained else None, **towers, **kwargs)
    expected = open_clip.get_model_preprocess_cfg(model)
    size = expected["size"]
    height, width = (size, size) if isinstance(size, int) else size
    resize = max(height, width) if expected.get("resize_mode", "shortest") == "shortest" else None
    how = expected.get("interpolation", "bicubic")
    return BuiltModel(
        model,
        Preprocessing(
            (3, height, width), tuple(expected["mean"]), tuple(expected["std"]), resize,
            how if how in INTERPOLATIONS else "bicubic",
        ),
    )  # fmt: skip
