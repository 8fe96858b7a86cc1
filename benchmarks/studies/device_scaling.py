"""Several devices: what part of a step is communication, and what four devices would make of it, on paper.

    python -m benchmarks.studies.device_scaling     # two idle cores; minutes; then `benchmarks.speed --page`

Two processes on one machine's cores, of one thread each, take the steps of mimicking together (gloo over loopback); the
same steps are taken by one process with the whole batch and with half of it. Random weights and images at 224 pixels;
half the MACs kept. A step of n devices is taken to cost what the measured passes of its share of the batch cost (a
straight line through the whole and the half batch) and a ring's share of the measured communication: 2 (n - 1) / n
times the gradients, so half as much again with four as with two. results/device_scaling.json.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.json_lines import machine
from mimicut.anatomy.find_seam import trace
from mimicut.base.environment import platform_kind, versions
from mimicut.base.ranks import Ranks, current
from mimicut.inputs.image_set import read_images
from mimicut.planning.planner import make_plan
from mimicut.recovery.config import preset
from mimicut.recovery.mimic import mimic
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut

OUT = Path(__file__).parents[1] / "results" / "device_scaling.json"
NETWORKS, BATCH, STEPS = ("torchvision:resnet18", "torchvision:mobilenet_v2"), 16, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", nargs=4, metavar=("NETWORK", "BATCH", "RANK", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.process:
        network, batch, rank, store = options.process
        if rank != "alone":
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
        print(json.dumps(timed(network, int(batch))))
        return
    found = {"platform": platform_kind(1, "cpu"), "versions": versions(), "batch": BATCH, "networks": {}}
    for network in NETWORKS:
        (whole,), (half,) = run(network, BATCH, ["alone"]), run(network, BATCH // 2, ["alone"])
        two = run(network, BATCH, ["0", "1"])
        found["networks"][network] = {"whole": whole, "half": half, "two": two[0]}
        OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(found)))


def run(network: str, batch: int, ranks: Sequence[str]) -> list[dict[str, Any]]:
    """What each of these processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name, "--process", network, str(batch)]
        started = [
            subprocess.Popen([*command, rank, f"{folder}/store"], stdout=subprocess.PIPE, text=True) for rank in ranks
        ]
        texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{network}: a process failed")
    return [json.loads(text.splitlines()[-1]) for text in texts]


def timed(network: str, batch: int) -> dict[str, Any]:
    """Medians over the steps of this process: seconds of a step, and of what it sends and waits for."""
    teacher = load_teacher(network, pretrained=False)
    pixels = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    few: Any = read_images(pixels, teacher.preprocessing)
    anatomy = trace(teacher.model, teacher.example())
    student = cut(teacher.model, make_plan(teacher.model, anatomy, keep=0.5))
    config = preset(
        "default", steps=STEPS, batch_size=batch, views=teacher.views, lr=1e-6, precision="float32",
        layout="channels_last", device="cpu",
    )  # fmt: skip
    ends, sent = list[float](), [0.0]
    own = Ranks.add_up

    def add_up(self: Ranks, tensors: Sequence[Tensor]) -> None:
        begun = time.perf_counter()
        own(self, tensors)
        sent[-1] += time.perf_counter() - begun

    def on_step(done: int, total: int, loss: float) -> None:
        ends.append(time.perf_counter())
        sent.append(0.0)

    Ranks.add_up = add_up  # type: ignore[method-assign]  # of this process, which does nothing else
    mimic(teacher.model, copy.deepcopy(student), anatomy.seam, few, config, on_step=on_step, ranks=current())
    steps = [after - before for before, after in pairwise(ends)]
    body = (p for name, p in student.named_parameters() if name not in anatomy.seam.head)
    return {
        "step": round(statistics.median(steps), 4), "sent": round(statistics.median(sent[1:-1]), 4),
        "gradient_mb": round(sum(4 * p.numel() for p in body) / 1e6, 1),
    }  # fmt: skip


def table(found: dict[str, Any]) -> list[str]:
    """The section of docs/speed.md."""
    batch = found["batch"]
    lines = [
        "## Several devices",
        "",
        "Made by `python -m benchmarks.studies.device_scaling`, whose docstring says how: two processes, of one thread",
        f"each, on {machine([found])}; a batch of {batch} in all.",
        "*On paper* is computed: the passes of a quarter of the batch, and a ring of four over the same link. No",
        "accelerators were to be had: their passes are faster, and so are their links.",
        "",
        "| network | gradients, MB | one, s | two, s | of it communication | speed-up of two | of four, on paper |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for network, of in found["networks"].items():
        whole, half, two = of["whole"]["step"], of["half"]["step"], of["two"]
        four = 1.5 * half - 0.5 * whole + 1.5 * two["sent"]  # the line through both at a quarter
        lines.append(
            f"| {network} | {two['gradient_mb']} | {whole:.3g} | {two['step']:.3g} | {two['sent'] / two['step']:.0%} | "
            f"{whole / two['step']:.2f} | {whole / four:.2f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
