import numpy as np
import pytest
import torch
from PIL import Image

from mimicut.base.errors import InputError
from mimicut.inputs import augment
from mimicut.inputs.augment import RESIZED_CROP_RATIO, VIEWS, crop_box
from mimicut.inputs.image_set import Preprocessing, read_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRE = Preprocessing((3, 32, 32), MEAN, STD, 36)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 8, size: int = 48, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, channels, size, size + 8), dtype=np.uint8)


@pytest.fixture(params=["uint8", "float"])
def images(request):
    if request.param == "uint8":
        return read_images(pictures(), PRE)
    return read_images(torch.randn(8, 3, 32, 32, generator=generator(3)), PRE)


@pytest.mark.parametrize("name", VIEWS)
def test_shape_type_and_same_seed_same_bits(images, name):
    first = images.view(range(8), name, generator(1))
    assert first.shape == (8, 3, 32, 32)
    assert first.dtype == torch.float32
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(images.view(range(8), name, generator(1)), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["imagenet", "pad_crop", "patches"])
def test_random_views_differ_by_seed_and_by_image(images, name):
    first = images.view(range(8), name, generator(1))
    assert not torch.equal(images.view(range(8), name, generator(2)), first)
    same = images.view([0] * 8, name, generator(1))
    assert len({tuple(v.flatten().tolist()) for v in same}) > 4


def test_none_is_the_evaluation_view(images):
    assert torch.equal(images.view(range(8), "none", generator()), images.batch())


@pytest.mark.parametrize("name", VIEWS)
def test_views_never_normalise_twice(name):
    """A flat image has one right value whatever the crop: the evaluation's."""
    flat = np.full((4, 3, 40, 50), 200, np.uint8)
    images = read_images(flat, PRE)
    torch.testing.assert_close(images.view(range(4), name, generator()), images.batch(), rtol=0, atol=0)
    floats = read_images(torch.full((4, 3, 32, 32), 1.5), PRE)
    torch.testing.assert_close(floats.view(range(4), name, generator()), floats.batch(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pad_crop", "patches"])
def test_small_views_only_move_pixels(images, name):
    """Every value of a view occurs in that image's evaluation view."""
    for image, view in zip(images.batch(), images.view(range(8), name, generator()), strict=True):
        assert torch.isin(view, image).all()


def test_pad_crop_shifts_by_up_to_an_eighth_and_mirrors():
    ramp = torch.arange(32.0).expand(3, 32, 32).contiguous()
    images = read_images(ramp[None], Preprocessing((3, 32, 32), (0,) * 3, (1,) * 3))
    rows = images.view([0] * 200, "pad_crop", generator())[:, 0, 16]
    assert torch.equal(images.view([0] * 200, "pad_crop", generator())[:, 0, 0], rows)  # never turned
    steps = rows[:, 17] - rows[:, 16]
    shifts = torch.where(steps > 0, rows[:, 16] - 16, rows[:, 15] - 16)
    assert set(steps.tolist()) == {-1.0, 1.0}
    assert (shifts.min(), shifts.max()) == (-4, 4)
    upright = read_images(ramp.transpose(1, 2)[None].contiguous(), images.preprocessing)
    columns = upright.view([0] * 200, "pad_crop", generator())[:, 0, :, 16]
    assert (columns[:, 17] > columns[:, 16]).all()
    assert sorted(set((columns[:, 16] - 16).tolist())) == list(range(-4, 5))


def test_patches_reach_all_eight_orientations():
    image = torch.zeros(1, 1, 32, 32)
    image[..., :10, :] = 1  # an edge region, and a darker corner in it, tell orientations apart
    image[..., :10, :10] = 2
    images = read_images(image, Preprocessing((1, 32, 32), (0,), (1,)))
    views = images.view([0] * 200, "patches", generator())[:, 0]
    corners = {tuple(v[[8, 8, 23, 23], [8, 23, 8, 23]].tolist()) for v in views if v[16, 16] == 0}
    pure = {c for c in corners if sorted(c) == [0, 0, 1, 2]}
    assert len(pure) == 8


def test_patches_keep_the_shape_when_not_square():
    images = read_images(torch.randn(4, 3, 16, 32), Preprocessing((3, 16, 32), MEAN, STD))
    assert images.view([0] * 40, "patches", generator()).shape == (40, 3, 16, 32)


def test_resized_crops_cover_what_they_should():
    draws = torch.rand(2000, 41, generator=generator()).tolist()
    boxes = [crop_box(300, 400, d) for d in draws]
    shares = [h * w / 120_000 for _, _, h, w in boxes]
    ratios = [w / h for _, _, h, w in boxes]
    assert 0.078 < min(shares) < 0.1
    assert 0.9 < max(shares) <= 1
    assert RESIZED_CROP_RATIO[0] - 0.02 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < RESIZED_CROP_RATIO[1] + 0.02
    assert all(t >= 0 and le >= 0 and t + h <= 300 and le + w <= 400 for t, le, h, w in boxes)
    assert min(t for t, *_ in boxes) < 5
    assert max(t + h for t, _, h, _ in boxes) > 295
    assert min(le for _, le, _, _ in boxes) < 5
    assert max(le + w for _, le, _, w in boxes if w < 200) > 395


def test_resized_crops_are_mirrored_half_the_time():
    ramp = torch.arange(32.0).expand(1, 1, 32, 32).contiguous()
    images = read_images(ramp, Preprocessing((1, 32, 32), (0,), (1,)))
    views = images.view([0] * 200, "imagenet", generator())
    rising = (views[:, 0, 16, 31] > views[:, 0, 16, 0]).sum()
    assert 70 < rising < 130


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 90, (0, 38, 10, 13)), (90, 10, (38, 0, 13, 10)), (1, 1, (0, 0, 1, 1))]
)
def test_crop_of_a_strip_is_the_largest_central_one(height, width, box):
    assert crop_box(height, width, [0.9999] * 41) == box


def test_crop_sees_detail_that_the_evaluation_view_lost():
    """Crops come from the stored image, of higher resolution than the evaluation view."""
    stripes = np.zeros((1, 1, 64, 64), np.uint8)
    stripes[..., ::2] = 255  # vanish when halved
    images = read_images(stripes, Preprocessing((1, 32, 32), (0,), (1,)))
    assert images.batch().std() < 0.1
    assert images.view([0] * 20, "imagenet", generator()).std(dim=(1, 2, 3)).max() > 0.3


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_channels_stay(channels, interpolation):
    pre = Preprocessing((channels, 32, 32), (0.5,) * channels, (0.5,) * channels, None, interpolation)
    images = read_images(pictures(3, channels=channels), pre)
    for name in VIEWS:
        assert images.view(range(3), name, generator()).shape == (3, channels, 32, 32)


def test_channels_are_not_mixed_up():
    array = np.zeros((1, 3, 48, 48), np.uint8)
    array[:, 1], array[:, 2] = 100, 200
    images = read_images(array, Preprocessing((3, 32, 32), (0,) * 3, (1,) * 3))
    for name in VIEWS:
        view = images.view([0, 0, 0], name, generator()) * 255
        assert [view[:, c].unique().round().tolist() for c in range(3)] == [[0], [100], [200]]


def test_one_pixel_images():
    images = read_images([Image.new("L", (1, 1), 9)] * 2, Preprocessing((3, 1, 1), (0,) * 3, (1,) * 3))
    for name in VIEWS:
        assert (images.view([0, 1], name, generator()) * 255).round().unique().tolist() == [9]


def test_unknown_views_are_refused(images):
    with pytest.raises(InputError, match="found 'cifar', expected one of imagenet"):
        images.view([0], "cifar", generator())


@pytest.mark.parametrize("name", sorted(augment.MIXES))
@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 1, 8, 20), (6, 3, 4, 9, 8), (6, 3, 1, 1), (6, 7, 5)], ids=str)
def test_mixing_keeps_shape_and_type_and_follows_the_generator(name, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    before = images.clone()
    one, two = (augment.MIXES[name](images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(images, before)
    assert torch.equal(one, two)
    assert (one.shape, one.dtype) == (images.shape, images.dtype)
    assert bool(one.isfinite().all())
    assert torch.equal(one, images) is (name == "none")


def test_a_whirl_turns_by_any_angle_and_a_warp_by_little(monkeypatch):
    """A bright bar across: how far it is turned shows in its second moments, also where the picture is not square."""
    monkeypatch.setattr(augment, "_WARP_NOISE", 0.0)
    images = torch.zeros(200, 1, 41, 61)
    images[:, :, 18:23, 10:51] = 1
    across, down = torch.meshgrid(torch.arange(61) - 30.0, torch.arange(41) - 20.0, indexing="xy")
    largest = {}
    for name in ("warp", "whirl"):
        turned = augment.MIXES[name](images, torch.Generator().manual_seed(0))[:, 0]
        mean = turned.sum((1, 2))
        xx, yy, xy = ((turned * v).sum((1, 2)) / mean for v in (across**2, down**2, across * down))
        angles = (0.5 * torch.atan2(2 * xy, xx - yy)).rad2deg()
        largest[name] = float(angles.abs().max())
    assert 12 < largest["warp"] < 17
    assert largest["whirl"] > 80


def test_pictures_of_three_channels_are_given_other_colours_and_all_others_are_mixed_as_ever():
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = augment._recoloured(images, torch.Generator().manual_seed(2))
    assert found.amin() >= images.amin()
    assert found.amax() <= images.amax()
    grey = (found.amax(1) - found.amin(1)).flatten(1).amax(1) < 1e-6
    assert 0 < int(grey.sum()) < 20  # some of them, a tenth
    assert not torch.equal(found[0], found[1])
    one = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    vivid, both = (augment.MIXES[name](one, torch.Generator().manual_seed(3)) for name in ("vivid", "both"))
    assert torch.equal(vivid, both)
