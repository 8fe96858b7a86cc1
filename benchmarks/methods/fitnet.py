"""FitNet: first the middle layer learns the teacher's through a regressor, then the whole network is distilled.

Source: Romero et al., ICLR 2015, arXiv 1412.6550. Stage one: squared error between the teacher's hint and a 1x1
convolution of the student's guided layer, training what lies before it. Stage two: cross-entropy plus distillation at
T = 3, whose weight falls from 4 to 1. Half of the steps each (assumption: the paper trains each until it converges). The
middle is the layer in the middle of the order of execution. Published learning rate 5e-3 (there with RMSProp).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods.distill import soft_loss
from benchmarks.methods.layers import convolutions, point
from benchmarks.methods.problem import PAPER, Method, Problem, train
from understudy.seam import capturing

TEMPERATURE = 3.0
WEIGHTS = (4.0, 1.0)  # of the distillation, at the start and at the end of stage two


def run(problem: Problem) -> nn.Module:
    student, lr = problem.student().train(), problem.options["lr"]
    order = convolutions(problem.teacher, problem.few.batch([0]).to(problem.device))
    hint = point(order[len(order) // 2], "output")
    with capturing(problem.teacher, hint) as target, capturing(student, hint) as learner:
        wide, thin = (_channels(m, hint.points[0].module) for m in (problem.teacher, student))
        regressor = nn.Conv2d(thin, wide, 1).to(problem.device)

        def hint_loss(x: Tensor, y: Tensor | None, _: float) -> Tensor:
            with torch.no_grad():
                wanted = target.features(x)[0]
            return F.mse_loss(regressor(learner.features(x)[0]), wanted)

        learning = [*student.parameters(), *regressor.parameters()]
        train(student, hint_loss, problem, lr=lr, steps=problem.steps // 2, parameters=learning)

    def loss_of(x: Tensor, y: Tensor | None, done: float) -> Tensor:
        with torch.no_grad():
            wanted = problem.teacher(x)
        logits = student(x)
        weight = WEIGHTS[0] + (WEIGHTS[1] - WEIGHTS[0]) * done
        soft = soft_loss(logits, wanted, TEMPERATURE) / TEMPERATURE**2  # the paper scales by its weight alone
        return F.cross_entropy(logits, y) + weight * soft

    return train(student.train(), loss_of, problem, lr=lr, steps=problem.steps - problem.steps // 2)


def _channels(model: nn.Module, name: str) -> int:
    return model.get_submodule(name).weight.shape[0]


METHOD = Method(
    "fitnet", "FitNet", "Romero et al., ICLR 2015", run, labels=True,
    published={"lr": 5e-3}, grid=tuple({"lr": lr} for lr in (1e-3, 5e-3, PAPER.lr, 5e-2)),
)  # fmt: skip
