"""What students of one measured latency lose: depth and width mixed, width alone, depth alone, and PRACTISE.

    python -m benchmarks.studies.equal_latency                  # goes on where it was stopped; on an idle machine
    python -m benchmarks.studies.equal_latency --summary        # and docs/equal_latency.md from the lines

The demo's task, 50 images, 400 steps, 0.7 of the teacher's latency on OpenVINO, one thread, the batch raised until the
teacher takes 5 ms. PRACTISE drops the blocks with the least score of its trained probe (PROBE steps) for the latency
that a drop was measured to save, as many as reach it, then MiR's recipe trains the rest; the others recover by the
default. A line of results/equal_latency.jsonl each, with the share that was measured behind the planning. Where the
mixed plan drops nothing it is the plan of width alone, made twice at most: both are then the mean of what was measured.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.json_lines import add, machine, read
from benchmarks.methods import practise
from benchmarks.methods.problem import Problem
from benchmarks.studies.latency_met import _batch
from mimicut import demo
from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.find_seam import trace
from mimicut.base.environment import platform_kind, versions
from mimicut.base.errors import PlanError
from mimicut.base.guard import full_copy, seeded
from mimicut.inputs.image_set import read_images
from mimicut.inputs.teacher import Teacher
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.latency_search import compare_latency
from mimicut.planning.mixtures import plan_within
from mimicut.planning.planner import make_plan
from mimicut.planning.survey import Findings, PlanningContext, survey
from mimicut.recovery.config import preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.mimic import mimic
from mimicut.recovery.recover import recover
from mimicut.results.teachers import load_teacher
from mimicut.runtime.latency import Setting, measure
from mimicut.surgery.budget import Budget
from mimicut.surgery.cut import cut, drop_modules

OUT = Path(__file__).parents[1] / "results" / "equal_latency.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "equal_latency.md"
TEACHERS = ("resnet14", "mobilenetv2_tiny", "vgg7", "vit_tiny", "resnet32")
METHODS = {"mixed": "auto", "width": "never", "depth": "only", "practise": "practise"}
SEEDS, IMAGES, STEPS, SHARE, RUNTIME, PROBE = (1001, 1002, 1003, 1004, 1005), 50, 400, 0.7, "openvino", 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", choices=TEACHERS)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in () if options.summary else options.seed or SEEDS:
        for name in options.teacher or TEACHERS:
            lines = read(options.out)
            done = {(x["teacher"], x["seed"], x["method"]) for x in lines}
            same = [x for x in lines if x["method"] == "mixed" and x.get("drop") == []]  # it is that of width alone
            done |= {(x["teacher"], x["seed"], "width") for x in same}
            todo = [m for m in options.method or METHODS if (name, seed, m) not in done]
            for line in _lines(name, seed, todo) if todo else ():
                add(options.out, line)
    lines = read(options.out)
    if options.summary and options.out == OUT:
        PAGE.write_text(page(lines), encoding="utf-8")
    for row in summary(lines):
        print(json.dumps(row))


def learnt(name: str, seed: int) -> tuple[Teacher, PlanningContext]:
    """A teacher, and what planning needs of it and its few images. Close `PlanningContext.prepared` afterwards."""
    teacher = load_teacher(f"demo:{name}")
    model, size = teacher.model, teacher.preprocessing.input_size
    few = read_images(demo.few_images(IMAGES, seed), teacher.preprocessing)
    setting = Setting(RUNTIME, 1, _batch(model, size, RUNTIME, 1))
    anatomy = trace(model, torch.zeros(2, *size))
    evidence = channel_evidence(model, anatomy, few, views=teacher.views, seed=seed)
    recipe = preset("default", views=teacher.views, steps=STEPS, seed=seed)
    given = Findings(views=teacher.views, seed=seed, evidence=evidence, recipe=recipe)
    return teacher, survey(model, anatomy, few, setting=setting, given=given)


def _lines(name: str, seed: int, methods: list[str]) -> Iterator[dict[str, Any]]:
    teacher, known = learnt(name, seed)
    model, setting = teacher.model, known.setting
    same = False
    for method in methods:
        if method == "width" and same:
            continue
        begun = time.perf_counter()
        line = {"teacher": name, "seed": seed, "method": method, "batch": setting.batch, "asked": SHARE}
        try:
            made = _practise if method == "practise" else _ours
            with seeded(seed):
                student, plan = made(teacher, known, METHODS[method])
        except PlanError as error:
            yield {**line, "error": str(error)}
            continue
        seconds, same = time.perf_counter() - begun, method == "mixed" and not plan.drop
        measured = compare_latency(model, student, known.anatomy.traced.example, setting)
        yield {
            **line, "share": round(measured["share"], 4), "drop": plan.drop,
            "macs": round(plan.macs["student"] / plan.macs["teacher"], 4), **top1(model, student),
            "seconds": round(seconds, 1), "versions": {k: v for k, v in versions().items() if k in ("python", "torch")},
            "platform": platform_kind(1, "cpu"),
        }  # fmt: skip
    known.close()


def _ours(teacher: Teacher, known: PlanningContext, depth: str) -> tuple[nn.Module, Any]:
    found = plan_within(known, Budget.of(latency=SHARE, depth=depth))
    anatomy = known.without(tuple(found.plan.drop))
    student = cut(teacher.model, found.plan)
    recover(CutStudent(teacher.model, student, anatomy, found.plan), known.few, known.recipe)
    return student, found.plan


def _practise(teacher: Teacher, known: PlanningContext, _: str) -> tuple[nn.Module, Any]:
    """As many blocks as reach the latency, then MiR. Raises: PlanError where all of them do not."""
    model, example = teacher.model, known.anatomy.traced.example
    blocks = droppable(known.anatomy)
    plan = make_plan(model, known.anatomy, keep_width=1)
    problem = Problem(model, known.anatomy, plan, known.few, None, teacher.views, 2 * PROBE, known.seed)
    networks = {b.name: drop_modules(full_copy(model), b.dropped_modules) for b in blocks}
    found = measure({"teacher": known.prepared, **networks}, example, known.setting, seconds=2 * (1 + len(blocks) / 2))
    saved = {b.name: max(1e-3, 1 - found[b.name].over(found["teacher"])[0]) for b in blocks}
    scores = {b.name: practise.recoverability(problem, b) / saved[b.name] for b in blocks}
    gone: list[str] = []
    for name in sorted(scores, key=scores.get):
        gone.append(name)
        plan = make_plan(model, known.without(tuple(gone)), keep_width=1)
        student = cut(model, plan)
        timed = measure({"teacher": known.prepared, "student": student}, example, known.setting, seconds=2)
        if timed["student"].over(timed["teacher"])[0] <= SHARE:
            kind = "transformer" if "vit" in str(teacher.to_json()["spec"]) else "paper"
            recipe = preset(kind, views=teacher.views, steps=STEPS, seed=known.seed)
            mimic(model, student, plan.seam, known.few, recipe)
            return student, plan
    raise PlanError(f"PRACTISE: its {len(blocks)} blocks do not reach {SHARE} of the latency")


@torch.no_grad()
def top1(model: nn.Module, student: nn.Module) -> dict[str, float]:
    """Accuracy of both on the test patches, percent."""
    x, y = demo.test_set()
    found = {}
    for name, network in (("top1_teacher", model), ("top1", student.eval())):
        right = sum(int((network(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
        found[name] = 100 * right / len(y)
    return found


def results(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float] | None]]]:
    """teacher -> method -> (points lost, measured share) of each seed; None where no student reaches the latency."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for teacher, seed in dict.fromkeys((x["teacher"], x["seed"]) for x in lines):
        own = {x["method"]: x for x in lines if (x["teacher"], x["seed"]) == (teacher, seed)}
        shown = {
            method: (x["top1_teacher"] - x["top1"], x["share"]) if "top1" in x else None for method, x in own.items()
        }
        if "mixed" in own and not own["mixed"].get("drop", True):
            runs = [shown[method] for method in ("mixed", "width") if shown.get(method)]
            shown["mixed"] = shown["width"] = tuple(map(mean, zip(*runs, strict=True)))
        for method, each in shown.items():
            found[teacher][method].append(each)
    return found


def page(lines: list[dict[str, Any]]) -> str:
    """The table, as Markdown: a row a teacher, and in brackets how far apart the seeds are."""
    rows, found = [], results(lines)
    for teacher in sorted(found, key=TEACHERS.index):
        cells = []
        for runs in (found[teacher].get(method, []) for method in METHODS):
            done = [run for run in runs if run]
            if not done:
                cells.append("none reaches it" if runs else "not run")
                continue
            lost, shares = zip(*done, strict=True)
            seeds = f"{len(done)} of {len(runs)}" if len(done) < len(runs) else len(done)
            cells.append(f"{mean(lost):.2f} ({min(lost):.2f} to {max(lost):.2f}) at {mean(shares):.3f}, {seeds} seeds")
        rows.append(f"| {teacher} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Students at equal latency", "",
            f"Points of top-1 accuracy that students at {SHARE} of the teacher's measured latency ({RUNTIME}, one",
            f"thread) lose on the demo's test patches, with {IMAGES} images and {STEPS} steps: mean of the seeds",
            "(least to most), and the share of the latency measured again after planning. Mixed: the planner chooses",
            "blocks and widths (if it drops no block, the plan is width alone, and both columns are the mean of all",
            "such runs). PRACTISE: its trained probe and its drops, then MiR's recipe.",
            f"`python -m benchmarks.studies.equal_latency` on {machine(lines)}.", "",
            "| teacher | mixed | width alone | depth alone | PRACTISE |", "|---|---|---|---|---|", *rows, "",
        ]
    )  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each teacher: points lost by each method, mean over the seeds that it has, and the measured shares."""
    return [
        {
            "teacher": teacher,
            **{
                method: {"lost": round(mean(x[0] for x in done), 2), "seeds": len(done),
                         "share": round(mean(x[1] for x in done), 3)}
                for method, runs in methods.items() if (done := [run for run in runs if run])
            },
        }
        for teacher, methods in sorted(results(lines).items())
    ]  # fmt: skip


if __name__ == "__main__":
    main()
