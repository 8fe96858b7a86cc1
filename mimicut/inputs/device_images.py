"""Images held on an accelerator, whose views are made there, a whole batch at once.

Pictures are decoded once and kept as they are (uint8, or floats that the caller prepared). A view takes its random
numbers from the same generator in the same order as on a CPU (`augment`), so that both make the same views: equal ones
where pixels are only moved, and up to rounding where they are resized: Pillow rounds between its two passes, of which
either may come first. What is resized is multiplied by one matrix for the rows and one for the columns of each image,
which hold its crop, its filter and its mirror.

Legend: n images of the batch, N of all; h, w of the largest picture, H, W of the network's input.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimicut.inputs.augment import ATTEMPTS, SHIFT, crop_box
from mimicut.inputs.image_set import ImageSet, base_of
from mimicut.inputs.preprocessing import Preprocessing


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


# Interpolation -> filter, and how far it reaches. Source: Pillow's Resample.c; the cubic one is Keys' with a = -1/2.
_FILTERS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}
_AT_ONCE = 16  # Pictures that are resized at once, for the memory of their floats. Source: assumption.


@dataclass(frozen=True)
class DeviceImages:
    """Images on a device. Built by `images_on` and `tensor_on`; stands where an ImageSet or a tensor of images does.

    Args:
        pixels: Of each base ("stored", "evaluated") (N, C, h, w) of all images, smaller ones at the top left.
        sizes: Of each base (height, width) of every image.
        size_hw: Of the network's input.
        preprocessing: To normalise uint8 with; None for floats.
        interpolation: Of resized views.
        hashes: As of an ImageSet.
    """

    pixels: dict[str, Tensor]
    sizes: dict[str, list[tuple[int, int]]]
    size_hw: tuple[int, int]
    preprocessing: Preprocessing | None
    interpolation: str
    hashes: list[Any]

    def __len__(self) -> int:
        return len(self.hashes)

    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> Tensor:
        """Random variants, ready for the teacher: (n, C, H, W) on the device. As `ImageSet.view`, with the same random
        numbers."""
        base, indices = base_of(views), [int(i) for i in indices]
        pixels = self.pixels[base]
        if views == "none":
            made = pixels[self._at(indices)]
        elif views == "imagenet":
            made = self._resized_crops(pixels, indices, self.sizes[base], generator)
        else:
            made = self._moved(pixels, indices, views, self.sizes[base], generator)
        return made if self.preprocessing is None else self.preprocessing.normalise(made)

    def batch(self, indices: Iterable[int] | None = None) -> Tensor:
        """As `ImageSet.batch`, on the device."""
        chosen = range(len(self)) if indices is None else indices
        return self.view(chosen, "none", torch.Generator())

    def _at(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=next(iter(self.pixels.values())).device)

    def _resized_crops(
        self, pixels: Tensor, indices: list[int], sizes: list[tuple[int, int]], generator: torch.Generator
    ) -> Tensor:
        boxes, mirrored = [], []
        for index in indices:
            draws = torch.rand(4 * ATTEMPTS + 1, generator=generator).tolist()
            boxes.append(crop_box(*sizes[index], draws))
            mirrored.append(draws[-1] < 0.5)
        top, left, height, width = self._at(boxes).unbind(1)
        rows = self._weights(top, height, self.size_hw[0], pixels.shape[2])
        columns = self._weights(left, width, self.size_hw[1], pixels.shape[3])
        columns = torch.where(self._at(mirrored)[:, None, None], columns.flip(1), columns)
        made = []
        for at in torch.arange(len(indices)).split(_AT_ONCE):
            part = slice(int(at[0]), int(at[-1]) + 1)
            across = pixels[self._at(indices[part])].to(columns) @ columns[part, None].mT  # (n, C, h, W)
            made.append(_levels(rows[part, None] @ _levels(across, pixels.dtype).to(rows), pixels.dtype))
        return torch.cat(made)

    def _weights(self, start: Tensor, length: Tensor, made: int, whole: int) -> Tensor:
        """(n, made, whole): what each of `whole` pixels of a line counts in each of `made`, of the part of the line
        from `start` on."""
        kernel, reach = _FILTERS[self.interpolation]
        scale = (length / made)[:, None, None]
        wide = scale.clamp_min(1.0)
        middle = (torch.arange(made, device=start.device)[:, None] + 0.5) * scale
        place = torch.arange(whole, device=start.device)[None, None] - start[:, None, None]
        away = (place + 0.5 - middle) / wide
        inside = (place >= 0) & (place < length[:, None, None]) & (away.abs() < reach)
        weights = torch.where(inside, kernel(away), 0.0)
        return weights / weights.sum(2, keepdim=True)

    def _moved(
        self, pixels: Tensor, indices: list[int], views: str, sizes: list[tuple[int, int]], generator: torch.Generator
    ) -> Tensor:
        """Views whose pixels are those of the picture at other places: of each image a row and a column of indices."""
        rows, columns, quarters = [], [], []
        for index in indices:
            draws = torch.rand(5 if views == "patches" else 3, generator=generator).tolist()
            if views == "crops":
                row, column = (
                    list(range(start := int(draw * (side - made + 1)), start + made))
                    for draw, side, made in zip(draws, sizes[index], self.size_hw, strict=False)
                )
            else:
                row, column = (_shifted(side, draw) for side, draw in zip(sizes[index], draws, strict=False))
            rows.append(row[::-1] if views == "patches" and draws[3] < 0.5 else row)
            columns.append(column[::-1] if draws[2] < 0.5 else column)
            if views == "patches":
                square = self.size_hw[0] == self.size_hw[1]
                quarters.append(int(draws[4] * 4) if square else 2 * int(draws[4] * 2))
        at = self._at(indices)[:, None, None]
        made = pixels.movedim(1, 3)[at, self._at(rows)[:, :, None], self._at(columns)[:, None, :]].movedim(3, 1)
        for turns in set(quarters) - {0}:
            which = self._at([i for i, each in enumerate(quarters) if each == turns])
            made[which] = torch.rot90(made[which], turns, (2, 3))
        return made.contiguous()


def _levels(made: Tensor, kind: torch.dtype) -> Tensor:
    """Numbers as pixels of a kind, rounded as Pillow does after each of its two passes."""
    return (made + 0.5).floor().clamp(0, 255).to(kind) if kind == torch.uint8 else made.to(kind)


def _shifted(side: int, draw: float) -> list[int]:
    """The indices that `augment` takes along an axis that is shifted by reflection."""
    pad = min(side - 1, max(1, side // SHIFT))
    found = (abs(i + int(draw * (2 * pad + 1)) - pad) for i in range(side))
    return [(side - 1) - abs((side - 1) - i) for i in found]


def images_on(images: ImageSet, views: str, device: torch.device, room: int) -> DeviceImages | None:
    """The images on a device; None where they do not fit, or their views cannot be made there: with another filter than
    bilinear and bicubic, or crops of pictures below the input's size, which are enlarged first.

    Args:
        images: The images. Those that are not in memory are decoded once.
        views: A key of `augment.VIEWS`.
        device: Where to.
        room: Bytes that there are for pixels.
    """
    pre = images.preprocessing
    height, width = pre.input_size[1:]
    if views == "imagenet" and pre.interpolation not in _FILTERS:
        return None
    pixels, sizes = {}, {}
    for base in dict.fromkeys(("evaluated", base_of(views))):
        found = _pictures_on(images, base, device, room)
        if found is None:
            return None
        pixels[base], sizes[base] = found
        room -= pixels[base].nbytes
    if views == "crops" and any(h < height or w < width for h, w in sizes["stored"]):
        return None
    ready = None if images.floats else pre
    return DeviceImages(pixels, sizes, (height, width), ready, pre.interpolation, images.hashes)


def _pictures_on(
    images: ImageSet, base: str, device: torch.device, room: int
) -> tuple[Tensor, list[tuple[int, int]]] | None:
    """The pixels of all images in one tensor (N, C, h, w), and the size of each; None where there is no room."""
    pictures: list[Tensor] = []
    for index in range(len(images)):
        pictures.append(images.pixels(index, base).to(device))
        room -= pictures[-1].nbytes
        if room < 0:
            return None
    sizes = [(t.shape[1], t.shape[2]) for t in pictures]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    shape = len(pictures), len(pictures[0]), height, width
    if sum(t.nbytes for t in pictures) < pictures[0].element_size() * math.prod(shape) - room:
        return None
    whole = pictures[0].new_zeros(shape)
    for place, picture in zip(whole, pictures, strict=True):
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return whole, sizes


def tensor_on(images: Tensor, hashes: list[Any], device: torch.device) -> DeviceImages:
    """Images (N, C, H, W), as the network takes them, on a device."""
    height, width = images.shape[2:]
    bases = ("evaluated", "stored")
    return DeviceImages(
        dict.fromkeys(bases, images.to(device)), dict.fromkeys(bases, [(height, width)] * len(images)),
        (height, width), None, "bilinear", hashes,
    )  # fmt: skip
