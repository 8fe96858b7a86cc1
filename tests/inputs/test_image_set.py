import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from mimicut.base.errors import InputError
from mimicut.inputs import decode, image_sources, preprocessing
from mimicut.inputs import image_set as images_module
from mimicut.inputs.image_set import ImageSet, Preprocessing, Split, read_images, split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRE = Preprocessing((3, 32, 32), MEAN, STD, 36)
PLAIN = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
GREY = Preprocessing((1, 32, 32), (0.0,), (1.0,))


def noise(*shape: int, seed: int = 0, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def picture(height: int = 48, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, 3, seed=seed))


def levels(images: ImageSet) -> torch.Tensor:
    """The evaluation view back on the scale 0..255, for preprocessings that do not normalise."""
    return (images.batch() * 255).round()


def by_name(images: ImageSet) -> dict[str, torch.Tensor]:
    return dict(zip(images.names, levels(images), strict=True))


# Preprocessing


def test_preprocessing_survives_json():
    assert Preprocessing.from_json(PRE.to_json()) == PRE
    assert PRE.to_json()["input_size"] == [3, 32, 32]


def test_all_faults_stand_in_one_message():
    with pytest.raises(InputError) as caught:
        Preprocessing((3, 0, 2), (1.0,), (float("nan"),), 1, "cubic")
    for word in ("input_size: found (3, 0, 2)", "std: found (nan,)", "interpolation: found 'cubic'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mean": (123.7,) * 3}, "divide mean and std by 255"),
        ({"mean": (0.5,)}, "found 1 values, expected 3"),
        ({"std": (0.2, 0.0, 0.2)}, "numbers above 0"),
        ({"resize": 31}, "not below the larger"),
        ({"resize": 40.0}, "resize: found 40.0"),
        ({"input_size": (True, 32, 32)}, "three whole numbers"),
        ({"input_size": 32}, "three whole numbers"),
    ],
)
def test_preprocessing_refuses(change, word):
    with pytest.raises(InputError, match="checking the preprocessing") as caught:
        Preprocessing(**{**PRE.to_json(), **change})
    assert word in str(caught.value)


@pytest.mark.parametrize("data", [{}, {**PRE.to_json(), "crop": 1}, [1], None])
def test_preprocessing_from_nonsense(data):
    with pytest.raises(InputError, match="reading a preprocessing"):
        Preprocessing.from_json(data)


# The evaluation view


@pytest.mark.parametrize("size", [(48, 60), (36, 36), (71, 37), (500, 90), (20, 25)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_evaluation_view_is_torchvisions_bit_for_bit(tmp_path, size, mode):
    picture(*size).save(tmp_path / "a.png")
    standard = ImageClassification(crop_size=32, resize_size=36, interpolation=InterpolationMode(mode))
    images = read_images(tmp_path, Preprocessing((3, 32, 32), MEAN, STD, 36, mode))
    assert torch.equal(images.batch()[0], standard(Image.open(tmp_path / "a.png")))


def test_exact_resize_squashes():
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    got = levels(read_images(image, PLAIN))[0]
    assert got[:, 0, 0].tolist() == [255, 0, 0]
    assert got[:, 0, -1].tolist() == [0, 0, 255]


def test_large_images_are_held_small_and_stay_close(tmp_path):
    smooth = Image.fromarray(noise(12, 16, 3)).resize((1600, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "large.jpg", quality=95)
    smooth.save(tmp_path / "large.png")
    images = read_images(tmp_path, PLAIN)
    held = [i.stored.shape for i in images._images]
    assert held == [(3, 64, 85), (3, 64, 85)]
    jpg, png = levels(images)
    assert (jpg - png).abs().mean() < 1.5
    assert any("1 image(s) decoded at reduced size" in n for n in images.notes)
    assert not torch.equal(jpg, levels(read_images(Image.open(tmp_path / "large.jpg"), PLAIN))[0])  # of all its pixels


def test_too_many_for_memory_are_decoded_again(tmp_path):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    held, lazy = read_images(tmp_path, PRE), read_images(tmp_path, PRE, memory_bytes=12_000)
    assert [i.stored is None for i in lazy._images] == [False, True, True]
    assert torch.equal(held.batch(), lazy.batch())
    views = [s.view(range(3), "imagenet", torch.Generator().manual_seed(1)) for s in (held, lazy)]
    assert torch.equal(*views)
    picture(seed=9).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png again: it changed"):
        lazy.batch([1])


def test_images_that_only_measure_hold_what_is_evaluated(tmp_path):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    whole = read_images(tmp_path, PRE)
    lean = read_images(tmp_path, PRE, keep="evaluated")
    assert (lean.hashes, lean.contents) == (whole.hashes, whole.contents)
    one = 3 * 32 * 32
    assert [i.bytes for i in lean._images] == [one] * 3 < [i.bytes for i in whole._images]
    assert torch.equal(whole.batch(), lean.batch())
    views = [s.view(range(3), "imagenet", torch.Generator().manual_seed(1)) for s in (whole, lean)]
    assert torch.equal(*views)  # decoded again, as these are files
    some = read_images(tmp_path, PRE, keep="evaluated", memory_bytes=2 * one)
    assert (some.decoded_again(), some.decoded_again("stored")) == (1, 3)
    assert "1 image(s) decoded again at every use: too many to hold in memory" in some.notes
    assert torch.equal(whole.batch(), some.batch())
    with pytest.raises(InputError, match="found keep 'all'"):
        read_images(tmp_path, PRE, keep="all")


def test_a_set_holds_what_its_views_need_and_forgets_the_rest(tmp_path):
    for i in range(4):
        picture(seed=i).save(tmp_path / f"{i}.png")
    none, whole = read_images(tmp_path, PRE, memory_bytes=0), read_images(tmp_path, PRE)
    sizes = [i.bytes for i in whole._images]
    assert none.decoded_again() == 4
    held = none.keeping("imagenet", sum(sizes[:2]))
    assert [i.bytes for i in held._images] == [*sizes[:2], 0, 0]
    assert (held.names, held.contents) == (whole.names, whole.contents)
    assert [i.bytes for i in whole.keeping("pad_crop", 1 << 30)._images] == [3 * 32 * 32] * 4
    assert torch.equal(held.batch(), whole.batch())
    (tmp_path / "3.png").unlink()
    with pytest.raises(InputError, match=r"reading 3\.png again"):
        held.batch([3])


def test_arrays_are_held_whatever_the_room_but_not_twice():
    values = noise(3, 40, 40, 3)
    images = read_images(values, PRE, memory_bytes=0)
    assert images.decoded_again("stored") == 0
    lean = images.keeping(None, 0)
    assert [i.bytes for i in lean._images] == [3 * 32 * 32] * 3
    with pytest.raises(InputError, match="keep='stored'"):
        lean.view([0], "imagenet", torch.Generator())
    fits = read_images(noise(2, 32, 32, 3), Preprocessing((3, 32, 32), MEAN, STD))
    assert [i.bytes for i in fits._images] == [3 * 32 * 32] * 2  # stored and evaluated are the same pixels


# Files as people have them


def test_folder_any_nesting_sorted_hidden_ignored(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for i, name in enumerate(["z.png", "b/c/a.JPG", "b/d.webp", "a.bmp", "t.tiff", ".git/x.png", ".hidden.png"]):
        picture(seed=i).save(tmp_path / name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert read_images(tmp_path, PRE).names == ["a.bmp", "b/c/a.JPG", "b/d.webp", "t.tiff", "z.png"]


def test_content_counts_not_the_suffix(tmp_path):
    picture().save(tmp_path / "really.jpg", format="PNG")
    picture(seed=1).save(tmp_path / "none", format="BMP")
    (tmp_path / "README.txt").write_text("hello")
    images = read_images(tmp_path, PRE)
    assert images.names == ["none", "really.jpg"]
    assert images.skipped == []
    assert any("1 other file(s) in the folder ignored: “README.txt”" in n for n in images.notes)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise: the white upper half becomes the right half
    image.save(tmp_path / "a.png", exif=exif)
    got = levels(read_images(tmp_path, PLAIN))[0, 0]
    assert got[:, -1].tolist() == [255] * 32
    assert got[:, 0].tolist() == [0] * 32


def test_broken_exif_of_a_sound_picture(tmp_path):
    picture().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00rubbishrubbish")
    assert len(read_images(tmp_path, PRE)) == 1


def test_modes_become_rgb(tmp_path):
    orange = Image.new("RGB", (40, 40), (255, 128, 0))
    orange.quantize(4).save(tmp_path / "palette.png")
    orange.convert("CMYK").save(tmp_path / "cmyk.tif")
    orange.convert("RGBA").save(tmp_path / "opaque.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 128)).save(tmp_path / "half.png")
    orange.convert("L").save(tmp_path / "grey.png")
    Image.new("1", (40, 40), 1).save(tmp_path / "bit.png")
    images = read_images(tmp_path, PLAIN)
    found = {name: image[:, 5, 5].tolist() for name, image in by_name(images).items()}
    grey = [float(orange.convert("L").getpixel((0, 0)))] * 3
    assert found == {
        "bit.png": [255, 255, 255],
        "cmyk.tif": [255, 128, 0],
        "glass.png": [255, 255, 255],
        "grey.png": grey,
        "half.png": [127, 127, 127],
        "opaque.png": [255, 128, 0],
        "palette.png": [255, 128, 0],
    }
    assert any(n.startswith("2 image(s) with transparency") for n in images.notes)
    assert any(n.startswith("2 image(s) in grey: repeated") for n in images.notes)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "f.tif")
    expected = torch.from_numpy(np.rint(ramp / 257)).float()
    for image in levels(read_images(tmp_path, GREY)):
        assert torch.equal(image[0], expected)


def test_first_frame_of_several(tmp_path):
    red, blue = (Image.new("RGB", (40, 40), c) for c in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    red.save(tmp_path / "a.tif", save_all=True, append_images=[blue])
    images = read_images(tmp_path, PLAIN)
    assert [i[:, 0, 0].tolist() for i in levels(images)] == [[255, 0, 0]] * 2
    assert any("2 image(s) with several frames" in n for n in images.notes)


def test_colour_becomes_grey_for_one_channel():
    image = Image.new("RGB", (40, 40), (255, 0, 0))
    assert levels(read_images(image, GREY)).unique().tolist() == [76]  # ITU-R 601: 0.299 * 255


def test_many_channels_from_bands_and_pages(tmp_path):
    four = Preprocessing((4, 32, 32), (0.0,) * 4, (1.0,) * 4)
    Image.new("RGBA", (40, 40), (1, 2, 3, 4)).save(tmp_path / "bands.png")
    pages = [Image.new("L", (40, 40), c) for c in (10, 20, 30, 40)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    picture().save(tmp_path / "rgb.png")
    images = read_images(tmp_path, four)
    assert [i[:, 0, 0].tolist() for i in levels(images)] == [[1, 2, 3, 4], [10, 20, 30, 40]]
    assert images.skipped[0][0] == "rgb.png"
    assert "found 3 channel(s)" in images.skipped[0][1]
    assert levels(read_images(noise(2, 7, 32, 32), Preprocessing((7, 32, 32), (0,) * 7, (1,) * 7))).shape == (
        2,
        7,
        32,
        32,
    )


# Broken files


def broken(folder: Path) -> None:
    picture().save(folder / "good.jpg")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("hello")
    (folder / "zero.png").touch()
    (folder / "gone.png").symlink_to(folder / "nothing")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    )
    Image.new("RGB", (900, 2)).save(folder / "strip.png")


def test_broken_files_are_named_and_skipped(tmp_path):
    broken(tmp_path)
    images = read_images(tmp_path, PRE)
    assert images.names == ["good.jpg"]
    reasons = dict(images.skipped)
    expected = {
        "bomb.png": "bomb",
        "gone.png": "a broken link",
        "strip.png": "found 900x2 pixels",
        "text.jpg": "not an image inside",
        "truncated.jpg": "truncated",
        "zero.png": "0 bytes",
    }
    assert reasons.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in reasons.items())
    assert any("6 image(s) skipped" in n for n in images.notes)


def test_none_readable_names_folder_count_and_reasons(tmp_path):
    broken(tmp_path)
    (tmp_path / "good.jpg").unlink()
    with pytest.raises(InputError) as caught:
        read_images(tmp_path, PRE)
    for word in (str(tmp_path), "looked at 6 file(s)", "gone.png: no regular file", "; ...", "JPEG, PNG"):
        assert word in str(caught.value)


def test_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(InputError, match="looked at 0 file"):
        read_images(tmp_path, PRE)
    with pytest.raises(InputError, match="is no file or folder"):
        read_images(tmp_path / "nothing", PRE)


def test_pillows_warnings_stay_inside(tmp_path, monkeypatch, recwarn):
    picture(48, 60).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns above this, and refuses above twice this
    assert len(read_images(tmp_path, PRE)) == 1
    assert not recwarn.list


def test_small_flat_and_few_are_said(tmp_path):
    picture(10, 20).save(tmp_path / "small.png")
    Image.new("RGB", (50, 50), "red").save(tmp_path / "flat.png")
    notes = read_images(tmp_path, PRE).notes
    assert any(n == "1 image(s) smaller than the teacher's 32x32: enlarged; the smallest is 20x10" for n in notes)
    assert any(n == "1 image(s) of one flat colour" for n in notes)
    assert any(n.startswith("only 2 image(s)") for n in notes)


def test_duplicates_by_pixels_hashes_by_bytes(tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.bmp")
    picture(seed=1).save(tmp_path / "c.png")
    images = read_images(tmp_path, PRE)
    assert images.duplicates == [("b.bmp", "a.png")]
    assert len(set(images.hashes)) == 3
    assert all(len(h) == 64 for h in images.hashes)
    other = read_images([picture(seed=1), picture(seed=2)], PRE)
    assert images.shared_with(other) == [("c.png", "image 0")]


# Arrays


def test_integer_arrays_either_way_round_equal_files(tmp_path):
    array = noise(4, 48, 60, 3)
    for i, image in enumerate(array):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    expected = read_images(tmp_path, PRE).batch()
    nhwc, nchw = read_images(array, PRE), read_images(torch.from_numpy(array).permute(0, 3, 1, 2), PRE)
    assert torch.equal(nhwc.batch(), expected)
    assert torch.equal(nchw.batch(), expected)
    assert not nhwc.floats
    assert nhwc.names == ["image 0", "image 1", "image 2", "image 3"]


def test_float_arrays_pass_untouched():
    array = torch.randn(4, 3, 32, 32)
    images = read_images(array, PRE)
    assert images.floats
    assert torch.equal(images.batch(), array)
    assert torch.equal(read_images(array.double().numpy(), PRE).batch(), array)
    array[0] = 7
    assert not (images.batch()[0] == 7).any()  # the set holds its own copy


def test_a_grey_stack():
    stack = noise(5, 28, 28)
    assert torch.equal(read_images(stack, GREY).batch(), read_images(stack[:, None], GREY).batch())


def test_sixteen_bit_array():
    array = noise(3, 1, 32, 32, dtype=np.uint16)
    expected = torch.from_numpy(np.rint(array / 257)).float()
    assert torch.equal(levels(read_images(array, GREY)), expected)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (torch.zeros(4, 3, 33, 32), ("found floating point of shape (3, 33, 32)", "expected (3, 32, 32)")),
        (torch.zeros(4, 32, 32, 3), ("found floating point of shape (32, 32, 3)",)),
        (torch.zeros(4, 1, 32, 32), ("(1, 32, 32)", "expected (3, 32, 32)")),
        (noise(4, 3, 40, 3), ("both fit",)),
        (noise(4, 7, 40, 40), ("found an image of shape (7, 40, 40)",)),
        (noise(3, 40, 40), ("found shape (3, 40, 40)", "array[None]")),
        (noise(0, 3, 40, 40), ("found shape (0, 3, 40, 40)",)),
        (torch.zeros(4, 3, 32, 32, dtype=torch.int64), ("found int64", "uint8")),
        (np.zeros((3, 3, 32, 32), bool), ("found bool",)),
        (np.full((3, 3, 32, 32), 1e300), ("NaN or infinite",)),
    ],
)
def test_arrays_that_break_the_contract(array, words):
    with pytest.raises(InputError) as caught:
        read_images(array, PRE)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nan_names_the_image():
    array = torch.zeros(4, 3, 32, 32)
    array[2, 1, 3, 4] = float("nan")
    with pytest.raises(InputError, match=r"image 2 \(from 0\).*1 NaN"):
        read_images(array, PRE)


def test_floats_that_look_wrong_are_said():
    def warned(array: torch.Tensor, pre: Preprocessing = PRE) -> bool:
        return any("check that they are normalised" in n for n in read_images(array, pre).notes)

    torch.manual_seed(0)
    assert warned(torch.rand(3, 3, 32, 32))
    assert warned(torch.rand(3, 3, 32, 32) * 255)
    assert not warned(torch.randn(3, 3, 32, 32))
    assert not warned(torch.rand(3, 3, 32, 32), PLAIN)


def test_array_files(tmp_path):
    from safetensors.torch import save_file

    array = noise(3, 40, 40, 3)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "named.npz", images=array, more=array)
    np.savez(tmp_path / "alone.npz", x=array, labels=np.zeros(3))
    save_file({"x": torch.from_numpy(array)}, tmp_path / "a.safetensors")
    expected = read_images(array, PRE).batch()
    for name in ("a.npy", "named.npz", "alone.npz", "a.safetensors"):
        assert torch.equal(read_images(tmp_path / name, PRE).batch(), expected), name


@pytest.mark.parametrize("name", ["objects.npy", "two.npz", "text.npy", "x.pt", "zero.npz", "cut.safetensors"])
def test_array_files_that_are_refused(tmp_path, name):
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678{")
    (tmp_path / "x.pt").touch()
    (tmp_path / "zero.npz").touch()
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=noise(2, 3, 40, 40), b=noise(2, 3, 40, 40))
    with pytest.raises(InputError, match=f"{name}: "):
        read_images(tmp_path / name, PRE)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_an_array_file_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.array([Bomb()], object), allow_pickle=True)
    np.savez("a.npz", images=np.array([Bomb()], object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match="pickled objects"):
            read_images(name, PRE)
    assert not Path("exploded").exists()


# Datasets


class Untouchable:
    """A label that notices when somebody looks at it."""

    def __getattribute__(self, name):
        raise AssertionError("a label was read")


class Pairs:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


@pytest.mark.parametrize(
    "wrap", [lambda i: (i, Untouchable()), lambda i: [i, 3], lambda i: {"image": i, "label": Untouchable()}]
)
def test_datasets_labels_are_never_touched(wrap):
    pictures = [picture(seed=i) for i in range(3)]
    images = read_images(Pairs([wrap(p) for p in pictures]), PRE)
    assert torch.equal(images.batch(), read_images(np.stack(pictures), PRE).batch())


def test_a_list_of_anything(tmp_path):
    picture().save(tmp_path / "a.png")
    array = np.array(picture())
    items = [tmp_path / "a.png", str(tmp_path / "a.png"), picture(), array, torch.from_numpy(array).permute(2, 0, 1)]
    batch = read_images(items, PRE).batch()
    assert len(batch) == 5
    assert all(torch.equal(image, batch[0]) for image in batch)


def test_a_dataset_of_preprocessed_tensors():
    array = torch.randn(4, 3, 32, 32)
    images = read_images(torch.utils.data.TensorDataset(array, torch.zeros(4)), PRE)
    assert images.floats
    assert torch.equal(images.batch(), array)


def test_a_dataset_item_that_fails_is_skipped():
    images = read_images(Pairs([picture(), OSError("disk")]), PRE)
    assert images.skipped == [("image 1", "OSError: disk")]
    assert images.names == ["image 0"]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (Pairs([OSError("disk")]), "looked at 1 item"),
        (Pairs([{"x": 1}]), "found a dict of ['x']"),
        (Pairs([7]), "found a int"),
        (Pairs([picture(), torch.zeros(3, 32, 32)]), "expected all of one kind"),
        (iter([1]), "expected a path"),
        ({"a": 1}, "expected a path"),
        (None, "found a NoneType"),
        (torch.utils.data.DataLoader([1]), "for a loader, give its dataset"),
    ],
)
def test_sources_that_are_refused(source, word):
    with pytest.raises(InputError) as caught:
        read_images(source, PRE)
    assert word in str(caught.value)


# The set and its split


def numbered(n: int) -> ImageSet:
    return read_images(torch.arange(float(n))[:, None, None, None].expand(n, 3, 32, 32).contiguous(), PRE)


def test_subset_keeps_the_order_asked_for():
    images = numbered(5)
    assert images.subset([3, 1]).batch()[:, 0, 0, 0].tolist() == [3, 1]
    assert images.batch([4, 0])[:, 0, 0, 0].tolist() == [4, 0]
    assert images.batch([]).shape == (0, 3, 32, 32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_in_a_list_is_skipped(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    found = read_images([tmp_path / "pipe.png", tmp_path / "a.png"], PRE)
    assert len(found) == 1
    assert any("pipe.png is no file" in note for note in found.notes)


def test_split_of_fifty():
    parts = split(numbered(50), seed=1)
    assert (len(parts.fit), len(parts.choose), len(parts.held_out)) == (35, 5, 10)
    assert sorted(parts.fit + parts.choose + parts.held_out) == list(range(50))


def test_split_depends_on_the_seed_only():
    torch.manual_seed(5)
    first, other = split(numbered(50), seed=1), split(numbered(50), seed=2)
    state = torch.get_rng_state()
    assert split(numbered(50), seed=1) == first != other
    assert torch.equal(torch.get_rng_state(), state)


def test_three_images_work_and_say_what_they_prove():
    parts = split(numbered(3), seed=0)
    assert [len(parts.fit), len(parts.choose), len(parts.held_out)] == [1, 1, 1]
    assert "no more than 2%" in parts.notes[0]
    assert split(numbered(50), seed=0).notes == []


@pytest.mark.parametrize(
    ("n", "shares", "sizes"),
    [
        (1, (0, 0), (1, 0, 0)),
        (2, (0.2, 0), (1, 0, 1)),
        (50, (0, 0), (50, 0, 0)),
        (50, (0, 0.1), (45, 5, 0)),
        (3, (0.9, 0.05), (1, 1, 1)),
    ],
)
def test_split_shares(n, shares, sizes):
    parts = split(numbered(n), seed=0, held_out_share=shares[0], choose_share=shares[1])
    assert (len(parts.fit), len(parts.choose), len(parts.held_out)) == sizes


def test_duplicates_never_cross_parts_nor_count_twice():
    images = read_images(torch.arange(40.0)[:, None, None, None].remainder(10).expand(40, 3, 32, 32).contiguous(), PRE)
    for seed in range(5):
        parts = split(images, seed=seed)
        contents = [{i % 10 for i in part} for part in (parts.fit, parts.choose, parts.held_out)]
        assert not contents[0] & contents[1]
        assert not (contents[0] | contents[1]) & contents[2]
        assert len(parts.held_out) == len(contents[2]) == 2
        assert len(parts.fit) == 4 * len(contents[0])


@pytest.mark.parametrize(
    ("n", "shares", "word"),
    [
        (2, (0.2, 0.1), "found 2 distinct of 2, expected at least 3"),
        (1, (0.2, 0), "expected at least 2"),
        (9, (1.0, 0), "shares of at least 0"),
        (9, (0.6, 0.5), "add up to less than 1"),
        (9, (float("nan"), 0), "shares of at least 0"),
        (9, (-0.1, 0), "shares of at least 0"),
    ],
)
def test_split_refuses(n, shares, word):
    with pytest.raises(InputError) as caught:
        split(numbered(n), seed=0, held_out_share=shares[0], choose_share=shares[1])
    assert word in str(caught.value)


def test_copies_of_one_image_cannot_be_split():
    with pytest.raises(InputError, match="found 1 distinct of 9"):
        split(read_images(torch.zeros(9, 3, 32, 32), PRE), seed=0)


def test_split_is_plain_data():
    assert Split([0], [1], [2]) == Split([0], [1], [2])


@pytest.mark.parametrize(
    "module", [images_module, image_sources, decode, preprocessing], ids=lambda module: module.__name__
)
def test_the_modules_import_no_network_and_no_timm(module):
    source = Path(module.__file__).read_text()
    for word in ("urllib", "requests", "timm", "torchvision.models", "torchvision.datasets", "huggingface"):
        assert f"import {word}" not in source
        assert f"from {word}" not in source


# What comes from anyone


def test_an_array_of_no_pixels_is_named(tmp_path):
    for kind in ("datetime64[s]", "timedelta64[s]", "U3", "V4"):
        np.save(tmp_path / "a.npy", np.zeros((3, 3, 32, 32), kind))
        with pytest.raises(InputError, match="expected uint8"):
            read_images(tmp_path / "a.npy", PLAIN)


@pytest.mark.parametrize("tensor", [torch.zeros(3, 3, 32, 32).to_sparse(), torch.zeros(3, 3, 32, 32, device="meta")])
def test_a_tensor_without_plain_numbers_is_named(tensor):
    with pytest.raises(InputError, match="expected plain numbers"):
        read_images(tensor, PLAIN)


def test_an_array_of_long_strips_is_named():
    with pytest.raises(InputError, match=r"image 0 .*found 900x2 pixels"):
        read_images(np.zeros((3, 2, 900, 3), np.uint8), PLAIN)


@pytest.mark.parametrize("path", ["", "a" * 300, "a/" * 3000, "a\0b"])
def test_what_cannot_be_a_path_is_named(path):
    with pytest.raises(InputError, match=r"reading images: .*(empty name|cannot be a path)"):
        read_images(path, PLAIN)


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be a path"):
        read_images(tmp_path / "a", PLAIN)


def test_links_to_folders_outside_are_not_followed(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for i, place in enumerate(["in/a.png", "in/deep/b.png", "out/c.png"]):
        picture(seed=i).save(tmp_path / place)
    (tmp_path / "in" / "away").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "self").symlink_to("/proc/self")
    (tmp_path / "whole").symlink_to(tmp_path / "in")
    for folder in ("in", "whole"):  # the folder itself may be a link
        images = read_images(tmp_path / folder, PLAIN)
        assert images.names == ["a.png", "deep/b.png"]
        assert sorted(name for name, reason in images.skipped if "outside" in reason) == ["away", "self"]


def test_a_file_that_goes_while_it_is_read_is_skipped(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    read = decode.Reader.file

    def file(self, path, name):
        try:
            return read(self, path, name)
        finally:
            if name == "b.png":
                path.unlink()

    monkeypatch.setattr(decode.Reader, "file", file)
    images = read_images(tmp_path, PLAIN)
    assert (images.names, [name for name, _ in images.skipped]) == (["a.png"], ["b.png"])


def test_an_array_file_is_mapped_and_a_compressed_one_bounded(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", noise(3, 3, 32, 32))
    (values,) = image_sources.read_arrays(tmp_path / "a.npy").values()
    assert isinstance(values, np.memmap)
    assert torch.equal(levels(read_images(tmp_path / "a.npy", PLAIN)), torch.from_numpy(values.copy()).float())
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 3, 32, 32), np.uint8))
    assert len(read_images(tmp_path / "a.npz", PLAIN)) == 100
    monkeypatch.setattr(image_sources.memory, "bound", lambda: 300_000)
    with pytest.raises(InputError, match="arrays larger than the 300,000 bytes"):
        read_images(tmp_path / "a.npz", PLAIN)


def test_a_picture_of_too_many_pixels_is_skipped_before_it_is_decoded(tmp_path):
    picture().save(tmp_path / "a.png")
    Image.new("1", (7000, 7000)).save(tmp_path / "b.png")
    images = read_images(tmp_path, PLAIN)
    assert images.names == ["a.png"]
    assert "7000x7000 pixels, expected at most" in images.skipped[0][1]
