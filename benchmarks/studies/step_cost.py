"""What one mimic step costs above the passes it cannot do without.

    python -m benchmarks.studies.step_cost

Bare: teacher forward to the seam without gradients, then student forward and backward from the seam, in plain torch on
one ready batch. Step: what `mimic` takes from one `on_step` to the next, once with the batch taken from a tensor
(`ratio`) and once with ImageNet views made from decoded images (`ratio_with_views`). A bare step follows every mimic
step, so that whatever else the machine does meets both alike; a ratio is the median over these pairs.

Not covered: what `mimic` does once (checks, a copy of the student's tensors), decoding of files.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
import torchvision
from torch import nn

from mimicut.anatomy.find_seam import trace
from mimicut.inputs.image_set import Preprocessing, read_images
from mimicut.planning.planner import make_plan
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.mimic import mimic
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import Seam, capturing

_IMAGENET = Preprocessing(input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256)


def timed_pairs(
    teacher: nn.Module, student: nn.Module, seam: Seam, few: Any, views: str, batch: torch.Tensor, steps: int
) -> list[tuple[float, float]]:
    """(seconds of a mimic step, seconds of the bare step right after it), without the first pair."""
    bare_teacher, bare_student = copy.deepcopy(teacher), copy.deepcopy(student)
    for module in bare_student.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    pairs: list[tuple[float, float]] = []
    with capturing(bare_teacher, seam) as target, capturing(bare_student, seam) as learner:
        gradient = torch.full((len(batch), *seam.shapes[0]), 1e-6)
        started = time.perf_counter()

        def on_step(done: int, total: int, loss: float) -> None:
            nonlocal started
            ended = time.perf_counter()
            with torch.no_grad():
                target.features(batch)
            learner.features(batch)[0].backward(gradient)
            bare_ended = time.perf_counter()
            pairs.append((ended - started, bare_ended - ended))
            bare_student.zero_grad(set_to_none=True)
            print(f"{views}: {done} of {total}: {pairs[-1][0]:.2f} s and {pairs[-1][1]:.2f} s bare", file=sys.stderr)
            started = time.perf_counter()

        config = MimicConfig(steps=steps + 1, lr=1e-6, views=views)
        mimic(teacher, copy.deepcopy(student), seam, few, config, on_step=on_step)
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--keep-width", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    teacher = torchvision.models.resnet18(weights=None).eval()
    anatomy = trace(teacher, torch.randn(2, 3, 224, 224))
    student, seam = cut(teacher, make_plan(teacher, anatomy, keep_width=options.keep_width)), anatomy.seam
    pixels = torch.randint(0, 256, (options.images, 3, 256, 256), dtype=torch.uint8)
    images = read_images(pixels, _IMAGENET)
    batch = images.batch()
    plain = timed_pairs(teacher, student, seam, batch, "none", batch, options.steps)
    viewed = timed_pairs(teacher, student, seam, images, "imagenet", batch, options.steps)
    result = {
        "ratio": round(statistics.median(step / bare for step, bare in plain), 4),
        "ratio_with_views": round(statistics.median(step / bare for step, bare in viewed), 4),
        "step_seconds_median": round(statistics.median(step for step, _ in plain), 4),
        "step_with_views_seconds_median": round(statistics.median(step for step, _ in viewed), 4),
        "bare_seconds_median": round(statistics.median(bare for _, bare in plain + viewed), 4),
        "steps": options.steps, "model": "torchvision:resnet18", "input": 224, "batch": min(64, options.images),
        "keep_width": options.keep_width, "threads": options.threads, "torch": torch.__version__,
    }  # fmt: skip
    print(f"one mimic step costs {result['ratio']:.3f} of the bare passes (floor: at most 1.15)", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
