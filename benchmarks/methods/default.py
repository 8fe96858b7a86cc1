"""mimicut's own default: closed form, norms, mimic with Muon and mixing; at the table's cut, and where it would cut.

Beside the few images it mimics on extra ones: those that it draws itself, none, or other people's pictures
(`benchmarks.real fetch`). Of 200 images and more one in ten is set aside to choose by. With 0 steps it is the closed
form alone.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.methods.problem import Method, Problem
from benchmarks.real.pictures import DEFAULT
from mimicut.base.memory import DEFAULT_BYTES, PASSES
from mimicut.inputs.extra_images import GENERATED, NONE, read_extra
from mimicut.inputs.image_set import ImageSet
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.planner import make_plan
from mimicut.recovery.batches import Source, WithExtra
from mimicut.recovery.config import preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.recover import CHOOSE_FROM, CHOOSE_SHARE, recover
from mimicut.surgery.head import put_under_head as replace_body

MEMORY = int(PASSES * DEFAULT_BYTES)  # what the stages of `compress` may hold by default
PICTURES = DEFAULT / "pictures" / "other"  # other people's


def run(problem: Problem, extra: str | Path = GENERATED) -> nn.Module:
    """The default recipe on the table's cut."""
    fit, choose = parts(problem)
    return recovered(problem, fit, choose, extra)


def run_own_cut(problem: Problem, extra: str | Path = GENERATED) -> nn.Module:
    """The same MACs, cut where the images say."""
    fit, choose = parts(problem)
    evidence = channel_evidence(
        problem.teacher, problem.anatomy, fit, views=problem.views, seed=problem.seed, max_memory=MEMORY
    )
    macs = problem.plan.macs
    keep = (macs["student"] + 0.5) / macs["teacher"]
    plan = make_plan(problem.teacher, problem.anatomy, keep=keep, evidence=evidence)
    return recovered(replace(problem, plan=plan), fit, choose, extra)


def run_with_pictures(problem: Problem) -> nn.Module:
    """As `run_own_cut`, with other people's pictures beside the few images."""
    return run_own_cut(problem, PICTURES)


def recovered(problem: Problem, fit: ImageSet, choose: ImageSet | None, extra: str | Path = GENERATED) -> nn.Module:
    """The student of the problem's plan, recovered and under the teacher's head. Options are those of MimicConfig."""
    student, plan = problem.student(), problem.plan
    config = preset("default", views=problem.views, seed=problem.seed, steps=problem.steps)
    config = replace(config, **problem.options)
    few: Source = fit
    if config.steps:  # as `compress`: without mimicking there is no use for them
        most = config.steps * config.batch_size
        beside = read_extra(extra, fit, problem.views, seed=problem.seed, memory_bytes=DEFAULT_BYTES, most=most)
        few = fit if beside is None else WithExtra(fit, beside)
    recover(CutStudent(problem.teacher, student, problem.anatomy, plan), few, config, choose=choose, max_memory=MEMORY)
    return replace_body(problem.teacher, student, plan.seam)


def parts(problem: Problem) -> tuple[ImageSet, ImageSet | None]:
    """Images to fit, and to choose by, if there are enough for that."""
    few = problem.few
    if len(few) < CHOOSE_FROM:
        return few, None
    every = round(1 / CHOOSE_SHARE)
    fit, choose = ([i for i in range(len(few)) if bool(i % every) is kept] for kept in (True, False))
    return few.subset(fit), few.subset(choose)


# What is left out or put in place of each part, for the ablation.
WITHOUT = (
    {}, {"start": "cut"}, {"mixing": "none"}, {"norm_mode": "train"},
    {"optimizer": "adamw", "momentum": 0.9, "lr": 1e-3},
)  # fmt: skip
SAME_CUT = Method("mimicut_same_cut", "mimicut, the table's cut", "this project", run, grid=WITHOUT[:1])
OWN_CUT = Method("mimicut", "mimicut, its own cut", "this project", run_own_cut, blocks=True, grid=WITHOUT)
NO_EXTRA = Method(
    "mimicut_no_extra", "mimicut, the few images alone", "this project", partial(run_own_cut, extra=NONE), blocks=True
)
WITH_PICTURES = Method(
    "mimicut_pictures", "mimicut, other people's pictures beside", "this project",
    run_with_pictures, blocks=True,
)  # fmt: skip
