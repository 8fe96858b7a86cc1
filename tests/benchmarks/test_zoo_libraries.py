"""The zoo's models of other libraries: listed, skipped with a clear line where the library is missing, and built."""

import importlib.util
import sys

import pytest
from torch import nn

from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo import libraries
from benchmarks.zoo.models import builder, load, specs


def test_every_model_is_listed_with_the_package_that_it_needs():
    assert set(libraries.MODELS) <= set(specs())
    assert len(libraries.MODELS) >= 40
    assert {name.partition(":")[0] for name in libraries.MODELS} | {"open_clip"} == set(libraries.LIBRARIES)


def test_a_library_that_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert libraries.missing("monai:UNet") == "monai"
    assert libraries.missing("torchvision:resnet18") is None
    monkeypatch.setattr(sys, "argv", ["zoo", "run", "--only", "smp:U*", "--out", str(tmp_path / "lines.jsonl")])
    assert zoo.main() == 0
    said = capsys.readouterr().err
    assert "models are skipped, as segmentation-models-pytorch cannot be imported (pip install 'mimicut[zoo]')" in said
    assert "0 models, 0 to run now" in said


def test_a_model_is_built_by_its_name(monkeypatch):
    monkeypatch.setitem(libraries.MODELS, "smp:Tiny", lambda: (nn.Conv2d(3, 4, 1), {"input_size": (3, 8, 8)}))
    teacher = load("smp:Tiny")
    assert teacher.preprocessing.input_size == (3, 8, 8)
    assert builder("smp:Tiny") == libraries.BUILDER
    assert builder("torchvision:resnet18") == ""


@pytest.mark.parametrize("name", ["timm_features:resnet18", "hf_encoder:CLIPVisionModel"])
def test_models_of_installed_libraries_are_built(name):
    model, fields = libraries.build(name)
    assert isinstance(model, nn.Module)
    assert fields["input_size"][1:] == (64, 64)
