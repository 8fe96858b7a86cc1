"""Seconds of the default recipe against the paper's 2,000 steps, taken in turn in one process: one JSON line.

    python -m benchmarks.studies.recipe_seconds            # about five minutes on an idle machine

What they reach in these steps is in docs/default.md; here are the seconds alone, each the least of the rounds. The
paper's are those of 100 steps, times 20. Also written to results/recipe_seconds.json.
"""

import argparse
import json
from pathlib import Path

from benchmarks.cell import run_cell
from benchmarks.protocol import _OURS_CUT, Cell
from benchmarks.tasks import Place

OUT = Path(__file__).parents[1] / "results" / "recipe_seconds.json"
PAPER, TIMED, FEW = 2000, 100, (50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows, line = [], {}
    for teacher, (cut,) in _OURS_CUT.items():
        runs = [("mir", TIMED), *(("mimicut", steps) for steps in FEW)]
        least = dict.fromkeys(runs, float("inf"))
        for _ in range(options.rounds):
            for method, steps in runs:
                line = run_cell(Cell("photographs", teacher, cut, 50, steps, 1001, method), Place())
                least[method, steps] = min(least[method, steps], line["seconds"])
        paper = least["mir", TIMED] * PAPER / TIMED
        ours = {str(steps): round(least["mimicut", steps], 1) for steps in FEW}
        shares = {steps: round(seconds / paper, 3) for steps, seconds in ours.items()}
        rows.append({"teacher": teacher, "cut": cut, "paper_2000": round(paper, 1), "ours": ours, "shares": shares})
        print(json.dumps(rows[-1]), flush=True)
    found = {"rounds": options.rounds, "rows": rows, "versions": line["versions"], "platform": line["platform"]}
    options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
