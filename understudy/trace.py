"""One traced forward pass as an operator graph, from `torch.export`.

Nothing here interprets operators: the graph, where each tensor comes from, and which module ran what.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import nn
from torch.fx import Node

from understudy.errors import InputError, UnsupportedModel
from understudy.guard import named_tensors, structural_copy
from understudy.seam import SeamPoint, marking, tensors

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One call of one module: its qualified name and which call of that module it is, from 0."""

    module: str
    index: int


@dataclass
class Traced:
    """A network's operator graph.

    model: a structural copy in eval mode that shares the network's tensors. example: what it was traced with.
    nodes: operators in the order in which they run. tensors: placeholder -> parameter or buffer name.
    inputs: placeholders of the example's tensors. outputs: nodes of what it returns, each with its place there ("" for
    a tensor that stands alone, else as in `SeamPoint.part`). marks: seam points that were asked for, and their nodes.
    """

    model: nn.Module
    example: Example
    program: Any
    nodes: list[Node]
    tensors: dict[Node, str]
    inputs: list[Node]
    outputs: dict[Node, str]
    marks: dict[SeamPoint, Node]
    calls: dict[Node, tuple[Call, ...]]

    @property
    def batch(self) -> int:
        """Images in the example: the first axis of its first tensor."""
        return shape(self.inputs[0])[0] if self.inputs and shape(self.inputs[0]) else 1

    def where(self, node: Node) -> str:
        """The innermost module in which `node` runs, for messages."""
        calls = self.calls.get(node, ())
        return calls[-1].module if calls else "<model>"

    def flow(self) -> networkx.DiGraph:
        """Data flow among operators and inputs (parameters left out), with a source "in" and a sink "out"."""
        graph = networkx.DiGraph()
        graph.add_nodes_from(["in", "out"])
        for node in self.inputs:
            graph.add_edge("in", node)
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in self.tensors:
                    graph.add_edge(source, node)
        for node in self.outputs:
            graph.add_edge(node, "out")
        return graph


def shape(node: Any) -> tuple[int, ...] | None:
    """Shape of the tensor that `node` returns; None if it is no node or returns no single tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else None


def operator(node: Node) -> str:
    """Name of the operator without namespace, overload and in-place mark: "conv2d", "add", "getitem"."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rsplit("::", 1)[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("__") else name.rstrip("_")


def as_example(example: Any) -> Example:
    """A tensor, a tuple of arguments, or `(args, kwargs)` as `(args, kwargs)`."""
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], tuple)
        and isinstance(example[1], Mapping)
    ):
        return example[0], dict(example[1])
    if isinstance(example, Sequence):
        return tuple(example), {}
    raise InputError(
        f"reading the example input: found a {type(example).__name__}; "
        "expected a tensor, a tuple of arguments, or (args, kwargs)"
    )


def require_data(model: nn.Module) -> None:
    """Refuse a network on the meta device: it has no values to keep.

    Raises: UnsupportedModel.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise UnsupportedModel(
                f"reading {type(model).__name__}: {name} is on the meta device and has no values; "
                "load the trained weights onto a real device first"
            )


def trace_graph(model: nn.Module, example: Any, points: Sequence[SeamPoint] = ()) -> Traced:
    """Trace `model` in eval mode with `torch.export`. The model is not changed, and nothing is computed.

    example: a tensor (N, C, H, W), a tuple of arguments or (args, kwargs). points: seam points to find in the graph.
    Raises: UnsupportedModel naming what torch.export could not follow.
    """
    require_data(model)
    args, kwargs = as_example(example)
    clone = structural_copy(model).eval()
    try:
        with (
            warnings.catch_warnings(),
            _quiet(),
            torch.no_grad(),
            marking(clone, points) as marked,
            _flat(clone) as parts,
        ):
            warnings.simplefilter("ignore")  # torch.export warns of its own internals; its errors are raised
            program = torch.export.export(clone, args, kwargs, strict=False)
    except UnsupportedModel:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise UnsupportedModel(
            f"tracing {type(model).__name__} with inputs {_describe(args, kwargs)}: torch.export stopped with "
            f"{type(error).__name__}: {reason}; expected a forward pass that runs on these inputs "
            "without branching on tensor values"
        ) from error
    return _read(clone, (args, kwargs), program, parts, points, marked)


@contextmanager
def _flat(model: nn.Module) -> Iterator[list[str]]:
    """`model` returns a list of its tensors inside, whatever holds them, so that torch.export need not know the kind.
    The list fills while it runs: the place of each."""
    parts: list[str] = []

    def hook(_: nn.Module, __: tuple, output: Any) -> list[torch.Tensor]:
        found = list(tensors(output))
        parts[:] = [part for part, _ in found]
        return [tensor for _, tensor in found]

    handle = model.register_forward_hook(hook)
    try:
        yield parts
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch prints the traceback of an operator that fails in a trace before it raises; what is raised is enough."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(
    model: nn.Module,
    example: Example,
    program: Any,
    parts: list[str],
    points: Sequence[SeamPoint],
    marked: list[tuple[int, SeamPoint]],
) -> Traced:
    signature = program.graph_signature
    first = {id(t): n for n, t in reversed([*model.named_parameters(), *model.named_buffers()])}
    held = named_tensors(model)
    names = {  # a tied tensor goes by its first name
        node: first.get(id(held.get(name)), name)
        for node, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
    }
    known, inputs, nodes, outputs = {}, [], [], {}
    marks: dict[int, Node] = {}
    users = set(signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                known[node] = names[node.name]
            elif node.name in users and shape(node) is not None:
                inputs.append(node)
        elif node.op == "output":
            returned = {n.name: n for n in node.all_input_nodes if shape(n) is not None and n not in known}
            for name, part in zip(signature.user_outputs, parts, strict=True):
                if name in returned:
                    outputs.setdefault(returned[name], part)
        elif node.op == "call_function":
            nodes.append(node)
            if operator(node) == "seam_mark":
                marks[node.args[1]] = node
        elif node.op == "get_attr":
            continue
    unreached = [str(p) for i, p in enumerate(points) if i not in {marked[k][0] for k in marks}]
    if unreached:
        raise UnsupportedModel(
            f"finding the seam: {', '.join(unreached)} is never reached in a forward pass, or nothing comes of it"
        )
    in_order = sorted(marks, key=lambda k: marked[k][0])
    seam = {marked[k][1]: marks[k] for k in in_order}
    return Traced(model, example, program, nodes, known, inputs, outputs, seam, _calls(nodes))


def _calls(nodes: list[Node]) -> dict[Node, tuple[Call, ...]]:
    """The modules around each operator, outermost first, the network itself left out."""
    seen: dict[str, list[tuple[str, ...]]] = {}
    calls = {}
    for node in nodes:
        stack: list[Call] = []
        keys: tuple[str, ...] = ()
        for key, (name, _) in node.meta.get("nn_module_stack", {}).items():
            keys += (key,)
            if not name:
                continue
            name = name.split("@")[0]
            known = seen.setdefault(name, [])
            if keys not in known:
                known.append(keys)
            stack.append(Call(name, known.index(keys)))
        calls[node] = tuple(stack)
    return calls


def _describe(args: tuple, kwargs: dict) -> str:
    values = [*args, *kwargs.values()]
    return ", ".join(str(tuple(v.shape)) if isinstance(v, torch.Tensor) else type(v).__name__ for v in values)
