"""The measure of how far a student's features at the seam are from the teacher's.

With F the student's features, T the teacher's (images on axis 0, any axes after it) and M the mean of T over the
images, position by position: |F - T|^2 / |T - M|^2, where |.|^2 sums over images and all other axes. 1 is as bad as the
mean feature. Of a seam with several points it is the sum over them, so that no point counts more for having larger
numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The few images may hardly differ at one of several seam points: its error is measured in no smaller unit than this
# share of the teacher's squared features, so that it does not drown the others. Source: assumption.
LEAST_SPREAD = 0.1


def squared_error(found: Sequence[Tensor], wanted: Sequence[Tensor], units: Sequence[float]) -> float:
    """The sum over seam points of |F - T|^2 / unit, in float64.

    >>> squared_error([torch.zeros(2, 3)], [torch.ones(2, 3)], [3.0])
    2.0
    """
    return sum(
        float((f.double() - w.double()).square().sum()) / unit for f, w, unit in zip(found, wanted, units, strict=True)
    )


def mean_squared_errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Of each seam point the mean of (F - T)^2, in float32 at least, with gradients."""
    return [F.mse_loss(_wide(f), _wide(w)) for f, w in zip(found, wanted, strict=True)]


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def squared_deviation(features: Tensor) -> tuple[float, float]:
    """|T - M|^2 and |T|^2 of a teacher's features at one point, in float64.

    >>> squared_deviation(torch.tensor([[1.0], [3.0]]))
    (2.0, 10.0)
    """
    mean = features.double().mean(0)
    deviation = sum(float((part.double() - mean).square().sum()) for part in features.split(64))
    return deviation, float(features.double().square().sum())


class RunningDeviation:
    """The squared deviation of a teacher's features at each seam point, over batches of which none is kept."""

    def __init__(self) -> None:
        self._sums: list[Any] = []  # tensors, once there was a batch
        self._squares: list[float] = []
        self._images = 0

    def add(self, features: Sequence[Tensor]) -> None:
        """Add a batch: of each point its features, images on axis 0."""
        features = [each.double() for each in features]
        self._images += len(features[0])
        self._sums = self._sums or [0.0] * len(features)
        self._squares = self._squares or [0.0] * len(features)
        self._sums = [each.sum(0) + total for each, total in zip(features, self._sums, strict=True)]
        self._squares = [each.square().sum().item() + q for each, q in zip(features, self._squares, strict=True)]

    def values(self) -> list[tuple[float, float, int]]:
        """Of each point |T - M|^2, |T|^2, and how many numbers T has."""
        return [
            (square - total.square().sum().item() / self._images, square, self._images * total.numel())
            for total, square in zip(self._sums, self._squares, strict=True)
        ]
