"""A layer followed by its own batch norm, computed as one layer: no pass over the activations for the norm at all.

In eval mode a batch norm is y = (x - m) g / s + b with s = sqrt(v + eps), so that conv(x, W) followed by it is the
convolution with the weight W g / s (by output) and the bias (c - m) g / s + b, where c is the layer's own bias. W, c, g
and b stay the parameters that learn: gradients go through these products. Exact up to rounding, and nothing of the
activations between layer and norm is kept for gradients.

Which layers and norms belong together is observed in one pass: the norm is given the very tensor that the layer
returned, and nothing else touches that tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
# Functions that ask a tensor for its kind and read none of its values.
_METADATA = frozenset(["__get__", "size", "dim", "stride", "numel", "is_floating_point", "is_complex", "is_contiguous"])
# Features of the folded network may differ by so much of the largest. Source: assumption; rounding is 1e-6 to 1e-5.
_MOST_APART = 1e-3


@dataclass(frozen=True)
class Norm:
    """The tensors of a call of a batch norm in eval mode: m, v, g and b, (channels,) each, and eps."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


NormOfLayer = dict[int, Norm]
"""id of a layer's weight -> the norm that follows the layer."""


def find_foldable(model: nn.Module, run: Callable[[], list[Tensor]]) -> NormOfLayer:
    """Find the layers of a network that can be computed together with the norm that follows them.

    Args:
        model: The network, its norms in eval mode.
        run: A pass of it, which returns its features; called twice, without gradients.

    Returns:
        The norm of each such layer; none where folding would change the features by more than rounding.
    """
    with torch.no_grad():
        with _CallRecorder(model) as recorder:
            plain = [feat.clone() for feat in run()]
        norms = recorder.foldable()
        if not norms:
            return {}
        with folding(norms):
            found = run()
    near = (bool((a - b).abs().max() <= _MOST_APART * b.abs().max()) for a, b in zip(found, plain, strict=True))
    return norms if all(near) else {}


@contextmanager
def folding(norms: NormOfLayer) -> Iterator[None]:
    """Inside, these layers and their norms are computed as one."""
    if not norms:
        yield
        return
    with _FoldingMode(norms):
        yield


class _CallRecorder(TorchFunctionMode):
    """Notes what each layer returns, and which functions are given that."""

    def __init__(self, model: nn.Module):
        self._weights = {id(p) for p in model.parameters()}
        self._made: dict[int, tuple[int, Tensor]] = {}  # id of an output -> weight, and the output, to keep its id
        self._calls: dict[int, int] = {}  # id of a weight -> how often it is used
        self._norms: dict[int, Norm] = {}
        self._uses: dict[int, int] = {}  # id of a running mean -> how often it is used
        self._used_otherwise: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        norm = _norm_of(args, kwargs) if name == "batch_norm" else None
        if name not in _METADATA:
            for tensor in given:
                weight = self._made.get(id(tensor), (None,))[0]
                if weight is None:
                    continue
                if norm is not None and tensor is _argument(args, kwargs, 0, "input") and weight not in self._norms:
                    self._norms[weight] = norm
                else:
                    self._used_otherwise.add(weight)
            if norm is not None:
                self._uses[id(norm.mean)] = self._uses.get(id(norm.mean), 0) + 1
            for tensor in given:  # a weight that something else reads too
                if id(tensor) in self._weights:
                    self._calls[id(tensor)] = self._calls.get(id(tensor), 0) + 1
        result = func(*args, **kwargs)
        if name in LAYERS and isinstance(result, Tensor) and (name != "linear" or result.ndim == 2):
            weight = _argument(args, kwargs, 1, "weight")
            if id(weight) in self._weights:
                self._made[id(result)] = id(weight), result
        return result

    def foldable(self) -> NormOfLayer:
        return {
            weight: norm
            for weight, norm in self._norms.items()
            if weight not in self._used_otherwise and self._calls[weight] == 1 and self._uses[id(norm.mean)] == 1
        }


class _FoldingMode(TorchFunctionMode):
    """Computes each layer with its norm's scale and shift, and passes that by the norm itself."""

    def __init__(self, norms: NormOfLayer):
        self._norms = norms
        self._waiting: set[int] = set()  # ids of the running means of norms whose layer was computed with them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in LAYERS:
            weight = _argument(args, kwargs, 1, "weight")
            norm = self._norms.get(id(weight))
            if norm is not None:
                self._waiting.add(id(norm.mean))
                bias = _argument(args, kwargs, 2, "bias")
                scale = (norm.variance + norm.epsilon).rsqrt()
                scale = scale if norm.weight is None else scale * norm.weight
                shift = -norm.mean * scale if bias is None else (bias - norm.mean) * scale
                shift = shift if norm.bias is None else shift + norm.bias
                scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1))
                rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
                return func(_argument(args, kwargs, 0, "input"), scaled, shift, *args[3:], **rest)
        elif name == "batch_norm" and self._waiting:
            mean = _argument(args, kwargs, 1, "running_mean")
            if id(mean) in self._waiting:
                self._waiting.remove(id(mean))
                return _argument(args, kwargs, 0, "input")
        return func(*args, **kwargs)


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _norm_of(args: tuple, kwargs: dict[str, Any]) -> Norm | None:
    """The norm in a call of torch.nn.functional.batch_norm that uses the running statistics; None for batch ones."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    mean, variance = given.get("running_mean"), given.get("running_var")
    if given.get("training") or mean is None or variance is None:
        return None
    return Norm(mean, variance, given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
