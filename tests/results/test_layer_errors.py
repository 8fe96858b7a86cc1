"""Where a file differs from its student: the layer that was changed is found, in every format; files stay the same."""

import copy
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from command_line import call
from nets import Chain
from torch import nn

import mimicut as us
from mimicut.anatomy.tracing import as_example
from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results.layer_errors import jump, layer_errors
from mimicut.results.layer_table import layer_table, remarks
from mimicut.results.store import read
from mimicut.runtime.export import FILES, run_onnx
from mimicut.runtime.layer_values import layer_outputs

SAID = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in ("openvino", "pt2")]
FORMATS = ["onnx", "int8", *LONG]


class Twice(Chain):
    """Layers that run twice, a module of several layers that is one, a layer that computes nothing, and two outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True)
        self.attention, self.drop = nn.MultiheadAttention(16, 2, batch_first=True), nn.Dropout()

    def forward(self, x):
        x = self.act(self.conv(self.act(self.conv(self.body(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.drop(self.attention(tokens, tokens, tokens)[0])
        return {"scores": self.fc(tokens.mean(1)).sigmoid(), "map": x}


def build():
    return randomised(Chain())


def photos(n=10, seed=0):
    return us.read_images(np.random.default_rng(seed).integers(0, 255, (n, 8, 8, 3), np.uint8), SAID)


@pytest.fixture
def result(tmp_path):
    """A saved student of `Chain` with half of its MACs, and the teacher."""
    own = own_teacher(build(), SAID)
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.5, source=own.to_json())
    us.save(tmp_path / "small", model=us.cut(own.model, plan), plan=plan, report=us.Report())
    return tmp_path / "small"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(import_module("mimicut.proof.int8_table"), "_SECONDS", 0.0)


def errors_of(layers, column="error"):
    return {row["layer"]: row[column] for row in layers["rows"]}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_layer_that_differs_is_found(kind, tmp_path):
    model, x = randomised(Chain()).eval(), torch.randn(6, *Chain.size)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.body[3].weight[2] *= 1.5
    changed, same = (
        us.export(m, x[:2], tmp_path / name, formats=[kind], calibrate=x.split(2))
        for m, name in ((other, "other"), (model, "same"))
    )
    layers = layer_errors(model, changed.files[kind], kind, {"random": x}, None, ["batch"], False)
    at = "body.5" if kind == "int8" else "body.3"  # with what follows it, as one
    rows = {row["layer"]: row for row in layers["rows"]}
    rounding = 0.04 if kind == "int8" else 1e-6
    assert layers["jump"] == at
    assert rows[at]["own"] > 0.05
    assert max(row["own"] for name, row in rows.items() if name != at) < rounding
    before = list(rows)[: list(rows).index(at)]
    assert max(rows[name]["error"] for name in before) < rounding < rows[at]["error"]
    assert min(rows[name]["error"] for name in ("body.7", "pool", "fc")) > 1e-3
    assert (layers["images"], layers["kind"], layers["unseen"]) == (6, "random", [])
    assert [row["within"] for row in layers["rows"]] == (
        [["body.0", "body.1"], ["body.3", "body.4"], ["body.6"], [], []] if kind == "int8" else [[]] * 10
    )
    right = layer_errors(model, same.files[kind], kind, {"random": x}, None, ["batch"], False)
    assert right["jump"] is None
    assert max(errors_of(right).values()) < 2 * rounding


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_that_run_twice_and_outputs_that_no_layer_gives(kind, tmp_path):
    model, x = randomised(Twice()).eval(), torch.randn(4, *Twice.size)
    found = us.export(model, x[:2], tmp_path, formats=[kind], calibrate=x.split(2))
    layers = layer_errors(model, found.files[kind], kind, {"random": x}, None, ["batch"], False)
    names = list(errors_of(layers))
    assert all(error < (0.1 if kind == "int8" else 1e-5) for error in errors_of(layers).values())
    assert names[-1] == "<model>:output.scores"
    assert "<model>:output.map" not in names  # the last activation gives it
    held = names + [each for row in layers["rows"] for each in row["within"]]
    assert {"conv", "act", "conv@1", "act@1", "attention", "fc"} <= set(held)
    assert layers["unseen"] == []


class Functional(nn.Module):
    """Activations that are no modules, also after a residual."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.third = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.first(x))
        later = nn.functional.relu6(self.third(self.norm(self.second(x)).relu()))
        return self.fc(torch.relu(later - x).mean((2, 3)))


def test_layers_before_activations_that_are_no_modules_are_seen_in_int8(tmp_path):
    model, x = randomised(Functional()).eval(), torch.randn(6, 3, 8, 8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.third.weight[2] *= 1.5
    found = us.export(other, x[:2], tmp_path, formats=["int8"], calibrate=x.split(2))
    layers = layer_errors(model, found.files["int8"], "int8", {"random": x}, None, ["batch"], False)
    rows = {row["layer"]: row for row in layers["rows"]}
    assert {name: (row.get("after"), row["within"]) for name, row in rows.items()} == {
        "first": ("relu", []), "norm": ("relu", ["second"]), "third": ("relu6", []), "fc": (None, []),
    }  # fmt: skip
    assert layers["jump"] == "third"
    assert max(rows[name]["own"] for name in ("first", "norm", "fc")) < 0.04 < rows["third"]["own"]
    assert rows["third"]["own"] < 1  # as both sides are after the activation
    assert remarks(layers) == ["after relu", "after relu; one with second", "jumps here; after relu6", ""]


def test_names_are_those_of_the_network_that_was_wrapped_to_normalise(tmp_path):
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Named()

        def forward(self, x):
            return self.model((x - 0.5) / 0.2)

    class Named(Chain):
        def forward(self, x):
            return {"scores": super().forward(x).sigmoid()}

    model, x = randomised(Normalised()).eval(), torch.randn(4, *Chain.size)
    found = us.export(model, x[:2], tmp_path, formats=["onnx"])
    layers = layer_errors(model, found.files["onnx"], "onnx", {"random": x}, None, ["batch"], True)
    assert next(iter(errors_of(layers))) == "body.0"
    assert list(errors_of(layers))[-1] == "<model>:output.scores"


def test_what_layers_give(tmp_path):
    model, x = randomised(Twice()).eval(), torch.randn(2, *Twice.size)
    layers, outputs = layer_outputs(model, as_example(x))
    assert list(layers)[-7:] == ["conv", "act", "conv@1", "act@1", "attention", "drop", "fc"]
    body = model.body[:4](x)
    assert torch.equal(layers["body.3"], body)
    assert torch.equal(layers["body.4"], model.body[4](body))  # and not what the next makes of it in place
    assert list(outputs) == ["scores", "map"]
    assert torch.allclose(outputs["scores"], model(x)["scores"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        layer_outputs(model, as_example(x[:, :1]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_file_whose_batch_is_fixed(tmp_path):
    class Fixed(Chain):
        def forward(self, x):
            return super().forward(x.reshape(2, 3, 8, 8))

    model, x = randomised(Fixed()).eval(), torch.randn(3, *Chain.size)
    found = us.export(model, x[:2], tmp_path, formats=["onnx"])
    assert found.static is not None
    layers = layer_errors(model, found.files["onnx"], "onnx", {"random": x}, None, [], False)
    assert max(errors_of(layers).values()) < 1e-5
    assert layers["images"] == 3


@pytest.mark.long
def test_files_are_the_same_and_the_report_keeps_the_layers(result, quick):
    kinds = ["onnx", "int8"]
    options = {"images": photos(), "teacher": build, "force": True}

    def files():
        return {p.name: p.read_bytes() for p in result.iterdir() if p.name.startswith(("model", "preproc", "weights"))}

    us.export_folder(result, kinds, **options)
    plain = files()
    report = us.export_folder(result, kinds, explain=True, **options)
    assert files() == plain
    assert {p.name for p in result.iterdir()} - set(plain) == {"README.md", "plan.json", "report.html", "report.json"}
    for kind in kinds:
        layers = report.exports[kind]["layers"]
        assert (layers["jump"], layers["kind"]) == (None, "real")
        assert all(np.isfinite([row["error"], row["own"]]).all() for row in layers["rows"])
    assert read(result)[1] == report
    assert us.Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    page = (result / "report.html").read_text()
    assert "model.int8.onnx, layer by layer, on 2 real images" in page
    assert "one with body.0, body.1" in page
    us.export_folder(result, ["onnx"], teacher=build, force=True)
    exports = read(result)[1].exports
    assert "layers" not in exports["onnx"]  # those of the file that was replaced
    assert "layers" in exports["int8"]


def test_the_last_layer_has_the_error_of_the_output_in_int8(result, quick):
    us.export_folder(result, ["int8"], images=photos(), teacher=build)
    assert "Layer by layer" not in (result / "report.html").read_text()
    report = us.explain_export(result, "int8", photos(6, seed=3), teacher=build)
    x = photos(6, seed=3).batch()
    (found,) = run_onnx(result / FILES["int8"], [((x,), {})])[0]
    with torch.no_grad():
        wanted = us.load(result, build)(x)
    row = report.exports["int8"]["layers"]["rows"][-1]
    assert row["layer"] == "fc"
    assert row["error"] == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-5)
    assert 1e-4 < row["own"] < row["error"]
    assert read(result)[1] == report
    assert "Layer by layer" in (result / "report.html").read_text()


def test_a_file_that_was_changed_is_found_out(result):
    import onnx
    from onnx import numpy_helper

    us.export_folder(result, ["onnx"], teacher=build, normalise=True)
    model = onnx.load(result / "model.onnx")
    (weights,) = (t for t in model.graph.initializer if t.name.endswith("body.6.weight"))
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(1.01), weights.name))
    onnx.save(model, result / "model.onnx")
    changed = (result / "model.onnx").read_bytes()
    report = us.explain_export(result, "onnx", teacher=build)
    layers = report.exports["onnx"]["layers"]
    assert (layers["jump"], layers["kind"]) == ("body.6", "random")
    assert 2e-3 < errors_of(layers, "own")["body.6"] < 2e-2
    assert (result / "model.onnx").read_bytes() == changed
    table = layer_table(report, ["onnx", "pt2"]).splitlines()
    assert table[1] == "model.onnx, layer by layer, on 4 random images"
    assert [line.split()[0] for line in table if line.endswith("jumps here")] == ["body.6"]
    assert any(line.startswith("the error jumps at body.6, which alone adds") for line in table)


def test_where_the_error_jumps():
    def rows(*own):
        return [{"layer": str(i), "own": each} for i, each in enumerate(own)]

    assert jump(rows(0.01, 0.02, 0.05, 0.02), "int8") is None  # below four times the median of the others
    assert jump(rows(0.01, 0.01, 0.04, 0.01), "int8") is None  # below the floor
    assert jump(rows(0.01, 0.01, 0.06, 0.5), "int8") == "2"  # the first
    assert jump(rows(1e-7, 9e-5, 1e-7), "onnx") is None
    assert jump(rows(1e-7, 2e-4, 1e-7), "onnx") == "1"
    assert jump(rows(0.0, float("nan"), 0.0), "pt2") == "1"
    assert jump(rows(0.1), "int8") == "0"


def test_values_that_are_no_numbers_are_kept_as_such(result):
    report = us.export_folder(result, ["onnx"], teacher=build, explain=True)
    row = {"layer": "a", "error": float("inf"), "own": float("nan"), "within": []}
    rows = [row, {"layer": "b", "error": 0.0, "own": 0.0, "within": []}]
    layers = {**report.exports["onnx"]["layers"], "rows": rows, "jump": "a", "unseen": ["c"]}
    found = us.Report(exports={"onnx": {**report.exports["onnx"], "layers": layers}})
    again = us.Report.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again.exports["onnx"]["layers"]["rows"][0]["error"] is None
    for each in (found, again):
        assert "the error jumps at a, which alone adds no number" in layer_table(each, ["onnx"])
        assert "not found in the file: c" in layer_table(each, ["onnx"])


def test_what_is_refused(result, quick, monkeypatch):
    us.export_folder(result, ["int8"], images=photos(), teacher=build)
    before = {p.name: p.read_bytes() for p in result.iterdir()}
    with pytest.raises(InputError, match="found the format tflite, expected one of pt2, onnx, openvino, int8"):
        us.explain_export(result, "tflite", teacher=build)
    with pytest.raises(InputError, match=r"model\.int8\.onnx: found no images; expected a few"):
        us.explain_export(result, "int8", teacher=build)
    with pytest.raises(InputError, match=r"to int8: found no images"):
        us.export_folder(result, ["int8"], teacher=build, explain=True)
    with pytest.raises(InputError, match=r"model\.onnx: found no exported file; expected one .*--to onnx"):
        us.explain_export(result, "onnx", teacher=build)
    monkeypatch.setattr("mimicut.runtime.layer_values._named_values", lambda *_: {})
    with pytest.raises(UnsupportedModel, match=r"model\.int8\.onnx layer by layer: none of its values"):
        us.explain_export(result, "int8", photos(), teacher=build)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in result.iterdir()} == before
    monkeypatch.setattr(import_module("mimicut.results.export_checks"), "_RUNNER", result / "nothing.py")
    with pytest.raises(UnsupportedModel, match=r"a copy of it .* does not run; .*nothing\.py"):
        us.explain_export(result, "int8", photos(), teacher=build)
    assert {p.name: p.read_bytes() for p in result.iterdir()} == before
    (result / "model.int8.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.int8\.onnx: found no exported file"):
        us.explain_export(result, "int8", photos(), teacher=build)


def test_the_command_line(result, capsys):
    own = ("export", result, "--teacher", f"{__file__}:build", "--to", "onnx")
    code, line, err = call(capsys, *own)
    assert (code, "layer by layer" in err, "layers" in line["exports"]["onnx"]) == (0, False, False)
    code, line, err = call(capsys, *own, "--explain", "--force")
    assert code == 0
    assert "model.onnx, layer by layer, on 4 random images" in err
    assert next(iter(errors_of(line["exports"]["onnx"]["layers"]))) == "body.0"
    assert call(capsys, *own[:-1], "tflite", "--explain", "--force")[0] == 2
