"""One run of mimicking with every option decided: set the student up, take the steps, leave all else as it was."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mimicut.base import guard, memory
from mimicut.base.errors import InputError, Stopped
from mimicut.base.layout import laid
from mimicut.base.ranks import RankLost, Ranks
from mimicut.recovery.batches import Passes, Source, count, images_in_batch, on_accelerator, plain_batches
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.config import OPTIMIZERS, PRECISIONS, MimicConfig
from mimicut.recovery.judge import BestStudent, Judge
from mimicut.recovery.muon import at_once
from mimicut.recovery.pair import Pair, device_for, placed, placed_copy
from mimicut.recovery.seam_error import LEAST_SPREAD, RunningDeviation
from mimicut.recovery.training_loop import OnStep, TrainingLoop
from mimicut.surgery.seam import Capture, capturing

_JUDGE_BATCH = 64


@dataclass(frozen=True)
class MimicLog:
    """What a run of mimicking did.

    config: with everything decided. images: how many there were. batch: how many a step took. losses, lrs: one number
    for each step, the loss before that step's update (with several seam points a sum of relative errors: 1 for each is
    as bad as the mean feature). seconds: wall time. errors: (steps done, loss on the images to choose by), from before
    the first step on. kept: after how many steps the student is as it came back. ways: seconds of a trial's step in
    each precision and layout, where they were tried. parts: into how many a batch was divided to keep to the memory.
    untrained: the body's modules that run and that no gradient reached. extra: of a batch, how many were extra images.
    halved: how often the parts were made half as large, since the device's memory ran out.
    """

    config: MimicConfig
    images: int
    batch: int
    losses: tuple[float, ...]
    lrs: tuple[float, ...]
    seconds: float
    errors: tuple[tuple[int, float], ...] = ()
    kept: int = 0
    ways: dict[str, float] = field(default_factory=dict)
    parts: int = 1
    untrained: tuple[str, ...] = ()
    extra: int = 0
    halved: int = 0

    def to_json(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("losses", "lrs", "errors", "untrained")}
        return asdict(self) | {"config": self.config.to_json(), **lists}


def train(
    pair: Pair,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    choose: Source | Tensor | None = None,
    on_step: OnStep | None = None,
    checkpoint: Checkpoint | None = None,
    on_checkpoint: Callable[[Checkpoint], None] | None = None,
    max_memory: int | None = None,
    ways: dict[str, float] | None = None,
    ranks: Ranks | None = None,
) -> MimicLog:
    """Train the student of a pair in place, as `mimic` does.

    Args:
        pair: The networks.
        few: The images.
        config: With precision, layout and rate decided.
        choose, on_step, checkpoint, on_checkpoint, max_memory: As of `mimic`.
        ways: For the log.
        ranks: As of `mimic`.
    """
    device, dtype = device_for(config.device, pair.student), PRECISIONS[config.precision]
    images, started = count(few), time.perf_counter()
    loop: TrainingLoop | None = None

    def log() -> MimicLog:
        assert loop is not None
        lrs = tuple(config.lr_at(step) for step in range(len(loop.losses)))
        errors, kept = ((), len(lrs)) if loop.best is None else (tuple(loop.best.errors), loop.best.step)
        own, extra = images_in_batch(few, config.batch_size, config.extra_share)
        return MimicLog(
            config, images, own + extra, tuple(loop.losses), lrs, time.perf_counter() - started, errors, kept,
            ways or {}, parts=max(1, loop.parts), untrained=loop.untrained or (), extra=extra, halved=loop.halved,
        )  # fmt: skip

    with _student_restored(pair.student), ExitStack() as inside:
        for each in (
            memory.kept(), guard.seeded(config.seed), guard.untouched(pair.teacher), guard.untouched(pair.student),
            torch.enable_grad(),
        ):  # fmt: skip
            inside.enter_context(each)
        pair.teacher.eval()
        pair = Pair(placed_copy(pair.teacher, device, dtype), pair.student, pair.seam, pair.student_seam)
        inside.enter_context(placed(pair.student, device, dtype, pair.head_tensors()))
        captures = (
            inside.enter_context(capturing(pair.teacher, pair.seam)),
            inside.enter_context(capturing(pair.student, pair.student_seam)),
        )
        optimiser = _prepare(pair, config)
        if ranks is not None:
            ranks.copy_first(guard.named_tensors(pair.student).values())
        few = on_accelerator(few, config.views, device)
        batches = Passes(
            few, config.batch_size, config.views, config.mixing, config.seed, device, dtype, config.mixing_rise,
            config.extra_share,
        )  # fmt: skip
        units = _loss_units(pair, captures[0], few, config.batch_size, device, dtype)
        best = None if choose is None else _best_student(pair, choose, units, config, device, dtype)
        loop = TrainingLoop(pair, captures, units, optimiser, batches, config, best, max_memory, ranks)
        if checkpoint is not None:
            loop.go_to(checkpoint)
        try:
            with _denormals_flushed():
                loop.run(on_step, on_checkpoint)
        except KeyboardInterrupt as error:
            if not loop.between_steps:
                raise
            here = loop.checkpoint()
            raise Stopped(log(), here) from error
        except RankLost as error:
            here = loop.checkpoint()
            raise Stopped(log(), here, str(error)) from error
        finally:
            if best is not None:
                best.restore()
    return log()


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Numbers below 1e-38 are zero in this thread, on CPUs that can: products of them take many times as long, and
    after a closed form there are such. Measured (docs/LOG.md): a step took half as long again. Threads that torch has
    started before stay as they are; the command line sets it before there are any (`cli.option_values`)."""
    smallest = torch.tensor(1e-40)
    before = (smallest * 1.0).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def _student_restored(student: nn.Module) -> Iterator[None]:
    """On an error its tensors are as before; in any case it comes back in eval mode, without gradients."""
    before = [(t, t.detach().clone()) for t in guard.named_tensors(student).values()]
    try:
        yield
    except Exception:
        guard.put_back(before)
        raise
    finally:
        student.eval()
        student.zero_grad(set_to_none=True)


def _prepare(pair: Pair, config: MimicConfig) -> torch.optim.Optimizer:
    """Set modes and gradients of the student; return the optimiser of its body."""
    student, head = pair.student, pair.head_tensors()
    student.eval()
    if config.norm_mode == "train":
        for module in student.modules():
            if isinstance(module, _NormBase) or "running_var" in module._buffers:
                own = (*module._parameters.values(), *module._buffers.values())
                # The flag of this module alone: train() would wake dropout inside norm layers that carry it (timm).
                module.training = not any(id(t) in head for t in own)
    body = []
    for parameter in student.parameters():
        trains = parameter.is_floating_point() and id(parameter) not in head
        parameter.requires_grad_(trains)
        parameter.grad = None
        if trains:
            body.append(parameter)
    if not body:
        raise InputError(f"mimicking: {type(student).__name__} has no parameter before its head that could learn")
    adam = config.optimizer == "adamw"
    options: dict[str, Any] = {"betas": (config.momentum, 0.999)} if adam else {"momentum": config.momentum}
    options |= {} if config.optimizer == "muon" else at_once(body)
    return OPTIMIZERS[config.optimizer](body, lr=config.lr, weight_decay=config.weight_decay, **options)


def _loss_units(
    pair: Pair, capture: Capture, few: Source | Tensor, size: int, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """What the mean squared error at each seam point is divided by.

    A single point: 1, the paper's loss. Several: the teacher's mean squared deviation from its mean feature over the
    few images as they are, or a share of its mean square where these are nearly alike; measured once, so that no batch
    counts more than another.
    """
    if len(pair.seam.points) == 1:
        return [1.0]
    deviation = RunningDeviation()
    for args, kwargs in plain_batches(few, size, device, dtype):
        with torch.no_grad():
            deviation.add(capture.features(*args, **kwargs))
    return [max(spread, LEAST_SPREAD * square) / numbers or 1.0 for spread, square, numbers in deviation.values()]


def _best_student(
    pair: Pair,
    choose: Source | Tensor,
    loss_units: list[float],
    config: MimicConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> BestStudent:
    batches = (laid(batch, config.layout) for batch in plain_batches(choose, _JUDGE_BATCH, device, dtype))
    judge = Judge(pair.teacher, pair.seam, batches, student_seam=pair.student_seam, loss_units=loss_units)
    return BestStudent(pair.student, judge)
