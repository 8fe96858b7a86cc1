"""A network that was read from an ONNX file: ordinary modules, called one after the other as a list of steps says.

The list is plain data, so that a result can hold it and be loaded without the file. It names layers of torch.nn and the
functions below and nothing else: no code comes with it.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimicut.base.errors import InputError

CONSTANT = "c:"  # in front of the name of a constant among the inputs of a step
_MOST_NUMBERS = 2**34  # in one constant. Source: assumption.

_LAYERS = (
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
    "AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d CELU Conv1d Conv2d Conv3d ConvTranspose1d "
    "ConvTranspose2d ConvTranspose3d ELU Flatten GELU GroupNorm Hardsigmoid Hardswish Hardtanh InstanceNorm1d "
    "InstanceNorm2d InstanceNorm3d LayerNorm LeakyReLU Linear LocalResponseNorm LogSoftmax MaxPool1d MaxPool2d "
    "MaxPool3d Mish PReLU PixelShuffle RMSNorm ReLU ReLU6 SELU SiLU Sigmoid Softmax Softplus Softsign Tanh"
).split()


def _on_pair(function: Any) -> Callable[..., Tensor]:
    """A function of two tensors, or of one and a fixed number, which may come first."""

    def apply(*tensors: Tensor, number: float | None = None, first: bool = False) -> Tensor:
        if number is None:
            return function(*tensors)
        return function(number, tensors[0]) if first else function(tensors[0], number)

    return apply


def _expand(x: Tensor, like: Tensor | None = None, *, sizes: list[int], axis: int = 0, times: int = 1) -> Tensor:
    """Repeat axes of length 1. With `like`, `axis` gets `times` places for each image in `like`."""
    if like is None:
        return x.expand(sizes)
    return x.expand([like.shape[0] * times if i == axis else size for i, size in enumerate(sizes)])


def _slice(x: Tensor, *, axis: int, start: int, end: int | None, step: int = 1) -> Tensor:
    where = tuple([slice(None)] * axis + [slice(start, end, step)])
    return x[where]


def _gather(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    if index.dim() == 1:
        return x.index_select(axis, index)
    where: tuple[Any, ...] = (*[slice(None)] * axis, index)
    return x[where]


def _unsqueeze(x: Tensor, *, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return apply


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: _on_pair(function)
        for name, function in {
            "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
            "pow": operator.pow, "equal": operator.eq, "greater": operator.gt, "less": operator.lt,
            "greaterorequal": operator.ge, "lessorequal": operator.le, "mod": torch.remainder, "fmod": torch.fmod,
            "and": operator.and_, "or": operator.or_, "xor": operator.xor,
        }.items()
    },
    **{
        name: getattr(torch, name)
        for name in (
            "abs acos asin atan ceil cos cosh erf exp floor log neg reciprocal round sign sin sinh sqrt tan isnan "
            "isinf logical_not matmul"
        ).split()
    },
    "integer_div": _on_pair(lambda a, b: torch.div(a, b, rounding_mode="trunc")),
    "max": _variadic(torch.maximum),
    "min": _variadic(torch.minimum),
    "sum": _variadic(operator.add),
    "clamp": lambda x, *, low, high: torch.clamp(x, low, high),
    "where": torch.where,
    "to": lambda x, *, dtype: x.to(getattr(torch, dtype)),
    "reshape": lambda x, *, sizes: x.reshape(sizes),
    "expand": _expand,
    "repeat": lambda x, *, times: x.repeat(times),
    "permute": lambda x, *, order: x.permute(order),
    "squeeze": lambda x, *, axes: x.squeeze(tuple(axes)),
    "unsqueeze": _unsqueeze,
    "cat": lambda *tensors, axis: torch.cat(tensors, axis),
    "chunk": lambda x, *, pieces, axis: x.chunk(pieces, axis),
    "split": lambda x, *, sizes, axis: x.split(sizes, axis),
    "slice": _slice,
    "flip": lambda x, *, axis: x.flip(axis),
    "select": lambda x, *, axis, index: x.select(axis, index),
    "gather": _gather,
    "gather_elements": lambda x, index, *, axis: x.gather(axis, index),
    "embedding": lambda table, index: F.embedding(index, table),
    "pad": lambda x, *, amounts, mode, value: F.pad(x, amounts, mode, value if mode == "constant" else None),
    "interpolate": lambda x, **options: F.interpolate(x, **options),
    "mean": lambda x, *, axes, keep: x.mean(axes, keep),
    "reduce_sum": lambda x, *, axes, keep: x.sum(axes, keep),
    "amax": lambda x, *, axes, keep: x.amax(axes, keep),
    "amin": lambda x, *, axes, keep: x.amin(axes, keep),
    "logsumexp": lambda x, *, axes, keep: x.logsumexp(axes, keep),
    "norm": lambda x, *, axes, keep, order: torch.linalg.vector_norm(x, order, axes, keep),
    "argmax": lambda x, *, axis, keep: x.argmax(axis, keep),
    "argmin": lambda x, *, axis, keep: x.argmin(axis, keep),
    "topk": lambda x, *, count, axis, largest, ordered: x.topk(count, axis, largest, ordered),
    "cumsum": lambda x, *, axis: x.cumsum(axis),
    "einsum": lambda *tensors, equation: torch.einsum(equation, *tensors),
    "grid_sample": lambda x, grid, **options: F.grid_sample(x, grid, **options),
}  # fmt: skip


class Apply(nn.Module):
    """Calls one function of the table above; what it is given besides tensors are attributes of this module."""

    def __init__(self, function: str, **options: Any):
        super().__init__()
        self.function, self.names = function, tuple(options)
        for name, value in options.items():
            setattr(self, f"{name}_", value)

    def forward(self, *tensors: Tensor) -> Any:
        return _FUNCTIONS[self.function](*tensors, **{name: getattr(self, f"{name}_") for name in self.names})

    def extra_repr(self) -> str:
        return ", ".join([self.function, *(f"{name}={getattr(self, f'{name}_')}" for name in self.names)])


class Constant(nn.Module):
    """Holds a tensor that the network computes with: a parameter, or a buffer where training must not change it."""

    value: Tensor

    def __init__(self, shape: Sequence[int], dtype: str, trains: bool):
        super().__init__()
        made = torch.zeros(tuple(shape), dtype=getattr(torch, dtype))
        if trains:
            self.value = nn.Parameter(made)
        else:
            self.register_buffer("value", made)


def make_module(kind: str, options: Mapping[str, Any]) -> nn.Module:
    """The module of one step.

    Args:
        kind: The name of a layer of torch.nn, or of a function of `Apply`.
        options: Its keyword arguments.

    Raises:
        InputError: There is no such kind.
    """
    if kind in _LAYERS:
        return getattr(nn, kind)(**options)
    if kind not in _FUNCTIONS:
        raise InputError(f"building a network of an ONNX file: found the kind {kind!r}, expected one that it has")
    return Apply(kind, **options)


class OnnxNetwork(nn.Module):
    """A network as a list of steps.

    Args:
        program: "input", the value that the images are; "outputs", {name: value}; "constants", {name: [shape, dtype,
            whether it trains]}; and "steps", [[module, kind, options, inputs, outputs]]. Values are named by text; an
            input "c:NAME" is a constant. Two steps may name one module; the first builds it.

    Raises:
        InputError: `program` is no such list.
    """

    def __init__(self, program: Mapping[str, Any]):
        super().__init__()
        try:
            for name, (shape, dtype, trains) in program["constants"].items():
                if torch.Size(shape).numel() > _MOST_NUMBERS:
                    raise ValueError(f"the constant {name} of shape {shape} is too large")
                self._put(name, Constant(shape, dtype, trains))
            built: set[str] = set()
            self._steps: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
            for name, kind, options, inputs, outputs in program["steps"]:
                if name not in built:
                    self._put(name, make_module(kind, options))
                    built.add(name)
                self._steps.append((name, tuple(inputs), tuple(outputs)))
            self._input, self._outputs = str(program["input"]), dict(program["outputs"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"building a network of an ONNX file: its list of steps cannot be used ({type(error).__name__}: "
                f"{error}); expected one that mimicut wrote"
            ) from error
        last = {value: place for place, (_, inputs, _) in enumerate(self._steps) for value in inputs}
        kept = set(self._outputs.values())
        # For every step, the values that none after it reads.
        self._unused = [
            tuple(v for v in {*inputs, *outputs} if last.get(v, place) == place and v not in kept)
            for place, (_, inputs, outputs) in enumerate(self._steps)
        ]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of what it returns, as the file has them."""
        return tuple(self._outputs)

    def _put(self, name: str, module: nn.Module) -> None:
        """Set a module under a dotted name; the modules above it that do not exist yet hold nothing else."""
        *above, last = name.split(".")
        owner: nn.Module = self
        for part in above:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, module)

    def forward(self, x: Tensor) -> Any:
        """What the file's network returns: a tensor, or a dict of its outputs by name where there are several."""
        values: dict[str, Any] = {self._input: x}
        for (name, inputs, outputs), unused in zip(self._steps, self._unused, strict=True):
            given = [
                self.get_parameter_or_buffer(v.removeprefix(CONSTANT)) if v.startswith(CONSTANT) else values[v]
                for v in inputs
            ]
            made = self.get_submodule(name)(*given)
            values.update(zip(outputs, made if len(outputs) > 1 else (made,), strict=False))
            for value in unused:
                values.pop(value, None)
        found = {name: values[value] for name, value in self._outputs.items()}
        return found if len(found) > 1 else next(iter(found.values()))

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """The tensor of a constant."""
        constant = self.get_submodule(name)
        assert isinstance(constant, Constant)  # as the list of steps names none else
        return constant.value
