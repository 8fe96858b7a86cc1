"""Peak resident memory and seconds of `compress`, stage by stage, on pictures from files: one JSON line.

    python -m benchmarks.studies.compress_memory TEACHER LEARN/ --held-out HELD/ --steps 5 --keep 0.7

Resident memory is read every 20 ms; before: what the process held before `compress` began (torch and the teacher).
seconds: of each stage by the clock, cpu: of its processor time, which other work on the machine changes less. Appended
to results/compress_memory.jsonl.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mimicut.base.environment import versions
from mimicut.recovery.config import preset
from mimicut.results.teachers import load_teacher
from mimicut.workflow.compress import compress

OUT = Path(__file__).parents[1] / "results" / "compress_memory.jsonl"
_PAUSE = 0.02  # seconds between two looks at the memory


class Stages:
    """Notes when stages begin, and the most memory that each held."""

    def __init__(self, held: Callable[[], int]):
        self._held, self._ended = held, threading.Event()
        self.rows: list[dict[str, Any]] = []
        self.begin("before")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def begin(self, text: str) -> None:
        self.close()
        self.rows.append(
            {"stage": text, "peak_mib": self._held() >> 20, "began": time.perf_counter(), "cpu": time.process_time()}
        )

    def close(self) -> None:
        if self.rows and "began" in self.rows[-1]:
            row = self.rows[-1]
            row["seconds"] = round(time.perf_counter() - row.pop("began"), 1)
            row["cpu"] = round(time.process_time() - row["cpu"], 1)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self.close()

    def _watch(self) -> None:
        while not self._ended.wait(_PAUSE):
            row = self.rows[-1]
            row["peak_mib"] = max(row["peak_mib"], self._held() >> 20)


def resident() -> int:
    """Bytes of this process that are in memory; Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="as mimicut names it")
    parser.add_argument("images", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--input-size", type=int, nargs=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--max-memory", type=int, help="bytes; else compress's own bound")
    parser.add_argument("--mimic-alone", action="store_true", help="no evidence and no closed form: the other stages")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    teacher = load_teacher(options.teacher, input_size=options.input_size)
    asked: dict[str, Any] = {} if options.max_memory is None else {"max_memory": options.max_memory}
    config = preset("default", steps=options.steps, views=teacher.views)
    if options.mimic_alone:
        asked, config = asked | {"score": "l1"}, replace(config, start="cut")
    stages, started = Stages(resident), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = compress(
            teacher, options.images, held_out=options.held_out, keep=options.keep, folder=Path(folder) / "small",
            config=config, on_stage=lambda text: None if text.startswith("note:") else stages.begin(text), **asked,
        )  # fmt: skip
        stages.end()
    line = {
        "teacher": options.teacher.rpartition("/")[2], "input_size": teacher.preprocessing.input_size,
        "images": result.report.images_few, "held_out": result.report.images_held_out, "steps": options.steps,
        "keep": options.keep, "mimic_alone": options.mimic_alone, "max_memory": options.max_memory,
        "batch_parts": result.recovery.mimic.parts, "layout": result.recovery.mimic.config.layout,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": max(row["peak_mib"] for row in stages.rows), "stages": stages.rows,
        "feature_error": result.report.feature_error_relative, "agreement": result.report.top1_agreement,
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    for row in stages.rows:
        print(f"{row['peak_mib']:>7} MiB {row['seconds']:>7.1f} s {row['cpu']:>7.1f} s cpu  {row['stage'][:80]}")
    print(json.dumps(line), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
