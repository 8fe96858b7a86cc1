"""How a teacher wants its images: a record of plain numbers, checked when it is made, kept as JSON; and how they are
handed to it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mimicut.base.errors import InputError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher wants its images; built from the weights' own configuration by `builders`.

    Files and uint8 arrays are resized by Pillow with antialiasing (as torchvision's and timm's evaluation do), cropped
    to the centre, scaled to 0..1, and normalised to (x - mean) / std. Floating-point arrays are the caller's work and
    are left alone (see the head of `images`).
    """

    input_size: tuple[int, int, int]
    """(C, H, W); C is 1 (colour becomes grey), 3 (grey is repeated), or N (only sources with N channels)."""
    mean: tuple[float, ...]
    """Per channel, on the scale 0..1."""
    std: tuple[float, ...]
    """Per channel, on the scale 0..1, above 0."""
    resize: int | None = None
    """Pixels of the shorter side before the central crop; None: straight to (H, W), whatever the shape."""
    interpolation: str = "bilinear"
    """One of INTERPOLATIONS."""

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Iterable) else (value,))
        faults = list(self._faults())
        if faults:
            raise InputError(f"checking the preprocessing: {'; '.join(faults)}")

    def _faults(self) -> Iterator[str]:
        size = self.input_size
        whole = len(size) == 3 and all(type(n) is int and n > 0 for n in size)
        if not whole:
            yield f"input_size: found {size}, expected three whole numbers above 0, (channels, height, width)"
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
                yield f"{name}: found {values}, expected finite numbers"
            elif whole and len(values) != size[0]:
                yield f"{name}: found {len(values)} values, expected {size[0]}, one a channel"
            elif name == "std" and min(values) <= 0:
                yield f"std: found {values}, expected numbers above 0"
            elif name == "mean" and max(map(abs, values)) > 2:
                yield f"mean: found {values}, expected the scale 0..1; divide mean and std by 255"
        if self.resize is not None and (type(self.resize) is not int or (whole and self.resize < max(size[1:]))):
            yield f"resize: found {self.resize!r}, expected None or whole pixels, not below the larger of {size[1:]}"
        if self.interpolation not in INTERPOLATIONS:
            yield f"interpolation: found {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}"

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Raises InputError when `data` is no mapping, lacks a field, or has one that is not known."""
        known = {f.name for f in fields(cls)}
        found = set(data) if isinstance(data, Mapping) else {type(data).__name__}
        wrong = sorted(map(str, found - known)) + [f"no {n}" for n in ("input_size", "mean", "std") if n not in found]
        if wrong:
            raise InputError(f"reading a preprocessing: found {', '.join(wrong)}; expected the fields {sorted(known)}")
        return cls(**data)

    def normalise(self, images_nchw: Tensor) -> Tensor:
        """uint8 (n, C, H, W) to float32: x / 255, minus mean, over std; the same rounding as torchvision's presets."""
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return images_nchw.to(torch.float32).div_(255).sub_(mean).div_(std)


def handed(images_nchw: Tensor, call: Mapping[str, Any] | None) -> Any:
    """`images_nchw` as a network takes them: alone where `call` is None, else (args, kwargs).

    call: {"keyword": the name of the argument that they are, or None for the first, "options": what stands beside it}.
    """
    if call is None:
        return images_nchw
    if call["keyword"] is None:
        return (images_nchw,), dict(call["options"])
    return (), {call["keyword"]: images_nchw, **call["options"]}
