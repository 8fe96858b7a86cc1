"""How far a student is from its teacher at the seam, on images to judge by."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.recovery.batches import Batch, copied
from mimicut.surgery.seam import Seam, capturing


class Judge:
    """Squared error at the seam over the teacher's squared deviation from its mean feature, both in eval mode; of
    several points the sum. The teacher's features are computed once."""

    def __init__(self, teacher: nn.Module, seam: Seam, batches: Sequence[Batch]):
        self._seam, self._batches = seam, batches
        with guard.evaluating(teacher), capturing(teacher, seam) as target:
            self._wanted = [target.features(*args, **kwargs) for args, kwargs in map(copied, batches)]
        self.widest = max((f.shape[channels_at(f)] for f in self._wanted[0]), default=0)  # channels of a point
        self._spread = []
        for point in range(len(seam.points)):
            feats = torch.cat([wanted[point] for wanted in self._wanted])
            mean = feats.double().mean(0)
            deviation = sum(float((f.double() - mean).square().sum()) for f in feats.split(64))
            self._spread.append(deviation or float(feats.double().square().sum()) or 1.0)

    def error(self, student: nn.Module, change: Callable[[int, Tensor], Tensor] | None = None) -> float:
        """Of `student`, which comes back as it was. change(point, features): what its features become before that."""
        total = 0.0
        with guard.evaluating(student), capturing(student, self._seam) as learner:
            for (args, kwargs), wanted in zip(map(copied, self._batches), self._wanted, strict=True):
                found = learner.features(*args, **kwargs)
                found = found if change is None else [change(i, f) for i, f in enumerate(found)]
                total += sum(
                    float((f.double() - w.double()).square().sum()) / s
                    for f, w, s in zip(found, wanted, self._spread, strict=True)
                )
        return total


def channels_at(feats: Tensor) -> int:
    """The axis of the channels: the last of vectors and tokens; of maps the second, or the last where the second is as
    long as the third and the last is not (N, H, W, C)."""
    if feats.ndim < 4:
        return feats.ndim - 1
    return feats.ndim - 1 if feats.shape[1] == feats.shape[2] != feats.shape[3] else 1
