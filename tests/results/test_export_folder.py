"""Files in a result folder: run by themselves, compared, counted, reported; nothing is left of a failure."""

import json
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from command_line import call
from nets import Chain, Residual

import mimicut as us
from mimicut.base import disk
from mimicut.base.errors import InputError, LawBroken, StoreError
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results.store import read

checks = import_module("mimicut.results.export_checks")
SAID = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.fixture
def result(tmp_path):
    """A saved student of `Chain` with half of its MACs."""
    own = own_teacher(randomised(Chain()), SAID)
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.5, source=own.to_json())
    us.save(tmp_path / "small", model=us.cut(own.model, plan), plan=plan, report=us.Report(params_teacher=1))
    return tmp_path / "small"


def test_files_of_any_height_and_width(result, capsys):
    assert call(capsys, "export", result, "--to", "onnx", "--dynamic-size", "--teacher", f"{__file__}:Chain")[0] == 0
    report = read(result)[1]
    assert report.exports["onnx"]["size"] == "any"
    assert "any height and width" in report.table()
    assert "any height and width" in (result / "README.md").read_text()


def photos(n=3):
    return np.random.default_rng(0).integers(0, 255, (n, 8, 8, 3), np.uint8)


@pytest.mark.long
def test_every_format_is_run_by_itself_on_random_and_real_images(result, tmp_path):
    np.save(tmp_path / "photos.npy", photos())
    report = us.export_folder(result, ["onnx", "openvino", "pt2"], images=tmp_path / "photos.npy", teacher=Chain)
    assert report.params_teacher == 1
    assert list(report.exports) == ["onnx", "openvino", "pt2"]
    assert sorted(p.name for p in result.iterdir()) == [
        "README.md", "model.bin", "model.onnx", "model.pt2", "model.xml", "plan.json", "preprocessing.json",
        "report.html", "report.json", "weights.safetensors",
    ]  # fmt: skip
    for file in report.exports.values():
        assert (file["batch"], file["precision"], file["tolerance"]) == ("any", "float32", 1e-4)
        assert file["error_random"] < 1e-5
        assert file["error_real"] < 1e-5
        assert file["bytes"] >= (result / file["file"]).stat().st_size
        assert f"{file['file']}: " in report.table()
    assert report.exports["onnx"]["opset"] >= 18
    assert us.Report.from_json(report.to_json()).exports == report.exports
    said = json.loads((result / "preprocessing.json").read_text())
    assert said["mean"] == [0.4, 0.5, 0.6]
    assert said["files"]["model.onnx"].endswith("then (x - mean) / std")
    assert torch.equal(us.load(result, Chain)(torch.ones(1, 3, 8, 8)), us.load(result, Chain)(torch.ones(1, 3, 8, 8)))
    us.save(result, model=us.load(result, Chain), plan=us.read_plan(result / "plan.json"), report=report, force=True)
    assert not (result / "model.onnx").exists()  # of the model that was there before


def test_the_normalisation_can_go_into_the_files(result):
    import onnxruntime

    us.export_folder(result, ["onnx"], teacher=Chain, normalise=True)
    x = torch.rand(5, 3, 8, 8)
    session = onnxruntime.InferenceSession(result / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    mean, std = (torch.tensor(v)[:, None, None] for v in (SAID.mean, SAID.std))
    with torch.no_grad():
        wanted = us.load(result, Chain)((x - mean) / std)
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-5)
    assert json.loads((result / "preprocessing.json").read_text())["files"] == {
        "model.onnx": "float32 (N, C, H, W), values 0 to 1"
    }


def test_a_file_that_differs_elsewhere_fails_the_export(result, monkeypatch):
    before = {p.name: p.read_bytes() for p in result.iterdir()}
    monkeypatch.setattr(
        checks, "run_elsewhere", lambda path, passes, call: [[torch.zeros(len(x), 5)] for (x,) in passes]
    )
    with pytest.raises(LawBroken, match=r"model\.onnx in a process of its own .* random images: outputs differ by 1"):
        us.export_folder(result, ["onnx"], teacher=Chain)
    assert {p.name: p.read_bytes() for p in result.iterdir()} == before
    assert [p.name for p in result.parent.iterdir()] == ["small"]


def test_a_file_that_does_not_run_elsewhere_fails_the_export(result, monkeypatch):
    monkeypatch.setattr(checks, "_RUNNER", result / "nothing.py")
    with pytest.raises(LawBroken, match=r"running model\.onnx in a process of its own: .*nothing\.py"):
        us.export_folder(result, ["onnx"], teacher=Chain)


@pytest.mark.long
def test_a_file_that_holds_more_than_the_student_fails_the_export(tmp_path):
    teacher = us.load_teacher("demo:resnet14").model
    example = torch.zeros(2, 1, 32, 32)
    student = us.cut(teacher, us.make_plan(teacher, us.trace(teacher, example), keep=0.5))
    options = {"formats": ["onnx", "openvino", "pt2", "int8"], "calibrate": [torch.randn(2, 1, 32, 32)]}
    found, whole = (us.export(m, example, tmp_path / n, **options) for n, m in (("s", student), ("t", teacher)))
    for kind in options["formats"]:
        assert checks.check_size(found, found.files[kind], kind) > 0
        with pytest.raises(LawBroken, match=r"it holds .*, the student .*; expected no more"):
            checks.check_size(found, whole.files[kind], kind)


def test_a_file_with_far_more_bytes_than_tensors_fails_the_export(result, monkeypatch):
    monkeypatch.setattr(checks, "OVERHEAD_BYTES", 0)
    with pytest.raises(LawBroken, match=r"it takes [\d,]+ bytes, expected at most"):
        us.export_folder(result, ["onnx"], teacher=Chain)
    assert not (result / "model.onnx").exists()


def test_an_int8_file_with_nothing_in_int8_fails_the_export(tmp_path):
    found = us.export(Chain(), torch.zeros(2, 3, 8, 8), tmp_path, formats=["onnx"])
    with pytest.raises(LawBroken, match=r"found none of its .* numbers in INT8"):
        checks.check_size(found, found.files["onnx"], "int8")


@pytest.mark.parametrize(("kind", "name"), [("openvino", "model.bin"), ("onnx", "model.onnx.data")])
def test_data_of_the_users_beside_a_file_stays(result, kind, name):
    (result / name).write_text("mine")
    with pytest.raises(StoreError, match=f"{name}: it exists"):
        us.export_folder(result, [kind], teacher=Chain)
    assert (result / name).read_text() == "mine"


def test_files_of_the_users_stay(result):
    (result / "README.md").write_text("# My model card\n")
    us.export_folder(result, ["onnx"], teacher=Chain)
    assert (result / "README.md").read_text() == "# My model card\n"
    assert "model.onnx" in (result / "report.html").read_text()
    with pytest.raises(StoreError, match=r"found README\.md"):
        us.save(result, model=Chain(), plan=us.read_plan(result / "plan.json"), report=us.Report(), force=True)


def test_a_preprocessing_file_of_the_users_is_not_replaced(result):
    (result / "preprocessing.json").write_text("{}")
    with pytest.raises(StoreError, match=r"preprocessing\.json: it exists"):
        us.export_folder(result, ["pt2"], teacher=Chain)
    assert (result / "preprocessing.json").read_text() == "{}"


def test_tensors_that_no_pass_uses_are_no_reason_to_refuse(tmp_path):
    class Spare(Chain):
        def __init__(self):
            super().__init__()
            self.spare = torch.nn.Linear(1000, 20)

    own = own_teacher(randomised(Spare()), SAID)
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.7, source=own.to_json())
    us.save(tmp_path / "small", model=us.cut(own.model, plan), plan=plan, report=us.Report())
    assert us.export_folder(tmp_path / "small", ["onnx"], teacher=Spare).exports["onnx"]["error_random"] < 1e-5


def test_a_value_that_is_no_number_fails_the_export(result, monkeypatch):
    def nothing(path, passes, call):
        return [[torch.full((len(x), 5), torch.nan)] for (x,) in passes]

    monkeypatch.setattr(checks, "run_elsewhere", nothing)
    with pytest.raises(LawBroken, match="outputs differ by nan of the largest"):
        us.export_folder(result, ["onnx"], teacher=Chain)


def test_what_is_there_is_replaced_with_force_alone(result):
    us.export_folder(result, ["onnx"], teacher=Chain)
    with pytest.raises(StoreError, match=r"model\.onnx: it exists"):
        us.export_folder(result, ["onnx"], teacher=Chain)
    (result / "model.onnx.data").write_text("of a larger one")
    us.export_folder(result, ["onnx"], teacher=Chain, force=True)
    assert not (result / "model.onnx.data").exists()
    with pytest.raises(InputError, match="found the format tflite, expected one of pt2, onnx, openvino, int8"):
        us.export_folder(result, ["tflite"], teacher=Chain)


def killed_before(number, name):
    """An observer that stops, as a kill does, before the nth move to a path."""
    left = [number]

    def observe(when, kind, path):
        if (when, kind) == ("before", "move") and path.name == name:
            left[0] -= 1
            if not left[0]:
                raise MemoryError("killed")

    return observe


@pytest.mark.long
@pytest.mark.parametrize("name", [".export.complete", "report.json"])
def test_a_killed_export_is_made_again_without_force(result, monkeypatch, name):
    """Nothing that it left is in the way of anything, nor taken for the user's."""
    monkeypatch.setattr("mimicut.base.scratch.remove_folder", lambda path: None)  # nobody tidies up after a kill
    monkeypatch.setattr(disk, "observer", killed_before(1, name))
    with pytest.raises(MemoryError):
        us.export_folder(result, ["pt2"], teacher=Chain)
    monkeypatch.undo()
    assert any(path.name.startswith(".export") for path in result.iterdir())
    shutil.copytree(result, result.with_name("copy"))
    us.save(
        result.with_name("copy"), model=Chain(), plan=us.read_plan(result / "plan.json"), report=us.Report(), force=True
    )  # fmt: skip
    report = us.export_folder(result, ["pt2"], teacher=Chain)
    assert "pt2" in report.exports
    assert [path.name for path in result.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(StoreError, match=r"model\.pt2: it exists"):
        us.export_folder(result, ["pt2"], teacher=Chain)


@pytest.mark.long
def test_two_exports_at_once_do_not_mix(result, monkeypatch):
    run, tried = checks.run_elsewhere, []

    def meanwhile(*given):
        with pytest.raises(StoreError, match="another export into it is under way"):
            us.export_folder(result, ["pt2"], teacher=Chain)
        tried.append(True)
        return run(*given)

    monkeypatch.setattr(checks, "run_elsewhere", meanwhile)
    us.export_folder(result, ["onnx"], teacher=Chain)
    assert tried
    monkeypatch.setattr(checks, "run_elsewhere", run)
    us.export_folder(result, ["openvino"], teacher=Chain)  # the lock is gone with the first
    assert {"model.onnx", "model.xml"} <= {path.name for path in result.iterdir()}


def test_a_part_is_exported_by_itself(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Residual()

        def forward(self, images):
            return [{"boxes": self.body(x[None])} for x in images]

    own = own_teacher(Two(), Preprocessing(Residual.size, (0.5,) * 3, (0.5,) * 3), part="body")
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.7, source=own.to_json())
    student = us.cut(own.model, plan)
    us.save(tmp_path / "small", model=own.completed(student), plan=plan, report=us.Report())
    report = us.export_folder(tmp_path / "small", ["onnx"], teacher=Two)
    assert report.exports["onnx"]["error_random"] < 1e-6


def test_the_runner_imports_nothing_of_mimicut(result):
    us.export(us.load(result, Chain), torch.zeros(2, 3, 8, 8), result, formats=["pt2"])
    batches = {f"{number}.0": np.ones((2 + number, 3, 8, 8), np.float32) for number in range(2)}
    np.savez(result.parent / "given.npz", call='{"keyword": null, "options": {}}', **batches)
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not any(m.partition('.')[0] == 'mimicut' for m in sys.modules)"
    )
    paths = [result / "model.pt2", result.parent / "given.npz", result.parent / "out.npz"]
    subprocess.run([sys.executable, "-P", "-c", code, str(checks._RUNNER), *map(str, paths)], check=True)
    found = np.load(result.parent / "out.npz")
    assert {name: found[name].shape for name in found.files} == {"0.0": (2, 5), "1.0": (3, 5)}


def test_the_command_line(place, capsys):
    assert call(capsys, "compress", "net.py:build", "photos", "--keep", 0.5, "--out", "small", "--steps", 1)[0] == 0
    own = ("export", "small", "--teacher", "net.py:build", "--images", "photos", "--to", "onnx,openvino")
    code, line, err = call(capsys, *own)
    assert code == 0
    assert list(line["exports"]) == ["onnx", "openvino"]
    assert line["exports"]["onnx"]["error_real"] < 1e-4
    assert "model.onnx: " in err
    assert call(capsys, *own)[0] == 2  # they exist
    other = (*own[:4], "--held-out", "photos", "--to", "onnx", "--force")
    code, line, _ = call(capsys, *other)
    assert (code, line["exports"]["onnx"]["error_real"] < 1e-4) == (0, True)
    code, line, err = call(capsys, "export", "small", "--to", "pt2")
    assert (code, line) == (2, None)
    assert "never run from a folder" in err
