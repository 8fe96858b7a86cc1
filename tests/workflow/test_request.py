"""What cannot be is refused before any work: every fault in one message, names that are nearly right among them."""

import pytest
from nets import Chain

import mimicut as us
from mimicut.base import ranks
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.surgery.budget import Budget
from mimicut.workflow.request import Request

PREPROCESSING = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keap": 0.5}, "no option 'keap'; did you mean 'keep'"),
        ({"keep": 0.5, "fodler": "x"}, "no option 'fodler'; did you mean 'folder'"),
        ({"keep": 2, "held_outt": "x"}, "no option 'held_outt'; did you mean 'held_out'.*keep is 2, expected a share"),
        ({"budget": 0.5}, "budget is 0.5, expected a Budget"),
        ({"plan": "plan.json"}, "plan is 'plan.json', expected a Plan"),
        ({"budget": Budget(params=0.5), "keep_width": 0.5}, "keep_width given beside a Budget"),
        ({"keep": 0.5, "held_out_share": 2}, "held_out_share is 2, expected at least 0 and below 1"),
        ({"keep": 0.5, "max_seconds": -1}, "max_seconds is -1"),
        ({"keep": 0.5, "export_to": ["onnx"]}, "no folder is given"),
        ({}, "no budget is given"),
    ],
)
def test_it_is_refused_before_an_image_is_read(options, words):
    with pytest.raises(us.MimicutError, match=words):
        us.compress(own_teacher(Chain(), PREPROCESSING), "nowhere", **options)


def test_an_option_that_is_none_is_none_beside_a_budget():
    with pytest.raises(us.MimicutError, match="nowhere"):
        us.compress(own_teacher(Chain(), PREPROCESSING), "nowhere", budget=Budget(keep=0.5), keep=None)


def test_a_plan_beside_anything_that_it_holds_is_refused():
    model = Chain()
    plan = us.make_plan(model, us.trace(model, model.example()), keep=0.5)
    for beside in ({"keep": 0}, {"drop": ["x"]}, {"budget": Budget(keep=0.5)}, {"max_secs": 3}):
        with pytest.raises(us.MimicutError, match=r"plan|max_seconds"):
            us.compress(own_teacher(model, PREPROCESSING), "nowhere", plan=plan, **beside)


def test_misspelt_options_of_other_runs_are_named_too():
    teacher = own_teacher(Chain(), PREPROCESSING)
    with pytest.raises(us.MimicutError, match="did you mean 'min_agreement'"):
        us.recover_pruned(teacher, Chain(), "nowhere", min_agrement=0.5)
    with pytest.raises(us.MimicutError, match="found 1 folds"):
        us.crossfit(teacher, "nowhere", 1, keep=0.5)


def test_blocks_that_the_anatomy_still_has_are_not_dropped():
    from nets import Residual

    model = Residual()
    anatomy = us.trace(model, model.example(), drop=["stage1.1"])
    with pytest.raises(us.MimicutError, match=r"drop names 'stage1\.2'"):
        us.make_plan(model, anatomy, keep=0.5, drop=["stage1.1", "stage1.2"])
    with pytest.raises(us.MimicutError, match=r"budget is 0.5, expected a Budget"):
        us.make_plan(model, anatomy, 0.5)


def test_processes_of_one_machine_share_the_memory(monkeypatch):
    asked = Request(config=us.preset("default"), max_memory=8_000_000)
    assert asked.memory_bytes == 8_000_000
    monkeypatch.setattr(ranks, "current", lambda: ranks.Ranks(1, 4))
    assert asked.memory_bytes == 2_000_000
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert asked.memory_bytes == 4_000_000
