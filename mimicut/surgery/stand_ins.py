"""Stand-ins for modules whose code takes for granted that nothing was cut from them.

Three kinds: an attention whose heads need not fill its width; what takes the place of a dropped module; and classes
that correct the numbers which a module's code gives to torch functions.
"""

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

from mimicut.base.errors import PlanError
from mimicut.surgery.sizes import CONVOLUTIONS, HOW

Number = int | float
# (function, which call of it) -> position among the call's numbers -> (number in the code, right number)
CallCorrections = dict[tuple[str, int], dict[int, tuple[Number, Number]]]


class MultiheadAttention(nn.MultiheadAttention):
    """torch's own, but its heads need not fill its width: it has `num_heads` heads of `head_dim` channels each.

    Axes in `forward`: B images, H heads, T query positions, S key positions, D channels of a head. It computes
    softmax(q k^T / sqrt(D) + mask) v for q (B, H, T, D) and k, v (B, H, S, D).
    """

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
        """Arguments and results are those of `nn.MultiheadAttention.forward`."""
        one = query.dim() == 2
        given = [t.unsqueeze(0) if one else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        same = query is key is value
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in self._projected(given, same)
        )
        mask = self._added_to_scores(attn_mask, key_padding_mask, q, one)
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

    def _added_to_scores(
        self, attention: Tensor | None, padding: Tensor | None, like: Tensor, one: bool
    ) -> Tensor | None:
        mask = None if attention is None else _as_float_mask(attention, like)
        if mask is not None and mask.dim() == 3:  # one for each image and head
            mask = mask.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return mask
        padding = _as_float_mask(padding.unsqueeze(0) if one else padding, like)[:, None, None]
        return padding if mask is None else mask + padding

    def _projected(self, given: list[Tensor], same: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values; `same`: all three are made from one tensor."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if same:
            return F.linear(given[0], weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip(given, weight.chunk(3), biases, strict=True))


def _as_float_mask(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores: a boolean mask is true where attention is not allowed."""
    if mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def has_stand_in(module: nn.Module) -> bool:
    """Whether `module` is torch's own attention, of a kind for which a stand-in computes the same."""
    plain = type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim
    return plain and module.bias_k is None and not module.add_zero_attn


def replace_multihead_attention(model: nn.Module) -> None:
    """Turn torch's own attentions in `model` into stand-ins that compute the same, in place.

    Args:
        model: its modules change class; their tensors stay as they are.
    """
    for module in model.modules():
        if has_stand_in(module):
            module.__class__ = MultiheadAttention


# --- what takes the place of a dropped module -------------------------------------------------------------------------

THROUGH, ZERO = "through", "zero"


class PassThrough(nn.Identity):
    """Returns the first tensor that it is given.

    Args:
        count: length of the tuple that it returns: the tensor, then None; 0 for the tensor itself.
    """

    def __init__(self, count: int = 0):
        super().__init__()
        self.count = count

    def forward(self, *given: Any, **named: Any) -> Any:
        x = next(v for v in (*given, *named.values()) if isinstance(v, Tensor))
        return (x, *[None] * (self.count - 1)) if self.count else x


class Zeros(PassThrough):
    """Returns zeros in the shape of the first tensor that it is given."""

    def forward(self, *given: Any, **named: Any) -> Any:
        found = super().forward(*given, **named)
        return (torch.zeros_like(found[0]), *found[1:]) if self.count else torch.zeros_like(found)


def stand_in(how: str, module: nn.Module | None = None) -> nn.Module:
    """The module that takes the place of a dropped one.

    It has the dropped module's plain attributes, and None for its parameters, as the code around it may look at them.

    Args:
        how: "through" or "zero"; followed by ":" and a length where the module returns a tuple.
        module: the dropped module.

    Returns:
        A module without parameters.

    Raises:
        PlanError: `how` is not of this form, or its length is 100 or more.

    >>> stand_in("zero")(torch.ones(2))
    tensor([0., 0.])
    >>> stand_in("through:2")(torch.ones(1))
    (tensor([1.]), None)
    """
    kind, _, count = how.partition(":")
    if HOW.fullmatch(how) is None:
        raise PlanError(
            f"dropping a module: found {how!r}, expected {THROUGH}, {ZERO}, or one of them with :N up to 99"
        )
    stand = {THROUGH: PassThrough, ZERO: Zeros}[kind](int(count or 0))
    for name, value in ({} if module is None else vars(module)).items():
        if name not in vars(stand) and isinstance(value, (bool, int, float, str, type(None))):
            setattr(stand, name, value)
    for name in [] if module is None else module._parameters:
        stand.register_parameter(name, None)
    return stand


# --- correcting the numbers that code gives to torch functions --------------------------------------------------------


def map_numbers(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every number inside a value, in order.

    Args:
        value: tuples, lists, dicts and slices are searched; booleans are no numbers.
        change: takes an int, a float or a `torch.SymInt` and returns what stands in its place.

    Returns:
        A value of the same structure.

    >>> map_numbers((2, [True, slice(None, 3)]), lambda n: n + 1)
    (3, [True, slice(None, 4, None)])
    """
    if isinstance(value, np.integer):
        return change(int(value))
    if isinstance(value, (int, float, torch.SymInt)) and not isinstance(value, bool):
        return change(value)
    if isinstance(value, slice):
        return slice(*map_numbers((value.start, value.stop, value.step), change))
    if isinstance(value, (list, tuple)):
        held = [map_numbers(v, change) for v in value]
        return type(value)(*held) if hasattr(value, "_make") else tuple(held) if isinstance(value, tuple) else held
    if isinstance(value, dict):
        return {key: map_numbers(held, change) for key, held in value.items()}
    return value


def numbers_in(value: Any) -> list[Any]:
    """Every number inside a value, in order.

    >>> numbers_in((2, {"dim": 1}))
    [2, 1]
    """
    found: list[Any] = []
    map_numbers(value, found.append)
    return found


def function_name(func: Any) -> str:
    """The name by which corrections know a torch function."""
    return getattr(func, "__name__", str(func))


class _Correcting(TorchFunctionMode):
    """While it is on, torch functions are given the right numbers."""

    def __init__(self, corrections: CallCorrections):
        self._corrections = corrections
        self._functions = {function for function, _ in corrections}
        self._calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function_name(func)
        if name in self._functions:
            right = self._corrections.get((name, self._calls[name]))
            self._calls[name] += 1
            if right is not None:
                count = len(numbers_in((args, kwargs)))
                if max(right) >= count:  # another call, or one of torch.jit.trace, where sizes are tensors
                    raise RuntimeError(
                        f"running a cut network: its code gives {name} {count} numbers, the plan has one for number "
                        f"{max(right) + 1}; {_OTHER_CODE}"
                    )
                if name in CONVOLUTIONS and set(right) - _groups_place(args, kwargs or {}):
                    raise RuntimeError(
                        f"running a cut network: its plan changes what {name} does besides its groups; expected a plan "
                        "that only counts channels: make it again"
                    )
                positions = iter(range(count))
                args, kwargs = map_numbers((args, kwargs), lambda n: _right_number(n, right.get(next(positions)), name))
        return func(*args, **(kwargs or {}))


def _groups_place(args: tuple, kwargs: dict[str, Any]) -> set[int]:
    """The position of a convolution's groups among its numbers; none where they are not given."""
    if len(args) > 6:  # the seventh, of transposed ones too
        return {len(numbers_in(args[:6]))}
    names = list(kwargs)
    if "groups" not in names:
        return set()
    before = {name: kwargs[name] for name in names[: names.index("groups")]}
    return {len(numbers_in((args, before)))}


_OTHER_CODE = (
    "the code is not that of the network that the plan was made for, or does something else in training, at this size "
    "or number of images, or while it is traced with torch.jit or torch.fx"
)


def _right_number(given: Any, correction: tuple[Number, Number] | None, function: str) -> Any:
    """The right number for the one that the code gives: where that counts images or positions too, it is a multiple of
    the plan's."""
    if correction is None:
        return given
    wrong, right = correction
    if isinstance(given, torch.SymInt):
        return given * right // wrong
    if given == wrong:
        return right
    whole = all(isinstance(n, int) for n in (given, wrong, right))
    if not whole or not wrong or given * right % wrong:  # a float may depend on other sizes in any way
        raise RuntimeError(
            f"running a cut network: its code gives {function} the number {given}, expected {wrong} (in whose place "
            f"the plan has {right}){' or a multiple' if whole else ''}; {_OTHER_CODE}"
        )
    return given * right // wrong


def can_correct_calls(module: nn.Module) -> bool:
    """Whether the code of `module` is its class's: not set on the module itself, nor written by torch.fx."""
    return "forward" not in vars(module) and not isinstance(module, torch.fx.GraphModule)


_Frozen = tuple[tuple[tuple[tuple[str, int], tuple[tuple[int, tuple[Number, Number]], ...]], ...], ...]


def correct_calls(module: nn.Module, corrections: CallCorrections) -> None:
    """From now on give the torch functions that the code of `module` calls the right numbers, in place.

    Args:
        module: it becomes an instance of a subclass of its class, by the same name. The subclass holds the corrections,
            as a module's own `__getstate__` or `__deepcopy__` would leave out what stands on the module.
        corrections: (function, which call of it) -> position among its numbers -> (number in the code, right number).
            Corrections that the module has already come first.
    """
    base, before = _uncorrected(type(module))
    frozen = tuple((call, tuple(right.items())) for call, right in corrections.items())
    module.__class__ = _correcting_class(base, (*before, frozen))  # type: ignore[arg-type]  # mypy: do classes hash?


def _uncorrected(kind: type[nn.Module]) -> tuple[type[nn.Module], _Frozen]:
    """The class as the user wrote it, and the corrections that `kind` adds to it."""
    frozen = vars(kind).get("_mimicut_corrections")
    return (kind, ()) if frozen is None else (kind.__bases__[0], frozen)


@functools.cache
def _correcting_class(base: type[nn.Module], frozen: _Frozen) -> type[nn.Module]:
    """A subclass of `base` that makes these corrections, whose copies and pickles are instances of it too."""
    latest_first: list[CallCorrections] = [{call: dict(right) for call, right in each} for each in reversed(frozen)]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for corrections in latest_first:  # the latest get the numbers of the earlier ones
                stack.enter_context(_Correcting(corrections))
            return base.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:  # such a class cannot be found by its name
        found: Any = base.__reduce_ex__(self, protocol)
        make, args, *rest = found
        return _rebuild, (frozen, make, tuple(base if a is type(self) else a for a in args)), *rest

    methods: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce, "_mimicut_corrections": frozen}
    for name in ("__copy__", "__deepcopy__"):
        if hasattr(base, name):
            methods[name] = _copying(getattr(base, name), frozen)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**methods, **names})


def _copying(copies: Callable[..., nn.Module], frozen: _Frozen) -> Callable[..., nn.Module]:
    """A `__copy__` or `__deepcopy__` that gives the copy the corrections, whichever class it is made of."""

    @functools.wraps(copies)
    def copying(self: nn.Module, *memo: Any) -> nn.Module:
        return _corrected(copies(self, *memo), frozen)

    return copying


def _corrected(made: nn.Module, frozen: _Frozen) -> nn.Module:
    if _uncorrected(type(made))[1] != frozen:
        made.__class__ = _correcting_class(_uncorrected(type(made))[0], frozen)  # type: ignore[arg-type]  # as above
    return made


def _rebuild(frozen: _Frozen, make: Callable[..., nn.Module], args: tuple) -> nn.Module:
    """An instance for pickle and copy to fill."""
    return _corrected(make(*args), frozen)
