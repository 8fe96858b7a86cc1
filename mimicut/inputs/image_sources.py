"""Read every picture of a source: folders, files, arrays, lists and Datasets, in a fixed order.

Each `from_*` passes the pictures to a `Reader` and returns the decoded ones, the skipped ones with the reason, and
notes. No label is read, nothing is downloaded or unpickled.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.inputs.decode import Decoded, Reader, Unreadable
from mimicut.inputs.file_names import listed

_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif",
    ".heic", ".heif",
}  # fmt: skip
_READABLE = "JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000 and AVIF are read"

Found = tuple[list[Decoded], list[tuple[str, str]], list[str]]
"""Images, (name, reason) of what was skipped, notes."""


def floating_size(source: Any) -> tuple[int, int, int] | None:
    """(C, H, W) of the images of a source, where they are floating-point: already in their network's own size.

    Args:
        source: As `image_set.read_images` takes it. Of a sequence or Dataset the first item is read, of a file of
            arrays the shape.

    Returns:
        None where they are anything else, or of a shape that is not theirs for sure.
    """
    try:
        if isinstance(source, (str, Path)):
            path = Path(source)
            source = _array_file(path) if path.suffix.lower() in (".npy", ".npz", ".safetensors") else None
        one = source
        if isinstance(source, (Tensor, np.ndarray)):
            one = source[0] if source.ndim == 4 else source[:1] if source.ndim == 3 else None
        elif source is not None and len(source):
            one = source[0]
        while isinstance(one, (tuple, list, Mapping)):
            one = one[_image_key(one)]
        one = _as_numpy(one) if isinstance(one, (Tensor, np.ndarray)) else None
    except Exception:  # reading the images says what is wrong with them
        return None
    return tuple(one.shape) if one is not None and one.ndim == 3 and one.dtype.kind == "f" else None


def _image_key(item: Mapping | Sequence) -> Any:
    """Where an item of a Dataset holds its image; None for a dict that has none."""
    return next((k for k in ("image", "pixel_values", "img") if k in item), None) if isinstance(item, Mapping) else 0


def _as_numpy(values: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(values, Tensor):
        try:
            values = values.detach().cpu()
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        except Exception as error:  # sparse, quantised, without data
            kind = f"{values.dtype} as {values.layout} on {values.device}"
            raise InputError(f"reading images: found a tensor of {kind}, expected plain numbers") from error
    return values


def from_array(values: Tensor | np.ndarray, reader: Reader, what: str) -> Found:
    """Read an array: (N, C, H, W), or uint8 (N, H, W, C), or grey (N, H, W). what: its name in messages.

    Raises:
        InputError: It has another shape.
    """
    values = _as_numpy(values)
    shape, known = values.shape, {1, 3, 4, reader.channels}
    if values.ndim == 3 and not ({shape[0], shape[2]} & known) and reader.channels in (1, 3):
        values = values[:, None] if values.dtype.kind == "f" else values[..., None]
    if values.ndim != 4 or not values.size:
        remedy = "one image needs array[None], a stack of grey images array[:, None]"
        if values.ndim == 5:
            remedy = "for volumes or clips give example=, a batch of them as the network takes it"
        raise InputError(
            f"reading {what}: found shape {shape}, expected (N, C, H, W), N at least 1, or uint8 (N, H, W, C); {remedy}"
        )
    images = []
    for i in range(len(values)):  # of a mapped file one after the other
        try:
            images.append(reader.array(values[i], f"image {i} (from 0) of {what}"))
        except Unreadable as error:
            raise InputError(f"reading image {i} (from 0) of {what}: {error}") from error
    return [replace(image, name=f"image {i}") for i, image in enumerate(images)], [], []


class Items(Protocol):
    """A sequence or map-style Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_items(source: Items, reader: Reader) -> Found:
    """Read a sequence or map-style Dataset; items that cannot be read are skipped.

    Raises:
        InputError: An item is not an image, or no item can be read.
    """
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
    return images, skipped, []


def _item(item: Any, reader: Reader, name: str) -> Decoded:
    if isinstance(item, (tuple, list)) and item:
        return _item(item[0], reader, name)
    if isinstance(item, Mapping):
        key = _image_key(item)
        if key is None:
            raise InputError(
                f"reading {name}: found a dict of {sorted(map(str, item))}, expected 'image' or 'pixel_values'"
            )
        return _item(item[key], reader, name)
    if isinstance(item, (str, Path)):
        if Path(item).exists() and not Path(item).is_file():
            raise ValueError(f"{_printable(item)} is no file")  # one that is read for ever, such as a pipe
        return replace(reader.file(Path(item), str(item)), name=_printable(item))
    if isinstance(item, Image.Image):
        origin = hashlib.sha256(f"{item.mode}{item.size}".encode() + item.tobytes()).hexdigest()
        return reader.finish(reader.planes(item), name, origin)
    if isinstance(item, (Tensor, np.ndarray)):
        return reader.array(_as_numpy(item), name)
    raise InputError(
        f"reading {name}: found a {type(item).__name__}, expected a PIL image, a tensor, an array or a path"
    )


def from_path(path: Path, reader: Reader) -> Found:
    """Read a folder, an image file or a file of arrays; pictures that cannot be read are skipped.

    Raises:
        InputError: Nothing can be read.
    """
    if path.is_dir():
        return _from_folder(path, reader)
    if not path.is_file():
        raise InputError(f"reading images: {_printable(path)!r} is no file or folder; check the path")
    if path.suffix.lower() in (".npy", ".npz", ".safetensors"):
        return from_array(_array_file(path), reader, path.name)
    if path.suffix.lower() in (".pt", ".pth", ".pkl", ".pickle"):
        raise InputError(f"reading {path}: such files may run code when read; save the images as .npy or .safetensors")
    return _from_files([(path, _printable(path.name))], reader, f"the file {_printable(path)}")


def _array_file(path: Path) -> Tensor | np.ndarray:
    """The array of images in a file: the only one, or the one named images."""
    arrays = read_arrays(path, alone="images")
    named = [a for name, a in arrays.items() if name == "images" or a.ndim in (3, 4)]
    if len(named) != 1:
        found = ", ".join(f"{k} {tuple(a.shape)}" for k, a in arrays.items()) or "nothing"
        raise InputError(f"reading {path}: found {found}; expected one array of images, or one named 'images'")
    return named[0]


def read_arrays(path: Path, alone: str = "") -> Mapping[str, Any]:
    """The arrays in a .npy, .npz or .safetensors file, by their names; of .npy it is "images".

    Args:
        path: The file.
        alone: An array beside which the others are not read, where it is there.

    Raises:
        InputError: The file is damaged, or could only be read by running code.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            arrays = load_file(path)
            return {alone: arrays[alone]} if alone in arrays else arrays
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")  # which maps .npy alone
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            _refuse_too_large(loaded, alone)
            return {k: loaded[k] for k in ([alone] if alone in loaded.files else loaded.files)}
    except Exception as error:  # a damaged file raises many kinds
        raise InputError(
            f"reading {path}: found {'no array, or pickled objects' if _of_objects(error) else _reason(error)}, "
            "expected arrays of numbers, saved without pickle"
        ) from error


def _of_objects(error: Exception) -> bool:
    return any(words in str(error) for words in ("pickle", "Python objects"))


def _refuse_too_large(archive: Any, alone: str) -> None:
    """Raises: ValueError for a compressed file whose arrays are larger than the memory of a run."""
    most = memory.bound()
    for member in archive.zip.infolist():
        if alone not in archive.files or member.filename == f"{alone}.npy":
            most -= member.file_size
    if most < 0:
        raise Unreadable(f"arrays larger than the {memory.bound():,} bytes of a run; save a .npy, which is mapped")


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder that looks like a picture, in a fixed order; hidden ones are ignored."""
    return [path for path, _ in _listed(folder)[0] if path.suffix.lower() in _SUFFIXES]


def _from_folder(folder: Path, reader: Reader) -> Found:
    files, unreadable = _listed(folder)
    return _from_files(files, reader, f"the folder {_printable(folder)}", unreadable)


def _listed(folder: Path) -> tuple[list[tuple[Path, str]], list[tuple[str, str]]]:
    """The files below a folder with their names, and (name, reason) of folders that cannot be read."""
    found: list[tuple[str, Path]] = []
    unreadable: list[tuple[str, str]] = []
    seen: set[str] = set()

    def failed(error: OSError) -> None:
        unreadable.append((_printable(os.path.relpath(error.filename, folder)), _reason(error)))

    root = os.path.realpath(folder)
    for here, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        real = os.path.realpath(here)
        if real != root and not real.startswith(os.path.join(root, "")):
            unreadable.append((_printable(os.path.relpath(here, folder)), "a link to a folder outside: not followed"))
            folders.clear()
            continue
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = Path(here, name)
                found.append((_printable(path.relative_to(folder).as_posix()), path))
    return [(path, name) for name, path in sorted(found)], unreadable


def _from_files(
    files: list[tuple[Path, str]], reader: Reader, what: str, skipped: Sequence[tuple[str, str]] = ()
) -> Found:
    images, skipped = [], list(skipped)
    ignored: list[tuple[str, str]] = []
    for path, name in files:
        try:
            if not path.is_file():
                raise Unreadable("no regular file, or a broken link")
            images.append(reader.file(path, name))
        except UnidentifiedImageError:
            suffix = path.suffix.lower()
            (skipped if suffix in _SUFFIXES else ignored).append((name, _why_no_image(path)))
        except Exception as error:  # a damaged picture makes Pillow raise nearly anything
            skipped.append((name, _reason(error)))
    if not images:
        raise InputError(_none(what, len(files), "file(s)", skipped or ignored))
    named = listed(name for name, _ in ignored)
    notes = [f"{len(ignored)} other file(s) in the folder ignored: {named}"] if ignored else []
    return images, skipped, notes


def _why_no_image(path: Path) -> str:
    if path.suffix.lower() in (".heic", ".heif"):
        return "HEIC is not read; convert it to JPEG"
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:  # it may be gone by now
        return _reason(error)
    if not start:
        return "empty: 0 bytes"
    if start in (b"II*\0", b"MM\0*"):
        return "a TIFF of a kind that Pillow does not read; save an 8-bit TIFF or an array (.npy)"
    return "not an image inside, despite its name"


def _none(what: str, looked_at: int, kind: str, skipped: Sequence[tuple[str, str]]) -> str:
    first: dict[str, str] = {}
    for name, reason in skipped:
        first.setdefault(reason, name)
    reasons = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
    return (
        f"reading images from {what}: looked at {looked_at} {kind}, found no image that can be used"
        + (f" ({reasons}{'; ...' if len(first) > 3 else ''})" if reasons else "")
        + f"; {_READABLE}, from nested folders too: give at least 3 images of what the teacher will see"
    )


def _reason(error: BaseException) -> str:
    return f"{error}" if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _printable(path: str | Path) -> str:
    """Make a path printable, which names that are not UTF-8 are not."""
    return os.fsencode(path).decode("utf-8", "replace")
