"""BP: fine-tuning with cross-entropy on the labels of the few images.

Source: the baseline "BP" of MiR, arXiv 2201.02620, and PRACTISE, arXiv 2202.07861: SGD, learning rate 1e-4 on the whole
network, the schedule of MiR. Their public code means to freeze the head and does not; both are tried here.
"""

from torch import nn
from torch.nn import functional as F

from benchmarks.methods.problem import Method, Problem, train


def run(problem: Problem) -> nn.Module:
    student = problem.student().train()
    frozen = set(problem.plan.seam.head) if problem.options["head"] == "frozen" else set()
    learning = [p for name, p in student.named_parameters() if name not in frozen]
    return train(
        student, lambda x, y, _: F.cross_entropy(student(x), y), problem, lr=problem.options["lr"], parameters=learning
    )


METHOD = Method(
    "fine_tune", "fine-tuning, cross-entropy (BP)", "MiR, CVPR 2022 (its baseline)", run, labels=True,
    published={"lr": 1e-4, "head": "trained"},
    grid=(
        *({"lr": lr, "head": "trained"} for lr in (1e-4, 3e-4, 1e-3, 5e-3, 2e-2, 5e-2, 1e-1)),
        *({"lr": lr, "head": "frozen"} for lr in (1e-3, 2e-2)),
    ),
)  # fmt: skip
