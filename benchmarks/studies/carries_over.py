"""Does the default recipe carry over? What mimicking makes of the closed form, at any number of steps and images.

    python -m benchmarks.studies.carries_over                                    # goes on where it was stopped
    python -m benchmarks.studies.carries_over --teacher resnet14 --images 50 --steps 100
    python -m benchmarks.studies.carries_over --summary                          # docs/carries_over.md from its lines

The default recipe on the demo's teachers, at half of their MACs, and on real networks (`benchmarks.real`), at 0.7 of
theirs and 160 pixels; widths by the images' say, drawn pictures beside them, as `compress` does. Of each: the error at
the seam on images that influenced nothing, over the teacher's squared deviation, and the agreement with the teacher,
after the closed form and after mimicking, and what the rehearsal decided. A line of results/carries_over.jsonl each.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.json_lines import add, machine, read
from mimicut import demo
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.graph import Anatomy
from mimicut.base.environment import platform_kind, versions
from mimicut.base.memory import bound
from mimicut.inputs.extra_images import GENERATED, read_extra
from mimicut.inputs.image_set import ImageSet, read_images
from mimicut.inputs.teacher import Teacher
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.planner import make_plan
from mimicut.proof.figures import figures
from mimicut.recovery.batches import WithExtra
from mimicut.recovery.config import MimicConfig, preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.recover import recover
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut
from mimicut.surgery.head import put_under_head
from mimicut.surgery.plan import Plan
from mimicut.workflow.intake import parted_images
from mimicut.workflow.request import Images

OUT = Path(__file__).parents[1] / "results" / "carries_over.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "carries_over.md"
DEMO = ("resnet14", "mobilenetv2_tiny", "vgg7", "vit_tiny")
REAL = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
IMAGES, STEPS, SEEDS = (20, 50, 200), (20, 400), (2021,)
KEEP = {**dict.fromkeys(DEMO, 0.5), **dict.fromkeys(REAL, 0.7)}
SIZE, TESTED = 160, {**dict.fromkeys(DEMO, 4000), **dict.fromkeys(REAL, 600)}


@dataclass(frozen=True)
class Case:
    teacher: str
    images: int
    steps: int
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", default=[*DEMO, *REAL], choices=[*DEMO, *REAL])
    parser.add_argument("--images", nargs="+", type=int, default=IMAGES)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--summary", action="store_true", help="write the page from the lines")
    options = parser.parse_args()
    if options.summary:
        return write_page(read(options.out), PAGE)
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for steps in options.steps:
            for name in options.teacher:
                for images in options.images:
                    case = Case(name, images, steps, seed)
                    if asdict(case) not in [line["case"] for line in read(options.out)]:
                        add(options.out, run(case, options.threads))


def run(case: Case, threads: int) -> dict[str, Any]:
    teacher, anatomy, test = opened(case.teacher)
    plan, seconds = planned(case.teacher, case.images, case.seed)
    fit, choose, _, _ = parts(case.teacher, case.images, case.seed)
    config = recipe(teacher, case.seed, case.steps)
    student, begun = cut(teacher.model, plan), time.perf_counter()
    extra = read_extra(GENERATED, fit, teacher.views, seed=case.seed, memory_bytes=bound(None))
    few = fit if extra is None else WithExtra(fit, extra)
    recovery = recover(CutStudent(teacher.model, student, anatomy, plan), few, config, choose=choose)
    log = recovery.mimic
    return {
        "case": asdict(case),
        "closed_form": solved(case.teacher, case.images, case.seed),
        "mimicked": measured(teacher, plan, student, test),
        "extra": extra is not None,
        "rehearsal": recovery.rehearsal, "lr": log.config.lr, "steps": len(log.losses), "kept_step": log.kept,
        "seconds_evidence": round(seconds, 1), "seconds": round(time.perf_counter() - begun, 1),
        "platform": platform_kind(threads, "cpu"),
        "versions": {name: text for name, text in versions().items() if name in ("python", "torch", "timm")},
    }  # fmt: skip


def recipe(teacher: Teacher, seed: int, steps: int) -> MimicConfig:
    return preset("default", steps=steps, seed=seed, views=teacher.views)


@lru_cache(maxsize=2)
def opened(name: str) -> tuple[Teacher, Anatomy, Any]:
    """The teacher, its anatomy, and the images that influence nothing."""
    if name in REAL:
        from benchmarks.real.pictures import DEFAULT
        from benchmarks.real.task import found, teacher_of
        from benchmarks.real.task import read as pictures

        teacher = teacher_of(name, SIZE)
        files = found(DEFAULT / "pictures").files["test"]
        test = pictures(files[: TESTED[name]], teacher.preprocessing)
    else:
        teacher = load_teacher(f"demo:{name}")
        test = demo.test_set()[0][: TESTED[name]]
    return teacher, trace(teacher.model, teacher.example()), test


@lru_cache(maxsize=4)
def parts(name: str, images: int, seed: int) -> tuple[ImageSet, ImageSet | None, ImageSet, list[str]]:
    """Those to learn from and those to choose by, as `compress` parts them."""
    teacher, _, _ = opened(name)
    if name in REAL:
        from benchmarks.real.pictures import DEFAULT
        from benchmarks.real.task import few_images, found

        few = few_images(found(DEFAULT / "pictures"), teacher, images, seed)
    else:
        few = read_images(demo.few_images(images, seed), teacher.preprocessing)
    sources = Images(held_out_share=0.0, split_seed=seed)
    return parted_images(teacher, few, sources, recipe(teacher, seed, 1), bound(None))


@lru_cache(maxsize=4)
def planned(name: str, images: int, seed: int) -> tuple[Plan, float]:
    teacher, anatomy, _ = opened(name)
    begun = time.perf_counter()
    evidence = channel_evidence(teacher.model, anatomy, parts(name, images, seed)[0], views=teacher.views, seed=seed)
    plan = make_plan(teacher.model, anatomy, keep=KEEP[name], evidence=evidence)
    return plan, time.perf_counter() - begun


@lru_cache(maxsize=4)
def solved(name: str, images: int, seed: int) -> dict[str, float]:
    """The closed form alone: the same recipe without a step."""
    teacher, anatomy, test = opened(name)
    fit, choose, _, _ = parts(name, images, seed)
    plan, _ = planned(name, images, seed)
    student = cut(teacher.model, plan)
    recover(CutStudent(teacher.model, student, anatomy, plan), fit, recipe(teacher, seed, 0), choose=choose)
    return measured(teacher, plan, student, test)


def measured(teacher: Teacher, plan: Plan, student: nn.Module, test: Any) -> dict[str, float]:
    found = figures(teacher.model, put_under_head(teacher.model, student, plan.seam), plan.seam, test)
    return {"error": round(found.feature_error_relative, 5), "agreement": round(100 * found.top1_agreement, 2)}


def write_page(lines: list[dict[str, Any]], path: Path) -> None:
    rows = sorted(lines, key=lambda x: ([*DEMO, *REAL].index(x["case"]["teacher"]), *list(x["case"].values())[1:]))
    gains = [1 - x["mimicked"]["error"] / x["closed_form"]["error"] for x in rows]
    said = "Cells of 400 steps are still to be run."
    at_400 = [gain for gain, x in zip(gains, rows, strict=True) if x["case"]["steps"] == 400]
    if at_400:
        said = f"After 400 steps it is {100 * min(at_400):.0f} to {100 * max(at_400):.0f} % smaller."
    text = [
        "# Does the recipe carry over?", "",
        f"How much mimicking improves on the closed form: {len(rows)} cells, one line each, by `python -m "
        f"benchmarks.studies.carries_over`; `--summary` writes this page. Machine: {machine(rows)}. Half of each "
        "batch, and more where there are 20 images, are drawn pictures; not in lines with a *, which were made before "
        "that, with widths cut inside blocks alone.", "",
        "Error: squared error at the seam, on images that influenced nothing, divided by the teacher's squared "
        "deviation from its mean feature. Agreement: with the teacher's class, percent. Rate: the learning rate "
        "measured on the network, times the rehearsal's factor (0: it left mimicking out).", "",
        f"The error rose in {sum(gain < 0 for gain in gains)} of {len(rows)} cells. {said}", "",
        "| teacher | images | steps | seed | error, closed form | mimicked | smaller by | agreement, closed form "
        "| mimicked | rate |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for x, gain in zip(rows, gains, strict=True):
        case, before, after = x["case"], x["closed_form"], x["mimicked"]
        rate = f"{x['lr']:.1e}" if x["steps"] and x["lr"] else "0"
        older = "" if x.get("extra") else " *"
        text.append(
            f"| {case['teacher']}{older} | {case['images']} | {case['steps']} | {case['seed']} | {before['error']:.3f} "
            f"| {after['error']:.3f} | {100 * gain:.1f} % | {before['agreement']:.1f} | {after['agreement']:.1f} "
            f"| {rate} |"
        )
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(json.dumps({"page": str(path), "cells": len(rows)}))


if __name__ == "__main__":
    main()
