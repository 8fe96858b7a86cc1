"""REPLACE: the student's body under the teacher's own head."""

import torch
from torch import nn

from mimicut.base.errors import InputError, LawBroken
from mimicut.base.guard import full_copy, named_tensors, same_bits
from mimicut.surgery.seam import Seam


def put_under_head(teacher: nn.Module, student: nn.Module, seam: Seam) -> nn.Module:
    """Copy a student and give the copy the teacher's head, bit for bit. Both networks stay untouched.

    Args:
        teacher: the network whose head tensors (`seam.head`) are taken.
        student: the network whose body is taken. Its head must have the same names, shapes and dtypes as the
            teacher's; rename the head's modules first where they differ.
        seam: where the body ends and the head begins.

    Returns:
        The copy in eval mode. `requires_grad` of the head is the teacher's, of the body the student's.

    Raises:
        InputError: the student has no such head.
        LawBroken: the copied head is not bit-identical.

    Source: MiR (Wang et al., CVPR 2022, arXiv 2201.02620).
    """
    model = full_copy(student).eval()
    theirs, ours = named_tensors(teacher), named_tensors(model)
    for name in seam.head:
        if name not in theirs or name not in ours:
            who = "teacher" if name not in theirs else "student"
            near = [n for n in (ours if who == "student" else theirs) if n.endswith(name.rsplit(".", 1)[-1])][-3:]
            raise InputError(
                f"putting the student under the teacher's head: the {who} has no tensor {name!r}"
                + (f"; near it: {', '.join(near)}" if near else "")
                + "; the head must have the same names in both"
            )
        source, target = theirs[name], ours[name]
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise InputError(
                f"putting the student under the teacher's head: {name!r} is {_kind(target)} in the student and "
                f"{_kind(source)} in the teacher; cut nothing after the seam and keep its dtype"
            )
        with torch.no_grad():
            target.copy_(source)
        target.requires_grad_(source.requires_grad)
    check_head(teacher, model, seam)
    return model


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_head(teacher: nn.Module, model: nn.Module, seam: Seam, part: str = "") -> None:
    """Check law 4: every tensor of the head is bit-identical in both networks.

    Args:
        teacher: the teacher.
        model: the network that must have its head.
        seam: where the body ends and the head begins.
        part: the submodule that `seam` belongs to, if it is not the whole network; then every tensor outside that
            submodule is checked too.

    Raises:
        LawBroken: a tensor is missing or differs; the first one is named.
    """
    theirs, ours = named_tensors(teacher), named_tensors(model)
    inside = f"{part}." if part else ""
    head = [inside + name for name in seam.head]
    head += [name for name in {**theirs, **ours} if not name.startswith(inside)]
    for name in head:
        if name not in theirs or name not in ours:
            raise LawBroken(f"checking the head: {name!r} is missing in the {'model' if name in theirs else 'teacher'}")
        if not same_bits(theirs[name], ours[name]):
            raise LawBroken(
                f"checking the head: {name!r} is not bit-identical to the teacher's; the result must not be trusted: "
                "put the body under the teacher's head again with put_under_head()"
            )
