"""Colour crops of the photographs that ship inside scikit-image and scikit-learn, for teachers of ImageNet.

Each photograph is cut in two across its longer side: crops of one half are for learning ("few"), crops of the other are
held out ("held_out"), so that no pixel is in both. None of them has anything to do with ImageNet.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from mimicut.base.errors import InputError
from mimicut.demo.photographs import CLASSES, files

PARTS = ("few", "held_out")
# Those that show things. Left out: textures, script and what microscopes and telescopes see.
SHOWN = ("astronaut", "camera", "chelsea", "clock_motion", "coffee", "coins", "motorcycle_left", "rocket", "china",
         "flower")  # fmt: skip
SHARE = (0.6, 1.0)  # side of a crop, as a share of the half's shorter side. Source: assumption: shows whole things.
SMALLEST = 160  # pixels of a crop; a smaller half gives its shorter side


def write_crops(folder: Path, part: str, count: int, seed: int) -> list[Path]:
    """Write square crops as PNG files, from the photographs in turn; their names say which photograph.

    Args:
        folder: Where to; it is made if missing.
        part: One of PARTS.
        count: How many.
        seed: Decides where they are cut out.

    Returns:
        The files.

    Raises:
        InputError: There is no such part, or the photographs are not installed.
    """
    if part not in PARTS:
        raise InputError(f"drawing crops: found the part {part!r}, expected one of {', '.join(PARTS)}")
    folder.mkdir(parents=True, exist_ok=True)
    sources = dict(zip(CLASSES, files(), strict=True))
    # RandomState: NumPy promises that its streams never change.
    random = np.random.RandomState([PARTS.index(part), seed])
    paths = []
    for number in range(count):
        name = SHOWN[number % len(SHOWN)]
        with Image.open(sources[name]) as image:
            crop = _crop(half(image.convert("RGB"), part, name), random)
        paths.append(folder / f"{number:03d}_{name}.png")
        crop.save(paths[-1])
    return paths


def half(image: Image.Image, part: str, name: str) -> Image.Image:
    """The half of the photograph `name` that belongs to `part`; which of the two that is depends on the name."""
    width, height = image.size
    swapped = bool(hashlib.sha256(name.encode()).digest()[0] % 2)
    first = (part == PARTS[0]) != swapped
    if width >= height:
        return image.crop((0, 0, width // 2, height) if first else (width // 2, 0, width, height))
    return image.crop((0, 0, width, height // 2) if first else (0, height // 2, width, height))


def _crop(image: Image.Image, random: np.random.RandomState) -> Image.Image:
    shorter = min(image.size)
    side = min(shorter, max(SMALLEST, round(random.uniform(*SHARE) * shorter)))
    left, top = (random.randint(0, n - side + 1) for n in image.size)
    return image.crop((left, top, left + side, top + side))
