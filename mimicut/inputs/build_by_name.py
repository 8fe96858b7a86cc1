"""From the name of a teacher to a built model: which library, and which of its options may be used.

Each library has a file of its own (`timm_models`, `torchvision_models`, `hugging_face_models`, `open_clip_models`,
`onnx_models`, `own_models`, `demo_teachers`). No weights file that a user names is read here (`weights` does that, and
`onnx_models` for a network that is a file); the model is checked by `model_checks`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mimicut.base.errors import InputError, MimicutError, one_line
from mimicut.inputs.built_model import BuiltModel
from mimicut.inputs.demo_teachers import build_demo
from mimicut.inputs.hugging_face_models import build_hugging_face
from mimicut.inputs.onnx_models import build_onnx
from mimicut.inputs.open_clip_models import build_open_clip
from mimicut.inputs.own_models import call_builder, import_builder
from mimicut.inputs.timm_models import build_timm, resize_timm
from mimicut.inputs.torchvision_models import build_torchvision, resize_torchvision

# Options of the libraries' builders that read files or the network: not for a builder, least of all from a folder.
_LOADING = ("weights", "weights_backbone", "checkpoint_path", "cache_dir", "progress")
_FORMS = (
    "timm:NAME, torchvision:NAME, hf:FOLDER, open_clip:NAME, onnx:FILE, FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, "
    "demo:NAME"
)
_FAMILIES = ("timm", "torchvision", "hf", "open_clip", "onnx", "demo")


def parse_spec(spec: str) -> tuple[str, str] | None:
    """Split the name of a teacher into its library and the rest.

    Returns:
        ("timm" | "torchvision" | "hf" | "open_clip" | "onnx" | "demo", name), ("own", spec) for the user's own code, or
        None for anything else.

    >>> parse_spec("timm:resnet18")
    ('timm', 'resnet18')
    >>> parse_spec("net.py:build")
    ('own', 'net.py:build')
    """
    family, colon, name = spec.partition(":")
    if family in _FAMILIES and name:
        return family, name
    return ("own", spec) if ".py:" in spec or (colon and re.fullmatch(r"[\w.]+:\w+", spec)) else None


def require_spec(spec: str) -> tuple[str, str]:
    """As `parse_spec`, for what must name a teacher.

    Raises:
        InputError: It names none; the message lists the forms, and what was probably meant.
    """
    found = parse_spec(spec)
    if found is not None:
        return found
    hint = f"; did you mean timm:{spec} or torchvision:{spec}?" if re.fullmatch(r"[\w.]+", spec) else ""
    hint = f"; name the function in it, {spec}:build" if spec.endswith(".py") else hint
    raise InputError(f"loading a teacher: found {spec!r}, expected {_FORMS}, or the folder of a result{hint}")


def build_model(
    spec: str, options: Mapping[str, Any], pretrained: bool, size_hw: tuple[int, int] | None = None
) -> BuiltModel:
    """Build the model that `spec` names.

    Args:
        spec: A name in one of the forms of `parse_spec`.
        options: As `Teacher.options`: num_classes, in_chans, model_kwargs, and what a library needs to build the same
            architecture again.
        pretrained: Whether a library's own weights are loaded; user's code decides that itself.
        size_hw: Height and width of the images, where the user gave them: a library's network that has a table of
            positions is built with one for this size, interpolated from that of its weights where the library can.

    Raises:
        InputError: The name, an option or the weights cannot be used.
    """
    family, name = require_spec(spec)
    kwargs = {k: options[k] for k in ("num_classes", "in_chans") if k in options}
    kwargs.update(options.get("model_kwargs") or {})
    loading = sorted(k for k in kwargs if k in _LOADING or k.startswith("pretrained"))
    if loading:
        raise InputError(f"building {spec}: found the options {loading}, which load files; use --weights for that")
    try:
        if family == "timm":
            return build_timm(name, kwargs, pretrained, size_hw)
        if family == "torchvision":
            return build_torchvision(name, kwargs, pretrained, options.get("norm_eps"), size_hw)
        if family == "hf":
            return build_hugging_face(name, kwargs, pretrained, options.get("config"), size_hw)
        if family == "open_clip":
            return build_open_clip(name, kwargs, pretrained)
        if family == "onnx":
            return build_onnx(name, kwargs, pretrained, options.get("program"), size_hw)
        if family == "demo":
            return build_demo(name, kwargs, pretrained)
    except MimicutError:
        raise
    except Exception as error:
        raise InputError(
            f"building {spec} with {kwargs or 'no options'}: {one_line(error)}; check name and options"
        ) from error
    return call_builder(import_builder(spec), spec, options)


def load_other_size(spec: str, options: Mapping[str, Any], model: nn.Module, load: Callable[[nn.Module], None]) -> bool:
    """Fill a library's network with weights that were trained on images of the library's usual size.

    Args:
        spec: The name of the model.
        options: What it was built with.
        model: Gets the weights, with the table of positions interpolated to its size.
        load: Fills a network of the usual size; it raises InputError where the weights are not for that.

    Returns:
        Whether there is such a network: False where size makes no difference to it, or the library cannot interpolate.
    """
    family = require_spec(spec)[0]
    given = dict(options.get("model_kwargs") or {})
    name, resize = {"timm": ("img_size", resize_timm), "torchvision": ("image_size", resize_torchvision)}.get(
        family, ("", None)
    )
    size = given.pop(name, None)
    if resize is None or size is None:
        return False
    usual = build_model(spec, {**options, "model_kwargs": given}, pretrained=False).model.eval()
    load(usual)
    return resize(usual, model, size)
