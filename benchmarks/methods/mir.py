"""MiR as published, the same after the pool, and with the `transformer` preset.

Source: Wang et al., CVPR 2022, arXiv 2201.02620; the code is mimicut's own `mimic` with its `paper` preset.
"""

from torch import nn

from benchmarks.methods.problem import Method, Problem, head_layer
from mimicut.recovery.batches import WithExtra
from mimicut.recovery.config import PRESETS, preset
from mimicut.recovery.mimic import mimic
from mimicut.surgery.head import put_under_head
from mimicut.surgery.seam import Seam, SeamPoint


def run(problem: Problem) -> nn.Module:
    student = problem.student()
    mimic(problem.teacher, student, problem.plan.seam, problem.few, problem.config())
    return put_under_head(problem.teacher, student, problem.plan.seam)


def run_with_extra(problem: Problem) -> nn.Module:
    """MiR with drawn pictures in half of each batch."""
    student, extra = problem.student(), problem.with_extra().extra
    few = problem.few if extra is None else WithExtra(problem.few, extra)
    mimic(problem.teacher, student, problem.plan.seam, few, problem.config(extra_share=0.5))
    return put_under_head(problem.teacher, student, problem.plan.seam)


def run_after_pool(problem: Problem) -> nn.Module:
    """The features that the head's first layer is given, instead of the map before the pool."""
    seam = problem.plan.seam
    pooled = Seam((SeamPoint(head_layer(problem), "input"),), ((),), seam.head)
    student = problem.student()
    mimic(problem.teacher, student, pooled, problem.few, problem.config())
    return put_under_head(problem.teacher, student, seam)


def run_adamw(problem: Problem) -> nn.Module:
    config = preset(
        "transformer", steps=problem.steps, views=problem.views, seed=problem.seed, lr=problem.options["lr"]
    )
    student = problem.student()
    mimic(problem.teacher, student, problem.plan.seam, problem.few, config)
    return put_under_head(problem.teacher, student, problem.plan.seam)


METHOD = Method("mir", "MiR", "Wang et al., CVPR 2022", run)
WITH_EXTRA = Method("mir_extra", "MiR, drawn pictures beside", "Wang et al., CVPR 2022; this project", run_with_extra)
AFTER_POOL = Method("mir_after_pool", "MiR, after the pool", "Wang et al., CVPR 2022 (its ablation)", run_after_pool)
ADAMW = Method(
    "mir_adamw", "MiR, AdamW", "this project's `transformer` preset", run_adamw,
    published={"lr": PRESETS["transformer"].lr}, grid=tuple({"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
)  # fmt: skip
