"""A student that another tool pruned (torch-pruning) is recovered and stored as files that run by themselves."""

import json
import os
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
import torch_pruning
from command_line import call
from nets import Chain

import mimicut as us
from mimicut import demo
from mimicut.base.errors import InputError, StoreError
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import PRESETS

SAID = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
STEPS = us.preset("default", steps=5)


def photos(n=10):
    return np.random.default_rng(0).integers(0, 255, (n, 8, 8, 3), np.uint8)


def pruned(model, example):
    """By another tool, at half of what goes into the last convolution before the seam."""
    import copy

    student = copy.deepcopy(model)
    convolutions = [m for m in student.modules() if isinstance(m, torch.nn.Conv2d)]
    graph = torch_pruning.DependencyGraph().build_dependency(student, example)
    first = convolutions[0]
    group = graph.get_pruning_group(first, torch_pruning.prune_conv_out_channels, list(range(first.out_channels // 2)))
    group.prune()
    return student


@pytest.fixture
def pair():
    own = own_teacher(randomised(Chain()), SAID)
    return own, pruned(own.model, own.example())


@pytest.mark.long
def test_it_comes_nearer():
    teacher, student = us.load_teacher("demo:resnet14"), us.load_teacher("demo:resnet14").model
    graph = torch_pruning.DependencyGraph().build_dependency(student, teacher.example())
    for block in (student.layer1[0], student.layer2[1], student.layer3[1]):
        graph.get_pruning_group(
            block.conv1, torch_pruning.prune_conv_out_channels, list(range(block.conv1.out_channels // 2))
        ).prune()
    few, test, views = demo.few_images(30, 1), demo.test_set()[0][:300], {"views": teacher.views}
    errors = [
        us.recover_pruned(teacher, student, few, held_out=test, config=config)[1].feature_error_relative
        for config in (
            us.preset("paper", steps=0, **views),
            us.preset("default", steps=0, **views),
            us.preset("default", steps=20, **views),
        )
    ]
    assert errors[2] < 0.9 * errors[1] < 0.81 * errors[0]


@pytest.mark.long
def test_it_stands_by_itself(pair, tmp_path):
    own, student = pair
    before = [t.clone() for t in student.state_dict().values()]
    small = tmp_path / "small"
    model, report = us.recover_pruned(
        own, student, photos(), folder=small, config=us.preset("default", steps=30, views="none"),
        export_to=["pt2", "onnx"],
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, student.state_dict().values(), strict=True))
    assert (report.params_student, report.steps) == (sum(p.numel() for p in model.parameters()), 30)
    assert report.macs_student < report.macs_teacher
    assert torch.equal(model.fc.weight, own.model.fc.weight)
    assert sorted(p.name for p in small.iterdir()) == [
        "README.md", "model.onnx", "model.pt2", "preprocessing.json", "report.html", "report.json",
        "run.toml",
    ]  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(small / "model.pt2").module()(x), model(x), atol=1e-5)
    assert "Pruned by another tool (module)" in (small / "report.html").read_text()
    readme = (small / "README.md").read_text()
    assert "plan.json" not in readme
    assert "mimicut.load" not in readme
    for block in readme.split("```python\n")[1:]:
        code = block.partition("```")[0]
        if "openvino" in code:  # that file was not made, and the README says so
            continue
        subprocess.run([sys.executable, "-c", code], cwd=small, check=True, env={**os.environ, "PYTHONPATH": ""})
    with pytest.raises(StoreError, match="a student that another tool pruned, as exported files"):
        us.load(small)
    with pytest.raises(StoreError, match="it exists"):
        us.recover_pruned(own, student, photos(), folder=small, config=STEPS)
    us.recover_pruned(own, student, photos(), folder=small, config=STEPS, force=True)
    assert not (small / "model.onnx").exists()


def test_images_that_trained_the_teacher_cannot_show_an_agreement(pair):
    from dataclasses import replace

    own, student = pair
    given = us.read_images(photos(20), SAID)
    taught = replace(own, result={"images": given.hashes})
    with pytest.raises(InputError, match="4 of the held-out images trained the teacher"):
        us.recover_pruned(taught, student, given, config=STEPS, min_agreement=0.01)
    notes = us.recover_pruned(taught, student, given, config=STEPS)[1].notes
    assert any("4 held-out image(s) trained the teacher" in note for note in notes)


def test_batch_norms_are_measured_anew_by_the_default_recipe_alone(pair):
    own, student = pair
    found = [us.recover_pruned(own, student, photos(), config=us.preset(p, steps=0))[0] for p in ("default", "paper")]
    name = next(n for n, _ in student.named_buffers() if n.endswith("running_mean"))
    assert not torch.equal(found[0].get_buffer(name), student.get_buffer(name))
    assert torch.equal(found[1].get_buffer(name), student.get_buffer(name))
    assert PRESETS["default"].start == "closed_form"


def test_what_is_refused(pair, tmp_path):
    own, _ = pair
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(InputError, match=r"the student has no tensor 'fc\.weight'"):
        us.recover_pruned(own, other, photos(), folder=tmp_path / "small", config=STEPS)
    with pytest.raises(InputError, match="found int8, expected one or more of pt2"):
        us.recover_pruned(own, own.model, photos(), folder=tmp_path / "small", config=STEPS, export_to=["int8"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(place, capsys):
    (place / "pruned.py").write_text((place / "net.py").read_text())
    code, line, err = call(
        capsys, "recover", "net.py:build", "pruned.py:build", "photos", "--out", "small", "--steps", 2, "--to", "onnx"
    )
    assert code == 0, err
    assert line["steps"] == 2
    assert json.loads((place / "small" / "report.json").read_text())["exports"]["onnx"]["error_real"] < 1e-4
    found = tomllib.loads((place / "small" / "run.toml").read_text())
    assert {name: found[name] for name in ("teacher", "student", "images", "steps", "to")} == {
        "teacher": "net.py:build", "student": "pruned.py:build", "images": "photos", "steps": 2, "to": "onnx",
    }  # fmt: skip
    assert "`mimicut recover --config run.toml --out" in (place / "small" / "README.md").read_text()
    code, again, err = call(capsys, "recover", "--config", "small/run.toml", "--out", "again")
    assert code == 0, err
    assert again["feature_error_relative"] == line["feature_error_relative"]
    models = [(place / name / "model.onnx").read_bytes() for name in ("small", "again")]
    assert models[0] == models[1]
    code, _, err = call(capsys, "verify", "small", "photos")
    assert code == 2
    assert "another tool pruned" in err
