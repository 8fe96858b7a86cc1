"""Extra images: drawn ones, given ones, their colours and crops, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from mimicut.base.errors import InputError
from mimicut.inputs.extra_images import GENERATED, MOST_BYTES, NONE, _crops, read_extra
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing

GREY = Preprocessing((1, 16, 16), (0.5,), (0.25,), None, "bilinear")
COLOUR = Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 36, "bicubic")
ROOM = 2**30


def few_of(preprocessing: Preprocessing, images: int = 6):
    pixels = np.random.RandomState(0).randint(60, 180, (images, *preprocessing.input_size)).astype(np.uint8)
    return read_images(pixels, preprocessing)


def scenes(folder, count: int = 3):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        y, x = np.mgrid[0:150, 0:200]
        pixels = np.stack([(x * (number + 1)) % 256, (y * 2) % 256, (x + y) % 256], 2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def views_of(extra, views: str, count: int = 40) -> torch.Tensor:
    return extra.view(range(min(count, len(extra))), views, torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("preprocessing", "views"), [(GREY, "patches"), (COLOUR, "imagenet"), (COLOUR, "pad_crop")])
@pytest.mark.parametrize("source", ["drawn", "given"])
def test_extra_images_take_the_colours_of_the_few(tmp_path, preprocessing, views, source):
    few = few_of(preprocessing)
    found = GENERATED if source == "drawn" else scenes(tmp_path / "scenes")
    extra = read_extra(found, few, views, seed=1, memory_bytes=ROOM, most=200)
    made, own = views_of(extra, views), few.batch()
    assert made.shape[1:] == preprocessing.input_size
    assert made.min() >= own.min()
    assert made.max() <= own.max()
    wanted = own.std((2, 3), correction=0).median(0).values
    found = made.std((2, 3), correction=0).median(0).values
    assert torch.allclose(found, wanted, rtol=0.3)
    assert torch.allclose(made.mean((2, 3)).median(0).values, own.mean((2, 3)).median(0).values, atol=0.4)


def test_small_inputs_get_crops_of_all_sizes(tmp_path):
    extra = read_extra(scenes(tmp_path / "scenes"), few_of(GREY), "patches", seed=1, memory_bytes=ROOM)
    assert len(extra) == 2000
    assert len(extra.pictures) == 3
    assert len(set(extra.images.contents)) > 1500


def test_each_picture_gives_as_many_crops_as_any_other():
    shades = [np.full((40, 40, 3), 20 * number, np.uint8) for number in range(1, 8)]
    made = _crops((shade.transpose(2, 0, 1) for shade in shades), 7, 30, COLOUR, 1)
    found = np.unique(made.reshape(30, -1).mean(1), return_counts=True)
    assert found[0].tolist() == [20.0 * number for number in range(1, 8)]
    assert sorted(found[1].tolist()) == [4] * 5 + [5] * 2


def test_of_a_large_folder_the_report_says_how_much_was_used(tmp_path, monkeypatch):
    monkeypatch.setattr("mimicut.inputs.extra_images.MOST", 3)
    extra = read_extra(scenes(tmp_path / "scenes", 7), few_of(COLOUR), "imagenet", seed=1, memory_bytes=ROOM)
    assert len(extra) == 3
    assert extra.pictures.notes == [f"3 of the 7 pictures in “{tmp_path / 'scenes'}” are used"]


def test_a_set_without_images_is_refused():
    with pytest.raises(InputError, match="found a set without images"):
        read_extra(few_of(COLOUR).subset([]), few_of(COLOUR), "imagenet", seed=1, memory_bytes=ROOM)


def test_other_inputs_get_whole_pictures(tmp_path):
    extra = read_extra(scenes(tmp_path / "scenes"), few_of(COLOUR), "imagenet", seed=1, memory_bytes=ROOM)
    assert len(extra) == len(extra.pictures) == 3


def test_a_network_of_other_channels_gets_as_many():
    five = Preprocessing((5, 16, 16), (0.5,) * 5, (0.25,) * 5, None, "bilinear")
    made = views_of(read_extra(GENERATED, few_of(five), "none", seed=1, memory_bytes=ROOM, most=9), "none")
    assert made.shape[1:] == (5, 16, 16)


def test_the_memory_and_the_steps_bound_how_many():
    large = Preprocessing((3, 64, 64), (0.5,) * 3, (0.25,) * 3, None, "bilinear")
    assert len(read_extra(GENERATED, few_of(large, 2), "none", seed=1, memory_bytes=ROOM, most=7)) == 7
    extra = read_extra(GENERATED, few_of(large, 2), "pad_crop", seed=1, memory_bytes=100 * 3 * 64 * 64)
    assert len(extra) == 100
    assert MOST_BYTES // (3 * 224 * 224) > 400  # at the sizes of ImageNet there is room for some hundreds


def test_images_that_came_as_floats_have_extra_ones_in_their_own_units():
    values = 3 + 0.1 * torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    extra = read_extra(GENERATED, read_images(values, GREY), "none", seed=1, memory_bytes=ROOM, most=40)
    made = views_of(extra, "none")
    assert made.min() >= values.min()
    assert made.max() <= values.max()


def test_floats_of_the_networks_size_are_taken_as_they_are_and_others_refused():
    values = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert len(read_extra(values, few_of(GREY), "patches", seed=1, memory_bytes=ROOM)) == 4
    with pytest.raises(InputError, match=r"expected \(1, 16, 16\)"):
        read_extra(torch.randn(4, 1, 24, 24), few_of(GREY), "patches", seed=1, memory_bytes=ROOM)


def test_a_set_that_was_read_for_another_network_is_refused(tmp_path):
    other = read_images(scenes(tmp_path / "scenes"), COLOUR)
    with pytest.raises(InputError, match="teacher's preprocessing"):
        read_extra(other, few_of(GREY), "patches", seed=1, memory_bytes=ROOM)
    assert len(read_extra(other, few_of(COLOUR), "imagenet", seed=1, memory_bytes=ROOM)) == 3


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_any_seed_of_a_recipe_will_do(tmp_path, seed):
    for source in (scenes(tmp_path / "scenes"), GENERATED):
        assert len(read_extra(source, few_of(GREY), "patches", seed=seed, memory_bytes=ROOM)) == 2000


def test_an_empty_name_is_not_the_folder_here():
    with pytest.raises(InputError, match="empty name"):
        read_extra("", few_of(GREY), "patches", seed=1, memory_bytes=ROOM)


def test_of_a_large_folder_as_many_are_read_as_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr("mimicut.inputs.extra_images.MOST", 4)
    extra = read_extra(scenes(tmp_path / "scenes", 9), few_of(GREY), "patches", seed=1, memory_bytes=ROOM)
    assert len(extra) == len(extra.pictures) == 4
    assert [name.rsplit("/", 1)[1] for name in extra.pictures.names] == ["0.png", "2.png", "4.png", "6.png"]


def test_pictures_that_cannot_be_read_are_noted_and_the_number_of_others_is_not(tmp_path):
    scenes(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    notes = read_extra(tmp_path, few_of(GREY), "patches", seed=1, memory_bytes=ROOM).pictures.notes
    assert len(notes) == 1
    assert "broken.png" in notes[0]


def test_several_folders_and_files_are_read_together(tmp_path):
    source = [scenes(tmp_path / "one", 3), str(scenes(tmp_path / "two", 2)), tmp_path / "one" / "0.png"]
    extra = read_extra(source, few_of(GREY), "patches", seed=1, memory_bytes=ROOM)
    assert len(extra.pictures) == 6
    assert extra.pictures.notes == []


def test_none_means_none():
    assert read_extra(NONE, few_of(GREY), "patches", seed=1, memory_bytes=ROOM) is None


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="extra images, which can be of anything"):
        read_extra(tmp_path, few_of(GREY), "patches", seed=1, memory_bytes=ROOM)


def test_flat_pictures_are_not_stretched(tmp_path):
    Image.new("RGB", (100, 100), (10, 200, 30)).save(tmp_path / "flat.png")
    extra = read_extra(tmp_path, few_of(COLOUR), "imagenet", seed=1, memory_bytes=ROOM)
    assert views_of(extra, "imagenet").std((2, 3)).max() < 1e-4
