"""An INT8 file that trains: a network that rounds as the file does, and is written back into it.

The network is the traced program that the file was made from. A tensor that the file quantises is found in it by its
name, as the ONNX converter keeps the names of the program's values; a weight is found by its values, as quantisation
renames weights, folds batch norms into them and transposes them. What trains are weights and biases; ranges of
activations stay as the images gave them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.tracing import Example, operator
from mimicut.base.disk import write_by
from mimicut.base.errors import UnsupportedModel
from mimicut.base.guard import evaluating
from mimicut.runtime.onnx_file import decomposed, runnable_copy
from mimicut.runtime.readable_outputs import ReadableOutputs, model_name
from mimicut.surgery.seam import Seam, SeamPoint, capturing

_OUTPUT = "_QuantizeLinear_Input"  # what ONNX Runtime puts behind the name of an output that it quantises
# Features found in the traced program may differ from the model's by so much of the largest. Source: assumption;
# rounding is 1e-6 to 1e-5.
_SAME = 1e-4
_SAME_STEP = 1.001  # times its own rule, above which the step of a channel is the file's
_FOLDED = "_folded_bias"
_MOST = 2**31 - 2**8  # of a bias in whole numbers; the largest of 32 bits but for the rounding of its scale
_HALF = 0.51  # steps between a weight and what stands for it in the file, with rounding of their own
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
_LAYERS = _CONVOLUTIONS | {"linear"}
# Batch norms, with the place of epsilon among their arguments.
_NORMS = {"batch_norm": 7, "_native_batch_norm_legit_no_training": 6}


class _Round(torch.autograd.Function):
    """Rounds as QuantizeLinear and DequantizeLinear do. Not `torch.fake_quantize_per_tensor_affine`, which takes four
    times as long on a CPU (torch 2.15; measured: docs/LOG.md) and multiplies by the reciprocal of the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, zero: int, low: int, high: int) -> Tensor:
        ctx.ends = (low - zero - 0.5) * step, (high - zero + 0.5) * step
        ctx.save_for_backward(x)
        return (x / step).round_().clamp_(low - zero, high - zero).mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inside = torch.ops.aten.hardtanh_backward(*gradients, *ctx.saved_tensors, *ctx.ends)
        return inside, None, None, None, None


class RoundedActivation(nn.Module):
    """Rounds a tensor as a QuantizeLinear and its DequantizeLinear do; gradients go to the values inside its range."""

    def __init__(self, step: float, zero: int, low: int, high: int):
        super().__init__()
        self.step, self.zero, self.low, self.high = step, zero, low, high

    def forward(self, x: Tensor) -> Tensor:
        return _Round.apply(x, self.step, self.zero, self.low, self.high)


class RoundedWeight(nn.Module):
    """Rounds a weight, each channel to as many steps as the file has between zero and the channel's largest value.

    Args:
        axis: That of the channels; None for a weight with one range.
        steps: How many there are.
        least: The least step of each channel, (channels,) or (): the file's own where it is larger than that rule has
            it, as bias and weight of a channel share their scale, and a bias has 32 bits.
        factor: By which the weight is multiplied first: what a folded batch norm makes of its channels, as many axes as
            the weight; None for none. So the weight trains as it did beside the norm: folded, channels with a small
            factor would move too far (measured: docs/LOG.md).
        multiplies_later: Whether the network itself multiplies by the factor after the layer, so that it is taken out
            again here.
    """

    least: Tensor
    factor: Tensor | None

    def __init__(
        self,
        axis: int | None,
        steps: int,
        least: Tensor,
        factor: Tensor | None = None,
        *,
        multiplies_later: bool = False,
    ):
        super().__init__()
        self.axis, self.steps, self.multiplies_later = axis, steps, multiplies_later
        self.register_buffer("least", least)
        self.register_buffer("factor", factor)

    def scaled(self, weight: Tensor) -> Tensor:
        """The weight of which the file has the whole numbers."""
        return weight if self.factor is None else weight * self.factor

    def step(self, weight: Tensor) -> Tensor:
        """The step between two values of a scaled weight, (channels,) or ()."""
        size = weight.detach().abs()
        others = [i for i in range(weight.dim()) if i != self.axis]
        largest = size.amax(others) if self.axis is not None else size.amax()
        return torch.maximum(largest / self.steps, self.least)

    def whole(self, weight: Tensor, step: Tensor) -> Tensor:
        """The whole numbers that stand for a scaled weight."""
        return (weight.detach() / self.along(step, weight.dim())).round().clamp(-self.steps, self.steps)

    def along(self, step: Tensor, axes: int) -> Tensor:
        """Steps with as many axes as the weight."""
        return step if self.axis is None else step.reshape([-1 if i == self.axis else 1 for i in range(axes)])

    def forward(self, weight: Tensor) -> Tensor:
        scaled = self.scaled(weight)
        step = self.step(scaled)
        rounded = self.whole(scaled, step) * self.along(step, scaled.dim())
        if self.multiplies_later:
            assert self.factor is not None
            return weight + (torch.where(self.factor == 0, weight, rounded / self.factor) - weight).detach()
        return scaled + (rounded - scaled).detach()


@dataclass(frozen=True)
class _Bias:
    """A bias: its name in the network, None where the file alone has it, as what was folded is in it; and in the file
    the names of its whole numbers, of its steps, and of the steps of the layer's input, whose product with those of the
    weight they are."""

    parameter: str | None
    values: str
    steps: str
    input_steps: str


@dataclass(frozen=True)
class _Weight:
    """A weight: its name in the network, and in the file the names of its whole numbers and of their steps.

    transposed: whether the file has it so. bias: of the same layer, where that is quantised, too.
    """

    parameter: str
    values: str
    steps: str
    rounding: RoundedWeight
    transposed: bool
    bias: _Bias | None


class Int8Network(nn.Module):
    """A network that rounds as an INT8 file does and returns the features at a seam: a tensor, or a tuple where it has
    several points.

    Attributes:
        seam: Where its features are, for `mimic`; what the file does not let train counts as its head.
    """

    def __init__(self, graph: GraphModule, seam: Seam, trains: Collection[str]):
        super().__init__()
        self.network = graph
        names = [name for name, _ in graph.named_parameters() if name not in trains]
        several = len(seam.points) > 1
        self.seam = Seam(
            points=tuple(SeamPoint("", part=str(i) if several else "") for i in range(len(seam.points))),
            shapes=seam.shapes,
            head=tuple(f"network.{name}" for name in names),
            batch_axes=seam.batch_axes,
        )

    def create_tensors_on(self, device: torch.device) -> None:
        """Let operators that create tensors do so on a device; the trace has the one on which it was made."""
        for node in self.network.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.update_kwarg("device", device)
        self.network.recompile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.network(*tree_leaves((args, kwargs)))
        return found if len(found) > 1 else found[0]


class TrainableInt8:
    """An INT8 file that trains.

    Attributes:
        network: What trains.
        left: Activations that the file rounds and the network does not, as its converter computes them in several steps
            of its own; and weights, where they cannot be found in the network.
    """

    def __init__(self, path: Path, model: nn.Module, call: Example, program: Any, seam: Seam):
        """Read an INT8 file that `int8.quantise` wrote.

        Args:
            path: The file.
            model: The network in float32, as it was exported; the seam has the names of its modules.
            call: Its arguments.
            program: The trace of it that was exported (`export.traced_as_exported`).
            seam: Where the features are.

        Raises:
            UnsupportedModel: The features, or the file's weights, cannot be found in the program.
        """
        graph = runnable_copy(decomposed(program, model))
        self._file = file = _File(path)
        features = _find_features(graph, model, call, seam)
        moved, folded = _fold_norms(graph)
        values = {node.name: node for node in graph.graph.nodes} | moved
        self._weights, unfound = _round_weights(graph, file, folded)
        if not self._weights:
            raise UnsupportedModel(
                f"reading {path.name} of {model_name(model)} as a network that trains: none of its weights in INT8 is "
                "one of the network's; expected a file that was written from this network"
            )
        self.left = (*_round_activations(graph, file, values), *unfound)
        _return_features(graph, [values[name] for name in features])
        trains = {w.parameter for w in self._weights}
        trains |= {w.bias.parameter for w in self._weights if w.bias is not None and w.bias.parameter is not None}
        self.network = Int8Network(graph, seam, trains.union(file.unquantised(graph)).difference(seam.head))

    @torch.no_grad()
    def write_to(self, path: Path) -> None:
        """Write the file with the weights of the network.

        Raises:
            OSError: The disk refuses.
        """
        network, file = self.network.network, self._file
        held: dict[str, Tensor] = dict(network.named_parameters())
        for name in file.unquantised(network):
            file.put(name, held[name])
        for weight in self._weights:
            values = weight.rounding.scaled(held[weight.parameter])
            step = weight.rounding.step(values)
            if weight.bias is not None:
                of_input = torch.from_numpy(file.array(weight.bias.input_steps))
                bias = file.bias_of(weight.bias) if weight.bias.parameter is None else held[weight.bias.parameter]
                step = torch.maximum(step, bias.abs() / (of_input * _MOST))
                file.put(weight.bias.values, (bias.double() / (of_input * step).double()).round().clamp(-_MOST, _MOST))
                file.put(weight.bias.steps, of_input * step)
            whole = weight.rounding.whole(values, step)
            file.put(weight.values, whole.T if weight.transposed else whole)
            file.put(weight.steps, step)
        file.write_to(path)


class _File:
    """An ONNX file with quantised tensors.

    Attributes:
        activations: Name of a tensor that it quantises -> the QuantizeLinear.
        weights: Name of whole numbers that it holds -> the DequantizeLinear.
    """

    def __init__(self, path: Path):
        import onnx

        self._onnx, self._model = onnx, onnx.load(path)
        nodes = self._model.graph.node
        self._held = {each.name: each for each in self._model.graph.initializer}
        self.activations = {
            n.input[0].removesuffix(_OUTPUT): n
            for n in nodes
            if n.op_type == "QuantizeLinear" and n.input[0] not in self._held
        }
        self.weights = {n.input[0]: n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in self._held}
        self._dequantised = {n.output[0]: n for n in nodes if n.op_type == "DequantizeLinear"}

    def array(self, name: str) -> np.ndarray:
        return self._onnx.numpy_helper.to_array(self._held[name])

    def put(self, name: str, values: Tensor) -> None:
        """Replace the values of a tensor; its shape and type stay."""
        old = self.array(name)
        new = np.ascontiguousarray(values.detach().numpy().astype(old.dtype).reshape(old.shape))
        self._held[name].CopyFrom(self._onnx.numpy_helper.from_array(new, name))

    def rounding(self, activation: str) -> RoundedActivation:
        """What rounds an activation as the file does."""
        step, zero = (self.array(name) for name in self.activations[activation].input[1:])
        ends = np.iinfo(zero.dtype)
        return RoundedActivation(float(step), int(zero), int(ends.min), int(ends.max))

    def unrounded_uses(self, activation: str) -> set[str]:
        """Outputs of the nodes that read an activation as it was before it is quantised."""
        nodes = (n for n in self._model.graph.node if n.op_type != "QuantizeLinear" and activation in n.input)
        return {output for node in nodes for output in node.output}

    def unquantised(self, network: nn.Module) -> list[str]:
        """The parameters of a network that the file holds as they are."""
        return [n for n, p in network.named_parameters() if n in self._held and self.array(n).shape == tuple(p.shape)]

    def bias(self, weight: str) -> tuple[str, str, str] | None:
        """The names of whole numbers and steps of the bias, and of the input's steps, of the layer of a weight; None
        where it has no quantised bias, or several layers share the weight."""
        made = self.weights[weight].output[0]
        users = [n for n in self._model.graph.node if made in n.input]
        if len(users) != 1 or len(users[0].input) < 3 or users[0].op_type not in ("Conv", "Gemm"):
            return None
        source, _, bias = (self._dequantised.get(name) for name in users[0].input)
        if source is None or bias is None or bias.input[0] not in self._held:
            return None
        return bias.input[0], bias.input[1], source.input[1]

    def bias_of(self, bias: _Bias) -> Tensor:
        """The values of a bias as the file has them."""
        return torch.from_numpy(self.array(bias.values) * self.array(bias.steps)).float()

    def write_to(self, path: Path) -> None:
        write_by(path, lambda to: self._onnx.save(self._model, to), self._model.ByteSize())


class _Finder(Interpreter):
    """Runs a program, and finds the nodes that give certain tensors: the first of equal ones."""

    def __init__(self, graph: GraphModule, wanted: Sequence[Tensor]):
        super().__init__(graph)
        self.wanted = wanted
        self.found: dict[int, str] = {}

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        for i, tensor in enumerate(self.wanted):
            number = isinstance(made, Tensor) and made.is_floating_point() and made.shape == tensor.shape
            if number and i not in self.found and (made - tensor).abs().max() <= _SAME * tensor.abs().max():
                self.found[i] = n.name
        return made


@torch.no_grad()
def _find_features(graph: GraphModule, model: nn.Module, call: Example, seam: Seam) -> list[str]:
    """The names of the nodes that give the features."""
    inner = model.model if isinstance(model, ReadableOutputs) else model
    with evaluating(inner), capturing(inner, seam) as capture:
        features = capture.features(*call[0], **call[1])
    axes = seam.batch_axes or (0,) * len(features)
    finder = _Finder(graph, [f.movedim(0, axis) for f, axis in zip(features, axes, strict=True)])
    finder.run(*tree_leaves(call), enable_io_processing=False)
    missing = [str(point) for i, point in enumerate(seam.points) if i not in finder.found]
    if missing:
        raise UnsupportedModel(
            f"reading the traced {model_name(model)}: found no tensor with the features at {', '.join(missing)}; "
            "expected each seam point to be one tensor of the trace"
        )
    return [finder.found[i] for i in range(len(features))]


@torch.no_grad()
def _fold_norms(module: Any) -> tuple[dict[str, Node], dict[str, tuple[Tensor, Tensor]]]:
    """Fold each batch norm into the convolution before it, as quantisation does.

    Returns:
        The name of what a folded norm gave -> the convolution that now gives it; the name of a folded weight -> the
        weight as it was, and the factor of its channels.
    """
    graph, moved, folded = module.graph, dict[str, Node](), dict[str, tuple[Tensor, Tensor]]()
    for norm in list(graph.nodes):
        layer = _layer_of(norm)
        if layer is None:
            continue
        weight, bias = _tensor(module, layer.args[1]), _tensor(module, (*layer.args, None)[2])
        scale, shift, mean, variance = (_tensor(module, node) for node in norm.args[1:5])
        factor = (variance + norm.args[_NORMS[operator(norm)]]).rsqrt() * (1 if scale is None else scale)
        name, along = str(layer.args[1].target), factor.reshape(-1, *[1] * (weight.dim() - 1))
        folded[name] = weight, along
        _put(module, name, weight * along)
        _put(module, name + _FOLDED, ((0 if bias is None else bias) - mean) * factor + (0 if shift is None else shift))
        with graph.inserting_before(layer):
            made = graph.get_attr(name + _FOLDED)
        layer.args = (*layer.args[:2], made, *layer.args[3:])
        results = [user for user in norm.users if operator(user) == "getitem"]
        for node in results or [norm]:
            moved[node.name] = layer
            node.replace_all_uses_with(layer)
        for node in [*results, norm]:
            graph.erase_node(node)
    return moved, folded


def _layer_of(norm: Any) -> Any:
    """The convolution into which a node can be folded: it is a batch norm and alone reads what the layer gives."""
    if norm.op != "call_function" or operator(norm) not in _NORMS:
        return None
    layer = norm.args[0]
    if layer.op != "call_function" or operator(layer) not in _CONVOLUTIONS or len(layer.users) > 1 or layer.kwargs:
        return None
    weight, transposed = layer.args[1], operator(layer) == "convolution" and layer.args[6]
    return None if transposed or weight.op != "get_attr" or len(weight.users) > 1 else layer


def _tensor(module: Any, node: Any) -> Any:
    """The tensor of a get_attr node; None for None."""
    if node is None:
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _put(module: Any, name: str, values: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, nn.Parameter(values.detach().clone()))


@torch.no_grad()
def _round_weights(
    module: Any, file: _File, folded: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[list[_Weight], list[str]]:
    """Let the network round its weights as the file does: those whose values the file has, up to half a step; then
    those of which it has a multiple by channel, as quantisation folds into a layer what multiplies by a constant.

    folded: as `_fold_norms` returns it; such a weight is again as it was, and its rounding has the factor.

    Returns:
        The weights, and the names of those of the file that were not found.
    """
    graph, found = module.graph, []
    uses: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            uses.setdefault(str(node.target), []).append(node)
    free = {name: p.detach() for name, p in module.named_parameters() if name in uses}
    unfound = list[tuple[str, Tensor, Tensor, int | None]]()

    def add(values: str, name: str, transposed: bool, rounding: RoundedWeight, bias: _Bias | None) -> None:
        found.append(_Weight(name, values, file.weights[values].input[1], rounding, transposed, bias))
        module.add_module(f"weight_rounding_{len(found)}", rounding)
        for use in uses[name]:
            _insert(graph, use, f"weight_rounding_{len(found)}")
        del free[name]

    for values, node in file.weights.items():
        whole = torch.from_numpy(file.array(values).astype(np.float32))
        steps = torch.from_numpy(file.array(node.input[1]).copy())
        if file.array(values).dtype != np.int8 or (len(node.input) > 2 and file.array(node.input[2]).any()):
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % whole.dim() if steps.dim() else None
        along = [-1 if i == axis else 1 for i in range(whole.dim())]
        if not whole.any():  # nothing to find it by, and nothing to learn that a channel could show
            continue
        name, transposed = _parameter_like(whole * steps.reshape(along), steps.reshape(along), free)
        if name is None:
            unfound.append((values, whole, steps, axis))
            continue
        unfolded, factor = folded.get(name, (None, None))
        of_weight = 1 - axis if transposed and axis is not None else axis
        rounding = _rounding_of(whole, steps, of_weight, free[name], factor)
        if unfolded is not None:
            _put(module, name, unfolded)
        add(values, name, transposed, rounding, _bias_of(uses[name], file.bias(values)))
    missing = []
    for values, whole, steps, axis in unfound:
        once = {name: p for name, p in free.items() if len(uses[name]) == 1 == len(uses[name][0].users)}
        name, factor = _parameter_by_channel(whole, steps, axis, once)
        if name is None:
            missing.append(values)
            continue
        names = file.bias(values)
        rounding = _rounding_of(whole, steps, axis, free[name] * factor, factor, multiplies_later=True)
        add(values, name, False, rounding, None if names is None else _Bias(None, *names))
    return found, missing


def _rounding_of(
    whole: Tensor, steps: Tensor, axis: int | None, scaled: Tensor, factor: Tensor | None, **options: bool
) -> RoundedWeight:
    """What rounds a weight as the file has it: these whole numbers and steps for these scaled values. The file's steps
    stay where they are larger than the values ask for."""
    rounding = RoundedWeight(axis, int(whole.abs().max()), torch.zeros_like(steps), factor, **options)
    rounding.least = torch.where(steps > _SAME_STEP * rounding.step(scaled), steps, 0.0)
    return rounding


def _parameter_by_channel(
    whole: Tensor, steps: Tensor, axis: int | None, free: Mapping[str, Tensor]
) -> tuple[str | None, Tensor]:
    """The one parameter of which these values are a multiple by channel, within half a step, and by what factors.

    axis: that of the steps; channels of outputs are on axis 0 of a weight, of one that is transposed on axis 1.
    """
    size = steps.reshape([-1 if i == axis else 1 for i in range(whole.dim())])
    wanted, half, found = whole * size, _HALF * size, dict[str, Tensor]()
    for name, have in free.items():
        for channel in range(min(2, whole.dim())) if have.shape == whole.shape else ():
            others = [i for i in range(whole.dim()) if i != channel]
            ends = (wanted - half) / have, (wanted + half) / have  # between which each value's factor is
            least = torch.minimum(*ends).nan_to_num(-math.inf).amax(others, keepdim=True)
            most = torch.maximum(*ends).nan_to_num(math.inf).amin(others, keepdim=True)
            several = have.count_nonzero() >= 2 * least.numel()  # one value is a multiple of any other
            if several and bool((least <= most).all()):
                usual = (wanted * have).sum(others, keepdim=True) / have.square().sum(others, keepdim=True)
                found.setdefault(name, usual.nan_to_num(0.0).clamp(least, most))
    return next(iter(found.items())) if len(found) == 1 else (None, whole)


def _parameter_like(wanted: Tensor, steps: Tensor, free: Mapping[str, Tensor]) -> tuple[str | None, bool]:
    """The parameter that is nearest to these values, each within half a step, and whether it has them transposed."""
    found: list[tuple[float, str, bool]] = []
    for name, tensor in free.items():
        for transposed in (False, True) if tensor.dim() == 2 else (False,):
            have = tensor.T if transposed else tensor
            if have.shape == wanted.shape and bool(((have - wanted).abs() <= _HALF * steps).all()):
                found.append((float((have - wanted).square().sum()), name, transposed))
    return min(found)[1:] if found else (None, False)


def _bias_of(uses: Sequence[Node], names: tuple[str, str, str] | None) -> _Bias | None:
    """The bias of the layer that reads a weight, with its names in the file."""
    users = [user for use in uses for user in use.users]
    bias = users[0].args[2] if len(users) == 1 and len(users[0].args) > 2 else None
    if names is None or not isinstance(bias, Node) or bias.op != "get_attr" or operator(users[0]) not in _LAYERS:
        return None
    return _Bias(str(bias.target), *names)


def _round_activations(module: Any, file: _File, values: dict[str, Node]) -> tuple[str, ...]:
    """Let the network round its activations as the file does; what is rounded takes its place in `values`. Return the
    names of activations that are not in the network."""
    left = tuple(name for name in file.activations if name not in values)
    for number, name in enumerate(name for name in file.activations if name in values):
        target = f"activation_rounding_{number}"
        module.add_module(target, file.rounding(name))
        values[name] = _insert(module.graph, values[name], target, file.unrounded_uses(name))
    return left


def _insert(graph: Any, node: Node, target: str, but: Collection[str] = ()) -> Node:
    """Let the users of a node read what a module makes of it, but for those of these names."""
    with graph.inserting_after(node):
        made = graph.call_module(target, (node,))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made and user.name not in but)
    return made


def _return_features(module: Any, features: list[Node]) -> None:
    """Let the network return the features alone, and take one flat list of arguments."""
    graph = module.graph
    graph.set_codegen(CodeGen())
    next(iter(reversed(graph.nodes))).args = (tuple(features),)
    graph.eliminate_dead_code()
    module.recompile()
