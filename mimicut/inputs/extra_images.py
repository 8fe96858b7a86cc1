"""Extra images: pictures of anything that help a student to mimic, beside the few of the network's task.

They never choose, and never certify. Their colours are brought to those of the few: each picture takes the mean and the
deviation of every channel from one of them, so that it looks as bright and as rich in contrast as what the network
gets. Networks of small inputs get crops of all sizes, from the input's own resolution up to whole pictures.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimicut.base.errors import InputError
from mimicut.base.paths import usable_path
from mimicut.inputs.augment import resized
from mimicut.inputs.file_names import listed
from mimicut.inputs.generated_pictures import SIDE, draw_pictures
from mimicut.inputs.image_set import ImageSet, ImageSource, Viewable, base_of, read_images
from mimicut.inputs.image_sources import files_in
from mimicut.inputs.preprocessing import Preprocessing, model_inputs

GENERATED, NONE = "generated", "none"  # what may stand in place of a source: pictures that are drawn, or none at all
# Images, and bytes of their pixels, at the most. Source: assumption.
MOST, MOST_BYTES = 2000, 2**26
_CROPS_EACH = 8  # of a drawn picture, for small inputs. Source: assumption.
_DRAWN_SEED = 0  # every run draws the same pictures
_LEAST_DEVIATION = 0.05  # of a channel, in units of the network's input: flatter ones are not stretched further
_FEW = 256  # of the few images, at the most, give their colours
_AT_ONCE = 32  # images whose pixels are held while they are looked at
_LARGE_BYTES = 2**28  # for these


@dataclass(frozen=True)
class ExtraImages:
    """Extra images, and the colours that they take.

    Args:
        images: The images; `batches.held_on` puts them on an accelerator.
        means, deviations: Of the channels of each of the few images, as the network takes them: (n, C, 1, 1).
        lowest, highest: Of the values that the network takes.
        pictures: The pictures that the images are crops of, as they are evaluated; the images themselves where they are
            none. None: they are drawn.
        call: How the network takes images, as in `model_inputs`; None if they are its only input.
    """

    images: Viewable
    means: Tensor
    deviations: Tensor
    lowest: float
    highest: float
    pictures: ImageSet | None
    call: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hashes(self) -> list[str]:
        return self.images.hashes

    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> Any:
        """As `ImageSet.view` and `ImagesWithCall.view`, in the colours of the few."""
        made = self.images.view(indices, views, generator)
        like = torch.randint(len(self.means), (len(made),), generator=generator)
        mean, deviation = made.mean((2, 3), keepdim=True), made.std((2, 3), keepdim=True, correction=0)
        scaled = (made - mean) / deviation.clamp_min(_LEAST_DEVIATION)
        deviations, means = (each[like].to(made.device) for each in (self.deviations, self.means))
        coloured = (scaled * deviations + means).clamp(self.lowest, self.highest)
        return coloured if self.call is None else model_inputs(coloured, self.call)


def read_extra(
    source: ImageSource | ImageSet | str, few: ImageSet, views: str, *, seed: int, memory_bytes: int, most: int = MOST
) -> ExtraImages | None:
    """Read extra images, or draw them.

    Args:
        source: As `read_images` takes it, or GENERATED, or NONE.
        few: The images of the network's task, whose colours are taken.
        views: A name in `augment.VIEWS`, of the few.
        seed: Of where crops are cut out.
        memory_bytes: For their pixels.
        most: How many are drawn at the most: no more than the steps can show.

    Returns:
        At most MOST images; None where there are to be none.

    Raises:
        InputError: Nothing can be read, or a set of images was read for another network.
    """
    if isinstance(source, str) and source == NONE:
        return None
    preprocessing, bound = few.preprocessing, min(MOST_BYTES, memory_bytes)
    crops = base_of(views) == "evaluated" and max(preprocessing.input_size[1:]) <= SIDE // 2
    pictures = None
    if isinstance(source, str) and source == GENERATED:
        images = _drawn(preprocessing, crops, bound, most)
    else:
        try:
            images, pictures = _read(source, preprocessing, crops, seed, bound)
        except InputError as error:
            raise InputError(
                f"reading the extra images, which can be of anything ({GENERATED!r} draws some, {NONE!r} leaves them "
                f"out): {error}"
            ) from error
    return ExtraImages(images, *_colours(few), pictures)


def _colours(few: ImageSet) -> tuple[Tensor, Tensor, float, float]:
    """Means and deviations of the channels of the few images, and the least and the largest of their values."""
    deviations, means, ends = [], [], []
    chosen = _spread(len(few), _FEW)
    for start in range(0, len(chosen), _AT_ONCE):
        pixels = few.batch(chosen[start : start + _AT_ONCE])
        deviation, mean = torch.std_mean(pixels, (2, 3), keepdim=True, correction=0)
        deviations.append(deviation)
        means.append(mean)
        ends += [float(pixels.min()), float(pixels.max())]
    return torch.cat(means), torch.cat(deviations), min(ends), max(ends)


def _drawn(preprocessing: Preprocessing, crops: bool, bound: int, most: int) -> ImageSet:
    if crops:
        return _drawn_crops(preprocessing, min(most, _fitting(bound, preprocessing.input_size)))
    channels, height, width = preprocessing.input_size
    side = max(height, width)
    pictures = draw_pictures(min(most, _fitting(bound, (channels, side, side))), _DRAWN_SEED, side=side)
    # Of the size of the input: what is stored is what is evaluated, and held once.
    return read_images(_with_channels(pictures, channels), replace(preprocessing, resize=None))


@lru_cache(maxsize=2)
def _drawn_crops(preprocessing: Preprocessing, count: int) -> ImageSet:
    """Kept, as they are small and drawing takes seconds."""
    pictures = draw_pictures(-(-count // _CROPS_EACH), _DRAWN_SEED, side=SIDE)
    planes = _with_channels(pictures, preprocessing.input_size[0])
    return read_images(_crops(planes, len(planes), count, preprocessing, _DRAWN_SEED), preprocessing)


def _fitting(bound: int, size: tuple[int, int, int]) -> int:
    """How many images of so many pixels fit."""
    return max(1, min(MOST, bound // math.prod(size)))


def _read(
    source: ImageSource | ImageSet, preprocessing: Preprocessing, crops: bool, seed: int, bound: int
) -> tuple[ImageSet, ImageSet]:
    """The images, and the pictures that they are from."""
    notes: list[str] = []
    if isinstance(source, ImageSet):
        if source.preprocessing != preprocessing:
            raise InputError(
                f"found a set read for inputs of {source.preprocessing.input_size}, expected one read with the "
                f"teacher's preprocessing ({preprocessing.input_size}); read_images(..., teacher.preprocessing)"
            )
        if not len(source):
            raise InputError("found a set without images, expected at least one")
        images = source.subset(_spread(len(source), MOST))
        return images, images
    if isinstance(source, (str, Path)) and not str(source).strip():
        raise InputError("found an empty name, expected a folder or file of pictures")
    paths = _paths(source)
    folders = [path for path in paths if path.is_dir()]
    if folders:
        files = [file for path in paths for file in (files_in(path) if path.is_dir() else [path]) if file.is_file()]
        if len(files) > MOST:
            named = listed(map(str, folders))
            notes.append(f"{MOST:,} of the {len(files):,} pictures in {named} are used")
        source = [str(files[index]) for index in _spread(len(files), MOST)] if files else str(folders[0])
    pictures = read_images(source, preprocessing, memory_bytes=bound, keep="evaluated" if crops else "stored")
    if not crops or pictures.floats:
        images = pictures.subset(_spread(len(pictures), MOST))
        return images, _with_notes(images, pictures, notes)
    count = _fitting(bound, preprocessing.input_size)
    made = _crops(_large(source, preprocessing), len(pictures), count, preprocessing, seed)
    return read_images(made, preprocessing), _with_notes(pictures, pictures, notes)


def _paths(source: ImageSource) -> list[Path]:
    """The paths in a source that is one, or a list of them; none for any other."""
    listed = source if isinstance(source, (list, tuple)) else [source]
    paths = [usable_path(each, "reading extra images") for each in listed if isinstance(each, (str, Path))]
    return paths if len(paths) == len(listed) else []


def _with_notes(images: ImageSet, read: ImageSet, notes: Sequence[str]) -> ImageSet:
    """`images` with `notes`, and with those of the notes on `read` that matter where images prove nothing."""
    skipped = [note for note in read.notes if note.startswith(f"{len(read.skipped)} image(s) skipped")]
    images.notes = [*notes, *skipped]
    return images


def _large(source: ImageSource, preprocessing: Preprocessing) -> Iterator[np.ndarray]:
    """The pixels of each picture, as a network with larger inputs would store them, since crops need detail.

    Of files some are decoded at a time, and none is held after that.
    """
    large = replace(preprocessing, input_size=(preprocessing.input_size[0], SIDE // 2, SIDE // 2), resize=None)
    listed = isinstance(source, list)
    parts = [source[start : start + _AT_ONCE] for start in range(0, len(source), _AT_ONCE)] if listed else [source]  # type: ignore[index, arg-type]
    for part in parts:
        try:
            images = read_images(part, large, memory_bytes=_LARGE_BYTES)
        except InputError:  # none of this part can be read, which was said when all of them were read
            continue
        for index in range(len(images)):
            yield images.stored(index).numpy()


def _spread(images: int, most: int) -> list[int]:
    """Indices of at most so many images, evenly spread.

    >>> _spread(9, 3)
    [0, 3, 6]
    """
    chosen = min(images, most)
    return [number * images // chosen for number in range(chosen)]


def _crops(
    pictures: Iterable[np.ndarray], known: int, count: int, preprocessing: Preprocessing, seed: int
) -> np.ndarray:
    """Square crops, from the input's size to the whole shorter side, as many of every order of magnitude.

    Args:
        pictures: uint8 (C, h, w) each.
        known: How many these are.
        count: How many crops, as many of each picture as of any other.
        preprocessing: Says to which size crops are resized, and how.
        seed: Of the places.

    Returns:
        uint8 (count, C, H, W).
    """
    random = np.random.RandomState([seed % 2**32, seed >> 32, 2])
    _, height, width = preprocessing.input_size
    made = []
    for number, picture in enumerate(pictures):
        shorter = min(picture.shape[1:])
        least = min(shorter, max(height, width))
        for _ in range(number * count // known, (number + 1) * count // known):
            side = round(np.exp(random.uniform(np.log(least), np.log(shorter))))
            top, left = (random.randint(0, length - side + 1) for length in picture.shape[1:])
            crop = picture[:, top : top + side, left : left + side].transpose(1, 2, 0)
            made.append(resized(crop, (height, width), Image.Resampling[preprocessing.interpolation.upper()]))
    return np.stack(made).transpose(0, 3, 1, 2)


def _with_channels(pictures: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (n, h, w, 3) as (n, channels, h, w): grey, as they are, or each channel a random mixture of theirs."""
    if channels == 3:
        return pictures.transpose(0, 3, 1, 2)
    random = np.random.RandomState(_DRAWN_SEED)
    weights = np.array([[0.299, 0.587, 0.114]]) if channels == 1 else random.dirichlet(np.ones(3), channels)
    mixed = [np.tensordot(weights.astype(np.float32), picture, (1, 2)) for picture in pictures]
    return np.stack([np.rint(planes).astype(np.uint8) for planes in mixed])
