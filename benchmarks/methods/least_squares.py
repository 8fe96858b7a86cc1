"""Layer-wise least squares: each layer that lost inputs is solved anew for the teacher's outputs, in closed form.

Source: He et al., ICCV 2017, arXiv 1707.06168, section 3 (reconstruction; the channels are those of the table's cut):
layers in order, inputs from the already cut network, targets from the teacher. Ridge towards the weights that the cut
left, in units of the mean diagonal of the inputs' Gram matrix (there is none in the paper; with few images there must
be). All in float64.
"""

import torch
from torch import nn

from benchmarks.methods.layers import columns, layers, point, wide_student
from benchmarks.methods.problem import Method, Problem
from understudy.cut import cut
from understudy.seam import capturing


@torch.no_grad()
def run(problem: Problem) -> nn.Module:
    wide = wide_student(problem)
    batches = problem.views_of_all(problem.options["rounds"])
    for layer in (layer for layer in layers(problem) if layer.narrowed):
        module = wide.get_submodule(layer.name)
        before = module.weight[:, layer.kept_in].flatten(1).double().T  # (inputs x kernel, outputs)
        gram, cross = 0.0, 0.0
        inputs, outputs = point(layer.name, "input"), point(layer.name, "output")
        with capturing(problem.teacher, outputs) as target, capturing(wide, inputs) as learner:
            for x in batches:
                seen = columns(module, learner.features(x)[0][:, layer.kept_in]).double()
                wanted = target.features(x)[0].flatten(2).transpose(1, 2).flatten(0, 1).double()
                if module.bias is not None:
                    wanted = wanted - module.bias.double()
                gram, cross = gram + seen.T @ seen, cross + seen.T @ wanted
        ridge = problem.options["ridge"] * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        solved = torch.linalg.solve(gram + ridge, cross + ridge @ before)
        module.weight[:, layer.kept_in] = solved.T.unflatten(1, (-1, *module.kernel_size)).to(module.weight.dtype)
    return cut(wide, problem.plan).eval()


METHOD = Method(
    "least_squares", "layer-wise least squares", "He et al., ICCV 2017", run, trains=False,
    published={"ridge": 1e-6, "rounds": 1},
    grid=({"ridge": 1e-6, "rounds": 1}, *({"ridge": r, "rounds": 8} for r in (1e-4, 1e-3, 1e-2, 1e-1))),
)  # fmt: skip
