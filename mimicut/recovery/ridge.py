"""The weights of one layer by ridge regression, its strength by cross-validation over images.

With the moments of `moments` (axes g, n, D, m, p as there), the layer's weights become W + B, where B (g, m, D) solves

    minimise over B:  |R - X B'|^2 + r u |B|^2,    so that  B' = (X'X + r u I)^-1 X'R,

r one of RIDGES, u the mean of X'X's diagonal (the mean squared input times n), and a constant all but free. The squared
error on rows that B was not solved from is |R|^2 + sum over g of tr(B X'X B' - 2 X'R B), so that no row is read twice.
The strength with the least such error is taken, and no change at all where W alone has less. Where an activation
follows, `gated` solves again for what the activation lets through, and is taken where that lowers the error after it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimicut.recovery.gated import ROUNDS
from mimicut.recovery.layers import Layer
from mimicut.recovery.moments import LARGE, Moments

# In units of the mean squared input of a layer. Source: measured on the demo's networks, where all but the first are
# chosen somewhere.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# Random sums of the outputs by which the ridges are compared, for layers with more than twice as many outputs. Source:
# measured, the ridges chosen are those of all outputs but for neighbours (docs/LOG.md).
_SKETCH = 64
_EXACT = 1e-10  # relative squared error of a layer that nothing is missing from

Solver = Callable[[Tensor], Tensor]
"""From X'R (g, D, m) to the change B (g, m, D)."""


@dataclass(frozen=True)
class Solved:
    """What was done to one layer.

    layer: name of its weight. ridge: the strength chosen; None where the cut's own weights were not beaten. error_cut,
    error: squared error over the teacher's squared output, on images left out of the solution, before and after.
    gated: whether it was then solved again for what the activation after it lets through; the errors do not count that.
    """

    layer: str
    ridge: float | None
    error_cut: float
    error: float
    gated: bool = False


def solve_layer(
    layer: Layer, moments: Moments, student: Mapping[str, Tensor], start: int | None = None
) -> tuple[Solved, int]:
    """Solve a layer, and write its weights into the student.

    Args:
        layer: The layer.
        moments: As `moments.collect_moments` gives them.
        student: The student's tensors by name, changed in place.
        start: The index in RIDGES where the search begins; by default the middle.

    Returns:
        What was done, and the index of the ridge chosen: where to start for the next layer.
    """
    start = len(RIDGES) // 2 if start is None else start
    split = _Split.of(moments)
    target: Any = sum(moments.target[parts].sum() for parts in split.judging)
    total = target.clamp_min(1e-300)
    residual = sum(moments.residual[parts].sum() for parts in split.judging)
    before = float(residual / total)
    if before < _EXACT or not math.isfinite(before):
        return Solved(layer.weight, None, before, before), start
    at, solvers = _search_ridge(moments, split, start)
    changes = [solver(moments.cross_of(parts)) for solver, parts in zip(solvers, split.fitting, strict=True)]
    error = float((residual + _error_change(moments, split.judging, changes, moments.cross)) / total)
    if not error < before:
        return Solved(layer.weight, None, before, before), start
    every = list(range(len(moments.gram)))
    solver = _solver(moments, every, RIDGES[at])
    change, gated = solver(moments.cross_of(every)), False
    if moments.gated is not None:
        rounds = ROUNDS if moments.inputs <= LARGE else 2
        gated = _gate_helps(moments, split, list(zip(solvers, changes, strict=True)), RIDGES[at], rounds)
        if gated:
            change = moments.gated.solve(every, change, solver, rounds)
    _write(layer, moments.prior + change, moments, student)
    return Solved(layer.weight, RIDGES[at], before, error, gated), at


@dataclass(frozen=True)
class _Split:
    """Parts of the images in turn: those that judge, and beside them those that are solved from."""

    judging: list[list[int]]
    fitting: list[list[int]]

    @classmethod
    def of(cls, moments: Moments) -> "_Split":
        parts = list(range(len(moments.gram)))
        judging = [[part] for part in parts] if moments.inputs <= LARGE else [parts[:1]]
        return cls(judging, [[part for part in parts if part not in aside] for aside in judging])


def _search_ridge(moments: Moments, split: _Split, start: int) -> tuple[int, list[Solver]]:
    """Which ridge has the least error on the parts that judge, and the solvers with it from the others.

    The error is all but convex in the logarithm of the ridge: the search walks downhill from `start`. Many outputs are
    judged by random sums of them.
    """
    cross = moments.cross
    if cross.shape[-1] > 2 * _SKETCH:
        signs = torch.randint(0, 2, (cross.shape[-1], _SKETCH), generator=torch.Generator().manual_seed(0))
        cross = cross @ (2 * signs - 1).to(cross)
    errors: dict[int, float] = {}
    best, best_solvers, at = start, [], start
    while True:
        for i in (at, at - 1, at + 1):
            if not 0 <= i < len(RIDGES) or i in errors:
                continue
            solvers = [_solver(moments, parts, RIDGES[i]) for parts in split.fitting]
            changes = [
                solver(cross[parts].sum(0)) if parts else torch.zeros_like(cross[0].mT)
                for solver, parts in zip(solvers, split.fitting, strict=True)
            ]
            errors[i] = float(_error_change(moments, split.judging, changes, cross))
            if i == best or errors[i] < errors[best]:
                best, best_solvers = i, solvers
            del solvers
        if best == at:
            return at, best_solvers
        at = best


def _solver(moments: Moments, parts: Sequence[int], ridge: float) -> Solver:
    """Factor X'X + r u I over these parts once, for any X'R. Where that fails, nothing is changed."""
    held = moments.gram_of(parts).clone()
    unit = held.diagonal(dim1=1, dim2=2)[:, : moments.inputs].mean(1).clamp_min(1e-300)
    hold = (ridge * unit)[:, None].expand(-1, held.shape[-1]).clone()
    if moments.constant:
        hold[:, -1] = 1e-6 * moments.rows[list(parts)].sum()  # the constant is all but free
    held.diagonal(dim1=1, dim2=2).add_(hold)
    factor, failed = torch.linalg.cholesky_ex(held)
    del held
    if bool(failed.any()):
        return lambda cross: torch.zeros_like(cross.mT)
    return lambda cross: torch.cholesky_solve(cross, factor).mT


def _error_change(moments: Moments, judging: list[list[int]], changes: list[Tensor], cross: Tensor) -> Tensor:
    """By how much each change of the weights changes the squared error on the parts beside it: the sum of
    tr(B X'X B' - 2 X'R B). cross: X'R (p, g, D, m), of the same outputs as the changes (g, m, D)."""
    total = torch.zeros((), dtype=cross.dtype, device=cross.device)
    for parts, change in zip(judging, changes, strict=True):
        for part in parts:
            total += ((change @ moments.gram[part] - 2 * cross[part].mT) * change).sum()
    return total


def _gate_helps(
    moments: Moments, split: _Split, fitted: list[tuple[Solver, Tensor]], ridge: float, rounds: int
) -> bool:
    """Whether solving again for the activation from every second part lowers the error on the others.

    fitted: solver and change of each of `split.fitting`.
    """
    parts = list(range(len(moments.gram)))
    fitting, judging = parts[1::2], parts[::2]
    if fitting in split.fitting:
        solver, plain = fitted[split.fitting.index(fitting)]
    else:
        solver = _solver(moments, fitting, ridge)
        plain = solver(moments.cross_of(fitting))
    assert moments.gated is not None
    better = moments.gated.solve(fitting, plain, solver, rounds)
    return moments.gated.error(judging, better) < moments.gated.error(judging, plain)


def _write(layer: Layer, weights: Tensor, moments: Moments, student: Mapping[str, Tensor]) -> None:
    """Weights (g, m, D) into the layer; their constant into its bias or the batch norm that follows."""
    weight = student[layer.weight]
    weight.copy_(weights[..., : moments.inputs].flatten(0, 1).reshape(weight.shape))
    if not moments.constant:
        return
    assert layer.constant is not None
    constant = weights[..., -1].flatten()
    into = student[layer.constant]
    into.add_(constant.to(into), alpha=1 if layer.constant == layer.bias else -1)  # a batch norm subtracts its mean
