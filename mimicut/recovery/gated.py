"""Least squares that knows of the activation behind a layer: what that cuts off need not be met.

Where the teacher's value lies outside the range in which the activation tells values apart, any value beyond the same
edge is as good. The target of such a row is the prediction itself where that is beyond, the edge where it is not; for
these targets the layer is solved again, from the same second moments of its inputs. Every round lowers a bound on the
error behind the activation (what Zhang et al., arXiv 1505.06798, reach with an auxiliary variable). Weights are told by
what is added to those that the layer had, and targets by what these left over, as in `closed_form`.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

ROUNDS = 3  # Source: measured on the demo's networks: 8 or 30 are hardly better (docs/LOG.md).


class Gated:
    """The rows of a layer, kept.

    edges: of the range. scale (groups, 1, outputs of a group): of the layer's outputs on the way to the activation, 0
    for those that hardly arrive there; back: 1 / scale, or 0 too.
    """

    def __init__(self, edges: tuple[float, float], scale: Tensor, back: Tensor):
        self._edges, self._scale, self._back = edges, scale, back
        self._rows: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def add(self, part: int, x: Tensor, over: Tensor, ahead: Tensor) -> None:
        """x (groups, rows, D): inputs. over (groups, rows, outputs of a group): what the layer should give beyond what
        it gives with its prior weights. ahead: what the activation would then be given, the same shape."""
        self._rows.append((part, x, over, ahead))

    def error(self, parts: Sequence[int], change: Tensor) -> float:
        """Squared error behind the activation, of the prior weights and `change` (groups, outputs of a group, D)."""
        low, high = self._edges
        return sum(
            float(found.clamp_(low, high).sub_(ahead.clamp(low, high)).square_().sum())
            for _, _, ahead, found in self._found(parts, change)
        )

    def solved(
        self, parts: Sequence[int], change: Tensor, solve: Callable[[Tensor], Tensor], rounds: int = ROUNDS
    ) -> Tensor:
        """A better change of the prior weights, from `change` on. solve: from cross moments (groups, D, outputs of a
        group) of inputs and what is left over, over `parts`, to the change for them."""
        low, high = self._edges
        for _ in range(rounds):
            cross = torch.zeros_like(change.mT)
            for x, over, ahead, found in self._found(parts, change):
                # By how much the target is moved: to the prediction or the edge, where the teacher's value is beyond.
                moved = torch.zeros_like(found)
                if math.isfinite(low):
                    moved += found.clamp(max=low).sub_(ahead).mul_(ahead < low)
                if math.isfinite(high):
                    moved += found.clamp_(min=high).sub_(ahead).mul_(ahead > high)
                cross += x.mT @ moved.mul_(self._back).add_(over)
            change = solve(cross)
        return change

    def _found(self, parts: Sequence[int], change: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x, over, ahead, and what the activation is given with `change`, each of them new."""
        learned = change.mT.to(self._scale)
        for part, x, over, ahead in self._rows:
            if part in parts:
                yield x, over, ahead, (x @ learned).sub_(over).mul_(self._scale).add_(ahead)
