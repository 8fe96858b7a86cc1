"""What the closed form says of every block before it is dropped, against PRACTISE's trained probe and real mimicking.

    python -m benchmarks.studies.recoverability                 # goes on where it was stopped; about a minute a block
    python -m benchmarks.studies.recoverability --again         # the closed form's part of all lines anew
    python -m benchmarks.studies.recoverability --summary       # the table of what there is, and docs/recoverability.md

A line of results/recoverability.jsonl for each block, draw of 50 images and teacher: the error at the seam that is
left, by the closed form (`mimicut.recoverability`), by the probe (its published recipe, but PROBE steps in place of
1,000 and more, which favours it in time), and after MIMIC steps of MiR's recipe without the block, on 2,000 other
patches. Seconds: of the closed form for that block, and of the probe, in turn in one process.
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
from scipy.stats import spearmanr

from benchmarks.json_lines import add, machine, read
from benchmarks.methods import practise
from benchmarks.methods.problem import Problem
from mimicut import demo
from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.find_seam import trace
from mimicut.base.environment import platform_kind, versions
from mimicut.base.guard import full_copy
from mimicut.demo import teacher_networks
from mimicut.inputs.image_set import read_images
from mimicut.planning.planner import make_plan
from mimicut.planning.recoverability import recoverability
from mimicut.recovery.config import preset
from mimicut.recovery.judge import Judge
from mimicut.recovery.mimic import mimic
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import drop_modules

OUT = Path(__file__).parents[1] / "results" / "recoverability.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "recoverability.md"
TEACHERS, SEEDS, IMAGES = ("resnet32", "vit_deep"), (1001, 1002, 1003), 50
PROBE, PUBLISHED, MIMIC, JUDGED = 300, 1000, 200, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", choices=teacher_networks.NAMES)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.again:
        lines = [_anew(line) for line in read(options.out)]
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    elif not options.summary:
        for seed in options.seed or SEEDS:
            for name in options.teacher or TEACHERS:
                for line in _lines(name, seed, _done(options.out)):
                    add(options.out, line)
    lines = read(options.out)
    if options.summary and options.out == OUT:
        PAGE.write_text(page(lines), encoding="utf-8")
    for row in summary(lines):
        print(json.dumps(row))


def _done(path: Path) -> set[tuple[str, int, str]]:
    return {(line["teacher"], line["seed"], line["block"]) for line in read(path)}


def _anew(line: dict[str, Any]) -> dict[str, Any]:
    teacher = load_teacher(f"demo:{line['teacher']}")
    few = read_images(demo.few_images(IMAGES, line["seed"]), teacher.preprocessing)
    anatomy = trace(teacher.model, torch.zeros(2, *teacher.preprocessing.input_size))
    block = next(b for b in anatomy.blocks if b.name == line["block"])
    begun = time.perf_counter()
    (ours,) = recoverability(teacher.model, anatomy, few, views=teacher.views, seed=line["seed"], blocks=[block])
    return {**line, "ours": ours.error, "bare": ours.bare, "seconds": round(time.perf_counter() - begun, 3)}


def _lines(name: str, seed: int, done: set[tuple[str, int, str]]) -> Iterator[dict[str, Any]]:
    teacher = load_teacher(f"demo:{name}")
    model, few = teacher.model, read_images(demo.few_images(IMAGES, seed), teacher.preprocessing)
    anatomy = trace(model, torch.zeros(2, *teacher.preprocessing.input_size))
    plan = make_plan(model, anatomy, keep_width=1)
    test = read_images(demo.test_set()[0][:JUDGED], teacher.preprocessing)
    judge = Judge(model, anatomy.seam, [((test.batch(list(range(i, i + 250))),), {}) for i in range(0, JUDGED, 250)])
    problem = Problem(model, anatomy, plan, few, None, teacher.views, 2 * PROBE, seed)
    recipe = preset("transformer" if name.startswith("vit") else "paper", views=teacher.views, steps=MIMIC, seed=seed)
    for block in droppable(anatomy):
        if (name, seed, block.name) in done:
            continue
        begun = time.perf_counter()
        (ours,) = recoverability(model, anatomy, few, views=teacher.views, seed=seed, blocks=[block])
        between = time.perf_counter()
        probe = practise.recoverability(problem, block)
        ended = time.perf_counter()
        student = drop_modules(full_copy(model), block.dropped_modules)
        mimic(model, student, anatomy.seam, few, recipe)
        yield {
            "teacher": name, "seed": seed, "block": block.name, "ours": ours.error, "bare": ours.bare, "probe": probe,
            "mimic": judge.error(student), "seconds": round(between - begun, 3),
            "seconds_probe": round(ended - between, 2), "probe_steps": PROBE, "mimic_steps": MIMIC,
            "versions": {k: v for k, v in versions().items() if k in ("python", "torch")},
            "platform": platform_kind(torch.get_num_threads(), "cpu"),
        }  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every teacher and draw: rank correlations (Spearman) with the error after mimicking, and how much faster: than
    the probe of so few steps, and than one of the 1,000 that are published."""
    runs = defaultdict(list)
    for line in lines:
        runs[line["teacher"], line["seed"]].append(line)
    rows = []
    for (teacher, seed), found in sorted(runs.items()):
        if len(found) > 2:
            ranks = {k: round(float(spearmanr([x[k] for x in found], [x["mimic"] for x in found])[0]), 3)
                     for k in ("ours", "probe", "bare")}  # fmt: skip
            times = sum(x["seconds_probe"] for x in found) / sum(x["seconds"] for x in found)
            rows.append({"teacher": teacher, "seed": seed, "blocks": len(found), **ranks, "faster": round(times, 1),
                         "faster_published": round(times * PUBLISHED / found[0]["probe_steps"], 1)})  # fmt: skip
    return rows


def page(lines: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    names = ("teacher", "seed", "blocks", "ours", "probe", "bare", "faster", "faster_published")
    found = summary(lines)
    for teacher in dict.fromkeys(row["teacher"] for row in found):
        of = [row for row in found if row["teacher"] == teacher]
        means = {n: round(mean(row[n] for row in of), 1 if "faster" in n else 3) for n in names[3:]}
        found.append({"teacher": teacher, "seed": "mean", "blocks": sum(row["blocks"] for row in of), **means})
    rows = [f"| {' | '.join(str(row[name]) for name in names)} |" for row in found]
    return "\n".join(
        [
            "# Recoverability of blocks", "",
            "Each block of two of the demo's teachers is dropped by itself, and MiR's recipe trains the rest for",
            f"{MIMIC} steps on a draw of {IMAGES} images; the error left at the seam is measured on {JUDGED:,} other",
            "patches. The table shows how well that error is ranked beforehand (Spearman's correlation) by our closed",
            "form, by PRACTISE's trained probe and by the error of the bare drop. Faster: seconds of the probe divided",
            f"by ours, for the {PROBE} steps that were run and the {PUBLISHED:,} that its authors train, timed in turn",
            "in one process.",
            f"`python -m benchmarks.studies.recoverability` on one of {machine(lines)}.", "",
            f"| teacher | seed | blocks | closed form | probe | bare drop | faster than {PROBE} | than {PUBLISHED:,} |",
            "|---|--:|--:|--:|--:|--:|--:|--:|", *rows, "",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()
