"""Batch norm recalibration: the statistics are measured anew on the few images, no weight changes.

Source: as in EagleEye (Li et al., ECCV 2020, arXiv 2007.02491), adaptive batch normalisation: running statistics
forgotten, then averaged over forward passes in train mode.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.methods.problem import Method, Problem


@torch.no_grad()
def run(problem: Problem) -> nn.Module:
    student = problem.student()
    for module in student.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the passes
            module.train()
    for x in problem.views_of_all(problem.options["rounds"]):
        student(x)
    return student.eval()


# rounds: views of every image that are averaged over; 0: the images as they are.
METHOD = Method(
    "batch_norm", "BatchNorm recalibration", "EagleEye, ECCV 2020", run,
    trains=False, published={"rounds": 0}, grid=({"rounds": 0}, {"rounds": 16}),
)  # fmt: skip
