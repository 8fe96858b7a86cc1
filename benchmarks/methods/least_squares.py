"""Layer-wise least squares: each layer that lost inputs is solved anew for the teacher's outputs, in closed form.

Source: He et al., ICCV 2017, arXiv 1707.06168, section 3 (reconstruction; the channels are those of the table's cut):
layers in order, inputs from the already cut network, targets from the teacher. The last layer of a residual branch also
makes up for the error that the shortcut brings (the paper's multi-branch section), here for identity shortcuts and
through the norm that follows the layer. Ridge towards the weights that the cut left, in units of the mean diagonal of
the inputs' Gram matrix (there is none in the paper; with few images there must be). All in float64.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks.methods.layers import columns, layers, mixes, point, wide_student
from benchmarks.methods.problem import Method, Problem
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import capturing


@torch.no_grad()
def run(problem: Problem) -> nn.Module:
    wide = wide_student(problem)
    batches = problem.views_of_all(problem.options["rounds"])
    for layer in filter(lambda layer: layer.narrowed, layers(problem)):
        module = wide.get_submodule(layer.name)
        before = module.weight[:, layer.kept_in].flatten(1).double().T  # (inputs x kernel, outputs)
        gram, cross = 0.0, 0.0
        inputs, outputs = point(layer.name, "input"), point(layer.name, "output")
        with ExitStack() as stack:
            target, learner = (
                stack.enter_context(c) for c in (capturing(problem.teacher, outputs), capturing(wide, inputs))
            )
            missed = shortcut_error(problem, wide, layer.name, stack)
            for x in batches:
                seen = columns(module, learner.features(x)[0][:, layer.kept_in]).double()
                wanted = target.features(x)[0].double()
                if missed is not None:
                    wanted = wanted + missed(x)
                wanted = wanted.flatten(2).transpose(1, 2).flatten(0, 1)
                if module.bias is not None:
                    wanted = wanted - module.bias.double()
                gram, cross = gram + seen.T @ seen, cross + seen.T @ wanted
        ridge = problem.options["ridge"] * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        solved = torch.linalg.solve(gram + ridge, cross + ridge @ before)
        module.weight[:, layer.kept_in] = solved.T.unflatten(1, (-1, *module.kernel_size)).to(module.weight.dtype)
    return cut(wide, problem.plan).eval()


def shortcut_error(
    problem: Problem, wide: nn.Module, layer: str, stack: ExitStack
) -> Callable[[Tensor], Tensor] | None:
    """Teacher's shortcut minus the student's, in units of the layer's own output; None where it ends no such branch."""
    order = problem.calls
    for block in problem.anatomy.blocks:
        inside = [n for n in order if n.startswith(f"{block.name}.") and mixes(problem.teacher.get_submodule(n))]
        if not (block.identity and inside and inside[-1] == layer):
            continue
        module = problem.teacher.get_submodule(layer)
        norm = problem.teacher.get_submodule(order[order.index(layer) + 1])
        if not isinstance(norm, nn.BatchNorm2d) or norm.num_features != module.out_channels:
            return None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        # A channel that the norm all but removes can make up for nothing.
        back = torch.where(scale.abs() > 1e-3, 1 / scale, 0.0)[:, None, None]
        place = point(block.name, "input")
        lead, own = (stack.enter_context(capturing(m, place)) for m in (problem.teacher, wide))
        return lambda x: back * (lead.features(x)[0].double() - own.features(x)[0].double())
    return None


METHOD = Method(
    "least_squares", "layer-wise least squares", "He et al., ICCV 2017", run, trains=False,
    published={"ridge": 1e-6, "rounds": 0},
    grid=({"ridge": 1e-6, "rounds": 0}, *({"ridge": r, "rounds": 8} for r in (1e-4, 1e-2, 1e-1, 1.0))),
)  # fmt: skip
