"""Export: what is written runs without the model's code and gives its outputs; what cannot be written is named."""

import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module

import onnxruntime
import pytest
import torch
from nets import Chain, FusedHeads, HandWritten
from torch import nn
from torch.nn import functional as F

from mimicut.base.errors import InputError, LawBroken, StoreError, UnsupportedModel
from mimicut.proof.randomised import randomised
from mimicut.runtime.export import export
from mimicut.runtime.latency import Setting, prepare

module = import_module("mimicut.runtime.export")


def images(n=2, size=(3, 8, 8)):
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(0))


_ELSEWHERE = """
import sys, torch, onnxruntime
folder = sys.argv[1]
given, wanted = torch.load(f"{folder}/given.pt"), torch.load(f"{folder}/wanted.pt")
program = torch.export.load(f"{folder}/model.pt2").module()
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
for images, scores in zip(given, wanted, strict=True):
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    assert torch.allclose(program(images), scores, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found, scores, rtol=1e-5, atol=1e-6)
assert "mimicut" not in sys.modules
"""


class Biased(FusedHeads):
    """What attention returns lies so that torch's reshape is a view; computed by its parts it does not."""

    def attend(self, x):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, bias[None].expand(n, -1, -1, -1))
        return self.proj(y.transpose(1, 2).reshape(n, tokens, self.inner))


class ThreeAxes(HandWritten):
    """Images and heads on one axis; one tensor is query and key."""

    def attend(self, x):
        n, tokens, width = x.shape
        heads = self.qkv(x).view(n, tokens, 9, 4).transpose(1, 2)
        k, v = (t.reshape(n * 3, tokens, 4) for t in (heads[:, :3], heads[:, 3:6]))
        y = F.scaled_dot_product_attention(k, k, v, attn_mask=k @ v.transpose(1, 2))
        return self.proj(y.view(n, 3, tokens, 4).transpose(1, 2).reshape(n, tokens, width))


@dataclass
class Output:
    scores: torch.Tensor
    maps: tuple
    count: int


class Made(nn.Module):
    """Its output is a class of its own, with what is no tensor."""

    def __init__(self):
        super().__init__()
        self.net = Chain()

    def forward(self, x):
        maps = self.net.body(x)
        return Output(self.net(x), (maps, {"mean": maps.mean((2, 3))}), 3)


@pytest.mark.long
def test_outputs_of_a_class_of_its_own_become_a_dict_that_runs_elsewhere(tmp_path):
    model, given = Made().eval(), images(3)
    found = export(model, images(), tmp_path, formats=("pt2", "onnx"))
    assert found.static is None
    torch.save([given], tmp_path / "given.pt")
    torch.save([model(given).scores], tmp_path / "wanted.pt")
    code = _ELSEWHERE.replace("program(images)", "program(images)['scores']") + "print(list(program(images)))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['scores', 'maps.0', 'maps.1.mean']"


@pytest.mark.parametrize(
    "net", [Chain, *(pytest.param(n, marks=pytest.mark.long) for n in (ThreeAxes, FusedHeads, HandWritten, Biased))]
)
def test_both_files_run_elsewhere_on_any_batch(net, tmp_path):
    model = net().train()
    state, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    found = export(model, images(2, net.size), tmp_path)
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert found.files == {"pt2": tmp_path / "model.pt2", "onnx": tmp_path / "model.onnx"}
    assert found.errors["pt2"] < 1e-6
    assert 0 <= found.errors["onnx"] < 1e-5
    assert found.opset >= 18
    assert (found.static, found.precision) == (None, "float32")
    given = [images(n, net.size) for n in (1, 5)]
    with torch.no_grad():
        torch.save(given, tmp_path / "given.pt")
        torch.save([model.eval()(each) for each in given], tmp_path / "wanted.pt")
    subprocess.run([sys.executable, "-c", _ELSEWHERE, str(tmp_path)], check=True)


class Dressed(nn.Module):
    """Keyword inputs, a dictionary and a tuple as outputs, and a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = Chain()

    def forward(self, image, scale=None, *, shift, times=1):
        y = self.inner(image - 2 * scale) + shift
        return {"out": y, "more": (y.mean(1) * times, None)}


def test_keywords_and_nested_outputs(tmp_path):
    kwargs = {"shift": torch.randn(2, 5), "times": 3, "scale": torch.randn(2, 3, 8, 8)}
    found = export(Dressed(), ((images(),), kwargs), tmp_path)
    assert max(found.errors.values()) < 1e-5
    assert found.static is None


class Counted(nn.Module):
    def forward(self, x):
        return x * len(range(x.shape[0]))


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, 5)


def test_a_batch_that_cannot_be_free_is_fixed_and_the_reason_said(tmp_path):
    counted = export(nn.Sequential(Chain(), Counted()), images(), tmp_path / "a")
    assert counted.static == "its code computes with the size of the batch"
    fixed = export(nn.Sequential(Chain(), Fixed()), images(), tmp_path / "c")
    assert "running Sequential in 1 before its export, batch 1" in fixed.static
    for found in (counted, fixed):
        assert max(found.errors.values()) < 1e-5
    one = export(Chain(), images(1), tmp_path / "b", formats=["pt2"])
    assert (one.static, one.opset) == ("the example is not a batch of 2 or more", None)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["model.pt2"]


def test_where_only_the_free_batch_goes_wrong_the_fixed_one_is_written(tmp_path, monkeypatch):
    write = module.write_onnx

    def only_static(program, model, path, **options):
        if module._is_free(program, "batch"):
            raise UnsupportedModel("no free sizes")
        return write(program, model, path, **options)

    monkeypatch.setattr(module, "write_onnx", only_static)
    found = export(Chain(), images(), tmp_path)
    assert found.static == "no free sizes"
    assert found.errors["onnx"] < 1e-5


class Eigen(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x[:, :4].reshape(-1, 2, 2)).real


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Opaque(nn.Module):
    """What it returns nobody can look into."""

    def forward(self, x):
        found = object.__new__(type("Found", (), {}))
        found.scores = x
        return found


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (Opaque(), "exporting Sequential: found no tensors in its output; expected a tensor"),
        (Eigen(), r"writing Sequential as ONNX: torch.onnx.export stopped at aten.linalg_eig.default in 1 with .*eig"),
        (
            Branch(),
            "tracing Sequential with inputs .*: torch.export stopped.* in 1 .*: `.* with a data-dependent",
        ),
    ],
)
def test_what_cannot_be_written_is_named(odd, said, tmp_path):
    with pytest.raises(UnsupportedModel, match=said):
        export(nn.Sequential(Chain(), odd), images(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_file_that_differs_is_refused_and_removed(tmp_path, monkeypatch):
    write = module.write_onnx
    other = torch.export.export(Chain().eval(), (images(),), strict=False)
    monkeypatch.setattr(module, "write_onnx", lambda program, model, path, **_: write(other, model, path))
    with pytest.raises(LawBroken, match=r"comparing model.onnx with the Chain .* expected at most 1.0e-04"):
        export(Chain(), images(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    larger = torch.export.export(nn.Sequential(Chain(), nn.Linear(5, 6)).eval(), (images(),), strict=False)
    monkeypatch.setattr(module, "write_onnx", lambda program, model, path, **_: write(larger, model, path))
    with pytest.raises(LawBroken, match="differ by inf"):
        export(Chain(), images(), tmp_path)
    monkeypatch.setattr(module, "write_onnx", lambda program, model, path, **_: path.write_text("no model"))
    with pytest.raises(LawBroken, match=r"running model.onnx of Chain: "):
        export(Chain(), images(), tmp_path)


class Cancels(nn.Module):
    """Loses the digits of its images below 2e4 * 6e-8."""

    def __init__(self, offset=2e4):
        super().__init__()
        self.offset = offset

    def forward(self, x):
        return (x + self.offset) - self.offset


def test_a_file_may_differ_by_what_the_networks_own_rounding_explains(tmp_path, monkeypatch):
    exact = torch.export.export(nn.Identity().eval(), (images(),), strict=False)
    write = module.write_onnx
    monkeypatch.setattr(module, "write_onnx", lambda program, model, path, **_: write(exact, model, path))
    error = export(Cancels(), images(), tmp_path / "small", formats=["onnx"]).errors["onnx"]
    assert module.TOLERANCE < error < 1e-3
    with pytest.raises(LawBroken, match=r"expected at most 1.0e-02"):
        export(Cancels(offset=2e7), images(), tmp_path / "large", formats=["onnx"])


class Volume(nn.Module):
    """A convolution of volumes, which torch's converter may give a bias of zeros that the graph computes."""

    def __init__(self, conv, bias=None):
        super().__init__()
        self.conv, self.norm, self.fc = conv, nn.BatchNorm3d(8), nn.Linear(8, 5)
        self.shift = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, x):
        y = self.conv(x) if self.shift is None else F.conv3d(x, self.conv.weight, self.shift.expand(8))
        return self.fc(self.norm(y).relu().mean((2, 3, 4)))


VOLUMES = {
    "no bias": lambda: Volume(nn.Conv3d(3, 8, 3, bias=False)),
    "padded": lambda: Volume(nn.Conv3d(3, 8, 3, padding="same", bias=False)),
    "transposed": lambda: Volume(nn.ConvTranspose3d(3, 8, 3, bias=False)),
    "computed bias": lambda: Volume(nn.Conv3d(3, 8, 3, bias=False), [0.7]),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes_run_on_every_runtime(name, tmp_path):
    model, given = randomised(VOLUMES[name]()).eval(), images(2, (3, 6, 6, 6))
    if name == "computed bias":
        formats = ["onnx"]
    else:
        formats = ["onnx", "openvino", "pt2"]
        prepare(model, given, Setting("openvino", 1, 2)).close()
    found = export(model, given, tmp_path, formats=formats)
    assert found.static is None
    assert max(found.errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["onnx", "openvino", "int8"])
def test_what_fails_is_written_once_more_with_optimisations(name, tmp_path, monkeypatch):
    write, tried = module.write_onnx, []

    def plain_is_wrong(program, model, path, *, optimise=False):
        tried.append(optimise)
        if optimise:
            return write(program, model, path, optimise=True)
        return path.write_text("no model") and 20

    monkeypatch.setattr(module, "write_onnx", plain_is_wrong)
    found = export(Chain(), images(), tmp_path, formats=[name], calibrate=[images()])
    assert (found.static, tried) == (None, [False, True])
    assert found.errors[name] < (0.5 if name == "int8" else 1e-5)


class Upwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        y = F.interpolate(self.down(x), size=x.shape[-2:], mode="bilinear")
        return self.up(torch.cat([x, y], 1))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.table = nn.Conv2d(3, 4, 4, 4), nn.Parameter(torch.randn(1, 4, 4))

    def forward(self, x):
        return self.patch(x).flatten(2).transpose(1, 2) + self.table


class Widths(nn.Module):
    def forward(self, x):
        return x * len(range(x.shape[3]))


@pytest.mark.parametrize(
    ("model", "size", "other"),
    [
        (Chain(), (3, 8, 8), (3, 11, 7)), (Upwards(), (3, 8, 8), (3, 12, 20)),
        (Volume(nn.Conv3d(3, 8, 3, bias=False)), (3, 6, 6, 6), (3, 7, 9, 8)),
    ],
    ids=["pooled", "maps", "volumes"],
)  # fmt: skip
def test_height_and_width_are_free_where_the_network_allows(model, size, other, tmp_path):
    found = export(model.eval(), images(2, size), tmp_path, dynamic_size=True)
    assert (found.static, found.static_size) == (None, None)
    session = onnxruntime.InferenceSession(found.files["onnx"])
    given = images(1, other)
    (scores,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    assert torch.allclose(torch.from_numpy(scores), model(given), atol=1e-5)
    assert export(model, images(2, size), tmp_path, force=True).static_size == "no free size was asked for"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Positions(), "running Positions before its export, batch 2"),
        (nn.Sequential(Widths(), Chain()), "its code computes with the height or width"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "running Sequential in 1 before"),
    ],
    ids=["positions", "counted", "flattened"],
)
def test_where_the_network_wants_one_size_the_reason_is_said(model, reason, tmp_path):
    found = export(model.eval(), images(), tmp_path, dynamic_size=True)
    assert found.static is None
    assert found.static_size.startswith(reason)
    assert max(found.errors.values()) < 1e-5


def test_other_precisions_are_written_in_float32(tmp_path):
    model = Chain().double()
    found = export(model, images().double(), tmp_path)
    assert max(found.errors.values()) < 1e-5
    assert all(t.dtype == torch.float64 for t in model.state_dict().values() if t.is_floating_point())
    program = torch.export.load(found.files["pt2"])
    assert {t.dtype for t in program.state_dict.values()} == {torch.float32, torch.int64}


def test_large_weights_lie_beside_the_onnx_file(tmp_path, monkeypatch):
    monkeypatch.setattr("mimicut.runtime.onnx_file.ONE_FILE", 0)
    export(Chain(), images(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data", "model.pt2"}
    export(Chain(), images(), tmp_path, force=True)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"found the format tflite, expected one of pt2, onnx"):
        export(Chain(), images(), tmp_path, formats=["tflite"])
    (tmp_path / "model.onnx").touch()
    with pytest.raises(StoreError, match=r"model.onnx: it exists"):
        export(Chain(), images(), tmp_path)
    with pytest.raises(StoreError, match="exporting to"):
        export(Chain(), images(), tmp_path / "model.onnx" / "inside")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(InputError, match=r"onnxscript is not installed; expected the extra `export`: pip install"):
        export(Chain(), images(), tmp_path, force=True)
    assert export(Chain(), images(), tmp_path, formats=["pt2"]).opset is None
