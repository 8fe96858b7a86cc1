"""Checkpoints as training programs leave them: the network is found in them, and what else they hold is named."""

import argparse
import collections
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mimicut.base.errors import InputError
from mimicut.inputs.weights import load_weights
from mimicut.results.teachers import load_teacher


class Net(nn.Module):
    def __init__(self, value: float = 0.0):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("grid", torch.zeros(5), persistent=False)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(value)


def state(value: float, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in Net(value).state_dict().items()}


def loaded(path: Path | str) -> tuple[float, list[str]]:
    """The value that all tensors have that were read from a file, and the notes."""
    model, notes = Net(), []
    load_weights(model, Path(path), "net", notes)
    values = {v for t in model.state_dict().values() for v in t.flatten().tolist()}
    assert len(values) == 1, values
    return values.pop(), notes


class Config(dict):  # such as a configuration with attributes
    pass


class Runs(list):
    pass


def averaged() -> dict[str, Tensor]:
    model = torch.optim.swa_utils.AveragedModel(Net(3))
    return model.state_dict()


def profiled() -> dict[str, Tensor]:
    model = Net(3)
    for module in model.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    return model.state_dict()


def with_compiled_part() -> dict[str, Tensor]:
    return {name.replace("conv.", "conv._orig_mod."): tensor for name, tensor in state(3, "module.").items()}


CHECKPOINTS = {
    "Lightning": (
        lambda: {
            "epoch": 3, "pytorch-lightning_version": "2.0", "hyper_parameters": {"lr": 0.1}, "callbacks": {},
            "state_dict": {**state(3, "model."), "criterion.weight": torch.ones(2), "metric.seen": torch.tensor(4)},
        },
        ["'state_dict.model'", "2 tensor(s)", "state_dict.criterion (1)", "state_dict.metric (1)"],
    ),
    "averaged": (averaged, ["1 tensor(s)", "n_averaged (1)"]),
    "profiled": (profiled, ["8 tensor(s)", "total_ops (4)", "total_params (4)"]),
    "Namespace and Path": (
        lambda: {"args": argparse.Namespace(lr=1, out=Path("out")), "out": Path("a"), "model": state(3)},
        ["'model'"],
    ),
    "containers of classes": (
        lambda: {"config": Config(a=Config(b=1)), "runs": Runs([1, Runs([2, 3])]), "model": state(3),
                 "more": collections.defaultdict(int, {"a": 1})},
        ["'model'"],
    ),
    "whole model": (lambda: Net(3), []),
    "whole model in a checkpoint": (lambda: {"model": Net(3), "ema": None, "best": 0.3}, ["'model'"]),
    "optimizer": (
        lambda: {"net": state(3), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1}]}},
        ["'net'", "1 tensor(s)", "optimizer (1)"],
    ),
    "a part compiled": (with_compiled_part, ["wrappers (_orig_mod, module)"]),
    "parts of their own": (
        lambda: {part: {n.removeprefix(f"{part}."): t for n, t in state(3).items() if n.startswith(part)}
                 for part in ("conv", "norm", "fc")},
        [],
    ),
    "average beside the network": (
        lambda: {"state_dict": state(3), "state_dict_ema": state(5)},
        ["'state_dict'", "an average of them", ":state_dict_ema takes those"],
    ),
    "average in the same state dict": (
        lambda: {**state(3, "net."), **state(5, "ema_model.module.")}, ["'net'", "'ema_model'", ":ema_model takes"],
    ),
    "average, saved as a model": (lambda: {"model": state(3), "ema": Net(5)}, ["'model'", ":ema takes those"]),
    "average without names": (
        lambda: {"model": state(3), "ema": {"shadow_params": [torch.ones(2), torch.ones(3)]}}, ["'model'", "ema (2)"],
    ),
    "average alone": (lambda: {"model_ema": state(3), "step": 7}, ["'model_ema'"]),
    "the same twice": (lambda: {"last": state(3), "best": state(3)}, ["'last'"]),
}  # fmt: skip


OLD = ["Lightning", "Namespace and Path", "containers of classes"]  # the form of torch before 1.6


@pytest.mark.parametrize(("name", "zipped"), [*((n, True) for n in CHECKPOINTS), *((n, False) for n in OLD)])
def test_the_network_is_found_and_the_rest_is_named(tmp_path, name, zipped):
    make, words = CHECKPOINTS[name]
    torch.save(make(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    value, notes = loaded(tmp_path / "w.pt")
    assert value == 3
    assert all(any(word in note for note in notes) for word in words), notes
    assert bool(notes) == bool(words)


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ({"teacher": state(3), "student": state(5)}, "student", 5),
        ({"teacher": state(3), "student": state(5)}, "teacher", 3),
        ({"state_dict": state(3), "state_dict_ema": state(5)}, "state_dict_ema", 5),
        ({"state_dict": {**state(3, "teacher.module."), **state(5, "student.")}}, "teacher", 3),
        ({"state_dict": {**state(3, "teacher."), **state(5, "student.")}}, "state_dict.student", 5),
    ],
)
def test_a_key_chooses(tmp_path, content, key, value):
    torch.save(content, tmp_path / "w.pt")
    assert loaded(f"{tmp_path}/w.pt:{key}")[0] == value


def test_which_of_two_is_asked(tmp_path):
    torch.save({"teacher": state(3), "student": state(5)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"2 times: teacher, student; say which to take: --weights .*w.pt:teacher"):
        loaded(tmp_path / "w.pt")
    with pytest.raises(InputError, match="below 'tutor', expected one of teacher, student"):
        loaded(f"{tmp_path}/w.pt:tutor")
    torch.save({"teacher": {"a.b": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="no tensor of this network below 'tutor'; the file holds teacher"):
        loaded(f"{tmp_path}/w.pt:tutor")


def test_a_key_of_the_command_line(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Conv2d(3, 4, 3)")
    other = nn.Conv2d(3, 4, 3)
    torch.save({"one": nn.Conv2d(3, 4, 3).state_dict(), "other": other.state_dict()}, tmp_path / "w.pt")
    teacher = load_teacher(f"{tmp_path}/net.py:build", weights=f"{tmp_path}/w.pt:other")
    assert torch.equal(teacher.model.weight, other.weight)


@pytest.mark.parametrize(
    "extra",
    [
        {"conv.lora.weight": torch.ones(2)}, {"norm.gain": torch.ones(1)}, {"token": torch.ones(4)},
        {"fc.0.weight": torch.ones(2, 2)},
    ],
)  # fmt: skip
def test_weights_within_the_network_that_it_lacks_are_a_difference(tmp_path, extra):
    torch.save({"model": {**state(3), **extra}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"the first: {next(iter(extra))} is not expected"):
        loaded(tmp_path / "w.pt")


def test_tensors_that_a_network_has_twice_may_be_stored_once(tmp_path):
    def tied() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    torch.save({"a.weight": torch.full((2, 2), 3.0)}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt", "net", [])
    assert (model["b"].weight == 3).all()
    assert model["b"].weight is model["a"].weight


class Explodes:
    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return self.how


def test_a_whole_model_in_the_old_form_is_refused_with_the_reason(tmp_path):
    torch.save(Net(3), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"which run code when read, expected tensors.*model.state_dict\(\)"):
        loaded(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("how", "refused"),
    [
        ((exec, ("open('exploded', 'w')",)), False), ((eval, ("open('exploded', 'w')",)), False),
        ((open, ("exploded", "w")), False), ((Path.touch, (Path("exploded"),)), True),
        ((os.system, ("touch exploded",)), True),
    ],
    ids=["exec", "eval", "open", "touch", "system"],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old form"])
def test_no_code_of_a_file_runs(tmp_path, monkeypatch, how, refused, zipped):
    monkeypatch.chdir(tmp_path)
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": state(3), "x": Explodes(how)}, "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="which run code when read") if refused else nullcontext():
        assert loaded("w.pt")[0] == 3
    assert not Path("exploded").exists()
    assert set(torch.serialization.get_safe_globals()) == before
