"""Batch norms that are computed together with the layer before them: the same features and gradients, and only where
nothing else sees what lies between."""

import pytest
import torch
from nets import Chain, Concat, Depthwise, Grouped, NoNorm, Residual, Shared
from torch import nn
from torch.nn import functional as F

from mimicut.proof.randomised import randomised
from mimicut.recovery.fused_norm import find_foldable, folding

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def outputs(model, x=X):
    return [model(x)]


def folded(model, x=X):
    return find_foldable(model, lambda: outputs(model, x))


@pytest.mark.parametrize("net", [Chain, Residual, Depthwise, Grouped])
def test_features_and_gradients_are_the_same(net):
    model = randomised(net()).eval().double()
    x = X.double()
    pairs = folded(model, x)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(pairs) == len(norms) > 0
    found = []
    for used in ({}, pairs):
        model.zero_grad()
        with folding(used):
            out = model(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for plain, fast in zip(*found, strict=True):
        assert torch.allclose(plain, fast, rtol=1e-9, atol=1e-12)


def test_nothing_is_kept_of_the_norm_and_its_operator_does_not_run():
    model = randomised(Chain()).eval()
    pairs = folded(model)

    def run(used):
        with folding(used), torch.profiler.profile() as profile:
            model(X)
        return sum(e.count for e in profile.key_averages() if "batch_norm" in e.key)

    assert run({}) > 0
    assert run(pairs) == 0


class Between(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.last_norm(self.last(self.first(x).view(len(x), 4, 6, 6)))

    def first(self, x):
        made = self.conv(x)
        if self.kind == "read twice":
            return self.norm(made) + made
        if self.kind == "changed in place":
            made.mul_(2.0)
        if self.kind == "two norms":
            return self.norm(made) + self.other(made)
        if self.kind == "layer used twice":
            return self.norm(made) + self.conv(x + 1)
        if self.kind == "norm used twice":
            return self.norm(made) + self.norm(x.mean(1, keepdim=True).expand(-1, 4, -1, -1))[:, :, 1:-1, 1:-1]
        if self.kind == "weight read":
            return self.norm(made) * self.conv.weight.abs().mean()
        if self.kind == "view":
            made = made.flatten(2)
            return F.batch_norm(made, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        return self.norm(made)


@pytest.mark.parametrize(
    "kind",
    ["read twice", "changed in place", "two norms", "layer used twice", "norm used twice", "weight read", "view"],
)
def test_what_something_else_sees_is_not_folded(kind):
    model = randomised(Between(kind)).eval()
    assert list(folded(model)) == [id(model.last.weight)]
    plain = randomised(Between("plain")).eval()
    assert set(folded(plain)) == {id(plain.conv.weight), id(plain.last.weight)}


def test_norms_that_take_their_own_statistics_or_stand_elsewhere_are_left_alone():
    model = randomised(Between("plain")).eval()
    model.norm.train()
    assert list(folded(model)) == [id(model.last.weight)]
    assert folded(randomised(NoNorm()).eval()) == {}
    assert folded(randomised(Concat()).eval()) == {}  # its norm stands behind the concatenation


def test_a_fold_that_says_something_else_is_not_used(monkeypatch):
    model = randomised(Chain()).eval()
    assert folded(model)
    monkeypatch.setattr("mimicut.recovery.fused_norm._MOST_APART", -1.0)
    assert folded(model) == {}


def test_a_layer_that_runs_twice_is_left_alone():
    model = randomised(Shared()).eval()
    pairs = folded(model)
    weights = [id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)]
    calls = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda module, *_: calls.append(id(module.weight)))
    model(X)
    assert any(calls.count(w) > 1 for w in weights)
    assert all(calls.count(w) == 1 for w in pairs)


def test_linear_layers_fold_too():
    model = randomised(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU())).eval()
    x = torch.randn(4, 5)
    pairs = folded(model, x)
    assert len(pairs) == 1
    with folding(pairs):
        fast = model(x)
    assert torch.allclose(fast, model(x), rtol=1e-5, atol=1e-6)
