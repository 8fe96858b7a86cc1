"""How far a student is from its teacher at the seam, on images that do not train it; and the best student so far."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.recovery.batches import Batch, copied
from mimicut.recovery.seam_error import mean_squared_errors, squared_deviation, squared_error
from mimicut.surgery.seam import Seam, capturing


class Judge:
    """The error of students at the seam on fixed images; the teacher's features are computed once.

    Both networks run in eval mode and without gradients, and come back as they were.

    Args:
        teacher: The network to imitate.
        seam: Where its features are.
        batches: The images.
        student_seam: The same points in the students, where their module names differ.
        loss_units: Of each seam point, what the loss of mimicking divides its mean squared error by. With them the
            error is that loss, to be compared with it. Without, it is the squared error over the teacher's squared
            deviation (`seam_error`).
    """

    def __init__(
        self,
        teacher: nn.Module,
        seam: Seam,
        batches: Iterable[Batch],
        *,
        student_seam: Seam | None = None,
        loss_units: Sequence[float] | None = None,
    ):
        self._seam, self._batches, self._loss_units = student_seam or seam, list(batches), loss_units
        with guard.evaluating(teacher), capturing(teacher, seam) as capture:
            self._wanted = [capture.features(*args, **kwargs) for args, kwargs in map(copied, self._batches)]
        self.widest = max((f.shape[channels_at(f)] for f in self._wanted[0]), default=0)  # channels of a point
        self._deviations: list[float] = []
        if loss_units is None:
            for features in zip(*self._wanted, strict=True):
                deviation, square = squared_deviation(torch.cat(features))
                self._deviations.append(deviation or square or 1.0)

    def error(
        self, student: nn.Module, change: Callable[[int, Tensor], Tensor] | None = None, seam: Seam | None = None
    ) -> float:
        """Measure the error of a student.

        Args:
            student: Comes back as it was.
            change: From (index of a seam point, features) to what the features become before they are compared.
            seam: The points in this student, where they are not those of the other students.
        """
        total, images = 0.0, 0
        with guard.evaluating(student), capturing(student, seam or self._seam) as capture:
            for (args, kwargs), wanted in zip(map(copied, self._batches), self._wanted, strict=True):
                found = capture.features(*args, **kwargs)
                found = found if change is None else [change(i, f) for i, f in enumerate(found)]
                images += len(wanted[0])
                if self._loss_units is None:
                    total += squared_error(found, wanted, self._deviations)
                else:
                    errors = zip(mean_squared_errors(found, wanted), self._loss_units, strict=True)
                    total += len(wanted[0]) * sum(float(error) / unit for error, unit in errors)
        return total if self._loss_units is None else total / images


class BestStudent:
    """Remembers a student as it was at the step at which a judge found the least error.

    errors: (step, error) of each judgement. step: of the least. tensors: copies of the student's then, by name.
    """

    def __init__(self, student: nn.Module, judge: Judge):
        self._student, self._judge = student, judge
        self.errors: list[tuple[int, float]] = []
        self.step = 0
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def judge(self, step: int) -> None:
        """Judge the student as it is after so many steps."""
        error = self._judge.error(self._student)
        if not self.errors or error < min(e for _, e in self.errors):
            self.step = step
            self.tensors = {name: t.detach().clone() for name, t in guard.named_tensors(self._student).items()}
        self.errors.append((step, error))

    @torch.no_grad()
    def restore(self) -> None:
        """Make the student what it was at its best."""
        own = guard.named_tensors(self._student)
        guard.put_back((own[name], value) for name, value in self.tensors.items())


def channels_at(feats: Tensor) -> int:
    """Which axis of features has the channels.

    The last of vectors and tokens; of maps the second, or the last where the second is as long as the third and the
    last is not (N, H, W, C).

    >>> channels_at(torch.zeros(2, 8, 4, 4)), channels_at(torch.zeros(2, 4, 4, 8)), channels_at(torch.zeros(2, 9, 8))
    (1, 3, 2)
    """
    if feats.ndim < 4:
        return feats.ndim - 1
    return feats.ndim - 1 if feats.shape[1] == feats.shape[2] != feats.shape[3] else 1
