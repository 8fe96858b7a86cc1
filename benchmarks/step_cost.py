"""What one mimic step costs above the passes it cannot do without.

    python benchmarks/step_cost.py

Bare: teacher forward to the seam without gradients, then student forward and backward from the seam, in plain torch on
one ready batch. Step: what `mimic` takes from one `on_step` to the next, once with the batch taken from a tensor
(`ratio`) and once with ImageNet views made from decoded images (`ratio_with_views`). All three are timed in turns, so
that whatever else the machine does meets them alike; the figures are medians over the rounds.

Not covered: what `mimic` does once (checks, a copy of the student's tensors), decoding of files.
"""

import argparse
import itertools
import json
import statistics
import sys
import time

import torch
import torchvision
from torch import nn

from understudy.anatomy import trace
from understudy.cut import cut
from understudy.images import Preprocessing, read_images
from understudy.planner import make_plan
from understudy.recover.mimic import MimicConfig, mimic
from understudy.seam import Seam, capturing

_IMAGENET = Preprocessing(input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256)


def bare_seconds(teacher: nn.Module, student: nn.Module, seam: Seam, batch: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each bare step."""
    for module in student.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    taken = []
    with capturing(teacher, seam) as target, capturing(student, seam) as learner:
        gradient = None
        for _ in range(steps + 1):
            start = time.perf_counter()
            with torch.no_grad():
                target.features(batch)
            (feat,) = learner.features(batch)
            if gradient is None:
                gradient = torch.full_like(feat, 1e-6)
            feat.backward(gradient)
            taken.append(time.perf_counter() - start)
    student.zero_grad(set_to_none=True)
    return taken[1:]


def step_seconds(teacher: nn.Module, student: nn.Module, seam: Seam, few, views: str, steps: int) -> list[float]:
    """Seconds of each mimic step but the first."""
    marks: list[float] = []
    config = MimicConfig(steps=steps + 1, batch_size=64, lr=1e-6, views=views)
    mimic(teacher, student, seam, few, config, on_step=lambda *_: marks.append(time.perf_counter()))
    return [after - before for before, after in itertools.pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--keep-width", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each kind in a round")
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
    seconds: dict[str, list[float]] = {"bare": [], "step": [], "step_with_views": []}
    for done in range(1, options.rounds + 1):
        seconds["bare"] += bare_seconds(teacher, student, seam, batch, options.steps)
        seconds["step"] += step_seconds(teacher, student, seam, batch, "none", options.steps)
        seconds["step_with_views"] += step_seconds(teacher, student, seam, images, "imagenet", options.steps)
        print(f"round {done} of {options.rounds}", file=sys.stderr)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    result = {
        "ratio": round(medians["step"] / medians["bare"], 4),
        "ratio_with_views": round(medians["step_with_views"] / medians["bare"], 4),
        **{f"{key}_seconds_median": round(value, 4) for key, value in medians.items()},
        "model": "torchvision:resnet18", "input": 224, "batch": min(64, options.images),
        "keep_width": options.keep_width, "threads": options.threads, "torch": torch.__version__,
    }  # fmt: skip
    print(f"one mimic step costs {result['ratio']:.3f} of the bare passes (floor: at most 1.15)", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
