"""A real task that needs no download: which photograph does this 32x32 patch come from?

The photographs ship inside scikit-image and scikit-learn. Each is made grey and cut into tiles of 64x64 pixels, and
every tile belongs to exactly one part: "train" (teaches the teacher), "few" (the unlabelled images) or "test". A patch
is a 32x32 window inside one tile, turned by quarters, flipped or not, and standardised, so that brightness and contrast
reveal nothing. All of it is integer or exactly rounded arithmetic on decoded pixels: the same on every machine, and
`test_hash` notices when a new version of those packages ships or decodes another picture.

Not covered: colour (half of the photographs have none, which would give them away), scales, other angles.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimicut.base.errors import InputError

TILE = 64  # pixels
PATCH = 32  # pixels
CENTRE, SPREAD = 128, 32  # mean and standard deviation of a patch in grey levels; clips at 4 deviations (assumption)
TEST_COUNT, TEST_SEED = 10_000, 0

# Left out of what ships: drawings, masks and boards (no photographs), motorcycle_right (the stereo twin of
# motorcycle_left: the same scene would stand in two classes), and pictures with fewer than 12 tiles.
PHOTOGRAPHS = {
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
CLASSES = tuple(name.split(".")[0] for _, names in PHOTOGRAPHS.values() for name in names.split())

PARTS = ("train", "few", "test")
# Of each photograph's tiles, at least one; the rest trains the teacher (assumption).
SHARES = {"few": 0.08, "test": 0.20}
BLANK = 1.0  # grey levels: a tile with less deviation (the black corners of retina) belongs to no photograph

PREPROCESSING: dict[str, Any] = {
    "input_size": (1, PATCH, PATCH),
    "mean": (CENTRE / 255,),
    "std": (SPREAD / 255,),
    "resize": None,
    "interpolation": "bilinear",
}


@dataclass(frozen=True)
class Tile:
    """photograph: index into CLASSES; row, column: in tiles from the top left corner of that photograph."""

    photograph: int
    row: int
    column: int


def photographs() -> list[np.ndarray]:
    """The grey pictures, uint8 (height, width), in the order of CLASSES.

    Raises InputError when a package or one of its files is missing. Source of the grey weights: ITU-R BT.601.
    """
    return [_read_grey(path) for path in files()]


def files() -> list[Path]:
    """The files of the photographs, in the order of CLASSES. Raises InputError as `photographs`."""
    found = []
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"reading the demo's photographs: the package {package!r} is not installed; pip install 'mimicut[demo]'"
            )
        root = Path(spec.submodule_search_locations[0], folder)
        found += [root / name for name in names.split()]
    absent = next((path for path in found if not path.is_file()), None)
    if absent is not None:
        raise InputError(
            f"reading the demo's photographs: {absent} is missing, expected in this package; "
            "install the versions of scikit-image and scikit-learn that the requirements name"
        )
    return found


def _read_grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    return ((pixels @ np.array([299, 587, 114]) + 500) // 1000).astype(np.uint8)


@lru_cache(maxsize=1)
def all_tiles() -> dict[str, tuple[list[Tile], np.ndarray]]:
    """Per part: its tiles, ordered by photograph, and their pixels, uint8 (tiles, 64, 64)."""
    found: dict[str, tuple[list[Tile], list[np.ndarray]]] = {part: ([], []) for part in PARTS}
    for index, picture in enumerate(photographs()):
        windows = {
            Tile(index, row, column): picture[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            for row in range(picture.shape[0] // TILE)
            for column in range(picture.shape[1] // TILE)
        }
        usable = sorted((t for t, pixels in windows.items() if pixels.std() >= BLANK), key=_shuffled)
        few, test = (max(1, round(SHARES[part] * len(usable))) for part in ("few", "test"))
        for part, tiles in zip(PARTS, (usable[few + test :], usable[:few], usable[few : few + test]), strict=True):
            found[part][0].extend(tiles)
            found[part][1].extend(windows[t] for t in tiles)
    return {part: (tiles, np.stack(pixels)) for part, (tiles, pixels) in found.items()}


def _shuffled(tile: Tile) -> bytes:
    """A fixed random order that depends on no library's generator."""
    return hashlib.sha256(f"{CLASSES[tile.photograph]} {tile.row} {tile.column}".encode()).digest()


def tiles(part: str) -> list[Tile]:
    """The tiles of one part, ordered by photograph. No tile, hence no pixel, is in two parts."""
    return list(all_tiles()[_known(part)][0])


def pixels(part: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardised grey patches, uint8 (count, 32, 32), and the index of each one's photograph, int64 (count,).

    Every photograph is as likely as any other, then every tile of it, then every window and turn. A patch has mean 128
    and standard deviation 32 before rounding and clipping to 0..255.
    Raises InputError for an unknown part, a count below 1 or a seed outside 0..2**32-1.
    """
    if count < 1 or not 0 <= seed < 2**32:
        raise InputError(
            f"drawing {part} patches: found count {count} and seed {seed}; expected a count of 1 or more, "
            "a seed from 0 to 2**32-1"
        )
    owners, stack = all_tiles()[_known(part)]
    # RandomState: NumPy promises that its streams never change; those of the newer Generator may.
    random = np.random.RandomState([PARTS.index(part), seed])
    labels = random.randint(0, len(CLASSES), size=count)
    sizes = np.bincount([t.photograph for t in owners], minlength=len(CLASSES))
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = first[labels] + (random.random_sample(count) * sizes[labels]).astype(np.int64)
    top, left = random.randint(0, TILE - PATCH + 1, size=(2, count))
    turn = random.randint(0, 8, size=count)
    span = np.arange(PATCH)
    windows = stack[chosen[:, None, None], (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    for code in range(8):
        turned = np.rot90(windows[turn == code], code % 4, axes=(1, 2))
        windows[turn == code] = turned[:, :, ::-1] if code >= 4 else turned
    return _standardise(windows), labels.astype(np.int64)


def _standardise(windows: np.ndarray) -> np.ndarray:
    """Mean CENTRE and deviation SPREAD, rounded. Sums are of integers, so no order of adding can change a bit."""
    values = windows.astype(np.int64)
    n = PATCH * PATCH
    total = values.sum(axis=(1, 2), keepdims=True)
    deviation = np.sqrt((n * (values**2).sum(axis=(1, 2), keepdims=True) - total**2).astype(np.float64))
    scaled = (n * values - total) * (SPREAD / np.maximum(deviation, 1.0))
    return np.clip(np.rint(scaled) + CENTRE, 0, 255).astype(np.uint8)


def normalised(patches_u8: np.ndarray) -> torch.Tensor:
    """What the teachers take: float32 (count, 1, 32, 32), each near mean 0 and deviation 1 (rounded, clipped)."""
    return ((torch.from_numpy(patches_u8).float() - CENTRE) / SPREAD).unsqueeze(1)


def patches(part: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Preprocessed patches, float32 (count, 1, 32, 32), and labels, int64 (count,); see `pixels`."""
    found, labels = pixels(part, count, seed)
    return normalised(found), torch.from_numpy(labels)


def few_images(count: int, seed: int) -> torch.Tensor:
    """Unlabelled patches of the "few" tiles, preprocessed: float32 (count, 1, 32, 32)."""
    return patches("few", count, seed)[0]


def write_few_images(folder: Path, count: int, seed: int) -> list[Path]:
    """Writes the same patches as grey PNG files into `folder` (made if missing) and returns their paths.

    Read with PREPROCESSING they equal `few_images(count, seed)` but for float rounding. Their names tell no label.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"patch_{i:04d}.png" for i in range(count)]
    for path, patch in zip(paths, pixels("few", count, seed)[0], strict=True):
        Image.fromarray(patch).save(path)
    return paths


def test_set() -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 labelled test patches that nothing else touches; see `patches`."""
    return patches("test", TEST_COUNT, TEST_SEED)


def test_hash() -> str:
    """SHA-256 over the pixels and labels of the test set, hexadecimal."""
    found, labels = pixels("test", TEST_COUNT, TEST_SEED)
    return hashlib.sha256(found.tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def _known(part: str) -> str:
    if part not in PARTS:
        raise InputError(f"drawing patches: found part {part!r}, expected one of {', '.join(PARTS)}")
    return part
