"""INT8 files that train: read back as a network that rounds as they do, and written back."""

import math
import platform
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import Attention, Chain, Concat, Depthwise, Grouped, LayerNorms, Residual, Shared

import mimicut as us
from mimicut.anatomy.find_seam import find_seam
from mimicut.base.errors import Diverged, UnsupportedModel
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import preset
from mimicut.runtime import int8
from mimicut.runtime.export import run_onnx, traced_as_exported
from mimicut.runtime.int8_mimic import mimic_int8
from mimicut.runtime.int8_network import RoundedActivation, RoundedWeight, TrainableInt8
from mimicut.surgery.seam import capturing


def exported(model, folder, images=64):
    """The INT8 file of a model, and its images."""
    x = torch.randn(images, *model.size, generator=torch.Generator().manual_seed(0))
    return us.export(model, x[:2], folder, formats=["int8"], calibrate=x.split(16)).files["int8"], x


def written(model, folder):
    """The INT8 file of a model, its images, its seam, and what reads it."""
    path, x = exported(model, folder)
    seam = find_seam(model, x[:2])
    return path, x, seam, TrainableInt8(path, *traced_as_exported(model, x[:2], ["batch"]), seam)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def outputs(path, x):
    return run_onnx(path, [((x,), {})])[0][0]


LONG = [
    pytest.param(kind, marks=pytest.mark.long)
    for kind in (Chain, Concat, Depthwise, Grouped, Shared, LayerNorms, Attention)
]


@pytest.mark.parametrize("kind", [Residual, *LONG])
def test_a_network_rounds_as_its_file_does_and_is_written_back(kind, tmp_path):
    model = randomised(kind())
    path, x, seam, read = written(model, tmp_path)
    # What the converter writes as several operators is rounded in the file alone.
    assert (read.left == ()) == (kind not in (Depthwise, Grouped, Attention, LayerNorms))
    with capturing(model, seam) as capture, torch.no_grad():
        plain = capture.features(x)[0]
    found = read.network(x).detach()
    assert found.shape == plain.shape
    assert 0.001 < relative(found, plain) < 0.2
    rounding = relative(outputs(path, x), model(x).detach())
    read.write_to(tmp_path / "again.onnx")
    assert relative(outputs(tmp_path / "again.onnx", x), outputs(path, x)) < 0.2 * rounding


class Reshaped(torch.nn.Module):
    """Computes with height and width, and multiplies: where they are free both are the program's multiplications."""

    size = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.stem, self.fc = torch.nn.Conv2d(3, 8, 3, 1, 1), torch.nn.Linear(8, 4)
        self.gates = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 1) for _ in range(8))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        images, channels, height, width = x.shape
        x = x.reshape(images, channels, height * width).reshape(images, channels, height, width)
        for i, gate in enumerate(self.gates):
            x = x * (gate(x).sigmoid() + (2.0 if i % 2 else 0.05)) * (3.0 if i % 2 else 1.0)
        return self.fc(x.mean((2, 3)))


@pytest.mark.long
def test_a_file_for_images_of_any_size_is_read_as_it_was_traced(tmp_path):
    model = randomised(Reshaped())
    x = torch.randn(32, *model.size, generator=torch.Generator().manual_seed(0))
    made = us.export(model, x[:2], tmp_path, formats=["int8"], calibrate=x.split(8), dynamic_size=True)
    assert made.static_size is None
    seam = find_seam(model, x[:2])
    with capturing(model, seam) as capture, torch.no_grad():
        plain = capture.features(x)[0]
    errors = []
    for free in (["batch", "size"], ["batch"]):
        read = TrainableInt8(made.files["int8"], *traced_as_exported(model, x[:2], free), seam)
        errors.append(relative(read.network(x).detach(), plain))
    assert errors[0] < 0.2 < 0.4 < errors[1]


class Multiplied(torch.nn.Module):
    """Multiplies by constants after its layers, which quantisation folds into them."""

    size = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.conv, self.up = torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ConvTranspose2d(16, 8, 2, 2)
        self.scale, self.norm = torch.nn.Parameter(torch.rand(16, 1, 1)), torch.nn.BatchNorm2d(8)
        self.pool, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.up(torch.relu(self.conv(x) * self.scale))))
        return self.fc(torch.flatten(self.pool(x), 1))


@pytest.mark.parametrize(("kind", "moved"), [(Residual, 0.1), (Multiplied, 0.5)])
def test_what_trained_is_what_the_file_computes(kind, moved, tmp_path):
    model = randomised(kind())
    path, x, _, read = written(model, tmp_path)
    assert read.left == ()
    before, generator = outputs(path, x), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in read.network.named_parameters():
            if name not in read.network.seam.head:
                p.add_(moved * p.std(correction=0) * torch.randn(p.shape, generator=generator))
        expected = model.fc(torch.flatten(model.pool(read.network(x)), 1))
        expected = expected.clamp(before.min(), before.max())  # as the file rounds its outputs
    read.write_to(tmp_path / "trained.onnx")
    found = outputs(tmp_path / "trained.onnx", x)
    assert relative(expected, before) > 0.05
    assert relative(found, expected) < 0.3 * relative(expected, before)  # the head rounds, too


def test_the_head_does_not_train(tmp_path):
    read = written(randomised(Chain()), tmp_path)[-1]
    assert {"network.fc.weight", "network.fc.bias"} <= set(read.network.seam.head)
    assert "network.body.0.weight" not in read.network.seam.head


class Thresholds(Chain):
    """Masks of the features' shape, channels and a whole layer of weights that are zero."""

    def forward(self, x):
        x = self.body(x)
        return self.fc(self.pool(torch.where(x > 0.1, x, 0.5 * x)).flatten(1))


@pytest.mark.parametrize("gamma", [0.0, 1e-6])
def test_channels_without_weights_keep_their_biases(gamma, tmp_path):
    model = randomised(Thresholds())
    with torch.no_grad():
        model.body[1].weight[:3] = gamma
        model.body[1].bias[:3] = 2.0
        model.body[4].weight.zero_()  # a layer that gives its biases alone
    path, x, _, read = written(model, tmp_path)
    rounding = relative(outputs(path, x), model(x).detach())
    simulated = model.fc(model.pool(torch.where((y := read.network(x).detach()) > 0.1, y, 0.5 * y)).flatten(1)).detach()
    assert relative(simulated, outputs(path, x)) < max(2 * rounding, 0.02)
    read.write_to(tmp_path / "again.onnx")
    assert relative(outputs(tmp_path / "again.onnx", x), outputs(path, x)) < 1e-6


def test_an_activation_is_rounded_within_its_range():
    rounding = RoundedActivation(0.5, 3, 1, 8)
    x = torch.tensor([-3.0, -0.8, 0.3, 1.1, 9.0], requires_grad=True)
    found = rounding(x)
    assert found.tolist() == [-1.0, -1.0, 0.5, 1.0, 2.5]
    found.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(("step", "zero", "low", "high"), [(0.02, 100, 0, 255), (0.01, 0, 0, 255), (0.05, 3, -8, 7)])
def test_an_activation_is_rounded_as_torch_does_it(step, zero, low, high):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.linspace(-1, 1, len(x))
    found, expected = (
        (y, *torch.autograd.grad((y * weights).sum(), x))
        for y in (
            RoundedActivation(step, zero, low, high)(x),
            torch.fake_quantize_per_tensor_affine(x, step, zero, low, high),
        )
    )
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.equal(found[1], expected[1])


def test_halves_are_rounded_to_even_as_in_a_file():
    """And a value is divided by the step: the last one times its reciprocal is 7.5 and would be 8."""
    assert RoundedActivation(0.5, 0, -8, 7)(torch.tensor([-0.75, -0.25, 0.25, 0.75])).tolist() == [-1, 0, 0, 1]
    step = torch.tensor(0.3).item()
    assert RoundedActivation(step, 0, 0, 255)(torch.tensor([2.25])).item() == pytest.approx(7 * step)


def test_a_weight_is_rounded_by_channel():
    weight = torch.tensor([[1.27, 0.004, -0.5], [12.7, 0.04, 0.06]], requires_grad=True)
    rounding = RoundedWeight(0, 127, torch.zeros(2))
    assert torch.allclose(rounding(weight), torch.tensor([[1.27, 0.0, -0.5], [12.7, 0.0, 0.1]]))
    assert rounding.whole(weight, rounding.step(weight)).tolist() == [[127, 0, -50], [127, 0, 1]]
    rounding(weight).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 1.0]] * 2


@pytest.mark.long
def test_a_file_of_another_network_is_refused(tmp_path):
    path, x, seam, _ = written(randomised(Chain()), tmp_path)
    other = randomised(Chain(), seed=5)
    with pytest.raises(UnsupportedModel, match="none of its weights in INT8 is one of the network's"):
        TrainableInt8(path, *traced_as_exported(other, x[:2], ["batch"]), seam)


def trained(tmp_path, model, images, steps=4, **options):
    path, x = exported(model, tmp_path)
    before = path.read_bytes()
    config = preset("default", steps=steps, seed=3)
    done = mimic_int8(path, model, x[:2], find_seam(model, x[:2]), x[:images], config, **options)
    return done, before, path


@pytest.mark.long
def test_mimicking_in_int8_is_not_worse_on_images_that_it_never_saw(tmp_path):
    model = randomised(Residual())
    done, before, path = trained(tmp_path, model, 40, steps=20)
    assert (done.steps, done.images, done.judged_by, done.unrounded) == (20, 30, 10, 0)
    assert (path.read_bytes() == before) == (done.kept == 0)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    rounded = tmp_path / "rounded.onnx"
    rounded.write_bytes(before)
    others = torch.randn(64, *model.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        calls = [([others.numpy()], [model(others).numpy()])]
    as_rounded, mimicked = int8.file_errors([rounded, path], calls)
    assert mimicked <= as_rounded


class WithParameter(Chain):
    """Returns one of its parameters, too, as networks that compare text with images do."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return {"scores": super().forward(x), "scale": self.scale}


def test_a_parameter_may_be_an_output(tmp_path, monkeypatch):
    module = import_module("mimicut.runtime.int8_mimic")
    monkeypatch.setattr(module, "LEAST_GAIN", -1e9)  # so that the file is judged, too
    done, _, _ = trained(tmp_path, randomised(WithParameter()), 24)
    assert done.steps == 4


@pytest.mark.parametrize(
    ("errors", "changes"),
    [
        pytest.param((1.0, 0.7), True, marks=pytest.mark.long),
        pytest.param((0.0, 0.0), False, marks=pytest.mark.long),
        pytest.param((math.inf, math.inf), False, marks=pytest.mark.long),
        ((1.0, 0.9), False),
    ],
)
def test_the_file_changes_only_where_what_it_computes_is_clearly_nearer(tmp_path, monkeypatch, errors, changes):
    module = import_module("mimicut.runtime.int8_mimic")
    monkeypatch.setattr(int8, "weight_bits", lambda: 7)
    model, judged = randomised(Residual()), []

    def found(paths, calls):
        assert [each.name.startswith("trained") for each in paths] == [False, True]
        for (images,), (wanted,) in calls:
            assert torch.allclose(torch.tensor(wanted), model(torch.tensor(images)), atol=1e-6)
            judged.append(len(wanted))
        return errors

    monkeypatch.setattr(module, "file_errors", found)
    done, before, path = trained(tmp_path, model, 40, steps=20)
    assert sum(judged) == done.judged_by
    assert (path.read_bytes() != before) is (done.kept > 0) is changes
    assert (done.error < (1 - module.LEAST_GAIN) * done.error_before) is changes


@pytest.mark.long
def test_where_each_step_does_harm_the_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("mimicut.runtime.int8_mimic"), "RATES", (100.0,))
    done, before, path = trained(tmp_path, randomised(Residual()), 40)
    assert done.kept == 0
    assert done.error == done.error_before
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("outcomes", "taken"),
    [
        ((None, 0.9), 1),  # the first one diverges
        ((1.1, 0.9), 1),
        ((0.9,), 0),
        ((1.0, None), 2),  # the last one is not tried
    ],
)
def test_the_first_rate_that_helps_is_taken_or_the_last(outcomes, taken, monkeypatch):
    module, tried, left = import_module("mimicut.runtime.int8_mimic"), [], iter(outcomes)

    def mimic(student, network, seams, fit, config):
        tried.append((config.lr, config.steps))
        if (after := next(left)) is None:
            raise Diverged("the loss is inf")
        return SimpleNamespace(errors=[(0, 1.0), (config.steps, after)])

    monkeypatch.setattr(module, "mimic", mimic)
    network, config = torch.nn.Linear(2, 2), replace(preset("default", steps=20, seed=3), lr=0.01)
    config, _ = module._with_rate(network, network, (None, None), torch.zeros(4, 2), config, {})
    assert tried == [(pytest.approx(0.01 * rate), module.TRIED) for rate in module.RATES[: len(outcomes)]]
    assert (config.lr, config.steps) == (pytest.approx(0.01 * module.RATES[taken]), 20)


@pytest.mark.long
def test_only_a_clear_gain_changes_the_file(tmp_path, monkeypatch):
    """It does gain: see `test_the_file_changes_only_where_what_it_computes_is_clearly_nearer`."""
    module = import_module("mimicut.runtime.int8_mimic")
    monkeypatch.setattr(int8, "weight_bits", lambda: 7)
    monkeypatch.setattr(module, "LEAST_GAIN", 1.0)
    monkeypatch.setattr(module, "_is_better", lambda *arguments: pytest.fail("the file was written"))
    done, before, path = trained(tmp_path, randomised(Residual()), 40, steps=20)
    assert path.read_bytes() == before
    assert done.kept == 0
    assert done.error == done.error_before


def test_too_few_images(tmp_path):
    with pytest.raises(UnsupportedModel, match="found 3 training images, expected at least 4 different ones"):
        trained(tmp_path, randomised(Chain()), 3)


def test_steps_are_as_many_as_fit(tmp_path, monkeypatch):
    module = import_module("mimicut.runtime.int8_mimic")
    monkeypatch.setattr(module, "_with_rate", lambda *a: (replace(a[4], lr=1e-3), 1000.0))
    model, config = randomised(Chain()), preset("default", steps=5)
    path, x, seam, _ = written(model, tmp_path)
    before, call = path.read_bytes(), (path, model, x[:2], seam, x, config)
    with pytest.raises(UnsupportedModel, match=r"found 0 s left of the time limit, expected 1000\.0 s for a step"):
        mimic_int8(*call, max_seconds=0.0)
    assert path.read_bytes() == before
    assert mimic_int8(*call, max_seconds=3500.0).steps == 3


class Places(torch.nn.Module):
    """Creates a tensor while it runs."""

    size = (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.fc((self.conv(x) + torch.arange(8.0, device=x.device)).relu().mean((2, 3)))


def test_the_network_runs_on_another_device(tmp_path):
    _, x, _, read = written(randomised(Places()), tmp_path)
    network, meta = read.network, torch.device("meta")
    network.create_tensors_on(meta)
    assert network.to(meta)(x.to(meta)).device == meta


@pytest.mark.long
def test_ctrl_c_leaves_the_file(tmp_path):
    def stop(done, steps, loss):
        raise KeyboardInterrupt

    model = randomised(Chain())
    path, x, seam, _ = written(model, tmp_path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        mimic_int8(path, model, x[:2], seam, x, preset("default", steps=4), on_step=stop)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("processor", "vnni", "bits"),
    [("x86_64", True, 8), ("AMD64", False, 7), ("x86_64", False, 7), ("aarch64", False, 8)],
)
def test_bits_of_a_weight_by_processor(processor, vnni, bits, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert int8.weight_bits() == bits


@pytest.mark.parametrize(("bits", "largest"), [(7, 64), (8, 127)])
def test_weights_have_these_bits(bits, largest, tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(int8, "weight_bits", lambda: bits)
    path, _ = exported(randomised(Chain()), tmp_path)
    held = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    assert max(int(np.abs(t.astype(int)).max()) for t in held if t.dtype == np.int8 and t.size) == largest
