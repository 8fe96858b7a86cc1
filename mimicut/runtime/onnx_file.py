"""A traced program as an ONNX file."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from mimicut.anatomy.tracing import fault_place, operator, quiet, without_stacks
from mimicut.base.errors import UnsupportedModel, one_line
from mimicut.runtime.readable_outputs import model_name

ONE_FILE = 256 * 2**20  # bytes of weights in one .onnx; writing it takes three times that. Assumption: above it counts


def write_onnx(program: ExportedProgram, model: nn.Module, path: Path) -> int:
    """Write a traced program as ONNX, and return its opset. model: what was traced, for messages.

    Raises:
        UnsupportedModel: An operator has no ONNX form.
    """
    try:
        _adapt_attention(program)
        with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript"), without_stacks():
            warnings.simplefilter("ignore")  # the converter warns of its own internals; its errors are raised
            converted = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            assert converted is not None  # where no file is named
            for node in converted.model.graph.all_nodes():
                node.metadata_props.clear()  # where in the code it came from: more than the weights of a small network
            weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
            converted.save(path, external_data=weights > ONE_FILE)
            return converted.model.opset_imports[""]
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UnsupportedModel(
            f"writing {model_name(model)} as ONNX: torch.onnx.export stopped{fault_place(error, model)} with "
            f"{one_line(cause)}; expected operators that ONNX has"
        ) from error


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
