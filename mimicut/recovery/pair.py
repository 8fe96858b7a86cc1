"""A teacher and a student that is to learn its features: checks that they fit, and bringing them where they run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.surgery.seam import Seam


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, and the seam of each: the same points in the same order, names may differ."""

    teacher: nn.Module
    student: nn.Module
    seam: Seam
    student_seam: Seam

    @classmethod
    def of(cls, teacher: nn.Module, student: nn.Module, seam: Seam | Sequence[Seam]) -> "Pair":
        """The pair with one seam for both, or with the teacher's and the student's.

        Raises:
            InputError: There are more or fewer than two of them.
        """
        if not isinstance(seam, Sequence):
            return cls(teacher, student, seam, seam)
        if len(seam) != 2:
            raise InputError(f"mimicking: found {len(seam)} seams, expected one, or the teacher's and the student's")
        return cls(teacher, student, *seam)

    def head_tensors(self) -> set[int]:
        """The ids of the student's tensors that only act after the seam."""
        names = set(self.student_seam.head)
        return {id(tensor) for name, tensor in guard.named_tensors(self.student).items() if name in names}


def check_pair(pair: Pair) -> None:
    """Check what can be checked before a network runs.

    Raises:
        InputError: The seams have different numbers of points, or the student shares tensors with the teacher.
        UnsupportedModel: Tensors of a network are on several devices, or hold no data.
    """
    teacher, student, seam, student_seam = pair.teacher, pair.student, pair.seam, pair.student_seam
    if len(seam.points) != len(student_seam.points):
        raise InputError(
            f"mimicking: the teacher's seam has {len(seam.points)} points, the student's {len(student_seam.points)}; "
            "name as many, in the same order"
        )
    for who, model in (("teacher", teacher), ("student", student)):
        devices = {t.device for t in guard.named_tensors(model).values()}
        if torch.device("meta") in devices or len(devices) > 1:
            raise UnsupportedModel(
                f"mimicking: the tensors of the {who} are on {', '.join(sorted(map(str, devices)))}; expected one "
                "device that holds data: load the weights, then .to() one device"
            )
    storages = {t.untyped_storage().data_ptr() for t in guard.named_tensors(teacher).values() if t.numel()}
    shared = [
        name
        for name, t in guard.named_tensors(student).items()
        if t.numel() and t.untyped_storage().data_ptr() in storages
    ]
    if shared:
        raise InputError(
            f"mimicking: the student shares the tensor {shared[0]!r} with the teacher, training would change both; "
            "give copy.deepcopy(student)"
        )


def check_features(seam: Seam, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Check the first features of a teacher (`wanted`) and its student (`found`) against each other.

    Raises:
        InputError: Their shapes differ, they are not floats, or no parameter acts before the seam.
    """
    for point, want, have in zip(seam.points, wanted, found, strict=True):
        if want.shape != have.shape:
            raise InputError(
                f"mimicking at the seam point {point}: the teacher gives {tuple(want.shape)}, the student "
                f"{tuple(have.shape)}, axis 0 being images; cut nothing at the seam itself, or name a seam where both "
                "agree (--seam, find_seam(points=...); where module names differ, in Python, (teacher's, student's))"
            )
        if not want.is_floating_point():
            raise InputError(f"mimicking at the seam point {point}: found {want.dtype}, expected floating point")
    if not any(feat.requires_grad for feat in found):
        raise InputError(
            "mimicking: no gradient reaches any parameter of the student from its features: its code switches "
            "gradients off (torch.no_grad, torch.inference_mode, detach), or no parameter acts before the seam. Take "
            "that out of the network's code; or train nothing, with --effort quick (steps=0 in Python): then the "
            "layers are only solved in closed form"
        )


def device_for(name: str | None, student: nn.Module) -> torch.device:
    """The device of that name, with its index; without a name the one where the student is."""
    if name is None:
        return next((t.device for t in guard.named_tensors(student).values()), torch.device("cpu"))
    return guard.resolve_device(name)


def _is_at(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    return all(
        t.device == device and (t.dtype == dtype or not t.is_floating_point())
        for t in guard.named_tensors(model).values()
    )


def placed_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`model` itself where it is on `device` in `dtype` already; else a copy that is, in eval mode."""
    if _is_at(model, device, dtype):
        return model
    copy = guard.full_copy(model).eval()
    for tensor in guard.named_tensors(copy).values():
        tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
    return copy


@contextmanager
def placed(student: nn.Module, device: torch.device, dtype: torch.dtype, head: set[int]) -> Iterator[None]:
    """`student` on `device` in `dtype` inside; afterwards where and what it was, its trained values kept.

    Args:
        student: The network.
        device: Where it is inside.
        dtype: Of its floats inside.
        head: Ids of tensors that get back the very same data.
    """
    if _is_at(student, device, dtype):
        yield
        return
    original = {id(t): (t, t.data) for t in guard.named_tensors(student).values()}
    student.zero_grad(set_to_none=True)
    for tensor, data in original.values():
        tensor.data = data.to(device, dtype if data.is_floating_point() else None)
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)
        for key, (tensor, data) in original.items():
            tensor.data = data if key in head else tensor.data.to(data.device, data.dtype)
