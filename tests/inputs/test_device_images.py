"""Views that are made on a device for a whole batch are those that are made on the CPU one by one."""

import numpy as np
import pytest
import torch

from mimicut.inputs.augment import MIXES
from mimicut.inputs.device_images import DeviceImages, images_on, tensor_on
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing

CPU = torch.device("cpu")


def pictures(sizes, side=32, interpolation="bilinear", resize=36):
    random = np.random.default_rng(0)
    shapes = [(h, w, 3) for h, w in sizes]
    rough = [random.integers(80, 176, s, np.uint8) for s in shapes]
    pre = Preprocessing((3, side, side), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), resize, interpolation)
    return read_images(rough, pre)


def both(images, held, views, indices):
    found = [each.view(indices, views, torch.Generator().manual_seed(5)) for each in (images, held)]
    assert found[0].shape == found[1].shape
    return found


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resized_crops_are_those_of_pillow_up_to_rounding(interpolation):
    images = pictures([(50, 70), (70, 50), (33, 90), (40, 40)], interpolation=interpolation)
    held = images_on(images, "imagenet", CPU, 10**7)
    assert isinstance(held, DeviceImages)
    wanted, found = both(images, held, "imagenet", [0, 3, 1, 2, 1, 0, 2, 3] * 4)
    std = torch.tensor(images.preprocessing.std)[:, None, None]
    apart = (found - wanted).abs() * std * 255
    assert float(apart.max()) < 2.01
    assert float((apart > 0.5).float().mean()) < 0.1  # the order of Pillow's two passes depends on the sizes
    # What averages see is the same, so that the distribution of the views is.
    assert torch.allclose(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(found.std((0, 2, 3)), wanted.std((0, 2, 3)), atol=1e-4)


@pytest.mark.parametrize("views", ["pad_crop", "patches", "crops", "none"])
@pytest.mark.parametrize("size", [(32, 32), (24, 32)])
def test_views_that_move_pixels_are_the_same_bits(views, size):
    images = pictures([(50, 70), (70, 50), (40, 40)])
    pre = images.preprocessing
    pre = Preprocessing((3, *size), pre.mean, pre.std, None if views != "crops" else "none")
    images = read_images([images.stored(i).permute(1, 2, 0).numpy() for i in range(3)], pre)
    held = images_on(images, views, CPU, 10**7)
    wanted, found = both(images, held, views, [2, 0, 1, 1, 0, 2, 0, 0, 1, 2])
    assert torch.equal(wanted, found)


def test_floats_are_resized_without_rounding_and_not_normalised():
    floats = torch.rand(4, 3, 32, 32) - 0.5
    pre = Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 36)
    images = read_images(floats, pre)
    for held in (images_on(images, "imagenet", CPU, 10**7), tensor_on(floats, [0, 1, 2, 3], CPU)):
        wanted, found = both(images, held, "imagenet", [0, 1, 2, 3, 3, 2])
        assert torch.allclose(wanted, found, atol=1e-5)
        assert torch.equal(held.batch([2, 0]), floats[[2, 0]])


def test_what_does_not_fit_or_needs_another_filter_stays_where_it_is():
    images = pictures([(50, 70), (70, 50)])
    stored = sum(images.pixels(i, base).nbytes for i in range(2) for base in ("stored", "evaluated"))
    assert images_on(images, "imagenet", CPU, 2 * stored) is not None
    assert images_on(images, "imagenet", CPU, stored) is None  # in one tensor they are larger
    assert images_on(pictures([(50, 70)], interpolation="lanczos"), "imagenet", CPU, 10**7) is None
    assert images_on(pictures([(50, 70)], interpolation="lanczos"), "pad_crop", CPU, 10**7) is not None


def test_mixing_takes_its_masks_and_noise_to_where_the_images_are(monkeypatch):
    devices = []
    plain = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: devices.append(k.get("device")) or plain(*a, **k))
    MIXES["cutmix"](torch.rand(4, 3, 8, 8), torch.Generator().manual_seed(0))
    assert devices == [CPU, CPU]
