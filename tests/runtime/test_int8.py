"""INT8: quantised by images that the student learned from, compared on others, beside the teacher."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import call
from nets import Chain, Residual
from torch import nn

import mimicut as us
from mimicut.base.errors import InputError, LawBroken, UnsupportedModel
from mimicut.demo import few_images
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results import store
from mimicut.results.report import int8_sentence
from mimicut.runtime import int8
from mimicut.runtime.export import FILES, run_onnx

module = import_module("mimicut.results.export_folder")
SAID = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
NAMES = ["teacher", "teacher, INT8", "student", "student, INT8"]


def photos(n, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, and a folder with a student of it that learned from 8 of `photos(10)`."""
    folder, own = tmp_path_factory.mktemp("int8") / "small", own_teacher(randomised(Chain()), SAID)
    us.compress(own, photos(10), keep=0.5, folder=folder, config=us.preset("default", steps=2))
    return own, folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(import_module("mimicut.proof.int8_table"), "_SECONDS", 0.0)


@pytest.mark.parametrize("nearer", ["widest", "narrow"])
def test_ranges_are_those_with_which_the_outputs_are_nearer(nearer, tmp_path, monkeypatch, capsys):
    import onnx

    monkeypatch.setattr(int8, "NARROW", 99.0)
    monkeypatch.setattr(int8, "file_errors", lambda paths, _: [float(path.stem != nearer) for path in paths])
    x = torch.randn(32, 3, 8, 8)
    made = us.export(randomised(Chain()), x[:2], tmp_path, formats=["int8"], calibrate=x.split(8))
    graph = onnx.load(made.files["int8"]).graph
    scale = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == "x_scale")
    whole = float(x.max() - x.min()) / 255
    assert float(scale) == pytest.approx(whole, rel=1e-4) if nearer == "widest" else 0.3 * whole < scale < 0.8 * whole
    assert capsys.readouterr().out == ""  # on which ONNX Runtime reports its histograms


@pytest.mark.long
def test_narrow_ranges_bring_a_trained_network_nearer(tmp_path, monkeypatch):
    teacher = us.load_teacher("demo:resnet14")
    few = us.read_images(few_images(50, 0), teacher.preprocessing).batch(range(50))
    others = us.read_images(few_images(200, 1), teacher.preprocessing).batch(range(200))
    paths = []
    for tries in (True, False):
        monkeypatch.setattr(import_module("mimicut.runtime.export"), "quantise", partial(int8.quantise, tries=tries))
        made = us.export(
            teacher.model, few[:2], tmp_path / str(tries), calibrate=few.split(2), formats=["onnx", "int8"]
        )
        paths.append(made.files["int8"])
    wanted = [t.numpy() for t in run_onnx(made.files["onnx"], [((others,), {})])[0]]
    narrow, widest = int8.file_errors(paths, [([others.numpy()], wanted)])
    assert narrow < 0.8 * widest


class Masked(Chain):
    """An activation that holds infinities."""

    def forward(self, x):
        scores = super().forward(x)
        return torch.where(scores > 0, scores, -torch.inf).softmax(1)


def test_what_has_no_histogram_keeps_the_widest_ranges(tmp_path, monkeypatch):
    import onnx

    x, model, steps = torch.randn(16, 3, 8, 8), randomised(Masked()), []
    monkeypatch.setattr(int8, "NARROW", 99.0)
    for tries in (True, False):
        monkeypatch.setattr(import_module("mimicut.runtime.export"), "quantise", partial(int8.quantise, tries=tries))
        made = us.export(model, x[:2], tmp_path / str(tries), formats=["int8"], calibrate=x.split(8))
        held = onnx.load(made.files["int8"]).graph.initializer
        steps.append({t.name: onnx.numpy_helper.to_array(t).tolist() for t in held if t.name.endswith("_scale")})
    assert steps[0]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("precision", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_a_network_of_another_precision_is_quantised_by_images_of_its_own(precision, tmp_path):
    x = torch.randn(16, 3, 8, 8).to(precision)
    model = randomised(Chain()).to(precision)
    made = us.export(model, x[:2], tmp_path, formats=["int8"], calibrate=x.split(8))
    (found,) = run_onnx(made.files["int8"], [((x.float(),), {})])[0]
    plain = model.float()(x.float()).detach()
    assert float((found - plain).norm() / plain.norm()) < 0.1


def test_the_error_of_a_file_by_hand(tmp_path):
    x = torch.randn(8, 3, 8, 8)
    model = randomised(Chain())
    paths = [us.export(model, x[:2], tmp_path / "plain", formats=["onnx"]).files["onnx"]]
    plain = model(x).detach()
    with torch.no_grad():
        model.fc.weight.mul_(1.1)
        model.fc.bias.mul_(1.1)
    paths.append(us.export(model, x[:2], tmp_path / "other", formats=["onnx"]).files["onnx"])
    calls = [([part.numpy()], [wanted.numpy()]) for part, wanted in zip(x.split(5), plain.split(5), strict=True)]
    assert int8.file_errors(paths, calls) == pytest.approx([0.0, 0.01], rel=1e-3)
    assert float((model(x).detach() - plain).square().sum() / plain.square().sum()) == pytest.approx(0.01, rel=1e-3)


def test_each_output_of_a_file_counts_by_its_own_size(monkeypatch):
    """One that is zero says nothing, and whole numbers count where there is nothing else."""
    wanted = [[np.array([2.0, 0.0]), np.array([300.0]), np.zeros(2), np.array([7])]]
    found = [[np.array([1.0, 0.0]), np.array([330.0]), np.ones(2), np.array([900])]]
    wanted.append([np.zeros(1), np.zeros(1), np.zeros(2), np.array([5, 6, 7])])
    found.append(wanted[1])

    def error(first):
        given = iter([each[first:] for each in found])
        session = SimpleNamespace(get_inputs=list, run=lambda names, feed: next(given))
        monkeypatch.setattr(int8, "_session", lambda path: session)
        return int8.file_errors([Path()], [([], each[first:]) for each in wanted])

    assert error(0) == pytest.approx([0.25 + 0.01])
    assert error(3) == pytest.approx([1 / 4])


def test_a_file_in_int8_is_smaller_and_near(tmp_path):
    model = randomised(Chain())
    x = torch.randn(64, 3, 8, 8)
    found = us.export(model, x[:2], tmp_path, formats=["onnx", "int8"], calibrate=x.split(2))
    (quantised,) = run_onnx(tmp_path / FILES["int8"], [((x,), {})])[0]
    (plain,) = run_onnx(tmp_path / FILES["onnx"], [((x,), {})])[0]
    assert 0.001 < float((quantised - plain).abs().max() / plain.abs().max()) < 0.15
    assert 0 < found.errors["int8"] < 0.15
    import onnx

    kinds = [[n.op_type for n in onnx.load(tmp_path / FILES[f]).graph.node] for f in ("onnx", "int8")]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(kinds[1])
    assert kinds[1].count("BatchNormalization") < kinds[0].count("BatchNormalization")
    stored = {t.data_type for t in onnx.load(tmp_path / FILES["int8"]).graph.initializer if len(t.dims) == 4}
    assert stored == {onnx.TensorProto.INT8}


class Upwards(nn.Module):
    """Transposed convolutions of several groups and of one."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
        self.bare, self.whole = nn.ConvTranspose2d(12, 12, 2, groups=3, bias=False), nn.ConvTranspose2d(12, 8, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.whole(self.bare(self.up(self.conv(x).relu()).relu()).relu()).relu().mean((2, 3)))


def test_a_grouped_transposed_convolution_with_a_bias_stays_in_float32_and_the_rest_is_in_int8(tmp_path):
    import onnx

    model, x = randomised(Upwards()), torch.randn(16, 3, 8, 8)
    us.export(model, x[:2], tmp_path, formats=["int8"], calibrate=x.split(2))
    graph = onnx.load(tmp_path / FILES["int8"]).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    weights = [makers.get(n.input[1]) for n in graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm")]
    assert weights == ["DequantizeLinear", None, *["DequantizeLinear"] * 3]
    (found,) = run_onnx(tmp_path / FILES["int8"], [((x,), {})])[0]
    wanted = model(x).detach()
    assert 0.001 < float((found - wanted).abs().max() / wanted.abs().max()) < 0.15


class Handed(Chain):
    """Returns its scores twice, and what it was given."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores, x


def test_outputs_that_come_twice_or_are_the_input(tmp_path):
    x = torch.randn(16, *Chain.size)
    us.export(randomised(Handed()), x[:2], tmp_path, formats=["int8"], calibrate=x.split(2))
    first, second, given = run_onnx(tmp_path / FILES["int8"], [((x,), {})])[0]
    assert torch.equal(first, second)
    assert torch.equal(given, x)
    assert 0.001 < float((first - randomised(Chain())(x).detach()).abs().max() / first.abs().max()) < 0.15


def test_openvino_runs_the_same_file(tmp_path):
    import openvino

    x = torch.randn(16, *Residual.size)
    us.export(randomised(Residual()), x[:2], tmp_path, formats=["int8"], calibrate=x.split(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.int8.onnx"]
    theirs = openvino.Core().compile_model(tmp_path / FILES["int8"], "CPU")(x.numpy())[0]
    (ours,) = run_onnx(tmp_path / FILES["int8"], [((x,), {})])[0]
    assert np.abs(theirs - ours.numpy()).max() / ours.abs().max() < 0.05


def test_teacher_and_student_side_by_side(made, quick):
    own, folder = made
    report = us.export_folder(folder, ["int8"], images=us.read_images(photos(10), SAID), teacher=own, force=True)
    reported = report.int8
    assert [row["name"] for row in reported["rows"]] == NAMES
    assert (reported["images_quantised_by"], reported["images"], reported["without_teacher"]) == (8, 2, None)
    assert (reported["runtime"], reported["batch"]) == ("onnxruntime", 1)
    teacher, _, student, _ = reported["rows"]
    assert teacher["top1_agreement"] == 1
    assert teacher["share"] == 1
    assert student["top1_agreement"] == pytest.approx(report.top1_agreement)  # of the same two images
    assert student["bytes"] < teacher["bytes"]
    exported = report.exports["int8"]
    assert (exported["file"], exported["precision"], exported["tolerance"]) == ("model.int8.onnx", "int8", None)
    assert not (folder / "model.onnx").exists()
    assert "student, INT8" in report.table()
    page = (folder / "report.html").read_text()
    words = re.sub("<[^>]*>", "", page)
    assert "Float32 and INT8" in words
    assert "Agreement against latency" in words
    assert us.Report.from_json(json.loads(json.dumps(report.to_json()))).int8 == reported


@pytest.mark.long
def test_images_that_it_does_not_know_are_parted(made, quick):
    own, folder = made
    report = us.export_folder(folder, ["int8"], images=us.read_images(photos(20, 7), SAID), teacher=own, force=True)
    assert (report.int8["images_quantised_by"], report.int8["images"]) == (16, 4)
    held = us.read_images(np.concatenate([photos(5, 8), photos(10)]), SAID)
    report = us.export_folder(
        folder, ["int8"], images=us.read_images(photos(3, 7), SAID), held_out=held, teacher=own, force=True
    )
    assert report.int8["images_quantised_by"] == 3
    assert report.int8["images"] == 7  # of 15 it learned from 8


def test_without_the_teacher_the_table_is_of_the_student_alone(made, quick, monkeypatch):
    own, folder = made
    monkeypatch.setattr(module, "_architecture", lambda teacher: own.architecture())
    report = us.export_folder(folder, ["int8"], images=us.read_images(photos(10), SAID), force=True)
    assert [row["name"] for row in report.int8["rows"]] == NAMES[2:]
    assert report.int8["rows"][0]["top1_agreement"] == 1
    assert "module" in report.int8["without_teacher"]
    assert "without the teacher" in report.table()
    assert "Agreement against latency" not in (folder / "report.html").read_text()
    references, table = [], module.int8_table
    monkeypatch.setattr(
        module, "int8_table", lambda files, model, *rest: references.append(model) or table(files, model, *rest)
    )
    us.export_folder(folder, ["int8"], images=us.read_images(photos(10), SAID), normalise=True, force=True)
    assert isinstance(references[0], module.NormalisingModel)
    assert not isinstance(references[0].model, module.NormalisingModel)  # normalised once
    monkeypatch.setattr(module, "int8_table", table)
    other = own_teacher(randomised(Chain(), seed=5), SAID)
    with pytest.raises(LawBroken, match="bit-identical"):
        us.export_folder(folder, ["int8"], images=us.read_images(photos(10), SAID), teacher=other, force=True)


def test_values_of_0_to_1_in_int8(made, quick):
    own, folder = made
    report = us.export_folder(
        folder, ["int8"], images=us.read_images(photos(10), SAID), teacher=own, normalise=True, force=True
    )
    assert report.int8["rows"][0]["top1_agreement"] == 1
    assert report.exports["int8"]["normalises"]
    x = torch.from_numpy(photos(10)).movedim(3, 1) / 255
    (found,) = run_onnx(folder / FILES["int8"], [((x,), {})])[0]
    with torch.no_grad():
        wanted = us.load(folder, Chain)(us.read_images(photos(10), SAID).batch())
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.2


def test_what_is_refused(made, tmp_path, monkeypatch):
    own, folder = made
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match=r"to int8: found no images; expected a few"):
        us.export_folder(folder, ["int8"], teacher=own)
    with pytest.raises(InputError, match=r"to int8: found no images"):
        us.export(Chain(), torch.zeros(2, 3, 8, 8), tmp_path, formats=["int8"])

    def broken(*_):
        raise ValueError("no ranges")

    monkeypatch.setattr(import_module("mimicut.runtime.export"), "quantise", broken)
    with pytest.raises(UnsupportedModel, match="quantising Chain: ValueError: no ranges"):
        us.export_folder(folder, ["int8"], images=us.read_images(photos(4), SAID), teacher=own, force=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.long
def test_compress_exports_too(place, quick, capsys):
    own = ("compress", "net.py:build", "photos", "--keep", 0.5, "--steps", 1)
    code, _, err = call(capsys, *own, "--out", "small", "--to", "onnx,int8")
    assert code == 0
    report = json.loads((place / "small" / "report.json").read_text())
    assert list(report["exports"]) == ["onnx", "int8"]
    assert [row["name"] for row in report["int8"]["rows"]] == NAMES
    assert report["int8"]["images"] == report["images_held_out"]
    assert "student, INT8" in err
    code, _, err = call(capsys, *own, "--out", "other", "--to", "tflite")
    assert (code, (place / "other").exists()) == (2, False)
    assert "found the format tflite" in err
    code, line, _ = call(
        capsys, "export", "small", "--to", "int8", "--images", "photos", "--teacher", "net.py:build", "--force"
    )
    assert code == 0
    assert line["int8"]["images"] == 2


def small_and_int8(tmp_path, **options):
    folder, own = tmp_path / "small", own_teacher(randomised(Residual()), SAID)
    config = us.preset("default", steps=3, views="none")
    return own, folder, us.compress(own, photos(24), keep=0.6, int8=True, folder=folder, config=config, **options)


@pytest.mark.long
def test_a_student_for_int8_mimics_in_int8_and_is_measured_in_it(tmp_path, quick):
    own, folder, result = small_and_int8(tmp_path, min_agreement=0.3)
    assert (folder / "model.int8.onnx").is_file()
    table = result.report.int8
    assert [row["name"] for row in table["rows"]] == NAMES
    assert table["mimic"]["steps"] == 3
    assert table["mimic"]["error"] <= table["mimic"]["error_before"]
    assert table["weight_bits"] in (7, 8)
    verdicts = [line for line in result.report.certificate() if "in INT8 the lower end" in line]
    low = table["rows"][-1]["top1_agreement_low"]
    word = "GO" if low >= 0.3 else "NO GO"
    assert verdicts == [f"{word}: in INT8 the lower end of the interval is {low:.1%}, at least 30.0% was required"]
    assert replace(result.report, min_agreement=low + 0.001).go is False
    assert replace(result.report, min_agreement=0.0).go is True
    assert "int8 = true" in (folder / "run.toml").read_text()
    assert "to = " not in (folder / "run.toml").read_text()
    said = []
    again = us.compress(
        own, photos(24), keep=0.6, int8=True, folder=folder, config=us.preset("default", steps=3, views="none"),
        resume=True, on_stage=said.append,
    )  # fmt: skip
    assert said == ["reading images", "already complete"]
    assert again.report.int8 == table


@pytest.mark.long
def test_int8_without_a_budget_cuts_nothing(tmp_path, quick):
    folder, own = tmp_path / "small", own_teacher(randomised(Residual()), SAID)
    result = us.compress(own, photos(24), int8=True, folder=folder, config=us.preset("default", steps=3, views="none"))
    assert not result.plan.slices
    assert result.report.int8["mimic"]["steps"] == 3
    assert result.report.top1_agreement == 1.0


def test_a_cut_that_loses_less_is_not_quantised():
    """What the planner found slower in INT8 is not written in INT8."""
    from mimicut.workflow import request

    budget = us.Budget.of(latency=0.5, runtime="onnxruntime")
    asked = request.Request(config=us.preset("default"), export_to=("onnx", "int8"), int8=True, budget=budget)
    latency = type("L", (), {"setting": {"precision": "float32"}})
    assert asked.formats_for(type("P", (), {"latency": latency})) == ("onnx",)
    latency.setting = {"precision": "int8"}
    assert asked.formats_for(type("P", (), {"latency": latency})) == ("onnx", "int8")
    assert asked.formats_for(type("P", (), {"latency": None})) == ("onnx", "int8")
    latency.setting = {"precision": "float32"}  # of a plan that is given, for which INT8 was not weighed
    given = replace(asked, budget=None)
    assert given.formats_for(type("P", (), {"latency": latency})) == ("onnx", "int8")


@pytest.mark.long
def test_a_part_of_the_time_is_kept_for_int8(tmp_path, monkeypatch):
    module, seconds = import_module("mimicut.workflow.compress"), {}

    def recovered(*args, max_seconds, **options):
        seconds["recover"] = max_seconds
        return recover(*args, max_seconds=max_seconds, **options)

    def exported(folder, formats, *, max_seconds, **options):
        seconds["export"] = max_seconds
        return store.read(folder)[1]

    recover = module.recover
    monkeypatch.setattr(module, "recover", recovered)
    monkeypatch.setattr(module, "export_folder", exported)
    small_and_int8(tmp_path, max_seconds=4000.0)
    assert 2900 < seconds["recover"] < 3000
    assert seconds["recover"] < seconds["export"] < 4000


def test_export_mimics_in_int8_on_request(made, tmp_path, quick, monkeypatch):
    own, folder = made
    copy = tmp_path / "small"
    shutil.copytree(folder, copy)
    said, free, mimic = [], [], module.mimic_int8
    monkeypatch.setattr(module, "mimic_int8", lambda *a, **k: free.append(k["free"]) or mimic(*a, **k))
    options = {"images": photos(10), "teacher": own, "int8_steps": 2, "extra": "none", "force": True}
    report = us.export_folder(copy, ["int8"], **options, on_stage=said.append)
    us.export_folder(copy, ["int8"], **options, dynamic_size=True)
    assert free == [["batch"], ["batch", "size"]]
    assert "mimicking 2 steps in INT8, on 8 images" in said
    assert report.int8["mimic"]["steps"] == 2
    assert "`model.int8.onnx` is the same network in INT8" in (copy / "README.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="found 2 steps in INT8 and files that normalise themselves"):
        us.export_folder(copy, ["int8"], **options, normalise=True)
    with pytest.raises(InputError, match="found 2 steps in INT8 and the formats onnx; expected the format int8"):
        us.export_folder(copy, ["onnx"], **options)


def test_how_the_file_was_made_is_said():
    done = {"steps": 100, "kept": 85, "images": 38, "judged_by": 12, "error_before": 0.1234, "error": 0.05}
    assert int8_sentence({"weight_bits": 8, "mimic": {**done, "unrounded": 3}}) == (
        "INT8 with weights of 8 bits, mimicked for 85 steps in INT8 on 38 images; on 12 other images, by which the "
        "step was chosen, its loss against float32 fell from 0.123 to 0.05; 3 tensors were rounded in the file alone"
    )
    assert int8_sentence({"mimic": {**done, "kept": 0}}) == (
        "INT8, rounded after training: 100 steps of mimicking in INT8 did not clearly lower its error on 12 other "
        "images, so the file stays as it was rounded"
    )
    assert int8_sentence({"mimic": {"failed": "no time"}}).endswith("it did not mimic in INT8: no time")
    assert int8_sentence({}) == "INT8, rounded after training"
