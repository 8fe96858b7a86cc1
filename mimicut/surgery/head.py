"""REPLACE: the student's body under the teacher's own head."""

import torch
from torch import nn

from mimicut.base.errors import InputError, LawBroken
from mimicut.base.guard import full_copy, named_tensors, same_bits
from mimicut.surgery.seam import Seam


def put_under_head(teacher: nn.Module, student: nn.Module, seam: Seam) -> nn.Module:
    """A copy of `student`, in eval mode, whose head tensors (`seam.head`) are the teacher's bit for bit.

    `requires_grad` of the head is the teacher's, of the body the student's. Both networks given are untouched. The head
    must have the same names in both: of a student with other module names, rename the head's modules first.

    Raises: InputError when the student has no such head; LawBroken when the copied head is not bit-identical.
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
                f"{_kind(source)} in the teacher; cut nothing behind the seam and keep its dtype"
            )
        with torch.no_grad():
            target.copy_(source)
        target.requires_grad_(source.requires_grad)
    check_head(teacher, model, seam)
    return model


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_head(teacher: nn.Module, model: nn.Module, seam: Seam, part: str = "") -> None:
    """Law 4: every tensor of the head is bit-identical in both; with `part`, the submodule that `seam` is of, also
    every tensor outside it.

    Raises: LawBroken naming the first that is not.
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
                "put the body under the teacher's head again with replace()"
            )
