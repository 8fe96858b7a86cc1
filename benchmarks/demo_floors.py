"""What the demo's teachers lose at two cuts, three seeds each: one JSON line a run, runs already done are skipped.

    python benchmarks/demo_floors.py                      # all of it: about 20 minutes on two cores
    python benchmarks/demo_floors.py --teacher resnet20 --keep-width 0.3

Accuracy on the 10,000 test patches that nothing else touched; 50 unlabelled patches; the paper recipe at the demo's
number of steps. Words on stderr, the lines in benchmarks/results/demo_floors.jsonl, the summary last on stdout.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from understudy.demo.run import STEPS, run
from understudy.report import platform_kind, versions

OUT = Path(__file__).parent / "results" / "demo_floors.jsonl"
SEEDS = (2021, 2022, 2023)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", choices=("resnet20", "mobilenetv2_tiny"))
    parser.add_argument("--keep-width", action="append", type=float)
    parser.add_argument("--steps", type=int, help="the demo's own if not given")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    OUT.parent.mkdir(exist_ok=True)
    for name in options.teacher or ("resnet20", "mobilenetv2_tiny"):
        for keep_width in options.keep_width or (0.5, 0.3):
            for seed in SEEDS:
                steps = STEPS[name] if options.steps is None else options.steps
                cell = {"teacher": name, "keep_width": keep_width, "steps": steps, "seed": seed, "images": 50}
                if any(cell.items() <= line.items() for line in done()):
                    continue
                result, raw = run(name, keep_width=keep_width, steps=steps, seed=seed)
                report = result.report.to_json()
                figures = {k: report[k] for k in ("top1_teacher", "top1_student", "top1_agreement", "seconds")}
                kind = platform_kind(options.threads)
                line = {**cell, **figures, "top1_cut": raw, "versions": versions(), "platform": kind}
                with OUT.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{cell}: {figures}, cut {raw:.2f}", file=sys.stderr, flush=True)
    print(json.dumps(summary(), indent=1))


def done() -> list[dict]:
    return [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()] if OUT.exists() else []


def summary() -> list[dict]:
    """Means over seeds of each teacher and cut."""
    cells: dict[tuple, list[dict]] = {}
    for line in done():
        cells.setdefault((line["teacher"], line["keep_width"], line["steps"]), []).append(line)
    return [
        {
            "teacher": teacher,
            "keep_width": keep_width,
            "steps": steps,
            "seeds": len(lines),
            "top1_teacher": lines[0]["top1_teacher"],
            "top1_cut": lines[0]["top1_cut"],
            "top1_student_mean": round(statistics.mean(x["top1_student"] for x in lines), 2),
            "lost_mean": round(statistics.mean(x["top1_teacher"] - x["top1_student"] for x in lines), 2),
            "seconds_median": round(statistics.median(x["seconds"] for x in lines), 1),
        }
        for (teacher, keep_width, steps), lines in sorted(cells.items())
    ]


if __name__ == "__main__":
    main()
