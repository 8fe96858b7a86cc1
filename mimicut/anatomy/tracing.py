"""One traced forward pass as an operator graph, from `torch.export`.

Nothing here interprets operators: the graph, where each tensor comes from, and which module ran what.
"""

import functools
import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
import torch
import torch.fx.config
from torch import nn
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mimicut.base.errors import InputError, UnsupportedModel, one_line
from mimicut.base.guard import (
    caches_kept,
    empty_copy,
    evaluating,
    full_copy,
    named_tensors,
    remembers,
    structural_copy,
)
from mimicut.surgery.seam import SeamPoint, marking, tensors
from mimicut.surgery.stand_ins import replace_multihead_attention

_EXPORT_LOGS = ("torch._subclasses.fake_tensor", "torch.export", "torch.fx.experimental.symbolic_shapes")
# Submodules are proposed in place of a network that cannot be traced: the largest few, if they hold a good part of it.
# Source: assumption.
_PARTS_TRIED, _PART_SHARE = 3, 0.3
_PARTS_RUN = 6  # submodules that are run in place of a network that does not run. Source: assumption.

SEVERAL_INPUTS = (
    "Give samples of all that it takes: in Python an InputSource or a Dataset of dictionaries or tuples (example= to "
    "inspect), for a command a .npz or .safetensors file with an array for each input; or wrap the network in a module "
    "that takes the images alone and makes the rest itself"
)
ONE_NUMBER = (
    "Its code takes one number of images for granted: where it names that number (view(1, ...), a check, squeeze()), "
    "write x.shape[0] or name the axes, so that it takes a batch of any size"
)
ALWAYS_RANDOM = (
    "Let dropout and noise stop in eval mode: a module such as nn.Dropout, or F.dropout(x, p, training=self.training)"
)
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"}

Example = tuple[tuple[Any, ...], dict[str, Any]]
# Operators that take the size, type or device of their first tensor, or of all but the first, and none of its values.
_SIZED_LIKE = {f"new_{what}" for what in ("empty", "full", "ones", "zeros")} | {
    f"{what}_like" for what in ("empty", "full", "ones", "zeros", "rand", "randn")
}
_SHAPED_LIKE = {"expand_as", "reshape_as", "type_as", "view_as"}


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        module: its qualified name.
        index: which call of that module it is, from 0.
    """

    module: str
    index: int


@dataclass
class Traced:
    """A network's operator graph.

    Attributes:
        model: a structural copy in eval mode that shares the network's tensors.
        example: what it was traced with.
        program: the `torch.export.ExportedProgram`.
        nodes: the operators, in the order in which they run.
        tensors: placeholder -> name of the parameter or buffer.
        constants: placeholders of tensors that are neither parameters nor buffers.
        inputs: placeholders of the example's tensors.
        outputs: nodes of what the network returns, each with its place there, as in `SeamPoint.part`; "" for a tensor
            that stands alone.
        marks: seam points that were asked for, with their nodes.
        calls: for each operator the module calls around it, outermost first, the network itself left out.
    """

    model: nn.Module
    example: Example
    program: Any
    nodes: list[Node]
    tensors: dict[Node, str]
    constants: list[Node]
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
        """Data flow among operators and inputs (parameters left out), with a source "in" and a sink "out".

        A tensor of which an operator takes no more than the size or the type does not flow into it.
        """
        graph = networkx.DiGraph()
        graph.add_nodes_from(["in", "out"])
        for node in self.inputs:
            graph.add_edge("in", node)
        for node in self.nodes:
            for source in _read_by(node):
                if source not in self.tensors:
                    graph.add_edge(source, node)
        for node in self.outputs:
            graph.add_edge(node, "out")
        return graph


def _read_by(node: Node) -> list[Node]:
    """The nodes whose values an operator reads, each once."""
    name = operator(node)
    if name in _SIZED_LIKE:
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return node.all_input_nodes[:1] if name in _SHAPED_LIKE else node.all_input_nodes


def shape(node: Any) -> tuple[int, ...] | None:
    """The shape of the tensor that `node` returns; None if it is no node or does not return one tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else None


def operator(node: Node) -> str:
    """The operator's name without namespace, overload and in-place mark: "conv2d", "add", "getitem"."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rsplit("::", 1)[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("__") else name.rstrip("_")


def as_example(example: Any) -> Example:
    """Bring an example input into one form.

    Args:
        example: a tensor, a tuple of arguments, or (args, kwargs).

    Returns:
        (args, kwargs).

    Raises:
        InputError: it is none of these.

    >>> as_example((1, 2))
    ((1, 2), {})
    """
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
    """Refuse a network on the meta device, which has no values to keep.

    Raises:
        UnsupportedModel: a parameter or buffer is there; the first one is named.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise UnsupportedModel(
                f"reading {type(model).__name__}: {name} is on the meta device and has no values; "
                "load the trained weights onto a real device first"
            )


def trace_graph(model: nn.Module, example: Any, points: Sequence[SeamPoint] = ()) -> Traced:
    """Trace a network in eval mode with `torch.export`. The network is not changed, and nothing is computed.

    Args:
        model: the network.
        example: a tensor (N, C, H, W), a tuple of arguments, or (args, kwargs).
        points: seam points to find in the graph.

    Returns:
        The operator graph.

    Raises:
        UnsupportedModel: torch.export cannot follow the network, the size of a tensor depends on values, or a seam
            point is never reached.
    """
    require_data(model)
    args, kwargs = as_example(example)
    _require_inputs(model, args, kwargs)
    if remembers(model):  # else what it keeps of this pass would be a tensor without values
        with torch.no_grad(), caches_kept(model), suppress(Exception):  # torch.export says what is wrong
            full_copy(model).eval()(*_own(args), **_own(kwargs))
    clone, kept = structural_copy(model).eval(), structural_copy(model).eval()
    replace_multihead_attention(clone)
    replace_multihead_attention(kept)
    if isinstance(clone, torch.fx.GraphModule):  # of which torch.export would read the graph, and call no hooks
        clone.__class__ = type(type(clone).__name__, (nn.Module,), {"forward": type(clone).forward})
    with caches_kept(model), marking(clone, points) as marked, _flat(clone) as parts:
        try:
            program = export_program(clone, args, kwargs)
            _require_sizes(program, clone)
            _require_no_dropout(program, clone)
            _require_registered(program, clone)
        except DataDependent as error:
            raise DataDependent(f"{error}. {_remedy(model, args, kwargs)}") from error
        except UnsupportedModel as error:
            if not isinstance(error.__cause__, Exception):  # ours
                raise
            raise UnsupportedModel(why_it_stops(model, (args, kwargs)) or str(error)) from error
    _flatten(program.graph_module)
    _require_input_kept(program, model)
    # Code that runs may hold on to what it computes, which has no values here: what is kept is a copy that has not run.
    return _read_program(kept, (args, kwargs), program, parts, points, marked)


def _require_inputs(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Raises: UnsupportedModel where the network's forward method takes other arguments than the example's."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        required = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        raise UnsupportedModel(
            f"reading {type(model).__name__}: its forward method takes {', '.join(required) or 'nothing'}, and "
            f"was to be called with {_describe(args, kwargs)} ({error}). {SEVERAL_INPUTS}"
        ) from error
    except ValueError:  # code without a signature
        return


def why_it_stops(model: nn.Module, example: Example) -> str | None:
    """Say why a network does not run on an example, where that is so: on its own, as a copy, or on two images.

    Args:
        model: The network. It runs in eval mode and is left as it was.
        example: (args, kwargs).

    Returns:
        One sentence or two; None where network and copy run, and the fault is in what reads them.
    """
    what = f"{type(model).__name__} on {_describe(*example)}"
    # The copy first: what the network keeps of its own pass would be in a copy that is made afterwards.
    copied = _failure(full_copy(model), example)
    alone = _failure(model, example)
    if alone is None:
        if copied is None:
            return None
        return (
            f"running a copy of {what}: {copied}; the network itself runs. Something in it belongs to the network that "
            "was built and not to the copy, such as a hook or a stored function that names it. Write that as a method "
            "of the module, which is copied with it"
        )
    if _failure(model, one_image(example)) is None:
        return f"running {what}: {alone}; on one image it runs. {ONE_NUMBER}"
    parameters = inspect.signature(model.forward).parameters
    part = _part_that_runs(model, example) if len(parameters) > 1 else None
    if part is not None:
        takes = ", ".join(parameters)
        return (
            f"running {what}: {alone}. Its part {part!r} takes the images: compress that with --part {part} "
            f"(part={part!r} in Python). The whole takes ({takes}): in Python give example=((), {{name: tensor, ...}}) "
            "and samples of all of them, as dictionaries"
        )
    return (
        f"running {what}: {alone}. Expected a network that takes a batch of normalised images, (N, C, H, W) in "
        "floating point: give the size that it takes (--input-size), or wrap it in a module whose forward method takes "
        "such a batch and prepares from it what the network takes"
    )


def _failure(model: nn.Module, example: Example) -> str | None:
    """What stops a forward pass in eval mode, and where; None if it runs."""
    args, kwargs = example
    try:
        with evaluating(model), caches_kept(model):
            model(*_own(args), **_own(kwargs))
    except Exception as error:  # whatever its code raises
        return f"{one_line(error)}{fault_place(error, model)}{_line_of(error)}"
    return None


def _part_that_runs(model: nn.Module, example: Example) -> str | None:
    """The submodule with the most parameters that runs on the images alone, if it holds a good part of the network."""
    images = next((v for v in tree_leaves(example) if isinstance(v, torch.Tensor) and v.dim() > 2), None)
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules() if name}
    least = _PART_SHARE * sum(p.numel() for p in model.parameters())
    for name in sorted((n for n in sizes if sizes[n] >= least), key=lambda n: (-sizes[n], n.count(".")))[:_PARTS_RUN]:
        if images is not None and _failure(model.get_submodule(name), ((images,), {})) is None:
            return name
    return None


def one_image(example: Example) -> Example:
    """The example with the first image of its batch alone."""
    args, kwargs = example
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim()), None)
    batch = 0 if first is None else len(first)

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, torch.Tensor) and value.shape[:1] == (batch,) else value

    return torch.utils._pytree.tree_map(cut, (args, kwargs))


def run_for_shapes(model: nn.Module, example: Example, run: Callable[[nn.Module, tuple, dict], Any]) -> Any:
    """Run a copy of a network where only shapes matter.

    Args:
        model: the network. It is not changed.
        example: (args, kwargs).
        run: called with a copy, args and kwargs. The copy has no data where the network's code allows that; otherwise
            it is a full copy, as the code may write to its buffers.

    Returns:
        What `run` returns.
    """
    args, kwargs = example
    if not remembers(model):
        try:
            empty = torch.utils._pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, example)
            with caches_kept(model), RecurrentShapes():
                return run(empty_copy(model), *empty)
        except UnsupportedModel:
            raise
        except Exception:
            pass  # code that reads values
    with caches_kept(model):
        return run(full_copy(model), args, kwargs)


class RecurrentShapes(TorchFunctionMode):
    """While it is on, LSTM, GRU and RNN without data return tensors of the right shapes at once. torch would run some
    hundred operators for each of their steps."""

    _FUNCTIONS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._FUNCTIONS or not args[0].is_meta or not isinstance(args[2], (list, tuple)):
            return func(*args, **(kwargs or {}))  # none of them, or a packed sequence
        x, state, directions = args[0], args[1], 2 if args[7] else 1
        states = (state,) if isinstance(state, torch.Tensor) else tuple(state)
        output = x.new_empty(*x.shape[:-1], directions * states[0].shape[-1])
        return output, *(s.new_empty(s.shape) for s in states)


def _own(values: Any) -> Any:
    """The same values with tensors of their own."""
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, values)


def _module_of(node: Node) -> str:
    """The name of the module in whose forward method an operator runs."""
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]
    return stack[-1] if stack else "<model>"


def _require_sizes(program: Any, model: nn.Module) -> None:
    """Raises: UnsupportedModel where the size of a tensor depends on the values of another."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not all(is_concrete_int(s) for s in value.shape):
            raise DataDependent(
                f"tracing {type(model).__name__}: how much {operator(node)} in {_module_of(node)} "
                "returns depends on the values it is given; expected tensors whose sizes follow from the input's"
            )


def _require_registered(program: Any, model: nn.Module) -> None:
    """Raises: UnsupportedModel where layers run that the network holds in a plain list, tuple or dictionary: torch
    counts and saves none of their weights."""
    own, used = set(model.modules()), {c.data_ptr() for c in program.constants.values() if isinstance(c, torch.Tensor)}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or isinstance(value, (torch.Tensor, nn.Module)):
                continue
            hidden = [m for m in tree_leaves(value) if isinstance(m, nn.Module) and m not in own]
            if any(p.numel() and p.data_ptr() in used for m in hidden for p in m.parameters()):
                where = f"{name}.{attribute}" if name else attribute
                raise UnsupportedModel(
                    f"tracing {type(model).__name__}: it runs layers that its attribute {where} holds in a "
                    f"{type(value).__name__}, of which torch counts, moves and saves no weights. Hold them in an "
                    "nn.ModuleList or nn.ModuleDict"
                )


def _require_no_dropout(program: Any, model: nn.Module) -> None:
    """Raises: UnsupportedModel where the network drops numbers at random in eval mode."""
    for node in program.graph.nodes:
        if operator(node) in _DROPOUTS and len(node.args) > 2 and node.args[1] and node.args[2] is True:
            raise UnsupportedModel(
                f"tracing {type(model).__name__}: {operator(node)} in {_module_of(node)} drops "
                f"numbers at random in eval mode too, so that no two passes are alike. {ALWAYS_RANDOM}"
            )


def _require_input_kept(program: Any, model: nn.Module) -> None:
    """Raises: UnsupportedModel where the network changes what it is given: the next one would be given other images."""
    given = set(program.graph_signature.user_inputs)
    held = set()  # nodes of the memory of an input
    for node in program.graph.nodes:
        splits = operator(node) == "getitem" and node.args[0] in held
        if splits or (node.op == "placeholder" and node.name in given):
            held.add(node)
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, Node) or value not in held:
                continue
            held.add(node)
            if argument.alias_info.is_write:
                raise UnsupportedModel(
                    f"tracing {type(model).__name__}: {operator(node)} in {_module_of(node)} changes "
                    "the images that the network is given, in place, so that a second network is given other images. "
                    "Let it work on a new tensor (x = x * 2 in place of x *= 2), or wrap the network in a module whose "
                    "forward hands it x.clone()"
                )


class DataDependent(UnsupportedModel):
    """What the code of the network does, or how much it returns, depends on the values of a tensor."""


def _remedy(model: nn.Module, args: tuple, kwargs: dict) -> str:
    """What to do with a network that cannot be traced: a submodule that can be, where one takes the images alone."""
    part = _part_that_traces(model, args, kwargs)
    if part is None:
        return (
            "Take that step out of the network: wrap what is left in a module of its own, or name a submodule that "
            "takes the images and does without it, --part MODULE (part= in Python)"
        )
    return f"Its submodule {part!r} can be traced: compress that with --part {part} (part={part!r} in Python)"


def _part_that_traces(model: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """The submodule with the most parameters that takes the images alone, and that torch.export can follow."""
    images = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
    copied = full_copy(model).eval()
    found: list[tuple[int, str, nn.Module]] = []

    def note(module: nn.Module, given: tuple, named: dict, name: str) -> None:
        if len(given) == 1 and not named and isinstance(given[0], torch.Tensor) and images is not None:
            size = sum(p.numel() for p in module.parameters())
            if size and given[0].shape == images.shape and torch.equal(given[0], images):
                found.append((size, name, module))

    hooks = [
        module.register_forward_pre_hook(functools.partial(note, name=name), with_kwargs=True)
        for name, module in copied.named_modules()
        if name
    ]
    with suppress(Exception), torch.no_grad(), caches_kept(model):
        copied(*_own(args), **_own(kwargs))
    for hook in hooks:
        hook.remove()
    whole = sum(p.numel() for p in copied.parameters())
    for size, name, module in sorted(found, key=lambda each: -each[0])[:_PARTS_TRIED]:
        with suppress(UnsupportedModel), caches_kept(model):
            if size >= _PART_SHARE * whole:
                _require_sizes(export_program(module, (images,), {}), module)
                return name
    return None


def export_program(model: nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any = None) -> Any:
    """Export a network with `torch.export`.

    Args:
        model: a copy, as code that runs may set attributes of it.
        args: what it is called with.
        kwargs: the same, by name.
        dynamic_shapes: as `torch.export.export` takes it.

    Returns:
        The `torch.export.ExportedProgram`.

    Raises:
        UnsupportedModel: something could not be followed; the operator and the module are named where they are known.
    """
    try:
        with warnings.catch_warnings(), quiet(*_EXPORT_LOGS), torch.no_grad(), without_stacks(), _graphs_unprinted():
            warnings.simplefilter("ignore")  # torch.export warns of its own internals; its errors are raised
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except UnsupportedModel:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        kind: type[UnsupportedModel] = UnsupportedModel
        why = f"{type(error).__name__}: {reason}; expected a forward pass that runs on these inputs"
        if _needs_values(error):
            kind = DataDependent
            why = (
                "a data-dependent step: what the code does there depends on the values of a tensor, which differ from "
                "image to image; expected a forward pass that takes one way for all images"
            )
        stored = re.search(r"fake tensor in the exported program.*model attribute: ([\w.]+)\.\w", str(error), re.DOTALL)
        if stored is not None:
            why = (
                f"code that sets weights while it runs, in {stored[1]}; expected a forward pass that only reads them. "
                "Let it use the merged weights, stored once before (the form in which such layers are deployed)"
            )
        raise kind(
            f"tracing {type(model).__name__} with inputs {_describe(args, kwargs)}: torch.export stopped"
            f"{fault_place(error, model)}{_line_of(error)} with {why}"
        ) from error


def _needs_values(error: BaseException) -> bool:
    """Whether a trace stopped as the code asked for the values of a tensor."""
    return "DataDependent" in type(error).__name__ or any(s in str(error) for s in ("data-dependent", ".numpy()"))


def _line_of(error: BaseException) -> str:
    """The last line of the user's, or their library's, code that an error came through: " (FILE, line 12: `code`)"."""
    ours = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if not frames or not frames[-1].line:
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: `{frames[-1].line.strip()}`)"


@contextmanager
def _graphs_unprinted() -> Iterator[None]:
    """Keep torch.export from printing the graph as far as it came, which it does when it fails; what else is written
    to the error stream is passed on where it succeeds."""
    held = io.StringIO()
    with redirect_stderr(held):
        yield
    sys.stderr.write(held.getvalue())


@contextmanager
def without_stacks() -> Iterator[None]:
    """Keep torch.export from writing a stack trace on every operator, where torch has a switch for that.

    This takes up to 40 % of its time (measured), and nothing here reads them.
    """
    config, name = torch.fx.config, "do_not_emit_stack_traces"
    before = getattr(config, name, None)
    try:
        if before is not None:
            setattr(config, name, True)
        yield
    finally:
        if before is not None:
            setattr(config, name, before)


def fault_place(error: BaseException | None, model: nn.Module) -> str:
    """Where in a network an error was raised, read from the frames that the error and its causes went through.

    Args:
        error: the error.
        model: the network that ran.

    Returns:
        " at OPERATOR in MODULE", or as much of it as is known.
    """
    names = {id(module): name for name, module in model.named_modules() if name}
    operation = module = ""
    while error is not None:
        trail = error.__traceback__
        while trail is not None:
            held = trail.tb_frame.f_locals
            module = names.get(id(held.get("self")), module)
            for node in held.values():
                if isinstance(node, Node) and node.op == "call_function":
                    operation = f" at {node.target}"
                    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]
                    module = stack[-1].split("@")[0] if stack else module
            trail = trail.tb_next
        error = error.__cause__
    return operation + (f" in {module}" if module else "")


def _flatten(module: torch.fx.GraphModule) -> None:
    """Make regions with or without autocast or gradients part of the graph, as they change no shape and no channel, and
    remove assertions."""
    graph = module.graph
    for node in list(graph.nodes):
        name = operator(node) if node.op == "call_function" else ""
        off = name == "wrap_with_autocast"
        if off or name == "wrap_with_set_grad_enabled":
            inner, given = (node.args[4], node.args[5:]) if off else (node.args[1], node.args[2:])
            region = getattr(module, inner.target)
            _flatten(region)
            places = [n for n in region.graph.nodes if n.op == "placeholder"]
            with graph.inserting_before(node):
                results = graph.graph_copy(region.graph, dict(zip(places, given, strict=True)))
            for user in list(node.users):  # the region returns a tuple
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
        elif name == "_assert_tensor_metadata":
            graph.erase_node(node)


@contextmanager
def _flat(model: nn.Module) -> Iterator[list[str]]:
    """Let `model` return a plain list of its tensors, so that torch.export need not know the class that holds them.

    Yields:
        A list that fills while it runs: where each tensor stands in what the network returns.
    """
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
def quiet(*names: str) -> Iterator[None]:
    """Silence loggers of torch, which write what torch is about to raise, tracebacks included."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_program(
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
    known, constants, inputs, nodes, outputs = {}, [], [], [], {}
    marks: dict[int, Node] = {}
    users = set(signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                known[node] = names[node.name]
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                constants.append(node)
            elif node.name in users and shape(node) is not None:
                inputs.append(node)
        elif node.op == "output":
            returned = node.args[0][len(node.args[0]) - len(parts) :]  # after the buffers that the pass changes
            for value, part in zip(returned, parts, strict=True):
                if shape(value) is not None and value not in known:
                    outputs.setdefault(value, part)
        elif node.op == "call_function":
            nodes.append(node)
            if operator(node) == "seam_mark":
                marks[node.args[1]] = node
        elif node.op == "get_attr":
            continue
    unreached = [str(p) for i, p in enumerate(points) if i not in {marked[k][0] for k in marks}]
    if unreached:
        raise UnsupportedModel(
            f"finding the seam: {', '.join(unreached)} is never reached in a forward pass, or its result is unused"
        )
    in_order = sorted(marks, key=lambda k: marked[k][0])
    seam = {marked[k][1]: marks[k] for k in in_order}
    return Traced(model, example, program, nodes, known, constants, inputs, outputs, seam, _calls(nodes))


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
