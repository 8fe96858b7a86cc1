"""What the default recipe costs as a whole, step by step, on networks of the real size: a JSON line for each teacher.

    python -m benchmarks.studies.compress_cost torchvision:resnet50 --device cuda     # a minute on an H200

Random weights and images, but for the demo's networks: the work does not depend on what they are. Appended to
results/compress_cost.jsonl. seconds: by the clock, of everything after the teacher is built, the folder on disk
included; stages: when each began; mimic_seconds: of the steps alone; error: at the seam, on the images set aside.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.json_lines import add
from mimicut import demo
from mimicut.base.environment import versions
from mimicut.inputs.image_set import read_images
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
        add(options.out, whole_run(spec, options.images, options.steps, options.keep, options.device))


def whole_run(spec: str, images: int, steps: int, keep: float, device: str) -> dict[str, Any]:
    """The line of one run: from a loaded teacher to the folder on disk."""
    teacher = load_teacher(spec, **({} if spec.startswith("demo:") else {"pretrained": False}))
    size = teacher.preprocessing.input_size
    given: Any = torch.randn(images, *size, generator=torch.Generator().manual_seed(0))
    if spec.startswith("demo:"):
        given = read_images(demo.few_images(images, 0), teacher.preprocessing)
    config = preset("default", steps=steps, device=device, views=teacher.views)
    stages: list[tuple[float, str]] = []
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = compress(
            teacher, given, keep=keep, config=config, folder=Path(scratch, "small"),
            on_stage=lambda text: stages.append((round(time.perf_counter() - started, 1), text)),
        )  # fmt: skip
    seconds, closed = time.perf_counter() - started, result.recovery.closed_form
    return {
        "teacher": spec, "images": images, "steps": steps, "keep": keep, "seconds": round(seconds, 1), "stages": stages,
        "mimic_seconds": round(result.recovery.mimic.seconds, 2), "error": result.report.feature_error_relative,
        "closed_form_seconds": closed and round(closed.seconds, 1), "views": closed and closed.views,
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
        "peak_gpu_mib": torch.cuda.max_memory_allocated() >> 20 if gpu else None, "versions": versions(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
