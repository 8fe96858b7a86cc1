"""The teachers that ship with mimicut, and those whose weights are packages of the index."""

import importlib
from collections.abc import Mapping
from typing import Any

from mimicut.inputs.built_model import BuiltModel, refuse_new_head
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.timm_models import build_timm, imagenet_classes


def build_demo(name: str, kwargs: Mapping[str, Any], pretrained: bool) -> BuiltModel:
    """Build a teacher of the demo.

    Args:
        name: One of `demo.teacher_networks.NAMES` or `demo.imagenet.NAMES`.
        kwargs: Options of its builder; none for the small networks.
        pretrained: Whether it gets its trained weights.

    Raises:
        InputError: There is no such teacher, or its weights are not installed.
    """
    imagenet = importlib.import_module("mimicut.demo.imagenet")
    if name in imagenet.NAMES:
        model = build_timm(imagenet.PACKED[name].architecture, kwargs, pretrained=False).model
        if pretrained:
            refuse_new_head(f"demo:{name}", kwargs.get("num_classes", imagenet.CLASSES), imagenet.CLASSES)
            imagenet.load_into(model, name)
        classes = imagenet_classes("imagenet-1k") if pretrained else ()
        return BuiltModel(model, Preprocessing.from_json(imagenet.preprocessing(name)), classes=classes)
    networks = importlib.import_module("mimicut.demo.teacher_networks")
    # Without trained weights nothing is read from a file: a result folder must load where only the code is.
    model, expected = networks.load(name) if pretrained else (networks.build(name), networks.preprocessing(name))
    classes = tuple(networks.CLASSES) if pretrained and name not in networks.OTHER_TASKS else ()
    return BuiltModel(model, Preprocessing.from_json(expected), "patches", classes=classes)
