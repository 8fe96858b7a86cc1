"""A short second mimic in which a student sees its own rounding to INT8.

An INT8 file whose ranges are those of a few images (`int8.quantise`) is read back as a network that rounds as the file
does (`int8_network`), learns the outputs of its float32 self so, and is written back. Loss, views and optimiser are
those of the first mimic. It is judged on a part of the images that does not train it: the file changes only where it is
better there.

Two things differ from the first mimic, both measured (docs/LOG.md). The student itself is learned, not its teacher: on
images that it has learned before, what it lacks of the teacher says nothing about others, what rounding adds does. And
what the network returns is learned, with the head left as it is: rounding errs by a little at every position, which a
head that averages mostly takes back, and the least error of the features at the seam trades that for one that it does
not take back.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.disk import move, remove
from mimicut.base.errors import Diverged, Stopped, UnsupportedModel
from mimicut.recovery.batches import Source, count, plain_batches, subset
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.mimic import mimic
from mimicut.recovery.pair import Pair, device_for
from mimicut.recovery.rehearsal import FEWEST, divide
from mimicut.recovery.settle_options import settle
from mimicut.runtime.export import in_float32, outputs_of, tensors_in, traced_as_exported
from mimicut.runtime.int8 import file_errors
from mimicut.runtime.int8_network import TrainableInt8
from mimicut.surgery.seam import Seam, SeamPoint

STEPS = 100
# Shares of the rate that is measured for a student of a cut, and steps that try each: the first one that brings the
# network nearer is taken, or the last. Where rounding costs little a large one does harm; a network that it has thrown
# far off needs one. Source: measured (docs/LOG.md).
RATES, TRIED = (0.3, 0.1, 0.03), 10
# By what share the error must fall, on images that do not train here, for the file to be changed, both as it is trained
# and as the written file has it: there are few, and ranges are those of these images. Source: measured (docs/LOG.md).
LEAST_GAIN = 0.2
BATCH = 16  # images that a file is given at once


@dataclass(frozen=True)
class Int8Mimic:
    """What the second mimic did.

    Attributes:
        steps: Steps that were taken.
        rate: The rate that was taken.
        kept: After how many of them the file is as it was written; 0 where none was clearly better on the images that
            judge (LEAST_GAIN), or its file was not, and the file stayed as it was.
        images, judged_by: How many images it learned from, and how many others judged it.
        error_before, error: The loss on the latter, before the first step and as it was written.
        unrounded: How many activations and weights the file rounds and the network that trained did not.
    """

    steps: int
    rate: float
    kept: int
    images: int
    judged_by: int
    error_before: float
    error: float
    unrounded: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mimic_int8(
    path: Path,
    student: nn.Module,
    example: Any,
    seam: Seam,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    free: Iterable[str] = ("batch",),
    on_step: Callable[[int, int, float], None] | None = None,
    max_memory: int | None = None,
    max_seconds: float | None = None,
) -> Int8Mimic:
    """Train the INT8 file of a student, in place.

    Args:
        path: The file, as `export` wrote it, for batches of any size.
        student: The network in float32 that it was made from, which it learns to be like; untouched.
        example: What it was exported with.
        seam: The student's. Its head does not train, and its points are learned in place of the outputs where those are
            boxes, or behind a softmax or sigmoid.
        few: Images, as for `mimic`; a quarter of them only judges.
        config: The recipe; the rate is a share of the measured one, precision is float32. Steps run on its device, the
            written file on the CPU.
        free: Which of "batch" and "size" are free in the file.
        on_step, max_memory: As of `mimic`.
        max_seconds: For all of it: the steps are as many as fit, by the pace of those that try a rate.

    Raises:
        UnsupportedModel: There are too few images or no time, the features are not in the file, or it diverges. The
            file is then as before, as it is when Ctrl-C stops it.
    """
    begun, divided = time.perf_counter(), divide(few, config.seed)
    if divided is None:
        raise UnsupportedModel(
            f"mimicking in INT8: found {count(few)} training images, expected at least {FEWEST} different ones, as a "
            "quarter of them is set aside to judge by"
        )
    fit, judging = (subset(few, indices) for indices in divided)
    seam = _at_the_outputs(seam)
    file = TrainableInt8(path, *traced_as_exported(student, example, free), seam)
    file.network.create_tensors_on(device_for(config.device, file.network))
    seams = seam, file.network.seam
    pair = Pair.of(student, file.network, seams)
    config = replace(config, precision="float32", layout="contiguous", lr=None, start="cut", norm_mode="eval")
    config, _ = settle(pair, fit, config, max_memory=max_memory)
    options: dict[str, Any] = {"choose": judging, "max_memory": max_memory}
    try:
        config, step_seconds = _with_rate(student, file.network, seams, fit, config, options)
        if max_seconds is not None:
            left = max_seconds - (time.perf_counter() - begun)
            config = replace(config, steps=_steps_within(left, config.steps, step_seconds))
        log = mimic(student, file.network, seams, fit, config, on_step=on_step, **options)
    except Stopped:  # the file is still as it was
        raise KeyboardInterrupt from None
    except Diverged as error:
        raise UnsupportedModel(f"mimicking in INT8: {error}") from error
    errors = dict(log.errors)
    before, after = errors.get(0, math.nan), errors.get(log.kept, math.nan)
    kept = log.kept if after <= (1 - LEAST_GAIN) * before else 0
    if kept and not _is_better(file, path, student, example, judging):
        kept = 0
    images = count(fit), count(judging)
    return Int8Mimic(
        len(log.losses), config.lr or 0.0, kept, *images, before, after if kept else before, len(file.left)
    )


def _with_rate(
    student: nn.Module,
    network: nn.Module,
    seams: tuple[Seam, Seam],
    fit: Source | Tensor,
    config: MimicConfig,
    options: dict[str, Any],
) -> tuple[MimicConfig, float]:
    """The config with the first of RATES that brings a copy of the network nearer in a few steps, or the last one; and
    how long a step took, in seconds."""
    assert config.lr is not None  # it is decided
    tried, begun, steps = replace(config, steps=min(TRIED, config.steps)), time.perf_counter(), 0
    rate = RATES[-1]
    for share in RATES[:-1]:
        steps += tried.steps
        with suppress(Diverged):  # then it is too large
            trial = guard.full_copy(network)
            errors = mimic(student, trial, seams, fit, replace(tried, lr=share * config.lr), **options).errors
            if errors[-1][1] < errors[0][1]:
                rate = share
                break
    return replace(config, lr=rate * config.lr), (time.perf_counter() - begun) / max(1, steps)


def _steps_within(seconds: float, steps: int, step_seconds: float) -> int:
    """As many of the steps as fit.

    Raises:
        UnsupportedModel: None does.
    """
    fit = min(steps, int(seconds / step_seconds))
    if fit < 1:
        raise UnsupportedModel(
            f"mimicking in INT8: found {max(0.0, seconds):.0f} s left of the time limit, expected {step_seconds:.1f} s "
            "for a step; give more time (--max-seconds), or leave it out (--int8-steps 0 of export)"
        )
    return fit


def _at_the_outputs(seam: Seam) -> Seam:
    """The seam with its points at what the network returns, where that is learned."""
    learned = [output for output in seam.outputs if output.imitated]
    if not learned or any(output.kind == "boxes" or output.activation for output in learned):
        return seam
    points = tuple(SeamPoint("", part=output.part) for output in learned)
    return replace(seam, points=points, shapes=(), batch_axes=tuple(output.batch_axis for output in learned))


def _is_better(trained: TrainableInt8, path: Path, student: nn.Module, example: Any, judging: Source | Tensor) -> bool:
    """Write the trained file in the place of `path` where its outputs, run as they will be, are clearly nearer
    (LEAST_GAIN) to the student's on the images that judge; say whether it is there. What trained rounds as the file
    does, but for what it left."""
    fresh = path.with_name(f"trained.{path.name}")
    reference, _ = in_float32(student, example)
    calls = (
        (_arrays(tensors_in(call)), _arrays(outputs_of(reference, *call)))
        for call in plain_batches(judging, BATCH, torch.device("cpu"), torch.float32)
    )
    try:
        trained.write_to(fresh)
        before, after = file_errors([path, fresh], calls)
        better = after < before and after <= (1 - LEAST_GAIN) * before
        if better:
            move(fresh, path)
    finally:
        remove(fresh)
    return better


def _arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]
