"""Cross Distillation: layer by layer, student and teacher features crossed; then cross-entropy on the labels.

Source: Bai et al., AAAI 2020, arXiv 1911.09450, and its published code. A layer that lost inputs learns by Adam
mu |student layer(teacher's input) - teacher layer(same)|^2 plus (1 - mu) |student layer(own input) - teacher
layer(same)|^2, with mu 0.6 for plain and 0.9 for residual networks, at 5e-4 and 1e-3, for 1,000 (3,000 in its scripts)
iterations, the rate times 0.1 after a third; in order. Then cross-entropy at 1e-5, for `steps` steps.

Here the channels are those of the table's cut, so nothing is left for the proximal step to choose; iterations are half
of `steps`, as 1,000 is of MiR's 2,000, and the grid has a higher rate to make up for their number; norms are in eval
mode (its code has them in train mode for plain networks); features are taken once, from four views of every image (one
of each from 500 images on, to bound the memory).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods.layers import Layer, layers, point, wide_student
from benchmarks.methods.problem import PAPER, Method, Problem, train
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import capturing

MU_PLAIN, MU_RESIDUAL = 0.6, 0.9
VIEWS = 4


def run(problem: Problem) -> nn.Module:
    wide = wide_student(problem)
    batches = problem.views_of_all(VIEWS if len(problem.few) < 500 else 1)
    mu = MU_RESIDUAL if problem.anatomy.blocks else MU_PLAIN
    random = torch.Generator().manual_seed(problem.seed)
    for layer in filter(lambda layer: layer.narrowed, layers(problem)):
        _fit(problem, wide, layer, batches, mu, random)
    student = cut(wide, problem.plan).train()
    return train(student, lambda x, y, _: F.cross_entropy(student(x), y), problem, lr=problem.options["lr"])


def _fit(
    problem: Problem, wide: nn.Module, layer: Layer, batches: list[Tensor], mu: float, random: torch.Generator
) -> None:
    inputs = point(layer.name, "input")
    with torch.no_grad(), capturing(problem.teacher, inputs) as lead, capturing(wide, inputs) as learner:
        theirs = torch.cat([lead.features(x)[0] for x in batches])
        own = torch.cat([learner.features(x)[0] for x in batches])
    teacher, student = (m.get_submodule(layer.name) for m in (problem.teacher, wide))
    weight = student.weight[:, layer.kept_in].detach().clone().requires_grad_()
    options = student.stride, student.padding, student.dilation
    steps, lr = problem.steps // 2, problem.options["layer_lr"]
    optimiser = torch.optim.Adam([weight], lr=lr)

    def missed(x: Tensor) -> Tensor:
        """The bias, if there is one, is the same on both sides."""
        with torch.no_grad():
            wanted = F.conv2d(x, teacher.weight, None, *options)
        return F.mse_loss(F.conv2d(x[:, layer.kept_in], weight, None, *options), wanted)

    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1.0 if step <= steps // 3 else 0.1)
        where = torch.randperm(len(own), generator=random)[: PAPER.batch_size]
        correct, imitate = missed(theirs[where]), missed(own[where])
        optimiser.zero_grad()
        (mu * correct + (1 - mu) * imitate).backward()
        optimiser.step()
    with torch.no_grad():
        student.weight[:, layer.kept_in] = weight


_RATES = ((1e-5, 1e-3), (1e-3, 1e-3), (1e-4, 5e-3), (1e-3, 5e-3), (5e-3, 5e-3), (2e-2, 5e-3))  # (end, layers)
METHOD = Method(
    "cross_distillation", "Cross Distillation (CD)", "Bai et al., AAAI 2020", run, labels=True,
    published={"lr": 1e-5, "layer_lr": 1e-3},
    grid=tuple({"lr": lr, "layer_lr": own} for lr, own in _RATES),
)  # fmt: skip
