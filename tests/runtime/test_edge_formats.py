"""Files for phones: each agrees with the student, or the error says what stands in the way and nothing is left."""

import contextlib
import importlib.metadata
import io
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from nets import Chain

import mimicut as us
from benchmarks.studies.edge_formats import one
from mimicut.base.errors import InputError, LawBroken, UnsupportedModel
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results.layer_table import layer_table
from mimicut.runtime import edge_converter, edge_formats
from mimicut.runtime.edge_formats import EDGE, check_converter, variable
from mimicut.runtime.export import export

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.long
@pytest.mark.parametrize("kind", EDGE)
def test_the_demo_student_agrees_in_every_format(kind, tmp_path):
    try:
        check_converter(kind)
    except InputError as error:
        pytest.skip(str(error))  # its environment is missing: the variable names it
    teacher = us.load_teacher("demo:resnet14").model
    example = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    student = us.cut(teacher, us.make_plan(teacher, us.trace(teacher, example), keep=0.5))
    found = export(student, example, tmp_path, formats=[kind])
    assert found.edge_images == 1
    assert (tmp_path / EDGE[kind].file).stat().st_size > found.bytes / 2
    assert found.not_run if kind == "coreml" and sys.platform != "darwin" else found.errors[kind] <= 1e-4


@pytest.mark.long
@pytest.mark.parametrize("kind", ["executorch", "coreml"])
@pytest.mark.parametrize(
    "name", ["timm:levit_128s", "timm:swin_tiny_patch4_window7_224", "torchvision:mobilenet_v3_small"]
)
def test_a_sample_of_the_zoo_agrees(name, kind):
    line = one(name, kind)
    assert "error" not in line, line
    assert "not_run" in line if kind == "coreml" and sys.platform != "darwin" else line["difference"] <= 1e-4


def run_program(path, calls):
    with open(path, "rb") as file:
        program = torch.export.load(file).module()
    with torch.no_grad():
        return [[program(*map(torch.from_numpy, call)).numpy()] for call in calls]


@pytest.fixture
def converters(monkeypatch):
    """Converters that write the program itself, in this process, instead of those that may not be installed."""

    def start(python, *arguments):
        printed = io.StringIO()
        monkeypatch.setattr(sys, "argv", ["edge_converter.py", *arguments])
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            edge_converter.main()
        return subprocess.CompletedProcess([], 0, printed.getvalue(), "")

    monkeypatch.setattr(edge_formats, "_start", start)
    monkeypatch.setattr(edge_formats, "_python", lambda kind: sys.executable)
    monkeypatch.setattr(edge_converter, "check", lambda kind: {"missing": [], "torch": None, "device": None})
    monkeypatch.setattr(
        import_module("mimicut.runtime.export"), "not_run", lambda kind: "a reason" if kind == "coreml" else None
    )
    for kind in EDGE:
        monkeypatch.setitem(edge_converter.WRITE, kind, shutil.copyfile)
        monkeypatch.setitem(edge_converter.RUN, kind, run_program)
    said = {"inputs": [[1, 3, 8, 8]], "outputs": [[1, 5]], "numbers": 1400}
    monkeypatch.setattr(edge_converter, "describe_coreml", lambda path: said)
    return said


def test_files_of_one_image_are_compared_and_described(converters, tmp_path, monkeypatch):
    own = own_teacher(randomised(Chain()), Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.99, source=own.to_json())
    folder = tmp_path / "small"
    us.save(folder, model=us.cut(own.model, plan), plan=plan, report=us.Report())
    report = us.export_folder(folder, ["litert", "coreml"], teacher=Chain)
    litert, coreml = report.exports["litert"], report.exports["coreml"]
    assert (litert["batch"], litert["opset"], litert["not_run"]) == ("1", None, None)
    assert "one image at a time" in litert["fixed_because"]
    assert litert["error_random"] < 1e-6
    assert (coreml["error_random"], coreml["error_real"], coreml["not_run"]) == (None, None, "a reason")
    assert (folder / "model.tflite").is_file()
    assert (folder / "model.mlpackage.zip").is_file()
    table, page, readme = report.table(), (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert "model.mlpackage.zip: 0." in table
    assert "batch 1; not run: a reason" in table
    assert "<td>not run</td>" in page.replace('<td class="n">', "<td>")
    assert "model.mlpackage.zip: a reason" in page
    assert "`model.tflite` is for LiteRT, one image at a time." in readme
    assert "It was not run here: a reason" in readme
    assert us.load(folder, Chain) is not None  # the schema of the report takes all this
    with pytest.raises(InputError, match="comparing layers: found litert, whose files show no values"):
        us.explain_export(folder, "litert", teacher=Chain)
    with pytest.raises(InputError, match="comparing layers: found coreml"):
        us.export_folder(folder, ["coreml"], teacher=Chain, explain=True, force=True)
    # Of several files those are compared that can be.
    report = us.export_folder(folder, ["onnx", "litert"], teacher=Chain, explain=True, force=True)
    assert report.exports["onnx"]["layers"]["rows"]
    assert "layers" not in report.exports["litert"]
    said = layer_table(report, ["onnx", "litert"])
    assert "model.onnx, layer by layer" in said
    assert "model.tflite: not compared layer by layer, as it shows no values of its layers" in said


def test_a_file_with_other_outputs_is_refused(converters, tmp_path, monkeypatch):
    monkeypatch.setitem(edge_converter.RUN, "executorch", lambda path, calls: [[np.zeros((1, 5), np.float32)]])
    with pytest.raises(
        LawBroken, match=r"comparing model\.pte with the Chain it was made of: they differ by 1\.0e\+00"
    ):
        export(Chain(), IMAGES, tmp_path / "out", formats=["pt2", "executorch"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [[1, 6]]}, r"found outputs of shapes \[\[1, 6\]\], expected \[\[1, 5\]\]"),
        ({"inputs": []}, r"found inputs of shapes \[\], expected \[\[1, 3, 8, 8\]\]"),
        ({"numbers": 700}, "it holds 700 numbers, expected about"),
        ({"numbers": 90_000}, "it holds 90,000 numbers, expected about"),
    ],
)
def test_a_file_that_cannot_be_run_is_compared_by_its_structure(converters, change, message, tmp_path):
    converters.update(change)
    with pytest.raises(LawBroken, match=message):
        export(Chain(), IMAGES, tmp_path / "out", formats=["coreml"])
    assert not (tmp_path / "out").exists()


def test_the_operator_that_stops_a_converter_is_named(converters, tmp_path, monkeypatch):
    def write(source, target):
        raise RuntimeError("Lowering not found:\n aten.grid_sampler_3d.default")

    monkeypatch.setitem(edge_converter.WRITE, "litert", write)
    with pytest.raises(UnsupportedModel) as raised:
        export(Chain(), IMAGES, tmp_path / "out", formats=["litert"])
    assert str(raised.value) == (
        "converting Chain to model.tflite: litert-torch and ai-edge-litert stopped at the operator "
        "aten.grid_sampler_3d.default with RuntimeError: Lowering not found: aten.grid_sampler_3d.default; expected "
        "operators that LiteRT has; --to onnx may have them"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
            r"stopped with (signal 15|exit code \d+); expected",
        ),
        ("import sys; sys.exit('no memory left')", "stopped with exit code 1: no memory left; expected"),
        ("print('{}')", "stopped with no file; expected"),
    ],
)
def test_a_converter_that_dies_leaves_nothing(script, message, tmp_path, monkeypatch):
    monkeypatch.setattr(edge_converter, "check", lambda kind: {"missing": [], "torch": None, "device": None})
    monkeypatch.setattr(edge_formats, "_SCRIPT", tmp_path / "converter.py")
    (tmp_path / "converter.py").write_text(script)
    with pytest.raises(UnsupportedModel, match=message):
        export(Chain(), IMAGES, tmp_path / "out", formats=["litert"])
    assert not (tmp_path / "out").exists()


def without(monkeypatch, installed):
    """Only these packages are there: name -> (version, requirements)."""

    def find(name, place):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name][place]

    monkeypatch.setattr(importlib.metadata, "version", lambda name: find(name, 0))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: find(name, 1))
    for kind in EDGE:
        monkeypatch.delenv(variable(kind), raising=False)


def test_a_converter_that_is_not_installed_is_named_with_the_line_that_helps(monkeypatch, tmp_path):
    without(monkeypatch, {"torch": ("2.15.0", [])})
    with pytest.raises(InputError) as raised:
        export(Chain(), IMAGES, tmp_path / "out", formats=["litert"])
    assert str(raised.value) == (
        "exporting to litert: litert-torch, ai-edge-litert are not installed here; expected an environment of its own: "
        "python -m venv .venv-litert; .venv-litert/bin/pip install litert-torch ai-edge-litert; "
        "export MIMICUT_LITERT_PYTHON=.venv-litert/bin/python. Or install them here, which may replace torch "
        f"{torch.__version__}: pip install 'mimicut[litert]'"
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"expected the extra `coreml`: pip install 'mimicut\[coreml\]', or an env"):
        check_converter("coreml")  # which does not need torch


def test_a_converter_that_wants_another_torch_is_named_with_the_line_that_helps(monkeypatch):
    packages = {
        "litert-torch": ("0.10.0", ["numpy", "torch<2.15.0,>=2.4.0", "torch>=9; extra == 'no'"]),
        "ai-edge-litert": ("2.3.0", []), "torch": ("2.15.0+cu132", []),
    }  # fmt: skip
    without(monkeypatch, packages)
    with pytest.raises(
        InputError, match=r"wants torch <2\.15\.0,>=2\.4\.0, found torch 2\.15\.0\+cu132 here; expected an"
    ):
        check_converter("litert")
    packages["torch"] = ("2.14.1", [])
    check_converter("litert")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which an engine can be made")
def test_an_engine_without_a_gpu_is_refused(monkeypatch):
    without(monkeypatch, {"torch": ("2.15.0", [])})
    with pytest.raises(
        InputError, match=r"exporting to tensorrt: torch .* finds no CUDA device; expected an NVIDIA GPU"
    ):
        check_converter("tensorrt")


def test_a_variable_that_names_no_python_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MIMICUT_COREML_PYTHON", str(tmp_path / "python"))
    with pytest.raises(
        InputError, match=r"MIMICUT_COREML_PYTHON is .*python, which is no file; expected the Python of"
    ):
        check_converter("coreml")
    (tmp_path / "python").write_text("nothing that runs")
    with pytest.raises(
        InputError, match=r"MIMICUT_COREML_PYTHON is .*python, which answers exit code 1: .*coremltools"
    ):
        check_converter("coreml")


def test_another_environment_is_asked_what_it_has(monkeypatch, tmp_path):
    environment = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (python,) = (p for p in (environment / "bin/python", environment / "Scripts/python.exe") if p.exists())
    monkeypatch.setenv("MIMICUT_EXECUTORCH_PYTHON", str(python))
    with pytest.raises(InputError, match=r"executorch is not installed for .*python\S*; expected an environment"):
        check_converter("executorch")


def test_arrays_keep_their_order(tmp_path):
    calls = [[np.array(10 * i + k) for k in range(12)] for i in range(11)]
    np.savez(tmp_path / "calls.npz", **edge_converter.arrays_of(calls))
    assert edge_converter.calls_in(str(tmp_path / "calls.npz")) == calls


class Aliased(torch.nn.Module):
    def forward(self, x):
        return torch.ops.aten.alias(x.relu()) + 1, torch.ops.aten.alias(x.sigmoid())


def test_aliases_are_what_they_stand_for_but_for_outputs():
    program = edge_converter._without_aliases(torch.export.export(Aliased(), (IMAGES,)).run_decompositions({}))
    assert [str(node.target) for node in program.graph.nodes].count("aten.alias.default") == 1
    for found, wanted in zip(program.module()(IMAGES), Aliased()(IMAGES), strict=True):
        assert torch.equal(found, wanted)
