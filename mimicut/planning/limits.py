"""Limits of a plan: MACs, parameters, bytes and predicted time, each as a function of the groups' widths."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from mimicut.anatomy.cost import Term, count_teacher, terms
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.tracing import shape
from mimicut.base.guard import named_tensors
from mimicut.surgery.budget import Budget


@dataclass(frozen=True)
class Pace:
    """Predicted time: milliseconds per MAC of a module (`ms_a_mac`, by its name; `rest` for others), and a `fixed` time
    that no cut reduces."""

    ms_a_mac: Mapping[str, float]
    rest: float
    fixed: float = 0.0

    def times(self, share: float) -> "Pace":
        """The pace at which all takes that share of the time."""
        each = {name: share * ms for name, ms in self.ms_a_mac.items()}
        return Pace(each, share * self.rest, share * self.fixed)


class Costs:
    """One figure as a function of how many units each group keeps: a row of factors for each term."""

    def __init__(self, anatomy: Anatomy, ranks: Mapping[str, np.ndarray], found: Sequence[Term], fixed: float = 0.0):
        self._fixed = fixed
        self._rows = []
        known: dict[int, tuple[int, list[tuple[str, np.ndarray]]]] = {}
        for term in found:
            axes = []
            for ids in term.axes:
                if id(ids) not in known:
                    known[id(ids)] = self._axis(anatomy, ids, ranks)
                axes.append(known[id(ids)])
            self._rows.append((term.fixed, axes))

    @staticmethod
    def _axis(anatomy: Anatomy, ids: np.ndarray, ranks: Mapping[str, np.ndarray]) -> tuple[int, list]:
        fixed, found = 0, dict[str, list]()
        for unit in anatomy.units(ids):
            if unit is None or unit[0] not in ranks:
                fixed += 1
            else:
                found.setdefault(unit[0], []).append(ranks[unit[0]][unit[1]])
        # kept[n]: positions whose unit is among the n best
        tables = [
            (name, np.concatenate([[0], np.cumsum(np.bincount(held, minlength=len(ranks[name])))]))
            for name, held in found.items()
        ]
        return fixed, tables

    def of(self, widths: Mapping[str, int]) -> float:
        total = self._fixed
        for fixed, axes in self._rows:
            for base, tables in axes:
                fixed *= base + sum(int(kept[widths[name]]) for name, kept in tables)
            total += fixed
        return total


def macs_of(anatomy: Anatomy, ranks: Mapping[str, np.ndarray]) -> Costs:
    """MACs of one image."""
    return Costs(anatomy, ranks, terms(anatomy))


def time_of(anatomy: Anatomy, ranks: Mapping[str, np.ndarray], pace: Pace) -> Costs:
    """Milliseconds, as `pace` has them."""
    where = anatomy.traced.where
    found = [Term(t.node, t.fixed * pace.ms_a_mac.get(where(t.node), pace.rest), t.axes) for t in terms(anatomy)]
    return Costs(anatomy, ranks, found, pace.fixed)


def size_of(anatomy: Anatomy, ranks: Mapping[str, np.ndarray], *, in_bytes: bool) -> Costs:
    """Parameters; or bytes of all tensors that are saved, buffers too. What no operator uses stays as it is."""
    model = anatomy.traced.model
    held = named_tensors(model) if in_bytes else dict(model.named_parameters())
    places = {name: node for node, name in anatomy.traced.tensors.items()}
    found, fixed, seen = [], 0.0, set()
    for name, tensor in held.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        each = tensor.element_size() if in_bytes else 1
        node = places.get(name)
        axes = [] if node is None else [ids for ids in anatomy.axes[node] if ids is not None]
        if node is None or not axes:
            fixed += each * tensor.numel()
            continue
        rest = math.prod(s for s, ids in zip(shape(node) or (), anatomy.axes[node], strict=True) if ids is None)
        found.append(Term(node, each * rest, tuple(axes)))
    return Costs(anatomy, ranks, found, fixed)


@dataclass
class Limits:
    """parts: (name, costs, the most that they may be)."""

    parts: list[tuple[str, Costs, float]] = field(default_factory=list)

    def load(self, widths: Mapping[str, int]) -> float:
        """The largest used share of any limit; all limits are met up to 1."""
        return max((costs.of(widths) / limit for _, costs, limit in self.parts), default=0.0)

    def used(self, widths: Mapping[str, int]) -> list[float]:
        """The used share of each limit."""
        return [costs.of(widths) / limit for _, costs, limit in self.parts]

    def tightest(self, widths: Mapping[str, int]) -> tuple[str, float, float]:
        """Name, cost and limit of the part closest to its limit, or furthest above it."""
        name, costs, limit = max(self.parts, key=lambda part: part[1].of(widths) / part[2])
        return name, costs.of(widths), limit


def relief(before: Sequence[float], after: Sequence[float]) -> float:
    """How far a step from `before` to `after` reduces the limits that were exceeded."""
    return sum(b - a for b, a in zip(before, after, strict=True) if b > 1)


@dataclass(frozen=True)
class TimeLimit:
    """The milliseconds that a student may take, as predicted by `pace`."""

    pace: Pace
    ms: float


def limits_of(
    teacher: nn.Module,
    anatomy: Anatomy,
    ranks: Mapping[str, np.ndarray],
    budget: Budget,
    time_limit: TimeLimit | None = None,
) -> Limits:
    """The limits as functions of the widths of the groups in `ranks`; all other groups are whole."""
    found = Limits()
    if budget.keep is not None:
        whole = count_teacher(teacher, anatomy).macs
        found.parts.append(("MACs", macs_of(anatomy, ranks), budget.keep * whole))
    if budget.params is not None:
        most = budget.params * (sum(p.numel() for p in teacher.parameters()) if budget.params <= 1 else 1)
        found.parts.append(("parameters", size_of(anatomy, ranks, in_bytes=False), most))
    if budget.size_mb is not None:
        found.parts.append(("bytes", size_of(anatomy, ranks, in_bytes=True), budget.size_mb * 1e6))
    if time_limit is not None:
        found.parts.append(("milliseconds", time_of(anatomy, ranks, time_limit.pace), time_limit.ms))
    return found
