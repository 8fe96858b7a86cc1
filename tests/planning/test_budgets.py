"""Depth and width mixed within a budget, and latencies met: with a clock that counts MACs, so that nothing is timed."""

import json
from dataclasses import replace

import pytest
import torch
from nets import Chain, Halves, Residual
from torch.utils.flop_counter import FlopCounterMode

import mimicut as us
from mimicut.anatomy.cost import count
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import OutOfReach, PlanError, Stopped
from mimicut.inputs.teacher import own_teacher
from mimicut.planning import latency_search, mixtures, trials
from mimicut.planning import survey as survey_module
from mimicut.planning.frontier import frontier
from mimicut.planning.mixtures import plan_mixture, plan_within
from mimicut.planning.recoverability import recoverability
from mimicut.planning.survey import Findings, survey
from mimicut.planning.trials import SHORT
from mimicut.proof.randomised import randomised
from mimicut.runtime.latency import MeasuredLatency, Setting
from mimicut.surgery.budget import Budget, several_budgets
from mimicut.surgery.cut import cut

PREPROCESSING = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
CONFIG = us.MimicConfig(steps=2, views="none", batch_size=8)
FIXED = 0.1  # of the teacher's time that no cut takes away, and that no prediction knows of


def macs_of(model):
    """Counted apart from mimicut, and quicker."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 8, 8))
    return counter.get_total_flops() / 2


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds are MACs, and a fixed part; the networks that were measured are counted."""
    measured = []

    class Loaded:
        def __init__(self, model):
            self.model, self.closed = model, False

        def close(self):
            self.closed = True

    def ms_of(network):
        model = network.model if isinstance(network, Loaded) else network
        assert not (isinstance(network, Loaded) and network.closed)
        return (macs_of(model) + FIXED * Residual.macs) / 1000

    def measure(networks, example, setting, *, seconds, precision=None):
        measured.append(list(networks))
        found = {name: ms_of(network) for name, network in networks.items()}
        return {name: MeasuredLatency(ms, ms, ms, 10, (ms,) * 10) for name, ms in found.items()}

    for module in (latency_search, survey_module):
        monkeypatch.setattr(module, "measure", measure)
        monkeypatch.setattr(module, "prepare", lambda model, example, setting: Loaded(model))
    monkeypatch.setattr(mixtures, "width_divisor", lambda setting: 1)
    return measured


def few(count=12, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


TORCH = Setting("torch")


def known(model, setting=TORCH, **options):
    anatomy = trace(model, model.example())
    evidence = us.channel_evidence(model, anatomy, few())
    given = Findings(evidence=evidence, recipe=options.pop("recipe", None))
    return survey(model, anatomy, few(), setting=setting, given=given, **options)


def idle(model, name):
    """Nothing comes of that block."""
    with torch.no_grad():
        block = model.get_submodule(name)
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
    return model


@pytest.mark.parametrize("share", [*(pytest.param(share, marks=pytest.mark.long) for share in (0.8, 0.6)), 0.4])
@pytest.mark.parametrize("depth", ["never", "auto"])
def test_a_latency_is_met_and_not_undercut(clock, share, depth):
    model = randomised(Residual())
    facts = known(model)
    found = plan_within(facts, Budget.of(latency=share, depth=depth))
    assert 0.92 * share <= found.share[0] <= share
    whole = (1 + FIXED) * Residual.macs
    left = macs_of(cut(model, found.plan)) + FIXED * Residual.macs
    assert found.share[0] == pytest.approx(left / whole)
    measured = found.plan.latency
    assert found.plan.budget.latency.share == share
    assert measured.measured_share[0] == pytest.approx(found.share[0], abs=1e-4)
    assert measured.tries
    assert us.Plan.from_json(json.loads(found.plan.dumps())).latency == measured
    assert found.plan.drop == [] or depth == "auto"


def test_milliseconds_are_met_too_and_the_smaller_of_two_wishes_counts(clock):
    facts = known(randomised(Residual()))
    whole = (1 + FIXED) * Residual.macs / 1000
    found = plan_within(facts, Budget.of(latency_ms=0.7 * whole, latency=0.9))
    assert 0.92 * 0.7 <= found.share[0] <= 0.7


@pytest.mark.long
def test_other_budgets_hold_beside_a_latency(clock):
    model = randomised(Residual())
    found = plan_within(known(model), Budget.of(latency=0.8, params=0.4))
    assert count(cut(model, found.plan), model.example()).params <= 0.4 * count(model, model.example()).params
    assert found.share[0] <= 0.8


def test_a_block_that_does_nothing_goes_first(clock):
    model = idle(randomised(Residual()), "stage1.1")
    facts = known(model)
    assert facts.order[0].block == "stage1.1"
    assert facts.order[0].error < 1e-9 < facts.order[1].error
    saved = facts.order[0].macs / Residual.macs
    found = plan_within(facts, Budget.of(latency=1 - 0.9 * saved / (1 + FIXED)))
    assert found.plan.drop == ["stage1.1"]
    assert found.error < 1e-9


def test_depth_alone_leaves_the_widths(clock):
    model = randomised(Residual())
    found = plan_within(known(model, depth="only"), Budget.of(latency=0.7, depth="only"))
    assert found.plan.drop
    assert not found.plan.slices
    assert found.share[0] <= 0.7


@pytest.mark.long
def test_budgets_of_macs_may_mix_too():
    model = idle(randomised(Residual()), "stage1.2")
    facts = known(model, setting=None)
    found = plan_within(facts, Budget.of(keep=0.5, depth="auto"))
    assert found.plan.drop[:1] == ["stage1.2"]
    assert found.plan.macs["student"] <= 0.5 * Residual.macs
    never = plan_within(known(model, setting=None, depth="never"), Budget.of(keep=0.5, depth="never"))
    assert never.plan.drop == []


RECIPE = us.preset("default", steps=400)


def tied(monkeypatch, error=lambda drop: 1 + 0.2 * len(drop)):
    """Every block that goes costs a fifth; students are the better after mimicking the more blocks went."""
    monkeypatch.setattr(mixtures, "mimicked_error", lambda known, plan: float(-len(plan.drop)))
    monkeypatch.setattr(mixtures, "trial_error", lambda known, anatomy, plan: error(plan.drop))


@pytest.mark.parametrize("budget", [{"latency": 0.7}, {"keep": 0.6, "depth": "auto"}])
def test_of_mixtures_that_are_about_as_good_a_few_steps_decide(clock, monkeypatch, budget):
    said, setting = [], TORCH if "latency" in budget else None
    facts = known(randomised(Residual()), setting, recipe=RECIPE)
    tied(monkeypatch)
    found = plan_within(facts, Budget.of(**budget), say=said.append)
    assert len(found.plan.drop) == 1  # with two blocks less it is no longer near
    assert any("comparing 2 mixtures" in text for text in said)
    for other in (None, replace(RECIPE, steps=SHORT - 1)):
        assert plan_within(replace(facts, recipe=other), Budget.of(**budget)).plan.drop == []
    tied(monkeypatch, error=lambda drop: float("inf"))
    assert plan_within(facts, Budget.of(**budget), say=said.append).error == float("inf")
    assert sum("of mimicking each" in text for text in said) == 1
    tied(monkeypatch)
    monkeypatch.setattr(mixtures, "SHORT_MACS", 1)
    assert plan_within(facts, Budget.of(**budget)).plan.drop == []


@pytest.mark.long
def test_a_few_steps_are_mimicked_and_judged(monkeypatch):
    facts = known(randomised(Residual()), None, recipe=RECIPE)
    plan = us.make_plan(facts.teacher, facts.anatomy, keep=0.6, evidence=facts.evidence)
    before = facts.teacher(few()).sum()
    assert 0 < trials.mimicked_error(facts, plan) < 0.9 * facts.held.judge.error(cut(facts.teacher, plan))
    assert facts.teacher(few()).sum() == before

    def stopped(*_, **__):
        raise Stopped(None, None)

    monkeypatch.setattr(trials, "recover", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        trials.mimicked_error(facts, plan)
    assert not isinstance(caught.value, Stopped)  # which would have a result
    monkeypatch.setattr(trials, "recover", lambda *_, **__: None)
    monkeypatch.setattr(type(facts.held.judge), "error", lambda *_: float("nan"))
    assert trials.mimicked_error(facts, plan) == float("inf")
    assert trials.trial_error(facts, facts.anatomy, plan) == float("inf")


def test_blocks_that_must_stay_are_not_asked_for(clock):
    model = idle(randomised(Residual()), "stage1.1")
    facts = known(model, fixed=lambda name: name == "stage1.1")
    assert "stage1.1" not in [r.block for r in facts.order]
    budget = Budget.of(latency=0.6, exclude=["stage1.1.conv2"])
    plan = plan_mixture(model, facts.anatomy, few(), budget, given=Findings(evidence=facts.evidence))
    assert "stage1.1" not in plan.drop


def test_what_cannot_be_met_names_what_was_measured(clock):
    with pytest.raises(OutOfReach, match=r"out of reach: the teacher takes .*the student took .* of the teacher's"):
        plan_within(known(randomised(Residual())), Budget.of(latency=0.01))
    assert OutOfReach.exit_code == 1


def test_a_noisy_machine_is_said(clock, monkeypatch):
    real = latency_search.measure

    def noisy(networks, *args, **options):
        found = real(networks, *args, **options)
        if "again" in found:
            ms = found["again"].ms_median
            rounds = (0.9, 0.9, 0.9, 1, 1, 1, 1, 1.1, 1.1, 1.1)
            found["again"] = MeasuredLatency(ms, ms, ms, 10, tuple(ms * f for f in rounds))
        return found

    for module in (latency_search, survey_module):
        monkeypatch.setattr(module, "measure", noisy)
    found = plan_within(known(randomised(Residual()), depth="never"), Budget.of(latency=0.7, depth="never"))
    assert any("noisy" in note for note in found.plan.notes)


def test_a_latency_needs_a_runtime_and_a_runtime_a_latency():
    model = randomised(Residual())
    with pytest.raises(PlanError, match="found a latency but no runtime"):
        plan_within(known(model, setting=None, depth="never"), Budget.of(latency=0.5))
    with pytest.raises(PlanError, match="without a latency"):
        Budget.of(runtime="openvino", keep=0.5)
    with pytest.raises(PlanError, match=r"depth is 'deep', expected one of never, auto, only"):
        Budget.of(keep=0.5, depth="deep")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"latency": -1}, "latency is -1, expected a share"),
        ({"latency_ms": float("nan")}, "latency_ms is nan, expected milliseconds"),
        ({"latency": 0.5, "runtime": "typo"}, "runtime is 'typo', expected one of torch"),
        ({"latency": 0.5, "batch": 0}, "batch is 0"),
        ({"latency": 0.5, "threads": -1}, "threads is -1"),
        ({"keep": 0.5, "depth": "typo"}, "depth is 'typo'"),
        ({"depth": "auto"}, "a depth is given without a budget"),
        ({"latency": 0.5, "keep_width": 0.5}, "keep_width sets the widths itself"),
    ],
)
def test_what_is_impossible_is_said_before_any_work(budget, words):
    with pytest.raises(us.MimicutError, match=words):
        us.compress(own_teacher(Residual(), PREPROCESSING), None, **budget)


def test_a_runtime_that_is_not_here_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr(survey_module, "available", lambda runtime: "not installed; pip install 'mimicut[export]'")
    with pytest.raises(us.MimicutError, match=r"on openvino: not installed; pip install 'mimicut\[export\]'"):
        us.compress(own_teacher(Residual(), PREPROCESSING), None, latency=0.5, runtime="openvino")


@pytest.mark.long
def test_the_error_reported_is_that_of_the_plan_that_was_met(clock, monkeypatch):
    monkeypatch.setattr(mixtures, "HOPELESS", float("inf"))
    facts = known(randomised(Residual()))
    found = plan_within(facts, Budget.of(latency=0.5))
    assert found.error == trials.trial_error(facts, facts.without(tuple(found.plan.drop)), found.plan)


def test_patterns_protect_blocks_and_wrong_ones_are_named(clock):
    model = idle(randomised(Residual()), "stage1.1")
    anatomy = trace(model, model.example())
    plan = plan_mixture(model, anatomy, few(), Budget.of(keep=0.7, depth="auto", exclude=["*.1.conv1"]))
    assert "stage1.1" not in plan.drop
    with pytest.raises(PlanError, match=r"nonsense.*matches no module"):
        plan_mixture(model, anatomy, few(), Budget.of(latency=0.7, pin=["nonsense"]))


@pytest.mark.long
def test_a_plan_of_another_machine_saves_its_result_all_the_same(clock, monkeypatch, tmp_path):
    model = own_teacher(randomised(Residual()), PREPROCESSING)
    plan = us.compress(model, few(), latency=0.6, config=CONFIG, threads=1).plan
    setting = {"runtime": "abacus", "threads": 1, "batch": 1, "precision": "float32"}
    data = plan.to_json()
    edited = us.Plan.from_json({**data, "latency": {**data["latency"], "setting": setting}})
    result = us.compress(model, few(), plan=edited, config=CONFIG, folder=tmp_path / "a")
    assert result.folder is not None
    assert any("latency was not measured" in note for note in result.report.notes)
    with pytest.raises(PlanError, match="latency: setting is missing"):
        us.Plan.from_json({**data, "latency": {"wanted_share": 1}})


def test_several_values_are_several_budgets():
    found = several_budgets({"params": 0.5, "depth": None}, keep=[0.7, 0.5])
    assert found == {"keep-0.7": {"keep": 0.7, "params": 0.5}, "keep-0.5": {"keep": 0.5, "params": 0.5}}
    assert several_budgets({}, keep=[0.7], latency=[0.5]) == {"": {"keep": 0.7, "latency": 0.5}}
    assert list(several_budgets({}, latency_ms=[12.0, 8])) == ["latency-ms-12", "latency-ms-8"]
    with pytest.raises(PlanError, match="keep and latency have several"):
        several_budgets({}, keep=[0.7, 0.5], latency=[0.5, 0.4])
    with pytest.raises(PlanError, match="given twice"):
        several_budgets({}, keep=[0.7, 0.7])


def test_the_frontier_falls_and_ends_where_nothing_is(clock):
    rows = frontier(known(randomised(Residual())), Budget.of(latency=1.0, depth="auto"), (0.8, 0.5, 0.01))
    assert [row["asked"] for row in rows] == [0.8, 0.5]
    assert rows[0]["error"] < rows[1]["error"]
    assert rows[0]["latency_ms"] > rows[1]["latency_ms"]
    assert all(row["latency_share"] <= row["asked"] for row in rows)


def test_recoverability_of_what_does_nothing_is_nothing_and_the_closed_form_helps():
    model = idle(randomised(Residual()), "stage1.1")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.get_rng_state()
    found = {r.block: r for r in recoverability(model, trace(model, model.example()), few(30))}
    assert list(found) == ["stage1.0", "stage1.1", "stage1.2", "stage2.1"]
    assert found["stage1.1"].error < 1e-9
    others = [r for r in found.values() if r.block != "stage1.1"]
    assert all(r.error <= r.bare for r in others)
    assert sum(r.error for r in others) < 0.7 * sum(r.bare for r in others)
    assert all(r.macs > 0 for r in others)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_last_branch_is_judged_by_what_layers_before_it_could_learn():
    model = randomised(Halves())
    anatomy = trace(model, model.example())
    last = anatomy.blocks[-1]
    (found,) = recoverability(model, anatomy, few(30), blocks=[last])
    assert found.error < 0.9 * found.bare  # no layer is behind it: only the map of the seam's channels helps


def test_compress_meets_a_latency_and_reports_it(clock, tmp_path):
    model = randomised(Residual())
    result = us.compress(
        own_teacher(model, PREPROCESSING), few(), latency=0.6, folder=tmp_path / "a", config=CONFIG, threads=1
    )
    report = result.report
    assert 0.92 * 0.6 <= report.latency["share"] <= 0.6
    assert report.latency["runtime"] == "torch"
    assert "ms on torch, threads 1, batch 1" in report.table()
    assert us.Report.from_json(report.to_json()).latency == report.to_json()["latency"]
    again = us.load(tmp_path / "a", Residual)
    assert torch.equal(again(few(2)), result.model(few(2)))
    replayed = us.compress(
        own_teacher(model, PREPROCESSING), few(), plan=us.read_plan(tmp_path / "a" / "plan.json"), config=CONFIG
    )
    assert replayed.plan.slices == result.plan.slices
    assert replayed.plan.drop == result.plan.drop


def test_a_plain_network_has_widths_only(clock, monkeypatch):
    model = randomised(Chain())
    anatomy = trace(model, model.example())
    monkeypatch.setattr(survey_module, "MEASURED_SECONDS", 0)
    facts = survey(model, anatomy, few(), setting=Setting("torch"))
    assert facts.order == ()
    found = plan_within(facts, Budget.of(latency=0.9))
    assert found.share[0] <= 0.9
