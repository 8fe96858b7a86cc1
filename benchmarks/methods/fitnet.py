"""FitNet: first the middle layer learns the teacher's through a regressor, then the whole network is distilled.

Source: Romero et al., ICLR 2015, arXiv 1412.6550. Stage one: squared error between the teacher's hint and a 1x1
convolution of the student's guided layer, training what lies before it. Stage two: cross-entropy plus distillation at
T = 3, whose weight falls from 4 to 1. Half of the steps each (assumption: the paper trains each until it converges).
The middle is that of the residual blocks, or of the convolutions where there are none. Published learning rate 5e-3
(there with RMSProp).

The paper's student starts from nothing and so does its regressor. Ours is a piece of the teacher, which a random
regressor spoils: the grid also has one that starts as the student's own channels in their places ("kept").
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods.distill import soft_loss
from benchmarks.methods.layers import convolutions, point
from benchmarks.methods.problem import Method, Problem, train
from mimicut.base.errors import InputError
from mimicut.surgery.seam import capturing

TEMPERATURE = 3.0
WEIGHTS = (4.0, 1.0)  # of the distillation, at the start and at the end of stage two


def run(problem: Problem) -> nn.Module:
    student, lr, batches = problem.student().train(), problem.options["lr"], problem.batches()
    layer = middle(problem)
    hint = point(layer, "output")
    with capturing(problem.teacher, hint) as target, capturing(student, hint) as learner:
        regressor = _regressor(problem, layer, *(_width(problem, m) for m in (problem.teacher, problem.student())))

        def hint_loss(x: Tensor, y: Tensor | None, _: float) -> Tensor:
            with torch.no_grad():
                wanted = target.features(x)[0]
            return F.mse_loss(regressor(learner.features(x)[0]), wanted)

        learning = [*student.parameters(), *regressor.parameters()]
        train(student, hint_loss, problem, lr=lr, steps=problem.steps // 2, parameters=learning, batches=batches)

    def loss_of(x: Tensor, y: Tensor | None, done: float) -> Tensor:
        with torch.no_grad():
            wanted = problem.teacher(x)
        logits = student(x)
        weight = WEIGHTS[0] + (WEIGHTS[1] - WEIGHTS[0]) * done
        soft = soft_loss(logits, wanted, TEMPERATURE) / TEMPERATURE**2  # the paper scales by its weight alone
        return F.cross_entropy(logits, y) + weight * soft

    return train(student.train(), loss_of, problem, lr=lr, steps=problem.steps - problem.steps // 2, batches=batches)


def middle(problem: Problem) -> str:
    """The middle one of the residual blocks; of the channel-mixing convolutions where there is no block."""
    blocks = {block.name for block in problem.anatomy.blocks}
    names = [name for name in problem.calls if name in blocks] or convolutions(problem)
    return names[len(names) // 2]


def _width(problem: Problem, model: nn.Module) -> int:
    """Channels of `model` at the hint."""
    with torch.no_grad(), capturing(model, point(middle(problem), "output")) as capture:
        return capture.features(problem.few.batch([0]).to(problem.device))[0].shape[1]


def _regressor(problem: Problem, layer: str, wide: int, thin: int) -> nn.Conv2d:
    """From the student's `thin` channels at the output of `layer` to the teacher's `wide` ones."""
    kept = problem.plan.slices.get(f"{layer}.weight", {}).get(0, range(wide))
    regressor = nn.Conv2d(thin, wide, 1)
    if problem.options["regressor"] == "kept":
        if len(kept) != thin:
            raise InputError(
                f"FitNet: {thin} of {wide} channels are left at {layer}; which is not known: regressor=random"
            )
        with torch.no_grad():
            regressor.weight.zero_()[list(kept), range(len(kept))] = 1
            regressor.bias.zero_()
    return regressor.to(problem.device)


METHOD = Method(
    "fitnet", "FitNet", "Romero et al., ICLR 2015", run, labels=True,
    published={"lr": 5e-3, "regressor": "random"},
    grid=(
        {"lr": 5e-3, "regressor": "random"},
        *({"lr": lr, "regressor": "kept"} for lr in (3e-4, 1e-3, 5e-3, 2e-2, 5e-2)),
    ),
)  # fmt: skip
