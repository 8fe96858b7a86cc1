"""Tries whether the numbers in a user's code follow a cut, and finds those that must be corrected.

A size in a view or a split may be computed from the tensor at hand, held in an attribute, or written into the code. The
trace cannot tell which. So every group loses some units, and the cut network runs once more, without data. Let `keep`
be the units that stay, n the j-th number that a torch call is given, and |S(keep)| how many atoms of an axis S stay.
The graph predicts, for every call of the pass and in the order of the calls:

    which call    module, function and count are those of the first pass, else the code branches on a width
    numbers       n_j(keep) = |S(keep)| for each axis S that n_j counts, as `Size` has it
                  n_j(keep) = n_j           where it counts no channels
    shapes        shape(result)[d] = |S(keep)| for the atoms S on axis d of what the call returns

Where the code gives another number than predicted, the call is given the predicted one, and (given, predicted) is a
correction for the plan (`Plan.calls`). The prediction is exact for a number of a torch.nn layer, or one that a call
holds once; for others the code's own number counts, if it is among those that the axes predict. A group with which the
code stops, branches or returns other shapes is pinned, with what the code did instead.

Two subsets are tried, see `_subsets`. Groups are tried all at once and halved until the ones that do not fit are alone.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_map

from mimicut.anatomy.channels import Axes, Ids, Size
from mimicut.anatomy.graph import Anatomy, Group
from mimicut.anatomy.selection import required_units, selections
from mimicut.anatomy.torch_calls import TorchCall, intercepting_calls, record_calls, shapes_of
from mimicut.anatomy.tracing import RecurrentShapes, shape
from mimicut.base.errors import MimicutError, PlanError, one_line
from mimicut.base.guard import caches_kept, full_copy
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan, describe
from mimicut.surgery.stand_ins import Number, can_correct_calls, map_numbers, numbers_in

Keep = dict[str, list[int]]  # group -> units that stay
# (module, function, which call of it, position among its numbers) -> (number that the code gives, right number)
_Corrections = dict[tuple[str, str, int, int], tuple[Number, Number]]


class _Differs(Exception):
    """The code of the cut network does not do what the graph predicts."""


def try_groups(anatomy: Anatomy) -> None:
    """Try every group, and pin those that the code does not let shrink, with what it did instead.

    A number may come from several attributes, as their product. Three ways are tried: the first attribute changes, the
    last one, or none, and what then does not fit is corrected in the call.

    Args:
        anatomy: its groups, its sizes and `needs_call_edits` are changed in place.
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
    """Those of `groups` that the code does not follow; the others are added to `fits`, which it follows all at once."""
    if not groups or trial.follows([*fits, *groups]):
        fits += groups
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return _unfit(trial, fits, groups[:half]) + _unfit(trial, fits, groups[half:])


def call_edits(anatomy: Anatomy, keep: Keep) -> list[dict[str, Any]]:
    """Find the numbers in the cut network's code that must be corrected.

    Args:
        anatomy: what is known of the network.
        keep: group -> units that it keeps.

    Returns:
        One entry for each number, as `Plan.calls` has them.

    Raises:
        PlanError: the code does not follow this cut.
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
    """Runs the code of a network whose groups were cut, and compares its calls with what the graph predicts."""

    def __init__(self, anatomy: Anatomy):
        self._anatomy = anatomy
        self._description = describe(anatomy.recorded.model)
        self.calls = calls = anatomy.recorded.calls
        place = {id(call): i for i, call in enumerate(calls)}
        # For every call: position among its numbers -> the atoms that it counts, and whether it does for sure.
        self._counts: list[dict[int, list[tuple[Ids, bool]]]] = [{} for _ in calls]
        for size in anatomy.sizes:
            call = anatomy.recorded.call_of(size.node)
            if call is not None:
                found = _positions(call, size)
                for at in found:
                    known = self._counts[place[id(call)]].setdefault(at, [])
                    known.append((size.axis, size.certain or len(found) == 1))
        # For every call: the atoms on the axes of what it returns, where the graph has them.
        self._returned: list[list[Axes] | None] = [None for _ in calls]
        for node in anatomy.traced.nodes:
            call = anatomy.recorded.call_of(node)
            if call is not None and _shapes(node) == call.shapes:
                self._returned[place[id(call)]] = _axes(anatomy, node)

    def follows(self, groups: list[Group]) -> bool:
        """Whether the code follows when all of `groups` lose units."""
        try:
            for keep in _subsets(self._anatomy, groups):
                if self.run(keep):
                    self._anatomy.needs_call_edits = True
        except _Differs:
            return False
        return True

    def why(self, others: list[Group], group: Group) -> str:
        """What the code does when `group` loses units together with `others`, which it follows without that one."""
        try:
            for keep in _subsets(self._anatomy, [*others, group]):
                self.run(keep)
        except _Differs as error:
            return str(error)
        raise AssertionError(f"{group.name} follows after all")

    def run(self, keep: Keep) -> _Corrections:
        """Run the network cut to `keep`; returns the corrections that it needs. Raises: _Differs."""
        recorded, anatomy = self._anatomy.recorded, self._anatomy
        try:
            slices, edits = selections(anatomy, keep)
            student = cut(recorded.model, Plan(self._description, anatomy.seam, {}, keep, slices, edits))
        except MimicutError as error:
            raise _Differs(one_line(error)) from error
        this_pass = _Pass(self, student, keep)
        try:
            with torch.no_grad(), caches_kept(student), RecurrentShapes(), intercepting_calls(student, this_pass.call):
                student.eval()(*recorded.args, **recorded.kwargs)
        except _Differs:
            raise
        except Exception as error:  # whatever the user's code raises
            place = _where_called(this_pass.last) if this_pass.last else ""
            raise _Differs(f"after a cut the code stops {place} with {one_line(error)}") from error
        if this_pass.has_more():
            raise _Differs("after a cut the code takes another way")
        if this_pass.found and not self._steady:
            raise _Differs("a number depends on a width in code that calls torch anew for every image")
        return this_pass.found

    @cached_property
    def _steady(self) -> bool:
        """Whether the torch calls are the same for one image more: else it is not known which of them to correct."""
        recorded = self._anatomy.recorded
        args, kwargs = tree_map(partial(_one_more, count=self._anatomy.traced.batch), (recorded.args, recorded.kwargs))
        try:
            with caches_kept(recorded.model), RecurrentShapes():
                more = record_calls(full_copy(recorded.model), args, kwargs)
        except Exception:  # it takes no other number of images
            return True
        return [(c.module, c.function, c.index) for c in more] == [(c.module, c.function, c.index) for c in self.calls]

    def require_shapes(self, place: int, result: Any, keep: Keep) -> None:
        """Raises: _Differs where what call number `place` returned has another shape than the graph predicts."""
        axes, call = self._returned[place], self.calls[place]
        if axes is None:
            return
        wanted = tuple(_predicted(self._anatomy, *each, keep) for each in zip(call.shapes, axes, strict=True))
        if shapes_of(result) != wanted:
            raise _Differs(
                f"after a cut the code gives {_shortly(shapes_of(result))}, expected {_shortly(wanted)} "
                f"{_where_called(call)}"
            )

    def right_numbers(self, place: int, given: list[Number], keep: Keep) -> list[Number]:
        """The numbers that call number `place` must be given, where the code gives it `given`."""
        call = self.calls[place]
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


class _Pass:
    """One pass of a cut network, compared with the recorded one call by call."""

    def __init__(self, trial: _Trial, student: nn.Module, keep: Keep):
        self.found: _Corrections = {}
        self.last: TorchCall | None = None
        self._trial, self._keep = trial, keep
        self._modules = dict(student.named_modules())
        self._expected = iter(enumerate(trial.calls))
        self._seen: _Corrections = {}  # all numbers, as a module may run several times

    def call(self, call: TorchCall, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Call a torch function with the right numbers. Raises: _Differs."""
        place, known = next(self._expected, (None, call))
        self.last = call
        if place is None or (known.module, known.function, known.index) != (call.module, call.function, call.index):
            raise _Differs(f"after a cut the code takes another way {_where_called(call)}")
        given = numbers_in((args, kwargs))
        right = self._trial.right_numbers(place, given, self._keep)
        self._note_corrections(call, given, right)
        if right != given:
            if not can_correct_calls(self._modules[call.module]):
                raise _Differs(f"a number in code that belongs to no class depends on a width {_where_called(call)}")
            new = iter(right)
            args, kwargs = map_numbers((args, kwargs), lambda _: next(new))
        result = func(*args, **kwargs)
        self._trial.require_shapes(place, result, self._keep)
        return result

    def has_more(self) -> bool:
        """Whether the recorded pass had more calls than were made."""
        return next(self._expected, None) is not None

    def _note_corrections(self, call: TorchCall, given: list[Number], right: list[Number]) -> None:
        for position, pair in enumerate(zip(given, right, strict=True)):
            key = (call.module, call.function, call.index, position)
            if pair[0] is not pair[1] and pair[0] != pair[1]:  # nan is no other number
                self.found[key] = pair
            if self._seen.setdefault(key, pair) != pair and key in self.found:
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


def _positions(call: TorchCall, size: Size) -> list[int]:
    """Where among the numbers of `call` the one that `size` means may stand."""
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
    """The two cuts that are tried: without the first unit and the last, and uneven halves at random. So no slice's end,
    no number that rounding leaves right, and no number that two groups share goes unseen."""
    uneven, inner = {}, {}
    for i, g in enumerate(groups):
        random = np.random.default_rng([i, g.width])
        count = (g.width // 2 + i) % max(g.width - 1, 1)  # groups of one width lose different numbers
        stay = set(required_units(anatomy, g, np.arange(g.width)))
        # The first stays, so that a slice of the first few is not left with nothing.
        uneven[g.name] = sorted({0, *stay, *(1 + random.permutation(g.width - 1)[:count]).tolist()})
        stay = set(required_units(anatomy, g, abs(np.arange(g.width) - g.width / 2)))  # if it may, another one
        inner[g.name] = sorted({*range(1, max(g.width - 1, 2)), *stay})
    return [inner, uneven]


def _choices(anatomy: Anatomy) -> list[list[Size]]:
    """For each uncertain number, the attributes that may hold it."""
    found: dict[tuple, list[Size]] = {}
    for size in anatomy.sizes:
        if not size.certain:
            found.setdefault((size.node, id(size.axis)), []).append(size)
    return list(found.values())


def _nowhere(choice: list[Size]) -> Size:
    return dataclasses.replace(choice[0], attribute=None, index=None)


def _names(anatomy: Anatomy, size: Size) -> set[str]:
    return {u[0] for u in anatomy.units(size.ids) if u is not None}
