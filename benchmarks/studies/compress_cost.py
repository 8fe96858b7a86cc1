"""What the default recipe costs as a whole, step by step, on networks of the real size: a JSON line for each teacher.

    python -m benchmarks.studies.compress_cost torchvision:resnet50 --device cuda     # a minute on an H200

Random weights and images: the work does not depend on what they are. Appended to results/compress_cost.jsonl. seconds:
by the clock, of everything behind building the teacher; stages: when each began.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from mimicut.base.environment import versions
from mimicut.recovery.config import preset
from mimicut.results.teachers import load_teacher
from mimicut.workflow.compress import compress

OUT = Path(__file__).parents[1] / "results" / "compress_cost.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="+", help="as mimicut names them")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for spec in options.teachers:
        teacher = load_teacher(spec, pretrained=False)
        size = teacher.preprocessing.input_size
        images = torch.randn(options.images, *size, generator=torch.Generator().manual_seed(0))
        config = preset("default", steps=options.steps, device=options.device, views="pad_crop")
        stages: list[tuple[float, str]] = []
        started = time.perf_counter()
        result = compress(
            teacher, images, keep=options.keep, config=config,
            on_stage=lambda text, at=started, told=stages: told.append((round(time.perf_counter() - at, 1), text)),
        )  # fmt: skip
        closed = result.recovery.closed_form
        gpu = options.device.startswith("cuda")
        line = {
            "teacher": spec, "images": options.images, "steps": options.steps, "keep": options.keep,
            "seconds": round(time.perf_counter() - started, 1), "stages": stages,
            "closed_form_seconds": closed and round(closed.seconds, 1), "views": closed and closed.views,
            "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
            "peak_gpu_mib": torch.cuda.max_memory_allocated() >> 20 if gpu else None, "versions": versions(),
        }  # fmt: skip
        text = json.dumps(line)
        print(text, flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
