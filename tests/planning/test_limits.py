"""What plans cost in MACs, parameters, bytes and predicted time, and that every limit of several is met."""

import numpy as np
import pytest
import torch
from nets import Attention, Chain, Concat, Depthwise, Grouped, LayerNorms, Residual

import mimicut as us
from mimicut.anatomy.cost import bytes_of, count
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import LawBroken, PlanError
from mimicut.planning.limits import Limits, Pace, macs_of, relief, size_of, time_of
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_budget
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut

NETS = [Chain, Residual, Concat, Depthwise, Grouped, Attention, LayerNorms]


@pytest.mark.parametrize("kind", NETS, ids=lambda k: k.__name__)
def test_predicted_costs_are_those_of_the_cut_network(kind):
    model = randomised(kind())
    anatomy = trace(model, model.example())
    for seed, share in ((0, 0.4), (1, 0.7), (2, 1.0)):
        plan = make_plan(model, anatomy, keep_width=share, scheme="all", score="random", seed=seed)
        student = cut(model, plan)
        ranks = {n: np.argsort(np.argsort(~np.isin(np.arange(g.width), plan.keep.get(n, range(g.width)))))
                 for n, g in anatomy.groups.items() if n in plan.widths}  # fmt: skip
        found = count(student, model.example())
        assert round(macs_of(anatomy, ranks).of(plan.widths)) == found.macs
        assert size_of(anatomy, ranks, in_bytes=False).of(plan.widths) == found.params
        assert size_of(anatomy, ranks, in_bytes=True).of(plan.widths) == found.bytes == bytes_of(student)


def test_time_is_what_the_modules_macs_take():
    model = Chain()
    anatomy = trace(model, model.example())
    ranks = {"body.0": np.arange(8), "body.3": np.arange(12)}
    pace = Pace({"body.0": 2.0, "body.3": 0.0}, rest=1.0, fixed=5.0)
    full = {"body.0": 8, "body.3": 12}
    assert time_of(anatomy, ranks, pace).of(full) == pytest.approx(5 + 2 * 64 * 8 * 27 + 64 * 16 * 12 + 16 * 5)
    half = time_of(anatomy, ranks, pace).of({"body.0": 4, "body.3": 6})
    assert half == pytest.approx(5 + 2 * 64 * 4 * 27 + 64 * 16 * 6 + 16 * 5)


def test_limits_tell_the_tightest_and_what_a_step_gives_back():
    model = Chain()
    anatomy = trace(model, model.example())
    ranks = {"body.0": np.arange(8), "body.3": np.arange(12)}
    full = {"body.0": 8, "body.3": 12}
    macs, params = macs_of(anatomy, ranks), size_of(anatomy, ranks, in_bytes=False)
    limits = Limits([("MACs", macs, macs.of(full) / 2), ("parameters", params, params.of(full) * 2)])
    assert limits.used(full) == pytest.approx([2, 0.5])
    assert limits.load(full) == pytest.approx(2)
    assert limits.tightest(full)[0] == "MACs"
    assert relief([2, 0.5], [1.5, 0.1]) == pytest.approx(0.5)  # the second limit was met as it is
    assert Limits().load(full) == 0


@pytest.mark.parametrize(
    "budget", [{"keep": 0.6}, {"params": 0.6}, {"size_mb": 0.006}, {"keep": 0.9, "params": 0.5, "size_mb": 0.008}]
)
@pytest.mark.parametrize("with_evidence", [False, True])
def test_every_budget_of_several_is_met_and_used(budget, with_evidence):
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    evidence = us.channel_evidence(model, anatomy, torch.randn(12, 3, 8, 8)) if with_evidence else None
    plan = make_plan(model, anatomy, evidence=evidence, **budget)
    before, after = count(model, model.example()), count(cut(model, plan), model.example())
    check_budget(plan, before, after)
    used = [
        after.macs / (budget["keep"] * before.macs) if "keep" in budget else 0,
        after.params / (budget["params"] * before.params) if "params" in budget else 0,
        after.bytes / (budget["size_mb"] * 1e6) if "size_mb" in budget else 0,
    ]
    assert 0.85 < max(used) <= 1


def test_parameters_may_be_counted():
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    whole = count(model, model.example()).params
    plan = make_plan(model, anatomy, params=whole - 100)
    assert whole - 1500 < count(cut(model, plan), model.example()).params <= whole - 100


@pytest.mark.parametrize(("name", "value"), [("params", 0.01), ("size_mb", 0.0001)])
def test_out_of_reach_names_the_nearest_which_can_be_had(name, value):
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    with pytest.raises(PlanError, match="out of reach with scheme all: the nearest is") as raised:
        make_plan(model, anatomy, **{name: value})
    nearest = float(str(raised.value).split("the nearest is ")[1].split()[0].replace(",", ""))
    plan = make_plan(model, anatomy, **{name: nearest if name == "params" else nearest / 1e6})
    assert set(plan.widths.values()) == {1}


@pytest.mark.parametrize(
    "budget", [{"params": 0}, {"params": -1}, {"size_mb": float("nan")}, {"size_mb": float("inf")}]
)
def test_impossible_sizes(budget):
    model = Residual()
    with pytest.raises(PlanError, match=f"{next(iter(budget))} is .*, expected a number above 0"):
        make_plan(model, trace(model, model.example()), **budget)


def test_the_law_of_the_budget_counts_parameters_and_bytes():
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    before = count(model, model.example())
    for budget, what in (({"params": 0.7}, "parameters, above the 0.7"), ({"size_mb": 0.01}, "MB of tensors, above")):
        plan = make_plan(model, anatomy, **budget)
        after = count(cut(model, plan), model.example())
        check_budget(plan, before, after)
        more = type(after)(after.macs, before.params, {}, before.bytes * 10)
        with pytest.raises(LawBroken, match=what):
            check_budget(plan, before, more)
