"""Does the interval of the agreement mean what it says? Simulated users, and how often the truth lies in theirs.

    python -m benchmarks.studies.certificate_coverage             # goes on where it was stopped; 200 users
    python -m benchmarks.studies.certificate_coverage --summary
    python -m benchmarks.studies.certificate_coverage --extra     # all of them mimic, with drawn pictures beside

A user draws a teacher of the demo, 20 to 100 images of its pool, a cut and a seed; `mimicut.compress` sets a share
of the images aside and reports the agreement on them with its 95 % interval. The truth is the agreement on the 10,000
test patches of the same pool of tiles, which nothing else touches. Cheap recipes: the closed form, or a few steps from
the cut. A line of results/certificate_coverage.jsonl for each user (certificate_coverage_extra.jsonl with --extra:
ten steps from the cut, with drawn pictures in half of each batch). width_ratio: width of the interval over that of the
exact binomial one for the true agreement at as many images (the median over what could be drawn).
"""

import argparse
import json
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.json_lines import add, read
from mimicut import demo
from mimicut.base.environment import versions
from mimicut.inputs.extra_images import GENERATED, NONE
from mimicut.inputs.image_set import read_images
from mimicut.proof.certificate import binomial_interval
from mimicut.recovery.config import preset
from mimicut.results.teachers import load_teacher
from mimicut.workflow.compress import compress

OUT = Path(__file__).parents[1] / "results" / "certificate_coverage.jsonl"
TEACHERS, USERS = ("resnet14", "mobilenetv2_tiny", "vgg7", "vit_tiny"), 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--extra", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or (OUT.with_name(f"{OUT.stem}_extra.jsonl") if options.extra else OUT)
    done = {line["user"] for line in read(out)}
    for user in () if options.summary else range(options.users):
        if user not in done:
            line = one(user, options.extra)
            add(out, line)
    print(json.dumps(summary(read(out))))


def one(user: int, extra: bool) -> dict[str, Any]:
    draws, begun = np.random.default_rng(user), time.perf_counter()
    name = TEACHERS[user % len(TEACHERS)]
    images, keep, share = int(draws.integers(20, 101)), float(draws.uniform(0.4, 0.95)), float(draws.uniform(0.2, 0.5))
    quick, seed = bool(draws.integers(2)) and not extra, int(draws.integers(10**6))
    teacher = load_teacher(f"demo:{name}")
    few = read_images(demo.few_images(images, seed), teacher.preprocessing)
    start = {"effort": "quick"} if quick else {"start": "cut", "steps": 10}
    result = compress(
        teacher, few, keep=keep, held_out_share=share, split_seed=seed, score="l1", extra=GENERATED if extra else NONE,
        config=preset("default", views=teacher.views, seed=seed, **start),
    )  # fmt: skip
    report = result.report
    truth = float((_answers(result.model) == _teachers(name)).double().mean())
    return {
        "user": user, "teacher": name, "images": images, "keep": round(keep, 4), "held_out": report.images_held_out,
        "quick": quick, "seed": seed, "agreement": report.top1_agreement, "low": report.top1_agreement_low,
        "high": report.top1_agreement_high, "truth": truth, "images_extra": report.images_extra,
        "seconds": round(time.perf_counter() - begun, 1),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch")},
    }  # fmt: skip


@cache
def _teachers(name: str) -> torch.Tensor:
    return _answers(load_teacher(f"demo:{name}").model)


@torch.no_grad()
def _answers(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(part).argmax(1) for part in demo.test_set()[0].split(250)])


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """coverage: share of the users whose interval holds the truth."""
    inside = [x["low"] <= x["truth"] <= x["high"] for x in lines]
    ratios = [(x["high"] - x["low"]) / exact_width(x["truth"], x["held_out"]) for x in lines]
    return {
        "users": len(lines), "coverage": round(sum(inside) / max(1, len(inside)), 4),
        "width_ratio": round(median(ratios), 3) if ratios else None,
    }  # fmt: skip


def exact_width(truth: float, images: int) -> float:
    """Median width of the exact interval over what so many images would show."""
    draws = np.random.default_rng(0).binomial(images, truth, 400)
    widths = {k: np.diff(binomial_interval(k, images))[0] for k in set(draws.tolist())}
    return float(np.median([widths[k] for k in draws.tolist()]))


if __name__ == "__main__":
    main()
