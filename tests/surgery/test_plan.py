"""A plan as JSON: both ways, edited by hand, edited into nonsense, of another teacher."""

import dataclasses
import json

import pytest
import torch
from nets import Chain, Residual

from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import PlanError
from mimicut.planning.planner import make_plan, replan
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan, check_plan_file, read_plan


@pytest.fixture
def prepared():
    model = randomised(Residual())
    anatomy = trace(model, model.example())
    return model, anatomy, make_plan(model, anatomy, keep_width=0.5, scheme="all")


def test_json_both_ways(prepared, tmp_path):
    model, _, plan = prepared
    path = tmp_path / "plan.json"
    path.write_text(plan.dumps())
    again = read_plan(path)
    assert again == plan
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(cut(model, again)(x), cut(model, plan)(x))


def test_json_is_readable(prepared):
    lines = prepared[2].dumps().splitlines()
    assert any(line.strip().startswith('"stem": 4') for line in lines)
    assert len(lines) < 150


def test_unedited_plan_resolves_to_itself(prepared):
    model, anatomy, plan = prepared
    assert replan(model, anatomy, Plan.from_json(json.loads(plan.dumps()))) == plan


def test_an_edited_width_is_resolved_again(prepared):
    model, anatomy, plan = prepared
    data = json.loads(plan.dumps())
    data["widths"]["stem"] = 7
    new = replan(model, anatomy, Plan.from_json(data))
    assert cut(model, new).stem.weight.shape == (7, 3, 3, 3)
    assert new.keep["stage1.0.conv1"] == plan.keep["stage1.0.conv1"]
    assert new.edited


def test_an_edited_drop_is_resolved_again(prepared):
    model, _, plan = prepared
    edited = dataclasses.replace(plan, drop=["stage1.1"])
    edited.widths.pop("stage1.1.conv1")
    new = replan(model, trace(model, model.example(), drop=edited.drop), edited)
    assert isinstance(cut(model, new).stage1[1], torch.nn.Identity)


_CALL = {"module": "stem", "function": "view", "index": 0, "place": 1, "from": 6, "to": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("slices"), "slices is missing"),
        (lambda d: d.update(more=1), "more is unknown"),
        (lambda d: d.update(version=99), "version 99, this release reads versions 1 to 2: it was made by a newer"),
        (lambda d: d.update(widths=[3]), r"widths is \[3\], expected an object"),
        (lambda d: d["widths"].update(stem=0), r"widths\['stem'\] is 0"),
        (lambda d: d["widths"].update(stem="wide"), r"widths\['stem'\] is \"wide\""),
        (lambda d: d["widths"].update(stem=2.5), r"widths\['stem'\] is 2.5"),
        (lambda d: d.update(drop=[3]), "drop holds 3"),
        (lambda d: d["slices"].update({"stem.weight": {"0": [1, "x"]}}), r"slices\['stem.weight'\]"),
        (lambda d: d["edits"].append({"module": "stem"}), "edits holds"),
        (lambda d: d["calls"].append({"module": "stem"}), "calls holds"),
        (lambda d: d["calls"].append(_CALL | {"to": "3"}), "calls holds"),
        (lambda d: d["calls"].append(_CALL | {"place": 2.0}), "calls holds"),
        (lambda d: d["seam"].pop("points"), "seam: points is missing"),
        (lambda d: d["teacher"].pop("tensors"), "teacher: tensors is missing"),
        (lambda d: d["teacher"].update(source=5), "source is 5"),
        (lambda d: d["budget"].update(seed="x"), "seed is 'x', expected a whole number"),
        (lambda d: d.update(score=[1]), r"score is \[1\], expected text or null"),
        (lambda d: d["budget"].update(keep="a"), "keep is 'a', expected a share"),
        (lambda d: d["budget"].update(keap=1), "no option 'keap'; did you mean 'keep'"),
        (lambda d: d.update(latency={"setting": {}}), "latency: student_ms is missing"),
        (lambda d: d["macs"].update(student="a"), r"macs\['student'\]"),
        (lambda d: d["seam"].update(points=[]), "seam has no points"),
        (lambda d: d["widths"].clear(), "widths lacks"),
    ],
)
def test_nonsense_is_named(prepared, tmp_path, change, words):
    data = json.loads(prepared[2].dumps())
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=words) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\0"])
def test_no_plan_at_all(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="reading the plan"):
        read_plan(path)
    with pytest.raises(PlanError, match="reading the plan"):
        read_plan(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["widths"].update(nowhere=3), "no group 'nowhere'"),
        (lambda d: d["widths"].update(stem=9), "stem is 9, expected 1 to 8"),
        (lambda d: d["widths"].update({"stage2.0.conv2": 4}), "cannot be cut to 4 of 16: the seam's own channels"),
        (lambda d: d["slices"]["stem.weight"].update({"0": [0, 1, 2, 3]}), "edit only widths and drop"),
        (lambda d: d["keep"].update(stem=[1, 1, 2, 3]), "repeated or above 7"),
        (lambda d: d["keep"].update(stem=[1, 2, 3, 99]), "repeated or above 7"),
    ],
)
def test_edits_that_do_not_fit(prepared, change, words):
    model, anatomy, plan = prepared
    data = json.loads(plan.dumps())
    change(data)
    with pytest.raises(PlanError, match=words):
        replan(model, anatomy, Plan.from_json(data))


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ({"stem.weight": {0: [0, 99]}}, r"cutting stem.weight \(8, 3, 3, 3\) along axis 0"),
        ({"stem.weight": {7: [0]}}, "along axis 7"),
        ({"stem.weight": {0: [3, 1]}}, "expected rising positions"),
        ({"nowhere.weight": {0: [1]}}, "no such tensor"),
        ({"fc.weight": {1: [1]}}, "belongs to the head"),
    ],
)
def test_cut_refuses_slices_that_do_not_fit(prepared, slices, words):
    model, _, plan = prepared
    with pytest.raises(PlanError, match=words):
        cut(model, dataclasses.replace(plan, slices=slices))


def test_cut_refuses_edits_that_do_not_fit(prepared):
    model, _, plan = prepared
    edit = {"module": "stem", "attribute": "out_channels", "index": None, "from": 99, "to": 4}
    with pytest.raises(PlanError, match="found 8, the plan expects 99"):
        cut(model, dataclasses.replace(plan, edits=[edit]))
    with pytest.raises(PlanError, match="nowhere"):
        cut(model, dataclasses.replace(plan, edits=[{**edit, "module": "nowhere"}]))


def test_a_plan_of_another_teacher_names_the_first_difference(prepared):
    with pytest.raises(
        PlanError, match=r"plan for Residual to Chain: stem.weight is missing, expected 8x3x3x3 float32"
    ):
        cut(randomised(Chain()), prepared[2])
    wider = randomised(Residual())
    wider.extra = torch.nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"it has extra.weight \(2x2 float32\)"):
        cut(wider, prepared[2])


def test_a_plan_file_is_not_replaced_by_chance(tmp_path):
    path = tmp_path / "plan.json"
    check_plan_file(path)
    path.write_text("mine")
    with pytest.raises(PlanError, match="--force"):
        check_plan_file(path)
    check_plan_file(path, force=True)
    with pytest.raises(PlanError, match="no folder"):
        check_plan_file(tmp_path / "none" / "plan.json")
