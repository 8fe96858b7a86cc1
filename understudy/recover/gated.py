"""Least squares that knows of the activation behind a layer: what that cuts off need not be met.

Where the teacher's value lies outside the range in which the activation tells values apart, any value beyond the same
edge is as good. The target of such a row is the prediction itself where that is beyond, the edge where it is not; for
these targets the layer is solved again, from the same second moments of its inputs. Every round lowers a bound on the
error behind the activation (what Zhang et al., arXiv 1505.06798, reach with an auxiliary variable).
"""

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
        self._edges, self._scale, self._back = edges, scale.float(), back.float()
        self._rows: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def add(self, fold: int, x: Tensor, goal: Tensor, ahead: Tensor) -> None:
        """x (groups, rows, D): inputs. goal (groups, rows, outputs of a group): what the layer should give. ahead:
        what the activation would then be given, the same shape."""
        self._rows.append((fold, x.float(), goal.float(), ahead.float()))

    def error(self, folds: Sequence[int], weights: Tensor) -> float:
        """Squared error behind the activation, of `weights` (groups, outputs of a group, D)."""
        low, high = self._edges
        return sum(
            float((found.clamp(low, high) - ahead.clamp(low, high)).square().sum())
            for _, _, ahead, found in self._found(folds, weights)
        )

    def solved(
        self, folds: Sequence[int], weights: Tensor, solve: Callable[[Tensor], Tensor], rounds: int = ROUNDS
    ) -> Tensor:
        """Better weights, from `weights` on. solve: from cross moments (groups, D, outputs of a group) over `folds` to
        the weights for them."""
        low, high = self._edges
        for _ in range(rounds):
            cross = torch.zeros_like(weights.mT)
            for x, goal, ahead, found in self._found(folds, weights):
                wanted = torch.where(ahead < low, found.clamp(max=low), ahead)
                wanted = torch.where(ahead > high, found.clamp(min=high), wanted)
                cross += x.mT @ (goal + (wanted - ahead) * self._back)
            weights = solve(cross)
        return weights

    def _found(self, folds: Sequence[int], weights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """x, goal, ahead, and what the activation is given with `weights`."""
        for fold, x, goal, ahead in self._rows:
            if fold in folds:
                yield x, goal, ahead, ahead + (x @ weights.mT.float() - goal) * self._scale
