"""Least squares that know the activation after a layer: what it cuts off need not be met.

Axes: g groups, n rows, D inputs of a group x kernel, m outputs of a group, as in `moments`.

With a(z) = min(max(s z + t, low), high) by output (s and t: the scale and offset between layer and activation), the
change B (g, m, D) of the prior weights should minimise |a(Y) - a(X (W + B)')|^2. Where the teacher's s Y + t lies
beyond low or high, any value beyond the same edge is as good. So in every round the target of such an output is moved
from Y to the layer's own prediction where that lies beyond the edge, and else to the edge:

    T = (clamp(z) - (s Y + t)) / s where s Y + t is beyond an edge, else 0,  with z = s X (W + B)' + t,
    B' = (X'X + r u I)^-1 X'(R + T).

Every round lowers an upper bound on the error after the activation (Zhang et al., arXiv 1505.06798, reach the same with
an auxiliary variable).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mimicut.base.ranks import Ranks

ROUNDS = 3  # Source: measured on the demo's networks: 8 or 30 are hardly better (docs/LOG.md).


class Gated:
    """The rows of a layer that an activation follows.

    Args:
        edges: low and high, between which the activation distinguishes values.
        scale: s (g, 1, m); 0 for outputs of which hardly anything arrives at the activation.
        inverse: 1 / s (g, 1, m); 0 for the same outputs.
    """

    def __init__(self, edges: tuple[float, float], scale: Tensor, inverse: Tensor):
        self._edges, self._scale, self._inverse = edges, scale, inverse
        self._rows: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def add(self, part: int, x: Tensor, residual: Tensor, activated: Tensor) -> None:
        """Keep rows.

        Args:
            part: The part of the images that they are from.
            x: Inputs X (g, n, D).
            residual: R = Y - X W' (g, n, m).
            activated: What the activation is given in the teacher, s Y + t (g, n, m).
        """
        self._rows.append((part, x, residual, activated))

    def collect(self, ranks: Ranks, parts: int) -> None:
        """Keep the rows of all processes, each of which has some: its own at its place, zeros elsewhere, added up."""
        first = self._rows[0][1:]
        sizes = torch.zeros(ranks.count, parts, dtype=torch.int64, device=first[0].device)
        for part, x, _, _ in self._rows:
            sizes[ranks.rank, part] += x.shape[1]
        ranks.add_up([sizes])
        ends = sizes.cumsum(0)
        of_all = {
            part: tuple(each.new_zeros(len(each), total, each.shape[2]) for each in first)
            for part, total in enumerate(ends[-1].tolist())
            if total
        }
        free = (ends - sizes)[ranks.rank].tolist()  # where the next rows of each part belong
        for part, *rows in self._rows:
            at = slice(free[part], free[part] + rows[0].shape[1])
            for place, each in zip(of_all[part], rows, strict=True):
                place[:, at] = each
            free[part] = at.stop
        self._rows = [(part, x, residual, activated) for part, (x, residual, activated) in of_all.items()]
        for _, *rows in self._rows:
            for each in rows:
                ranks.add_up([each])

    def error(self, parts: Sequence[int], change: Tensor) -> float:
        """Squared error after the activation over these parts, with the change B (g, m, D) of the prior weights."""
        low, high = self._edges
        return sum(
            float(predicted.clamp_(low, high).sub_(wanted.clamp(low, high)).square_().sum())
            for _, _, wanted, predicted in self._predicted(parts, change)
        )

    def solve(
        self, parts: Sequence[int], change: Tensor, solver: Callable[[Tensor], Tensor], rounds: int = ROUNDS
    ) -> Tensor:
        """Improve a change of the prior weights.

        Args:
            parts: The parts of the images to solve from.
            change: B (g, m, D), from which it begins.
            solver: From X'(R + T) (g, D, m) over `parts` to the change (g, m, D) for it.
            rounds: How often the targets are moved.

        Returns:
            The new B (g, m, D).
        """
        low, high = self._edges
        for _ in range(rounds):
            cross = torch.zeros_like(change.mT)
            for x, residual, wanted, predicted in self._predicted(parts, change):
                moved = torch.zeros_like(predicted)  # s T
                if math.isfinite(low):
                    moved += predicted.clamp(max=low).sub_(wanted).mul_(wanted < low)
                if math.isfinite(high):
                    moved += predicted.clamp_(min=high).sub_(wanted).mul_(wanted > high)
                cross += x.mT @ moved.mul_(self._inverse).add_(residual)
            change = solver(cross)
        return change

    def _predicted(self, parts: Sequence[int], change: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """X, R, s Y + t, and z = s X (W + B)' + t, a new tensor: s (X B' - R) + (s Y + t)."""
        transposed = change.mT.to(self._scale)
        for part, x, residual, wanted in self._rows:
            if part in parts:
                yield x, residual, wanted, (x @ transposed).sub_(residual).mul_(self._scale).add_(wanted)
