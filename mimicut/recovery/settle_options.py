"""Decide, before mimicking begins, on what was left open: precision and layout by rule or by trial, the rate by
measurement. All trials use copies that are thrown away.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.errors import InputError, Stopped
from mimicut.base.layout import laid, learns_channels_last, takes_channels_last
from mimicut.recovery.batches import Batch, Passes, Source, copied, images_in_batch, make_views, place_batch
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.config import PRECISIONS, MimicConfig
from mimicut.recovery.pair import Pair, device_for, placed_copy
from mimicut.recovery.precision_and_layout import (
    AUTO,
    TRIED_STEPS,
    Way,
    flops_of,
    quickest,
    trial_images,
    ways,
    worth_trying,
)
from mimicut.recovery.seam_error import LEAST_SPREAD, squared_deviation, squared_error
from mimicut.recovery.training import train
from mimicut.surgery.seam import Seam, capturing

# How far the first whole step moves the student's features, as a share of the teacher's squared deviation at the seam.
# Source: measured (docs/LOG.md): the rate that is best for each of four of the demo's teachers moves them by 0.014 to
# 0.036.
REACH = 0.025
_REACH_IMAGES, _REACH_TRIES = 32, 2  # images and tries of that measurement. Source: assumption.
# The rate of the first try, and by what factor each try may change it. Source: assumption.
_RATE, _MOST_CHANGE = 1e-3, 30.0


def settle(
    pair: Pair,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    checkpoint: Checkpoint | None = None,
    max_memory: int | None = None,
    on_trial_step: Callable[[], None] | None = None,
) -> tuple[MimicConfig, dict[str, float]]:
    """Decide on the options that are left open: precision and layout that are "auto", and a rate that is None.

    Args:
        pair: The networks; the student is not changed.
        few, max_memory: As of `mimic`.
        config: What is asked for.
        checkpoint: Of a run that continues: what it has decided on is taken.
        on_trial_step: Called after each step of the trials.

    Returns:
        The config with nothing left open, and the seconds of a step in each precision and layout that was tried.

    Raises:
        InputError: The layout asked for is not safe on this processor.
    """
    on_cpu = device_for(config.device, pair.student).type == "cpu"
    if config.layout == "channels_last" and on_cpu and not learns_channels_last(pair.teacher, pair.student):
        raise InputError(
            "mimicking in the layout channels_last: torch writes outside its memory in the backward pass of strided "
            "1x1 convolutions with few inputs, which this network has; expected the layout contiguous, or auto"
        )
    if checkpoint is not None:
        taken = {name: checkpoint.data.get(name, getattr(config, name)) for name in ("precision", "layout", "lr")}
        config = replace(config, **taken)
    on_trial_step = on_trial_step or (lambda: None)
    trials = _Trials(pair, few, max_memory, on_trial_step)
    config, seconds = _settle_way(trials, config, may_try=checkpoint is None)
    if config.lr is None:
        measured = config.steps and measure_rate(pair, few, config, max_memory=max_memory, on_trial_step=on_trial_step)
        config = replace(config, lr=measured or _RATE)
    return config, seconds


@dataclass(frozen=True)
class _Trials:
    """What every trial is made with."""

    pair: Pair
    few: Source | Tensor
    max_memory: int | None
    on_trial_step: Callable[[], None]

    def one_image(self, model: nn.Module, layout: str = "contiguous") -> Batch:
        like = next((t for t in guard.named_tensors(model).values() if t.is_floating_point()), torch.empty(0))
        image = make_views(self.few, [0], "none", torch.Generator())
        return laid(place_batch(image, like.device, like.dtype), layout)


def _settle_way(trials: _Trials, config: MimicConfig, *, may_try: bool) -> tuple[MimicConfig, dict[str, float]]:
    """Decide on precision and layout. Returns: as `settle`, the rate still open."""
    if AUTO not in (config.precision, config.layout):
        return config, {}
    pair, trial = trials.pair, replace(config, lr=config.lr or _RATE)
    device = device_for(config.device, pair.student)
    batch = sum(images_in_batch(trials.few, config.batch_size, config.extra_share))
    autocast_off = torch.autocast(device.type, enabled=False)

    def takes_last(model: nn.Module, seam: Seam) -> bool:
        def run(layout: str) -> list[Tensor]:
            args, kwargs = copied(trials.one_image(model, layout))
            return capture.features(*args, **kwargs)

        with guard.seeded(config.seed), autocast_off, guard.evaluating(model), capturing(model, seam) as capture:
            return takes_channels_last(run)

    def both_take_last() -> bool:
        return takes_last(pair.teacher, pair.seam) and takes_last(pair.student, pair.student_seam)

    def flops() -> float:
        args, kwargs = trials.one_image(pair.teacher)
        with guard.seeded(config.seed), autocast_off, guard.evaluating(pair.teacher):
            return flops_of(lambda: pair.teacher(*args, **kwargs))

    def seconds(way: Way, most: float) -> float:
        return _step_seconds(trials, replace(trial, **vars(way)), most)

    found = ways((pair.teacher, pair.student), config.precision, config.layout, device, both_take_last)
    if not may_try or not worth_trying(config.steps, batch, flops, found):
        return replace(config, **vars(found[0])), {}
    taken, took = quickest(found, seconds)
    return replace(config, **vars(taken)), took


def measure_rate(
    pair: Pair,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    max_memory: int | None = None,
    on_trial_step: Callable[[], None] = lambda: None,
) -> float:
    """Measure the learning rate with which the first whole step moves the student's features by REACH.

    The same rate moves one network ten times as far as another: how far depends on how many layers there are, whose
    steps add up, and on how much each filter's output is scaled after it. Tried on copies, on two batches of at most 32
    images: one to step by, one to measure on.

    Args:
        pair: The networks; the student is not changed.
        few, max_memory: As of `mimic`.
        config: With precision and layout decided.
        on_trial_step: Called after each step of the trials.

    Returns:
        The rate; 1e-3 where no step moves anything.
    """
    size = min(config.batch_size, _REACH_IMAGES)
    device, dtype = device_for(config.device, pair.student), PRECISIONS[config.precision]
    share = config.extra_share
    batches = Passes(few, _REACH_IMAGES, config.views, config.mixing, config.seed + 1, device, dtype, 0, share)
    batch = next(batches)
    batch = laid(batch, config.layout)

    def features(model: nn.Module, at: Seam) -> list[Tensor]:
        args, kwargs = copied(batch)
        model = placed_copy(model, device, dtype)
        with guard.seeded(config.seed), guard.evaluating(model), capturing(model, at) as capture:
            return [feat.double() for feat in capture.features(*args, **kwargs)]

    # One image has no deviation, nor has the same one many times.
    deviations = [squared_deviation(wanted) for wanted in features(pair.teacher, pair.seam)]
    units = [max(deviation, LEAST_SPREAD * square, 1e-30) for deviation, square in deviations]
    before, rate = features(pair.student, pair.student_seam), _RATE
    for _ in range(_REACH_TRIES):
        trial, one = guard.full_copy(pair.student), replace(config, steps=1, warmup=0.0, lr=rate, batch_size=size)
        _train_trial(replace(pair, student=trial), few, one, max_memory)
        on_trial_step()
        moved = squared_error(features(trial, pair.student_seam), before, units) / len(units)
        if not 0 < moved < float("inf"):
            return _RATE
        rate = min(max(rate * (REACH / moved) ** 0.5, rate / _MOST_CHANGE), rate * _MOST_CHANGE)
    return rate


class _TrialTooSlow(Exception):
    """Ends a trial whose step already takes longer than it may."""


def _step_seconds(trials: _Trials, config: MimicConfig, most: float) -> float:
    """Seconds of a trial step on some of the images. The first step warms up; if the second takes more than `most`
    seconds there is no third."""
    batch = trial_images(sum(images_in_batch(trials.few, config.batch_size, config.extra_share)))
    config, marks = replace(config, steps=TRIED_STEPS, batch_size=batch), [time.perf_counter()]

    def mark(done: int, total: int, loss: float) -> None:
        marks.append(time.perf_counter())
        trials.on_trial_step()
        if done == 2 and marks[2] - marks[1] > most:
            raise _TrialTooSlow

    pair = replace(trials.pair, student=guard.full_copy(trials.pair.student))
    try:
        seconds = _train_trial(pair, trials.few, config, trials.max_memory, mark)
    except _TrialTooSlow:
        return marks[2] - marks[1]
    each = [after - before for before, after in pairwise(marks[1:])]
    return min(each) if each else seconds / TRIED_STEPS


def _train_trial(
    pair: Pair,
    few: Source | Tensor,
    config: MimicConfig,
    max_memory: int | None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train a student that is thrown away; return the seconds."""
    try:
        return train(pair, few, config, on_step=on_step, max_memory=max_memory).seconds
    except Stopped:
        raise KeyboardInterrupt from None  # a trial leaves nothing to keep
