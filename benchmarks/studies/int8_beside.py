"""Float32 and INT8, teacher and student: agreement with the float32 teacher, latency, size, on the embedded task.

    python -m benchmarks.studies.int8_beside                    # goes on where it was stopped; a minute a line
    python -m benchmarks.studies.int8_beside --summary

Half of the MACs, 50 images that train and give INT8 its ranges, 1,000 test patches of which nothing was learned; ONNX
Runtime, one thread, batch 1 and 16, all four in turn. report_share: the look at the images, page and README, made once
more, over the time of `compress`. A line of results/int8_beside.jsonl for each teacher and seed.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.json_lines import add, read
from mimicut import demo
from mimicut.base.environment import platform_kind, versions
from mimicut.inputs.image_set import read_images
from mimicut.proof.image_check import check_images
from mimicut.proof.int8_table import int8_table
from mimicut.recovery.config import preset
from mimicut.results.html_page import page
from mimicut.results.readme import readme
from mimicut.results.teachers import load_teacher
from mimicut.runtime.export import export
from mimicut.runtime.latency import Setting
from mimicut.workflow.compress import compress

OUT = Path(__file__).parents[1] / "results" / "int8_beside.jsonl"
TEACHERS, SEEDS, BATCHES = ("mobilenetv2_tiny", "resnet14", "vgg7", "vit_tiny"), (1001, 1002, 1003), (1, 16)
IMAGES, PATCHES, KEEP = 50, 1000, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", choices=TEACHERS)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in () if options.summary else options.seed or SEEDS:
        for name in options.teacher or TEACHERS:
            if (name, seed) not in {(x["teacher"], x["seed"]) for x in read(options.out)}:
                add(options.out, one(name, seed))
    for row in summary(read(options.out)):
        print(json.dumps(row))


def one(name: str, seed: int) -> dict[str, Any]:
    teacher = load_teacher(f"demo:{name}")
    few = read_images(demo.few_images(IMAGES, seed), teacher.preprocessing)
    proof = read_images(demo.test_set()[0][:PATCHES], teacher.preprocessing)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        made = compress(
            teacher, few, keep=KEEP, held_out=proof, folder=Path(scratch, "small"), split_seed=seed,
            config=preset("default", views=teacher.views, seed=seed),
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        example, pairs = few.batch(range(2)), [few.batch([i, i + 1]) for i in range(0, IMAGES, 2)]
        networks = {
            who: export(model, example, Path(scratch, who), formats=("onnx", "int8"), calibrate=pairs)
            for who, model in (("teacher", teacher.model), ("student", made.model))
        }
        tables = {
            batch: int8_table(
                networks, teacher.model, proof, example, Setting("onnxruntime", 1, batch), made.plan.seam
            )["rows"]
            for batch in BATCHES
        }
    begun = time.perf_counter()
    check_images(teacher.model, made.plan.seam, few, held_out=proof)
    page(made.report, made.plan)
    readme(made.report, made.plan)
    return {
        "teacher": name, "seed": seed, "rows": tables, "seconds": round(seconds, 1),
        "report_share": round((time.perf_counter() - begun) / seconds, 5),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "onnxruntime")},
        "platform": platform_kind(1, "cpu"),
    }  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By teacher and network: mean agreement in percent, median share of the float32 teacher's latency, bytes."""
    found = defaultdict(list)
    for line in lines:
        for batch, rows in line["rows"].items():
            for row in rows:
                found[line["teacher"], row["name"], batch].append(row)
    shares = [line["report_share"] for line in lines]
    return [
        {
            "teacher": teacher, "network": network, "batch": int(batch), "seeds": len(rows),
            "agreement": round(100 * mean(row["top1_agreement"] for row in rows), 2),
            "latency_share": round(median(row["share"] for row in rows), 3),
            "bytes": round(mean(row["bytes"] for row in rows)),
        }
        for (teacher, network, batch), rows in found.items()
    ] + [{"report_share_largest": max(shares, default=None)}]  # fmt: skip


if __name__ == "__main__":
    main()
