"""Precision and layout of mimicking: what is taken, that it is safe, the same again, and no worse."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import Chain, Residual
from torch import nn
from torch.nn import functional as F

from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError, Stopped
from mimicut.base.layout import laid, learns_channels_last, takes_channels_last
from mimicut.planning.planner import make_plan
from mimicut.proof.figures import figures
from mimicut.proof.randomised import randomised
from mimicut.recovery import settle_options
from mimicut.recovery.config import MimicConfig, preset
from mimicut.recovery.mimic import mimic
from mimicut.recovery.pair import Pair
from mimicut.recovery.precision_and_layout import (
    Way,
    bf16_in_hardware,
    describe_way,
    emulated,
    quickest,
    ways,
    worth_trying,
)
from mimicut.recovery.settle_options import settle
from mimicut.surgery.cut import cut

CPU = torch.device("cpu")
FEW = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Wide(Residual):
    """Its strided shortcut is 3x3: narrow ones of 1x1 learn in the contiguous layout."""

    def __init__(self):
        super().__init__()
        self.stage2[0].down[0] = nn.Conv2d(8, 16, 3, 2, 1, bias=False)


def pair(net=Wide):
    teacher = randomised(net()).eval()
    anatomy = trace(teacher, torch.zeros(2, 3, 8, 8))
    plan = make_plan(teacher, anatomy, keep=0.6)
    return teacher, cut(teacher, plan), plan.seam


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def with_words(monkeypatch, words):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"processor : 0\nflags : fpu avx2 {words}\n")


class Views(nn.Module):
    """Code that looks at a feature map as rows, which pixels that lie channels last do not allow."""

    def __init__(self):
        super().__init__()
        self.one, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5)

    def forward(self, x):
        return self.fc(self.one(x).view(len(x), -1))


# --- what there is


@pytest.mark.parametrize(
    ("words", "has"), [("avx512f avx512_vnni", False), ("avx512_bf16", True), ("amx_bf16", True), ("bf16", True)]
)
def test_bf16_is_only_tried_where_the_processor_multiplies_it(monkeypatch, words, has):
    with_words(monkeypatch, words)
    assert bf16_in_hardware(CPU) is has
    models = (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    found = {way.precision for way in ways(models, "auto", "auto", CPU, lambda: True)}
    assert found == ({"float32", "bf16"} if has else {"float32"})
    assert bool(emulated("bf16", None)) is not has
    assert emulated("float32", None) == [] == emulated("auto", None)


def test_what_is_asked_for_is_the_only_way():
    models = (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    assert ways(models, "bf16", "contiguous", CPU, lambda: True) == [Way("bf16", "contiguous")]
    assert {w.precision for w in ways(models, "float64", "auto", CPU, lambda: True)} == {"float64"}


def test_the_rule_is_channels_last_for_convolutions_that_run_so():
    teacher, student, seam = pair()
    config, tried = settle(Pair.of(teacher, student, seam), FEW, MimicConfig(steps=4, views="none"))
    assert (config.precision, config.layout, tried) == ("float32", "channels_last", {})
    models = (nn.Linear(3, 4), nn.Linear(3, 4))
    assert ways(models, "float32", "auto", CPU, lambda: True) == [Way("float32", "contiguous")]
    models = (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    assert ways(models, "float32", "auto", CPU, lambda: False) == [Way("float32", "contiguous")]


def test_code_that_views_its_tensors_otherwise_stays_contiguous():
    for net, takes in ((Views(), False), (Chain().eval(), True)):
        assert takes_channels_last(lambda layout, net=net: [net(laid(FEW, layout))]) is takes


def test_a_network_that_says_something_else_channels_last_stays_contiguous():
    assert not takes_channels_last(lambda layout: [FEW if layout == "contiguous" else 1.01 * FEW])
    assert not takes_channels_last(lambda layout: [FEW if layout == "contiguous" else FEW[:5]])


def test_narrow_strided_convolutions_do_not_learn_channels_last():
    narrow, wide, plain = nn.Conv2d(15, 8, 1, stride=(1, 2)), nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(7, 8, 1)
    assert [learns_channels_last(nn.Sequential(each)) for each in (narrow, wide, plain)] == [False, True, True]
    models = (nn.Sequential(wide), nn.Sequential(narrow))
    assert ways(models, "float32", "auto", CPU, lambda: True) == [Way("float32", "contiguous")]
    with pytest.raises(InputError, match="layout contiguous"):
        settle(Pair.of(*models, None), FEW, MimicConfig(layout="channels_last"))


# --- what is taken


def test_another_way_must_be_clearly_quicker():
    rule, other, slow = Way("float32", "channels_last"), Way("float32", "contiguous"), Way("bf16", "contiguous")
    seconds = {rule: 1.0, other: 0.9, slow: 9.0}
    limits = []

    def took(way, most):
        limits.append(most)
        return seconds[way]

    taken, tried = quickest([rule, other, slow], took)
    assert taken == rule
    assert tried == {"float32, channels last": 1.0, "float32, contiguous": 0.9, "bf16, contiguous": 9.0}
    assert limits == [float("inf"), 3.0, pytest.approx(2.7)]
    seconds[other] = 0.5
    assert quickest([rule, other], took)[0] == other
    assert "bf16, contiguous 9" in describe_way("float32", "contiguous", tried)


def test_only_long_runs_of_large_networks_try():
    found = [Way("float32", "channels_last"), Way("float32", "contiguous")]
    assert worth_trying(400, 50, lambda: 1e9, found)
    assert not worth_trying(400, 50, lambda: 1e6, found)
    assert not worth_trying(20, 50, lambda: 1e15, found)
    assert not worth_trying(400, 50, lambda: 1e9, found[:1])


def timed(monkeypatch, seconds):
    """Trials are made in any run, and these are their seconds."""
    tried = []

    def step_seconds(_, config, most):
        tried.append((config.precision, config.layout))
        return seconds[config.layout]

    monkeypatch.setattr(settle_options, "worth_trying", lambda *_: True)
    monkeypatch.setattr(settle_options, "_step_seconds", step_seconds)
    return tried


def test_what_was_quicker_is_taken_and_stands_in_the_log(monkeypatch):
    tried = timed(monkeypatch, {"channels_last": 1.0, "contiguous": 0.5})
    teacher, student, seam = pair()
    config = preset("default", steps=3, views="none", precision="float32")
    log = mimic(teacher, student, seam, FEW, config)
    assert tried == [("float32", "channels_last"), ("float32", "contiguous")]
    assert (log.config.precision, log.config.layout) == ("float32", "contiguous")
    assert log.ways == {"float32, channels last": 1.0, "float32, contiguous": 0.5}


def test_a_trial_changes_nothing_of_the_student_or_the_run(monkeypatch):
    teacher, student, seam = pair()
    before, lead = bits(student), bits(teacher)
    config = preset("default", steps=3, views="none", seed=5)
    monkeypatch.setattr(settle_options, "worth_trying", lambda *_: True)
    torch.manual_seed(3)
    random = torch.get_rng_state()
    taken, tried = settle(Pair.of(teacher, student, seam), FEW, config)
    assert len(tried) >= 2
    assert min(tried.values()) > 0
    assert same(before, bits(student))
    assert same(lead, bits(teacher))
    assert torch.equal(random, torch.get_rng_state())
    plain = copy.deepcopy(student)
    mimic(teacher, student, seam, FEW, taken)
    monkeypatch.undo()
    mimic(teacher, plain, seam, FEW, replace(config, precision=taken.precision, layout=taken.layout))
    assert same(bits(plain), bits(student))


def test_a_run_that_goes_on_takes_the_way_of_its_checkpoint(monkeypatch):
    teacher, student, seam = pair()
    config = preset("default", steps=6, views="none", precision="float32")

    def stop(done, total, loss):
        if done == 3:
            raise KeyboardInterrupt

    whole, again = copy.deepcopy(student), copy.deepcopy(student)
    mimic(teacher, whole, seam, FEW, replace(config, layout="contiguous"))
    timed(monkeypatch, {"channels_last": 1.0, "contiguous": 0.5})
    with pytest.raises(Stopped) as stopped:
        mimic(teacher, student, seam, FEW, config, on_step=stop)
    part = stopped.value.checkpoint
    assert (part.data["precision"], part.data["layout"]) == ("float32", "contiguous")
    tried = timed(monkeypatch, {"channels_last": 0.1, "contiguous": 0.5})
    log = mimic(teacher, again, seam, FEW, config, checkpoint=part)
    assert tried == []
    assert log.config.layout == "contiguous"
    assert same(bits(whole), bits(again))


# --- that it is no worse


def test_the_student_is_no_worse_for_it_and_comes_back_contiguous():
    held_out = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    errors = {}
    for name, options in (("named", {"precision": "float32", "layout": "contiguous"}), ("auto", {})):
        teacher, student, seam = pair()
        mimic(teacher, student, seam, FEW, preset("default", steps=40, views="none", **options))
        errors[name] = figures(teacher, student, seam, held_out).feature_error_relative
        for tensor in (*student.parameters(), *student.buffers()):
            assert tensor.is_contiguous()
    untrained = figures(*pair()[:2], seam, held_out).feature_error_relative
    assert errors["named"] < 0.9 * untrained
    assert errors["auto"] <= 1.02 * errors["named"]


@pytest.mark.parametrize("norm_mode", ["eval", "train"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layouts_differ_by_rounding_alone(norm_mode, layout):
    losses = []
    for each in ("contiguous", layout):
        teacher, student, seam = pair()
        config = MimicConfig(steps=2, views="none", norm_mode=norm_mode, precision="float64", layout=each)
        losses.append(mimic(teacher, student, seam, FEW, config).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


# --- batches in parts


def test_a_batch_in_parts_gives_the_same_step(monkeypatch):
    students, logs = [], []
    for most in (None, 1):
        teacher, student, seam = pair()
        config = preset("default", steps=3, views="none", precision="float64", optimizer="sgd")
        logs.append(mimic(teacher, student, seam, FEW, config, max_memory=most))
        students.append(student)
    assert [log.parts for log in logs] == [1, 10]
    assert logs[0].losses == pytest.approx(logs[1].losses, rel=1e-9)
    for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_parts_hold_no_more_than_there_is(monkeypatch):
    teacher, student, seam = pair(Residual)
    config = preset("default", steps=1, views="none", lr=1e-3)  # without trial steps for a rate
    kept = []

    def held(**options):
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def loss(*args, own=F.mse_loss, **kwargs):
            kept.append(sum(sizes.values()))
            sizes.clear()
            return own(*args, **kwargs)

        monkeypatch.setattr(F, "mse_loss", loss)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            log = mimic(teacher, copy.deepcopy(student), seam, FEW, config, **options)
        monkeypatch.undo()
        return log.parts, kept[-1]

    parts, whole = held()
    assert parts == 1
    parts, some = held(max_memory=round(0.7 * whole))
    assert parts in (3, 4)  # half of it is for what is kept, the folded weights among it
    assert some < 0.7 * whole


def test_batches_that_are_normalised_as_a_whole_are_not_parted():
    teacher, student, seam = pair()
    log = mimic(teacher, student, seam, FEW, MimicConfig(steps=1, views="none", norm_mode="train"), max_memory=1)
    assert log.parts == 1


def test_a_run_that_goes_on_keeps_its_parts():
    teacher, student, seam = pair()
    whole, again = copy.deepcopy(student), copy.deepcopy(student)
    config = preset("default", steps=4, views="none")
    mimic(teacher, whole, seam, FEW, config, max_memory=1)

    def stop(done, total, loss):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        mimic(teacher, student, seam, FEW, config, max_memory=1, on_step=stop)
    log = mimic(teacher, again, seam, FEW, config, checkpoint=stopped.value.checkpoint)
    assert log.parts == 10
    assert same(bits(whole), bits(again))
