"""MIMIC: the student's body learns the teacher's features at the seam, from a few unlabelled images.

The loss is the paper's and nothing else: mean squared error between feature maps. No labels, no logits, no head. Of a
seam of several points it is the sum of their errors, each in units of the teacher's own variance there.
Not covered: several devices at once.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from mimicut.base import guard, memory
from mimicut.base.errors import Diverged, InputError, Stopped, UnsupportedModel
from mimicut.base.layout import laid, learns_channels_last, takes_channels_last
from mimicut.recovery.batches import Batch, Passes, Source, copied, count, placed, view
from mimicut.recovery.checkpoint import Checkpoint, load_optimiser_state, optimiser_state
from mimicut.recovery.config import OPTIMIZERS, PRECISIONS, PRESETS, MimicConfig
from mimicut.recovery.folded import Pairs, folding, pairs_in
from mimicut.recovery.ways import AUTO, TRIED_STEPS, Way, flops_of, quickest, trial_images, ways, worth_trying
from mimicut.surgery.seam import Capture, Seam, capturing

# Of the teacher's variance at the seam: how far the first whole step moves the student's features. Source: measured
# (docs/LOG.md): the rate that is best for each of four of the demo's teachers moves them by 0.014 to 0.036.
REACH = 0.025
_REACHED, _REACH_TRIES = 32, 2  # images and tries of that measurement. Source: assumption.
_RATE, _MOST_CHANGED = 1e-3, 30.0  # where the tries begin, and by what factor each may change it. Source: assumption.
# On an accelerator reading a loss waits for the device: so not after every step. Source: assumption.
_READ_EVERY = 10
_JUDGED = 20  # times in a run that the student is judged. Source: assumption.
_JUDGE_BATCH = 64
# Between checkpoints, and as many times as long as the last one took. Source: assumption.
_CHECKPOINT_SECONDS, _CHECKPOINT_PAUSE = 60.0, 50
# Of the memory that a step may hold, what is kept for its gradients; the rest is of the gradients themselves and of the
# teacher's pass. Source: measured, EfficientNet-Lite0 at 224 pixels (docs/LOG.md).
_KEPT_SHARE = 0.5
# Of several seam points one at which the few images hardly differ must not drown the others: its error is measured in
# no smaller unit than this share of the teacher's mean square. Source: assumption.
_LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class MimicLog:
    """losses, lrs: one number a step, the loss before that step's update (with several seam points a sum of relative
    errors: 1 for each is as bad as the mean feature); seconds: wall time; images: how many there
    were; batch: how many a step took. errors: (steps done, loss on the images to choose by), from before the first
    step on; kept: after how many steps the student is as it came back. ways: seconds of a trial's step in each
    precision and layout, where they were tried. parts: into which a batch was parted to keep to the memory."""

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

    def to_json(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("losses", "lrs", "errors")}
        return asdict(self) | {"config": self.config.to_json(), **lists}


def mimic(
    teacher: nn.Module,
    student: nn.Module,
    seam: Seam,
    few: Source | Tensor,
    config: MimicConfig = PRESETS["paper"],
    *,
    student_seam: Seam | None = None,
    choose: Source | Tensor | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
    on_checkpoint: Callable[[Checkpoint], None] | None = None,
    max_memory: int | None = None,
) -> MimicLog:
    """Train the body of `student` IN PLACE until its features at the seam are the teacher's; return how it went.

    `student` is any network with the teacher's feature shapes at the seam, however it was made; `student_seam` names
    the same points where its module names differ. `few` is an ImageSet, or a float tensor with images on axis 0, as
    the teacher takes them. The head (names in the seam) is not touched. choose: images, none of `few`, on which the
    student is judged before the first step and after every twentieth of the steps: it comes back as it was when it was
    best on them, without them as after the last step. `on_step(done, total, loss)` is called
    after every step on a CPU, after every tenth and the last one elsewhere. on_checkpoint is given what another call
    with the same arguments needs as `checkpoint` to go on to the same result, about every minute. max_memory: bytes
    that a step may hold for its gradients; a batch that would hold more goes through in equal parts, but not with
    norm_mode "train", where batches are normalised as a whole. Precision and layout that are "auto", and a rate that is
    None, are decided on here, and stand in the log's config.

    Only norm layers are in train mode, so auxiliary branches, dropout and stochastic depth never run. The student comes
    back in eval mode, its `requires_grad` as before and gradients cleared; on an error its tensors are as they were.
    Ctrl-C waits for the step to end and raises Stopped, a KeyboardInterrupt: the student is as after that step, with
    `choose` as after the best one. The teacher is as before in every case.

    Raises: InputError when images, student or options do not fit, or the loss stops being finite;
    UnsupportedModel when the seam cannot be captured.
    Source: MiR (Wang et al., CVPR 2022, arXiv 2201.02620): pre-pool mean squared error under a frozen head.
    """
    student_seam = student_seam or seam
    _check_pair(teacher, student, seam, student_seam)
    images = count(few)
    device = _device(config, student)
    config, tried = settled(
        teacher, student, seam, few, config, student_seam=student_seam, checkpoint=checkpoint, max_memory=max_memory
    )
    dtype = PRECISIONS[config.precision]
    head = {id(t) for name, t in guard.named_tensors(student).items() if name in set(student_seam.head)}
    before = [(t, t.detach().clone()) for t in guard.named_tensors(student).values()]
    started, run = time.perf_counter(), None

    def log() -> MimicLog:
        lrs = tuple(config.lr_at(step) for step in range(len(run.losses)))
        errors, kept = ((), len(lrs)) if run.judge is None else (tuple(run.judge.errors), run.judge.kept)
        size = min(config.batch_size, images)
        taken = time.perf_counter() - started
        parts = max(1, run.parts)
        return MimicLog(config, images, size, tuple(run.losses), lrs, taken, errors, kept, tried, parts)

    try:
        with (
            memory.kept(), guard.seeded(config.seed), guard.untouched(teacher), guard.untouched(student),
            torch.enable_grad(),
        ):  # fmt: skip
            lead = teacher.eval() if _fits(teacher, device, dtype) else _converted(teacher, device, dtype)
            with (
                _placed(student, device, dtype, head),
                capturing(lead, seam) as target,
                capturing(student, student_seam) as learner,
            ):
                optimiser = _prepare(student, head, config)
                batches = Passes(
                    few, config.batch_size, config.views, config.mixing, config.seed, device, dtype, config.mixing_rise
                )
                units = _units(seam, target, few, config, device, dtype)
                judge = None
                if choose is not None:
                    judge = _Judge(student, target, learner, units, choose, device, dtype, config.layout)
                run = _Run(lead, student, seam, units, target, learner, optimiser, batches, config, judge, max_memory)
                if checkpoint is not None:
                    run.go_to(checkpoint)
                try:
                    run.learn(on_step, on_checkpoint)
                except KeyboardInterrupt as error:
                    if not run.whole:
                        raise
                    here = run.checkpoint()
                    raise Stopped(log(), here) from error
                finally:
                    if judge is not None:
                        judge.restore()
    except Exception:
        guard.put_back(before)
        raise
    finally:
        student.eval()
        student.zero_grad(set_to_none=True)
    return log()


def _prepare(student: nn.Module, head: set[int], config: MimicConfig) -> torch.optim.Optimizer:
    """Set modes and gradients of the student; return the optimiser of its body."""
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
    options = {"momentum": config.momentum} if config.optimizer != "adamw" else {"betas": (config.momentum, 0.999)}
    options |= {} if config.optimizer == "muon" else {"foreach": True}
    return OPTIMIZERS[config.optimizer](body, lr=config.lr, weight_decay=config.weight_decay, **options)


class _Run:
    """The loop, and where it stands. whole: whether no step is half done."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        seam: Seam,
        units: list[float],
        target: Capture,
        learner: Capture,
        optimiser: torch.optim.Optimizer,
        batches: Passes,
        config: MimicConfig,
        judge: "_Judge | None",
        max_memory: int | None,
    ):
        self._teacher, self._most = teacher, max_memory
        self._student, self._seam, self._units, self._target, self._learner = student, seam, units, target, learner
        self._optimiser, self._batches, self._config, self.judge = optimiser, batches, config, judge
        self._device = optimiser.param_groups[0]["params"][0].device
        self._folded: tuple[Pairs, Pairs] | None = None  # of teacher and student, from the first step on
        self.parts = 0  # not known before the first step
        self.losses: list[float] = []
        self._unread: list[Tensor] = []
        self.whole = True

    def _begin(self, batch: Batch) -> None:
        """Find the batch norms in eval mode that can be computed together with the layers before them, and into how
        many parts a batch must go for its gradients to hold no more than the memory that there is."""
        images = _images(batch)
        one = _part(batch, images, slice(0, 1))

        def pairs(model: nn.Module, capture: Capture) -> Pairs:
            return pairs_in(model, lambda: self._features(capture, {}, copied(one)))

        whole = self._config.norm_mode == "train"  # a pass would move the statistics of these norms
        with torch.autocast(self._device.type, enabled=False):
            self._folded = pairs(self._teacher, self._target), {} if whole else pairs(self._student, self._learner)
            if not self.parts:
                self.parts = 1 if whole or self._most is None else self._parts_within(self._most, images, one)

    def _parts_within(self, most: int, batch: int, one: Batch) -> int:
        own = {t.untyped_storage().data_ptr() for t in guard.named_tensors(self._student).values()}
        folded = self._folded[1]

        def held(images: int) -> int:
            sizes: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                found = self._features(self._learner, folded, _times(one, images))
            del found  # not before: memory that is free has the same address again
            return sum(sizes.values())

        first, second = held(1), held(2)
        each = max(second - first, 1)  # the rest is of weights
        most_images = max(1, (round(_KEPT_SHARE * most) - max(first - each, 0)) // each)
        return -(-batch // most_images)

    def _features(self, learner: Capture, folded: Pairs, batch: Batch) -> list[Tensor]:
        args, kwargs = laid(batch, self._config.layout)
        with folding(folded):
            return _features(learner, args, kwargs)

    def learn(
        self, on_step: Callable[[int, int, float], None] | None, on_checkpoint: Callable[[Checkpoint], None] | None
    ) -> None:
        total = self._config.steps
        every = max(1, total // _JUDGED)
        if self.judge is not None and not self.judge.errors:
            self.judge(0)
        saved, pause = time.perf_counter(), _CHECKPOINT_SECONDS
        with guard.interrupts_held() as let_through:
            for step in range(len(self.losses), total):
                self.whole = False
                wanted = self._step(step)
                done = step + 1
                if self.judge is not None and (done % every == 0 or done == total):
                    self.judge(done)
                self.whole = True
                if self._device.type == "cpu" or done % _READ_EVERY == 0 or done == total:
                    self._read()
                    _check_finite(self.losses, wanted, self._config)
                    if on_step:
                        on_step(done, total, self.losses[-1])
                if on_checkpoint and time.perf_counter() - saved >= pause:
                    began = time.perf_counter()
                    on_checkpoint(self.checkpoint())
                    saved = time.perf_counter()
                    pause = max(_CHECKPOINT_SECONDS, _CHECKPOINT_PAUSE * (saved - began))
                let_through()

    def _step(self, step: int) -> list[Tensor]:
        """Returns the teacher's features."""
        bf16 = torch.autocast(
            # Without its cache, which would hand out weights from before the last update. Off also shuts out a
            # caller's own.
            self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16", cache_enabled=False
        )  # fmt: skip
        whole = next(self._batches)
        if self._folded is None:
            self._begin(whole)
        images = _images(whole)
        parts = [(_part(whole, images, at), at.stop - at.start) for at in _cuts(images, self.parts)]
        for group in self._optimiser.param_groups:
            group["lr"] = self._config.lr_at(step)
        self._optimiser.zero_grad(set_to_none=True)
        total: Tensor | float = 0.0
        for number, (batch, size) in enumerate(parts):
            with bf16:
                with torch.no_grad():
                    wanted = self._features(self._target, self._folded[0], batch)
                found = self._features(self._learner, self._folded[1], batch)
            if step == 0 and not number:
                _check_features(self._seam, wanted, found)
            loss = sum(F.mse_loss(_wide(f), _wide(w)) / u for f, w, u in zip(found, wanted, self._units, strict=True))
            loss = loss if len(parts) == 1 else loss * (size / images)
            loss.backward()
            total = total + loss.detach()
        self._optimiser.step()
        self._unread.append(total)
        return wanted

    def _read(self) -> None:
        if self._unread:
            self.losses += torch.stack(self._unread).tolist()
            self._unread.clear()

    def checkpoint(self) -> Checkpoint:
        self._read()
        states, at = self._batches.state()
        judge = self.judge
        groups = {
            "student": guard.named_tensors(self._student),
            "optimiser": optimiser_state(self._optimiser),
            "random": states | {"torch": torch.get_rng_state()},
            "best": {} if judge is None else judge.best,
        }
        tensors = {
            f"{group}/{key}": t.detach().cpu().clone() for group, held in groups.items() for key, t in held.items()
        }
        data = {"losses": list(self.losses), "at": at, "steps": self._config.steps, "parts": self.parts}
        data |= {name: getattr(self._config, name) for name in ("precision", "layout", "lr")}
        if judge is not None:
            data |= {"judged": [list(pair) for pair in judge.errors], "kept": judge.kept}
        return Checkpoint(tensors, data)

    @torch.no_grad()
    def go_to(self, checkpoint: Checkpoint) -> None:
        data, saved = checkpoint.data, checkpoint.under("student")
        own = guard.named_tensors(self._student)
        if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
            raise InputError("mimicking on from a checkpoint: its tensors are those of another student")
        if data["steps"] != self._config.steps:
            raise InputError(
                f"mimicking on from a checkpoint: it is one of {data['steps']} steps, found {self._config.steps}"
            )
        guard.put_back((tensor, saved[name].to(tensor)) for name, tensor in own.items())
        load_optimiser_state(self._optimiser, checkpoint.under("optimiser"))
        random = checkpoint.under("random")
        torch.set_rng_state(random.pop("torch"))
        self._batches.go_to(random, data["at"], len(data["losses"]))
        self.losses, self.parts = list(data["losses"]), data.get("parts", 0)
        if self.judge is not None:
            self.judge.errors = [tuple(pair) for pair in data["judged"]]
            self.judge.kept, best = data["kept"], checkpoint.under("best")
            self.judge.best = {name: tensor.to(own[name]) for name, tensor in best.items()}


class _Judge:
    """Keeps the student of the step that did best on the images to choose by."""

    def __init__(
        self,
        student: nn.Module,
        target: Capture,
        learner: Capture,
        units: list[float],
        choose: Source | Tensor,
        device: torch.device,
        dtype: torch.dtype,
        layout: str,
    ):
        self._student, self._learner, self._units = student, learner, units
        self.errors: list[tuple[int, float]] = []
        self.kept = 0
        self.best: dict[str, Tensor] = {}
        self._batches = []
        for start in range(0, count(choose), _JUDGE_BATCH):
            indices = list(range(start, min(start + _JUDGE_BATCH, count(choose))))
            args, kwargs = laid(placed(view(choose, indices, "none", torch.Generator()), device, dtype), layout)
            with torch.no_grad():
                self._batches.append((args, kwargs, target.features(*args, **kwargs), len(indices)))

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        modes = [(module, module.training) for module in self._student.modules()]
        self._student.eval()
        total = 0.0
        for args, kwargs, wanted, images in self._batches:
            found = self._learner.features(*args, **kwargs)
            pairs = zip(found, wanted, self._units, strict=True)
            total += images * sum(float(F.mse_loss(_wide(f), _wide(w))) / u for f, w, u in pairs)
        for module, mode in modes:
            module.training = mode
        error = total / sum(images for *_, images in self._batches)
        if not self.errors or error < min(e for _, e in self.errors):
            self.kept = step
            self.best = {name: t.detach().clone() for name, t in guard.named_tensors(self._student).items()}
        self.errors.append((step, error))

    @torch.no_grad()
    def restore(self) -> None:
        own = guard.named_tensors(self._student)
        guard.put_back((own[name], value) for name, value in self.best.items())


def settled(
    teacher: nn.Module,
    student: nn.Module,
    seam: Seam,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    student_seam: Seam | None = None,
    checkpoint: Checkpoint | None = None,
    max_memory: int | None = None,
    on_trial_step: Callable[[], None] | None = None,
) -> tuple[MimicConfig, dict[str, float]]:
    """`config` with precision and layout decided on where they are "auto", and the rate measured where it is None; and
    seconds of a step each way that was tried. On copies: the student is untouched. A run that goes on has all of it
    from its checkpoint. on_trial_step(): called after each step of the trials."""
    if config.layout == "channels_last" and not learns_channels_last(teacher, student):
        raise InputError(
            "mimicking in the layout channels_last: without AVX-512 torch writes outside its memory in the strided 1x1 "
            "convolutions of few inputs that this network has; expected the layout contiguous, or auto"
        )
    if checkpoint is not None:
        taken = {name: checkpoint.data.get(name, getattr(config, name)) for name in ("precision", "layout", "lr")}
        config = replace(config, **taken)
    tell = on_trial_step or (lambda: None)
    config, tried = _quickest_way(teacher, student, seam, few, config, student_seam, checkpoint, max_memory, tell)
    if config.lr is None:
        options = {"student_seam": student_seam, "max_memory": max_memory, "on_trial_step": tell}
        rate = measured_rate(teacher, student, seam, few, config, **options) if config.steps else _RATE
        config = replace(config, lr=rate)
    return config, tried


def _quickest_way(
    teacher: nn.Module,
    student: nn.Module,
    seam: Seam,
    few: Source | Tensor,
    config: MimicConfig,
    student_seam: Seam | None,
    checkpoint: Checkpoint | None,
    max_memory: int | None,
    on_trial_step: Callable[[], None],
) -> tuple[MimicConfig, dict[str, float]]:
    if AUTO not in (config.precision, config.layout):
        return config, {}
    tried = replace(config, lr=config.lr or _RATE)
    device, batch = _device(config, student), min(config.batch_size, count(few))
    plainly = torch.autocast(device.type, enabled=False)

    def one(model: nn.Module, layout: str = "contiguous") -> Batch:
        like = next((t for t in guard.named_tensors(model).values() if t.is_floating_point()), torch.empty(0))
        return laid(placed(view(few, [0], "none", torch.Generator()), like.device, like.dtype), layout)

    def runs() -> bool:
        def features(model: nn.Module, its: Seam) -> bool:
            def run(layout: str) -> list[Tensor]:
                args, kwargs = copied(one(model, layout))
                return capture.features(*args, **kwargs)

            with guard.seeded(config.seed), plainly, guard.evaluating(model), capturing(model, its) as capture:
                return takes_channels_last(run)

        return features(teacher, seam) and features(student, student_seam or seam)

    def flops() -> float:
        args, kwargs = one(teacher)
        with guard.seeded(config.seed), plainly, guard.evaluating(teacher):
            return flops_of(lambda: teacher(*args, **kwargs))

    def seconds(way: Way, most: float) -> float:
        one_way = replace(tried, **vars(way))
        return _step_seconds(teacher, student, seam, few, one_way, student_seam, max_memory, most, on_trial_step)

    found = ways((teacher, student), config.precision, config.layout, device, runs)
    if checkpoint is not None or not worth_trying(config.steps, batch, flops, found):
        return replace(config, **vars(found[0])), {}
    taken, took = quickest(found, seconds)
    return replace(config, **vars(taken)), took


def measured_rate(
    teacher: nn.Module,
    student: nn.Module,
    seam: Seam,
    few: Source | Tensor,
    config: MimicConfig,
    *,
    student_seam: Seam | None = None,
    max_memory: int | None = None,
    on_trial_step: Callable[[], None] = lambda: None,
) -> float:
    """The learning rate at which the first whole step moves the student's features by REACH of the teacher's variance.

    The same rate moves one network ten times as far as another: how far depends on how many layers there are, whose
    steps add up, and on how much each filter's output is scaled behind it. Tried on copies, on two batches of at most
    _REACHED images: one to step by, one to measure on. _RATE where no step moves anything.
    """
    size = min(config.batch_size, _REACHED)
    device, dtype = _device(config, student), PRECISIONS[config.precision]
    batch = next(Passes(few, _REACHED, config.views, config.mixing, config.seed + 1, device, dtype))
    batch = laid(batch, "contiguous" if config.layout == AUTO else config.layout)
    own = student_seam or seam

    def features(model: nn.Module, its: Seam) -> list[Tensor]:
        args, kwargs = copied(batch)
        on = model if _fits(model, device, dtype) else _converted(model, device, dtype)
        with guard.seeded(config.seed), guard.evaluating(on), capturing(on, its) as capture:
            return [feat.double() for feat in capture.features(*args, **kwargs)]

    # One image has no spread, nor has the same one many times.
    spread = [
        max(float((f - f.mean(0)).square().sum()), _LEAST_SPREAD * float(f.square().sum()), 1e-30)
        for f in features(teacher, seam)
    ]
    stood, rate = features(student, own), _RATE
    for _ in range(_REACH_TRIES):
        trial, one = guard.full_copy(student), replace(config, steps=1, warmup=0.0, lr=rate, batch_size=size)
        try:
            mimic(teacher, trial, seam, few, one, student_seam=student_seam, max_memory=max_memory)
        except Stopped:
            raise KeyboardInterrupt from None  # of the trial there is nothing to keep
        on_trial_step()
        pairs = zip(features(trial, own), stood, spread, strict=True)
        moved = sum(float((found - was).square().sum()) / unit for found, was, unit in pairs) / len(spread)
        if not 0 < moved < float("inf"):
            return _RATE
        rate = min(max(rate * (REACH / moved) ** 0.5, rate / _MOST_CHANGED), rate * _MOST_CHANGED)
    return rate


class _TooSlow(Exception):
    pass


def _step_seconds(
    teacher: nn.Module,
    student: nn.Module,
    seam: Seam,
    few: Source | Tensor,
    config: MimicConfig,
    student_seam: Seam | None,
    max_memory: int | None,
    most: float,
    on_trial_step: Callable[[], None],
) -> float:
    """Of a trial step of some of the images, of a copy; the first one warms up. Where the second one takes more than
    `most` seconds there is no third."""
    batch = trial_images(min(config.batch_size, count(few)))
    trial, marks = replace(config, steps=TRIED_STEPS, batch_size=batch), [time.perf_counter()]

    def mark(done: int, total: int, loss: float) -> None:
        marks.append(time.perf_counter())
        on_trial_step()
        if done == 2 and marks[2] - marks[1] > most:
            raise _TooSlow

    try:
        log = mimic(
            teacher, guard.full_copy(student), seam, few, trial, student_seam=student_seam, on_step=mark,
            max_memory=max_memory,
        )  # fmt: skip
    except _TooSlow:
        return marks[2] - marks[1]
    except Stopped:
        raise KeyboardInterrupt from None  # of the trial there is nothing to keep
    each = [after - before for before, after in pairwise(marks[1:])]
    return min(each) if each else log.seconds / TRIED_STEPS


def _units(
    seam: Seam, target: Capture, few: Source | Tensor, config: MimicConfig, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """What the mean squared error at each point is divided by. Of a single point 1: the paper's loss. Of several, the
    teacher's mean squared deviation from its mean feature, position by position, over the few images as they are, or a
    share of its mean square where these are nearly alike; measured once, so that no batch weighs more than another."""
    if len(seam.points) == 1:
        return [1.0]
    images, sums, squares = count(few), [], []
    for start in range(0, images, config.batch_size):
        indices = list(range(start, min(start + config.batch_size, images)))
        args, kwargs = placed(view(few, indices, "none", torch.Generator()), device, dtype)
        with torch.no_grad():
            feats = [feat.double() for feat in target.features(*args, **kwargs)]
        sums = [feat.sum(0) + (sums[i] if sums else 0.0) for i, feat in enumerate(feats)]
        squares = [feat.square().sum().item() + (squares[i] if squares else 0.0) for i, feat in enumerate(feats)]
    units = []
    for total, square in zip(sums, squares, strict=True):
        spread = square - total.square().sum().item() / images
        units.append(max(spread, _LEAST_SPREAD * square) / (images * total.numel()) or 1.0)
    return units


def _images(batch: Batch) -> int:
    args, kwargs = batch
    return next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), 1)


def _part(batch: Batch, images: int, at: slice) -> Batch:
    """The images in `at` of a batch of so many."""
    if at == slice(0, images):
        return batch
    args, kwargs = batch

    def part(value: Any) -> Any:
        return value[at] if isinstance(value, Tensor) and value.ndim and len(value) == images else value

    return tuple(map(part, args)), {key: part(value) for key, value in kwargs.items()}


def _cuts(images: int, parts: int) -> list[slice]:
    edges = [images * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def _times(one: Batch, images: int) -> Batch:
    """The batch of one image as one of so many, in tensors of its own."""
    args, kwargs = one

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.cat([value] * images) if value.ndim and len(value) == 1 else value.clone()

    return tuple(map(repeated, args)), {key: repeated(value) for key, value in kwargs.items()}


def _wide(feat: Tensor) -> Tensor:
    return feat.to(torch.promote_types(feat.dtype, torch.float32))


def _features(learner: Capture, args: tuple, kwargs: dict) -> list[Tensor]:
    try:
        return learner.features(*args, **kwargs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "mimicking with batch statistics: a norm layer sees a single value per channel (one image, 1x1 map); "
            "give at least 2 images and a batch_size of at least 2, or norm_mode='eval'"
        ) from error


def _check_pair(teacher: nn.Module, student: nn.Module, seam: Seam, student_seam: Seam) -> None:
    if len(seam.points) != len(student_seam.points):
        raise InputError(
            f"mimicking: the teacher's seam has {len(seam.points)} points, the student's {len(student_seam.points)}; "
            "name as many, in the same order"
        )
    for who, model in (("teacher", teacher), ("student", student)):
        devices = {t.device for t in guard.named_tensors(model).values()}
        if torch.device("meta") in devices or len(devices) > 1:
            raise UnsupportedModel(
                f"mimicking: the tensors of the {who} are on {', '.join(sorted(map(str, devices)))}; expected one "
                "device that holds data: load the weights, then .to() one device"
            )
    storages = {t.untyped_storage().data_ptr() for t in guard.named_tensors(teacher).values() if t.numel()}
    shared = [
        name
        for name, t in guard.named_tensors(student).items()
        if t.numel() and t.untyped_storage().data_ptr() in storages
    ]
    if shared:
        raise InputError(
            f"mimicking: the student shares the tensor {shared[0]!r} with the teacher, training would change both; "
            "give copy.deepcopy(student)"
        )


def _check_features(seam: Seam, wanted: list[Tensor], found: list[Tensor]) -> None:
    for point, want, have in zip(seam.points, wanted, found, strict=True):
        if want.shape != have.shape:
            raise InputError(
                f"mimicking at the seam point {point}: the teacher gives {tuple(want.shape)}, the student "
                f"{tuple(have.shape)}, axis 0 being images; cut nothing at the seam itself, or name a seam where both "
                "agree (--seam, find_seam(points=...), and student_seam=... where module names differ)"
            )
        if not want.is_floating_point():
            raise InputError(f"mimicking at the seam point {point}: found {want.dtype}, expected floating point")
    if not any(feat.requires_grad for feat in found):
        raise InputError("mimicking: no parameter of the student acts before the seam, so nothing can learn")


def _check_finite(losses: list[float], wanted: list[Tensor], config: MimicConfig) -> None:
    bad = next((step for step, loss in enumerate(losses) if not isfinite(loss)), None)
    if bad is None:
        return
    sound = all(bool(w.isfinite().all()) for w in wanted)
    cause = (
        f"the training diverged: lower lr (now {config.lr})"
        if sound
        else "the teacher's own features are not finite: look at its weights, its precision and the images"
    )
    raise (Diverged if sound else InputError)(
        f"mimicking: the loss at step {bad} of {config.steps} is {losses[bad]}; {cause}. "
        "The student's tensors are as before"
    )


def _device(config: MimicConfig, student: nn.Module) -> torch.device:
    """The device asked for, with its index; the student's own when none was."""
    if config.device is None:
        return next((t.device for t in guard.named_tensors(student).values()), torch.device("cpu"))
    return guard.resolve_device(config.device)


def _fits(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    return all(
        t.device == device and (t.dtype == dtype or not t.is_floating_point())
        for t in guard.named_tensors(model).values()
    )


def _converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    copy = guard.full_copy(model).eval()
    for tensor in guard.named_tensors(copy).values():
        tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)
    return copy


@contextmanager
def _placed(student: nn.Module, device: torch.device, dtype: torch.dtype, head: set[int]) -> Iterator[None]:
    """`student` on `device` in `dtype` inside; where and what it was afterwards, with the very same head tensors."""
    if _fits(student, device, dtype):
        yield
        return
    home = {id(t): (t, t.data) for t in guard.named_tensors(student).values()}
    student.zero_grad(set_to_none=True)
    for tensor, data in home.values():
        tensor.data = data.to(device, dtype if data.is_floating_point() else None)
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)
        for key, (tensor, data) in home.items():
            tensor.data = data if key in head else tensor.data.to(data.device, data.dtype)
