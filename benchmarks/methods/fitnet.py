"""FitNet: first the middle layer learns the teacher's through a regressor, then the whole network is distilled.

Source: Romero et al., ICLR 2015, arXiv 1412.6550. Stage one: squared error between the teacher's hint and a 1x1
convolution of the student's guided layer, training what lies before it. Stage two: cross-entropy plus distillation at
T = 3, whose weight falls from 4 to 1. Half of the steps each (assumption: the paper trains each until it converges).
The middle is the layer in the middle of the order of execution. Published learning rate 5e-3 (there with RMSProp).

The paper's student starts from nothing and so does its regressor. Ours is a piece of the teacher, which a random
regressor spoils: the grid also has one that starts as the student's own channels in their places ("kept").
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
        regressor = _regressor(problem, hint.points[0].module)

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


def _regressor(problem: Problem, layer: str) -> nn.Conv2d:
    """From the student's channels at the output of `layer` to the teacher's."""
    wide = problem.teacher.get_submodule(layer).out_channels
    kept = problem.plan.slices.get(f"{layer}.weight", {}).get(0, range(wide))
    regressor = nn.Conv2d(len(kept), wide, 1)
    if problem.options["regressor"] == "kept":
        with torch.no_grad():
            regressor.weight.zero_()[list(kept), range(len(kept))] = 1
            regressor.bias.zero_()
    return regressor.to(problem.device)


METHOD = Method(
    "fitnet", "FitNet", "Romero et al., ICLR 2015", run, labels=True,
    published={"lr": 5e-3, "regressor": "random"},
    grid=(
        *({"lr": lr, "regressor": "random"} for lr in (1e-3, 5e-3, PAPER.lr)),
        *({"lr": lr, "regressor": "kept"} for lr in (1e-3, 5e-3, PAPER.lr)),
    ),
)  # fmt: skip
