"""What each stage costs beside the passes it cannot do without: docs/speed.md, from JSON lines.

    python -m benchmarks.speed --device cuda            # under 8 minutes; all six networks
    python -m benchmarks.speed --threads 2              # on a CPU
    python -m benchmarks.speed --page                   # docs/speed.md, from the lines

Random weights and images at 224 pixels: the work does not depend on what they are. Bare passes are plain torch on a
ready batch, in the precision and layout that the step took: of mimicking the teacher forward, the student forward and
back, one right after each step (on CUDA ten after each ten); of evidence, closed form and verification as many images
forward (of evidence a quarter back, too) as the stage passes, at the pace measured before and after all stages. So a
ratio compares what ran in the same minutes. On CUDA, and with --whole on a CPU, there are whole runs as well
(`benchmarks.studies.compress_cost`). Appended to results/speed.jsonl, a line for each network and run.

Not covered: decoding of files, several devices, exports.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import json_lines
from benchmarks.studies import device_scaling
from benchmarks.studies.compress_cost import whole_run
from mimicut.anatomy.find_seam import trace
from mimicut.base import memory
from mimicut.base.environment import platform_kind, versions
from mimicut.base.layout import laid
from mimicut.inputs.image_set import ImageSet, read_images
from mimicut.planning.evidence import channel_evidence
from mimicut.planning.planner import make_plan
from mimicut.proof.figures import figures
from mimicut.recovery.batches import on_accelerator
from mimicut.recovery.closed_form import ClosedFormOptions, closed_form
from mimicut.recovery.config import MimicConfig, preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.mimic import mimic
from mimicut.recovery.pair import Pair
from mimicut.recovery.settle_options import settle
from mimicut.recovery.view_budget import affordable_views
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut
from mimicut.surgery.seam import Seam, capturing

OUT = Path(__file__).parent / "results" / "speed.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
NETWORKS = (
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:mobilenet_v2", "timm:efficientnet_lite0",
    "torchvision:vit_b_16", "torchvision:convnext_tiny",
)  # fmt: skip
SMALL = "demo:resnet14"  # of which the loop's own share is asked for
MOST_RATIO, MOST_SHARE = 1.10, 0.25  # on a CPU: of a step to its bare passes; of the loop in a small network's step
GPU_RATIO = {"torchvision:resnet50": 1.3, "torchvision:vit_b_16": 1.3}  # of a step to its bare passes
# Of whole runs of 400 steps on a GPU: at most so many seconds of the run, or of its steps.
GPU_SECONDS = {
    "torchvision:resnet50": ("seconds", 20), "torchvision:vit_b_16": ("seconds", 20), SMALL: ("mimic_seconds", 3),
}  # fmt: skip
_TOGETHER = 10  # steps that are timed at once on CUDA, whose losses are read so often


class Clock:
    """Seconds and peak memory of stages, by name."""

    def __init__(self, device: torch.device):
        self._device = device
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a stage."""
        memory.trim()
        self._forget_peak()
        self.wait()
        started = time.perf_counter()
        yield
        self.wait()
        self.stages[name] = {"seconds": round(time.perf_counter() - started, 3), "peak_mib": self._peak() >> 20}

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _forget_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif (resets := Path("/proc/self/clear_refs")).exists():
            resets.write_text("5")

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[SMALL, *NETWORKS], help="as mimicut names teachers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, help="default: 200, on a CPU 16")
    parser.add_argument("--batch", type=int, help="default: 64, on a CPU 16")
    parser.add_argument("--steps", type=int, help="timed steps; default: 50, on a CPU 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--whole", action="store_true", help="whole runs of --steps steps alone")
    parser.add_argument("--only-step", action="store_true", help="mimic steps alone: neither evidence nor closed form")
    parser.add_argument("--most-seconds", type=float, default=450.0, help="no network begins after that on CUDA")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="only write docs/speed.md")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json_lines.read(options.out)), encoding="utf-8")
        return
    torch.set_num_threads(options.threads)
    device, began = torch.device(options.device), time.perf_counter()
    cpu = device.type == "cpu"
    images, batch = options.images or (16 if cpu else 200), options.batch or (16 if cpu else 64)
    most = 1 if cpu else _TOGETHER
    steps = max(2 * most, -(-(options.steps or 5 * most) // most) * most)  # two turns at the least, all full
    name = _cpu(options.threads) if cpu else torch.cuda.get_device_name(device)
    place = {
        "device": name, "threads": options.threads, "platform": platform_kind(options.threads, options.device),
        "versions": versions(),
    }  # fmt: skip
    whole = options.networks if options.whole else [spec for spec in options.networks if spec in GPU_SECONDS]
    todo = [(spec, True) for spec in whole if options.whole or not (cpu or options.only_step)]
    todo += [(spec, False) for spec in options.networks if not options.whole]
    for spec, is_whole in todo:
        line: dict[str, Any] = {"network": spec, "images": images, "batch": batch}
        if not cpu and time.perf_counter() - began > options.most_seconds:
            line["left_out"] = f"{'the whole run: ' if is_whole else ''}{options.most_seconds:g} s were over"
        elif is_whole:
            line["whole"] = whole_run(spec, images, options.steps or (5 if cpu else 400), 0.5, options.device)
        else:
            line |= measured(spec, device, images, batch, steps, only_step=options.only_step)
        json_lines.add(options.out, {**line, **place})
        gc.collect()


def _cpu(threads: int) -> str:
    return f"cpu, {threads} thread{'s' * (threads != 1)}"


def measured(
    spec: str, device: torch.device, images: int, batch: int, steps: int, *, only_step: bool = False
) -> dict[str, Any]:
    """Run the stages of one network; return what a line holds."""
    teacher, clock = load_teacher(spec, **({} if spec.startswith("demo:") else {"pretrained": False})), Clock(device)
    channels, height, width = teacher.preprocessing.input_size
    shape = (images, channels, height * 8 // 7, width * 8 // 7)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, views = teacher.model, teacher.views
    with clock.stage("read"):
        given: Any = pixels[:, 0] if channels == 1 else pixels
        few = read_images(given, teacher.preprocessing)
    with clock.stage("trace"):
        anatomy = trace(model, teacher.example())
    model.to(device)
    ready = few.batch(range(min(batch, images))).to(device)
    with clock.stage("images to the device"):
        held = on_accelerator(few, views, device)
    before = pace(model, anatomy.seam, ready, clock, backward=True)
    evidence = None
    if not only_step:
        with clock.stage("evidence"):
            evidence = channel_evidence(model, anatomy, held, views=views)
    with clock.stage("plan and cut"):
        plan = make_plan(model, anatomy, keep=0.5, evidence=evidence)
        student = cut(model, plan)
    half = pace(student, anatomy.seam, ready, clock)
    closed = None
    if not only_step:
        with clock.stage("closed form"):
            closed = closed_form(CutStudent(model, student, anatomy, plan), held, ClosedFormOptions(views=views))
    pair = Pair.of(model, student, anatomy.seam)
    config = preset("default", steps=max(steps, 400), batch_size=batch, views=views, device=str(device))
    with clock.stage("rate and way"):
        config, ways = settle(pair, held, config)
    config = replace(config, steps=steps + (_TOGETHER if device.type == "cuda" else 1))
    with clock.stage("mimic steps and bare ones"):
        pairs = step_pairs(pair, held, ready, config, clock)
    with clock.stage("verification"):
        figures(model, student, anatomy.seam, few, batch_size=min(64, batch))
    after = pace(model, anatomy.seam, ready, clock, backward=True)
    once, back = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    bare = {"verification": images * (once + half[0])}
    if closed is not None:
        shown = max(1, affordable_views(anatomy) // 2)
        bare["evidence"] = shown * once + shown / 4 * (back - once)
        bare["closed form"] = closed.views * (once + half[0])
    ratios = [step / plain for step, plain in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "stages": clock.stages, "bare_seconds": {name: round(seconds, 3) for name, seconds in bare.items()},
        "precision": config.precision, "layout": config.layout, "ways": ways,
        "step_seconds": round(statistics.median(step for step, _ in pairs), 5),
        "bare_step_seconds": round(statistics.median(plain for _, plain in pairs), 5),
        "step_ratio": round(statistics.median(ratios), 4), "step_ratio_quartiles": [round(low, 4), round(high, 4)],
        "steps": len(pairs),
    }  # fmt: skip


def pace(model: nn.Module, seam: Seam, ready: Tensor, clock: Clock, *, backward: bool = False) -> tuple[float, float]:
    """Seconds for each image of a forward pass, and of one forward and back, the better of two tries; without
    `backward` the first one twice."""
    found = []
    for back in (False, backward):
        tries = []
        for _ in range(2):
            clock.wait()
            started = time.perf_counter()
            with capturing(model, seam) as capture, nullcontext() if back else torch.no_grad():
                feats = capture.features(ready.clone().requires_grad_(back))
                if back:
                    sum(f.float().square().mean() for f in feats).backward()
            clock.wait()
            tries.append((time.perf_counter() - started) / len(ready))
        found.append(min(tries))
    model.zero_grad(set_to_none=True)
    return found[0], found[1]


def step_pairs(
    pair: Pair, few: ImageSet, ready: Tensor, config: MimicConfig, clock: Clock
) -> list[tuple[float, float]]:
    """(seconds of a mimic step, of the bare step right after it), without the first ones."""
    bare = bare_step(pair, laid(ready, config.layout), config)
    each = _TOGETHER if ready.device.type == "cuda" else 1
    pairs: list[tuple[float, float]] = []
    started = time.perf_counter()

    def on_step(done: int, total: int, loss: float) -> None:
        nonlocal started
        clock.wait()
        ended = time.perf_counter()
        for _ in range(each):
            bare()
        clock.wait()
        pairs.append(((ended - started) / each, (time.perf_counter() - ended) / each))
        started = time.perf_counter()

    mimic(pair.teacher, copy.deepcopy(pair.student), pair.seam, few, replace(config, lr=1e-6), on_step=on_step)
    return pairs[1:]


def bare_step(pair: Pair, ready: Tensor, config: MimicConfig) -> Callable[[], None]:
    """A step without views, loss units, optimiser: only the passes."""
    teacher, student = pair.teacher, copy.deepcopy(pair.student)
    enabled = config.precision == "bf16"

    def step() -> None:
        with torch.autocast(ready.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
            with torch.no_grad(), capturing(teacher, pair.seam) as capture:
                wanted = capture.features(ready)
            with torch.enable_grad(), capturing(student, pair.student_seam) as capture:
                found = capture.features(ready)
        with torch.enable_grad():
            sum(nn.functional.mse_loss(f.float(), w.float()) for f, w in zip(found, wanted, strict=True)).backward()
        student.zero_grad(set_to_none=True)

    return step


def page(lines: list[dict[str, Any]]) -> str:
    """docs/speed.md, from the last line of each network and device."""
    lines = [{**line, "device": _cpu(line["threads"])} if _on_cpu(line) else line for line in lines]
    runs, lines = [x for x in lines if "whole" in x], [x for x in lines if "whole" not in x]
    last = {(line["device"], line["network"]): line for line in lines if "left_out" not in line}
    left = {(line["device"], line["network"]): line["left_out"] for line in lines if "left_out" in line}
    left = {key: why for key, why in left.items() if key not in last}
    devices = list(dict.fromkeys([*(device for device, _ in (*last, *left)), *(line["device"] for line in runs)]))
    text = [
        "# What it costs",
        "",
        "Made by `python -m benchmarks.speed` and `--page`, whose docstring says what a bare pass is. Random weights,",
        "images at 224 pixels (the demo's network: 32), half the MACs kept. A step is one of mimicking, with views,",
        "optimiser and loss. Steps and bare passes take turns: the ratio is the median of those within each turn, not",
        "that of the two columns, which are medians of their own; in brackets its quartiles. A floor that lies between",
        "them, or whose line has none, is not decided.",
        "",
    ]
    for device in devices:
        own = [line for (where, _), line in last.items() if where == device]
        text += [f"## {device}", ""]
        if own:
            text += [f"{json_lines.machine(own)}.", "", *_steps(own), "", *_stages(own), ""]
        whole = {line["network"]: line for line in runs if line["device"] == device}
        text += [*_whole_runs(list(whole.values())), ""] if whole else []
        not_run = [f"{name} ({why})" for (where, name), why in left.items() if where == device]
        text += [f"Not run: {', '.join(not_run)}.", ""] if not_run else []
    if not any(not device.startswith("cpu") for device in devices):
        text += [
            "## GPU", "", "Not measured: no GPU was to be had. The floors for one are open;",
            "`python -m benchmarks.speed --device cuda` measures them.", "",
        ]  # fmt: skip
    if device_scaling.OUT.exists():
        text += device_scaling.table(json.loads(device_scaling.OUT.read_text(encoding="utf-8")))
    return "\n".join(text)


def _on_cpu(line: dict[str, Any]) -> bool:
    return bool(line["device"].startswith("cpu"))


def _steps(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "| network | batch | way | step, s | bare passes, s | ratio | floor |"
    yield "|---|--:|---|--:|--:|--:|---|"
    for line in lines:
        ratio, small, quartiles = line["step_ratio"], line["network"] == SMALL, line.get("step_ratio_quartiles")
        most = 1 / (1 - MOST_SHARE) if small else MOST_RATIO
        if not _on_cpu(line):
            small, most = False, GPU_RATIO.get(line["network"], math.inf)
        if quartiles is None or quartiles[0] <= most <= quartiles[1]:
            verdict = "not decided"
        else:
            verdict = "met" if ratio <= most else "**missed**"
        share = f"loop's share {1 - 1 / ratio:.0%}, at most {MOST_SHARE:.0%}"
        floor = "" if most == math.inf else f"{share if small else f'at most {most:.2f}'}: {verdict}"
        spread = "not kept" if quartiles is None else " to ".join(f"{each:.2f}" for each in quartiles)
        way = f"{line['precision']}, {line['layout'].replace('_', ' ')}"
        seconds = f"{line['step_seconds']:.4g} | {line['bare_step_seconds']:.4g}"
        yield f"| {line['network']} | {line['batch']} | {way} | {seconds} | {ratio:.2f} ({spread}) | {floor} |"


def _whole_runs(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "Whole runs, from a loaded teacher to the folder on disk: half the MACs, the default recipe."
    yield ""
    yield "| network | images | steps | seconds | of them mimicking | error at the seam | floor on a GPU |"
    yield "|---|--:|--:|--:|--:|--:|---|"
    for line in lines:
        run, floor, (what, most) = line["whole"], "", GPU_SECONDS.get(line["network"], ("", 0))
        if what and not _on_cpu(line):
            floor = f"{most} s{' of mimicking' if what == 'mimic_seconds' else ''}: "
            floor += "met" if run[what] <= most else "**missed**"
        error = "" if run["error"] is None else f"{run['error']:.3f}"
        yield (
            f"| {line['network']} | {run['images']} | {run['steps']} | {run['seconds']} | {run['mimic_seconds']} | "
            f"{error} | {floor} |"
        )


def _stages(lines: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for line in lines for name in line["stages"]))
    yield "Seconds of each stage / peak MiB of the process (on CUDA: of its tensors); in brackets over its bare passes."
    yield ""
    yield f"| network | images | {' | '.join(names)} |"
    yield "|---|--:|" + "--:|" * len(names)
    for line in lines:
        cells = [_cell(line, name) for name in names]
        yield f"| {line['network']} | {line['images']} | {' | '.join(cells)} |"


def _cell(line: dict[str, Any], name: str) -> str:
    stage, bare = line["stages"].get(name), line["bare_seconds"].get(name)
    if stage is None:
        return "not run"
    beside = f" ({stage['seconds'] / bare:.2g}x)" if bare else ""
    return f"{stage['seconds']:.3g} / {stage['peak_mib']}{beside}"


if __name__ == "__main__":
    main()
