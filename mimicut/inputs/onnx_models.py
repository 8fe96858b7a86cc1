"""Teachers from ONNX files, for those who have a file and no code. No code of a file is run, as it holds none: its
nodes are turned into ordinary modules (`onnx_network`) by the rules in `onnx_operators`.

A result holds the list of steps, so it loads without the file. The file is needed for its weights alone: to compress
again and to verify.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimicut.base.errors import InputError, MimicutError, UnsupportedModel, one_line
from mimicut.base.paths import usable_path
from mimicut.inputs.built_model import IMAGENET_MEAN, IMAGENET_STD, BuiltModel
from mimicut.inputs.onnx_network import OnnxNetwork
from mimicut.inputs.onnx_operators import RULES
from mimicut.inputs.onnx_reader import (
    PRIME,
    GraphReader,
    Node,
    Unreadable,
    Value,
    as_tensor,
    for_any_batch,
    type_name,
)
from mimicut.inputs.preprocessing import Preprocessing, per_channel

OLDEST = 7  # Source: before it, ONNX broadcast in arithmetic by other rules.
# Of the largest output. Source: measured: below 1e-6 for 48 files in float32, 3e-4 for a small one in float16.
_DEVIATION, _DEVIATION_HALF = 1e-4, 2e-2
_OPTIONS = {"sha256", "image_size"}
_FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # Source: onnx.TensorProto.DataType.
_HALF = (10, 16)
_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")
_CHANCE = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
_OWN_CODE = "or give the network's own code, FILE.py:FUNCTION"


def build_onnx(
    name: str,
    kwargs: Mapping[str, Any],
    pretrained: bool,
    program: Mapping[str, Any] | None = None,
    size_hw: tuple[int, int] | None = None,
) -> BuiltModel:
    """Build the network of an ONNX file.

    Args:
        name: The file.
        kwargs: "sha256", which the file must have, and "image_size", [H, W], for a file whose images may have any.
        pretrained: Whether it gets the weights of the file; without, its layers are random.
        program: The steps of a network that was read before; then no file is read.
        size_hw: Height and width of the images, where the user gave them.

    Raises:
        InputError: The file cannot be read, or an option does not fit.
        UnsupportedModel: The network in it is the reason.
    """
    spec = f"onnx:{name}"
    if program is not None:
        return BuiltModel(OnnxNetwork(program), Preprocessing((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD))
    wrong = sorted(set(kwargs) - _OPTIONS)
    if wrong:
        raise InputError(
            f"loading {spec}: found {', '.join(wrong)}, but the file fixes the architecture; leave that out"
        )
    size = size_hw or (tuple(kwargs["image_size"]) if "image_size" in kwargs else None)
    path = usable_path(name, f"loading {spec}")
    model, digest = _read_file(path, spec)
    if kwargs.get("sha256", digest) != digest:
        raise InputError(
            f"loading {spec}: its sha256 is {digest}, expected {kwargs['sha256']}: this is not the file that the "
            "result was made from; name that one (--teacher onnx:FILE)"
        )
    notes: list[str] = []
    reader, program, shape, free = _read_graph(model, spec, size, notes)
    network = OnnxNetwork(program)
    tensors = reader.tensors if pretrained else {n: t for n, t in reader.tensors.items() if n.endswith(".value")}
    missing = network.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys  # as every tensor was named after a module of the program
    if pretrained:
        _compare(network.eval(), path, model, spec, shape, reader.batch, notes)
    channels = shape[0]
    notes.append(
        "an ONNX file does not say how images are prepared: ImageNet's mean and std are assumed unless --mean and "
        "--std are given"
    )
    preprocessing = Preprocessing(
        shape, per_channel(IMAGENET_MEAN, channels), per_channel(IMAGENET_STD, channels)
    )  # fmt: skip
    given = {"sha256": digest, **({"image_size": list(shape[1:])} if free else {})}
    return BuiltModel(network, preprocessing, options={"program": program, "model_kwargs": given}, notes=notes)


def _read_file(path: Path, spec: str) -> tuple[Any, str]:
    """The model in a file, with its weights, and the sha256 of all that was read."""
    try:
        import onnx
        from onnx.external_data_helper import load_external_data_for_model
    except ImportError as error:
        raise InputError(f"loading {spec}: onnx is not installed; pip install 'mimicut[onnx-in]'") from error
    if not path.is_file():
        raise InputError(f"loading {spec}: there is no file {path}; check the path")
    digest = hashlib.sha256(path.read_bytes())
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # of protobuf
        raise InputError(
            f"loading {spec}: the file is no whole ONNX file ({one_line(error)}); check that it was copied completely"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise InputError(
            f"loading {spec}: the file holds no network ({path.stat().st_size:,} bytes, {len(model.graph.node)} "
            "nodes), expected an ONNX model; check that it is one, and was copied completely"
        )
    beside = sorted({e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"})
    around = path.parent.resolve()
    found = {name: (around / name).resolve() for name in beside}
    absent = [name for name, file in found.items() if not (file.is_relative_to(around) and file.is_file())]
    if absent:
        raise InputError(
            f"loading {spec}: its weights are in {', '.join(absent[:3])}, expected beside it in {path.parent}; copy "
            "that file there too"
        )
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of onnx, where sizes disagree or a path leads elsewhere
        raise InputError(
            f"loading {spec}: its weights in {', '.join(beside)} cannot be read ({one_line(error)}); copy both files "
            "again"
        ) from error
    for name in beside:
        digest.update((path.parent / name).read_bytes())
    return model, digest.hexdigest()


def _read_graph(
    model: Any, spec: str, size: Sequence[int] | None, notes: list[str]
) -> tuple[GraphReader, dict[str, Any], tuple[int, int, int], bool]:
    """The reader after the last node, the program, the size of its images, and whether the file leaves that free."""
    from onnx import inliner, numpy_helper

    if len(model.functions):
        model = inliner.inline_local_functions(model)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST:
        raise UnsupportedModel(
            f"loading {spec}: its operators are of version {opset} (opset), expected {OLDEST} or newer; convert the "
            "file with onnx.version_converter.convert_version, or export it again"
        )
    graph = model.graph
    _refuse_quantised(graph, spec)
    try:
        constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    except Exception as error:  # of onnx, on sizes that disagree
        raise InputError(
            f"loading {spec}: its weights cannot be read ({one_line(error)}); check that it was copied completely"
        ) from error
    images, shape, batch, free = _input(graph, spec, constants, size)
    nodes = [Node(proto) for proto in graph.node]
    reader = GraphReader(opset, batch, nodes, constants)
    outputs = [o.name for o in graph.output]
    reader.mark_outputs(outputs)
    reader.begin(images, shape)
    for place, node in enumerate(nodes):
        _read_node(reader, node, place, spec)
    program = _program(reader, outputs, spec)
    half = sorted({_FLOATS[t.data_type] for t in graph.initializer if t.data_type in _FLOATS} - {"float32"})
    if half:
        notes.append(f"weights converted from {', '.join(half)} to float32")
    return reader, program, shape, free


def _refuse_quantised(graph: Any, spec: str) -> None:
    found = next((n for n in graph.node if n.op_type in _QUANTISED or n.op_type.startswith("QLinear")), None)
    if found is not None:
        raise UnsupportedModel(
            f"loading {spec}: node {found.name!r} is {found.op_type}: the file is quantised, and what was rounded "
            "cannot be cut or trained; give the file as it was before, in float32, and export the student with --to "
            "int8"
        )


def _input(
    graph: Any, spec: str, constants: Mapping[str, Any], size: Sequence[int] | None
) -> tuple[str, tuple[int, int, int], int | None, bool]:
    """The name of the images, their (C, H, W), the batch size that the file is written for, and whether it leaves
    height or width free."""
    inputs = [i for i in graph.input if i.name not in constants]
    sizes = [[d.dim_value if d.HasField("dim_value") else 0 for d in i.type.tensor_type.shape.dim] for i in inputs]
    shown = ", ".join(f"{i.name} {_shown(s)}" for i, s in zip(inputs, sizes, strict=True))
    if len(inputs) != 1:
        raise UnsupportedModel(
            f"loading {spec}: found {len(inputs)} inputs ({shown or 'none'}), expected one, the images; fix the others "
            f"in the file, {_OWN_CODE}"
        )
    name, dims, kind = inputs[0].name, sizes[0], inputs[0].type.tensor_type.elem_type
    if kind not in _FLOATS:
        raise UnsupportedModel(
            f"loading {spec}: its input {shown} holds {type_name(kind)}, expected floating point; export the network "
            "without the step that converts pictures (its first nodes)"
        )
    if len(dims) != 4:
        raise UnsupportedModel(
            f"loading {spec}: its input is {shown}, expected images (N, C, H, W); export the network with such an "
            f"input, {_OWN_CODE}"
        )
    if dims[3] in (1, 3, 4) and dims[1] not in (1, 3, 4):
        raise UnsupportedModel(
            f"loading {spec}: its input is {shown}, channels last (NHWC), expected (N, C, H, W); convert it with "
            "channels first (tf2onnx: --inputs-as-nchw)"
        )
    batch, channels, height, width = dims
    if not channels:
        raise UnsupportedModel(
            f"loading {spec}: its input is {shown}, without a number of channels; export it with a fixed one"
        )
    free = not (height and width)
    if free and size is None:
        raise InputError(
            f"loading {spec}: its input is {shown}: height and width may be any, so say which: --input-size "
            f"{channels}x224x224 (input_size in Python)"
        )
    wanted = (height, width) if size is None else (int(size[0]), int(size[1]))
    if any(a and a != b for a, b in zip((height, width), wanted, strict=True)):
        raise InputError(
            f"loading {spec}: found --input-size {channels}x{wanted[0]}x{wanted[1]}, but its input is {shown}: the "
            "file is written for that size; leave the option out, or export the network for another size"
        )
    return name, (channels, *wanted), batch or None, free


def _shown(sizes: Sequence[int]) -> str:
    return f"({', '.join(str(n or 'any') for n in sizes)})"


def _read_node(reader: GraphReader, node: Node, place: int, spec: str) -> None:
    if not node.outputs or node.outputs[0] in reader.done:
        return
    label = f"{node.name!r}" if node.name else f"number {place}"
    where = f"loading {spec}: node {label} ({node.kind})"
    domain = str(node.proto.domain)
    try:
        inputs = [reader.known(name) for name in node.inputs if name]
        fixed = not any(isinstance(v, Value) for v in inputs)
        usual = domain in ("", "ai.onnx")
        counts_images = node.kind == "ConstantOfShape" or (node.kind in ("Expand", "Tile") and _tainted(inputs))
        if node.kind in _CHANCE:
            raise UnsupportedModel(f"{where} draws numbers at random; export the network after model.eval()")
        if node.kind in RULES and usual and (not fixed or counts_images or node.kind in ("Shape", "Size")):
            RULES[node.kind](reader, node)
        elif fixed and usual and node.kind not in ("If", "Loop", "Scan"):
            reader.fold(node)
        else:
            raise _unknown(reader, where, spec)
    except Unreadable as error:
        raise UnsupportedModel(f"{where} cannot be read: {for_any_batch(str(error))}") from error
    except (MimicutError, MemoryError):
        raise
    except Exception as error:  # attributes that are missing, or of other kinds than the standard has
        raise UnsupportedModel(
            f"{where} cannot be read: {for_any_batch(one_line(error))}; check the file with onnx.checker, {_OWN_CODE}"
        ) from error


def _tainted(values: Sequence[Any]) -> bool:
    """Whether one of these constants counts images."""
    return any(v.dtype.kind == "i" and bool(((v % PRIME == 0) & (v > 0)).any()) for v in values)


def _unknown(reader: GraphReader, where: str, spec: str) -> UnsupportedModel:
    names = dict.fromkeys(f"{n.proto.domain}::{n.kind}".removeprefix("::") for n in reader.nodes if not _usual(n))
    others = f" (the file has {', '.join(list(names)[:6])})" if len(names) > 1 else ""
    return UnsupportedModel(
        f"{where} is an operator that is not read{others}; cut the file off before it (onnx.utils.extract_model), "
        f"{_OWN_CODE}"
    )


def _usual(node: Node) -> bool:
    return node.proto.domain in ("", "ai.onnx") and (node.kind in RULES or node.kind == "Constant")


def _program(reader: GraphReader, outputs: Sequence[str], spec: str) -> dict[str, Any]:
    """The steps that the outputs need, as `OnnxNetwork` takes them."""
    assert reader.images is not None  # set before any node is read
    found = {}
    for name in outputs:
        value = reader.values.get(name)
        if isinstance(value, Value) and not value.name.startswith("c:"):
            found[name] = value.name
    if not found:
        raise UnsupportedModel(
            f"loading {spec}: none of its outputs ({', '.join(outputs) or 'none'}) is computed from the images"
        )
    needed, steps = set(found.values()), []
    for step in reversed(reader.steps):
        if needed & set(step[4]):
            needed |= set(step[3])
            steps.append(step)
    steps.reverse()
    modules = {step[0] for step in steps}
    constants = {name: value for name, value in reader.constants.items() if f"c:{name}" in needed}
    reader.tensors = {
        name: tensor for name, tensor in reader.tensors.items() if name.rpartition(".")[0] in modules | set(constants)
    }
    return {"input": reader.images.name, "outputs": found, "constants": constants, "steps": steps}


def _compare(
    network: OnnxNetwork,
    path: Path,
    model: Any,
    spec: str,
    shape: tuple[int, int, int],
    batch: int | None,
    notes: list[str],
) -> None:
    """Run the file itself on two images, and compare what the network returns.

    Raises:
        UnsupportedModel: They differ: an operator was read wrongly.
    """
    try:
        import onnxruntime
    except ImportError:
        notes.append("onnxruntime is not installed, so the network was not compared with the file")
        return
    count = batch or 2
    images = torch.rand(max(2, count), *shape, generator=torch.Generator().manual_seed(0))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0]
        kind = {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(given.type, np.float32)
        parts = [
            session.run(list(network.output_names), {given.name: part.numpy().astype(kind)})
            for part in images.split(count)
            if len(part) == count
        ]
    except Exception as error:  # of the runtime
        notes.append(f"the network was not compared with the file: onnxruntime says {one_line(error)}")
        return
    expected = [as_tensor(np.concatenate(values)) for values in zip(*parts, strict=True)]
    try:
        with torch.no_grad():
            made = network(images[: len(parts) * count])
    except Exception as error:  # of torch, on sizes that do not fit after all
        raise UnsupportedModel(
            f"loading {spec}: the network that was read from it stops with {for_any_batch(one_line(error))}; "
            f"{_OWN_CODE[3:]}"
        ) from error
    found = list(made.values()) if isinstance(made, dict) else [made]
    for name, of_one, a, b in zip(network.output_names, parts[0], expected, found, strict=True):
        if a.shape != b.shape:
            raise UnsupportedModel(
                f"loading {spec}: output {name!r} of the file has shape {of_one.shape} for {_images(count)}, that of "
                f"the network read from it {tuple(b.shape)} for {_images(len(parts) * count)}; {_OWN_CODE[3:]}"
            )
        if a.isnan().any():
            raise UnsupportedModel(
                f"loading {spec}: output {name!r} of the file itself is not a number (NaN) on random images of 0 to 1; "
                "check its weights"
            )
        if b.isnan().any():
            raise UnsupportedModel(
                f"loading {spec}: output {name!r} of the network read from it is not a number (NaN), where that of the "
                f"file is; {_OWN_CODE[3:]}"
            )
    limit = _DEVIATION_HALF if _computes_in_half(model.graph) else _DEVIATION
    worst = max((_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    if worst > limit:
        raise UnsupportedModel(
            f"loading {spec}: the network that was read from it differs from the file by {worst:.1e} of the largest "
            f"output, expected {limit:.0e} at most; {_OWN_CODE[3:]}"
        )
    notes.append(f"compared with the file on {len(images)} random images: {worst:.1e} of the largest output")


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference over the largest finite number. Whole numbers are not compared."""
    if not expected.is_floating_point() or not expected.numel():
        return 0.0
    differences = (expected - found).abs().masked_fill(expected == found, 0)  # two equal infinities have none
    largest = expected.abs().masked_fill(expected.isinf(), 0).max()
    return float(differences.max() / largest.clamp_min(1e-12))


def _computes_in_half(graph: Any) -> bool:
    """Whether it holds or makes numbers in half precision."""
    held = [t.data_type for t in graph.initializer] + [i.type.tensor_type.elem_type for i in graph.input]
    made = (a.i if n.op_type == "Cast" and a.name == "to" else a.t.data_type for n in graph.node for a in n.attribute)
    return any(kind in _HALF for kind in (*held, *made))


def _images(count: int) -> str:
    return f"{count} image{'s' if count != 1 else ''}"
