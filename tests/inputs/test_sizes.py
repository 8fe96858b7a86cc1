"""Other sizes of images: networks with tables of positions, oblong images, crops at the pictures' own scale."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image

import mimicut
from mimicut.base.errors import InputError
from mimicut.inputs.augment import VIEWS
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing, PreprocessingChanges
from mimicut.inputs.teacher import build_architecture
from mimicut.inputs.torchvision_models import resize_torchvision
from mimicut.results.teachers import load_again, load_teacher

NETWORK = "timm:test_vit"


def answers(teacher, seed: int = 0) -> torch.Tensor:
    size = teacher.preprocessing.input_size
    with torch.no_grad():
        return teacher.model(torch.randn(2, *size, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "swin_tiny_patch4_window7_224"])
def test_a_table_of_positions_follows_the_size(name):
    smaller = {"swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8}}.get(name)
    teacher = load_teacher(f"timm:{name}", pretrained=False, input_size=(3, 96, 128), model_kwargs=smaller)
    assert teacher.preprocessing.input_size == (3, 96, 128)
    assert answers(teacher).shape[0] == 2
    record = json.loads(json.dumps(teacher.to_json()))
    again = build_architecture(record).state_dict()
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in teacher.model.state_dict().items()}
    assert load_again(record, pretrained=False).preprocessing == teacher.preprocessing


def test_the_size_of_the_network_alone_says_the_size_of_the_images():
    by_network = load_teacher(NETWORK, pretrained=False, model_kwargs={"img_size": [96, 128]})
    by_images = load_teacher(NETWORK, pretrained=False, input_size=(3, 96, 128))
    assert by_network.preprocessing == by_images.preprocessing
    assert torch.equal(answers(by_network), answers(by_images))


def test_weights_for_the_usual_size_are_interpolated(tmp_path):
    usual = load_teacher(NETWORK, pretrained=False)
    torch.save({"model": usual.model.state_dict()}, tmp_path / "usual.pt")
    teacher = load_teacher(NETWORK, weights=tmp_path / "usual.pt", input_size=(3, 96, 128))
    assert any("usual.pt” is interpolated to another size" in note for note in teacher.notes)
    assert any("weights taken from 'model'" in note for note in teacher.notes)
    usual.model.set_input_size(img_size=(96, 128))
    assert torch.equal(answers(replace(usual, preprocessing=teacher.preprocessing)), answers(teacher))
    torch.save(teacher.model.state_dict(), tmp_path / "own.pt")
    own = load_teacher(NETWORK, weights=tmp_path / "own.pt", input_size=(3, 96, 128))
    assert torch.equal(answers(own), answers(teacher))
    assert not any("interpolated" in note for note in own.notes)
    again = load_again(teacher.to_json(), weights=tmp_path / "usual.pt")
    assert torch.equal(answers(again), answers(teacher))


def test_weights_of_another_network_are_refused_at_every_size(tmp_path):
    torch.save({"a.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="these are the weights of another network"):
        load_teacher(NETWORK, weights=tmp_path / "other.pt", input_size=(3, 96, 96))


def test_torchvision_interpolates_too():
    from torchvision.models import VisionTransformer

    def built(size: int) -> VisionTransformer:
        torch.manual_seed(size)
        return VisionTransformer(size, 8, 2, 2, 16, 32).eval()

    usual, other = built(32), built(48)
    with torch.no_grad():
        usual.encoder.pos_embedding.fill_(3)
    assert resize_torchvision(usual, other, 48)
    assert torch.allclose(other.encoder.pos_embedding, torch.tensor(3.0))
    assert other.encoder.pos_embedding.shape == (1, 37, 16)
    assert torch.equal(other.conv_proj.weight, usual.conv_proj.weight)
    with pytest.raises(InputError, match="vit_b_32: it takes square images only, found 96x128"):
        load_teacher("torchvision:vit_b_32", pretrained=False, input_size=(3, 96, 128))


def test_transformers_networks_follow_the_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 32
    kind, others = "hf:ViTForImageClassification", {k: v for k, v in sizes.items() if k != "image_size"}
    plain = load_teacher(kind, pretrained=False, input_size=(3, 48, 32), model_kwargs=others)
    assert plain.model.config.image_size == [48, 32]
    assert plain.call is None
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "vit")
    teacher = load_teacher(f"hf:{tmp_path}/vit", input_size=(3, 48, 32))
    assert any("interpolated to this size in every call" in note for note in teacher.notes)
    args, options = teacher.example()
    assert args[0].shape == (2, 3, 48, 32)
    with torch.no_grad():
        expected = model(args[0], interpolate_pos_encoding=True).logits
        assert torch.equal(teacher.model(*args, **options).logits, expected)
    assert load_teacher(f"hf:{tmp_path}/vit").call is None
    plan = mimicut.make_plan(teacher.model, mimicut.trace(teacher.model, teacher.example()), keep=0.7)
    assert plan.widths


def test_a_student_of_another_size_loads_again(tmp_path):
    teacher = load_teacher(NETWORK, pretrained=False, input_size=(3, 64, 96), model_kwargs={"depth": 1})
    plan = mimicut.make_plan(
        teacher.model, mimicut.trace(teacher.model, teacher.example()), keep=0.8, source=teacher.to_json()
    )
    student = mimicut.cut(teacher.model, plan)
    mimicut.save(tmp_path / "small", model=student, plan=plan, report=mimicut.Report())
    given = torch.randn(1, 3, 64, 96)
    assert torch.equal(mimicut.load(tmp_path / "small")(given), student(given))


# Crops at the pictures' own scale

PLAIN = Preprocessing((3, 16, 24), (0.0,) * 3, (1.0,) * 3, resize="none")


def picture(height: int, width: int) -> np.ndarray:
    """Pixels that say where they are."""
    rows, columns = np.indices((height, width), np.uint8)
    return np.stack([rows, columns, rows + columns], axis=2)


def test_pictures_keep_their_scale(tmp_path):
    large = picture(200, 120)
    Image.fromarray(large).save(tmp_path / "a.png")
    images = read_images(tmp_path, PLAIN)
    assert np.array_equal((images.batch()[0] * 255).round().permute(1, 2, 0).numpy(), large[92:108, 48:72])
    view = (images.view([0], "crops", torch.Generator().manual_seed(3))[0] * 255).round().permute(1, 2, 0).numpy()
    rows, columns = view[..., 0].astype(int), view[..., 1].astype(int)
    assert view.shape == (16, 24, 3)
    assert (np.diff(rows[:, 0]) == 1).all()
    assert set(np.diff(columns[0])) in ({1}, {-1})
    again = images.keeping("crops", 0)
    assert torch.equal(again.view([0], "crops", torch.Generator().manual_seed(3)), images.view(
        [0], "crops", torch.Generator().manual_seed(3)))  # fmt: skip


def test_small_pictures_are_enlarged_no_more_than_they_must():
    images = read_images([Image.fromarray(picture(8, 40))], PLAIN)
    assert images.batch().shape == (1, 3, 16, 24)
    assert images.stored(0).shape == (3, 16, 80)
    assert any("smaller than the teacher's 24x16: enlarged" in note for note in images.notes)
    crop = VIEWS["crops"].apply(torch.zeros(3, 8, 40, dtype=torch.uint8), (16, 24), "bilinear", torch.Generator())
    assert crop.shape == (3, 16, 24)


def test_large_photographs_are_not_decoded_at_a_reduced_size(tmp_path):
    Image.fromarray(picture(640, 640)).save(tmp_path / "a.jpg")
    small = replace(PLAIN, input_size=(3, 16, 16))
    assert read_images(tmp_path / "a.jpg", small).stored(0).shape == (3, 640, 640)
    assert read_images(tmp_path / "a.jpg", replace(small, resize=None)).stored(0).shape == (3, 32, 32)


def test_crops_are_asked_for_by_the_same_word_everywhere(tmp_path, capsys):
    changed = PreprocessingChanges(resize="none", input_size=(3, 16, 24)).apply(replace(PLAIN, resize=24), None, [])
    assert changed == PLAIN
    assert PreprocessingChanges(input_size=(3, 8, 8)).apply(PLAIN, None, []).resize == "none"
    assert Preprocessing.from_json(PLAIN.to_json()) == PLAIN
    with pytest.raises(InputError, match="resize: found 'native', expected None, 'none' or whole pixels"):
        replace(PLAIN, resize="native")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Restorer(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)\n"
        "        self.c = nn.Conv2d(8, 3, 3, 1, 1)\n"
        "    def forward(self, x):\n"
        "        return x + self.c(self.b(self.a(x).relu()).relu())\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Restorer()\n"
    )
    np.save(tmp_path / "photos.npy", np.random.default_rng(0).integers(0, 255, (6, 40, 50, 3), np.uint8))
    options = ("--keep", "0.7", "--effort", "quick", "--input-size", "3x16x24")
    small = tmp_path / "small"
    code, _, err = call(
        capsys, "compress", f"{tmp_path}/net.py:build", tmp_path / "photos.npy", *options, "--resize", "none",
        "--out", small,
    )  # fmt: skip
    assert code == 0, err
    assert 'resize = "none"' in (small / "run.toml").read_text()
    assert 'views = "crops"' in (small / "run.toml").read_text()
    assert "cropped to the centre, without resizing" in (small / "README.md").read_text()
    code, _, err = call(capsys, "compress", "--config", small / "run.toml", "--out", tmp_path / "again")
    assert code == 0, err
