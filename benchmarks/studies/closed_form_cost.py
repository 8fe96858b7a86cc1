"""What the evidence and the closed form after it cost, on ResNet-50 at 224 pixels with 200 images by default.

    python -m benchmarks.studies.closed_form_cost            # about a minute on two idle cores
    python -m benchmarks.studies.closed_form_cost --teacher torchvision:mobilenet_v2 --size 160 --images 50 --keep 0.7

One JSON line; also written to results/closed_form_cost.json. Random weights (or those that the name brings along) and
random images: the work does not depend on what they are. seconds: by the clock; cpu_seconds: of all threads;
peak_memory_mib: of the process above what it was before. error: squared error of the student's features on other such
images over the teacher's squared deviation.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.cell import _give_back, _peak, _start_peak
from mimicut.anatomy.find_seam import trace
from mimicut.base.environment import versions
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.planner import make_plan
from mimicut.recovery.closed_form import ClosedFormOptions, closed_form
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.judge import Judge
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut

OUT = Path(__file__).parents[1] / "results" / "closed_form_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="torchvision:resnet50")
    parser.add_argument("--size", type=int, help="side of the images; by default the teacher's own")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--max-memory", type=float, help="GB that each may hold; by default the library's own bound")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = options.teacher.partition(":")[0] in ("timm", "torchvision", "hf")
    teacher = load_teacher(options.teacher, pretrained=not library)
    size = teacher.preprocessing.input_size
    size = size if options.size is None else (size[0], options.size, options.size)
    draws = torch.Generator().manual_seed(0)
    images, others = torch.randn(options.images, *size, generator=draws), torch.randn(32, *size, generator=draws)
    most = {} if options.max_memory is None else {"max_memory": int(options.max_memory * 1e9)}
    anatomy = trace(teacher.model, torch.zeros(2, *size))
    evidence, first = _measured(lambda: channel_evidence(teacher.model, anatomy, images, seed=0, **most))
    plan = make_plan(teacher.model, anatomy, keep=options.keep, evidence=evidence)
    student = cut(teacher.model, plan)
    log, second = _measured(
        lambda: closed_form(CutStudent(teacher.model, student, anatomy, plan), images, ClosedFormOptions(**most))
    )
    judge = Judge(teacher.model, plan.seam, [((part,), {}) for part in others.split(8)])
    line = {
        "teacher": options.teacher, "size": size[-1], "images": options.images, "keep": options.keep,
        "threads": options.threads, "max_memory_gb": options.max_memory, "layers": len(log.layers),
        "solved": sum(each.ridge is not None for each in log.layers), "views": log.views,
        "error": round(judge.error(student), 5), "evidence": first, "closed_form": second, "versions": versions(),
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
