"""Parts of a network that cannot be traced as a whole, and networks whose output is not class scores."""

import pytest
import torch
from nets import Boxed
from torchvision import models

import mimicut as us
from mimicut.base.errors import InputError, LawBroken, UnsupportedModel
from mimicut.base.guard import named_tensors, same_bits
from mimicut.cli.app import app
from mimicut.inputs.teacher import build_architecture, own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results.teachers import load_teacher
from mimicut.surgery.head import check_head
from mimicut.surgery.seam import Seam, SeamPoint
from mimicut.workflow.verify import verify_folder

SSD = "torchvision:ssdlite320_mobilenet_v3_large"
CONFIG = us.MimicConfig(steps=1, views="none", lr=1e-9)  # features of random weights may hardly vary


class Tied(Boxed):
    def __init__(self):
        super().__init__()
        self.scale.bias = self.body.fc.bias


def images(count=10, side=8):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.long
def test_a_detector_is_compressed_by_its_backbone(tmp_path):
    teacher = load_teacher(SSD, pretrained=False, part="backbone", input_size=(3, 64, 64))
    assert teacher.preprocessing == us.Preprocessing(
        (3, 64, 64), (0.5,) * 3, (0.5,) * 3
    )  # SSD's own: -1 to 1, squashed
    randomised(teacher.whole)
    before = {n: t.clone() for n, t in named_tensors(teacher.whole).items()}
    result = us.compress(teacher, images(side=64), keep=0.7, folder=tmp_path / "small", config=CONFIG)
    report = result.report
    assert type(result.model) is type(teacher.whole) is models.detection.ssd.SSD
    assert report.macs_student <= 0.7 * report.macs_teacher
    assert report.params_teacher == sum(p.numel() for p in teacher.model.parameters()) > report.params_student
    assert (report.top1_agreement, report.top1_agreement_low, report.top1_agreement_high) == (None, None, None)
    assert report.feature_error_relative > 0
    assert any("figures are of the part 'backbone'" in note for note in report.notes)
    found = named_tensors(result.model)
    outside = [n for n in before if not n.startswith("backbone.")]
    assert outside
    assert all(same_bits(before[n], found[n]) for n in outside)
    assert all(same_bits(t, before[n]) for n, t in named_tensors(teacher.whole).items())
    again = us.load(tmp_path / "small")
    given = [torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        wanted, loaded = result.model(given), again(given)
    assert set(loaded[0]) == {"boxes", "scores", "labels"}
    assert all(torch.equal(wanted[0][k], loaded[0][k]) for k in loaded[0])


def test_any_submodule_of_a_users_own_network(tmp_path):
    whole = randomised(Boxed())
    size = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UnsupportedModel):
        us.compress(own_teacher(whole, size), images(), keep=0.7, config=CONFIG)
    teacher = own_teacher(whole, size, part="body")
    result = us.compress(teacher, images(), keep=0.7, folder=tmp_path / "small", config=CONFIG)
    assert result.report.top1_agreement is not None  # the part itself gives class scores
    assert isinstance(result.model(images(1)), list)
    again = us.load(tmp_path / "small", Boxed)
    assert type(again) is Boxed
    assert all(same_bits(t, named_tensors(again)[n]) for n, t in named_tensors(result.model).items())


def test_verify_knows_the_part_and_looks_at_the_rest(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("import torch\nfrom nets import Boxed\ndef build():\n    return Boxed()\n")
    spec = f"{tmp_path / 'own.py'}:build"
    teacher = load_teacher(spec, part="body", input_size=(3, 8, 8))
    us.compress(teacher, images(), keep=0.7, folder=tmp_path / "small", config=CONFIG)
    assert verify_folder(tmp_path / "small", images(), teacher=spec).images_held_out == 10
    head = Seam((SeamPoint("fc", "input"),), ((1,),), ("fc.weight",))
    other = Boxed()
    check_head(teacher.whole, teacher.completed(teacher.model), head, "body")
    other.load_state_dict(teacher.whole.state_dict())
    with torch.no_grad():
        other.scale.weight[0, 0] += 1
    with pytest.raises(LawBroken, match=r"scale\.weight"):
        check_head(teacher.whole, other, head, "body")
    with torch.no_grad():
        other.scale.weight.copy_(teacher.whole.scale.weight)
        other.body.fc.weight[0, 0] += 1
    with pytest.raises(LawBroken, match=r"body\.fc\.weight"):
        check_head(teacher.whole, other, head, "body")


def test_what_is_refused():
    with pytest.raises(UnsupportedModel, match="give --part backbone"):
        load_teacher(SSD, pretrained=False)
    with pytest.raises(UnsupportedModel, match="give --part backbone"):
        own_teacher(models.get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None))
    with pytest.raises(InputError, match="no such module; near it: backbone"):
        load_teacher(SSD, pretrained=False, part="backbon")
    with pytest.raises(UnsupportedModel, match=r"shares the tensor scale\.bias with the rest"):
        own_teacher(Tied(), part="body")


def test_the_command_line_takes_a_part(tmp_path):
    from typer.testing import CliRunner

    (tmp_path / "own.py").write_text("from nets import Boxed\ndef build():\n    return Boxed()\n")
    spec = f"{tmp_path / 'own.py'}:build"
    found = CliRunner().invoke(app, ["inspect", spec, "--part", "body", "--input-size", "3x8x8"])
    assert found.exit_code == 0, found.output
    assert '"model": "Residual"' in found.stdout


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_frozen_norms_of_published_detectors_are_built_again(name, monkeypatch):
    builder = models.get_model_builder(name)
    frozen = randomised(builder(weights=None, weights_backbone=None))
    state = {k: v for k, v in frozen.state_dict().items() if "num_batches_tracked" not in k or "backbone" not in k}
    weights = models.get_model_weights(name).DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *a, **k: state)
    monkeypatch.setattr("mimicut.inputs.torchvision_models.in_hub_cache", lambda url: True)
    published = builder(weights=weights).eval()
    teacher = load_teacher(f"torchvision:{name}", part="backbone", input_size=(3, 64, 64))
    again = build_architecture(teacher.to_json())
    assert named_tensors(again).keys() == named_tensors(teacher.whole).keys()
    again.load_state_dict(teacher.whole.state_dict())
    given = images(2, side=64)
    with torch.no_grad():
        wanted, found, rebuilt = (list(m(given).values()) for m in (published.backbone, teacher.model, again.backbone))
    for a, b, c in zip(wanted, found, rebuilt, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()  # the same function, in another order of operations
        assert torch.equal(b, c)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_segmentation_networks_load_without_auxiliary_heads(name, tmp_path):
    options = {"aux_loss": True} if name.startswith("deeplab") else {}
    published = models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **options)
    torch.save(published.state_dict(), tmp_path / "published.pt")
    teacher = load_teacher(
        f"torchvision:{name}", num_classes=4, weights=tmp_path / "published.pt", model_kwargs=options
    )
    assert teacher.preprocessing.input_size == (3, 520, 520)
    assert teacher.preprocessing.resize == 520
    with torch.no_grad():
        assert not [n for n in teacher.model.state_dict() if n.startswith("aux")]
        assert {k: tuple(v.shape) for k, v in teacher.model(images(1, side=32)).items()} == {"out": (1, 4, 32, 32)}
