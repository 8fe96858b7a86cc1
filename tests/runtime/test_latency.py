import itertools
import json
import math
import random
import tempfile
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import Chain
from timing import TORCH, latency, random_states
from torch import nn

from mimicut.base.errors import InputError, LawBroken, UnsupportedModel
from mimicut.runtime.latency import RUNTIMES, Setting, available, measure, prepare
from mimicut.runtime.machine import machine

module = import_module("mimicut.runtime.latency")


def images(n=2, size=(3, 8, 8)):
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(0))


class Spy(nn.Module):
    """Tells what it was called with and under; stops at one call."""

    def __init__(self, stop=None):
        super().__init__()
        self.scale, self.calls, self.stop = nn.Parameter(torch.ones(1)), [], stop

    def __deepcopy__(self, memo):
        return self  # a copy would tell nobody

    def forward(self, x, *, shift=None):
        torch.rand(1), random.random(), np.random.rand()
        inside = (torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        self.calls.append((x, shift, inside, self.training))
        if self.stop is not None and len(self.calls) > self.stop:
            raise ValueError("enough")
        return x * self.scale


def compiled_with(function):
    """What torch has compiled and keeps with the code of `function`."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    return _debug_get_cache_entry_list(function.__code__)


@pytest.mark.parametrize(
    "runtime", [pytest.param(name, marks=pytest.mark.long if name == "compile" else ()) for name in RUNTIMES]
)
def test_every_runtime_computes_the_model_and_leaves_it_alone(runtime, tmp_path, monkeypatch):
    if available(runtime) is not None:
        pytest.skip(available(runtime))
    if runtime != "compile":  # its own cache lies among the temporary files: a minute on a bad day
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Chain().double().train()
    model.fc.weight.requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    state, states = {n: t.clone() for n, t in model.state_dict().items()}, random_states()
    setting = Setting(runtime, 1, 3)
    prepared = prepare(model, images(2).double(), setting)
    (first,) = prepared()
    assert list(tmp_path.iterdir()) == []
    latency = measure({"one": prepared, "other": model}, images(2), setting, seconds=0.1)
    assert [m.training for m in model.modules()] == [True] * len(list(model.modules()))
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in model.state_dict().items())
    assert all((p.requires_grad, p.grad) == f for p, f in zip(model.parameters(), flags, strict=True))
    assert random_states() == states
    with torch.no_grad():
        expected = model.eval()(images(2).double()[[0, 1, 0]]).float()
    assert first.dtype == torch.float32
    assert (first - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(first, prepared()[0])
    assert list(latency) == ["one", "other"]
    for found in latency.values():
        assert 0 < found.ms_low <= found.ms_median <= found.ms_high < math.inf
        assert len(found.ms_rounds) >= 10
        assert found.runs % len(found.ms_rounds) == 0
    assert runtime != "compile" or compiled_with(Chain.forward) == []
    prepared.close()
    with pytest.raises(InputError, match="was closed"):
        prepared()


class Counting(nn.Module):
    """Writes to a buffer whenever it runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x


def test_a_network_that_writes_to_its_buffers_is_a_copy():
    model = Counting()
    measure({"a": model}, images(), TORCH, seconds=0)
    assert model.count == 0


def test_what_the_runtimes_are_given(monkeypatch):
    openvino, onnxruntime = pytest.importorskip("openvino"), pytest.importorskip("onnxruntime")
    made, core, session = [], openvino.Core, onnxruntime.InferenceSession

    class Core(core):
        def compile_model(self, model, device, options):
            made.append((device, options))
            return super().compile_model(model, device, options)

    monkeypatch.setattr(openvino, "Core", Core)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **kw: made.append((args[1], kw)) or session(*args, **kw)
    )
    for runtime in ("openvino", "onnxruntime"):
        prepare(Chain(), images(), Setting(runtime, 2, 2))
    (device, given), (options, providers) = made
    assert device == "CPU"
    assert (given["INFERENCE_PRECISION_HINT"], given["INFERENCE_NUM_THREADS"], given["NUM_STREAMS"]) == ("f32", 2, 1)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert providers == {"providers": ["CPUExecutionProvider"]}


def test_thirty_times_the_work_takes_longer():
    def net(width):
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Flatten(), nn.LazyLinear(2))

    small, large = net(8), net(128)
    for model in (small, large):
        model(images(1, (3, 32, 32)))
    found = measure({"large": large, "small": small}, images(1, (3, 32, 32)), Setting("torch", 1, 1), seconds=0.2)
    median, low, high = found["large"].over(found["small"])
    assert 1 < low <= median <= high
    assert len(found["large"].ms_rounds) == len(found["small"].ms_rounds)


def test_inside_everything_is_as_the_setting_says():
    spy = Spy().train()
    with torch.autocast("cpu", torch.bfloat16):
        measure({"spy": spy}, images(), Setting("torch", 2, 2), seconds=0)
        assert torch.is_autocast_enabled("cpu")
    assert {inside for *_, inside, _ in spy.calls} == {(2, True, False)}
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(("stop", "error"), [(0, UnsupportedModel), (1, UnsupportedModel), (4, ValueError)])
def test_what_stops_half_way_is_put_back(stop, error):
    networks, states = {"chain": Chain(), "spy": Spy(stop)}, random_states()
    with pytest.raises(error, match="enough"):
        measure(networks, images(), Setting("torch", 2, 2))
    assert torch.get_num_threads() == 1
    assert random_states() == states
    assert not torch.is_inference_mode_enabled()


def test_networks_that_measure_prepared_are_closed_others_not(monkeypatch):
    made = []
    monkeypatch.setattr(module, "prepare", lambda *a: made.append(prepare(*a)) or made[-1])
    mine = prepare(Chain(), images(), TORCH)
    with pytest.raises(ValueError, match="enough"):
        measure({"mine": mine, "chain": Chain(), "spy": Spy(5)}, images(), TORCH)
    assert [p._run is module._closed for p in made] == [True, True]
    mine()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_images_are_repeated_or_cut(batch):
    spy, given, fixed = Spy(), images(2), torch.ones(3, 1, 1)
    prepare(spy, ((given,), {"shift": fixed}), Setting("torch", 1, batch))
    assert torch.equal(spy.calls[-1][0], given[[0, 1, 0, 1, 0][:batch]])
    assert torch.equal(spy.calls[-1][1], fixed)
    prepare(spy, ((given,), {"shift": given + 1}), Setting("torch", 1, batch))
    assert len(spy.calls[-1][1]) == batch
    with pytest.raises(InputError, match="holds no images"):
        prepare(spy, (3,), TORCH)


@pytest.mark.parametrize("wrong", [lambda y: y + 0.01 * y.abs().max(), lambda y: y * math.nan, lambda y: y[:1]])
def test_what_computes_something_else_is_not_timed(wrong, monkeypatch):
    monkeypatch.setitem(module._LOAD, "torch", lambda model, call, setting: lambda: wrong(model(*call[0])))
    with pytest.raises(LawBroken, match=r"comparing Chain on torch with the model: .* expected at most 1.0e-03"):
        measure({"teacher": Chain()}, images(), TORCH)
    monkeypatch.setitem(module._LOAD, "torch", lambda model, call, setting: lambda: model(*call[0]) * 1.0001)
    prepare(Chain(), images(), TORCH)


def test_a_runtime_that_is_not_here_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("openvino", "onnxscript") else name)
    reason = "onnxscript, openvino is not installed; expected the extra `export`: pip install 'mimicut[export]'"
    assert available("openvino") == reason
    with pytest.raises(InputError, match=r"measuring latency on onnxruntime: onnxscript is not .*'mimicut\[export\]'"):
        prepare(Chain(), images(), Setting("onnxruntime", 1, 2))
    assert available("torch") is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"measuring latency on compile: no C.. compiler no-such-compiler is found"):
        prepare(Chain(), images(), Setting("compile", 1, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"measuring latency on cuda: torch .* finds no CUDA device; measure on torch"):
        prepare(Chain(), images(), Setting("cuda", 1, 2))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_onnx_runtime_does_not_fall_back_in_silence(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("TensorRT is here")
    assert "pip install onnxruntime-gpu tensorrt" in available("tensorrt")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    with pytest.raises(InputError, match="cannot load TensorrtExecutionProvider"):
        prepare(Chain(), images(), Setting("tensorrt", 1, 2))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            ("tflite", 1, 1),
            "found runtime 'tflite', expected one of torch, compile, onnxruntime, openvino, cuda, tensorrt",
        ),
        (("torch", 0, 1), "found threads 0, expected a whole number from 1 on"),
        (("torch", 1, 0), "found batch 0, expected"),
        (("torch", 1.5, 1), "found threads 1.5, expected"),
        (("torch", 1, True), "found batch True, expected"),
        (("torch", 1, 1, "int4"), "found precision 'int4', expected one of float32, int8"),
        (("torch", 1, 1, "int8"), "in INT8: torch runs no INT8 files of ONNX; expected one of onnxruntime, openvino"),
    ],
)
def test_bad_settings(setting, said):
    with pytest.raises(InputError, match=said):
        Setting(*setting)


def test_bad_requests():
    with pytest.raises(InputError, match="found runtime 'tflite'"):
        available("tflite")
    for networks, seconds in (({}, 1), ({"a": Chain()}, -1), ({"a": Chain()}, math.nan)):
        with pytest.raises(InputError, match=f"measuring {len(networks)} networks for {seconds} s"):
            measure(networks, images(), TORCH, seconds=seconds)
    with pytest.raises(InputError, match=r"measuring a: found it prepared for .*batch=2.*, expected .*batch=3"):
        measure({"a": prepare(Chain(), images(), TORCH)}, images(), Setting("torch", 1, 3))


def test_a_setting_as_data():
    found = Setting("torch", 2, 4).to_json()
    assert found["version"].startswith(torch.__version__.split("+")[0])
    assert found["processor"] == machine()
    assert {k: found[k] for k in ("runtime", "threads", "batch", "precision")} == {
        "runtime": "torch", "threads": 2, "batch": 4, "precision": "float32"
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_turns_rotate_and_reverse_and_fast_networks_run_more_often():
    order = []

    def network(name, ms):
        return SimpleNamespace(milliseconds=lambda passes: order.append((name, passes)) or ms)

    found = module._in_turn([network("a", 0.3), network("b", 5.0)], 0, None)
    assert order[:6] == [("a", 1)] * 3 + [("b", 1)] * 3
    assert "".join(name for name, _ in order[6:]) == "abbabaababbabaababba"
    assert {name: passes for name, passes in order[6:]} == {"a": 7, "b": 1}
    assert [(f.runs, f.ms_rounds) for f in found] == [(70, (0.3,) * 10), (10, (5.0,) * 10)]
    order.clear()
    module._in_turn([network(name, 1.0) for name in "abc"], 0, None)
    turns = ["".join(n for n, _ in order[9 + 3 * i : 12 + 3 * i]) for i in range(6)]
    assert turns == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_a_precision_is_waited_for_within_reason(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)

    def network(times):
        def milliseconds(passes):
            clock.now += 0.01
            return next(times)

        return SimpleNamespace(milliseconds=milliseconds)

    def rounds(spread, precision, seconds=0.5):
        clock.now = 0.0
        steady, shaky = itertools.repeat(2.0), itertools.cycle([2.0 - spread, 2.0, 2.0 + spread])
        return len(module._in_turn([network(steady), network(shaky)], seconds, precision)[0].ms_rounds)

    usual = rounds(0.2, None)
    assert rounds(0.001, 0.01) == usual
    assert 1.5 * usual < rounds(0.08, 0.01) < 4 * usual
    assert rounds(1.5, 0.01) == pytest.approx(5 * usual, rel=0.1)


def test_the_ratio_is_taken_within_rounds():
    drift = [1, 2, 4, 8, 16, 32, 1, 2, 4, 8, 500]
    teacher, student = latency(*drift), latency(*(0.5 * ms for ms in drift[:-1]), 400)
    assert student.over(teacher) == (0.5, 0.5, 0.5)
    assert latency(1, 10, 100).over(latency(2, 5, 200)) == (0.5, 0.5, 1.25)
    assert latency(1, 2, 3, 4, 5).over(latency(1, 1, 1, 1, 1)) == (3, 2, 4)
    spread = latency(5, 1, 3, 2, 4)
    assert (spread.ms_median, spread.ms_low, spread.ms_high, spread.runs) == (3, 2, 4, 5)
    with pytest.raises(InputError, match="comparing latencies of 11 and of 5 rounds"):
        teacher.over(spread)
