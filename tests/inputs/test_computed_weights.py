"""Weights that a network computes become plain ones, with the same bits, and the caller's module stays as it is."""

import warnings

import pytest
import torch
from nets import Chain
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import mimicut as us
from mimicut.base.errors import OutOfReach
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised

PREPROCESSING = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
CONFIG = us.MimicConfig(steps=1, views="none", batch_size=8)


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class _Noise(nn.Module):
    def forward(self, weight):
        return weight + 0.01 * torch.randn_like(weight)


class _Equal:
    """A hook of someone else's: the learned weight is scaled before each pass."""

    def __init__(self, name):
        self.name = name

    def __call__(self, module, inputs):
        setattr(module, self.name, getattr(module, f"{self.name}_orig") * 0.5)


def equal(module):
    weight = module._parameters.pop("weight")
    module.register_parameter("weight_orig", nn.Parameter(weight.detach()))
    module.weight = weight.detach() * 0.5
    module.register_forward_pre_hook(_Equal("weight"))
    return module


def parametrised(kind):
    def wrap(module):
        parametrize.register_parametrization(module, "weight", kind())
        return module

    return wrap


def pruned(module):
    prune.random_unstructured(module, "weight", 0.4)
    return module if module.bias is None else prune.l1_unstructured(module, "bias", 0.5)


def pruned_twice(module):
    prune.ln_structured(module, "weight", 0.25, n=2, dim=0)
    return prune.random_unstructured(module, "weight", 0.2)


WAYS = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": parametrised(_Double),
    "masks": pruned,
    "masks twice": pruned_twice,
    "another hook": equal,
}


def made(way, layers=("0", "3", "6")):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its old ones deprecated
        model = randomised(Chain())
        for name in layers:
            model.body.set_submodule(name, way(model.body.get_submodule(name)))
    model(torch.randn(4, *model.size))  # spectral_norm: one step of its power iteration
    return model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_computed_weights_are_folded_exactly_and_the_result_loads(way, tmp_path):
    model, images = made(WAYS[way]), torch.randn(12, *Chain.size)
    before, kinds = model(images), [type(m) for m in model.modules()]
    names = list(model.state_dict())
    teacher = own_teacher(model, PREPROCESSING)
    assert set(teacher.model.state_dict()) == set(Chain().state_dict())
    assert torch.equal(teacher.model(images), before)
    assert [n for n in teacher.notes if "were folded into plain ones" in n and "body.0.weight" in n]
    assert any("zeros of masks" in n for n in teacher.notes) == ("masks" in way)
    result = us.compress(teacher, images, keep=0.5, config=CONFIG, folder=tmp_path / "small")
    assert not any("no layer was solved" in note for note in result.report.notes)
    assert teacher.notes[-1] in result.report.notes
    loaded = us.load(tmp_path / "small", lambda **_: made(WAYS[way]))
    assert torch.equal(loaded(images), result.model(images))
    assert set(loaded.state_dict()) == set(Chain().state_dict())
    assert torch.equal(model(images), before)  # the caller's
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == names


def test_a_result_of_a_folded_teacher_can_be_a_teacher(tmp_path):
    images = torch.randn(12, *Chain.size)
    us.compress(own_teacher(made(weight_norm), PREPROCESSING), images, keep=0.7, config=CONFIG, folder=tmp_path / "one")
    again = us.load_teacher(tmp_path / "one", build_teacher=lambda **_: made(weight_norm))
    result = us.compress(again, images, keep=0.7, config=CONFIG, folder=tmp_path / "two")
    loaded = us.load(tmp_path / "two", lambda **_: made(weight_norm))
    assert torch.equal(loaded(images), result.model(images))


def test_recurrent_weights_are_folded_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.lstm = weight_norm(nn.LSTM(6, 4, batch_first=True), "weight_hh_l0")
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0].mean(1))

    model, images = Net().eval(), torch.randn(2, 3, 6, 6)
    teacher = own_teacher(model, us.Preprocessing((3, 6, 6), (0.5,) * 3, (0.5,) * 3))
    assert "lstm.weight_hh_l0" in dict(teacher.model.named_parameters())
    assert torch.equal(teacher.model(images), model(images))


def test_a_frozen_weight_stays_frozen_and_what_is_no_parameter_stays_a_buffer():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    parametrize.register_parametrization(model[1], "running_var", _Double())
    parametrizations.weight_norm(model[0]).requires_grad_(False)
    found = own_teacher(model, us.Preprocessing((2, 1, 1), (0.5,) * 2, (0.5,) * 2)).model
    assert not found[0].weight.requires_grad
    assert "running_var" in dict(found[1].named_buffers())


def test_a_weight_that_differs_from_pass_to_pass_stays_and_is_named():
    teacher = own_teacher(made(parametrised(_Noise), layers=["3"]), PREPROCESSING)
    assert "parametrizations" in dict(teacher.model.body[3].named_children())
    assert any(
        n.startswith("the weight body.3.weight stays computed (ValueError: it differs from pass to pass)")
        for n in teacher.notes
    )
    assert not teacher.folded


class _Sorted(nn.Conv2d):
    """A weight that is computed in `forward`, by an operator that nobody follows."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight.sort(0).values, self.bias, padding=self.padding)


class _Masked(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * 0.5, self.bias, padding=self.padding)


def own_layers(kind):
    model = Chain()
    for name, layer in list(model.body.named_children()):
        if isinstance(layer, nn.Conv2d):
            model.body.set_submodule(
                name, kind(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
            )
    return own_teacher(randomised(model), PREPROCESSING)


def test_where_nothing_can_be_cut_operator_module_and_remedy_are_named():
    with pytest.raises(OutOfReach) as refused:
        us.compress(own_layers(_Sorted), torch.randn(12, 3, 8, 8), keep=0.5, config=CONFIG)
    text = str(refused.value)
    assert "Operators that cannot be read: aten.sort.default in body.0" in text
    assert "put its value into a plain parameter" in text


def test_it_is_said_that_no_layer_was_solved():
    said = []
    result = us.compress(
        own_layers(_Masked), torch.randn(12, 3, 8, 8), keep=0.5, on_stage=said.append,
        config=us.preset("default", steps=0, views="none"),
    )  # fmt: skip
    note = "no layer was solved in closed form: no layer from the first cut one on has a weight that is"
    assert any(n.startswith(note) for n in result.report.notes)
    assert any(s.startswith(f"note: {note}") for s in said)
