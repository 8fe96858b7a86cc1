"""What a sweep costs above the work of its jobs, from ten of them, and what that is for 1,000: one JSON line.

    python -m benchmarks.studies.sweep_cost                # three minutes on an idle machine

Ten jobs of the demo's networks (50 images, closed form alone, one thread each) run two at once, then once more, when
each is complete and has nothing left to do. Also written to results/sweep_cost.json.

- processor_seconds: of a sweep with all its jobs, as the system counts them; they hardly depend on what else runs.
- job: above its own work, per job: those of the second sweep without those of reading the file alone. That is a
  process, imports, teacher, images, and finding that the result is there.
- sweep: of the sweep's process, with as many jobs as named, of which none runs (--dry-run).
- clock: seconds of each sweep, of its jobs' processes together, and of the runs by their reports (the first sweep's).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mimicut.base.environment import platform_kind, versions
from mimicut.demo.photographs import write_few_images

OUT = Path(__file__).parents[1] / "results" / "sweep_cost.json"
KEPT = {"vgg7": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "resnet14": (0.4, 0.5, 0.6, 0.7)}
MANY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        line = measured(Path(folder))
    options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


def measured(place: Path) -> dict[str, Any]:
    write_few_images(place / "photos", 50, seed=1)
    ten = "".join(f'[[job]]\nteacher = "demo:{name}"\nkeep = {list(keeps)}\n' for name, keeps in KEPT.items())
    many = f'[[job]]\nteacher = "demo:vgg7"\nkeep = 0.5\nseed = {list(range(MANY))}\n'
    head = '[defaults]\nimages = "photos"\neffort = "quick"\nextra = "none"\nmax-memory = "1G"\n'
    (place / "ten.toml").write_text(head + ten, encoding="utf-8")
    (place / "many.toml").write_text(head + many, encoding="utf-8")
    reading, _ = sweep(place, "ten.toml", "here", "--dry-run")
    reading_many, _ = sweep(place, "many.toml", "here", "--dry-run")
    first, one = sweep(place, "ten.toml", "here")
    second, again = sweep(place, "ten.toml", "here")
    count = len(one["jobs"])
    job = (second - reading) / count
    return {
        "jobs": count, "processor_seconds": {"first": round(first, 1), "again": round(second, 1)},
        "job": round(job, 2), "sweep": {str(count): round(reading, 1), str(MANY): round(reading_many, 1)},
        "processor_hours_of_1000": round((MANY * job + reading_many) / 3600, 2),
        "clock": {"first": clock(one), "again": clock(again)},
        "versions": versions(), "platform": platform_kind(1),
    }  # fmt: skip


def sweep(place: Path, file: str, out: str, *more: str) -> tuple[float, dict[str, Any]]:
    """Processor seconds of the sweep and its jobs, and its table; empty where none is written."""
    command = [sys.executable, "-m", "mimicut", "sweep", file, "--out", out, "--jobs", "2", "--threads", "1", *more]
    root = str(Path(__file__).parents[2])
    before = os.times()
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": root})
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    table = place / out / "sweep.json"
    return seconds, json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}


def clock(table: dict[str, Any]) -> dict[str, float]:
    rows = table["jobs"]
    return {
        "sweep": round(table["seconds"], 1), "processes": round(sum(row["seconds"] for row in rows), 1),
        "runs": round(sum(row["result"]["seconds"] for row in rows), 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
