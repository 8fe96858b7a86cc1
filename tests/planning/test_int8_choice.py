"""INT8 alone, a cut alone, or both within a latency: with a clock that counts MACs, so that nothing is timed."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from nets import Residual
from torch.utils.flop_counter import FlopCounterMode

import mimicut as us
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.tracing import as_example
from mimicut.base.errors import InputError, OutOfReach, UnsupportedModel
from mimicut.demo import few_images
from mimicut.inputs.teacher import own_teacher
from mimicut.planning import int8_choice, latency_search, mixtures
from mimicut.planning import survey as survey_module
from mimicut.planning.int8_choice import note_on_int8, plan_int8
from mimicut.planning.survey import Findings
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import preset
from mimicut.runtime.latency import MeasuredLatency
from mimicut.surgery.budget import Budget

SAID = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


class Loaded:
    def __init__(self, model, example, setting):
        self.model, self.precision = model, setting.precision

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds are MACs, times what `clock` holds for a precision."""
    times = {"float32": 1.0, "int8": 0.5}

    def ms_of(network, size):
        model, precision = (network.model, network.precision) if isinstance(network, Loaded) else (network, "float32")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, *size))
        return times[precision] * counter.get_total_flops() / 2000

    def measure(networks, example, setting, *, seconds, precision=None):
        size = as_example(example)[0][0].shape[1:]
        found = {name: ms_of(network, size) for name, network in networks.items()}
        return {name: MeasuredLatency(ms, ms, ms, 10, (ms,) * 10) for name, ms in found.items()}

    for module in (latency_search, survey_module, int8_choice):
        monkeypatch.setattr(module, "measure", measure)
        monkeypatch.setattr(module, "prepare", Loaded)
    monkeypatch.setattr(mixtures, "width_divisor", lambda setting: 1)
    monkeypatch.setattr(int8_choice, "SHORT", 3)
    return times


def few(count=24):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def read_network():
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    return model, anatomy, us.channel_evidence(model, anatomy, few())


def plan(latency, **options):
    model, anatomy, evidence = read_network()
    given = Findings(evidence=evidence, recipe=preset("default", views="none"))
    budget = Budget.of(latency=latency, runtime="onnxruntime", threads=1, depth="never", **options)
    return plan_int8(model, anatomy, few(), budget, given=given)


@pytest.mark.long
def test_int8_alone_where_it_meets_the_latency(clock):
    found = plan(0.55)
    assert not found.slices
    assert found.latency.setting["precision"] == "int8"
    assert found.latency.measured_share[0] == pytest.approx(0.5)
    assert found.notes[-1].startswith(
        "INT8 alone loses least (errors after 3 steps): INT8 alone: 0.50 of the teacher's latency, error 0.0"
    )
    assert "a cut alone: 0.5" in found.notes[-1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["mobilenetv2_tiny", "vgg7"])
def test_int8_alone_for_a_trained_network(name, clock):
    clock["int8"] = 0.8
    teacher = us.load_teacher(f"demo:{name}")
    images = us.read_images(few_images(24, 0), teacher.preprocessing).batch(range(24))
    anatomy = trace(teacher.model, images[:2])
    given = Findings(
        evidence=us.channel_evidence(teacher.model, anatomy, images), recipe=preset("default", views=teacher.views)
    )
    budget = Budget.of(latency=0.85, runtime="onnxruntime", threads=1, depth="never")
    found = plan_int8(teacher.model, anatomy, images, budget, given=given)
    assert not found.slices
    assert found.latency.setting["precision"] == "int8"
    assert "INT8 alone loses least" in found.notes[-1]
    assert "a cut alone: 0.8" in found.notes[-1]


@pytest.mark.long
def test_int8_alone_is_judged_beside_the_teacher_on_a_machine_that_has_slowed_down(clock, monkeypatch):
    measured = int8_choice.measure_student

    def slower(*arguments):
        found, share = measured(*arguments)
        return replace(found, ms_median=3 * found.ms_median), share

    monkeypatch.setattr(int8_choice, "measure_student", slower)
    monkeypatch.setattr(int8_choice, "_cut", lambda *_: (_ for _ in ()).throw(OutOfReach("not asked for here")))
    for share in (0.55, 0.49):  # a cut that is so little above the target counts as met, too
        found = plan(share)
        assert not found.slices
        assert found.latency.measured_share[0] == pytest.approx(0.5)


@pytest.mark.long
def test_a_milder_cut_and_int8_where_int8_alone_is_too_slow(clock):
    found = plan(0.4)
    assert found.latency.setting["precision"] == "int8"
    assert 0.92 * 0.4 <= found.latency.measured_share[0] <= 0.4
    assert 0.7 < found.macs["student"] / found.macs["teacher"] < 0.85  # 0.4 over 0.5
    assert "INT8 alone: 0.50 of the teacher's latency; it misses the latency" in found.notes[-1]


@pytest.mark.long
def test_a_cut_that_is_fast_enough_in_int8_alone_is_found(clock):
    found = plan(0.4, min_channels=6)
    assert found.latency.setting["precision"] == "int8"
    assert found.slices
    assert "a cut alone: out of reach" in found.notes[-1]


@pytest.mark.long
def test_a_cut_alone_where_int8_saves_nothing(clock):
    clock["int8"] = 1.2
    found = plan(0.7)
    assert found.latency.setting["precision"] == "float32"
    assert found.slices
    assert found.notes[-1].startswith(
        "a cut alone loses least (errors after 3 steps): INT8 alone: 1.20 of the teacher's latency; it misses"
    )
    assert found.notes[-1].endswith("a cut and INT8: INT8 is no faster than float32, so a cut alone is milder")


@pytest.mark.long
def test_a_size_rules_int8_alone_out(clock):
    found = plan(0.55, params=0.8)
    assert found.slices
    assert "INT8 alone: 0.50 of the teacher's latency; it misses the budget of params" in found.notes[-1]


@pytest.mark.long
def test_nothing_meets_the_latency(clock):
    with pytest.raises(OutOfReach, match="out of reach: the teacher takes"):
        plan(0.01)


@pytest.mark.long
def test_where_int8_cannot_be_written_a_cut_is_taken(clock, monkeypatch):
    def refuse(*_, **__):
        raise UnsupportedModel("no such operator")

    monkeypatch.setattr(int8_choice, "export", refuse)
    found = plan(0.6)
    assert found.latency.setting["precision"] == "float32"
    assert "INT8 alone: no such operator" in found.notes[-1]


@pytest.mark.parametrize(("share", "said"), [(0.6, True), (0.4, False)])
def test_a_note_where_int8_alone_would_do(clock, share, said):
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    note = note_on_int8(model, anatomy, Budget.of(latency=share, runtime="onnxruntime", threads=1))
    assert note == (
        "INT8 alone takes 0.50 of the teacher's latency and cuts nothing: --int8 (int8=True) weighs it against this cut"
        if said
        else None
    )
    assert note_on_int8(model, anatomy, Budget.of(latency=share, runtime="torch")) is None


@pytest.mark.parametrize("runtime", ["torch", "compile"])
def test_runtimes_without_int8(runtime, tmp_path):
    own = own_teacher(randomised(Residual()), SAID)
    with pytest.raises(
        InputError, match=f"{runtime} runs no INT8 files of ONNX; expected one of onnxruntime, openvino"
    ):
        us.compress(own, few(), latency=0.5, runtime=runtime, int8=True, folder=tmp_path / "small")


def test_int8_takes_a_folder_and_no_bound_on_errors(tmp_path):
    own = own_teacher(randomised(Residual()), SAID)
    with pytest.raises(InputError, match="exporting to int8: no folder is given"):
        us.compress(own, few(), keep=0.5, int8=True)
    with pytest.raises(InputError, match="found max_error, which is not measured in INT8"):
        us.compress(own, few(), keep=0.5, int8=True, max_error=0.1, folder=tmp_path / "small")
