"""Whole numbers that a module holds for other methods than those of the traced pass: `self.c` of a `forward_split`.

Nothing in a trace shows them. Let v be such a number, read by a method that the pass does not run. Among the axes that
the module's own code handles, let M be those of length v. Where all of M are the same channels, v is their number, and
follows the cut: |S(keep)| for these atoms S. Where M also holds other axes, v stays, and is named with the method.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn
from torch.fx import Node

from mimicut.anatomy.channels import Channels, Ids, Size
from mimicut.anatomy.tracing import Traced, shape

_LIBRARY = ("torch.", "mimicut.")  # whose modules need no such number, or hold it for a layer that is read as one


@dataclass(frozen=True, eq=False)
class UnclearNumber:
    """A number that may be a width, or something else.

    Attributes:
        module: the module that holds it.
        attribute: the attribute that does.
        method: a method that reads it.
        value: the number.
        axes: the atoms of each axis of that length which carries channels.
    """

    module: str
    attribute: str
    method: str
    value: int
    axes: tuple[Ids, ...]


def numbers_of_other_methods(
    traced: Traced, axes: Callable[[Node], Any], channels: Channels
) -> tuple[list[Size], list[UnclearNumber]]:
    """Find the numbers that follow a cut although the pass does not read them, and those of which that is unclear.

    Args:
        traced: the operator graph.
        axes: gives the atoms on every axis of what a node returns.
        channels: says which atoms are one.
    """
    modules = {n: m for n, m in traced.model.named_modules() if not type(m).__module__.startswith(_LIBRARY)}
    loads = {kind: _methods(kind) for kind in {type(m) for m in modules.values()}}
    # What any code loads of another object may run, or be read, in the pass.
    elsewhere = {name for methods in loads.values() for method in methods.values() for name in method.of_others}
    idle = {kind: _idle(methods, elsewhere) for kind, methods in loads.items()}
    known = {(size.module, size.attribute) for size in channels.sizes}
    sizes: list[Size] = []
    unclear: list[UnclearNumber] = []
    handled = _handled(traced) if any(idle.values()) else {}
    for name, module in modules.items():
        for attribute, method in idle[type(module)].items():
            value = vars(module).get(attribute)
            if type(value) is not int or value < 2 or (name, attribute) in known:
                continue
            same = [(node, ids) for node in handled.get(name, ()) for ids in _of_length(node, axes, value)]
            counted = [(node, ids) for node, ids in same if ids is not None]
            if not counted:
                continue
            node, ids = counted[0]
            if len(counted) == len(same) and len({tuple(channels.roots(each).tolist()) for _, each in counted}) == 1:
                sizes.append(Size(name, attribute, None, value, ids, True, node, ids, ([value], 0)))
            else:
                every = {id(each): each for _, each in counted}
                unclear.append(UnclearNumber(name, attribute, method, value, tuple(every.values())))
    return sizes, unclear


def _handled(traced: Traced) -> dict[str, list[Node]]:
    """For each module the values that its own code, or a torch layer that it holds, takes or returns."""
    kinds = {name: type(module).__module__ for name, module in traced.model.named_modules()}
    found: dict[str, dict[Node, None]] = {}
    for node in traced.nodes:
        around = ["", *(call.module for call in traced.calls.get(node, ()))]
        while len(around) > 1 and kinds.get(around[-1], "torch.").startswith(_LIBRARY):
            around.pop()
        found.setdefault(around[-1], {}).update(dict.fromkeys([node, *node.all_input_nodes]))
    return {name: list(nodes) for name, nodes in found.items()}


def _of_length(node: Node, axes: Callable[[Node], Any], length: int) -> Iterator[Ids | None]:
    """What the axes of that length carry; None for one without channels."""
    sizes, carried = shape(node), axes(node)
    if sizes is not None and carried is not None and len(sizes) == len(carried):
        yield from (ids for size, ids in zip(sizes, carried, strict=True) if size == length)


@dataclass(frozen=True)
class _Loads:
    """The names of attributes that a method loads: of its first argument, and of anything else."""

    of_self: frozenset[str]
    of_others: frozenset[str]


@functools.cache
def _methods(kind: type[nn.Module]) -> Mapping[str, _Loads]:
    """What the methods and properties of a class load, with those of its bases that they override and may call; the
    ones that nn.Module has too, but for `forward`, are left out."""
    found: dict[str, _Loads] = {}
    for base in (each for each in kind.__mro__ if each not in (nn.Module, object)):
        for name, held in vars(base).items():
            held = getattr(held, "fget", None) or getattr(held, "func", None) or getattr(held, "__func__", None) or held
            code = getattr(inspect.unwrap(held) if callable(held) else None, "__code__", None)
            if code is not None and (name == "forward" or not hasattr(nn.Module, name)):
                loads, before = _loaded(code), found.get(name, _Loads(frozenset(), frozenset()))
                found[name] = _Loads(before.of_self | loads.of_self, before.of_others | loads.of_others)
    return found


def _idle(methods: Mapping[str, _Loads], elsewhere: set[str]) -> dict[str, str]:
    """Attribute -> the method that reads it, of those that nothing in the pass can have read."""
    run: set[str] = set()
    todo = ["forward", *elsewhere]
    while todo:
        name = todo.pop()
        if name in methods and name not in run:
            run.add(name)
            todo += methods[name].of_self
    read = elsewhere.union(*(methods[name].of_self for name in run))
    return {each: name for name in methods if name not in run for each in methods[name].of_self if each not in read}


def _loaded(code: CodeType) -> _Loads:
    first = code.co_varnames[0] if code.co_argcount else None
    # A text may be the name in a getattr.
    of_self, of_others = {each for each in code.co_consts if isinstance(each, str)}, set()
    before: Any = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            (of_self if before is not None and before == first else of_others).add(step.argval)
        loads = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
        before = (step.argval[-1] if isinstance(step.argval, tuple) else step.argval) if loads else None
    for inner in code.co_consts:
        if isinstance(inner, CodeType):  # it has the outer function's `self` as a variable of any name
            found = _loaded(inner)
            of_self |= found.of_self | found.of_others
    return _Loads(frozenset(of_self), frozenset(of_others))
