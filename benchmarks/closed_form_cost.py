"""What the closed form and the evidence before it cost on ResNet-50 at 224 pixels, 200 images: one JSON line.

    python -m benchmarks.closed_form_cost            # about a minute and a half on two idle cores

Random weights and images: the work does not depend on what they are. Also written to results/closed_form_cost.json.
seconds: by the clock; cpu_seconds: of all threads; peak_memory_mib: of the process above what it was before.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.cell import _give_back, _peak, _start_peak
from understudy.anatomy import trace
from understudy.cut import cut
from understudy.planner import make_plan
from understudy.reconstruction import reconstruction
from understudy.recover.closed_form import closed_form
from understudy.report import versions
from understudy.teachers import load_teacher

OUT = Path(__file__).parent / "results" / "closed_form_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="torchvision:resnet50")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teacher = load_teacher(options.teacher, pretrained=False)
    size = teacher.preprocessing.input_size
    images = torch.randn(options.images, *size, generator=torch.Generator().manual_seed(0))
    anatomy = trace(teacher.model, torch.zeros(2, *size))
    evidence, first = _measured(lambda: reconstruction(teacher.model, anatomy, images, seed=0))
    plan = make_plan(teacher.model, anatomy, keep=options.keep, evidence=evidence)
    student = cut(teacher.model, plan)
    log, second = _measured(lambda: closed_form(teacher.model, student, anatomy, plan, images))
    line = {
        "teacher": options.teacher, "images": options.images, "keep": options.keep, "threads": options.threads,
        "layers": len(log.layers), "solved": sum(each.ridge is not None for each in log.layers), "views": log.views,
        "evidence": first, "closed_form": second, "versions": versions(),
    }  # fmt: skip
    options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


def _measured(run):
    _give_back()
    before, clock, cpu = _start_peak("cpu"), time.perf_counter(), time.process_time()
    found = run()
    took = {"seconds": round(time.perf_counter() - clock, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return found, took | {"peak_memory_mib": round((_peak("cpu") - before) / 2**20)}


if __name__ == "__main__":
    main()
