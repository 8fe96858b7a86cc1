"""The torch calls of a forward pass, the numbers that the code gives them, and the attributes that hold them.

Every call of one pass is intercepted. Before it, each whole number that a module holds is replaced by one that
remembers its place, through arithmetic too. Names and counts of calls agree with those that `surgery.stand_ins` uses
when a cut network runs, and tags with what torch.export writes on its operators.
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
    """Where a module holds a whole number.

    Attributes:
        module: name of the module.
        attribute: name of its attribute.
        index: position in the attribute, if that is a list or a tuple.
        value: the number.
    """

    module: str
    attribute: str
    index: int | None
    value: int


@dataclass(frozen=True)
class TorchCall:
    """One call of a torch function in a forward pass.

    Attributes:
        module: the module whose code calls it; "" for the network itself.
        function: name of the function.
        index: which call of that name it is in this pass of the module and all that the module calls, from 0.
        numbers: all numbers that it is given, in order.
        places: for each number, where modules hold it.
        shapes: shapes of the tensors that it returns.
        tag: what torch.export writes on the operators that it becomes.
    """

    module: str
    function: str
    index: int
    numbers: tuple[Number, ...]
    places: tuple[frozenset[Place], ...]
    shapes: tuple[tuple[int, ...], ...]
    tag: tuple[str, str]

    def find(self, row: Sequence[Any], position: int) -> list[int]:
        """Where among the call's numbers one of a row may stand.

        Args:
            row: numbers that the operator was given one after the other.
            position: which number of the row is meant.

        Returns:
            Every possible position in `numbers`.
        """
        starts = range(len(self.numbers) - len(row) + 1)
        return [s + position for s in starts if self.numbers[s : s + len(row)] == tuple(row)]


_READING = "__get__"  # of shape, dtype and the like: these calls are given no numbers


class _Intercepting(TorchFunctionMode):
    """Counts the torch calls of every module that is running, and hands each call to a function."""

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
def intercepting_calls(model: nn.Module, at: Callable[[TorchCall, Any, tuple, dict], Any]) -> Iterator[None]:
    """Let a function stand in for every torch call in the passes of a network, with hooks that are removed on leaving.

    Args:
        model: the network that runs inside the `with` block.
        at: called as `at(call, func, args, kwargs)`, where `call` has no numbers and no shapes yet; returns what the
            torch function would.
    """
    mode, handles = _Intercepting(at), []
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
    """The shapes of all tensors in a value, in order.

    >>> shapes_of((torch.ones(2, 3), [torch.ones(1)]))
    ((2, 3), (1,))
    """
    return tuple(tuple(v.shape) for v in tree_leaves(result) if isinstance(v, torch.Tensor))


class _PlacedInt(int):
    """A whole number that knows where modules hold it, or the numbers that it was computed from."""

    places: frozenset[Place]

    def __new__(cls, value: int, places: frozenset[Place]) -> "_PlacedInt":
        placed = super().__new__(cls, value)
        placed.places = places
        return placed

    def __reduce__(self) -> Any:  # copies are plain numbers
        return int, (int(self),)


def _keeping_places(name: str) -> Any:
    plain = getattr(int, name)

    def operation(self: _PlacedInt, *others: Any) -> Any:
        result = plain(self, *others)
        if type(result) is not int:  # a float, or NotImplemented
            return result
        return _PlacedInt(result, self.places.union(*(o.places for o in others if isinstance(o, _PlacedInt))))

    return operation


for _operation in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "pow"):
    setattr(_PlacedInt, f"__{_operation}__", _keeping_places(f"__{_operation}__"))


@dataclass(frozen=True)
class RecordedPass:
    """The torch calls of one pass of a network.

    Attributes:
        model: a copy that has not run; it has no data where its code runs without.
        args: what it is called with.
        kwargs: the same, by name.
        calls: the calls, in order.
    """

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

    def call_of(self, node: Node) -> TorchCall | None:
        """The call that became `node` of the traced graph; None where that is not known."""
        return self._by_tag.get(node.meta.get("torch_fn"))


def record_pass(traced: Traced) -> RecordedPass:
    """Record the torch calls of one pass of the traced network, which is not changed."""

    def run(model: nn.Module, args: tuple, kwargs: dict) -> RecordedPass:
        return RecordedPass(full_copy(model), args, kwargs, record_calls(model, args, kwargs))

    return run_for_shapes(traced.model, traced.example, run)


def record_calls(model: nn.Module, args: tuple, kwargs: dict) -> list[TorchCall]:
    """Record the torch calls of one pass.

    Args:
        model: a copy, as the whole numbers that its modules hold are replaced.
        args: what it is called with.
        kwargs: the same, by name.

    Returns:
        The calls, in order.
    """
    calls: list[TorchCall] = []

    def record(call: TorchCall, func: Any, args: tuple, kwargs: dict) -> Any:
        given = numbers_in((args, kwargs))
        result = func(*args, **kwargs)
        places = tuple(getattr(n, "places", frozenset()) for n in given)
        plain = tuple(int(n) if isinstance(n, int) else n for n in given)
        calls.append(TorchCall(call.module, call.function, call.index, plain, places, shapes_of(result), call.tag))
        return result

    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            vars(module)[key] = _with_places(value, name, key)
    with torch.no_grad(), intercepting_calls(model, record):
        model.eval()(*args, **kwargs)
    return calls


def _with_places(value: Any, module: str, attribute: str) -> Any:
    if type(value) is int:
        return _PlacedInt(value, frozenset([Place(module, attribute, None, value)]))
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(
            _PlacedInt(v, frozenset([Place(module, attribute, index, v)])) for index, v in enumerate(value)
        )
    return value
