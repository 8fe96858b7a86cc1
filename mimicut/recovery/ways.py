"""In which precision and memory layout a step is taken: by a rule where little time is at stake, else by trying.

Convolutions on a CPU are mostly quicker on pixels whose channels lie together ("channels_last"); bf16 is quicker where
the processor multiplies it in hardware, for some networks: in it EfficientNet-Lite0 takes 5 times as long where
resnet18 takes a fifth (docs/LOG.md). So it is measured. The order of sums differs from layout to layout, and with it
the last bits of a student: whoever wants the same ones on any machine names both.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mimicut.base.layout import learns_channels_last

AUTO = "auto"
# A trial takes TRIED_STEPS steps each way, of SHARE_OF_BATCH of the images, but of LEAST_IMAGES: no more than
# SHARE_OF_RUN of all steps. Source: assumption.
TRIED_STEPS, SHARE_OF_BATCH, LEAST_IMAGES, SHARE_OF_RUN = 3, 0.25, 4, 0.03
# Operations of the whole run from which a trial pays: a quarter of an hour at 20 GFLOP/s, half a minute at 600; the
# demo's networks stay below. Source: assumption.
LEAST_FLOPS = 2e13
# A way is taken instead of the rule's where a step takes less than this share of its time: closer ones differ from run
# to run, and a run should give the same student again. Source: assumption.
WORTH = 0.85
# A way in which a step takes so many times the best one's is given up. Source: assumption.
HOPELESS = 3.0


@dataclass(frozen=True)
class Way:
    """precision: "float32", "bf16" or "float64"; layout: a key of LAYOUTS."""

    precision: str
    layout: str

    def __str__(self) -> str:
        return f"{self.precision}, {self.layout.replace('_', ' ')}"


def ways(
    models: tuple[nn.Module, ...], precision: str, layout: str, device: torch.device, runs: Callable[[], bool]
) -> list[Way]:
    """Those that there are, the rule's first. precision, layout: what is asked for, or AUTO. models: teacher and
    student; runs(): whether they run on images that lie channels last."""
    layouts, precisions = [layout], [precision]
    if layout == AUTO:
        convolves = any(p.ndim == 4 for model in models for p in model.parameters())
        last = convolves and learns_channels_last(*models) and runs()
        layouts = ["contiguous"] + ["channels_last"] * last
        if device.type == "cpu":  # where the rule is the other one
            layouts.reverse()
    if precision == AUTO:
        precisions = ["float32", "bf16"] if bf16_in_hardware(device) else ["float32"]
    return [Way(p, where) for p, where in itertools.product(precisions, layouts)]


def worth_trying(steps: int, batch: int, each_flops: Callable[[], float], found: list[Way]) -> bool:
    """Would a trial of these ways cost little of the run? each_flops(): operations of a pass of one image."""
    tried = len(found) * TRIED_STEPS * trial_images(batch) / batch
    if len(found) < 2 or tried > SHARE_OF_RUN * steps:
        return False
    return 4 * each_flops() * batch * steps >= LEAST_FLOPS  # teacher and student forward, and twice as much back


def trial_images(batch: int) -> int:
    return min(batch, max(LEAST_IMAGES, round(SHARE_OF_BATCH * batch)))


def quickest(found: list[Way], seconds: Callable[[Way, float], float]) -> tuple[Way, dict[str, float]]:
    """The way to take, and the seconds of a step each way. seconds(way, most): of a step; `most` is after what it may
    give up."""
    took: dict[Way, float] = {}
    for way in found:
        took[way] = seconds(way, HOPELESS * min(took.values(), default=float("inf")))
    best = min(took, key=lambda way: took[way])
    taken = best if took[best] < WORTH * took[found[0]] else found[0]
    return taken, {str(way): round(each, 4) for way, each in took.items()}


def bf16_in_hardware(device: torch.device) -> bool:
    """Does the processor multiply bf16 itself? One that emulates it takes 2 to 5 times as long as for float32."""
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
    """A sentence of what was taken and why. tried: as from `quickest`."""
    each = "; ".join(f"{way} {seconds:.3g}" for way, seconds in tried.items())
    return f"mimic: {Way(precision, layout)}" + (f" (seconds of a trial step: {each})" if tried else "")


def emulated(precision: str, device: torch.device | str | None) -> list[str]:
    """What to know where bf16 is asked for and the processor only emulates it."""
    device = torch.device(device or "cpu")
    if precision != "bf16" or bf16_in_hardware(device):
        return []
    return [
        f"bf16 was asked for, which this {device.type} only emulates: a step takes longer in it than in float32; "
        "precision auto takes what is quickest"
    ]


def flops_of(run: Callable[[], object]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())
