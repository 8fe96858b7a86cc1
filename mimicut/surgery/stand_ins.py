"""Stand-ins for modules whose code takes for granted that nothing was cut from them."""

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Number = int | float
# (function, which call of it) -> place among its numbers -> (what the code gives there, what is right)
Told = dict[tuple[str, int], dict[int, tuple[Number, Number]]]


class MultiheadAttention(nn.MultiheadAttention):
    """torch's, but its heads need not fill its width: there are `num_heads` of them, of `head_dim` channels each."""

    # torch's fused paths, which read every size off embed_dim, are taken only where this is true.
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        one = query.dim() == 2
        given = [t.unsqueeze(0) if one else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        same = query is key is value
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in self._projected(given, same)
        )
        mask = _mask(attn_mask, q)
        if mask is not None and mask.dim() == 3:  # one for each image and head
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _mask(key_padding_mask.unsqueeze(0) if one else key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout, scale, weights = self.dropout if self.training else 0.0, self.head_dim**-0.5, None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            found = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if one else weights
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        found = self.out_proj(found.transpose(1, 2).flatten(2))
        return found[0] if one else found if self.batch_first else found.transpose(0, 1), weights

    def _projected(self, given: list[Tensor], same: bool) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if same:
            return F.linear(given[0], weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip(given, weight.chunk(3), biases, strict=True))


def _mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores: a boolean mask is true where attention is not allowed."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def stands_in(module: nn.Module) -> bool:
    """Whether `module` is torch's own and there is a stand-in that computes the same."""
    plain = type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim
    return plain and module.bias_k is None and not module.add_zero_attn


def replace_own(model: nn.Module) -> None:
    """Make stand-ins of torch's own modules in `model`, in place."""
    for module in model.modules():
        if stands_in(module):
            module.__class__ = MultiheadAttention


# --- what stands where something was left out -------------------------------------------------------------------------

THROUGH, ZERO = "through", "zero"


class Through(nn.Identity):
    """Hands on the first tensor that it is given. count: as the first of a tuple of so many, of which the others are
    None; 0 for the tensor itself."""

    def __init__(self, count: int = 0):
        super().__init__()
        self.count = count

    def forward(self, *given: Any, **named: Any) -> Any:
        x = next(v for v in (*given, *named.values()) if isinstance(v, Tensor))
        return (x, *[None] * (self.count - 1)) if self.count else x


class Zero(Through):
    """As Through, but zeros."""

    def forward(self, *given: Any, **named: Any) -> Any:
        found = super().forward(*given, **named)
        return (torch.zeros_like(found[0]), *found[1:]) if self.count else torch.zeros_like(found)


def stand_in(how: str, module: nn.Module | None = None) -> nn.Module:
    """What stands where `module` was left out: "through" or "zero", and ":" and a count for what returns a tuple.

    It has the module's plain attributes, and None for its parameters, as the code around it may look at them.
    Raises: ValueError.
    """
    kind, _, count = how.partition(":")
    found = {THROUGH: Through, ZERO: Zero}.get(kind)
    if found is None or (count and not count.isdecimal()):
        raise ValueError(f"found {how!r}, expected {THROUGH} or {ZERO}")
    stand = found(int(count or 0))
    for name, value in ({} if module is None else vars(module)).items():
        if name not in vars(stand) and isinstance(value, (bool, int, float, str, type(None))):
            setattr(stand, name, value)
    for name in [] if module is None else module._parameters:
        stand.register_parameter(name, None)
    return stand


# --- telling a module the right numbers -------------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with every int and float (no bool) in its tuples, lists, dicts and slices changed, in order."""
    if isinstance(value, np.integer):
        return change(int(value))
    if isinstance(value, (int, float, torch.SymInt)) and not isinstance(value, bool):
        return change(value)
    if isinstance(value, slice):
        return slice(*mapped((value.start, value.stop, value.step), change))
    if isinstance(value, (list, tuple)):
        held = [mapped(v, change) for v in value]
        return type(value)(*held) if hasattr(value, "_make") else tuple(held) if isinstance(value, tuple) else held
    if isinstance(value, dict):
        return {key: mapped(held, change) for key, held in value.items()}
    return value


def numbers_in(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(value, found.append)
    return found


def name_of(func: Any) -> str:
    return getattr(func, "__name__", str(func))


class _Telling(TorchFunctionMode):
    """While it is on, torch functions are given the right numbers."""

    def __init__(self, told: Told):
        self._told, self._functions = told, {f for f, _ in told}
        self._seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        if name in self._functions:
            right = self._told.get((name, self._seen[name]))
            self._seen[name] += 1
            if right is not None:
                count = len(numbers_in((args, kwargs)))
                if max(right) >= count:  # another call, or one of torch.jit.trace, where sizes are tensors
                    raise RuntimeError(
                        f"running a cut network: its code gives {name} {count} numbers, the plan has one for number "
                        f"{max(right) + 1}; {_OTHER}"
                    )
                places = iter(range(count))
                args, kwargs = mapped((args, kwargs), lambda n: _right(n, right.get(next(places)), name))
        return func(*args, **(kwargs or {}))


_OTHER = (
    "the code is not that of the network that the plan was made for, or does something else in training, at this size "
    "or number of images, or while it is traced with torch.jit or torch.fx"
)


def _right(given: Any, known: tuple[Number, Number] | None, function: str) -> Any:
    """What the code gives may count images or positions too: then it is not the number of the plan, but a multiple."""
    if known is None:
        return given
    wrong, right = known
    if isinstance(given, torch.SymInt):
        return given * right // wrong
    if given == wrong:
        return right
    whole = all(isinstance(n, int) for n in (given, wrong, right))
    if not whole or not wrong or given * right % wrong:  # a float may depend on other sizes in any way
        raise RuntimeError(
            f"running a cut network: its code gives {function} the number {given}, expected {wrong} (in whose place "
            f"the plan has {right}){' or a multiple' if whole else ''}; {_OTHER}"
        )
    return given * right // wrong


def can_tell(module: nn.Module) -> bool:
    """Whether the code of `module` is its class's: not set on the module itself, nor one that torch.fx wrote."""
    return "forward" not in vars(module) and not isinstance(module, torch.fx.GraphModule)


def tell(module: nn.Module, told: Told) -> None:
    """From now on the torch functions that the code of `module` calls are given the numbers in `told`, in place. It
    becomes a subclass of what it was, by the same name."""
    before = vars(module).get("_mimicut_told", ())
    if not before:
        module.__class__ = _told(type(module))
    module._mimicut_told = (*before, told)


@functools.cache
def _told(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for told in reversed(self._mimicut_told):  # what was told last hears the others' numbers
                stack.enter_context(_Telling(told))
            return base.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:  # such a class cannot be found by its name
        return _again, (base,), vars(self)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"forward": forward, "__reduce_ex__": reduce, **names})


def _again(base: type[nn.Module]) -> nn.Module:
    kind = _told(base)
    return kind.__new__(kind)
