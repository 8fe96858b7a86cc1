"""What cheaper ways come to on the same cut: each by itself, judged on the same held-out images."""

from importlib import import_module

import pytest
import torch
from nets import Chain, FusedHeads, Residual

import mimicut as us
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError, Stopped
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.planning.planner import make_plan
from mimicut.proof.figures import figures
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut
from mimicut.surgery.head import put_under_head
from mimicut.workflow.alternatives import alternatives

pytestmark = pytest.mark.long  # minutes: make test-all

WAYS = ["the cut alone", "batch norms alone", "closed form alone", "logits distilled", "mimicked (MiR)"]


def images(n, size, seed=0):
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))


def found(model, steps=20):
    anatomy = trace(model, model.example())
    plan = make_plan(model, anatomy, keep=0.7)
    few, proof = images(40, model.size), images(60, model.size, 1)
    judged = []

    def judge(student):
        judged.append(student)
        return figures(model, student, plan.seam, proof)

    config = us.preset("default", steps=steps, views="none")
    return {way["name"]: way for way in alternatives(model, anatomy, plan, few, config, judge)}, judged, plan, proof


def test_every_way_starts_from_the_cut_and_keeps_the_head():
    model = randomised(Residual())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    ways, judged, plan, proof = found(model)
    assert list(ways) == WAYS
    raw = figures(model, put_under_head(model, cut(model, plan), plan.seam), plan.seam, proof)
    assert ways["the cut alone"]["top1_agreement"] == raw.top1_agreement
    assert ways["the cut alone"]["feature_error_relative"] == raw.feature_error_relative
    for name in WAYS[1:]:
        assert ways[name]["feature_error_relative"] != raw.feature_error_relative, name
    assert ways["closed form alone"]["feature_error_relative"] < 0.8 * raw.feature_error_relative
    own = dict(model.named_parameters())
    for student in judged:
        assert all(torch.equal(t, own[n]) for n, t in student.named_parameters() if n in plan.seam.head)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_ways_that_a_network_has_no_use_for_are_left_out():
    ways = found(randomised(FusedHeads()), steps=0)[0]
    assert "batch norms alone" not in ways  # there are none
    assert "logits distilled" not in ways  # in no steps
    assert "closed form alone" in ways


def test_a_way_that_fails_or_is_interrupted_costs_the_result_nothing(monkeypatch, tmp_path):
    module = import_module("mimicut.workflow.alternatives")
    said = Preprocessing(Chain.size, (0.5,) * 3, (0.25,) * 3)
    own, config = own_teacher(randomised(Chain()), said), us.preset("default", steps=2, views="none")
    options = {"keep": 0.6, "held_out_share": 0.5, "config": config, "with_alternatives": True}

    def raising(error):
        def run(*_):
            raise error

        return run

    monkeypatch.setitem(module._WAYS, "closed form alone", raising(InputError("the loss is inf")))
    report = us.compress(own, images(40, Chain.size), **options).report
    ways = {way["name"]: way for way in report.alternatives}
    assert ways["closed form alone"]["failed"] == "the loss is inf"
    assert ways["closed form alone"]["top1_agreement"] is None
    assert "alternative, closed form alone: agreement unknown" in report.table(200)
    monkeypatch.setitem(module._WAYS, "closed form alone", raising(Stopped(None, None)))
    result = us.compress(own, images(40, Chain.size), folder=tmp_path / "small", **options)
    assert [way["name"] for way in result.report.alternatives][-1] != "closed form alone"
    assert "the alternatives were interrupted" in result.report.notes
    assert us.load(tmp_path / "small", Chain)


def test_compress_reports_them_where_asked(tmp_path):
    said = Preprocessing(Chain.size, (0.5,) * 3, (0.25,) * 3)
    own = own_teacher(randomised(Chain()), said)
    config = us.preset("default", steps=3, views="none")
    options = {"keep": 0.6, "held_out_share": 0.5, "config": config}
    result = us.compress(own, images(40, Chain.size), with_alternatives=True, folder=tmp_path / "small", **options)
    ways = result.report.alternatives
    assert ways[0]["name"] == "the cut alone"
    assert f"alternative, the cut alone: agreement {ways[0]['top1_agreement']:.1%}" in result.report.table(200)
    page = (tmp_path / "small" / "report.html").read_text()
    assert "Cheaper alternatives" in page
    assert "this result" in page
    assert us.Report.from_json(result.report.to_json()).alternatives == ways
    assert us.compress(own, images(40, Chain.size), **options).report.alternatives == ()
