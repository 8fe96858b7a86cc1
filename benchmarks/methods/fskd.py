"""FSKD: a 1x1 convolution after each layer, by least squares from the student's to the teacher's features, absorbed.

Source: Li et al., CVPR 2020, arXiv 1812.01839, and its published code: layers in order, each estimated with the ones
before it already corrected; m x m unknowns for m channels; absorbed into the convolution that it follows. Aligned are
the kept channels at the output of the convolution; published on the images as they are. A depthwise convolution cannot
absorb one and is passed over.
"""

import torch
from torch import nn

from benchmarks.methods.layers import layers, point
from benchmarks.methods.problem import Method, Problem
from mimicut.surgery.seam import capturing


@torch.no_grad()
def run(problem: Problem) -> nn.Module:
    student = problem.student()
    batches = problem.views_of_all(problem.options["rounds"])
    for layer in layers(problem):
        gram, cross = 0.0, 0.0
        where = point(layer.name, "output")
        with capturing(problem.teacher, where) as target, capturing(student, where) as learner:
            for x in batches:
                wanted = target.features(x)[0][:, layer.kept_out].transpose(0, 1).flatten(1).double()
                found = learner.features(x)[0].transpose(0, 1).flatten(1).double()
                gram, cross = gram + found @ found.T, cross + wanted @ found.T
        mix = cross @ torch.linalg.pinv(gram, hermitian=True)
        module = student.get_submodule(layer.name)
        module.weight.copy_(torch.einsum("om,mikl->oikl", mix, module.weight.double()))
        if module.bias is not None:
            module.bias.copy_(mix @ module.bias.double())
    return student


METHOD = Method(
    "fskd", "FSKD", "Li et al., CVPR 2020", run,
    trains=False, published={"rounds": 0}, grid=({"rounds": 0}, {"rounds": 8}),
)  # fmt: skip
