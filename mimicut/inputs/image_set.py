"""Images without labels, read into the form that the teacher expects.

The contract, in one place:

* **Files, PIL images and uint8 arrays** (0..255) are resized, cropped, scaled to 0..1 and normalised *here*, as the
  teacher's `Preprocessing` says; uint16 arrays too, after division by 257. Arrays may be NCHW or NHWC if only one fits.
* **Floating-point arrays** are taken as *already preprocessed by the caller*: shape (N, C, H, W), exactly the teacher's
  input size. Nothing is resized and nothing normalised, so nothing is ever normalised twice.
* Nothing here reads a label, reaches the network or unpickles anything.

`image_sources` finds the pictures, `decode` turns each into pixels; here they become one set, its batches and its
split.

Not covered: HEIC, RAW, video; colour profiles (ICC) are ignored; near-duplicates (bursts) are not noticed.
"""

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.base.paths import usable_path
from mimicut.inputs.augment import VIEWS
from mimicut.inputs.decode import Decoded, Reader
from mimicut.inputs.file_names import NAMED, listed, quoted
from mimicut.inputs.image_sources import Items, from_array, from_items, from_path
from mimicut.inputs.input_source import InputSource
from mimicut.inputs.preprocessing import Preprocessing, model_inputs

FEW = 10  # With fewer images a note says how little they can prove.


class ImageSet:
    """A finite, ordered set of images without labels. Built by `read_images`.

    Attributes:
        names: A file's path below its folder, or "image 7".
        hashes: SHA-256 (hex) of the file's or array's bytes.
        skipped: (name, reason) of images that could not be read.
        duplicates: (name, name of the first image with equal pixels).
        notes: Sentences that a person should see.
        floats: Whether the images were given already preprocessed.
    """

    def __init__(
        self,
        images: Sequence[Decoded],
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
        self.hashes: list[Any] = [i.origin for i in self._images]
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

    def distinct(self) -> "ImageSet":
        """The set without repeats: the first of all images with equal pixels."""
        copies = {name for name, _ in self.duplicates}
        return self if not copies else self.subset([i for i, n in enumerate(self.names) if n not in copies])

    def keeping(self, views: str | None, memory_bytes: int) -> "ImageSet":
        """The same images, of which as many as fit into `memory_bytes` are held in memory, from the first on.

        Held are the pixels that these views need (None: the evaluation view alone). The other images are decoded again
        at every use.

        Raises:
            InputError: The views are unknown, or a file cannot be read again.
        """
        keep, room, images = base_of(views), memory_bytes, []
        for image in self._images:
            images.append(image.kept(keep, room))
            room = room - images[-1].bytes if images[-1].holds(keep) else 0
        return ImageSet(images, self.preprocessing, floats=self.floats)

    def decoded_again(self, keep: str = "evaluated") -> int:
        """How many images are decoded again at every use. keep: the pixels in question, as in `read_images`."""
        return sum(not image.holds(keep) for image in self._images)

    def shared_with(self, other: "ImageSet") -> list[tuple[str, str]]:
        """(name here, name there) of images with equal pixels in both sets, for held-out images of another source."""
        there = dict(zip(reversed(other.contents), reversed(other.names), strict=True))
        return [(n, there[c]) for n, c in zip(self.names, self.contents, strict=True) if c in there]

    def batch(self, indices: Iterable[int] | None = None) -> Tensor:
        """The evaluation view, ready for the teacher: float32 (n, C, H, W). All images when `indices` is None."""
        chosen = range(len(self)) if indices is None else [int(i) for i in indices]
        return self._ready([self._images[i].base("evaluated") for i in chosen])

    def stored(self, index: int) -> Tensor:
        """The stored pixels of one image, before normalisation: uint8 or float32 (C, h, w)."""
        return self.pixels(index, "stored")

    def pixels(self, index: int, base: str) -> Tensor:
        """The "stored" or "evaluated" pixels of one image, before normalisation: uint8 or float32 (C, h, w)."""
        return self._images[index].base(base)

    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> Tensor:
        """Random variants, ready for the teacher: float32 (n, C, H, W). The same generator state gives the same bits.

        Args:
            indices: The images.
            views: A key of `augment.VIEWS`.
            generator: On the CPU; the caller's global random state is not used.

        Raises:
            InputError: The views are unknown.
        """
        base, view, pre = base_of(views), VIEWS[views], self.preprocessing
        made = [
            view.apply(self._images[int(i)].base(base), pre.input_size[1:], pre.interpolation, generator)
            for i in indices
        ]
        return self._ready(made)

    def _ready(self, made: list[Tensor]) -> Tensor:
        if not made:
            return torch.empty(0, *self.preprocessing.input_size)
        stacked = torch.stack(made)
        return stacked if self.floats else self.preprocessing.normalise(stacked)


def base_of(views: str | None) -> str:
    """The pixels from which these views are made, "stored" or "evaluated"; None stands for the evaluation view.

    Raises:
        InputError: The views are unknown.

    >>> base_of("imagenet")
    'stored'
    """
    if views is not None and views not in VIEWS:
        raise InputError(f"making views: found {views!r}, expected one of {', '.join(VIEWS)}")
    return "evaluated" if views is None else VIEWS[views].base


def thumbnail(images: "ImageSet | InputSource", index: int, side: int = 96) -> str | None:
    """The evaluation view of one image as a data URI, at most `side` pixels; None unless it has 1 or 3 channels."""
    pre = images.preprocessing
    if pre is None or pre.input_size[0] not in (1, 3):
        return None
    (image,) = images.batch([index])
    mean, std = (torch.tensor(v)[:, None, None] for v in (pre.mean, pre.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, 2).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pre.input_size[0] == 1 else pixels)
    picture.thumbnail((side, side))
    return _data_uri(picture)


def grey_picture(rows: Sequence[Sequence[float]]) -> str:
    """Rows of values from 0 (black) to 1 (white) as a data URI, a pixel for each."""
    return _data_uri(Image.fromarray((np.asarray(rows) * 255).round().astype(np.uint8)))


def _data_uri(picture: Image.Image) -> str:
    held = BytesIO()
    picture.save(held, "PNG")
    return f"data:image/png;base64,{b64encode(held.getvalue()).decode()}"


class Viewable(Protocol):
    """What gives batches of images: an ImageSet, or the same images on an accelerator (`device_images`)."""

    @property
    def hashes(self) -> list[Any]: ...
    def __len__(self) -> int: ...
    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> Tensor: ...
    def batch(self, indices: Iterable[int] | None = None) -> Tensor: ...


@dataclass(frozen=True)
class ImagesWithCall:
    """Images for a network that takes more than images: batches are (args, kwargs), see `model_inputs`."""

    images: Viewable
    call: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hashes(self) -> list[str]:
        return self.images.hashes

    def view(self, indices: Iterable[int], views: str, generator: torch.Generator) -> tuple[tuple, dict]:
        return model_inputs(self.images.view(indices, views, generator), self.call)

    def batch(self, indices: Iterable[int]) -> tuple[tuple, dict]:
        return model_inputs(self.images.batch(indices), self.call)


def bind_call(images: Any, call: Mapping[str, Any] | None) -> Any:
    """The images in the form that a network with this call takes; unchanged if `call` is None, and an `InputSource`."""
    return images if call is None or isinstance(images, InputSource) else ImagesWithCall(images, call)


@dataclass(frozen=True)
class Split:
    """Indices into one ImageSet. Duplicates of a choosing or held-out image are in no part.

    Attributes:
        fit: Images that train the student.
        choose: Images by which students or steps are chosen.
        held_out: Images that influence nothing and only certify; each picture is among them once.
    """

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
            f"only {n} held-out image(s): even if the student agrees on all of them, they prove an agreement of "
            f"no more than {0.025 ** (1 / n):.0%}"
        ]


def split(images: ImageSet, *, seed: int, held_out_share: float = 0.2, choose_share: float = 0.1) -> Split:
    """Split the images into those to fit, to choose by and to hold out.

    The same images and seed give the same split, whatever the random state. Shares are of the distinct images; a share
    above 0 gets at least one image, a share of 0 none: 50 images give 35 / 5 / 10. With held-out images from another
    source, pass held_out_share=0 and check `ImageSet.shared_with`.

    Raises:
        InputError: Shares are outside 0..1 or leave nothing to fit, or there are fewer distinct images than parts.
    """
    shares = {"held_out_share": held_out_share, "choose_share": choose_share}
    if not all(0 <= s < 1 for s in shares.values()) or sum(shares.values()) >= 1:
        raise InputError(
            f"splitting the images: found {shares}; expected shares of at least 0 that add up to less than 1"
        )
    groups: dict[str, list[int]] = {}
    for index, content in enumerate(images.contents):
        groups.setdefault(content, []).append(index)
    parts = 1 + sum(s > 0 for s in shares.values())
    if len(groups) < parts:
        raise InputError(
            f"splitting the images: found {len(groups)} distinct of {len(images)}, expected at least {parts} (to fit"
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


ImageSource = str | Path | Tensor | np.ndarray | Image.Image | Items | InputSource


def read_images(
    source: ImageSource, preprocessing: Preprocessing, *, memory_bytes: int | None = None, keep: str = "stored"
) -> ImageSet:
    """Read all images of `source`, in a fixed order, without labels.

    source: a folder (any nesting, sorted by path, hidden files ignored) or a file (image, .npy, .npz, .safetensors); a
    tensor or array (N, C, H, W), uint8 also (N, H, W, C) or a grey stack (N, H, W); a sequence or map-style Dataset of
    paths, PIL images or arrays, or of tuples and lists that begin with one, or dicts that have one as "image",
    "pixel_values" or "img".

    From files: EXIF rotation is applied; alpha is composited over white; palette and CMYK become RGB; 16 bits become 8
    by division by 257; of several frames the first counts. A teacher with N channels (not 1 or 3) gets files of N
    bands, or TIFFs of N grey pages. At most about twice the evaluation's resolution is kept; the evaluation view is
    made from all pixels, except that a JPEG of more than twice the kept size is decoded at 1/2 to 1/8 (noted; on a
    12-megapixel photograph the evaluation view then differs by 0.2 of 255 levels on average, measured).

    memory_bytes: bytes of decoded pixels to hold; files beyond them are decoded again at every use. None: a quarter of
    `memory.bound()`. keep: "evaluated" holds the evaluation view alone, for images that only measure; views can then
    be made only from files.

    Files and Dataset items that cannot be read are skipped and named in `.skipped`.

    Raises:
        InputError: Nothing can be read, or an array breaks the contract at the head of this file.
    """
    if keep not in ("stored", "evaluated"):
        raise InputError(f"reading images: found keep {keep!r}, expected 'stored' or 'evaluated'")
    if memory_bytes is None:
        memory_bytes = int(memory.TRAINING_IMAGES * memory.bound())
    reader = Reader(preprocessing, memory_bytes, keep)
    if isinstance(source, (str, Path)):
        return _image_set(reader, *from_path(usable_path(source, "reading images"), reader))
    if isinstance(source, (Tensor, np.ndarray)):
        return _image_set(reader, *from_array(source, reader, f"the given {type(source).__name__}"))
    if isinstance(source, InputSource):
        raise InputError("reading images: found an InputSource, whose samples are read already; give it as it is")
    if isinstance(source, Image.Image):
        source = [source]
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")) or isinstance(source, (Mapping, bytes)):
        raise InputError(
            f"reading images: found a {type(source).__name__}, expected a path, a tensor, an array, a list or a "
            "Dataset with __len__ and __getitem__ (for a loader, give its dataset; for a stream, a list of its images)"
        )
    return _image_set(reader, *from_items(source, reader))


def _image_set(
    reader: Reader, images: list[Decoded], skipped: Sequence[tuple[str, str]], notes: Sequence[str]
) -> ImageSet:
    if reader.floats and len(reader.floats) < len(images):
        raise InputError(
            f"reading images: found {len(reader.floats)} of {len(images)} in floating point (already preprocessed), "
            "expected all of one kind"
        )
    images_set = ImageSet(images, reader.preprocessing, skipped=skipped, floats=bool(reader.floats))
    images_set.notes = [*_notes(images_set), *reader.notes(), *notes, *again_notes(images_set, reader.keep)]
    return images_set


def again_notes(images: ImageSet, keep: str) -> list[str]:
    """Write a note on images that are not held in memory. keep: as in `read_images`."""
    again = images.decoded_again(keep)
    return [f"{again} image(s) decoded again at every use: too many to hold in memory"] if again else []


def _notes(images: ImageSet) -> Iterator[str]:
    n = len(images)
    if n < FEW:
        yield f"only {n} image(s): enough to run, too few to prove much about the result"
    if images.skipped:
        # A reason may name the file, too.
        named = "; ".join(quoted(f"{name}: {reason}") for name, reason in images.skipped[:NAMED])
        more = f"; and {len(images.skipped) - NAMED} more" if len(images.skipped) > NAMED else ""
        yield f"{len(images.skipped)} image(s) skipped, because they could not be read: {named}{more}"
    if images.duplicates:
        yield f"{len(images.duplicates)} image(s) equal in pixels to another ({listed(images.duplicates, ' = ')})"
