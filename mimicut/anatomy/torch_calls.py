"""The torch calls of a forward pass, the numbers that the code gives them, and where modules hold these.

A pass listens to every call, with every whole number that a module holds replaced by one that remembers its place, also
through arithmetic. Names, counts and tags agree with what `modules` counts when a network runs and what torch.export
writes on its operators.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mimicut.anatomy.tracing import Traced, run_for_shapes
from mimicut.base.guard import full_copy
from mimicut.surgery.stand_ins import Number, function_name, numbers_in


@dataclass(frozen=True)
class Place:
    """A whole number that a module holds: its attribute, and its position there if that is a list or a tuple."""

    module: str
    attribute: str
    index: int | None
    value: int


@dataclass(frozen=True)
class TorchCall:
    """One call of a torch function in a forward pass.

    module: the one whose code calls it ("": the network). function, index: its name, and which call of that name it is
    in this pass of the module and all that the module calls, from 0. numbers: all that it is given, in order; places:
    of each, where modules hold it. shapes: of the tensors that it returns. tag: what torch.export writes on what comes
    of it.
    """

    module: str
    function: str
    index: int
    numbers: tuple[Number, ...]
    places: tuple[frozenset[Place], ...]
    shapes: tuple[tuple[int, ...], ...]
    tag: tuple[str, str]

    def find(self, row: Sequence[Any], position: int) -> list[int]:
        """Where among its numbers the one at `position` of `row` may stand, when the row was given as it is."""
        starts = range(len(self.numbers) - len(row) + 1)
        return [s + position for s in starts if self.numbers[s : s + len(row)] == tuple(row)]


_READING = "__get__"  # of shape, dtype and the like: these calls are given no numbers


class _Listening(TorchFunctionMode):
    def __init__(self, at: Callable[..., Any]):
        self._at, self.frames, self._total = at, [], Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function_name(func), kwargs or {}
        if name == _READING or not self.frames:
            return func(*args, **kwargs)
        self._total[func] += 1
        module, counts = self.frames[-1]
        index = counts[name]
        for _, each in self.frames:
            each[name] += 1
        tag = (f"{name}_{self._total[func]}", f"{type(func).__name__}.{name}")
        return self._at(TorchCall(module, name, index, (), (), (), tag), func, args, kwargs)


@contextmanager
def listening(model: nn.Module, at: Callable[[TorchCall, Any, tuple, dict], Any]) -> Iterator[None]:
    """`at(call, func, args, kwargs)` stands in for every torch call in a pass of `model`; `call` has no numbers and
    no shapes yet. All hooks are gone on leaving."""
    mode, handles = _Listening(at), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: mode.frames.append((name, Counter()))))
        handles.append(module.register_forward_hook(lambda *_: _left(mode.frames), always_call=True))
    try:
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would name this file for what the network's code does
            yield
    finally:
        for handle in handles:
            handle.remove()


def _left(frames: list[Any]) -> None:
    frames.pop()


def shapes_of(result: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(v.shape) for v in tree_leaves(result) if isinstance(v, torch.Tensor))


class _Held(int):
    """A whole number that knows its places."""

    places: frozenset[Place]

    def __new__(cls, value: int, places: frozenset[Place]) -> "_Held":
        held = super().__new__(cls, value)
        held.places = places
        return held

    def __reduce__(self) -> Any:  # a copy is a plain number
        return int, (int(self),)


def _remembering(name: str) -> Any:
    plain = getattr(int, name)

    def operation(self: _Held, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is not int:  # a float, or NotImplemented
            return result
        return _Held(result, self.places.union(*(o.places for o in others if isinstance(o, _Held))))

    return operation


for _operation in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "pow"):
    setattr(_Held, f"__{_operation}__", _remembering(f"__{_operation}__"))


@dataclass(frozen=True)
class Heard:
    """The torch calls of one pass of `model`, a copy without data where its code runs without, which has not run."""

    model: nn.Module
    args: tuple
    kwargs: dict
    calls: list[TorchCall]

    @cached_property
    def _by_tag(self) -> dict[tuple[str, str], TorchCall | None]:
        found: dict[tuple[str, str], TorchCall | None] = {}
        for call in self.calls:  # functions that share a name and a kind are counted apart by torch.export
            found[call.tag] = None if call.tag in found else call
        return found

    def of(self, node: Node) -> TorchCall | None:
        """The call that `node` of the traced graph comes of; None where that is not known."""
        return self._by_tag.get(node.meta.get("torch_fn"))


def hear(traced: Traced) -> Heard:
    """Listen to one pass of the traced network, which is not changed."""

    def run(model: nn.Module, args: tuple, kwargs: dict) -> Heard:
        return Heard(full_copy(model), args, kwargs, torch_calls(model, args, kwargs))

    return run_for_shapes(traced.model, traced.example, run)


def torch_calls(model: nn.Module, args: tuple, kwargs: dict) -> list[TorchCall]:
    """The torch calls of one pass, in order. The whole numbers that `model` holds are replaced: hand in a copy."""
    calls: list[TorchCall] = []

    def note(call: TorchCall, func: Any, args: tuple, kwargs: dict) -> Any:
        given = numbers_in((args, kwargs))
        result = func(*args, **kwargs)
        places = tuple(getattr(n, "places", frozenset()) for n in given)
        plain = tuple(int(n) if isinstance(n, int) else n for n in given)
        calls.append(TorchCall(call.module, call.function, call.index, plain, places, shapes_of(result), call.tag))
        return result

    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            vars(module)[key] = _holding(value, name, key)
    with torch.no_grad(), listening(model, note):
        model.eval()(*args, **kwargs)
    return calls


def _holding(value: Any, module: str, attribute: str) -> Any:
    if type(value) is int:
        return _Held(value, frozenset([Place(module, attribute, None, value)]))
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(_Held(v, frozenset([Place(module, attribute, index, v)])) for index, v in enumerate(value))
    return value
