"""Finds out by trying whether numbers in a user's code follow a cut, and which ones it must be told.

A size in a view or a split may be computed from the tensor at hand, held in an attribute, or written into the code. The
trace cannot tell. So every group loses some units, and the cut network runs once more, without data: each torch call is
given either the number that the graph predicts, or, where the code gives another one, is told it; what it returns must
have the predicted shape. A group without which the code would go on is pinned.
"""

import dataclasses
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.utils._pytree import tree_map

from mimicut.anatomy.channels import Axes, Ids, Size
from mimicut.anatomy.graph import Anatomy, Group
from mimicut.anatomy.selection import needed, selections
from mimicut.anatomy.torch_calls import TorchCall, listening, shapes_of, torch_calls
from mimicut.anatomy.tracing import RecurrentShapes, shape
from mimicut.base.errors import MimicutError, PlanError, one_line
from mimicut.base.guard import caches_kept, full_copy
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan, describe
from mimicut.surgery.stand_ins import Number, can_correct_calls, map_numbers, numbers_in

Keep = dict[str, list[int]]  # group -> units that stay
_Told = dict[tuple[str, str, int, int], tuple[Number, Number]]  # module, function, index, place -> given, right


class _Differs(Exception):
    """The code of the cut network does not do what the graph predicts."""


def settle(anatomy: Anatomy) -> None:
    """Try every group; pin those that the code does not let shrink, with what it did instead.

    A number may come from several attributes (it is their product): the first of them that has one is changed, or the
    last, or none, and what then does not fit is told.
    """
    trial = _Trial(anatomy)
    certain = tuple(s for s in anatomy.sizes if s.certain)
    choices = _choices(anatomy)
    left = [g for g in anatomy.groups.values() if g.pinned is None]
    fits: list[Group] = []
    picked = [c[0] for c in choices]
    for pick in (lambda c: c[0], lambda c: c[-1], _nowhere):
        names = {g.name for g in left}
        picked = [pick(c) if _names(anatomy, c[0]) & names else p for c, p in zip(choices, picked, strict=True)]
        anatomy.sizes = certain + tuple(picked)
        left = _unfit(trial, fits, left)
        if not left:
            return
    for group in left:
        anatomy.groups[group.name] = dataclasses.replace(group, pinned=trial.why(fits, group))


def _unfit(trial: "_Trial", fits: list[Group], groups: list[Group]) -> list[Group]:
    """Those of `groups` that the code does not follow; the others join `fits`, all of which it follows together."""
    if not groups or trial.follows([*fits, *groups]):
        fits += groups
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return _unfit(trial, fits, groups[:half]) + _unfit(trial, fits, groups[half:])


def call_edits(anatomy: Anatomy, keep: Keep) -> list[dict[str, Any]]:
    """What the cut network must be told when groups keep these units: `Plan.calls`.

    Raises: PlanError where its code does not follow.
    """
    try:
        found = _Trial(anatomy).run(keep)
    except _Differs as error:
        raise PlanError(
            f"planning a cut: {error}; pin the groups around it with --pin (`mimicut inspect` lists them)"
        ) from error
    return [
        {"module": module, "function": function, "index": index, "place": place, "from": given, "to": right}
        for (module, function, index, place), (given, right) in found.items()
    ]


class _Trial:
    """Runs the code of a network of which units were cut."""

    def __init__(self, anatomy: Anatomy):
        self._anatomy = anatomy
        self._description = describe(anatomy.heard.model)
        calls, place = anatomy.heard.calls, {id(c): i for i, c in enumerate(anatomy.heard.calls)}
        # Of every call: place among its numbers -> the channels that it counts; whether it stands there for sure.
        self._counts: list[dict[int, list[tuple[Ids, bool]]]] = [{} for _ in calls]
        for size in anatomy.sizes:
            call = anatomy.heard.of(size.node)
            if call is not None:
                found = _where(call, size)
                for at in found:
                    known = self._counts[place[id(call)]].setdefault(at, [])
                    known.append((size.axis, size.certain or len(found) == 1))
        # Of every call: the channels on the axes of what it returns, where the graph has them.
        self._returned: list[list[Axes] | None] = [None for _ in calls]
        for node in anatomy.traced.nodes:
            call = anatomy.heard.of(node)
            if call is not None and _shapes(node) == call.shapes:
                self._returned[place[id(call)]] = _axes(anatomy, node)

    def follows(self, groups: list[Group]) -> bool:
        try:
            for keep in _subsets(self._anatomy, groups):
                if self.run(keep):
                    self._anatomy.tells = True
        except _Differs:
            return False
        return True

    def why(self, others: list[Group], group: Group) -> str:
        try:
            for keep in _subsets(self._anatomy, [*others, group]):
                self.run(keep)
        except _Differs as error:
            return str(error)
        raise AssertionError(f"{group.name} follows after all")

    def run(self, keep: Keep) -> _Told:
        """What the code must be told. Raises: _Differs."""
        heard, anatomy = self._anatomy.heard, self._anatomy
        try:
            slices, edits = selections(anatomy, keep)
            student = cut(heard.model, Plan(self._description, anatomy.seam, {}, keep, slices, edits))
        except MimicutError as error:
            raise _Differs(one_line(error)) from error
        found: _Told = {}
        seen: _Told = {}  # what need not be told too: of a module that runs several times
        modules = dict(student.named_modules())
        calls, last = iter(enumerate(heard.calls)), None

        def at(call: TorchCall, func: Any, args: tuple, kwargs: dict) -> Any:
            nonlocal last
            place, known = next(calls, (None, call))
            last = call
            if place is None or (known.module, known.function, known.index) != (call.module, call.function, call.index):
                raise _Differs(f"after a cut the code takes another way {_where_called(call)}")
            given = numbers_in((args, kwargs))
            right = self._right(place, given, keep)
            _note(call, given, right, found, seen)
            if right != given:
                if not can_correct_calls(modules[call.module]):
                    raise _Differs(
                        f"a number in code that belongs to no class depends on a width {_where_called(call)}"
                    )
                new = iter(right)
                args, kwargs = map_numbers((args, kwargs), lambda _: next(new))
            result = func(*args, **kwargs)
            self._require_shapes(place, result, keep)
            return result

        try:
            with torch.no_grad(), caches_kept(student), RecurrentShapes(), listening(student, at):
                student.eval()(*heard.args, **heard.kwargs)
        except _Differs:
            raise
        except Exception as error:  # whatever the user's code raises
            place = _where_called(last) if last else ""
            raise _Differs(f"after a cut the code stops {place} with {one_line(error)}") from error
        if next(calls, None) is not None:
            raise _Differs("after a cut the code takes another way")
        if found and not self._steady:
            raise _Differs("a number depends on a width in code that calls torch anew for every image")
        return found

    @cached_property
    def _steady(self) -> bool:
        """Are the torch calls the same for one image more? Else which call of a function is to be told is not known."""
        heard = self._anatomy.heard
        args, kwargs = tree_map(partial(_one_more, count=self._anatomy.traced.batch), (heard.args, heard.kwargs))
        try:
            with caches_kept(heard.model), RecurrentShapes():
                more = torch_calls(full_copy(heard.model), args, kwargs)
        except Exception:  # it takes no other number of images
            return True
        return [(c.module, c.function, c.index) for c in more] == [(c.module, c.function, c.index) for c in heard.calls]

    def _require_shapes(self, place: int, result: Any, keep: Keep) -> None:
        axes, call = self._returned[place], self._anatomy.heard.calls[place]
        if axes is None:
            return
        wanted = tuple(_predicted(self._anatomy, *each, keep) for each in zip(call.shapes, axes, strict=True))
        if shapes_of(result) != wanted:
            raise _Differs(
                f"after a cut the code gives {_shortly(shapes_of(result))}, expected {_shortly(wanted)} "
                f"{_where_called(call)}"
            )

    def _right(self, place: int, given: list[Number], keep: Keep) -> list[Number]:
        """The numbers that call `place` must be given, which the code gives `given`."""
        call = self._anatomy.heard.calls[place]
        if len(given) != len(call.numbers):
            raise _Differs(f"after a cut the code gives other numbers {_where_called(call)}")
        right = list(call.numbers)
        for at, counts in self._counts[place].items():
            sure = {int(self._anatomy.kept(ids, keep).sum()) for ids, certain in counts if certain}
            maybe = {int(self._anatomy.kept(ids, keep).sum()) for ids, certain in counts if not certain}
            if len(sure) > 1 or (not sure and given[at] not in maybe | {call.numbers[at]}):
                raise _Differs(f"after a cut the code gives the number {given[at]} {_where_called(call)}")
            right[at] = sure.pop() if sure else given[at]
        return [g if g != g and r != r else r for g, r in zip(given, right, strict=True)]  # nan is no other number


def _note(call: TorchCall, given: list[Number], right: list[Number], found: _Told, seen: _Told) -> None:
    """Add to `found` what `call` must be told. Raises: _Differs where it is not the same in all passes of a module."""
    for place, pair in enumerate(zip(given, right, strict=True)):
        key = (call.module, call.function, call.index, place)
        if pair[0] is not pair[1] and pair[0] != pair[1]:  # nan is no other number
            found[key] = pair
        if seen.setdefault(key, pair) != pair and key in found:
            raise _Differs(f"a number would have to be two at a time {_where_called(call)}")


def _one_more(value: Any, count: int) -> Any:
    """A tensor of `count` images with the first of them once more; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == count:
        return torch.cat([value, value[:1]])
    return value


def _where_called(call: TorchCall) -> str:
    return f"({call.function} in {call.module or '<model>'})"


def _shortly(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(str(s) for s in shapes[:3])


def _where(call: TorchCall, size: Size) -> list[int]:
    """Among the numbers of `call`, those that are `size`."""
    if not size.certain:
        return call.find(*size.given)
    held = (size.module, size.attribute, size.index)
    return [i for i, places in enumerate(call.places) if any((p.module, p.attribute, p.index) == held for p in places)]


def _shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    return shapes_of(node.meta.get("val"))


def _axes(anatomy: Anatomy, node: Node) -> list[Axes]:
    axes, rank = anatomy.axes[node], [len(s) for s in _shapes(node)]
    if shape(node) is not None:
        axes = [axes]
    return [each if each is not None else [None] * n for each, n in zip(axes or [None] * len(rank), rank, strict=True)]


def _predicted(anatomy: Anatomy, size: tuple[int, ...], axes: Axes, keep: Keep) -> tuple[int, ...]:
    return tuple(s if ids is None else int(anatomy.kept(ids, keep).sum()) for s, ids in zip(size, axes, strict=True))


def _subsets(anatomy: Anatomy, groups: list[Group]) -> list[Keep]:
    """What is tried: without the first unit and the last, and uneven halves at random, so that neither a slice's end, a
    number that rounding happens to leave right, nor a number that two groups share goes unseen."""
    uneven, inner = {}, {}
    for i, g in enumerate(groups):
        random = np.random.default_rng([i, g.width])
        count = (g.width // 2 + i) % max(g.width - 1, 1)  # groups of one width lose different numbers
        stay = set(needed(anatomy, g, np.arange(g.width)))
        # The first stays, so that a slice of the first few is not left with nothing.
        uneven[g.name] = sorted({0, *stay, *(1 + random.permutation(g.width - 1)[:count]).tolist()})
        stay = set(needed(anatomy, g, abs(np.arange(g.width) - g.width / 2)))  # if it may, another one
        inner[g.name] = sorted({*range(1, max(g.width - 1, 2)), *stay})
    return [inner, uneven]


def _choices(anatomy: Anatomy) -> list[list[Size]]:
    """For each uncertain number, the places that may hold it."""
    found: dict[tuple, list[Size]] = {}
    for size in anatomy.sizes:
        if not size.certain:
            found.setdefault((size.node, id(size.axis)), []).append(size)
    return list(found.values())


def _nowhere(choice: list[Size]) -> Size:
    return dataclasses.replace(choice[0], attribute=None, index=None)


def _names(anatomy: Anatomy, size: Size) -> set[str]:
    return {u[0] for u in anatomy.units(size.ids) if u is not None}
