"""A result folder that release 0.1 wrote still works; one of a newer release is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import mimicut as us
from mimicut import demo
from mimicut.base.errors import PlanError, StoreError
from mimicut.results.files import FILES
from mimicut.results.store import read
from mimicut.workflow.verify import verify_folder

FOLDER = Path(__file__).parent / "data" / "result_of_release_0_1"
CLASSES = 20


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "old"))


def changed(folder, name, **fields):
    """Change fields of a JSON file in the folder."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def newer(folder):
    report = json.loads((folder / "report.json").read_text())
    changed(folder, "report.json", stored={**report["stored"], "version": 2})


def test_it_loads_with_the_right_shapes_and_gives_finite_outputs():
    plan, report, _ = read(FOLDER)
    model = us.load(FOLDER)
    weights = model.state_dict()
    for group, width in plan.widths.items():
        assert weights[f"{group}.weight"].shape[0] == width
    assert isinstance(model.features[4], torch.nn.Identity)
    assert sum(p.numel() for p in model.parameters()) == report.params_student == 38516
    assert not model.training
    with torch.no_grad():
        scores = model(torch.randn(3, 1, 32, 32))
    assert scores.shape == (3, CLASSES)
    assert bool(torch.isfinite(scores).all())


def test_its_plan_and_report_are_read_whole():
    plan, report, extra = read(FOLDER)
    assert plan.latency.wanted_share == plan.budget.latency.share == 0.6
    assert plan.drop == ["features.4"]
    assert plan.teacher["source"]["spec"] == "demo:mobilenetv2_tiny"
    assert (report.top1_agreement, report.images_held_out) == (0.75, 12)
    assert report.versions["understudy"] == "0.1.0"
    assert extra == {}


def test_it_is_verified_against_its_teacher():
    report = verify_folder(FOLDER, demo.few_images(24, 7))
    assert report.images_held_out == 24
    assert 0.3 < report.top1_agreement < 1
    assert 0 < report.feature_error_relative < 1
    assert report.params_student == 38516


def test_it_is_exported(copy):
    import onnxruntime

    before = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    report = us.export_folder(copy, ["onnx"])
    assert report.exports["onnx"]["error_random"] < 1e-4
    images = torch.randn(2, 1, 32, 32)
    session = onnxruntime.InferenceSession(copy / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = us.load(copy)(images)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
    assert "# Student of demo:mobilenetv2_tiny" in (copy / "README.md").read_text()  # its pages are made anew
    assert "pip install mimicut" in (copy / "README.md").read_text()
    assert read(copy)[1].exports == report.exports
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == before


def test_it_serves_as_a_teacher():
    teacher = us.load_teacher(FOLDER)
    assert teacher.preprocessing.input_size == (1, 32, 32)
    assert teacher.views == "patches"
    assert len(teacher.result["images"]) == len(set(teacher.result["images"])) > 0
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher.model(images), us.load(FOLDER)(images))
    plan = us.make_plan(teacher.model, us.trace(teacher.model, teacher.example()), keep=0.7, source=teacher.to_json())
    assert us.cut(teacher.model, plan)(images).shape == (2, CLASSES)


def test_it_is_replaced_with_force(copy):
    plan, report, _ = read(copy)
    us.save(copy, model=us.load(copy), plan=plan, report=report, force=True)
    assert json.loads((copy / "report.json").read_text())["stored"]["version"] == 1
    assert read(copy)[1] == report


def uses(folder):
    """Everything that reads a result."""
    return {
        "read": lambda: read(folder),
        "load": lambda: us.load(folder),
        "export": lambda: us.export_folder(folder, ["pt2"]),
        "verify": lambda: verify_folder(folder, demo.few_images(3, 7)),
        "teacher": lambda: us.load_teacher(folder),
    }


@pytest.mark.parametrize("use", uses(FOLDER))
@pytest.mark.parametrize("fields", [{}, {"branches": []}, {"asked": "keep half"}])
def test_a_plan_of_a_newer_release_is_refused(copy, use, fields):
    changed(copy, "plan.json", version=3, **fields)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(PlanError, match=r"plan\.json: .*version 3, .* versions 1 to 2: .*newer release; update"):
        uses(copy)[use]()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("use", uses(FOLDER))
@pytest.mark.parametrize("fields", [{}, {"energy": 3}])
def test_a_report_of_a_newer_release_is_refused(copy, use, fields):
    changed(copy, "report.json", **fields)
    newer(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(StoreError, match=r"report\.json: .*version 2, .* version 1: .*newer release; update mimicut"):
        uses(copy)[use]()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_plan_file_of_a_newer_release_is_refused(copy):
    changed(copy, "plan.json", version=3)
    with pytest.raises(PlanError, match="newer release; update mimicut"):
        us.read_plan(copy / "plan.json")


@pytest.mark.parametrize("version", ["two", 0, None, True])
def test_a_version_that_is_none_is_refused(copy, version):
    changed(copy, "plan.json", version=version)
    with pytest.raises(PlanError, match="version"):
        us.load(copy)


def test_a_report_with_an_unknown_entry_says_that_it_may_be_newer(copy):
    changed(copy, "report.json", energy=3)
    with pytest.raises(StoreError, match=r"unknown entries energy.* newer release"):
        us.load(copy)


def test_the_folder_is_complete():
    assert {*FILES, "README.md", "report.html"} == {path.name for path in FOLDER.iterdir()}
