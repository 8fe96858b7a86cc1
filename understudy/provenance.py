"""Which attributes of its modules the numbers in a network's code come from.

The forward pass runs once more with every whole number that a module holds replaced by one that remembers its place,
also through arithmetic; each torch call then tells which of its sizes come from where.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from understudy.guard import evaluating
from understudy.trace import Example, run_for_shapes


@dataclass(frozen=True)
class Place:
    """A whole number that a module holds: its attribute, and its position there if that is a list or a tuple."""

    module: str
    attribute: str
    index: int | None
    value: int


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


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "pow"):
    setattr(_Held, f"__{_name}__", _remembering(f"__{_name}__"))


class Numbers:
    """The whole numbers that the torch calls of each module were given, call by call."""

    def __init__(self) -> None:
        self._calls: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        self._places: dict[tuple[str, tuple[int, ...]], list[set[Place]]] = {}

    def note(self, module: str, given: list[int]) -> None:
        call = tuple(map(int, given))
        if call:
            self._calls[module].add(call)
            found = self._places.setdefault((module, call), [set() for _ in call])
            for places, number in zip(found, given, strict=True):
                places |= getattr(number, "places", frozenset())

    def places(self, module: str, given: Sequence[int], position: int) -> list[Place]:
        """Where the number at `position` of `given`, which a torch call of this module was given in a row, comes from:
        nothing if the code has or computes it."""
        row, found = tuple(given), set()
        for call in self._calls.get(module, ()):
            for start in range(len(call) - len(row) + 1):
                if call[start : start + len(row)] == row:
                    found |= self._places[module, call][start + position]
        return sorted(found, key=lambda p: (p.module != module, p.module, p.attribute, p.index or 0))


def read_numbers(model: nn.Module, example: Example) -> Numbers:
    """The numbers of one forward pass of `model`, which is not changed."""
    return run_for_shapes(model, example, _run)


def _run(model: nn.Module, args: Any, kwargs: Any) -> Numbers:
    numbers, stack, handles = Numbers(), [""], []

    class Listen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            numbers.note(stack[-1], list(_whole((args, kwargs or {}))))
            return func(*args, **(kwargs or {}))

    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            vars(module)[key] = _holding(value, name, key)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: _drop_last(stack), always_call=True))
    try:
        with torch.no_grad(), evaluating(model), Listen():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return numbers


def _drop_last(stack: list[str]) -> None:
    stack.pop()


def _holding(value: Any, module: str, attribute: str) -> Any:
    if type(value) is int:
        return _Held(value, frozenset([Place(module, attribute, None, value)]))
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(_Held(v, frozenset([Place(module, attribute, index, v)])) for index, v in enumerate(value))
    return value


def _whole(values: Any) -> Iterator[int]:
    if isinstance(values, dict):
        values = values.values()
    if isinstance(values, slice):
        values = (values.start, values.stop)
    if isinstance(values, int) and not isinstance(values, bool):
        yield values
    elif isinstance(values, (list, tuple)) or (
        not isinstance(values, (str, torch.Tensor)) and hasattr(values, "__iter__")
    ):
        for value in values:
            yield from _whole(value)
