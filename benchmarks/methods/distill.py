"""Knowledge distillation from softened logits, with and without labels.

Source: Hinton et al. 2015, arXiv 1503.02531: temperature T = 4, the soft part times T squared; with labels 0.9 of
it and 0.1 of cross-entropy, the usual weights (the paper: considerably lower weight on the hard targets). No few-sample
learning rate was read: MiR's stands for the published one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods.problem import PAPER, Method, Problem, train

TEMPERATURE = 4.0
SOFT = 0.9


def soft_loss(logits_nk: Tensor, teacher_nk: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """T^2 KL(teacher || student) of the softened classes, mean over the images."""
    log_student, log_teacher = (F.log_softmax(z / temperature, 1) for z in (logits_nk, teacher_nk))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def run(problem: Problem) -> nn.Module:
    student = problem.student().train()

    def loss_of(x: Tensor, y: Tensor | None, _: float) -> Tensor:
        with torch.no_grad():
            wanted = problem.teacher(x)
        logits = student(x)
        if y is None:
            return soft_loss(logits, wanted)
        return SOFT * soft_loss(logits, wanted) + (1 - SOFT) * F.cross_entropy(logits, y)

    return train(student, loss_of, problem, lr=problem.options["lr"])


def run_with_extra(problem: Problem) -> nn.Module:
    """Without labels, and with drawn pictures in half of each batch."""
    return run(problem.with_extra())


_LRS = {"published": {"lr": PAPER.lr}, "grid": tuple({"lr": lr} for lr in (2e-3, 5e-3, PAPER.lr, 5e-2, 1e-1))}
LABELLED = Method("distill_labels", "distillation (KD)", "Hinton et al. 2015", run, labels=True, **_LRS)
UNLABELLED = Method("distill", "distillation (KD), no labels", "Hinton et al. 2015", run, **_LRS)
WITH_EXTRA = Method(
    "distill_extra", "distillation (KD), no labels, drawn pictures beside", "Hinton et al. 2015; this project",
    run_with_extra, **_LRS,
)  # fmt: skip
