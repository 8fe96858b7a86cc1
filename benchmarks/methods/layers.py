"""What the layer-by-layer methods share: convolutions in the order they run, and what the cut takes from each."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods.problem import Problem
from mimicut.base.guard import full_copy
from mimicut.surgery.seam import Seam, SeamPoint


def point(module: str, side: str) -> Seam:
    """One place to capture features at."""
    return Seam((SeamPoint(module, side),), (), ())


def mixes(module: nn.Module) -> bool:
    """A convolution that mixes channels: neither depthwise nor grouped."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def convolutions(problem: Problem) -> list[str]:
    """The channel-mixing convolutions in the order of their first call."""
    return [name for name in problem.calls if mixes(problem.teacher.get_submodule(name))]


@dataclass(frozen=True)
class Layer:
    """kept_in, kept_out: channels that the plan leaves; all of them where it cuts nothing."""

    name: str
    kept_in: list[int]
    kept_out: list[int]
    narrowed: bool  # the plan takes inputs of it


def layers(problem: Problem) -> list[Layer]:
    """The channel-mixing convolutions in order, from the first one that the plan touches."""
    found: list[Layer] = []
    for name in convolutions(problem):
        weight = problem.teacher.get_submodule(name).weight
        slices = problem.plan.slices.get(f"{name}.weight", {})
        if slices or found:
            kept = [list(slices.get(dim, range(weight.shape[dim]))) for dim in (1, 0)]
            found.append(Layer(name, *kept, narrowed=1 in slices))
    return found


@torch.no_grad()
def wide_student(problem: Problem) -> nn.Module:
    """The cut as zeros in a copy of full width: what the plan removes is still computed and nobody reads it.

    `mimicut.cut` of it is the student, so a layer-wise fit can work where teacher and student have equal shapes.
    """
    wide = full_copy(problem.teacher)
    for layer in layers(problem):
        weight = wide.get_submodule(layer.name).weight
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[layer.kept_in] = False
        weight[:, gone] = 0
    return wide


def columns(module: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution sees: (images x positions, inputs x kernel), as in its weight."""
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NotImplementedError(f"unfolding a convolution with padding {module.padding!r} ({module.padding_mode})")
    seen = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return seen.transpose(1, 2).flatten(0, 1)
