"""Width alone and width with the cheapest block dropped, at one latency: which ends the better, and what knows it when.

    python -m benchmarks.studies.ties                 # goes on where it was stopped; on an idle machine
    python -m benchmarks.studies.ties --summary       # its lines as rows

Two students of 0.7 of the teacher's latency, on the demo's task, as in `equal_latency`: the error at the seam that the
closed form leaves on images that nothing was solved from, the same after a few steps of mimicking, and the points of
top-1 accuracy lost after all of the steps. A line of results/ties.jsonl for each student. What `mixtures.TIE` rests on.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.json_lines import add, read
from benchmarks.studies.equal_latency import SHARE, learnt, top1
from mimicut.base.environment import platform_kind, versions
from mimicut.planning.mixtures import plan_within
from mimicut.planning.trials import mimicked_error, trial_error
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.recover import recover
from mimicut.surgery.budget import Budget
from mimicut.surgery.cut import cut

OUT = Path(__file__).parents[1] / "results" / "ties.jsonl"
CASES = (("vit_tiny", 1001), ("vit_tiny", 1003), ("resnet14", 1001), ("resnet14", 1002), ("resnet14", 1003))
SHORT = (25, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed in () if options.summary else CASES:
        asked = name in (options.teacher or (name,)) and seed in (options.seed or (seed,))
        if asked and (name, seed) not in {(x["teacher"], x["seed"]) for x in read(options.out)}:
            _pair(name, seed, options.out)
    for x in read(options.out):
        errors = {f"{steps} steps": round(x["errors"][str(steps)], 3) for steps in SHORT}
        row = {"teacher": x["teacher"], "seed": x["seed"], "drop": x["drop"], "closed form": round(x["closed_form"], 3)}
        print(json.dumps({**row, **errors, "lost": round(x["top1_teacher"] - x["top1"], 2)}))


def _pair(name: str, seed: int, out: Path) -> None:
    teacher, known = learnt(name, seed)
    lines = []
    for drop in ((), (known.order[0].block,)):
        found = plan_within(known, Budget.of(latency=SHARE, depth="never", drop=drop))
        anatomy, student = known.without(drop), cut(teacher.model, found.plan)
        recover(CutStudent(teacher.model, student, anatomy, found.plan), known.few, known.recipe)
        lines.append({
            "teacher": name, "seed": seed, "drop": list(drop), "share": round(found.share[0], 4),
            "closed_form": trial_error(known, anatomy, found.plan),
            "errors": {str(steps): mimicked_error(known, found.plan, steps) for steps in SHORT},
            **top1(teacher.model, student), "platform": platform_kind(1, "cpu"),
            "versions": {k: v for k, v in versions().items() if k in ("python", "torch")},
        })  # fmt: skip
    for line in lines:
        add(out, line)
    known.close()


if __name__ == "__main__":
    main()
