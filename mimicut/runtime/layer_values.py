"""What each layer gives, in a network and in an exported file of it.

A file does not say which of its values is whose. So the network is traced and converted once more, with the names of
its modules: a value of that name in the file is the same layer's. A copy of the file then returns these values too, or
takes the network's own in their place.

In INT8 files an activation after a layer is part of how the layer's values are rounded. Where it is a function of the
code and no module, as in `torch.relu(conv(x))`, the layer is compared after it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.tracing import Example
from mimicut.runtime.export import traced_as_exported
from mimicut.runtime.onnx_file import ONE_FILE, Operator, operators_of, runnable_copy
from mimicut.runtime.readable_outputs import ReadableOutputs
from mimicut.surgery.seam import tensors

_ROUNDED_WITH = ("Relu", "Clip")  # operators that INT8 files leave out, as the rounding before them does what they do


def layer_outputs(model: nn.Module, call: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every layer of a network gives in one forward pass, and what the network returns.

    Args:
        model: The network. A layer is a module in which no other is called.
        call: What it is called with.

    Returns:
        Layers in the order in which they end, each with its first floating-point tensor: "stem", and "act@1" for the
        second call of a module; and the outputs by their places, as in `SeamPoint.part`.
    """
    around: list[list[Any]] = []  # each module that runs, and whether it has called another
    calls: dict[str, int] = defaultdict(int)
    found: dict[str, Tensor] = {}

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            around.append([name, False])

        return hook

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        name, called = around.pop()
        if around:
            around[-1][1] = True
        value = next((t for _, t in tensors(output) if t.is_floating_point()), None)
        if called or value is None or not name:
            return
        found[f"{name}@{calls[name]}" if calls[name] else name] = value.detach().clone()  # the next may overwrite it
        calls[name] += 1

    handles = []
    try:
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        with torch.no_grad():
            outputs = dict(tensors(model(*call[0], **call[1])))
    finally:
        for handle in handles:
            handle.remove()
    return found, outputs


@dataclass(frozen=True)
class Shown:
    """The layers of a network that can be seen in a file.

    Attributes:
        values: Layer -> the value of the file that is compared with what the layer gives.
        outputs: The network's floating-point outputs that no layer gives as they are: their rows' names, such as
            "<model>:output.scores", with their places among the tensors that it returns.
        within: Layer or output -> those before it whose own values the file does not hold: they became one with it.
        unseen: Layers that no value of the file was found for.
        after: Layer -> the value of the traced program that is compared in place of what the layer gives: that of an
            activation after it, such as "relu_1".
    """

    values: dict[str, str]
    outputs: dict[str, int]
    within: dict[str, list[str]]
    unseen: list[str]
    after: dict[str, str] = field(default_factory=dict)


class LayersOfFile:
    """A file, and a network that it was made of.

    Args:
        model: The network, as it was exported.
        example: As in `export`.
        path: The file.
        kind: Its format.
        free: Which of "batch" and "size" are free in it.
    """

    def __init__(self, model: nn.Module, example: Any, path: Path, kind: str, free: Iterable[str]):
        self._path, self._kind = path, kind
        self.model, call, program = traced_as_exported(model, example, free)
        self._program: _Program | None = None
        self.wraps = isinstance(self.model, ReadableOutputs)  # names of layers then begin with "model."
        layers, outputs = layer_outputs(self.model, call)
        self.bytes = sum(value.nbytes for value in layers.values())  # of the example's images
        places = {
            f"<model>:output.{place}" if place else "<model>:output": number
            for number, (place, value) in enumerate(outputs.items())
            if value.is_floating_point()
        }
        if kind == "pt2":
            self.shown = _in_program(path, layers, places)
        else:
            values = _values_of_onnx(path) if kind != "openvino" else _values_of_openvino(path)
            operators, ends, plain = operators_of(program, self.model)
            self.shown = _in_graph(operators, {name: ends[n] for name, n in places.items()}, values, layers, places)
            self._program = _Program(plain, self.shown.after.values()) if self.shown.after else None

    def outputs_of(self, call: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As `layer_outputs` of the network; of a layer that is compared after an activation, what that gives."""
        values, outputs = layer_outputs(self.model, call)
        if self._program is not None:
            found = self._program.values_of(call)
            values |= {layer: found[name] for layer, name in self.shown.after.items()}
        return values, outputs

    def returning_values(self, target: Path, exact: bool) -> tuple[Path, dict[str, Any], list[str]]:
        """Write a copy of the file that returns what its layers give, after its own outputs; torch's program needs no
        copy.

        Args:
            target: A folder for the copy.
            exact: Whether layers take, in place of what those before them give, further inputs of the file.

        Returns:
            The copy, what a call of it says besides, and the layers whose values it takes, in that order.
        """
        copy, values = target / self._path.name, self.shown.values
        if self._kind == "pt2":
            return self._path, {"values": list(values.values()), "exact": exact}, list(values) if exact else []
        write = _write_openvino_copy if self._kind == "openvino" else _write_onnx_copy
        taken = write(self._path, copy, list(values.values()), exact)
        return copy, {}, [layer for layer, value in values.items() if value in taken]


class _Program:
    """A traced program, of which certain values are wanted. names: those of its nodes."""

    def __init__(self, program: ExportedProgram, names: Iterable[str]):
        self._graph, self._names = runnable_copy(program), set(names)

    @torch.no_grad()
    def values_of(self, call: Example) -> dict[str, Tensor]:
        """The wanted values in one pass."""
        watched = _Watched(self._graph, self._names)
        watched.run(*tree_leaves(call), enable_io_processing=False)
        return watched.found


class _Watched(Interpreter):
    """Keeps what the nodes of certain names give."""

    def __init__(self, graph: GraphModule, names: set[str]):
        super().__init__(graph)
        self._names = names
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if n.name in self._names:
            self.found[n.name] = made
        return made


def _in_graph(
    operators: Sequence[Operator],
    ends: Mapping[str, str],
    values: Mapping[str, str],
    layers: Mapping[str, Tensor],
    places: Mapping[str, int],
) -> Shown:
    """Match layers by the names of values.

    Args:
        operators: Those of the network, with its modules.
        ends: Output -> its value.
        values: Those in the file, each with the one that is compared.
        layers: What each layer gives.
        places: Output -> its place.
    """
    named = _named_values(operators, layers)
    after: dict[str, list[str]] = defaultdict(list)
    for operator in operators:
        for value in operator.inputs:
            after[value] += operator.outputs
    seen = {value: layer for layer, value in named.items() if value in values}
    activations = _activations(operators, named.values(), values)
    later = {layer: activations[value] for layer, value in named.items() if value in activations}
    seen |= {value: layer for layer, value in later.items()}
    shown = {layer: value for layer, own in named.items() if seen.get(value := later.get(layer, own)) == layer}
    others = {name: places[name] for name, value in ends.items() if value not in seen}
    holders = {**{ends[name]: name for name in others}, **seen}
    within: dict[str, list[str]] = defaultdict(list)
    unseen = [module for module, calls in _calls_of(layers).items() if len(calls) > 1 and module not in named]
    for layer, value in named.items():
        if layer in shown:
            continue
        holder = _first_after(value, after, holders)
        if holder is None:
            unseen.append(layer)
        else:
            within[holder].append(layer)
    return Shown({layer: values[value] for layer, value in shown.items()}, others, dict(within), unseen, later)


def _activations(operators: Sequence[Operator], named: Iterable[str], values: Mapping[str, str]) -> dict[str, str]:
    """Value of a layer that a file does not hold -> the value after it, of an activation that is no layer, that it
    holds."""
    taken = set(named)
    after = {operator.inputs[0]: operator for operator in operators if operator.kind in _ROUNDED_WITH}
    found = {}
    for value in taken - set(values):
        operator = after.get(value)
        while operator is not None:
            (made,) = operator.outputs or (None,)
            if made is None or made in taken:
                break
            if made in values:
                found[value] = made
                break
            operator = after.get(made)
    return found


def _named_values(operators: Sequence[Operator], layers: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> the name of the value that it gives: the last one of its axes among those of its module."""
    runs: dict[str, list[list[Operator]]] = defaultdict(list)  # each run of operators of a module is a call of it
    before = None
    for operator in operators:
        if operator.module.startswith("_empty"):  # of no module: it computes a size
            continue
        if operator.module != before:
            runs[operator.module].append([])
        runs[operator.module][-1].append(operator)
        before = operator.module
    found = {}
    for module, calls in _calls_of(layers).items():
        if len(calls) != len(runs[module]):  # nothing computed, or calls without anything between them
            continue
        for layer, run in zip(calls, runs[module], strict=True):
            shape = layers[layer].shape
            fitting = [name for each in run for name, axes in each.outputs.items() if _fits(axes, shape)]
            if fitting:
                found[layer] = fitting[-1]
    return {layer: found[layer] for layer in layers if layer in found}


def _calls_of(layers: Iterable[str]) -> dict[str, list[str]]:
    calls: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        calls[layer.partition("@")[0]].append(layer)
    return calls


def _fits(axes: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(axes) == len(shape) and all(a is None or a == b for a, b in zip(axes, shape, strict=True))


def _first_after(value: str, after: Mapping[str, list[str]], seen: Mapping[str, str]) -> str | None:
    """The first layer that can be seen among those that `value` leads to."""
    queue, known = [value], {value}
    for each in queue:
        if each in seen:
            return seen[each]
        new = [other for other in after.get(each, ()) if other not in known]
        queue += new
        known.update(new)
    return None


def _values_of_onnx(path: Path) -> dict[str, str]:
    """The values of an ONNX file, each with the one that is compared: where it is quantised, what it is afterwards."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    quantised = {n.input[0]: n.output[0] for n in reversed(graph.node) if n.op_type == "QuantizeLinear"}
    plain = {n.input[0]: n.output[0] for n in reversed(graph.node) if n.op_type == "DequantizeLinear"}
    made = [value for node in graph.node for value in node.output if value]
    return {value: plain.get(quantised.get(value, ""), value) for value in made}


def _write_onnx_copy(path: Path, target: Path, values: Sequence[str], exact: bool) -> set[str]:
    """Write a copy that also returns `values`. exact: whether it takes them too, wherever they are used.

    Returns:
        Those that it takes, each by an input in the order of `values`.
    """
    import onnx
    from onnx import TensorProto
    from onnx.helper import make_tensor_value_info

    model = onnx.load(path)
    graph, taken = model.graph, set()
    del graph.value_info[:]  # its axes may be those of other images
    if exact:
        uses = _uses_of(graph, values)
        for value in values:
            if uses[value]:
                graph.input.append(make_tensor_value_info(f"{value} given", TensorProto.FLOAT, None))
                taken.add(value)
            for node, place in uses[value]:
                node.input[place] = f"{value} given"
    graph.output.extend(make_tensor_value_info(f"{value} shown", TensorProto.FLOAT, None) for value in values)
    graph.node.extend(onnx.helper.make_node("Identity", [value], [f"{value} shown"]) for value in values)
    onnx.save(model, target, save_as_external_data=model.ByteSize() > ONE_FILE)
    return taken


def _uses_of(graph: Any, values: Sequence[str]) -> dict[str, list[tuple[Any, int]]]:
    """For each value the operators that take it, with the place among their inputs; also those that take it before it
    is quantised, but for what quantises it."""
    made = {output: node for node in graph.node for output in node.output}
    names = {value: value for value in values}
    for value in values:
        node = made[value]
        source = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            names[source.input[0]] = value
    uses: dict[str, list[tuple[Any, int]]] = {value: [] for value in values}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in names and (name == names[name] or node.op_type != "QuantizeLinear"):
                uses[names[name]].append((node, place))
    return uses


def _values_of_openvino(path: Path) -> dict[str, str]:
    import openvino

    return {name: name for name in _ports_of(openvino.Core().read_model(path))}


def _ports_of(model: Any) -> dict[str, Any]:
    """Name of a value -> where an operator of OpenVINO's gives it."""
    operators = (each for each in model.get_ordered_ops() if each.get_type_name() != "Result")
    return {name: port for each in operators for port in each.outputs() for name in port.get_names()}


def _write_openvino_copy(path: Path, target: Path, values: Sequence[str], exact: bool) -> set[str]:
    """As `_write_onnx_copy`."""
    import openvino
    from openvino import opset13

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the copy does not last
    model = core.read_model(path)
    ports = _ports_of(model)
    inputs, taken = list(model.get_parameters()), set()
    if exact:
        for value in values:
            uses = [use for use in ports[value].get_target_inputs() if use.get_node().get_type_name() != "Result"]
            if uses:
                given = opset13.parameter(ports[value].get_partial_shape(), ports[value].get_element_type())
                inputs.append(given)
                taken.add(value)
            for use in uses:
                use.replace_source_output(given.output(0))
    results = [*model.get_results(), *(opset13.result(ports[value]) for value in values)]
    openvino.save_model(openvino.Model(results, inputs), target, compress_to_fp16=False)
    return taken


def _in_program(path: Path, layers: Mapping[str, Tensor], places: Mapping[str, int]) -> Shown:
    """Match layers by the modules that torch's program names at its operators."""
    graph = torch.export.load(path).module().graph
    found: dict[str, str] = {}
    for node in graph.nodes:
        value, around = node.meta.get("val"), node.meta.get("nn_module_stack") or {}
        if node.op != "call_function" or not isinstance(value, Tensor) or not around:
            continue
        key, (module, _) = list(around.items())[-1]
        layer = f"{module}@{key.rpartition('@')[2]}" if "@" in key else module
        axes = [int(axis) if is_concrete_int(axis) else None for axis in value.shape]
        if layer in layers and _fits(axes, layers[layer].shape):
            found[layer] = node.name
    ends = [node.name if isinstance(node, Node) else None for node in tree_leaves(graph.output_node().args[0])]
    others = {name: place for name, place in places.items() if ends[place] not in found.values()}
    return Shown({layer: found[layer] for layer in layers if layer in found}, others, {}, [])
