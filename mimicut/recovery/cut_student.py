"""A network and the teacher that it was cut from, as the recovery takes them."""

from dataclasses import dataclass

from torch import nn

from mimicut.anatomy.graph import Anatomy
from mimicut.surgery.plan import Plan


@dataclass(frozen=True)
class CutStudent:
    """A student, the teacher that it was cut from, the teacher's anatomy, and the plan by which it was cut."""

    teacher: nn.Module
    student: nn.Module
    anatomy: Anatomy
    plan: Plan
