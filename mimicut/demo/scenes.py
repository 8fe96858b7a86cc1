"""Scenes of 64x64 pixels for tasks other than naming a picture: objects of known textures before a photograph.

Made of the tiles of `photographs`, part by part, so that no pixel of a test scene has trained anything. The background
is a tile of one of seven photographs of things; one to three objects lie before it, squares or discs that do not
overlap, each filled from a tile of one of eight textures. Every tile is standardised before it is used, so that
brightness and contrast reveal nothing. The same arithmetic on every machine, as in `photographs`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mimicut.base.errors import InputError
from mimicut.demo.photographs import CENTRE, CLASSES, PARTS, SPREAD, TILE, all_tiles, normalised

SIDE = TILE  # pixels of a scene
TEXTURES = ("brick", "grass", "gravel", "cell", "hubble_deep_field", "ihc", "moon", "retina")
BACKGROUNDS = ("astronaut", "camera", "coffee", "motorcycle_left", "rocket", "china", "flower")
SMALLEST, LARGEST, MOST = 18, 34, 3  # side of an object in pixels, number of objects
TEST_COUNT, TEST_SEED = 2000, 0

PREPROCESSING = {
    "input_size": (1, SIDE, SIDE),
    "mean": (CENTRE / 255,),
    "std": (SPREAD / 255,),
    "resize": None,
    "interpolation": "bilinear",
}


@dataclass(frozen=True)
class Scenes:
    """Scenes and the truth about them.

    Attributes:
        images: float32 (N, 1, 64, 64), as the networks take them.
        labels: int64 (N, 64, 64): 0 for the background, else 1 + the texture's place in TEXTURES.
        boxes: for each scene float32 (objects, 5): left, top, right, bottom in pixels, and the texture's place.
    """

    images: torch.Tensor
    labels: torch.Tensor
    boxes: tuple[torch.Tensor, ...]


def scenes(part: str, count: int, seed: int) -> Scenes:
    """Draw scenes of one part ("train", "few" or "test").

    Raises:
        InputError: The part is unknown, the count is below 1, or the seed is outside 0..2**32-1.
    """
    if part not in PARTS or count < 1 or not 0 <= seed < 2**32:
        raise InputError(
            f"drawing scenes: found part {part!r}, count {count} and seed {seed}; expected one of {', '.join(PARTS)}, "
            "a count of 1 or more and a seed from 0 to 2**32-1"
        )
    tiles = _standard_tiles(part)
    random = np.random.RandomState([7, PARTS.index(part), seed])
    pixels = np.empty((count, SIDE, SIDE), np.uint8)
    labels = np.zeros((count, SIDE, SIDE), np.int64)
    boxes = []
    for number in range(count):
        pixels[number] = _turned(tiles[BACKGROUNDS[random.randint(len(BACKGROUNDS))]], random)
        found: list[tuple[int, int, int, int, int]] = []
        for _ in range(random.randint(1, MOST + 1)):
            side = random.randint(SMALLEST, LARGEST + 1)
            left, top = random.randint(0, SIDE - side + 1, size=2)
            texture, disc = random.randint(len(TEXTURES)), random.randint(2)
            filling = _turned(tiles[TEXTURES[texture]], random)[:side, :side]
            if any(left < r and left + side > x and top < b and top + side > y for x, y, r, b, _ in found):
                continue  # drawn all the same, so that one scene's draws do not depend on what fitted
            inside = np.ones((side, side), bool)
            if disc:
                offset = np.arange(side) * 2 - (side - 1)
                inside = offset[:, None] ** 2 + offset**2 <= side**2
            place = np.s_[number, top : top + side, left : left + side]
            pixels[place][inside], labels[place][inside] = filling[inside], texture + 1
            found.append((left, top, left + side, top + side, texture))
        boxes.append(torch.tensor(found, dtype=torch.float32))
    return Scenes(normalised(pixels), torch.from_numpy(labels), tuple(boxes))


def few_scenes(count: int, seed: int) -> torch.Tensor:
    """Unlabelled scenes of the "few" tiles: float32 (count, 1, 64, 64)."""
    return scenes("few", count, seed).images


@lru_cache(maxsize=1)
def test_scenes() -> Scenes:
    """The 2,000 scenes that nothing else touches."""
    return scenes("test", TEST_COUNT, TEST_SEED)


@lru_cache(maxsize=3)
def _standard_tiles(part: str) -> dict[str, np.ndarray]:
    """Photograph -> its standardised tiles of this part, uint8 (tiles, 64, 64)."""
    owners, stack = all_tiles()[part]
    values = stack.astype(np.float64)
    mean, deviation = (f(values, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
    scaled = np.clip(np.rint((values - mean) / np.maximum(deviation, 1.0) * SPREAD) + CENTRE, 0, 255).astype(np.uint8)
    names = np.array([CLASSES[t.photograph] for t in owners])
    return {name: scaled[names == name] for name in (*TEXTURES, *BACKGROUNDS)}


def _turned(tiles: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """One of the tiles, turned by quarters, mirrored or not."""
    tile, code = tiles[random.randint(len(tiles))], random.randint(8)
    turned = np.rot90(tile, code % 4)
    return turned[:, ::-1] if code >= 4 else turned
