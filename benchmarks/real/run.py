"""Runs one cell on the real pictures, and lists the cells in an order in which a stopped sweep is balanced."""

import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cell import _peak, _start_peak, _wait
from benchmarks.methods import METHODS, Problem, default
from benchmarks.protocol import Cell
from benchmarks.real.task import Exam, few_images, found, teacher_of
from mimicut.anatomy.cost import Cost, count
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.graph import Anatomy
from mimicut.base.environment import platform_kind, versions
from mimicut.base.guard import seeded
from mimicut.inputs.extra_images import GENERATED, NONE
from mimicut.inputs.teacher import Teacher
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.importance import Evidence
from mimicut.planning.planner import make_plan
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan

TEACHERS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
# What the page stands for; further values are run by naming them, and shown beside.
KEEPS, IMAGES, STEPS, SEEDS, SIZES = (0.7, 0.5), (50,), (100,), (2021,), (160,)
OWN = "mimicut"
OURS = (OWN, "mimicut_no_extra", "mimicut_pictures")  # with drawn pictures beside the few, without, with other people's
# In the order of a condition's cells: what is compared first comes first.
NAMED = (OWN, "mir", "distill", "mimicut_no_extra", "mimicut_pictures", "none")
ALL = (*NAMED, "mimicut_same_cut", "batch_norm", "least_squares", "practise")


@dataclass(frozen=True)
class Where:
    """What differs from machine to machine and is no part of a cell."""

    folder: Path
    device: str = "cpu"
    threads: int = 1


def cells(
    teachers: Sequence[str] = TEACHERS, keeps: Sequence[float] = KEEPS, images: Sequence[int] = IMAGES,
    steps: Sequence[int] = STEPS, seeds: Sequence[int] = SEEDS, methods: Sequence[str] = NAMED,
    sizes: Sequence[int] = SIZES, grid: bool = False,
) -> list[Cell]:  # fmt: skip
    """Seeds outermost, then steps, images, teachers, keeps: whatever has been run has all methods of it.

    Methods that do not train stand once for all steps. grid: with every option that is tried of a method, beside the
    published ones; ours always as it is by default.
    """
    every = [
        Cell(f"real {size}", _spec(teacher), {"keep": keep, "scheme": "mid"}, few, step if METHODS[name].trains else 0,
             seed, name, options)
        for size in sizes
        for seed in seeds
        for step in steps
        for few in images
        for teacher in teachers
        for keep in keeps
        for name in methods
        for options in _options(name, grid)
    ]  # fmt: skip
    return list({cell.key: cell for cell in every}.values())


def _options(name: str, grid: bool) -> list[dict[str, Any]]:
    method = METHODS[name]
    return [method.published, *(method.grid if grid and name not in (*OURS, "mimicut_same_cut") else ())]


def _spec(teacher: str) -> str:
    return teacher if ":" in teacher or "/" in teacher else f"demo:{teacher}"


def size_of(cell: Cell) -> int:
    return int(cell.task.split()[1])


def run_cell(cell: Cell, where: Where) -> dict[str, Any]:
    """The line of `cell`: its figures (`task.Exam`), or the error that it ended in. Never raises but for
    KeyboardInterrupt.

    macs, params: the student's share of the teacher's. seconds: of the method with everything it does (of ours the
    images' say too, which cells of the same images share; its seconds are counted in each); seconds_cell: all of it.
    peak_memory_mib: how far memory rose above what it was before the method began. pictures: hash of the prepared set.
    """
    started = time.perf_counter()
    threads = torch.get_num_threads()
    line: dict[str, Any] = {"cell": asdict(cell), "pictures": found(where.folder).hash}
    try:
        torch.set_num_threads(where.threads)
        line |= _measured(cell, where)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        line["error"] = f"{type(error).__name__}: {error} ({Path(at.filename).name}, {at.name})"
    finally:
        torch.set_num_threads(threads)
    kept = ("python", "torch", "torchvision", "timm", "numpy", "mimicut")
    line["seconds_cell"] = round(time.perf_counter() - started, 2)
    line["versions"] = {name: text for name, text in versions().items() if name in kept}
    line["platform"] = platform_kind(where.threads, where.device)
    return line


def _measured(cell: Cell, where: Where) -> dict[str, Any]:
    method, size = METHODS[cell.method], size_of(cell)
    teacher, anatomy = _teacher(cell.teacher, size, where.device)
    keep, scheme = cell.cut["keep"], cell.cut["scheme"]
    plan, whole, planned = _planned(cell.teacher, size, where.device, keep, scheme)
    exam = _exam(cell.teacher, size, where)
    few = few_images(found(where.folder), teacher, cell.images, cell.seed)
    problem = Problem(
        teacher.model, anatomy, plan, few, None, teacher.views, cell.steps, cell.seed, dict(cell.options)
    )  # fmt: skip
    evidence, spent, reached = None, 0.0, 0.0
    if cell.method in OURS:
        evidence, spent, reached = _evidence(cell.teacher, size, where, cell.images, cell.seed)
    before = _start_peak(where.device)
    begun = time.perf_counter()
    with seeded(cell.seed):
        model = method.run(problem) if evidence is None else _own(problem, evidence, cell.method, where)
    _wait(where.device)
    seconds = spent + time.perf_counter() - begun
    peak = _peak(where.device)
    cost = planned
    if method.blocks:
        cost = count(model, few.batch([0]).to(where.device))
    return {
        "figures": {
            **exam.figures(model), "macs": round(cost.macs / whole.macs, 6),
            "params": round(cost.params / whole.params, 6),
        },
        "seconds": round(seconds, 2),
        "peak_memory_mib": (
            None if before is None or peak is None else round(max(reached, (peak - before) / 2**20), 1)
        ),
    }  # fmt: skip


def _own(problem: Problem, evidence: Evidence, name: str, where: Where) -> nn.Module:
    """What `compress` does with keep: the plan by the images' say, then the default recipe."""
    plan = make_plan(problem.teacher, problem.anatomy, keep=problem.plan.budget.keep, evidence=evidence)
    extra = {OWN: GENERATED, "mimicut_no_extra": NONE}.get(name, where.folder / "other")
    return default.recovered(replace(problem, plan=plan), *default.parts(problem), extra)


@lru_cache(maxsize=3)
def _teacher(spec: str, size: int, device: str) -> tuple[Teacher, Anatomy]:
    teacher = teacher_of(spec, size)
    teacher.model.to(device)
    example = teacher.example().to(device)
    return teacher, trace(teacher.model, example)


@lru_cache(maxsize=6)
def _planned(spec: str, size: int, device: str, keep: float, scheme: str) -> tuple[Plan, Cost, Cost]:
    """The cut of the published methods, by L1, and the cost of teacher and student."""
    teacher, anatomy = _teacher(spec, size, device)
    plan = make_plan(teacher.model, anatomy, keep=keep, scheme=scheme, score="l1")
    example = teacher.example().to(device)[:1]
    return plan, count(teacher.model, example), count(cut(teacher.model, plan), example)


@lru_cache(maxsize=8)
def _evidence(spec: str, size: int, where: Where, images: int, seed: int) -> tuple[Evidence, float, float]:
    """What the images say of the channels, which no keep and no number of steps changes; its seconds, and MiB."""
    teacher, anatomy = _teacher(spec, size, where.device)
    few = few_images(found(where.folder), teacher, images, seed)
    problem = Problem(teacher.model, anatomy, None, few, None, teacher.views, 0, seed)
    before = _start_peak(where.device)
    begun = time.perf_counter()
    fit, _ = default.parts(problem)
    evidence = channel_evidence(teacher.model, anatomy, fit, views=teacher.views, seed=seed, max_memory=default.MEMORY)
    _wait(where.device)
    seconds, peak = time.perf_counter() - begun, _peak(where.device)
    return evidence, seconds, 0.0 if before is None or peak is None else (peak - before) / 2**20


@lru_cache(maxsize=1)
def _exam(spec: str, size: int, where: Where) -> Exam:
    teacher, anatomy = _teacher(spec, size, where.device)
    return Exam(found(where.folder), teacher, anatomy.seam, where.device)
