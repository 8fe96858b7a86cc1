"""The precision and memory layout of a step: chosen by a rule for short runs, else by trying.

Convolutions on a CPU are mostly quicker on pixels whose channels are adjacent in memory ("channels_last"); bf16 is
quicker for some networks where the processor multiplies it in hardware: EfficientNet-Lite0 takes 5 times as long in it
where resnet18 takes a fifth (docs/LOG.md). So it is measured; on CUDA the rule is bf16 with channels last, as its
matrix units take them (assumption). The order of sums differs from layout to layout, and with it the last bits of a
student: to get the same bits on any machine, name both.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mimicut.base.layout import learns_channels_last

AUTO = "auto"
# A trial takes TRIED_STEPS steps each way, with SHARE_OF_BATCH of a batch's images, LEAST_IMAGES at the least: no more
# than SHARE_OF_RUN of all steps. Source: assumption.
TRIED_STEPS, SHARE_OF_BATCH, LEAST_IMAGES, SHARE_OF_RUN = 3, 0.25, 4, 0.03
# Operations of the whole run from which a trial pays off: a quarter of an hour at 20 GFLOP/s, half a minute at 600; the
# demo's networks stay below. Source: assumption.
LEAST_FLOPS = 2e13
# A way is taken instead of the rule's where a step takes less than this share of its time: closer ones differ from run
# to run, and a run should give the same student again. Source: assumption.
CLEARLY_LESS = 0.85
# A way in which a step takes so many times as long as in the best one is given up. Source: assumption.
HOPELESS = 3.0


@dataclass(frozen=True)
class Way:
    """How a step is computed: precision "float32", "bf16" or "float64", and layout, a key of LAYOUTS."""

    precision: str
    layout: str

    def __str__(self) -> str:
        return f"{self.precision}, {self.layout.replace('_', ' ')}"


def ways(
    models: tuple[nn.Module, ...], precision: str, layout: str, device: torch.device, runs: Callable[[], bool]
) -> list[Way]:
    """List the ways that there are, the rule's first.

    Args:
        models: Teacher and student.
        precision, layout: What is asked for, or AUTO.
        device: Where they train.
        runs: Whether both run on images in channels_last; called only where that matters.
    """
    layouts, precisions = [layout], [precision]
    if layout == AUTO:
        convolves = any(p.ndim == 4 for model in models for p in model.parameters())
        safe = device.type != "cpu" or learns_channels_last(*models)
        last = convolves and safe and runs()
        layouts = ["contiguous"] + ["channels_last"] * last
        if device.type in ("cpu", "cuda"):  # where the rule is the other one
            layouts.reverse()
    if precision == AUTO:
        precisions = ["float32", "bf16"] if bf16_in_hardware(device) else ["float32"]
        if device.type == "cuda":  # its matrix units take bf16 and no float32
            precisions.reverse()
    return [Way(p, where) for p, where in itertools.product(precisions, layouts)]


def worth_trying(steps: int, batch: int, each_flops: Callable[[], float], found: list[Way]) -> bool:
    """Whether trying these ways costs little of the run.

    Args:
        steps: Of the run.
        batch: Images of a step.
        each_flops: Operations of a teacher's pass over one image; called only where that matters.
        found: The ways.
    """
    tried = len(found) * TRIED_STEPS * trial_images(batch) / batch
    if len(found) < 2 or tried > SHARE_OF_RUN * steps:
        return False
    return 4 * each_flops() * batch * steps >= LEAST_FLOPS  # teacher and student forward, and twice as much back


def trial_images(batch: int) -> int:
    """How many of a batch's images a trial step has."""
    return min(batch, max(LEAST_IMAGES, round(SHARE_OF_BATCH * batch)))


def quickest(found: list[Way], seconds: Callable[[Way, float], float]) -> tuple[Way, dict[str, float]]:
    """Choose the way to take.

    Args:
        found: The ways, the rule's first: another one must be clearly quicker.
        seconds: From (way, most) to the seconds of a step; it may give up after `most` seconds.

    Returns:
        The way, and the seconds of a step in each, by its name.
    """
    took: dict[Way, float] = {}
    for way in found:
        took[way] = seconds(way, HOPELESS * min(took.values(), default=float("inf")))
    best = min(took, key=lambda way: took[way])
    taken = best if took[best] < CLEARLY_LESS * took[found[0]] else found[0]
    return taken, {str(way): round(each, 4) for way, each in took.items()}


def bf16_in_hardware(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 itself; one that emulates it takes 2 to 5 times as long as for float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one is ARM's


def describe_way(precision: str, layout: str, tried: dict[str, float]) -> str:
    """Say what was taken and why, in a sentence. tried: seconds of a step in each way, as `quickest` gives them.

    >>> describe_way("float32", "channels_last", {})
    'mimic: float32, channels last'
    """
    each = "; ".join(f"{way} {seconds:.3g}" for way, seconds in tried.items())
    return f"mimic: {Way(precision, layout)}" + (f" (seconds of a trial step: {each})" if tried else "")


def emulated(precision: str, device: torch.device | str | None) -> list[str]:
    """Notes for the user where bf16 is asked for and the processor only emulates it; else none."""
    device = torch.device(device or "cpu")
    if precision != "bf16" or bf16_in_hardware(device):
        return []
    return [
        f"this {device.type} only emulates the requested bf16: a step takes longer than in float32; precision auto "
        "takes the faster one"
    ]


def flops_of(run: Callable[[], object]) -> float:
    """Count the floating-point operations of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())
