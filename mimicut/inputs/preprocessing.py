"""How a teacher expects its images: plain numbers, checked when they are set, kept as JSON; what a user changes in
them; and the arguments of the teacher's call."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from mimicut.base.errors import InputError

NATIVE = "none"  # as resize: no resizing
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher expects its images; built from the weights' own configuration by `build_by_name`.

    Files and uint8 arrays are resized by Pillow with antialiasing (as torchvision's and timm's evaluation do), cropped
    to the centre, scaled to 0..1, and normalised to (x - mean) / std. Floating-point arrays are the caller's work and
    are left alone (see the head of `image_set`).

    >>> Preprocessing((3, 224, 224), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), resize=256).interpolation
    'bilinear'

    Raises:
        InputError: A field has a value that makes no sense; the message lists every such field.
    """

    input_size: tuple[int, int, int]
    """(C, H, W); C is 1 (colour becomes grey), 3 (grey is repeated), or N (only sources with N channels)."""
    mean: tuple[float, ...]
    """Per channel, on the scale 0..1."""
    std: tuple[float, ...]
    """Per channel, on the scale 0..1, above 0."""
    resize: int | str | None = None
    """Pixels of the shorter side before the central crop; None: straight to (H, W), whatever the shape; "none": no
    resizing, crops at the picture's own scale (restoration, segmentation). Pictures that are too small are enlarged."""
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
            yield (
                f"input_size: found {size}, expected three whole numbers above 0, (channels, height, width), also for "
                "volumes and clips"
            )
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
        enough = type(self.resize) is int and not (whole and self.resize < max(size[1:]))
        if self.resize not in (None, NATIVE) and not enough:
            yield (
                f"resize: found {self.resize!r}, expected None, {NATIVE!r} or whole pixels, not below the larger of "
                f"{size[1:]}"
            )
        if self.interpolation not in INTERPOLATIONS:
            yield f"interpolation: found {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives the same value again."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """The value that `to_json` wrote.

        Raises:
            InputError: `data` is no mapping, lacks a field, or has one that is not known.
        """
        known = {f.name for f in fields(cls)}
        found = set(data) if isinstance(data, Mapping) else {type(data).__name__}
        wrong = sorted(map(str, found - known)) + [f"no {n}" for n in ("input_size", "mean", "std") if n not in found]
        if wrong:
            raise InputError(f"reading a preprocessing: found {', '.join(wrong)}; expected the fields {sorted(known)}")
        return cls(**data)

    def normalise(self, images_nchw: Tensor) -> Tensor:
        """Normalise uint8 (n, C, H, W) to float32: (x / 255 - mean) / std, rounded as torchvision's presets round."""
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        mean, std = mean.to(images_nchw.device), std.to(images_nchw.device)
        return images_nchw.to(torch.float32).div_(255).sub_(mean).div_(std)


class PreprocessingFields(TypedDict, total=False):
    """The fields of `PreprocessingChanges`, as keyword arguments."""

    input_size: Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    resize: int | str | None
    interpolation: str | None


@dataclass(frozen=True, kw_only=True)
class PreprocessingChanges:
    """What a user changes in the preprocessing that a teacher's weights expect; None leaves a field as it is.

    Attributes:
        input_size: (C, H, W).
        mean: Per channel, on the scale 0..1.
        std: Per channel, on the scale 0..1, above 0.
        resize: Pixels of the shorter side before the central crop, or "exact": straight to (H, W), or "none": crops
            at the picture's own scale.
        interpolation: One of INTERPOLATIONS.
    """

    input_size: Sequence[int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: int | str | None = None
    interpolation: str | None = None

    def apply(self, base: Preprocessing, in_chans: int | None, notes: list[str]) -> Preprocessing:
        """`base` with these changes. Another size keeps the crop's share; other channels get the average mean and std.

        Args:
            base: What the weights expect.
            in_chans: Number of channels that the model was built for, where the user gave one.
            notes: Gets a sentence for each value that was not given and had to be averaged.

        Raises:
            InputError: `in_chans` and `input_size` disagree, or the result is no valid preprocessing.
        """
        size: tuple[int, ...] = (in_chans or base.input_size[0], *base.input_size[1:])
        size = size if self.input_size is None else tuple(self.input_size)
        if in_chans and size and size[0] != in_chans:
            raise InputError(
                f"loading a teacher: found in_chans {in_chans} and input_size {size}, expected the same channels"
            )
        changes: dict[str, Any] = {"input_size": size, "interpolation": self.interpolation or base.interpolation}
        changes["resize"] = None if self.resize == "exact" else self.resize or base.resize
        whole = len(size) == 3 and all(type(n) is int and n > 0 for n in size)
        if whole and self.resize is None and isinstance(base.resize, int) and size[1:] != base.input_size[1:]:
            changes["resize"] = size[1] * base.resize // base.input_size[1] if size[1] == size[2] else None
        for name in ("mean", "std"):
            given = getattr(self, name)
            changes[name] = getattr(base, name) if given is None else given
            if given is None and whole and size[0] != base.input_size[0]:
                changes[name] = per_channel(changes[name], size[0])
                notes.append(
                    f"{name}: the average of the usual ones, {changes[name][0]:.3g} for each of {size[0]} channel(s)"
                )
        return replace(base, **changes)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel: `values` themselves, or their average where there are not as many.

    >>> per_channel((0.25, 0.5, 0.75), 1)
    (0.5,)
    """
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def model_inputs(images_nchw: Tensor, call: Mapping[str, Any] | None) -> Any:
    """What a network is called with: the images alone where `call` is None, else (args, kwargs).

    Args:
        images_nchw: Prepared images, float32 (N, C, H, W).
        call: {"keyword": the name of the argument that the images are, or None for the first, "options": the other
            keyword arguments}.

    Raises:
        InputError: The network takes other inputs (`InputSource.call`).

    >>> model_inputs(torch.zeros(1, 1, 1, 1), {"keyword": "pixel_values", "options": {"scale": True}})
    ((), {'pixel_values': tensor([[[[0.]]]]), 'scale': True})
    """
    if call is None:
        return images_nchw
    if "inputs" in call:
        raise InputError(
            "calling a network: it takes other inputs than a batch of images, which are made up in no other way than "
            "from samples; give an InputSource, or export it by mimicut.export(model, example, folder)"
        )
    if call["keyword"] is None:
        return (images_nchw,), dict(call["options"])
    return (), {call["keyword"]: images_nchw, **call["options"]}
