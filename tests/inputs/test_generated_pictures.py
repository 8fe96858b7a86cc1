"""Drawn pictures: the same every time, each unlike the others, with edges and textures of all sizes."""

import numpy as np
import pytest

from mimicut.base.errors import InputError
from mimicut.inputs.generated_pictures import draw_pictures


def test_the_seed_decides_every_pixel_and_the_count_none():
    first, more, other = draw_pictures(3, 5, side=48), draw_pictures(6, 5, side=48), draw_pictures(3, 6, side=48)
    assert first.dtype == np.uint8
    assert first.shape == (3, 48, 48, 3)
    assert np.array_equal(first, more[:3])
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_is_refused(seed):
    with pytest.raises(InputError, match="drawing pictures"):
        draw_pictures(1, seed)


def test_pictures_differ_and_are_not_flat():
    pictures = draw_pictures(40, 1, side=64).astype(float)
    small = pictures[:, ::4, ::4].reshape(40, -1)
    alike = np.corrcoef(small) - np.eye(40)
    assert alike.max() < 0.95
    assert np.median(pictures.std((1, 2)).mean(1)) > 25
    assert (pictures.std((1, 2)).mean(1) > 3).mean() > 0.95


def test_amplitudes_fall_with_frequency_as_in_photographs():
    """Natural images: amplitude about 1 / frequency. Source: Field, J. Opt. Soc. Am. A 4 (1987)."""
    grey = draw_pictures(60, 2, side=64).mean(3)
    waves = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))).mean(0)
    distance = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    rings = [waves[(distance >= low) & (distance < 2 * low)].mean() for low in (1 / 32, 1 / 16, 1 / 8, 1 / 4)]
    slopes = np.diff(np.log2(rings))
    assert (slopes < -0.5).all()
    assert (slopes > -1.6).all()
