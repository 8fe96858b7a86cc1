"""Our groups agree with Torch-Pruning's, where it reads a network rightly; where it does not, law 2 tells."""

import dataclasses

import pytest
import torch
from architectures import build

from benchmarks.zoo import oracle
from mimicut.anatomy.find_seam import trace
from mimicut.proof.randomised import randomised


def both(spec, size=64):
    model = randomised(build(spec))
    return model, trace(model, torch.zeros(2, 3, size, size)), torch.randn(1, 3, size, size)


@pytest.mark.parametrize(
    ("spec", "size", "groups"),
    [
        ("torchvision:resnet18", 64, 11),
        ("torchvision:mobilenet_v2", 64, 24),
        pytest.param("torchvision:vgg11_bn", 64, 7, marks=pytest.mark.long),
        pytest.param("torchvision:densenet121", 32, 103, marks=pytest.mark.long),
        ("timm:convnext_atto", 64, 15),
        pytest.param("timm:deit_tiny_patch16_224", 224, 24, marks=pytest.mark.long),
    ],
)
def test_groups_agree(spec, size, groups):
    found = oracle.compare(*both(spec, size))
    assert found["differences"] == []
    assert (found["outcome"], found["agree"], found["skipped"]) == ("agrees", groups, {})


@pytest.mark.long
def test_a_grouped_convolution_that_it_reads_wrongly():
    found = oracle.compare(*both("torchvision:regnet_y_400mf"))
    assert (found["outcome"], found["compared"], found["agree"]) == ("differs", 37, 22)
    (difference,) = found["differences"]
    assert len(difference["groups"]) == 15
    assert difference["ours"].startswith("law 2 holds")
    assert difference["theirs"].startswith("does not run: ")


def test_a_member_that_is_missing_is_seen():
    model, anatomy, example = both("torchvision:resnet18")
    name = "layer1.0.conv1"
    anatomy.groups[name] = dataclasses.replace(anatomy.groups[name], members=anatomy.groups[name].members[1:])
    found = oracle.compare(model, anatomy, example)
    assert (found["outcome"], found["agree"]) == ("differs", 10)
    assert found["differences"][0]["groups"] == [name]
    assert found["differences"][0]["ours_only"] == []
    assert found["differences"][0]["theirs"].startswith("runs, differs from ours by ")


def test_what_it_cannot_read_is_a_line_too(monkeypatch):
    def graph(model, example):
        raise ZeroDivisionError("modulo by zero")

    monkeypatch.setattr(oracle, "_graph", graph)
    line = oracle.run("demo:vgg7")
    assert (line["outcome"], line["error"]) == ("failed", "Torch-Pruning: ZeroDivisionError: modulo by zero")
    assert oracle.run("torchvision:nothing")["outcome"] == "unsupported"
