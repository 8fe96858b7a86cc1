"""Networks that do not name a picture: ours against MiR on a detector, a segmenter, an embedder and a denoiser.

    python -m benchmarks.studies.other_tasks               # goes on where it was stopped
    python -m benchmarks.studies.other_tasks --page        # docs/other_tasks.md

Teachers: `mimicut.demo.scene_networks`. 50 unlabelled images, half of the MACs, 400 steps of either recipe, each from
its own cut (MiR: L1, the same share of every width). Judged on test scenes or patches that nothing else touches, by the
task's own figure with labels, and without them by how well the student's outputs match the teacher's. A line of
results/other_tasks.jsonl for each run.
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.json_lines import add, read
from mimicut.base.environment import platform_kind, versions
from mimicut.demo import photographs, scenes
from mimicut.demo.teacher_networks import OTHER_TASKS
from mimicut.demo.train_scenes import measure, noisy
from mimicut.inputs.image_set import read_images
from mimicut.recovery.config import preset
from mimicut.results.teachers import load_teacher
from mimicut.workflow.compress import compress

RESULTS, PAGE = Path(__file__).parents[1] / "results" / "other_tasks.jsonl", Path("docs/other_tasks.md")
IMAGES, KEEP, STEPS, SEEDS, HELD_OUT = 50, 0.5, 400, (2021, 2022), 500
METHODS = ("mimicut", "mir")
FIGURES = {
    "segmenter_tiny": ("pixels_right", "pixels right, %"),
    "detector_tiny": ("objects_found", "objects found, %"),
    "embedder_tiny": ("nearest_alike", "nearest patch of the same photograph, %"),
    "denoiser_tiny": ("psnr", "PSNR, dB"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(text(read(RESULTS)), encoding="utf-8")
        return
    torch.set_num_threads(1)
    done = {(line["teacher"], line["method"], line["seed"]) for line in read(RESULTS)}
    for seed in SEEDS:
        for name in OTHER_TASKS:
            for method in METHODS:
                if (name, method, seed) not in done:
                    add(RESULTS, one(name, method, seed))


def few_and_held_out(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images to learn from, and other ones to compare outputs on."""
    if name in ("segmenter_tiny", "detector_tiny"):
        return scenes.few_scenes(IMAGES, seed), scenes.test_scenes().images[:HELD_OUT]
    few, held_out = photographs.few_images(IMAGES, seed), photographs.patches("test", HELD_OUT, 1)[0]
    return (noisy(few, seed), noisy(held_out, 1)) if name == "denoiser_tiny" else (few, held_out)


def one(name: str, method: str, seed: int) -> dict[str, Any]:
    begun = time.perf_counter()
    teacher = load_teacher(f"demo:{name}")
    few, held_out = (read_images(images, teacher.preprocessing) for images in few_and_held_out(name, seed))
    recipe = "default" if method == "mimicut" else "paper"
    result = compress(
        teacher, few, keep=KEEP, held_out=held_out, score=None if method == "mimicut" else "l1",
        config=preset(recipe, steps=STEPS, views=teacher.views, seed=seed),
    )  # fmt: skip
    figure, _ = FIGURES[name]
    return {
        "teacher": name, "method": method, "seed": seed,
        "macs": result.report.macs_student / result.report.macs_teacher,
        "teacher_at": measure(name, teacher.model)[figure], "student_at": measure(name, result.model)[figure],
        "outputs": list(result.report.outputs), "feature_error": result.report.feature_error_relative,
        "seconds": round(time.perf_counter() - begun, 1), "platform": platform_kind(1, "cpu"),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "mimicut")},
    }  # fmt: skip


def text(lines: list[dict[str, Any]]) -> str:
    """docs/other_tasks.md"""
    rows = [
        "| network | figure | teacher | MiR | mimicut | error of the outputs, MiR | mimicut |",
        "|---|---|" + "--:|" * 5,
    ]
    for name, (_, said) in FIGURES.items():
        of = {m: [x for x in lines if (x["teacher"], x["method"]) == (name, m)] for m in METHODS}
        if not all(of.values()):
            continue
        at = {m: mean(x["student_at"] for x in found) for m, found in of.items()}
        errors = {m: mean(_error(found)) for m, found in of.items()}
        rows.append(
            f"| {name} | {said} | {of['mir'][0]['teacher_at']:.1f} | {at['mir']:.1f} | {at['mimicut']:.1f} | "
            f"{errors['mir']:.3f} | {errors['mimicut']:.3f} |"
        )
    setting = sorted({f"{x['platform']['processor']}, torch {x['versions']['torch']}" for x in lines})
    drawn = sorted({x["seed"] for x in lines})
    seeds = f"mean over seeds {', '.join(map(str, drawn))}" if len(drawn) > 1 else f"one seed ({drawn[0]})"
    about = (
        "Made by `python -m benchmarks.studies.other_tasks --page` from `benchmarks/results/other_tasks.jsonl`; do not "
        f"edit by hand. {IMAGES} unlabelled images, {KEEP:.0%} of the MACs, {STEPS} steps; {seeds}; "
        f"{'; '.join(setting)}. The teachers are small and ship with mimicut; the test scenes and patches are of tiles "
        "that trained neither teacher nor student. Each recipe starts from its own cut. Error of the outputs: squared, "
        "over the teacher's squared deviation "
        "from its mean output (1 is no better than that mean), mean over the outputs."
    )
    return "\n\n".join(["# Detector, segmenter, embedder, denoiser", about, "\n".join(rows)]) + "\n"


def _error(lines: Iterable[dict[str, Any]]) -> list[float]:
    return [mean(output["error"] for output in line["outputs"]) for line in lines]


if __name__ == "__main__":
    main()
