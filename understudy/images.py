"""Images without labels: what people have, read into what the teacher expects.

The contract, in one place:

* **Files, PIL images and uint8 arrays** (0..255) are resized, cropped, scaled to 0..1 and normalised *here*, as the
  teacher's `Preprocessing` says; uint16 arrays too, after division by 257. Arrays may be NCHW or NHWC if only one fits.
* **Floating-point arrays** are taken as *already preprocessed by the caller*: shape (N, C, H, W), exactly the teacher's
  input size. Nothing is resized and nothing normalised, so nothing is ever normalised twice.
* Nothing here reads a label, reaches the network or unpickles anything.

Not covered: HEIC, RAW, video; colour profiles (ICC) are ignored; near-duplicates (bursts) are not noticed.
"""

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from understudy.augment import VIEWS
from understudy.errors import InputError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MEMORY_BYTES = (
    2 << 30
)  # Decoded pixels held; what does not fit is decoded again at every use. Assumption: 2 GiB is there.
MAX_ASPECT = 100  # Beyond it, resizing the shorter side would make a picture of gigabytes.
FEW = 10  # Below this many images the set says how little they can prove.
# No format that runs another program (EPS) or that people do not keep photographs in.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif",
    ".heic", ".heif",
}  # fmt: skip
_READABLE = "JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000 and AVIF are read"


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher wants its images; built from the weights' own configuration by `teachers`.

    Files and uint8 arrays are resized by Pillow with antialiasing (as torchvision's and timm's evaluation do), cropped
    to the centre, scaled to 0..1, and normalised to (x - mean) / std. Floating-point arrays are the caller's work and
    are left alone (see the head of this file).
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


@dataclass(frozen=True)
class _Image:
    """pixels: uint8 or float32 (C, h, w); evaluated: the same at (C, H, W), before normalisation; both None when the
    set is too large for memory, then `again` decodes them. origin: sha256 of file or array; content: of the pixels."""

    name: str
    origin: str
    content: str
    pixels: Tensor | None
    evaluated: Tensor | None
    again: Callable[[], "_Image"] | None = None

    def held(self) -> "_Image":
        if self.pixels is not None:
            return self
        image = self.again()
        if image.content != self.content:
            raise InputError(
                f"reading {self.name} again: its pixels changed since the first reading; start the run anew"
            )
        return image


class ImageSet:
    """A finite, ordered set of images without labels. Built by `read_images`.

    names: a file's path below its folder, or "image 7". hashes: sha256 (hex) of the file's or array's bytes.
    skipped: (name, reason) of what could not be read. duplicates: (name, name of the first with equal pixels).
    notes: sentences a person should see. floats: whether the images came already preprocessed.
    """

    def __init__(
        self,
        images: Sequence[_Image],
        preprocessing: Preprocessing,
        *,
        skipped: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
        floats: bool = False,
    ):
        self._images = list(images)
        self.preprocessing = preprocessing
        self.floats = floats
        self.skipped = list(skipped)
        self.notes = list(notes)
        self.names = [i.name for i in self._images]
        self.hashes = [i.origin for i in self._images]
        self.contents = [i.content for i in self._images]
        first: dict[str, str] = {}
        seen = [
            (name, first.setdefault(content, name)) for name, content in zip(self.names, self.contents, strict=True)
        ]
        self.duplicates = [(name, other) for name, other in seen if name != other]

    def __len__(self) -> int:
        return len(self._images)

    def subset(self, indices: Iterable[int]) -> "ImageSet":
        """The images at `indices`, in that order; what was skipped or noted stays with the whole set."""
        return ImageSet([self._images[i] for i in indices], self.preprocessing, floats=self.floats)

    def shared_with(self, other: "ImageSet") -> list[tuple[str, str]]:
        """(name here, name there) of images with equal pixels in both sets, for held-out images of another source."""
        there = dict(zip(reversed(other.contents), reversed(other.names), strict=True))
        return [(n, there[c]) for n, c in zip(self.names, self.contents, strict=True) if c in there]

    def batch(self, indices: Iterable[int] | None = None) -> Tensor:
        """The evaluation view, ready for the teacher: float32 (n, C, H, W). All images when `indices` is None."""
        chosen = range(len(self)) if indices is None else [int(i) for i in indices]
        return self._ready([self._images[i].held().evaluated for i in chosen])

    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> Tensor:
        """Random variants, ready for the teacher: float32 (n, C, H, W). The same generator state gives the same bits.

        views: a key of `augment.VIEWS`. generator: on the CPU; the caller's global random state is not used.
        Raises InputError for unknown views.
        """
        if views not in VIEWS:
            raise InputError(f"making views: found {views!r}, expected one of {', '.join(VIEWS)}")
        view, pre = VIEWS[views], self.preprocessing
        made = []
        for i in indices:
            image = self._images[int(i)].held()
            base = image.pixels if view.base == "stored" else image.evaluated
            made.append(view.apply(base, pre.input_size[1:], pre.interpolation, generator))
        return self._ready(made)

    def _ready(self, made: list[Tensor]) -> Tensor:
        if not made:
            return torch.empty(0, *self.preprocessing.input_size)
        stacked = torch.stack(made)
        return stacked if self.floats else self.preprocessing.normalise(stacked)


@dataclass(frozen=True)
class Split:
    """Indices into one ImageSet. fit: train the student. choose: pick among students or steps. held_out: influence
    nothing, they only certify, so each picture stands there once. Duplicates of a choosing or held-out image are in
    no part."""

    fit: list[int]
    choose: list[int]
    held_out: list[int]

    @property
    def notes(self) -> list[str]:
        n = len(self.held_out)
        if not 0 < n < FEW:
            return []
        # Source: Clopper and Pearson (1934); the exact 95 % interval of n successes in n begins at 0.025 ** (1 / n).
        return [
            f"{n} held-out image(s): even full agreement with the teacher proves no more than {0.025 ** (1 / n):.0%}"
        ]


def split(images: ImageSet, *, seed: int, held_out_share: float = 0.2, choose_share: float = 0.1) -> Split:
    """Fit, choose and held-out images; the same images and seed give the same split, whatever the random state.

    Shares are of the distinct images; a share above 0 gets one image at least, a share of 0 none: 50 images give
    35 / 5 / 10. With held-out images of another source, pass held_out_share=0 and look at `ImageSet.shared_with`.

    Raises InputError for shares outside 0..1 or that leave nothing to fit, and for fewer distinct images than parts.
    """
    shares = {"held_out_share": held_out_share, "choose_share": choose_share}
    if not all(0 <= s < 1 for s in shares.values()) or sum(shares.values()) >= 1:
        raise InputError(
            f"splitting the images: found {shares}; expected shares from 0 to below 1 that leave some to fit"
        )
    groups: dict[str, list[int]] = {}
    for index, content in enumerate(images.contents):
        groups.setdefault(content, []).append(index)
    parts = 1 + sum(s > 0 for s in shares.values())
    if len(groups) < parts:
        raise InputError(
            f"splitting the images: found {len(groups)} distinct of {len(images)}, expected {parts} at least (to fit"
            f"{', to choose' if choose_share else ''}{', to hold out' if held_out_share else ''}); "
            "add images, or give the held-out ones separately"
        )
    held_out, choose = (max(1, round(len(groups) * s)) if s else 0 for s in shares.values())
    while len(groups) - held_out - choose < 1:  # rounding up small shares must leave one to fit
        held_out, choose = (held_out - 1, choose) if held_out >= choose else (held_out, choose - 1)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [list(groups.values())[i] for i in order]
    return Split(
        fit=sorted(i for group in shuffled[held_out + choose :] for i in group),
        choose=sorted(group[0] for group in shuffled[held_out : held_out + choose]),
        held_out=sorted(group[0] for group in shuffled[:held_out]),
    )


def read_images(source: Any, preprocessing: Preprocessing, *, memory_bytes: int = MEMORY_BYTES) -> ImageSet:
    """All images of `source`, in a fixed order, without labels.

    source: a folder (any nesting, sorted by path, hidden files ignored) or a file (image, .npy, .npz, .safetensors); a
    tensor or array (N, C, H, W), uint8 also (N, H, W, C) or a grey stack (N, H, W); a sequence or map-style Dataset of
    paths, PIL images or arrays, or of tuples and lists that begin with one, or dicts that have one as "image",
    "pixel_values" or "img".

    From files: EXIF rotation is applied; alpha is composited over white; palette and CMYK become RGB; 16 bits become 8
    by division by 257; of several frames the first counts. A teacher with N channels (not 1 or 3) gets files of N
    bands, or TIFFs of N grey pages. At most about twice the evaluation's resolution is kept; the evaluation view is
    made from all pixels, except that a JPEG of more than twice the kept size is decoded at 1/2 to 1/8 (noted; on a
    12-megapixel photograph the evaluation view then differs by 0.2 of 255 levels on average, measured).

    Files and Dataset items that cannot be read are skipped and named in `.skipped`.
    Raises InputError when nothing can be read, and for arrays that break the contract at the head of this file.
    """
    reader = _Reader(preprocessing, memory_bytes)
    if isinstance(source, (str, Path)):
        return _from_path(Path(source), reader)
    if isinstance(source, (Tensor, np.ndarray)):
        return _from_array(source, reader, f"the given {type(source).__name__}")
    if isinstance(source, Image.Image):
        source = [source]
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")) or isinstance(source, (Mapping, bytes)):
        raise InputError(
            f"reading images: found a {type(source).__name__}, expected a path, a tensor, an array, a list or a "
            "Dataset with __len__ and __getitem__ (of a loader give its dataset, of a stream a list of 50)"
        )
    return _from_items(source, reader)


class _Unreadable(ValueError):
    """Why one file or item cannot be used; becomes the reason in `ImageSet.skipped`."""


class _Reader:
    """Turns one decoded image after the other into an `_Image`, and remembers what a person should be told."""

    def __init__(self, preprocessing: Preprocessing, memory_bytes: int):
        self.preprocessing = preprocessing
        self.channels, self.height, self.width = preprocessing.input_size
        # Twice the evaluation's resolution leaves random crops real detail, and bounds the memory of large photographs.
        self.cap = 2 * (preprocessing.resize or max(self.height, self.width))
        self.room = memory_bytes
        self.facts: Counter[str] = Counter()
        self.small: list[tuple[int, int]] = []
        self.floats: list[tuple[float, float]] = []

    def file(self, path: Path, name: str) -> _Image:
        """Raises PIL.UnidentifiedImageError when this is no image at all; anything else when it is a broken one."""
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata and sizes below its own limit.
            with Image.open(stream, formats=_formats()) as im:
                reduce = min(im.size) // self.cap
                if reduce >= 2 and im.format in ("JPEG", "MPO"):
                    im.draft(None, (im.width // reduce, im.height // reduce))
                    self.facts["decoded at reduced size (large JPEG)"] += 1
                planes = self.planes(im)
            stream.seek(0)
            origin = hashlib.file_digest(stream, "sha256").hexdigest()
        return self.finish(planes, name, origin, again=lambda: _Reader(self.preprocessing, 1 << 62).file(path, name))

    def planes(self, im: Image.Image) -> list[Image.Image]:
        """[RGB image], [grey image] or one grey image a channel, as the teacher's channel count asks."""
        frames = getattr(im, "n_frames", 1)
        if self.channels not in (1, 3):
            return self._bands(im, frames)
        if frames > 1 and im.format != "MPO":  # MPO: a photograph with its own previews
            self.facts["with several frames or pages: the first is used"] += 1
        im = self._eight_bit(_upright(im))
        if im.mode == "LAB":  # Pillow turns it into RGB only
            im = im.convert("RGB")
        if im.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in im.info:
            rgba = im.convert("RGBA")
            if rgba.getextrema()[3][0] < 255:
                self.facts["with transparency: composited over white"] += 1
                rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            im = rgba.convert("RGB") if im.mode not in ("LA", "La") else rgba.convert("L")
        if im.mode in ("L", "1") and self.channels == 3:
            self.facts["grey: repeated over three channels"] += 1
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
        raise _Unreadable(
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
                "with 16 bits: divided by 257" + (" (none uses a tenth of the range)" if high < 6554 else "")
            ] += 1
            values = values / 257
        elif im.mode == "F" and low >= 0 and high <= 1:
            values = values * 255
        elif not (low >= 0 and high <= 255):  # NaN ends here, too
            raise _Unreadable(
                f"found 32-bit pixels from {low:g} to {high:g}, expected 0..65535, or 0..1 or 0..255 in floats"
            )
        return Image.fromarray(np.rint(values).astype(np.uint8))

    def array(self, values: np.ndarray, name: str) -> _Image:
        """One image: floating (C, H, W), or uint8 or uint16 (C, h, w), (h, w, C) or (h, w)."""
        origin = _digest(f"{values.dtype}{values.shape}".encode(), values)
        if values.dtype.kind == "f":
            return self._float(values, name, origin)
        if values.dtype not in (np.uint8, np.uint16):
            raise InputError(f"reading {name}: found {values.dtype}, expected uint8 (0..255), uint16 or floating point")
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

    def _float(self, values: np.ndarray, name: str, origin: str) -> _Image:
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
                f"reading {name}: found {bad} NaN or infinite values in float32, expected none; mend or remove it"
            )
        self.floats.append((float(values.min()), float(values.max())))
        pixels = torch.from_numpy(values)
        return _Image(name, origin, _digest(str(expected).encode(), values), pixels, pixels)

    def finish(
        self, planes: list[Image.Image], name: str, origin: str, again: Callable[[], _Image] | None = None
    ) -> _Image:
        pre, (width, height) = self.preprocessing, planes[0].size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise _Unreadable(f"found {width}x{height} pixels, expected sides of at most 1 to {MAX_ASPECT}")
        if height < self.height or width < self.width:
            self.small.append((height, width))
        mode = InterpolationMode(pre.interpolation)
        target = [pre.resize] if pre.resize else [self.height, self.width]
        views = [F.center_crop(F.resize(p, target, mode), [self.height, self.width]) for p in planes]
        shrink = min(1.0, self.cap / min(width, height))
        kept = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        if shrink < 1:
            planes = [p.resize(kept, Image.Resampling.BICUBIC, reducing_gap=3.0) for p in planes]
        # NumPy, not torch: many small parallel operations crawl while other work holds the cores.
        evaluated_hwc, pixels_hwc = (np.dstack([np.asarray(p) for p in group]) for group in (views, planes))
        if (evaluated_hwc == evaluated_hwc[0, 0]).all():
            self.facts["of one flat colour"] += 1
        content = _digest(str(pixels_hwc.shape).encode(), pixels_hwc)
        evaluated, pixels = (torch.from_numpy(a).permute(2, 0, 1) for a in (evaluated_hwc, pixels_hwc))
        self.room -= pixels.nbytes + evaluated.nbytes
        if self.room < 0 and again:
            self.facts["decoded again at every use: too many to hold in memory"] += 1
            return _Image(name, origin, content, None, None, again)
        return _Image(name, origin, content, pixels, evaluated)

    def image_set(self, images: list[_Image], skipped: Sequence[tuple[str, str]], notes: Sequence[str]) -> ImageSet:
        if self.floats and len(self.floats) < len(images):
            raise InputError(
                f"reading images: found {len(self.floats)} of {len(images)} in floating point (already preprocessed), "
                "expected all of one kind"
            )
        images_set = ImageSet(images, self.preprocessing, skipped=skipped, floats=bool(self.floats))
        images_set.notes = [*self._notes(images_set), *notes]
        return images_set

    def _notes(self, images: ImageSet) -> Iterator[str]:
        n = len(images)
        if n < FEW:
            yield f"{n} image(s) only: enough to run, too few to prove much about the result"
        if images.skipped:
            yield f"{len(images.skipped)} skipped: they could not be read"
        if images.duplicates:
            yield f"{len(images.duplicates)} with the same pixels as another ({' = '.join(images.duplicates[0])}, ...)"
        if self.small:
            height, width = min(self.small)
            wanted = f"{self.width}x{self.height}"
            yield f"{len(self.small)} smaller than the teacher's {wanted}: enlarged; the smallest is {width}x{height}"
        yield from (f"{count} {fact}" for fact, count in self.facts.items())
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
                f"{lowest:.3g} to {highest:.3g}. Used as they are: were they normalised? (uint8 would be, here)"
            )


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
            + ("; both readings fit: give floating point, or one image by one as PIL images" if len(axes) == 2 else "")
        )
    return axes[0]


def _as_numpy(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _from_array(values: Tensor | np.ndarray, reader: _Reader, what: str) -> ImageSet:
    values = _as_numpy(values)
    shape, known = values.shape, {1, 3, 4, reader.channels}
    if values.ndim == 3 and not ({shape[0], shape[2]} & known) and reader.channels in (1, 3):
        values = values[:, None] if values.dtype.kind == "f" else values[..., None]
    if values.ndim != 4 or not len(values):
        raise InputError(
            f"reading {what}: found shape {shape}, expected (N, C, H, W), N at least 1, or uint8 (N, H, W, C); "
            "one image needs array[None], a stack of grey images array[:, None]"
        )
    images = [reader.array(value, f"image {i} (from 0) of {what}") for i, value in enumerate(values)]
    return reader.image_set([replace(image, name=f"image {i}") for i, image in enumerate(images)], [], [])


def _from_items(source: Any, reader: _Reader) -> ImageSet:
    images, skipped = [], []
    for i in range(len(source)):
        name = f"image {i}"
        try:
            images.append(_item(source[i], reader, name))
        except InputError:
            raise
        except Exception as error:
            skipped.append((name, _reason(error)))
    if not images:
        raise InputError(_none(f"a {type(source).__name__}", len(source), "item(s)", skipped))
    return reader.image_set(images, skipped, [])


def _item(item: Any, reader: _Reader, name: str) -> _Image:
    if isinstance(item, (tuple, list)) and item:
        return _item(item[0], reader, name)
    if isinstance(item, Mapping):
        key = next((k for k in ("image", "pixel_values", "img") if k in item), None)
        if key is None:
            raise InputError(
                f"reading {name}: found a dict of {sorted(map(str, item))}, expected 'image' or 'pixel_values'"
            )
        return _item(item[key], reader, name)
    if isinstance(item, (str, Path)):
        return replace(reader.file(Path(item), str(item)), name=_printable(item))
    if isinstance(item, Image.Image):
        origin = hashlib.sha256(f"{item.mode}{item.size}".encode() + item.tobytes()).hexdigest()
        return reader.finish(reader.planes(item), name, origin)
    if isinstance(item, (Tensor, np.ndarray)):
        return reader.array(_as_numpy(item), name)
    raise InputError(
        f"reading {name}: found a {type(item).__name__}, expected a PIL image, a tensor, an array or a path"
    )


def _from_path(path: Path, reader: _Reader) -> ImageSet:
    if path.is_dir():
        return _from_folder(path, reader)
    if not path.is_file():
        raise InputError(f"reading images: {_printable(path)!r} is no file or folder; check the path")
    if path.suffix.lower() in (".npy", ".npz", ".safetensors"):
        return _from_array(_array_file(path), reader, path.name)
    if path.suffix.lower() in (".pt", ".pth", ".pkl", ".pickle"):
        raise InputError(f"reading {path}: files of this kind may run code when read; save as .npy or .safetensors")
    return _from_files([(path, _printable(path.name))], reader, f"the file {_printable(path)}")


def _array_file(path: Path) -> Tensor | np.ndarray:
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            arrays: Mapping[str, Any] = load_file(path)
        else:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                arrays = {k: loaded[k] for k in (["images"] if "images" in loaded.files else loaded.files)}
    except Exception as error:  # a damaged file raises many kinds
        raise InputError(
            f"reading {path}: found {'no array, or pickled objects' if 'pickle' in str(error) else _reason(error)}, "
            "expected arrays of numbers, saved without pickle"
        ) from error
    named = [arrays["images"]] if "images" in arrays else [a for a in arrays.values() if a.ndim in (3, 4)]
    if len(named) != 1:
        found = ", ".join(f"{k} {tuple(a.shape)}" for k, a in arrays.items()) or "nothing"
        raise InputError(f"reading {path}: found {found}; expected one array of images, or one named 'images'")
    return named[0]


def _from_folder(folder: Path, reader: _Reader) -> ImageSet:
    found: list[tuple[str, Path]] = []
    unreadable: list[tuple[str, str]] = []
    seen: set[str] = set()

    def failed(error: OSError) -> None:
        unreadable.append((_printable(os.path.relpath(error.filename, folder)), _reason(error)))

    for here, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        real = os.path.realpath(here)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = Path(here, name)
                found.append((_printable(path.relative_to(folder).as_posix()), path))
    return _from_files(
        [(path, name) for name, path in sorted(found)], reader, f"the folder {_printable(folder)}", unreadable
    )


def _from_files(
    files: list[tuple[Path, str]], reader: _Reader, what: str, skipped: Sequence[tuple[str, str]] = ()
) -> ImageSet:
    images, skipped, ignored = [], list(skipped), []
    for path, name in files:
        try:
            if not path.is_file():
                raise _Unreadable("no regular file, or a link to nothing")
            images.append(reader.file(path, name))
        except Image.UnidentifiedImageError:
            suffix = path.suffix.lower()
            (skipped if suffix in _SUFFIXES else ignored).append((name, _why_no_image(path)))
        except Exception as error:  # a damaged picture makes Pillow raise nearly anything
            skipped.append((name, _reason(error)))
    if not images:
        raise InputError(_none(what, len(files), "file(s)", skipped or ignored))
    first = ", ".join(name for name, _ in ignored[:3])
    notes = [f"{len(ignored)} other file(s) in the folder ignored: {first}"] if ignored else []
    return reader.image_set(images, skipped, notes)


def _why_no_image(path: Path) -> str:
    if path.stat().st_size == 0:
        return "empty: 0 bytes"
    if path.suffix.lower() in (".heic", ".heif"):
        return "HEIC is not read; convert it to JPEG"
    with path.open("rb") as stream:
        if stream.read(4) in (b"II*\0", b"MM\0*"):
            return "a TIFF of a kind that Pillow does not read; save an 8-bit TIFF or an array (.npy)"
    return "not an image inside, whatever the name says"


def _none(what: str, looked_at: int, kind: str, skipped: Sequence[tuple[str, str]]) -> str:
    first: dict[str, str] = {}
    for name, reason in skipped:
        first.setdefault(reason, name)
    reasons = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
    return (
        f"reading images from {what}: looked at {looked_at} {kind}, found no image that can be used"
        + (f" ({reasons}{'; ...' if len(first) > 3 else ''})" if reasons else "")
        + f"; {_READABLE}, in any nesting of folders: give images of what the teacher sees, 3 at least"
    )


def _reason(error: BaseException) -> str:
    return f"{error}" if isinstance(error, _Unreadable) else f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _printable(path: str | Path) -> str:
    """Names of bytes that are no UTF-8 would make printing fail."""
    return os.fsencode(path).decode("utf-8", "replace")
