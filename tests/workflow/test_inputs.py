"""Networks that take several inputs, volumes or clips, through `compress`, and their samples."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from torch import nn

import mimicut
from mimicut.base.errors import InputError
from mimicut.inputs.input_source import Inputs, InputSource, inputs_of
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.inputs.volumes import read_volumes
from mimicut.results.store import read
from mimicut.workflow.verify import verify_folder

FAST = replace(mimicut.preset("default", views="none"), steps=2)


class Body(nn.Module):
    def __init__(self, channels, width=8, kind=2):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if kind == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.a, self.n, self.b = conv(channels, width, 3, padding=1, bias=False), norm(width), conv(width, 6, 3)

    def forward(self, x):
        return self.b(self.n(self.a(x)).relu()).relu().flatten(2).mean(2)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = Body(4), nn.Linear(6, 5)

    def forward(self, image, mask):
        return self.fc(self.body(torch.cat([image, mask], 1)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = Body(3), nn.Linear(12, 5)

    def forward(self, left, right):
        return self.fc(torch.cat([self.body(left), self.body(right)], 1))


class Numbers(nn.Module):
    """An image and numbers that are not learned from pictures; the second has a default."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = Body(3), nn.Linear(6 + 2, 5)

    def forward(self, image, numbers=None):
        return self.fc(torch.cat([self.body(image), numbers], 1))


class Volume(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.body, self.fc = Body(channels, kind=3), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.body(x))


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES, MASKS, NUMBERS = values(8, 3, 8, 8), values(8, 1, 8, 8, seed=1), values(8, 2, seed=2)
LEFT = values(8, 3, 8, 8, seed=5)


class Samples(torch.utils.data.Dataset):
    """Dictionaries with more in them than the network takes; what is no input is never read."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"label": "not read", "image": IMAGES[index], "mask": MASKS[index].numpy()}


SEVERAL = {
    "source by name": (Masked, lambda: InputSource({"image": IMAGES, "mask": MASKS}), None),
    "dictionaries": (Masked, Samples, None),
    "tuples, with labels": (Pair, lambda: [(a, b, 3) for a, b in zip(IMAGES, LEFT, strict=True)], None),
    "by an example": (
        Numbers, lambda: [{"image": a, "numbers": b} for a, b in zip(IMAGES, NUMBERS, strict=True)],
        ((), {"image": IMAGES[:2], "numbers": NUMBERS[:2]}),
    ),
    "volumes": (Volume, lambda: values(8, 1, 5, 6, 7), None),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_networks_with_other_inputs_go_the_whole_way(name, tmp_path):
    kind, samples, example = SEVERAL[name]
    model = kind().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    result = mimicut.compress(
        model, samples(), keep=0.6, config=FAST, folder=tmp_path / "small", example=example, max_memory=3 * 10**9
    )
    assert result.report.macs_student < result.report.macs_teacher
    assert result.report.images_few + result.report.images_held_out <= 8
    assert 0 <= result.report.feature_error_relative < 2
    assert any("without random variants" in note for note in result.report.notes)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    again = mimicut.load(tmp_path / "small", kind)
    source = result.plan.call["inputs"]
    args = tuple(torch.zeros(2, *shape) for name, shape, _ in source if name is None)
    kwargs = {name: torch.zeros(2, *shape) for name, shape, _ in source if name is not None}
    assert torch.equal(again(*args, **kwargs), result.model(*args, **kwargs))
    assert "It takes" in (tmp_path / "small" / "README.md").read_text()


def test_a_result_is_verified_on_samples(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.fc = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)\n"
        "    def forward(self, image, mask):\n"
        "        y = self.b(self.a(torch.cat([image, mask], 1)).relu()).relu()\n"
        "        return self.fc(y.mean((2, 3)))\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    np.savez(tmp_path / "few.npz", image=IMAGES.numpy(), mask=MASKS.numpy(), label=np.arange(8))
    named = f"{tmp_path}/net.py:build"
    teacher = mimicut.load_teacher(named)
    mimicut.compress(teacher, tmp_path / "few.npz", keep=0.6, config=FAST, folder=tmp_path / "small")
    others = InputSource({"image": values(6, 3, 8, 8, seed=8), "mask": values(6, 1, 8, 8, seed=9)})
    report = verify_folder(tmp_path / "small", others, teacher=named)
    assert report.images_held_out == 6
    assert read(tmp_path / "small")[0].call["inputs"] == [
        ["image", [3, 8, 8], "float32"],
        ["mask", [1, 8, 8], "float32"],
    ]
    with pytest.raises(InputError, match="takes other inputs than a batch of images"):
        mimicut.export_folder(tmp_path / "small", ["pt2"], teacher=named)
    np.savez(tmp_path / "other.npz", few=IMAGES.numpy(), other=MASKS.numpy())
    with pytest.raises(InputError, match="found few, other, expected the network's inputs: image, mask"):
        verify_folder(tmp_path / "small", tmp_path / "other.npz", teacher=named)


def test_every_sample_certifies_once():
    source = InputSource({"image": IMAGES[:6], "mask": MASKS[:6]})
    result = mimicut.crossfit(Masked().eval(), source, 2, keep=0.6, config=replace(FAST, steps=1))
    assert (result.report.crossfit, result.report.images_held_out, result.report.images_few) == (2, 6, 6)


def test_a_pruned_student_of_several_inputs_is_refused_with_the_way_out():
    source = InputSource({"image": IMAGES, "mask": MASKS})
    with pytest.raises(InputError, match="no program is written; call"):
        mimicut.recover_pruned(Masked().eval(), Masked().eval(), source)


def test_volumes_by_the_command_line(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.fc = nn.Conv3d(1, 8, 3), nn.Conv3d(8, 6, 3), nn.Linear(6, 5)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3, 4)))\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    np.save(tmp_path / "few.npy", values(8, 1, 7, 6, 6).numpy())
    code, line, err = call(
        capsys, "compress", f"{tmp_path}/net.py:build", tmp_path / "few.npy", "--keep", "0.6", "--effort", "quick",
        "--out", tmp_path / "small",
    )  # fmt: skip
    assert code == 0, err
    assert line["images_held_out"] == 2
    code, line, err = call(
        capsys, "verify", tmp_path / "small", tmp_path / "few.npy", "--teacher", f"{tmp_path}/net.py:build"
    )
    assert code == 0, err


def test_what_a_source_gives():
    pairs = InputSource([(IMAGES[i], NUMBERS[i].double().numpy(), i) for i in range(5)], keys=2)
    (images, numbers), named = pairs.batch([3, 1])
    assert torch.equal(images, IMAGES[[3, 1]])
    assert torch.equal(numbers, NUMBERS[[3, 1]])
    assert named == {}
    assert torch.equal(InputSource(IMAGES).batch(), IMAGES)
    doubled = InputSource({"x": torch.cat([IMAGES, IMAGES[:1]])})
    assert doubled.duplicates == [("sample 8", "sample 0")]
    assert len(doubled.distinct()) == 8
    assert doubled.subset([8, 2]).names == ["sample 8", "sample 2"]
    assert mimicut.split(doubled, seed=0, choose_share=0.0).held_out


@pytest.mark.parametrize(
    ("samples", "keys", "words"),
    [
        ([], None, "found none"),
        ([(IMAGES[0], MASKS[0]), (IMAGES[0], IMAGES[0])], None, r"sample 1: found .* expected what sample 0 has"),
        ({"a": IMAGES, "b": MASKS[:2]}, None, "'a': 8, 'b': 2"),
        ([{"a": IMAGES[0]}], ["a", "b"], "found a, expected a, b"),
        ([IMAGES[0]], 2, "the network takes 2 inputs; expected a dictionary or a tuple"),
        ([(IMAGES[0],)], 2, "found 1 inputs, expected 2"),
        ([(IMAGES[0], "text")], None, "input 1 of sample 0: found a str"),
        ([torch.tensor([float("nan")])], None, "NaN or infinite"),
        (iter([1]), None, "for a loader, give its dataset"),
    ],
)
def test_samples_that_cannot_be_used(samples, keys, words):
    with pytest.raises(InputError, match=words):
        InputSource(samples, keys=keys)


def test_which_inputs_a_network_takes():
    assert inputs_of(Masked(), None) == Inputs(["image", "mask"])
    assert inputs_of(Numbers(), None) is None
    assert inputs_of(Volume(), None) == Inputs(1)
    assert inputs_of(Body(3), None) is None
    assert inputs_of(Volume(), ((torch.zeros(2, 1, 4, 8, 8),), {})) == Inputs(1, 4)
    assert inputs_of(Body(3), ((), {"x": torch.zeros(2, 3, 8, 8), "flag": True})) is None


def test_what_samples_cannot_be_asked():
    source = InputSource({"image": IMAGES, "mask": MASKS})
    with pytest.raises(InputError, match="leave them out"):
        mimicut.compress(Masked().eval(), source, keep=0.6, config=FAST, extra="somewhere")
    with pytest.raises(InputError, match="an array for each"):
        mimicut.compress(Masked().eval(), "somewhere", keep=0.6, config=FAST)


# Volumes and clips

PLAIN = Preprocessing((3, 6, 6), (0.5,) * 3, (0.25,) * 3)


def test_clips_are_folders_of_frames(tmp_path):
    for clip, frames in (("a", 4), ("b", 6)):
        (tmp_path / clip).mkdir()
        for i in range(frames):
            Image.new("RGB", (9, 7), (40 * i, 0, 255)).save(tmp_path / clip / f"{i}.png")
    clips = read_volumes(tmp_path, PLAIN)
    assert clips.names == ["a", "b"]
    assert clips.batch().shape == (2, 3, 4, 6, 6)
    pixels = clips.batch()[1].mul(0.25).add(0.5).mul(255)
    assert pixels[0, :, 3, 3].round().tolist() == [0, 40, 120, 160]  # frames 0, 1, 3 and 4 of six
    assert clips.notes == ["2 clips of 4 frames each"]
    assert read_volumes(tmp_path, PLAIN, depth=2).batch().shape == (2, 3, 2, 6, 6)
    with pytest.raises(InputError, match="fewer than 5 frames"):
        read_volumes(tmp_path, PLAIN, depth=5)
    result = mimicut.compress(
        own_teacher(Volume(3).eval(), PLAIN), tmp_path, held_out=values(3, 3, 4, 6, 6), keep=0.6, config=FAST,
        max_memory=3 * 10**9,
    )  # fmt: skip
    assert (result.report.images_few, result.report.images_held_out) == (2, 3)


def test_volumes_of_arrays_and_of_files(tmp_path):
    levels = np.arange(2 * 3 * 2 * 4 * 4, dtype=np.uint8).reshape(2, 3, 2, 4, 4)
    prepared = read_volumes(levels, PLAIN).batch()
    assert torch.allclose(prepared, (torch.from_numpy(levels) / 255 - 0.5) / 0.25)
    floats = values(3, 1, 4, 5, 6)
    np.save(tmp_path / "all.npy", floats.numpy())
    assert torch.equal(read_volumes(tmp_path / "all.npy", PLAIN).batch(), floats)
    (tmp_path / "each").mkdir()
    for i, volume in enumerate(floats):
        np.save(tmp_path / "each" / f"{i}.npy", volume[0].numpy())
    found = read_volumes(tmp_path / "each", PLAIN)
    assert torch.equal(found.batch(), floats)
    assert found.names == ["0.npy", "1.npy", "2.npy"]
    np.save(tmp_path / "each" / "3.npy", np.zeros((4, 5, 7), np.float32))
    with pytest.raises(InputError, match=r"sample 3: found .*\(1, 4, 5, 7\).* expected what sample 0 has"):
        read_volumes(tmp_path / "each", PLAIN)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="found neither"):
        read_volumes(tmp_path / "none", PLAIN)
    with pytest.raises(InputError, match="found uint8 with 2 channels, expected 3"):
        read_volumes(levels[:, :2], PLAIN)


def test_nifti_files_are_read_by_nibabel(tmp_path, monkeypatch):
    volumes = {"a.nii": values(4, 5, 6).numpy(), "b.nii.gz": values(4, 5, 6, seed=1).numpy()}
    for name in volumes:
        (tmp_path / name).touch()
    monkeypatch.setattr("mimicut.inputs.volumes.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nibabel is not installed; pip install 'mimicut\[volumes\]'"):
        read_volumes(tmp_path, PLAIN)
    loaded = types.SimpleNamespace(
        load=lambda path: types.SimpleNamespace(get_fdata=lambda dtype: volumes[path.name].astype(dtype))
    )
    monkeypatch.setattr("mimicut.inputs.volumes.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "nibabel", loaded)
    found = read_volumes(tmp_path, PLAIN)
    assert found.names == ["a.nii", "b.nii.gz"]
    assert torch.equal(found.batch()[1, 0], torch.from_numpy(volumes["b.nii.gz"]))
