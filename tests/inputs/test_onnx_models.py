"""Teachers from ONNX files: small networks, written by torch's exporters or by hand."""

import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import mimicut as us
from mimicut.anatomy.find_seam import trace
from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.inputs.build_by_name import parse_spec
from mimicut.inputs.onnx_network import OnnxNetwork
from mimicut.inputs.onnx_operators import RULES
from mimicut.inputs.onnx_reader import PRIME, Unreadable, _axis_of_images
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_cut
from mimicut.surgery.cut import cut
from mimicut.workflow.verify import verify_folder


class Convolutions(nn.Module):
    """A residual block, a gate, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.conv1, self.each, self.conv2 = (
            nn.Conv2d(8, 12, 3),
            nn.Conv2d(12, 12, 3, padding=2, groups=12),
            nn.Conv2d(12, 8, 1),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(self.each(nn.functional.relu6(self.conv1(x))))
        x = torch.relu(x * self.gate(x))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Patches, a class token, positions, and one layer of attention with its own reshapes."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        images, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(images, tokens, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(
            (((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(images, tokens, width)
        )
        x = x + self.mlp(x)
        return self.head(self.last(x)[:, 0])


class Maps(nn.Module):
    """Down, up, a concatenation, and scores for every pixel."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(12, 6, 2, 2), nn.Conv2d(14, 3, 1)

    def forward(self, x):
        a = torch.relu(self.down(x))
        b = torch.relu(self.deep(a))
        b = nn.functional.interpolate(self.up(b), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([a, b], 1))


def random_network(kind, seed=0):
    torch.manual_seed(seed)
    network = kind().eval()
    for name, tensor in network.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_()
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return network


def written(network, path, *, dynamo=False, free=True, opset=None, size=32):
    """Export a network; free: for any number of images."""
    options = {"opset_version": opset} if opset else {}
    if free and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("n")},)
    elif free:
        options |= {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(2 if free else 1, 3, size, size),), str(path), dynamo=dynamo, verbose=False, **options
        )
    return f"onnx:{path}"


@pytest.fixture(scope="module")
def networks():
    return {kind: random_network(kind) for kind in (Convolutions, Attention, Maps)}


@pytest.fixture(scope="module")
def files(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {kind: written(network, folder / f"{kind.__name__}.onnx") for kind, network in networks.items()}


def difference(network, teacher, count=3, size=32):
    images = torch.rand(count, 3, size, size)
    with torch.no_grad():
        expected, found = network(images), teacher.model(images)
    assert found.shape == expected.shape
    return float((expected - found).abs().max() / expected.abs().max())


def by_hand(path, nodes, inputs=(("x", (None, 3, 8, 8)),), constants=None, *, opset=17, outputs=("y",), kind=None):
    """A file of these nodes, with constants {name: array}."""
    graph = helper.make_graph(
        [helper.make_node(*n[:3], name=f"node_{i}", **(n[3] if len(n) > 3 else {})) for i, n in enumerate(nodes)],
        "g",
        [helper.make_tensor_value_info(name, kind or TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return f"onnx:{path}"


WEIGHT = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)}
CONV = ("Conv", ["x", "w"], ["c"])


def test_the_name():
    assert parse_spec("onnx:folder/model.onnx") == ("onnx", "folder/model.onnx")


@pytest.mark.parametrize("kind", [Convolutions, Attention, Maps])
def test_the_network_is_that_of_the_file_for_any_number_of_images_and_its_cut_equals_zeros(kind, networks, files):
    teacher = us.load_teacher(files[kind])
    assert difference(networks[kind], teacher) < 1e-5
    assert teacher.preprocessing.input_size == (3, 32, 32)
    assert any(note.startswith("compared with the file on 2 random images") for note in teacher.notes)
    anatomy = trace(teacher.model, teacher.example())
    plan = make_plan(teacher.model, anatomy, keep=0.7)
    assert plan.macs["student"] <= 0.7 * plan.macs["teacher"]
    found = check_cut(anatomy, plan, teacher.model, cut(teacher.model, plan))
    assert found["dtype"] == "float64"
    assert found["error"] <= 1e-10


def test_a_file_for_one_image_takes_several(networks, tmp_path):
    for kind in (Attention, Convolutions):
        spec = written(networks[kind], tmp_path / "one.onnx", free=False)
        assert difference(networks[kind], us.load_teacher(spec)) < 1e-5


@pytest.mark.parametrize("kind", [Convolutions, Attention])
def test_files_of_the_newer_exporter(kind, networks, tmp_path):
    assert difference(networks[kind], us.load_teacher(written(networks[kind], tmp_path / "n.onnx", dynamo=True))) < 1e-5


def test_an_older_version_of_the_operators(networks, tmp_path):
    """Opset 12: squeezes and splits with attributes, layer norms in pieces, GELU by erf."""
    teacher = us.load_teacher(written(networks[Attention], tmp_path / "old.onnx", opset=12))
    assert difference(networks[Attention], teacher) < 1e-5


def test_the_oldest_version_that_is_read(tmp_path):
    nodes = [
        CONV, ("BatchNormalization", ["c", "one", "zero", "zero", "one"], ["n"]), ("Relu", ["n"], ["r"]),
        ("MaxPool", ["r"], ["m"], {"kernel_shape": [2, 2], "strides": [2, 2]}), ("GlobalAveragePool", ["m"], ["g"]),
        ("Flatten", ["g"], ["f"]), ("Gemm", ["f", "v", "b"], ["y"], {"transB": 1}),
    ]  # fmt: skip
    ones = np.ones(4, np.float32)
    constants = WEIGHT | {"one": ones, "zero": 0 * ones, "v": WEIGHT["w"][:3, 0, 0, :1] * np.ones((1, 4), np.float32)}
    spec = by_hand(tmp_path / "n.onnx", nodes, constants=constants | {"b": ones[:3]}, opset=7)
    assert any(note.startswith("compared with the file") for note in us.load_teacher(spec).notes)


def test_an_infinite_constant(tmp_path):
    nodes = [CONV, ("Greater", ["c", "inf"], ["g"]), ("Cast", ["g"], ["y"], {"to": 1})]
    spec = by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT | {"inf": np.array(-np.inf, np.float32)})
    assert any(note.startswith("compared with the file") for note in us.load_teacher(spec).notes)


def test_modules_have_the_names_of_the_network(files):
    names = set(us.load_teacher(files[Convolutions]).model.state_dict())
    assert {"conv1.weight", "conv2.bias", "fc.weight", "gate.1.weight"} <= names


@pytest.mark.long
def test_a_result_loads_without_the_file_and_is_verified_with_it(networks, tmp_path):
    path = tmp_path / "net.onnx"
    spec = written(networks[Convolutions], path)
    images = torch.rand(12, 3, 32, 32)
    result = us.compress(
        us.load_teacher(spec), images, keep=0.6, folder=tmp_path / "small", config=us.preset("default", steps=2)
    )
    moved = tmp_path / "moved.onnx"
    path.rename(moved)
    student = us.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(student(images), result.model(images))
    us.export_folder(tmp_path / "small", ["onnx"])
    assert difference(student, us.load_teacher(f"onnx:{tmp_path / 'small' / 'model.onnx'}")) < 1e-5
    with pytest.raises(InputError, match="there is no file"):
        verify_folder(tmp_path / "small", torch.rand(4, 3, 32, 32))
    report = verify_folder(tmp_path / "small", torch.rand(4, 3, 32, 32), teacher=f"onnx:{moved}")
    assert report.images_held_out == 4
    written(random_network(Convolutions, seed=1), moved)
    with pytest.raises(InputError, match="this is not the file that the result was made from"):
        verify_folder(tmp_path / "small", torch.rand(4, 3, 32, 32), teacher=f"onnx:{moved}")


def test_height_and_width_that_may_be_any(tmp_path):
    spec = by_hand(
        tmp_path / "n.onnx", [CONV, ("GlobalAveragePool", ["c"], ["y"])], [("x", (None, 3, None, None))], WEIGHT
    )
    with pytest.raises(InputError, match=r"\(any, 3, any, any\): height and width may be any.*--input-size 3x224x224"):
        us.load_teacher(spec)
    teacher = us.load_teacher(spec, input_size=(3, 16, 24))
    assert teacher.preprocessing.input_size == (3, 16, 24)
    assert teacher.options["model_kwargs"]["image_size"] == [16, 24]


def test_half_precision_is_read_as_float32(tmp_path):
    half = {"w": WEIGHT["w"].astype(np.float16)}
    spec = by_hand(tmp_path / "n.onnx", [CONV, ("Relu", ["c"], ["y"])], constants=half, kind=TensorProto.FLOAT16)
    teacher = us.load_teacher(spec)
    assert next(teacher.model.parameters()).dtype == torch.float32
    assert "weights converted from float16 to float32" in teacher.notes


def test_numbers_that_pictures_are_normalised_by_do_not_train(tmp_path):
    mean = {"m": np.array([0.4, 0.5, 0.6], np.float32).reshape(1, 3, 1, 1), **WEIGHT}
    nodes = [("Sub", ["x", "m"], ["s"]), ("Conv", ["s", "w"], ["c"]), ("Add", ["c", "b"], ["y"])]
    spec = by_hand(tmp_path / "n.onnx", nodes, constants=mean | {"b": np.ones((1, 4, 1, 1), np.float32) * 0.3})
    model = us.load_teacher(spec).model
    assert "m.value" in dict(model.named_buffers())
    assert "b.value" in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([("Conv", ["x", "w"], ["y"], {"auto_pad": "SAME_LOWER", "strides": [2, 2]})], {}),
        ([("Conv", ["x", "w"], ["y"], {"pads": [0, 1, 2, 0]})], {}),
        ([CONV, ("AveragePool", ["c"], ["y"], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]})], {}),
        ([CONV, ("MaxPool", ["c"], ["y"], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "strides": [2, 2]})], {}),
        ([CONV, ("HardSigmoid", ["c"], ["y"], {"alpha": 0.3})], {}),
        ([CONV, ("Clip", ["c", "", "h"], ["y"])], {"h": np.float32(0.5)}),
        ([CONV, ("Softmax", ["c"], ["y"], {"axis": 1})], {}),
        ([CONV, ("Flatten", ["c"], ["f"]), ("Gemm", ["f", "m", "v"], ["y"], {"alpha": 0.5, "beta": 2.0})],
         {"m": np.ones((144, 3), np.float32), "v": np.array([1, 2, 3], np.float32)}),
        ([CONV, ("DepthToSpace", ["c"], ["y"], {"blocksize": 2})], {}),
        ([CONV, ("SpaceToDepth", ["c"], ["y"], {"blocksize": 2})], {}),
        ([CONV, ("Resize", ["c", "", "s"], ["y"])], {"s": np.array([1, 1, 2, 2], np.float32)}),
        ([CONV, ("Resize", ["c", "", "s"], ["y"], {"mode": "cubic"})], {"s": np.array([1, 1, 1.5, 1.5], np.float32)}),
        ([CONV, ("Pad", ["c", "p"], ["y"], {"mode": "reflect"})], {"p": np.array([0, 0, 1, 0, 0, 0, 2, 1])}),
        ([CONV, ("Slice", ["c", "b", "e", "a", "t"], ["y"])],
         {"b": np.array([1, -1]), "e": np.array([4, -99]), "a": np.array([1, 3]), "t": np.array([2, -1])}),
        ([CONV, ("Slice", ["c", "b", "e", "a", "t"], ["y"])],  # from as far as there is, and over a part
         {"b": np.array([2**63 - 1, 4]), "e": np.array([-(2**63) + 1, 0]), "a": np.array([1, 3]),
          "t": np.array([-1, -2])}),
        ([CONV, ("PRelu", ["c", "p"], ["y"])], {"p": np.array([[[0.1]], [[0.2]], [[0.3]], [[0.4]]], np.float32)}),
        ([CONV, ("PRelu", ["c", "p"], ["y"])], {"p": np.array([0.1, 0.2, 0.3, 0.4], np.float32).reshape(1, 4, 1, 1)}),
        ([CONV, ("Gather", ["c", "i"], ["y"], {"axis": 1})], {"i": np.array([3, 0, -2])}),
        ([CONV, ("ReduceL2", ["c"], ["y"], {"axes": [1], "keepdims": 0})], {}),
        ([CONV, ("Mean", ["c", "c", "k"], ["y"])], {"k": np.ones((1, 4, 6, 6), np.float32)}),
        ([CONV, ("Sigmoid", ["c"], ["s"]), ("Mul", ["s", "c"], ["y"])], {}),
        ([CONV, ("Sub", ["k", "c"], ["y"])], {"k": np.float32(1.5)}),
    ],
)  # fmt: skip
def test_operators_compute_what_onnxruntime_does(nodes, constants, tmp_path):
    """Loading compares with the file, so what is read wrongly is refused."""
    notes = us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT | constants)).notes
    assert any("compared with the file on 2 random images" in note for note in notes), notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": [("x", (None, 3, 8, 8)), ("z", (None, 2))]}, r"found 2 inputs \(x \(any, 3, 8, 8\), z"),
        ({"inputs": [("x", (None, 8, 8, 3))]}, r"channels last \(NHWC\)"),
        ({"inputs": [("x", (None, None, 8, 8))]}, "without a number of channels"),
        ({"inputs": [("x", (None, 24))]}, r"expected images \(N, C, H, W\)"),
        ({"kind": TensorProto.UINT8}, r"\(any, 3, 8, 8\) holds uint8, expected floating point"),
        ({"nodes": [CONV, ("Cast", ["c"], ["y"], {"to": TensorProto.UINT16})]}, "it converts to uint16, expected"),
        ({"opset": 6}, r"of version 6 \(opset\), expected 7 or newer"),
        ({"nodes": [CONV, ("QuantizeLinear", ["c", "s"], ["y"])]}, "the file is quantised.*--to int8"),
        ({"nodes": [CONV, ("NonMaxSuppression", ["c", "c"], ["y"])]}, r"'node_1' \(NonMaxSuppression\) is an operator"),
        ({"nodes": [CONV, ("Relu", ["c"], ["y"], {"domain": "mine"})]}, "is an operator that is not read"),
        ({"nodes": [CONV, ("Relu", ["d"], ["y"])]}, "nothing before it makes its input 'd'"),
        ({"nodes": [CONV, ("RandomNormalLike", ["c"], ["y"])]}, "draws numbers at random"),
        ({"nodes": [CONV, ("Gather", ["c", "zero"], ["y"], {"axis": 0})]}, "takes one image out of a batch"),
        ({"nodes": [CONV, ("Reshape", ["c", "odd"], ["y"])]}, "written for one number of images"),
        ({"nodes": [("Constant", [], ["y"], {"value_float": 1.0})]}, "none of its outputs"),
        ({"nodes": [("Conv", ["x", "w", "nine"], ["y"])]},
         r"'node_0' \(Conv\) cannot be read: its bias has shape \(9,\), expected \(4,\)"),
        ({"nodes": [CONV, ("BatchNormalization", ["c", "four", "four", "four", "nine"], ["y"])]},
         r"its running_var has shape \(9,\), expected \(4,\)"),
        ({"nodes": [CONV, ("InstanceNormalization", ["c", "nine", "nine"], ["y"])]},
         r"its weight has shape \(9,\), expected \(4,\)"),
        ({"nodes": [CONV, ("LayerNormalization", ["c", "nine"], ["y"])]},
         r"its scale has shape \(9,\), expected \(6,\)"),
        ({"nodes": [CONV, ("GroupNormalization", ["c", "nine", "four"], ["y"], {"num_groups": 2})], "opset": 18},
         r"its weight has shape \(9,\), expected \(2,\) or \(4,\)"),
        ({"nodes": [CONV, ("Flatten", ["c"], ["f"]), ("Gemm", ["f", "m", "nine"], ["y"])]},
         r"'node_2' \(Gemm\) cannot be read: its bias has shape \(9,\), expected \(3,\)"),
        ({"nodes": [CONV, ("BatchNormalization", ["c", *["four"] * 4], ["y"], {"spatial": 0})], "opset": 7},
         "it has spatial 0, a mean and a variance for each place"),
        ({"nodes": [CONV, ("Conv", ["c", "w"], ["y"])]}, "for 3 channels, but its input 4"),
        ({"nodes": [CONV, ("Flatten", ["c"], ["f"]), ("Gemm", ["f", "k"], ["y"])]},
         r"got \[N, 144\] X \[9, 3\].*\(N: number of images\)"),
        ({"nodes": [CONV, ("Reshape", ["c", "flat"], ["f"]), ("MatMul", ["f", "m"], ["y"])],
          "inputs": [("x", (1, 3, 8, 8))]}, r"\(MatMul\) cannot be read: it is written for one number of images"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(change, said, tmp_path):
    more = {
        "s": np.float32(1), "zero": np.array(0), "odd": np.array([7, 5]), "four": np.ones(4, np.float32),
        "nine": np.ones(9, np.float32), "m": np.ones((144, 3), np.float32), "flat": np.array([144]),
        "k": np.ones((9, 3), np.float32),
    }  # fmt: skip
    options = {"nodes": [CONV, ("Relu", ["c"], ["y"])], "constants": WEIGHT | more, **change}
    with pytest.raises(UnsupportedModel, match=said):
        us.load_teacher(by_hand(tmp_path / "n.onnx", **options))


@pytest.mark.parametrize(
    "node",
    [
        ("ReduceSum", ["c", "zero"], ["y"]), ("ReduceSumSquare", ["c"], ["y"], {"axes": [0]}),
        ("ArgMax", ["c"], ["y"], {"axis": 0}), ("TopK", ["c", "one"], ["y", "places"], {"axis": 0}),
        ("CumSum", ["c", "zero"], ["y"]), ("LpNormalization", ["c"], ["y"], {"axis": 0}),
        ("Softmax", ["c"], ["y"], {"axis": 0}), ("Slice", ["c", "last", "far", "zero", "back"], ["y"]),
        ("Einsum", ["c", "c"], ["y"], {"equation": "nchw, mchw -> nm"}),
        ("Einsum", ["c"], ["y"], {"equation": "nchw->chw"}),
        ("LayerNormalization", ["c", "scale"], ["y"], {"axis": 0}),
        ("LayerNormalization", ["turned", "scale"], ["y"], {"axis": 2}), ("MatMul", ["columns", "flat"], ["y"]),
    ],
    ids=lambda node: node[0],
)  # fmt: skip
def test_what_runs_over_the_images_of_a_batch_is_refused(node, tmp_path):
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "last": np.array([-1]), "far": np.array([-(2**62)]),
        "back": np.array([-1]), "scale": np.ones(1, np.float32),
    }  # fmt: skip
    constants["zero"] = np.array(0) if node[0] == "CumSum" else constants["zero"]
    nodes = [
        CONV, ("Transpose", ["c"], ["turned"], {"perm": [1, 2, 3, 0]}), ("Flatten", ["c"], ["flat"]),
        ("Transpose", ["flat"], ["columns"], {"perm": [1, 0]}), node,
    ]  # fmt: skip
    with pytest.raises(UnsupportedModel, match=f"{node[0]}.*it runs over the images of a batch"):
        us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT | constants))


@pytest.mark.parametrize(
    "node",
    [
        ("Softmax", ["c"], ["y"], {"axis": 7}), ("ReduceMean", ["c"], ["y"], {"axes": [7]}),
        ("ArgMax", ["c"], ["y"], {"axis": 7}), ("Concat", ["c", "c"], ["y"], {"axis": 7}),
        ("Split", ["c"], ["y", "z"], {"axis": 7}), ("Slice", ["c", "zero", "one", "seven"], ["y"]),
        ("Gather", ["c", "zero"], ["y"], {"axis": 7}), ("Squeeze", ["c", "seven"], ["y"]),
        ("LayerNormalization", ["c", "scale"], ["y"], {"axis": 7}), ("Flatten", ["c"], ["y"], {"axis": 7}),
        ("Unsqueeze", ["c", "seven"], ["y"]),
    ],
    ids=lambda node: node[0],
)  # fmt: skip
def test_an_axis_that_there_is_not_is_refused(node, tmp_path):
    constants = {"zero": np.array([0]), "one": np.array([1]), "seven": np.array([7]), "scale": np.ones(1, np.float32)}
    last = {"Flatten": 4, "Unsqueeze": 4}.get(node[0], 3)
    first = {"Flatten": -4, "Unsqueeze": -5}.get(node[0], -4)
    with pytest.raises(UnsupportedModel, match=rf"'node_1' \({node[0]}\).*its axis is 7, expected {first} to {last}"):
        us.load_teacher(by_hand(tmp_path / "n.onnx", [CONV, node], constants=WEIGHT | constants))


CUBIC, KEPT = {"mode": "cubic", "cubic_coeff_a": -0.5}, {"mode": "linear", "axes": [2, 3]}


@pytest.mark.parametrize(
    ("attributes", "size", "said"),
    [
        (CUBIC | {"exclude_outside": 1}, [9, 20], None),  # as torch filters with antialias
        (CUBIC | {"exclude_outside": 1, "antialias": 1}, [3, 4], None),
        (CUBIC, [9, 20], "cubic_coeff_a -0.5, exclude_outside 0 and antialias 0 by half_pixel; expected -0.75"),
        (CUBIC | {"exclude_outside": 1}, [3, 4], "cubic_coeff_a -0.5, exclude_outside 1 and antialias 0"),
        (CUBIC | {"exclude_outside": 1, "coordinate_transformation_mode": "align_corners"}, [9, 20], "by align_c"),
        ({"mode": "cubic", "exclude_outside": 1}, [9, 20], "cubic_coeff_a -0.75, exclude_outside 1"),
        ({"mode": "linear", "antialias": 1, "exclude_outside": 1}, [3, 4], None),
        ({"mode": "linear", "antialias": 1}, [3, 4], "exclude_outside 0 and antialias 1"),
        ({"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}, [1, 4], "an axis of length 1"),
        (KEPT | {"keep_aspect_ratio_policy": "not_larger"}, [12, 30], (12, 20)),
        (KEPT | {"keep_aspect_ratio_policy": "not_smaller"}, [12, 30], (18, 30)),
        (KEPT | {"keep_aspect_ratio_policy": "not_larger"}, [4, 9], "its keep_aspect_ratio_policy is not_larger"),
    ],
)  # fmt: skip
def test_resizing_is_that_of_the_file_or_refused(attributes, size, said, tmp_path):
    """Without the comparison of outputs, whose limit a filter may stay below."""
    sizes = np.array(size if "axes" in attributes else [1, 4, *size])
    nodes = [("Conv", ["x", "w"], ["c"]), ("Resize", ["c", "", "", "sizes"], ["y"], attributes)]
    path, inputs = tmp_path / "n.onnx", [("x", (1, 3, 8, 12))]
    spec = by_hand(path, nodes, inputs, constants=WEIGHT | {"sizes": sizes}, opset=19)
    if isinstance(said, str):
        with pytest.raises(UnsupportedModel, match=rf"'node_1' \(Resize\) cannot be read: .*{said}"):
            us.load_teacher(spec)
        return
    teacher = us.load_teacher(spec)
    assert any("compared with the file on 2 random images" in note for note in teacher.notes)
    assert teacher.model(torch.rand(3, 3, 8, 12)).shape == (3, 4, *(said or size))


def test_a_file_for_one_image_that_takes_the_first_one(tmp_path):
    slices = {"zero": np.array([0]), "one": np.array([1])}
    nodes = [CONV, ("Slice", ["c", "zero", "one", "zero"], ["y"])]
    options = {"constants": WEIGHT | slices}
    spec = by_hand(tmp_path / "n.onnx", nodes, [("x", (1, 3, 8, 8))], **options)
    assert us.load_teacher(spec).model(torch.rand(3, 3, 8, 8)).shape == (3, 4, 6, 6)
    flat = [CONV, ("Reshape", ["c", "flat"], ["f"]), ("Slice", ["f", "zero", "one", "zero"], ["y"])]
    options["constants"]["flat"] = np.array([144])
    for batch, those in ((None, nodes), (2, nodes), (1, flat)):
        with pytest.raises(UnsupportedModel, match="takes some images out of a batch"):
            us.load_teacher(by_hand(tmp_path / "n.onnx", those, [("x", (batch, 3, 8, 8))], **options))


def test_constants_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("mimicut.inputs.onnx_reader"), "_MOST_FOLDED", 2**20)
    nodes = [("Concat", [f"k{i}", f"k{i}"], [f"k{i + 1}"], {"axis": 0}) for i in range(40)]
    nodes += [("ReduceSum", ["k40"], ["s"], {"keepdims": 0}), CONV, ("Add", ["c", "s"], ["y"])]
    constants = WEIGHT | {"k0": np.ones(1000, np.float32)}
    with pytest.raises(
        UnsupportedModel, match=r"it makes a constant of about 2,048,000 numbers, expected at most 1,048,576"
    ):
        us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=constants))
    outer = [("Add", ["k", "l"], ["m"]), ("ReduceSum", ["m"], ["s"], {"keepdims": 0}), CONV, ("Add", ["c", "s"], ["y"])]
    many = {"k": np.ones((1, 2000), np.float32), "l": np.ones((2000, 1), np.float32)}
    with pytest.raises(UnsupportedModel, match=r"it makes a constant of about 4,000,000 numbers"):
        us.load_teacher(by_hand(tmp_path / "n.onnx", outer, constants=WEIGHT | many))


def test_a_network_that_was_read_wrongly_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "Relu", RULES["Tanh"])
    with pytest.raises(UnsupportedModel, match="differs from the file by"):
        us.load_teacher(by_hand(tmp_path / "n.onnx", [CONV, ("Relu", ["c"], ["y"])], constants=WEIGHT))


def test_a_small_difference_is_refused_but_for_half_precision(tmp_path, monkeypatch):
    def slightly_more(reader, node):
        reader.set(node, reader.apply(node, "mul", reader.data(node), number=1.0005))

    monkeypatch.setitem(RULES, "Identity", slightly_more)
    nodes, half = [CONV, ("Identity", ["c"], ["y"])], {"w": WEIGHT["w"].astype(np.float16)}
    with pytest.raises(UnsupportedModel, match=r"by 5\.0e-04 of the largest output, expected 1e-04"):
        us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT))
    us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=half, kind=TensorProto.FLOAT16))
    rounded = [CONV, ("Cast", ["c"], ["h"], {"to": 10}), ("Cast", ["h"], ["f"], {"to": 1}), ("Identity", ["f"], ["y"])]
    us.load_teacher(by_hand(tmp_path / "n.onnx", rounded, constants=WEIGHT))


def test_outputs_of_other_shapes_and_that_are_no_numbers_are_named(tmp_path, monkeypatch):
    squeezed = [CONV, ("GlobalAveragePool", ["c"], ["p"]), ("Squeeze", ["p"], ["y"])]
    spec = by_hand(tmp_path / "n.onnx", squeezed, [("x", (1, 3, 8, 8))], WEIGHT)
    said = r"output 'y' of the file has shape \(4,\) for 1 image, that of the network .* \(2, 4\) for 2 images"
    with pytest.raises(UnsupportedModel, match=said):
        us.load_teacher(spec)
    nodes = [CONV, ("Relu", ["c"], ["r"]), ("Add", ["r", "k"], ["y"])]
    spec = by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT | {"k": np.array([np.nan], np.float32)})
    with pytest.raises(UnsupportedModel, match=r"output 'y' of the file itself is not a number \(NaN\) on random"):
        us.load_teacher(spec)
    monkeypatch.setitem(RULES, "Relu", RULES["Log"])
    spec = by_hand(tmp_path / "n.onnx", [CONV, ("Relu", ["c"], ["y"])], constants=WEIGHT)
    with pytest.raises(UnsupportedModel, match=r"output 'y' of the network read from it is not a number \(NaN\), w"):
        us.load_teacher(spec)


def test_infinities_of_the_file_are_compared(tmp_path, monkeypatch):
    nodes = [CONV, ("Relu", ["c"], ["r"]), ("Log", ["r"], ["y"])]
    spec = by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT)
    assert any(note.startswith("compared with the file") for note in us.load_teacher(spec).notes)
    monkeypatch.setitem(RULES, "Relu", RULES["Abs"])
    with pytest.raises(UnsupportedModel, match="differs from the file by inf"):
        us.load_teacher(spec)


def test_places_of_each_image_in_a_flat_batch(tmp_path):
    """As torch.onnx.export writes as_strided: (N, 4, 1, 1) laid flat, and looked up by 4 n + c."""
    nodes = [
        CONV, ("GlobalAveragePool", ["c"], ["p"]), ("Reshape", ["p", "flat"], ["f"]),
        ("Shape", ["x"], ["s"], {"end": 1}), ("Squeeze", ["s"], ["n"]), ("Range", ["zero", "n", "one"], ["i"]),
        ("Mul", ["i", "four"], ["m"]),
        ("Unsqueeze", ["m", "one_"], ["u"]), ("Add", ["u", "each"], ["k"]), ("Gather", ["f", "k"], ["y"]),
    ]  # fmt: skip
    constants = {
        "flat": np.array([-1]), "zero": np.array(0), "one": np.array(1), "four": np.array(4), "one_": np.array([1]),
        "each": np.arange(4)[None],
    }  # fmt: skip
    teacher = us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT | constants))
    assert teacher.model(torch.zeros(3, 3, 8, 8)).shape == (3, 4)
    constants["each"] = constants["each"][:, ::-1].copy()
    with pytest.raises(UnsupportedModel, match="changes the order of numbers in a batch"):
        us.load_teacher(by_hand(tmp_path / "n.onnx", nodes, constants=WEIGHT | constants))


def test_bad_files_and_options(files, networks, tmp_path):
    path = tmp_path / "n.onnx"
    spec = f"onnx:{path}"
    with pytest.raises(InputError, match="there is no file"):
        us.load_teacher(spec)
    whole = Path(files[Maps].removeprefix("onnx:")).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no network at all", b"\0" * 99):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"no whole ONNX file|holds no network|cannot be read"):
            us.load_teacher(spec)
    model = onnx.load_from_string(whole)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert difference(networks[Maps], us.load_teacher(spec)) < 1e-5
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"its weights are in weights.bin, expected beside it"):
        us.load_teacher(spec)
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside").write_bytes(bytes(100))
    for tensor in model.graph.initializer:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value="../outside")
    (tmp_path / "inner" / "n.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"its weights are in \.\./outside, expected beside it"):
        us.load_teacher(f"onnx:{tmp_path}/inner/n.onnx")
    with pytest.raises(InputError, match="written for that size"):
        us.load_teacher(files[Maps], input_size=(3, 64, 64))
    with pytest.raises(InputError, match="found num_classes, but the file fixes the architecture"):
        us.load_teacher(files[Maps], num_classes=4)


def test_without_its_weights_a_network_is_random(files):
    a, b = (us.load_teacher(files[Convolutions], pretrained=p).model.state_dict() for p in (True, False))
    assert a.keys() == b.keys()
    assert not torch.equal(a["fc.weight"], b["fc.weight"])


@pytest.mark.parametrize(
    "program",
    [
        {},
        {"input": "x", "outputs": {"y": "v1"}, "constants": {}, "steps": [["a", "system", {}, ["x"], ["v1"]]]},
        {"input": "x", "outputs": {"y": "v1"}, "constants": {"c": [[2**20, 2**20], "float32", True]}, "steps": []},
        {
            "input": "x",
            "outputs": {"y": "v1"},
            "constants": {},
            "steps": [["a", "Conv2d", {"depth": 1}, ["x"], ["v1"]]],
        },
    ],
)
def test_a_list_of_steps_that_was_tampered_with_is_refused(program):
    with pytest.raises(InputError, match="building a network of an ONNX file"):
        OnnxNetwork(program)


def test_the_axis_of_images_in_a_file_for_one():
    assert _axis_of_images([1, 17, 96], 1, 1, alone=True) == 0
    assert _axis_of_images([17, 4, 24], 17, 1, alone=True) == 1  # heads of each image
    assert _axis_of_images([17, 96], 17, 1, alone=True) == 0  # tokens of each image, not its channels
    assert _axis_of_images([17, 1, 96], 1, 1, alone=False) == 1  # and apart again
    with pytest.raises(Unreadable):
        _axis_of_images([5, 7], 3, 1, alone=True)
    assert PRIME > 10**6
