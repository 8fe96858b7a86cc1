"""run.toml says what a result was made with, and makes it again."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import Chain

import mimicut as us
from mimicut.base.ranks import Ranks
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.surgery.budget import Budget, Latency
from mimicut.workflow.request import Images, Request
from mimicut.workflow.run_file import run_file

CONFIG = us.preset("default", steps=3, views="none")


def written(teacher, given, **fields):
    text = run_file(teacher, given, Request(**({"config": CONFIG, "budget": Budget(keep=0.5)} | fields)))
    return tomllib.loads(text), text


def test_everything_that_was_asked_for_is_in_it():
    teacher = us.load_teacher("demo:resnet14", part="layer1", views="patches")
    latency = Latency(share=0.6, runtime="onnxruntime", threads=1, batch=2)
    found, text = written(
        teacher, "photos", budget=Budget(latency=latency, params=0.4, drop=("layer1.1",), divisor=8, score="l2"),
        images=Images(held_out="other", labelled="val"), seam=("layer1:output",), max_seconds=60.0,
        max_memory=3 * 10**9, extra="walls", min_agreement=0.9, with_alternatives=True, export_to=("onnx", "int8"),
        crossfit=4,
    )  # fmt: skip
    expected = {
        "teacher": "demo:resnet14", "part": "layer1", "images": "photos", "params": 0.4, "divisor": 8,
        "latency": [0.6], "runtime": "onnxruntime", "batch": 2, "drop": ["layer1.1"], "importance": "l2",
        "preset": "default", "steps": 3, "precision": "auto", "layout": "auto", "views": "none",
        "held_out": "other", "labelled": "val", "extra": "walls", "seam": ["layer1:output"], "max_seconds": 60.0,
        "max_memory": "3000000000", "min_agreement": 0.9, "alternatives": True, "to": "onnx,int8", "crossfit": 4,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert found == expected
    assert text.count("#") == 2


def test_of_several_devices_it_says_what_starts_them_again(monkeypatch):
    monkeypatch.setattr("mimicut.workflow.run_file.current", lambda: Ranks(0, 3))
    teacher = us.load_teacher("demo:resnet14")
    for own, kind in (("cuda:0", "cuda"), ("cpu", "cpu")):
        found, _ = written(teacher, "photos", config=replace(CONFIG, device=own))
        assert (found["devices"], found["device"]) == (3, kind)
        assert found["threads"] == 3 * torch.get_num_threads()
    for name, value in (("RANK", 0), ("WORLD_SIZE", 3), ("LOCAL_WORLD_SIZE", 2)):  # the third one is elsewhere
        monkeypatch.setenv(name, str(value))
    found, _ = written(teacher, "photos", config=replace(CONFIG, device="cpu"))
    assert (found["devices"], found["threads"]) == (3, 2 * torch.get_num_threads())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": replace(CONFIG, momentum=0.5)}, "a recipe other than the presets"),
        ({"example": torch.zeros(2, 3, 8, 8)}, "example"),
        ({"images": Images(split_seed=3)}, "labels or split_seed"),
    ],
)
def test_what_the_command_line_cannot_say_is_a_comment(changes, words):
    teacher = own_teacher(Chain(), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    found, text = written(teacher, torch.zeros(2, 3, 8, 8), **changes)
    assert "teacher" not in found
    assert "images" not in found
    comments = [line for line in text.splitlines() if line.startswith("# ")][3:]
    assert len(comments) == 3
    assert any(words in line and "give it in Python" in line for line in comments)


def test_it_lies_in_the_folder_and_goes_with_it(tmp_path):
    teacher = own_teacher(Chain(), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    images = torch.randn(12, 3, 8, 8)
    for keep in (0.5, 0.7):
        us.compress(teacher, images, keep=keep, config=CONFIG, folder=tmp_path / "small", force=True)
        found = tomllib.loads((tmp_path / "small" / "run.toml").read_text())
        assert (found["keep"], found["out"]) == ([keep], str(tmp_path / "small"))
    plan = us.read_plan(tmp_path / "small" / "plan.json")
    us.compress(teacher, images, plan=plan, config=CONFIG, folder=tmp_path / "again")
    found = tomllib.loads((tmp_path / "again" / "run.toml").read_text())
    assert found["plan"] == str(tmp_path / "again" / "plan.json")
    assert "keep" not in found


@pytest.mark.parametrize(
    ("recipe", "budget", "written_seed", "comments"),
    [(2021, 0, None, 0), (7, 7, 7, 0), (7, 0, None, 1), (2021, 7, None, 1)],
)
def test_a_seed_is_written_where_the_flag_says_the_same(recipe, budget, written_seed, comments):
    teacher = us.load_teacher("demo:resnet14")
    fields = {"config": replace(CONFIG, seed=recipe), "budget": Budget(keep=0.5, seed=budget)}
    found, text = written(teacher, "photos", **fields)
    assert found.get("seed") == written_seed
    assert found["preset"] == "default"
    assert text.count("a seed of the budget") == comments


def test_numbers_of_any_kind_and_any_letters_are_toml(tmp_path):
    teacher = us.load_teacher("demo:resnet14")
    found, _ = written(teacher, tmp_path / "été 🙂", budget=Budget(keep=np.float64(0.5), min_channels=4))
    assert found["keep"] == [0.5]
    assert found["images"] == str(tmp_path / "été 🙂")


@pytest.mark.long
def test_of_a_crossfit_it_says_what_was_given(tmp_path):
    teacher = own_teacher(Chain(), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    np.save(tmp_path / "few.npy", np.random.default_rng(0).random((12, 3, 8, 8), np.float32))
    us.crossfit(
        teacher, tmp_path / "few.npy", 2, keep=0.5, config=CONFIG, folder=tmp_path / "small", min_agreement=0.01
    )
    found = tomllib.loads((tmp_path / "small" / "run.toml").read_text())
    assert found["images"] == str(tmp_path / "few.npy")
    assert (found["crossfit"], found["min_agreement"]) == (2, 0.01)


def test_a_student_is_named_where_a_command_can_build_it():
    teacher = us.load_teacher("demo:resnet14")
    request = Request(config=CONFIG)
    found = tomllib.loads(run_file(teacher, "photos", request, student="pruned.py:build"))
    assert found["student"] == "pruned.py:build"
    text = run_file(teacher, "photos", request, student="torch-pruning 1.6")
    assert "student" not in tomllib.loads(text)
    assert "# the student (torch-pruning 1.6) came as a module" in text
