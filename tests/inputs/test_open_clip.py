"""Teachers from open_clip, with a small stand-in for the library."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mimicut as us
from mimicut.base.errors import InputError
from mimicut.inputs.build_by_name import parse_spec


class Clip(nn.Module):
    """Two towers; called with images alone, only one of them runs."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(200, 6)
        )
        self.visual.preprocess_cfg = {
            "size": (16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3), "interpolation": "bicubic",
            "resize_mode": "squash",
        }  # fmt: skip
        self.text = nn.Linear(5, 6)

    def forward(self, image=None, text=None):
        return nn.functional.normalize(self.visual(image), dim=-1)


@pytest.fixture
def library(monkeypatch):
    calls = []

    def create_model(name, pretrained=None, **kwargs):
        calls.append((name, pretrained, kwargs))
        return Clip()

    module = SimpleNamespace(
        create_model=create_model,
        list_models=lambda: ["ViT-T", "RN5"],
        list_pretrained_tags_by_model=lambda name: ["openai", "laion2b"],
        get_model_preprocess_cfg=lambda model: model.visual.preprocess_cfg,
    )
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return calls


def test_a_clip_network_is_built_by_name_without_any_download(library):
    assert parse_spec("open_clip:ViT-T/openai") == ("open_clip", "ViT-T/openai")
    teacher = us.load_teacher("open_clip:ViT-T", pretrained=False)
    assert library == [("ViT-T", None, {"pretrained_image": False, "pretrained_text": False})]
    wanted = us.Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), None, "bicubic")
    assert teacher.preprocessing == wanted


def test_the_text_tower_stays_and_the_result_loads_by_its_name(library, tmp_path):
    teacher = us.load_teacher("open_clip:RN5", pretrained=False)
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    config = us.MimicConfig(steps=1, views="none", batch_size=8)
    result = us.compress(teacher, images, keep=0.7, config=config, folder=tmp_path / "small")
    again = us.load(tmp_path / "small")
    assert result.report.macs_student < result.report.macs_teacher
    for name, tensor in teacher.model.text.state_dict().items():
        assert torch.equal(again.text.state_dict()[name], tensor)
    assert torch.equal(again(images), result.model(images))


@pytest.mark.parametrize(
    ("spec", "pretrained", "said"),
    [
        ("open_clip:ViT-X", False, "open_clip has no such model"),
        ("open_clip:ViT-T", True, "expected ViT-T/TAG with one of openai, laion2b"),
        ("open_clip:ViT-T/openal", False, "found weights 'openal', expected ViT-T/TAG with one of openai, laion2b"),
    ],
)
def test_what_open_clip_does_not_have_is_refused(library, spec, pretrained, said):
    with pytest.raises(InputError, match=said):
        us.load_teacher(spec, pretrained=pretrained)


def test_without_the_library_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install open-clip-torch"):
        us.load_teacher("open_clip:ViT-T", pretrained=False)
