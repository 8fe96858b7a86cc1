"""Whatever happens inside, things are put back."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from mimicut.base import guard
from mimicut.base.errors import UnsupportedModel
from mimicut.base.guard import evaluating, full_copy, seeded, structural_copy, untouched


def network():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    net[1][1].eval()
    net[0].bias.requires_grad_(False)
    return net


def state(net):
    return [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("manager", [untouched, evaluating])
def test_modes_and_gradients_return(manager, fails):
    net = network()
    before = state(net)
    try:
        with manager(net):
            net.train()
            net.requires_grad_(True)
            net[1].eval()
            assert state(net) != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state(net) == before


def test_evaluating_is_in_eval_mode_without_gradients():
    net = network()
    with evaluating(net):
        assert not any(m.training for m in net.modules())
        assert not net(torch.ones(3, 2)).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_random_state_returns(fails):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    try:
        with seeded(1):
            inside = draws()
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert draws() == expected
    with seeded(1):
        assert draws() == inside
    with seeded(2):
        assert all(a != b for a, b in zip(draws(), inside, strict=True))


def test_seeds_of_any_size_are_taken():
    with seeded(2**62):
        torch.rand(1)


def test_copies_own_modules_and_full_ones_own_tensors():
    net = network()
    shallow, full = structural_copy(net), full_copy(net)
    assert shallow[1] is not net[1]
    assert shallow[0].weight is net[0].weight
    assert shallow[1][1].running_mean is net[1][1].running_mean
    assert full[0].weight is not net[0].weight
    assert torch.equal(full[0].weight, net[0].weight)
    assert state(full) == state(net)


class _Anew(nn.Module):
    """Its copy is built anew with the default width, and lacks what was set later. shares: with the same tensors."""

    def __init__(self, shares=False):
        super().__init__()
        self.shares, self.width, self.sizes = shares, 6, [3, 3]
        self.inner, self.weight = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(2))

    def __deepcopy__(self, memo):
        made = _Anew(self.shares)
        if self.shares:
            made.weight = self.weight
        return made


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("copies", [structural_copy, full_copy, guard.empty_copy])
def test_what_a_module_leaves_out_of_its_copies_is_in_ours(copies, shares):
    held = _Anew(shares)
    held.width, held.sizes, held.gain, held.late = 4, [2, 2], 0.5, nn.Linear(2, 2)
    held.inner.weight = held.late.weight
    with torch.no_grad():
        held.weight.fill_(7.0), held.mean.fill_(3.0)
    made = copies(nn.Sequential(held, held))
    assert made[0] is made[1]
    assert made[0] is not held
    found = made[0]
    assert (found.width, found.sizes, found.gain) == (4, [2, 2], 0.5)
    assert found.inner.weight is found.late.weight
    tensors, originals = guard.named_tensors(found), guard.named_tensors(held)
    assert tensors.keys() == originals.keys()
    for name, tensor in tensors.items():
        assert (tensor is originals[name]) == (copies is structural_copy)
        assert tensor.is_meta or torch.equal(tensor, originals[name])
        assert tensor.is_meta == (copies is guard.empty_copy)


class _Part(nn.Module):
    """Its state leaves out a submodule and a lock."""

    def __init__(self):
        super().__init__()
        self.inner, self.lock = nn.Linear(2, 2), threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "lock"} | {"_modules": {}}


def test_a_submodule_that_a_state_leaves_out_is_copied_and_a_lock_is_not():
    held = _Part()
    made = full_copy(held)
    assert torch.equal(made.inner.weight, held.inner.weight)
    assert made.inner.weight is not held.inner.weight
    assert not hasattr(made, "lock")


def test_a_module_that_cannot_be_copied_is_named():
    net = network()
    net.lock = (_ for _ in ())
    with pytest.raises(UnsupportedModel, match=r"copying Sequential: TypeError: cannot pickle 'generator' object"):
        full_copy(net)


def test_a_model_that_was_elsewhere_is_as_it_was_afterwards():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in guard.named_tensors(model).items()}
    with guard.on_device(model, "cpu"):
        for tensor in guard.named_tensors(model).values():
            tensor.data = torch.zeros(5)  # as if it were elsewhere
    for name, tensor in guard.named_tensors(model).items():
        kept, place, value = before[name]
        assert tensor is kept
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, value)


def test_values_are_put_back_where_they_differ():
    wide, own = torch.zeros(1).expand(3), torch.ones(2)
    guard.put_back([(wide, torch.zeros(3)), (own, torch.tensor([1.0, 4.0]))])
    assert own.tolist() == [1.0, 4.0]
    with pytest.raises(RuntimeError):
        guard.put_back([(wide, torch.ones(3))])


def test_float32_is_exact_inside_and_as_before_afterwards():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("medium")
        with guard.exact_float32():
            assert not torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
