"""A traced program as an ONNX file."""

import copy
import warnings
from ast import literal_eval
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from mimicut.anatomy.tracing import fault_place, operator, quiet, without_stacks
from mimicut.base.disk import write_by
from mimicut.base.errors import UnsupportedModel, one_line
from mimicut.runtime.readable_outputs import model_name

ONE_FILE = 256 * 2**20  # bytes of weights in one .onnx; writing it takes three times that. Assumption: above it counts


def write_onnx(program: ExportedProgram, model: nn.Module, path: Path, *, optimise: bool = False) -> int:
    """Write a traced program as ONNX, and return its opset.

    Args:
        program: What is written.
        model: What was traced, for messages.
        path: Where to.
        optimise: Whether torch's converter folds constants and merges operators. A runtime may want either: it does
            so itself, and does it to fit its processor, but does not have every operator that is left over without.

    Raises:
        UnsupportedModel: An operator has no ONNX form.
    """
    try:
        converted = _converted(program, optimise)
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()  # where in the code it came from: more than the weights of a small network
        weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        write_by(path, lambda to: converted.save(to, external_data=weights > ONE_FILE), weights)
        return converted.model.opset_imports[""]
    except OSError:
        raise
    except Exception as error:
        raise _cannot_write(error, model) from error


@dataclass(frozen=True)
class Operator:
    """One operator of an ONNX file.

    Attributes:
        kind: What ONNX calls it: "Conv", "Relu".
        module: The name of the module whose code it is from.
        inputs: The names of the values that it takes.
        outputs: The name of each value that it gives, with its axes; None for an axis of any size.
    """

    kind: str
    module: str
    inputs: tuple[str, ...]
    outputs: dict[str, tuple[int | None, ...]]


def operators_of(program: ExportedProgram, model: nn.Module) -> tuple[list[Operator], list[str], ExportedProgram]:
    """The operators that `write_onnx` writes without its optimisations, in the order in which they run, with the
    modules that they are from: a file itself does not say. The names of the outputs. And the program as `decomposed`
    gives it.

    Raises:
        UnsupportedModel: As `write_onnx`.
    """
    try:
        converted = _converted(program, False)
        graph = converted.model.graph
    except Exception as error:
        raise _cannot_write(error, model) from error
    found = []
    for node in graph:
        # The network, its modules from the outside in, and the operator of the traced program.
        scopes = literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        inputs = tuple(str(value.name) for value in node.inputs if value is not None)
        outputs = {str(value.name): _axes(value) for value in node.outputs if value.shape is not None}
        found.append(Operator(str(node.op_type), scopes[-2] if len(scopes) > 1 else "", inputs, outputs))
    return found, [str(value.name) for value in graph.outputs], converted.exported_program


def decomposed(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """The program in the operators that `write_onnx` writes: its values have the names that they have in the file.

    Raises:
        UnsupportedModel: As `write_onnx`.
    """
    try:
        return _converted(program, False).exported_program
    except Exception as error:
        raise _cannot_write(error, model) from error


def runnable_copy(program: ExportedProgram) -> Any:
    """A program as a graph of its own that runs on its flat arguments, without the checks of its inputs."""
    graph: Any = copy.deepcopy(program.module())
    for node in [n for n in graph.graph.nodes if n.op == "call_module"]:
        graph.graph.erase_node(node)
    return graph


def _axes(value: Any) -> tuple[int | None, ...]:
    return tuple(axis if isinstance(axis, int) else None for axis in value.shape)


def _converted(program: ExportedProgram, optimise: bool) -> Any:
    _adapt_attention(program)
    with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript"), without_stacks():
        warnings.simplefilter("ignore")  # the converter warns of its own internals; its errors are raised
        converted = torch.onnx.export(program, dynamo=True, optimize=optimise, verbose=False)
        assert converted is not None  # where no file is named
        _drop_computed_zeros(converted.model)
    return converted


def _cannot_write(error: Exception, model: nn.Module) -> UnsupportedModel:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return UnsupportedModel(
        f"writing {model_name(model)} as ONNX: torch.onnx.export stopped{fault_place(error, model)} with "
        f"{one_line(cause)}; expected operators that ONNX has; --to pt2 stores any operator of torch"
    )


def _drop_computed_zeros(model: Any) -> None:
    """Take from each convolution the bias of zeros that torch's converter lets the graph compute where the network has
    none: runtimes that want a constant there, such as OpenVINO, do not load it."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    changed = False
    for node in model.graph.all_nodes():
        bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) == 3 else None
        if bias is not None and _is_computed_zero(bias):
            node.resize_inputs(2)
            changed = True
    if changed:
        RemoveUnusedNodesPass()(model)


def _is_computed_zero(value: Any) -> bool:
    """Whether a value is a constant 0, expanded."""
    made = value.producer()
    if made is None or made.op_type != "Expand":
        return False
    while made is not None and made.op_type in ("Expand", "Cast", "CastLike"):
        made = made.inputs[0].producer()
    constant = made.attributes.get("value") if made is not None and made.op_type == "Constant" else None
    return constant is not None and not constant.value.numpy().any()


def _adapt_attention(program: Any) -> None:
    """Give attention the form that torch's converter expects: four axes, and a result with contiguous rows. The layout
    on a CPU may let a later reshape be a view, which it no longer is when the converter computes attention in parts."""
    graph, aten = program.graph, torch.ops.aten
    for node in list(graph.nodes):
        if node.op != "call_function" or operator(node) != "scaled_dot_product_attention":
            continue
        value, users = node.meta["val"], list(node.users)
        three = value.dim() == 3
        if three:
            with graph.inserting_before(node):
                given = {a: _made(graph, aten.unsqueeze.default, a, 0) for a in node.all_input_nodes if _rank(a) == 3}
            for old, new in given.items():
                node.replace_input_with(old, new)
            node.meta["val"] = value.unsqueeze(0)
        with graph.inserting_after(node):
            plain = _made(graph, aten.clone.default, node, memory_format=torch.contiguous_format)
        if three:
            with graph.inserting_after(plain):
                plain = _made(graph, aten.squeeze.dim, plain, 0)
        for user in users:
            user.replace_input_with(node, plain)


def _rank(node: Node) -> int:
    return node.meta["val"].dim()


def _made(graph: Graph, function: Any, source: Node, *others: Any, **options: Any) -> Node:
    node = graph.call_function(function, (source, *others), options)
    node.meta = {**source.meta, "val": function(source.meta["val"], *others, **options)}
    return node
