"""Pictures that are drawn, not taken: scenes of overlapping shapes with textures.

Each picture is a dead-leaves scene: shapes of all sizes hide one another, as things in photographs do, so that edges,
corners and textures occur at every scale. They are filled with noises of natural spectra, warped waves, patterns,
iterated function systems, gradients and plain colours, and shaded. Nothing in them is anything; what they share with
photographs is what the first layers of a network look for, and that is most of what a student has to relearn.

Source: dead leaves as training pictures: Baradad et al., NeurIPS 2021 (arXiv 2106.05963); iterated function systems:
Kataoka et al., IJCV 2022 (arXiv 2101.08515). The mixture and its numbers are this project's (docs/LOG.md).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.random import RandomState
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from mimicut.base.errors import InputError

SIDE = 256  # of a picture, in pixels
_TEXTURES, _BANK_SIDE = 40, 256  # that all pictures of one call share, and their side. Source: assumption.
_MATERIALS = 7  # of one picture, at most: textures in other colours, which its shapes share. Source: assumption.
_LEAST, _MOST = 0.03, 0.6  # radii of shapes, as shares of the side; as many of each order of magnitude.
_FEWEST_SHAPES, _MOST_SHAPES = 5, 60
_CORNERS = np.linspace(0, 2 * np.pi, 28, endpoint=False)


def draw_pictures(count: int, seed: int, *, side: int = SIDE) -> np.ndarray:
    """Draw pictures.

    Args:
        count: How many.
        seed: Decides everything, with the same versions of Pillow and NumPy; the first n pictures are the same whatever
            the count.
        side: Of each, in pixels.

    Returns:
        uint8 (count, side, side, 3).

    Raises:
        InputError: The seed is not from 0 to 2**32 - 1, or there is no such number or side.
    """
    if count < 0 or side < 1:
        raise InputError(
            f"drawing pictures: found {count} pictures of {side} pixels, expected none or more of at least 1"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"drawing pictures: found the seed {seed}, expected a whole number from 0 to 2**32 - 1")
    bank = _texture_bank(RandomState([seed, 0]))
    pictures = np.empty((count, side, side, 3), np.uint8)
    for number in range(count):
        pictures[number] = _scene(RandomState([seed, 1, number]), side, bank)
    return pictures


def _scene(random: RandomState, side: int, bank: Sequence[Image.Image]) -> np.ndarray:
    materials = [_material(random, side, bank) for _ in range(random.randint(2, _MATERIALS + 1))]
    canvas = materials[0].copy()
    shapes = int(np.exp(random.uniform(np.log(_FEWEST_SHAPES), np.log(_MOST_SHAPES))))
    radii = np.exp(random.uniform(np.log(_LEAST), np.log(_MOST), shapes)) * side
    # From the back to the front, the larger ones first more often than not, so that small ones stay to be seen.
    radii = radii[np.argsort(-radii * np.exp(0.8 * random.standard_normal(shapes)))]
    soft = random.random_sample() < 0.25
    for radius in radii:
        _add_shape(random, canvas, radius, materials[random.randint(len(materials))], soft)
    pixels = np.asarray(canvas)
    return _lit(random, pixels) if random.random_sample() < 0.5 else pixels


def _add_shape(random: RandomState, canvas: Image.Image, radius: float, material: Image.Image, soft: bool) -> None:
    side = canvas.size[0]
    points = _outline(random, radius)
    low = np.floor(points.min(0))
    width, height = (min(side, int(v) + 2) for v in points.max(0) - low)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).polygon((points - low).ravel().tolist(), fill=255)
    if soft and radius > 4:
        mask = mask.filter(ImageFilter.BoxBlur(float(random.uniform(0.5, radius / 8))))
    left, top, taken_left, taken_top = random.random_sample(4)
    at = int(left * side + low[0]), int(top * side + low[1])
    x, y = int(taken_left * (side - width + 1)), int(taken_top * (side - height + 1))
    piece = material.crop((x, y, x + width, y + height))
    if random.random_sample() < 0.25:  # shaded, as round things are
        corners = random.randint(40, 256, (2, 2)).astype(np.uint8)
        shade = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
        piece = Image.merge("RGB", [ImageChops.multiply(band, shade) for band in piece.split()])
    canvas.paste(piece, at, mask)


def _outline(random: RandomState, radius: float) -> np.ndarray:
    """Corners of a shape around (0, 0): an ellipse, a polygon, a star, a blob or a bar."""
    kind, angles = random.randint(5), _CORNERS
    away: Any = radius
    if kind == 1:
        angles = np.sort(random.uniform(0, 2 * np.pi, random.randint(3, 8)))
    elif kind == 2:
        corners = 2 * random.randint(3, 9)
        angles = 2 * np.pi * np.arange(corners) / corners
        away = np.where(np.arange(corners) % 2, radius, radius * random.uniform(0.3, 0.8))
    elif kind == 3:  # a blob
        heights, phases = random.uniform(-0.5, 0.5, 5) / np.arange(1, 6), random.uniform(0, 2 * np.pi, 5)
        away = radius * (1 + heights @ np.cos(np.arange(1, 6)[:, None] * angles + phases[:, None]))
    turn, flat = random.uniform(0, 2 * np.pi), random.uniform(0.4, 1.0)
    along, across = away * np.cos(angles), away * np.sin(angles) * flat
    if kind == 4:
        along, across = 2.0 * along, 0.2 * across
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack([along * cos - across * sin, along * sin + across * cos], 1)


def _material(random: RandomState, side: int, bank: Sequence[Image.Image]) -> Image.Image:
    """One colour, a gradient, or a texture in other colours."""
    kind = random.random_sample()
    if kind < 0.15:
        return Image.new("RGB", (side, side), tuple(int(v) for v in _colour(random)))
    if kind < 0.3:
        ends = np.array([_colour(random), _colour(random)]).astype(np.uint8)
        corners = ends[random.randint(0, 2, (2, 2))]
        return Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)
    source = bank[random.randint(len(bank))]
    taken = min(source.size[0] - 1.0, side * np.exp(random.uniform(np.log(0.3), np.log(2.0))))
    left, top = random.uniform(0, source.size[0] - taken, 2)
    piece = source.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + taken, top + taken))
    if random.random_sample() < 0.5:
        piece = piece.transpose(Image.Transpose(random.randint(0, 7)))
    return _recoloured(random, piece)


def _colour(random: RandomState) -> np.ndarray:
    """Three levels, rarely far from each other, as in photographs."""
    return np.clip(random.uniform(0, 255) + random.standard_normal(3) * random.choice([10, 30, 80]), 0, 255)


def _recoloured(random: RandomState, piece: Image.Image) -> Image.Image:
    """The same around another colour and with another contrast."""
    gain = np.exp(-0.5 + 0.5 * random.standard_normal() + 0.2 * random.standard_normal(3))
    table = np.clip((np.arange(256)[None] - 128.0) * gain[:, None] + _colour(random)[:, None], 0, 255)
    return piece.point(table.astype(np.uint8).ravel().tolist())


def _lit(random: RandomState, pixels: np.ndarray) -> np.ndarray:
    """Brighter towards one side, as lit from there."""
    corners = np.exp(random.uniform(-0.6, 0.4, (2, 2))).astype(np.float32)
    side = pixels.shape[0]
    light = np.asarray(Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR))
    return np.clip(pixels * light[..., None], 0, 255).astype(np.uint8)


def _texture_bank(random: RandomState) -> list[Image.Image]:
    makers: tuple[Callable[[RandomState], np.ndarray], ...] = (_noise, _noise, _waves, _pattern, _fractal)
    return [Image.fromarray(makers[number % len(makers)](random)) for number in range(_TEXTURES)]


def _as_picture(values: np.ndarray) -> np.ndarray:
    """(h, w, 3) of any range as uint8, each channel with mean 128 and deviation 60."""
    values = values - values.mean((0, 1))
    values = values / np.maximum(values.std((0, 1)), 1e-6)
    return np.clip(values * 60 + 128, 0, 255).astype(np.uint8)


def _mixed_channels(random: RandomState, channels: np.ndarray) -> np.ndarray:
    """(3, h, w) independent channels as (h, w, 3) correlated ones: grey above all, as in photographs."""
    mix = np.stack([np.ones(3), random.uniform(-1, 1, 3) * 0.5, random.uniform(-1, 1, 3) * 0.3], 1)
    return np.moveaxis(np.tensordot(mix, channels, 1), 0, 2)


def _spectrum_noise(random: RandomState, count: int) -> np.ndarray:
    """(count, h, w) noise whose amplitude falls with frequency, along one direction faster than across it or not."""
    n = _BANK_SIDE
    fy, fx = np.meshgrid(np.fft.fftfreq(n), np.fft.rfftfreq(n), indexing="ij")
    turn, stretch = random.uniform(0, np.pi), np.exp(random.uniform(0, 2.0) * (random.random_sample() < 0.5))
    along, across = fx * np.cos(turn) + fy * np.sin(turn), fy * np.cos(turn) - fx * np.sin(turn)
    distance = np.sqrt((along * stretch) ** 2 + (across / stretch) ** 2 + 1e-5)
    amplitude = distance ** -random.uniform(0.5, 2.2)
    if random.random_sample() < 0.3:  # a band of frequencies alone: grain, ripples
        centre = np.exp(random.uniform(np.log(0.01), np.log(0.2)))
        amplitude = np.exp(-((np.log(distance / centre)) ** 2) / (2 * random.uniform(0.1, 0.5) ** 2))
    shape = (count, *distance.shape)
    waves = random.standard_normal(shape) + 1j * random.standard_normal(shape)
    return np.fft.irfft2(waves * amplitude, s=(n, n))


def _noise(random: RandomState) -> np.ndarray:
    channels = _spectrum_noise(random, 3)
    if random.random_sample() < 0.4:  # islands
        first = channels[0] / channels[0].std()
        channels[0] = np.tanh(first * np.exp(random.uniform(0.5, 3)))
    return _as_picture(_mixed_channels(random, channels / channels.std((1, 2), keepdims=True)))


def _waves(random: RandomState) -> np.ndarray:
    """Sines of sines of the place, warped by noise."""
    n = _BANK_SIDE
    y, x = np.mgrid[0:n, 0:n] / n * 2 * np.pi
    smooth = _spectrum_noise(random, 2)
    smooth = smooth / smooth.std((1, 2), keepdims=True) * random.uniform(0, 0.7)
    x, y = x + smooth[0], y + smooth[1]
    channels = []
    for _ in range(3):
        a, b, c, d = random.uniform(-6, 6, 4)
        inner = np.sin(a * x + b * y + random.uniform(0, 6)) * random.uniform(0, 3)
        channels.append(np.sin(c * x + d * y + inner + random.uniform(0, 6)))
    return _as_picture(_mixed_channels(random, np.stack(channels)))


def _pattern(random: RandomState) -> np.ndarray:
    """Stripes, checks, dots or bricks in two colours, turned and warped."""
    n = _BANK_SIDE
    y, x = np.mgrid[0:n, 0:n].astype(np.float64)
    turn, period = random.uniform(0, np.pi), np.exp(random.uniform(np.log(6), np.log(60)))
    x, y = (x * np.cos(turn) + y * np.sin(turn)) / period, (y * np.cos(turn) - x * np.sin(turn)) / period
    if random.random_sample() < 0.5:
        warp = _spectrum_noise(random, 2)
        warp = warp / warp.std((1, 2), keepdims=True) * random.uniform(0, 0.3)
        x, y = x + warp[0], y + warp[1]
    kind, duty = random.randint(4), random.uniform(0.15, 0.6)
    if kind == 0:
        on = (x % 1) < duty
    elif kind == 1:
        on = ((x % 1) < 0.5) ^ ((y % 1) < 0.5)
    elif kind == 2:
        on = ((x % 1) - 0.5) ** 2 + ((y % 1) - 0.5) ** 2 < (0.7 * duty) ** 2
    else:
        on = ((x + 0.5 * (np.floor(y) % 2)) % 1 < 0.08) | ((y % 1) < 0.15)
    colours = random.uniform(0, 255, (2, 3))
    grain = _spectrum_noise(random, 1)[0]
    picture = np.where(on[..., None], colours[0], colours[1]) + grain[..., None] / grain.std() * random.uniform(0, 25)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _fractal(random: RandomState) -> np.ndarray:
    """The attractor of a few contracting maps, by how often a wandering point is where."""
    n, walkers, rounds = _BANK_SIDE, 4000, 40
    maps = random.randint(2, 5)
    turns, scales = random.uniform(-np.pi, np.pi, (maps, 2)), random.uniform(0.35, 0.85, (maps, 2))
    linear = np.empty((maps, 2, 2))
    for k in range(maps):
        first, second = ([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]] for t in turns[k])
        linear[k] = np.array(first) @ np.diag(scales[k]) @ np.array(second)
    moves, points = random.uniform(-1, 1, (maps, 2)), random.uniform(-1, 1, (walkers, 2))
    seen = []
    for step in range(rounds):
        which = random.randint(maps, size=walkers)
        points = np.einsum("nij,nj->ni", linear[which], points) + moves[which]
        if step >= 8:
            seen.append(np.concatenate([points, which[:, None]], 1))
    found = np.concatenate(seen)
    low, high = np.percentile(found[:, :2], 1, axis=0), np.percentile(found[:, :2], 99, axis=0)
    cells = ((found[:, :2] - low) / np.maximum(high - low, 1e-9) * (n - 1)).astype(int)
    inside = ((cells >= 0) & (cells < n)).all(1)
    flat, colours = cells[inside, 0] * n + cells[inside, 1], random.uniform(0, 1, (maps, 3))
    which = found[inside, 2].astype(int)
    density = np.stack([np.bincount(flat, colours[which, c], n * n).reshape(n, n) for c in range(3)], 2)
    return _as_picture(np.log1p(density) * np.exp(random.uniform(-0.3, 0.3, 3)))
