"""Turn a picture from a file, a PIL image or an array into the pixels that are stored and evaluated.

Decoded pixels are turned upright, converted to 8 bits and to the teacher's channels, resized and cropped as its
`Preprocessing` says; the contract is at the head of `image_set`. `image_sources` finds the pictures of a source.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mimicut.base.errors import InputError
from mimicut.inputs.preprocessing import NATIVE, Preprocessing

MOST_PIXELS = 40_000_000  # decoded: half a gigabyte with transparency. A large JPEG is decoded at a part of its size.
MAX_ASPECT = 100  # Beyond it, resizing the shorter side would make a picture of gigabytes.
# No format that runs another program (EPS) or that people do not keep photographs in.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


@dataclass(frozen=True)
class Decoded:
    """One decoded picture.

    Attributes:
        name: A file's path below its folder, or "image 7".
        origin: SHA-256 of the file or array.
        content: SHA-256 of the stored pixels.
        stored: uint8 or float32 (C, h, w), at most about twice the evaluation's resolution; None if not in memory.
        evaluated: The same type, (C, H, W), before normalisation; None if not in memory.
        again: Decodes "stored" or "evaluated" again; None if not from a file, and then both stay in memory.
    """

    name: str
    origin: str
    content: str
    stored: Tensor | None
    evaluated: Tensor | None
    again: Callable[[str], Tensor] | None = None

    def base(self, name: str) -> Tensor:
        """The pixels "stored" or "evaluated", from which views are made; decoded again if not in memory."""
        held = self.stored if name == "stored" else self.evaluated
        if held is not None:
            return held
        if self.again is None:
            raise InputError(
                f"making views of {self.name}: its stored pixels are gone, since these images were read only to be "
                "evaluated; read them again with keep='stored'"
            )
        return self.again(name)

    def holds(self, keep: str) -> bool:
        """Whether nothing has to be decoded again. keep: as in `kept`."""
        return self.evaluated is not None and (keep == "evaluated" or self.stored is not None)

    def kept(self, keep: str, room: int) -> "Decoded":
        """The same picture, holding in memory what `keep` names if that fits into `room` bytes, else nothing.

        A picture that is not from a file is always held. keep: "stored" (both kinds of pixels) or "evaluated" (these
        alone).
        """
        names = ("stored", "evaluated") if keep == "stored" else ("evaluated",)
        if self.again is not None and _bytes(*(self.stored if n == "stored" else self.evaluated for n in names)) > room:
            return replace(self, stored=None, evaluated=None)
        made = {name: self.base(name) for name in names}
        if self.again is not None and _bytes(*made.values()) > room:  # its size was unknown before it was decoded
            made = {}
        return replace(self, stored=made.get("stored"), evaluated=made.get("evaluated"))

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return _bytes(self.stored, self.evaluated)


def _bytes(*tensors: Tensor | None) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors if t is not None}.values())


class Unreadable(ValueError):
    """Why one file or item cannot be used; becomes the reason in `ImageSet.skipped`."""


class Reader:
    """Turns images into `Decoded` one by one, and counts the facts that become notes."""

    def __init__(self, preprocessing: Preprocessing, memory_bytes: int, keep: str = "stored"):
        """keep: which pixels of each picture are held within memory_bytes, as in `Decoded.kept`."""
        self.preprocessing, self.keep = preprocessing, keep
        self.channels, self.height, self.width = preprocessing.input_size
        self.size_hw = (self.height, self.width)
        # Twice the evaluation's resolution leaves random crops real detail, and bounds the memory of large photographs.
        resize = preprocessing.resize
        self.cap = math.inf if resize == NATIVE else 2 * (resize if isinstance(resize, int) else max(self.size_hw))
        self.room = memory_bytes
        self.facts: Counter[str] = Counter()
        self.small: list[tuple[int, int]] = []
        self.floats: list[tuple[float, float]] = []

    def file(self, path: Path, name: str) -> Decoded:
        """Read a file. Raises PIL.UnidentifiedImageError if it is no image; other exceptions if it is a broken one."""
        with path.open("rb") as stream:
            planes = self._decoded(stream)
            stream.seek(0)
            origin = hashlib.file_digest(stream, "sha256").hexdigest()
        return self.finish(planes, name, origin, again=lambda base: self._again(path, name, origin, base))

    def _decoded(self, stream: BinaryIO) -> list[Image.Image]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata and sizes below its own limit.
            with Image.open(stream, formats=_formats()) as im:
                reduce = int(min(im.size) // self.cap)
                if reduce >= 2 and im.format in ("JPEG", "MPO"):
                    im.draft(None, (im.width // reduce, im.height // reduce))
                    self.facts["decoded at reduced size (large JPEG)"] += 1
                return self.planes(im)

    def _again(self, path: Path, name: str, origin: str, base: str) -> Tensor:
        """Decode only what `base` names, in half the time of the first decoding; equal bytes give equal pixels."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"reading {name} again: {error}; leave the images where they are until the end") from error
        if hashlib.sha256(data).hexdigest() != origin:
            raise InputError(f"reading {name} again: it changed since it was first read; start the run again")
        reader = Reader(self.preprocessing, 0)
        planes = reader._decoded(BytesIO(data))
        return _chw(reader._stored(planes) if base == "stored" else reader._evaluated(planes))

    def planes(self, im: Image.Image) -> list[Image.Image]:
        """[RGB image], [grey image] or one grey image per channel, as the teacher's channel count requires."""
        if im.width * im.height > MOST_PIXELS:
            raise Unreadable(f"found {im.width}x{im.height} pixels, expected at most {MOST_PIXELS:,}; save it smaller")
        if self.channels not in (1, 3):
            return self._bands(im, getattr(im, "n_frames", 1))
        if getattr(im, "is_animated", False) and im.format != "MPO":  # MPO: a photograph with its own previews
            self.facts["with several frames or pages: the first is used"] += 1
        im = self._eight_bit(_upright(im))
        if im.mode == "LAB":  # Pillow turns it into RGB only
            im = im.convert("RGB")
        if im.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in im.info:
            rgba = im.convert("RGBA")
            if rgba.getextrema()[3][0] < 255:  # type: ignore[misc]  # a pair for each of the four bands
                self.facts["with transparency: composited over white"] += 1
                white = Image.new("RGBA", rgba.size, "white")
                white.alpha_composite(rgba)
                rgba = white
            im = rgba.convert("RGB") if im.mode not in ("LA", "La") else rgba.convert("L")
        if im.mode in ("L", "1") and self.channels == 3:
            self.facts["in grey: repeated over three channels"] += 1
        return [im.convert("RGB" if self.channels == 3 else "L")]

    def _bands(self, im: Image.Image, frames: int) -> list[Image.Image]:
        if len(im.getbands()) == self.channels and im.mode != "P":
            return list(_upright(im).split())
        pages = []
        for page in range(frames if frames == self.channels and im.format == "TIFF" else 0):
            im.seek(page)
            pages.append(self._eight_bit(im.copy()))
        if pages and all(len(p.getbands()) == 1 and p.size == pages[0].size for p in pages):
            return [p.convert("L") for p in pages]
        raise Unreadable(
            f"found {len(im.getbands())} channel(s) ({im.mode}) in {frames} page(s), expected {self.channels} bands or "
            f"a TIFF of {self.channels} grey pages; an array (.npy) can have any number of channels"
        )

    def _eight_bit(self, im: Image.Image) -> Image.Image:
        if not (im.mode.startswith("I") or im.mode == "F"):
            return im
        values = np.asarray(im)
        low, high = float(values.min()), float(values.max())
        if im.mode != "F" and low >= 0 and high <= 65535:
            self.facts[
                "with 16 bits: divided by 257" + (" (all below a tenth of the range)" if high < 6554 else "")
            ] += 1
            values = values / 257
        elif im.mode == "F" and low >= 0 and high <= 1:
            values = values * 255
        elif not (low >= 0 and high <= 255):  # NaN ends here, too
            raise Unreadable(
                f"found 32-bit pixels from {low:g} to {high:g}, expected 0..65535, or floats in 0..1 or 0..255"
            )
        return Image.fromarray(np.rint(values).astype(np.uint8))

    def array(self, values: np.ndarray, name: str) -> Decoded:
        """One image: floating (C, H, W), or uint8 or uint16 (C, h, w), (h, w, C) or (h, w)."""
        if values.dtype.kind != "f" and values.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
            raise InputError(f"reading {name}: found {values.dtype}, expected uint8 (0..255), uint16 or floating point")
        values = np.array(values, dtype=values.dtype.newbyteorder("="))  # its own: a file that is mapped is read here
        origin = _digest(f"{values.dtype}{values.shape}".encode(), values)
        if values.dtype.kind == "f":
            return self._float(values, name, origin)
        if values.dtype == np.uint16:
            self.facts["with 16 bits: divided by 257"] += 1
            values = np.rint(values / 257).astype(np.uint8)
        values = values[..., None] if values.ndim == 2 else values
        if _channel_axis(values.shape, self.channels, name) == 0:
            values = values.transpose(1, 2, 0)
        values = np.ascontiguousarray(values)
        if self.channels in (1, 3):
            planes = self.planes(Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values))
        else:
            planes = [Image.fromarray(np.ascontiguousarray(values[..., c])) for c in range(values.shape[-1])]
        return self.finish(planes, name, origin)

    def _float(self, values: np.ndarray, name: str, origin: str) -> Decoded:
        expected = self.preprocessing.input_size
        if values.shape != expected:
            raise InputError(
                f"reading {name}: found floating point of shape {values.shape}, expected {expected}, (C, H, W): "
                "floating-point images count as already preprocessed; give uint8 to have them resized and normalised"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
            values = np.ascontiguousarray(values.astype(np.float32))
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise InputError(
                f"reading {name}: found {bad} NaN or infinite values in float32, expected none; repair or remove it"
            )
        self.floats.append((float(values.min()), float(values.max())))
        pixels = torch.from_numpy(values)
        return Decoded(name, origin, _digest(str(expected).encode(), values), pixels, pixels)

    def finish(
        self, planes: list[Image.Image], name: str, origin: str, again: Callable[[str], Tensor] | None = None
    ) -> Decoded:
        width, height = planes[0].size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise Unreadable(f"found {width}x{height} pixels, expected sides of at most 1 to {MAX_ASPECT}")
        if height < self.height or width < self.width:
            self.small.append((height, width))
        evaluated_hwc, stored_hwc = self._evaluated(planes), self._stored(planes)
        if (evaluated_hwc == evaluated_hwc[0, 0]).all():
            self.facts["of one flat colour"] += 1
        content = _digest(str(stored_hwc.shape).encode(), stored_hwc)
        if np.array_equal(evaluated_hwc, stored_hwc):  # small pictures that fit as they are: one copy
            evaluated_hwc = stored_hwc
        image = Decoded(name, origin, content, _chw(stored_hwc), _chw(evaluated_hwc), again).kept(self.keep, self.room)
        self.room -= image.bytes
        if not image.holds(self.keep):
            self.room = 0  # later images are not held either, so the held ones are the first
        return image

    def _evaluated(self, planes: list[Image.Image]) -> np.ndarray:
        pre = self.preprocessing
        if pre.resize == NATIVE:
            resized = self._large_enough(planes)
        else:
            target = [pre.resize] if isinstance(pre.resize, int) else list(self.size_hw)
            resized = [F.resize(p, target, InterpolationMode(pre.interpolation)) for p in planes]
        return _stacked([F.center_crop(p, list(self.size_hw)) for p in resized])

    def _large_enough(self, planes: list[Image.Image]) -> list[Image.Image]:
        """`planes` at their own scale; enlarged as little as possible where a side is below the input's."""
        width, height = planes[0].size
        factor = max(self.height / height, self.width / width)
        if factor <= 1:
            return planes
        target = [max(self.height, round(height * factor)), max(self.width, round(width * factor))]
        return [F.resize(p, target, InterpolationMode(self.preprocessing.interpolation)) for p in planes]

    def _stored(self, planes: list[Image.Image]) -> np.ndarray:
        if self.preprocessing.resize == NATIVE:
            return _stacked(self._large_enough(planes))
        width, height = planes[0].size
        shrink = min(1.0, self.cap / min(width, height))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        if shrink < 1:
            planes = [p.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0) for p in planes]
        return _stacked(planes)

    def notes(self) -> Iterator[str]:
        """Sentences a person should see about the images decoded so far."""
        if self.small:
            height, width = min(self.small)
            wanted = f"{self.width}x{self.height}"
            smallest = f"enlarged; the smallest is {width}x{height}"
            yield f"{len(self.small)} image(s) smaller than the teacher's {wanted}: {smallest}"
        yield from (f"{count} image(s) {fact}" for fact, count in self.facts.items())
        if self.floats:
            yield from self._float_range()

    def _float_range(self) -> Iterator[str]:
        low, high = min(a for a, _ in self.floats), max(b for _, b in self.floats)
        pre = self.preprocessing
        lowest = min(-m / s for m, s in zip(pre.mean, pre.std, strict=True))
        highest = max((1 - m) / s for m, s in zip(pre.mean, pre.std, strict=True))
        scale = highest - lowest
        if (low >= 0 and high <= 1 and lowest < -0.5) or low < lowest - scale or high > highest + scale:
            yield (
                f"the floating-point images range from {low:.3g} to {high:.3g}; the teacher's normalisation would give "
                f"{lowest:.3g} to {highest:.3g}. They are used as they are: check that they are normalised (mimicut "
                "normalises uint8 arrays itself)"
            )


def _stacked(planes: list[Image.Image]) -> np.ndarray:
    """(h, w, C). NumPy, not torch: many small parallel operations are slow on busy cores."""
    return np.dstack([np.asarray(p) for p in planes])


def _chw(pixels_hwc: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_hwc).permute(2, 0, 1)


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(f for f in _FORMATS if f in Image.OPEN)


def _upright(im: Image.Image) -> Image.Image:
    im.load()
    try:
        return ImageOps.exif_transpose(im)
    except Exception:  # broken metadata of a sound picture: Pillow raises anything from struct.error to SyntaxError
        return im.copy()


def _digest(head: bytes, values: np.ndarray) -> str:
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _channel_axis(shape: tuple[int, ...], channels: int, name: str) -> int:
    """0 for (C, h, w), 2 for (h, w, C)."""
    known = (1, 3, 4) if channels in (1, 3) else (channels,)
    axes = [a for a in (0, 2) if len(shape) == 3 and shape[a] in known]
    if len(axes) != 1 or 0 in shape:
        raise InputError(
            f"reading {name}: found an image of shape {shape}, expected (C, h, w) or (h, w, C) with C in {known}"
            + ("; both fit: give floating-point arrays, or a list of PIL images" if len(axes) == 2 else "")
        )
    return axes[0]
