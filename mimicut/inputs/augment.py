"""Label-free views: random variants of an image that its teacher's task treats as the same kind of thing.

A view depends on the teacher and its task, not on the recipe: random resized crops, right for photographs at 224
pixels, cost 18 to 24 points on 32-pixel patches (measured, one seed). Views keep the number of channels and the type of
the pixels: they never normalise and never scale values.

Legend: image_chw is uint8 (0..255) or float32 (already preprocessed by the caller), shape (C, h, w).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RESIZED_CROP_SCALE = (0.08, 1.0)  # Source: MiR re-implementations (RandomResizedCrop's defaults), read in their code.
RESIZED_CROP_RATIO = (3 / 4, 4 / 3)  # Source: as above.
_WARP_ZOOM, _WARP_NOISE = 0.8, 0.1
# Changed colours: deviation of the logarithm of a channel's contrast, of its brightness in half ranges of the values,
# and shares of the images with swapped channels, without colour, inverted. Source: measured on EfficientNet-Lite0
# (docs/LOG.md), as a whole; each by itself is an assumption.
_CONTRAST, _BRIGHTNESS, _SWAPPED, _GREY, _INVERTED = 0.3, 0.3, 0.3, 0.1, 0.1
ATTEMPTS = 10  # Source: torchvision.transforms.RandomResizedCrop.get_params, the same number of tries.
SHIFT = 8  # A shift of up to 1/8 of the side: 4 pixels at 32, the usual pad-and-crop. Assumption at other sizes.


@dataclass(frozen=True)
class View:
    """One kind of random variant.

    base: what `apply` is given: "stored" (the decoded image, at most about twice the evaluation's resolution) or
    "evaluated" (already resized and cropped to the input size). apply(image_chw, size_hw, interpolation, generator)
    returns (C, H, W) of the same type. All randomness comes from the generator, a CPU one. mixing: name in `MIXES`,
    for fits that must not learn the few images by heart.
    """

    base: str
    apply: Callable[[Tensor, tuple[int, int], str, torch.Generator], Tensor]
    about: str
    mixing: str = "warp"


def _resized_crop(
    image_chw: Tensor, size_hw: tuple[int, int], interpolation: str, generator: torch.Generator
) -> Tensor:
    # One draw of fixed length an image: what an image gets does not depend on how many tries the one before needed.
    draws = torch.rand(4 * ATTEMPTS + 1, generator=generator).tolist()
    top, left, height, width = crop_box(image_chw.shape[-2], image_chw.shape[-1], draws)
    crop = image_chw.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
    scaled = resized(crop, size_hw, Image.Resampling[interpolation.upper()])
    scaled = scaled[:, ::-1] if draws[-1] < 0.5 else scaled
    return _tensor(scaled.transpose(2, 0, 1))


def _tensor(image_chw: np.ndarray) -> Tensor:
    # Always a copy: Pillow's memory is read-only, and torch takes no negative strides, even of one pixel.
    return torch.from_numpy(np.array(image_chw, order="C"))


def resized(image_hwc: np.ndarray, size_hw: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resize uint8 or float32 (h, w, C) by Pillow, as the evaluation view is (antialiased).

    In this thread: hundreds of small parallel operations of torch took 20 times as long while other work held the cores
    (measured).
    """
    width_height = (size_hw[1], size_hw[0])
    if image_hwc.dtype == np.uint8 and image_hwc.shape[2] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image_hwc)).resize(width_height, resample))
    channels = (np.ascontiguousarray(image_hwc[..., c]) for c in range(image_hwc.shape[2]))
    return np.stack([np.asarray(Image.fromarray(c).resize(width_height, resample)) for c in channels], axis=2)


def crop_box(height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of a picture, from 4 ATTEMPTS uniform draws; the largest central one
    when no try fits.

    Source: Szegedy et al., Going Deeper with Convolutions (2015), section 6; tries and fallback as in torchvision.
    """
    low, high = map(math.log, RESIZED_CROP_RATIO)
    for k in range(ATTEMPTS):
        scale, ratio, down, across = draws[4 * k : 4 * k + 4]
        area = height * width * (RESIZED_CROP_SCALE[0] + scale * (RESIZED_CROP_SCALE[1] - RESIZED_CROP_SCALE[0]))
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
    w = min(width, max(1, round(height * RESIZED_CROP_RATIO[1])))
    h = min(height, max(1, round(width / RESIZED_CROP_RATIO[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def _shift(image_chw: np.ndarray, down: float, across: float) -> np.ndarray:
    """Pad by reflection and crop back to the same size; `down` and `across` in [0, 1) choose the place."""
    for axis, draw in ((1, down), (2, across)):
        side = image_chw.shape[axis]
        pad = min(side - 1, max(1, side // SHIFT))
        # Reflection, not zeros: nothing appears that the pixels' own range and normalisation do not contain.
        index = np.abs(np.arange(side) + int(draw * (2 * pad + 1)) - pad)
        image_chw = image_chw.take((side - 1) - np.abs((side - 1) - index), axis=axis)
    return image_chw


def _pad_crop(image_chw: Tensor, size_hw: tuple[int, int], interpolation: str, generator: torch.Generator) -> Tensor:
    down, across, mirror = torch.rand(3, generator=generator).tolist()
    shifted = _shift(image_chw.numpy(), down, across)
    return _tensor(shifted[..., ::-1] if mirror < 0.5 else shifted)


def _patches(image_chw: Tensor, size_hw: tuple[int, int], interpolation: str, generator: torch.Generator) -> Tensor:
    down, across, mirror, upside, turns = torch.rand(5, generator=generator).tolist()
    turned = _shift(image_chw.numpy(), down, across)
    turned = turned[..., ::-1] if mirror < 0.5 else turned
    turned = turned[:, ::-1] if upside < 0.5 else turned
    square = size_hw[0] == size_hw[1]
    turned = np.rot90(turned, int(turns * 4) if square else 2 * int(turns * 2), (1, 2))
    return _tensor(turned)


def _native_crop(image_chw: Tensor, size_hw: tuple[int, int], interpolation: str, generator: torch.Generator) -> Tensor:
    down, across, mirror = torch.rand(3, generator=generator).tolist()
    (height, width), sides = image_chw.shape[-2:], size_hw
    if height < sides[0] or width < sides[1]:
        enlarged = (max(height, sides[0]), max(width, sides[1]))
        pixels = resized(image_chw.permute(1, 2, 0).numpy(), enlarged, Image.Resampling[interpolation.upper()])
        image_chw, (height, width) = torch.from_numpy(pixels.copy()).permute(2, 0, 1), enlarged
    top, left = int(down * (height - sides[0] + 1)), int(across * (width - sides[1] + 1))
    crop = image_chw.numpy()[:, top : top + sides[0], left : left + sides[1]]
    return _tensor(crop[..., ::-1] if mirror < 0.5 else crop)


def _as_evaluated(
    image_chw: Tensor, size_hw: tuple[int, int], interpolation: str, generator: torch.Generator
) -> Tensor:
    return image_chw


VIEWS: dict[str, View] = {
    "imagenet": View(
        "stored", _resized_crop, "random resized crop and mirror: photographs at about 128 pixels and more"
    ),
    "pad_crop": View("evaluated", _pad_crop, "shift by up to 1/8 and mirror: small upright images"),
    "patches": View(
        "evaluated",
        _patches,
        "shift by up to 1/8, both mirrors, quarter turns (half turns if not square): textures, tissue",
        "whirl",
    ),
    "crops": View(
        "stored", _native_crop, "crop at the scale of the picture and mirror: restoration, segmentation (--resize none)"
    ),
    "none": View("evaluated", _as_evaluated, "the evaluation view itself"),
}


def _mixup(images: Tensor, generator: torch.Generator) -> Tensor:
    """Up to half of another image in each. Source: Zhang et al., arXiv 1710.09412; its labels are not needed here."""
    share = 0.5 * torch.rand(len(images), generator=generator)
    return images.lerp(_others(images, generator), _each(share, images))


def _cutmix(images: Tensor, generator: torch.Generator) -> Tensor:
    """A box of another image in each, of a uniformly drawn share of its area. Source: Yun et al., arXiv 1905.04899."""
    share, *centre = torch.rand(3, len(images), generator=generator).to(images.device)
    inside = torch.ones(len(images), *[1] * (images.ndim - 1), dtype=torch.bool, device=images.device)
    for axis, middle in zip((-2, -1), centre, strict=True):
        side = images.shape[axis]
        away = (torch.arange(side, device=images.device) + 0.5)[None] - side * middle[:, None]
        mask = away.abs() < side * share.sqrt()[:, None] / 2
        inside = inside & mask.view(len(images), *[1] * (images.ndim + axis - 1), side, *[1] * (-1 - axis))
    return torch.where(inside, _others(images, generator), images)


def _either(images: Tensor, generator: torch.Generator) -> Tensor:
    first = float(torch.rand((), generator=generator)) < 0.5
    return (_mixup if first else _cutmix)(images, generator)


def _vivid(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of three channels in other colours, then mixed; all others are mixed as they are."""
    if images.ndim == 4 and images.shape[1] == 3:
        images = _recoloured(images, generator)
    return _either(images, generator)


def _recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """(n, 3, h, w), each with another contrast and brightness of every channel; of some the channels are swapped, made
    one grey, or inverted. Values stay within those of the batch."""
    count = len(images)
    low, high = images.amin(), images.amax()
    contrast = (_CONTRAST * torch.randn(count, 3, generator=generator)).exp()
    shift = _BRIGHTNESS * torch.randn(count, 3, generator=generator)
    draws = torch.rand(count, 3, generator=generator)
    order = torch.rand(count, 3, generator=generator).argsort(1)
    order = torch.where(draws[:, :1] < _SWAPPED, order, torch.arange(3))
    contrast, shift = (each.to(images)[:, :, None, None] for each in (contrast, shift))
    mean = images.mean((2, 3), keepdim=True)
    images = (images - mean) * contrast + mean + shift * (high - low) / 2
    images = images.gather(1, order.to(images.device)[:, :, None, None].expand_as(images))
    grey = _each(draws[:, 1] < _GREY, images).bool()
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    images = torch.where(_each(draws[:, 2] < _INVERTED, images).bool(), low + high - images, images)
    return images.clamp(low, high)


def _warp(images: Tensor, generator: torch.Generator, degrees: float) -> Tensor:
    """Mixup, then zoomed in, turned and noisy. The shares of each. Source: measured on the demo's teachers, closed form
    alone, three of them at half their MACs, 50 images, seeds 2021 and 2022 (docs/LOG.md)."""
    images = _mixup(images, generator)
    if images.ndim < 4:
        return images  # perhaps no picture: tokens, or series
    count, (height, width) = len(images), images.shape[-2:]
    zoom = 1 - (1 - _WARP_ZOOM) * torch.rand(count, generator=generator)
    angle = math.radians(degrees) * (2 * torch.rand(count, generator=generator) - 1)
    along, across = zoom * angle.cos(), zoom * angle.sin()
    still = torch.zeros(count)
    rows = [
        torch.stack(r, 1) for r in ((along, -across * height / width, still), (across * width / height, along, still))
    ]
    flat = images.reshape(count, -1, height, width).float()
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(flat.shape), align_corners=False).to(flat)
    flat = torch.nn.functional.grid_sample(flat, grid, padding_mode="reflection", align_corners=False)
    spread = flat.flatten(1).std(1, correction=0)
    flat = flat + _each(_WARP_NOISE * spread, flat) * _noise(flat, generator)
    return flat.reshape(images.shape).to(images)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the shape of `images`; those on an accelerator are drawn there, from a seed that is drawn."""
    if images.device.type == "cpu":
        return torch.randn(images.shape, generator=generator).to(images)
    seed = int(torch.randint(2**62, (), generator=generator))
    own = torch.Generator(images.device).manual_seed(seed)
    return torch.randn(images.shape, generator=own, device=images.device).to(images)


def _others(images: Tensor, generator: torch.Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator).to(images.device)]


def _each(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images).view(-1, *[1] * (images.ndim - 1))


# Each mixes every image of a batch (n, ..., h, w) with another one of it. The teacher gives the features of a mixture,
# so no labels are needed.
MIXES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda images, generator: images,
    "mixup": _mixup,
    "cutmix": _cutmix,
    "both": _either,
    "vivid": _vivid,
    "warp": lambda images, generator: _warp(images, generator, 15.0),
    "whirl": lambda images, generator: _warp(images, generator, 180.0),
}
