"""The steps of mimicking: the loop, where it stands, and what it needs to continue."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.base import guard, memory
from mimicut.base.errors import Diverged, InputError
from mimicut.base.interrupts import interrupts_held
from mimicut.base.layout import laid
from mimicut.base.ranks import RankLost, Ranks
from mimicut.recovery.batches import Batch, Passes, copied, count_in, equal_slices, part_of, repeat_image
from mimicut.recovery.checkpoint import Checkpoint, load_optimiser_state, optimiser_state
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.fused_norm import NormOfLayer, find_foldable, folding
from mimicut.recovery.judge import BestStudent
from mimicut.recovery.pair import Pair, check_features
from mimicut.recovery.seam_error import mean_squared_errors
from mimicut.surgery.seam import Capture

# On an accelerator reading a loss waits for the device: so not after every step. Source: assumption.
_READ_EVERY = 10
_JUDGEMENTS = 20  # times in a run that the student is judged. Source: assumption.
# Between checkpoints, and as many times as long as the last one took. Source: assumption.
_CHECKPOINT_SECONDS, _CHECKPOINT_PAUSE = 60.0, 50
# The share of the memory for a step that may be kept for its gradients; the rest is for the gradients themselves and
# the teacher's pass. Source: measured, EfficientNet-Lite0 at 224 pixels (docs/LOG.md).
_KEPT_SHARE = 0.5

OnStep = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss)."""


class TrainingLoop:
    """The loop, and where it stands.

    Args:
        pair: The teacher, and the student whose body trains, on one device.
        captures: Of the teacher and of the student, at their seams.
        loss_units: Of each seam point, what its mean squared error is divided by.
        optimiser: Of the student's body.
        batches: Of the images.
        config: With precision, layout and rate decided.
        best: Judges the student from time to time; None: nobody does.
        max_memory: Bytes that a step may hold for its gradients; None: any.
        ranks: The processes that take the steps together; None: this one alone.

    losses: of the steps that were read. parts: into how many a batch is divided to keep to the memory, 0 before the
    first step. halved: how often that number was doubled, since the device's memory ran out. between_steps: whether no
    step is half done. untrained: names of the body's modules that run and that no gradient reaches, known from the
    first step on.
    """

    def __init__(
        self,
        pair: Pair,
        captures: tuple[Capture, Capture],
        loss_units: list[float],
        optimiser: torch.optim.Optimizer,
        batches: Passes,
        config: MimicConfig,
        best: BestStudent | None,
        max_memory: int | None,
        ranks: Ranks | None = None,
    ):
        self._ranks = ranks
        self._pair, self._loss_units, self._max_memory = pair, loss_units, max_memory
        self._teacher_capture, self._student_capture = captures
        self._optimiser, self._batches, self._config, self.best = optimiser, batches, config, best
        self._device = optimiser.param_groups[0]["params"][0].device
        # Norms that are computed with their layers, in teacher and student; known from the first step on.
        self._folded: tuple[NormOfLayer, NormOfLayer] | None = None
        self.parts = self.halved = 0
        self.losses: list[float] = []
        self._unread: list[Tensor] = []
        self.between_steps = True
        self.untrained: tuple[str, ...] | None = None

    def run(self, on_step: OnStep | None, on_checkpoint: Callable[[Checkpoint], None] | None) -> None:
        """Take all steps that are left."""
        total = self._config.steps
        judge_every = max(1, total // _JUDGEMENTS)
        if self.best is not None and not self.best.errors:
            self.best.judge(0)
        saved, pause = time.perf_counter(), _CHECKPOINT_SECONDS
        with interrupts_held() as let_through:
            for step in range(len(self.losses), total):
                self.between_steps = False
                wanted = self._step(step)
                done = step + 1
                if self.best is not None and (done % judge_every == 0 or done == total):
                    self.best.judge(done)
                self.between_steps = True
                if self._device.type == "cpu" or done % _READ_EVERY == 0 or done == total:
                    self._read_losses()
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
        """Take one step; return the teacher's features, of the last part of the batch."""
        # Autocast without its cache, which would hand out weights from before the last update. Where it is not enabled,
        # it also shuts out a caller's own.
        autocast = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16", cache_enabled=False
        )
        before = None if self._ranks is None else self._batches.state()
        batch = next(self._batches)
        images = count_in(batch)
        own = slice(0, images) if self._ranks is None else self._ranks.share(images)
        batch = part_of(batch, images, own)
        if self._folded is None:
            try:
                self._prepare(batch)
            except RuntimeError as error:
                if not guard.out_of_memory(error):
                    raise
                raise self._out_of_memory(1, error) from error
        for group in self._optimiser.param_groups:
            group["lr"] = self._config.lr_at(step)
        with self._noting_untrained() if self.untrained is None else nullcontext():
            total, wanted = self._gradients_in_memory(batch, images, step, autocast)
        if self._ranks is not None:
            assert before is not None
            try:
                self._ranks.add_up([total, *self._found_gradients()])
            except (RankLost, KeyboardInterrupt):  # the student is as before this step, and so are the batches
                self._batches.go_to(before, step)
                self.between_steps = True
                raise
        self._optimiser.step()
        self._unread.append(total)
        return wanted

    def _found_gradients(self) -> list[Tensor]:
        parameters = (p for group in self._optimiser.param_groups for p in group["params"])
        return [p.grad for p in parameters if p.grad is not None]

    def _gradients_in_memory(
        self, batch: Batch, images: int, step: int, autocast: torch.autocast
    ) -> tuple[Tensor, list[Tensor]]:
        """As `_gradients`, of a batch in twice as many parts for as long as the memory of the device runs out.

        images: of the whole batch, of which `batch` may be this process's share.
        """
        own = count_in(batch)
        while True:
            self._optimiser.zero_grad(set_to_none=True)
            parts = [(part_of(batch, own, at), at.stop - at.start) for at in equal_slices(own, self.parts)]
            try:
                return self._gradients(parts, images, step, autocast)
            except RuntimeError as error:
                if not guard.out_of_memory(error):
                    raise
                if self._config.norm_mode == "train" or self.parts >= own:
                    raise self._out_of_memory(parts[0][1], error) from error
            self._optimiser.zero_grad(set_to_none=True)
            memory.trim()
            torch.cuda.empty_cache()  # does nothing where CUDA was not used
            self.parts, self.halved = min(own, 2 * self.parts), self.halved + 1

    def _out_of_memory(self, images: int, error: Exception) -> InputError:
        whole = "; batches are normalised as a whole (norm_mode 'train') and cannot go through in parts"
        return InputError(
            f"mimicking on {self._device}: its memory ran out with {images} image(s) at once"
            f"{whole if self._config.norm_mode == 'train' else ''} ({str(error).splitlines()[0][:200]}); expected room "
            "for one: free what else holds it, give precision bf16, a smaller input or batch, or another device. The "
            "student's tensors are as before"
        )

    def _gradients(
        self, parts: list[tuple[Batch, int]], images: int, step: int, autocast: torch.autocast
    ) -> tuple[Tensor, list[Tensor]]:
        """Pass the parts of a batch forward and back; return the loss, and the teacher's features of the last part."""
        assert self._folded is not None
        total: Any = 0.0
        for number, (part, size) in enumerate(parts):
            with autocast:
                with torch.no_grad():
                    wanted = self._features(self._teacher_capture, self._folded[0], part)
                found = self._features(self._student_capture, self._folded[1], part)
            if step == 0 and not number:
                check_features(self._pair.seam, wanted, found)
            errors = zip(mean_squared_errors(found, wanted), self._loss_units, strict=True)
            loss: Any = sum(error / unit for error, unit in errors)
            loss = loss if size == images else loss * (size / images)
            with guard.backward_pass(self._pair.student):
                loss.backward()
            total = total + loss.detach()
        return total, wanted

    @contextmanager
    def _noting_untrained(self) -> Iterator[None]:
        """Around the first step's passes, forward and back: find the body's modules that run, with parameters of their
        own of which none has a gradient."""
        body = {id(p) for group in self._optimiser.param_groups for p in group["params"]}
        own: dict[str, list[nn.Parameter]] = {}
        called: set[str] = set()
        with ExitStack() as hooks:
            for name, module in self._pair.student.named_modules():
                found = [p for p in module.parameters(recurse=False) if id(p) in body]
                if found:
                    own[name] = found
                    hooks.callback(module.register_forward_hook(lambda *_, name=name: called.add(name)).remove)
            yield
        self.untrained = tuple(n for n, found in own.items() if n in called and all(p.grad is None for p in found))

    def _features(self, capture: Capture, folded: NormOfLayer, batch: Batch) -> list[Tensor]:
        args, kwargs = laid(batch, self._config.layout)
        try:
            with folding(folded):
                return capture.features(*args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                "mimicking with batch statistics: a norm layer sees a single value per channel (one image, 1x1 map); "
                "give at least 2 images and a batch_size of at least 2, or norm_mode='eval'"
            ) from error

    def _prepare(self, batch: Batch) -> None:
        """Find the batch norms in eval mode that can be computed with the layers before them, and the number of parts
        in which a batch keeps to the memory."""
        images = count_in(batch)
        one = part_of(batch, images, slice(0, 1))

        def foldable(model: nn.Module, capture: Capture) -> NormOfLayer:
            return find_foldable(model, lambda: self._features(capture, {}, copied(one)))

        trains_norms = self._config.norm_mode == "train"  # a pass would move their statistics
        with torch.autocast(self._device.type, enabled=False):
            teacher = foldable(self._pair.teacher, self._teacher_capture)
            self._folded = teacher, {} if trains_norms else foldable(self._pair.student, self._student_capture)
            if not self.parts:
                # Batches that are normalised as a whole are not divided; the bound is of this process's memory, and an
                # accelerator has its own: where that runs out, the batch is halved.
                most = None if trains_norms or self._device.type != "cpu" else self._max_memory
                self.parts = 1 if most is None else self._parts_within(most, images, one)

    def _parts_within(self, most_bytes: int, images: int, one: Batch) -> int:
        """The fewest parts of a batch of `images` of which each keeps no more than its share of the memory."""
        first, second = self._kept_bytes(one, 1), self._kept_bytes(one, 2)
        each = max(second - first, 1)  # the rest does not grow with the images
        most_images = max(1, (round(_KEPT_SHARE * most_bytes) - max(first - each, 0)) // each)
        return -(-images // most_images)

    def _kept_bytes(self, one: Batch, images: int) -> int:
        """What a student's pass over `images` copies of one image keeps for its gradients."""
        own = {t.untyped_storage().data_ptr() for t in guard.named_tensors(self._pair.student).values()}
        sizes: dict[int, int] = {}
        assert self._folded is not None

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = self._features(self._student_capture, self._folded[1], repeat_image(one, images))
        del found  # not before: memory that is free has the same address again
        return sum(sizes.values())

    def _read_losses(self) -> None:
        if self._unread:
            self.losses += torch.stack(self._unread).tolist()
            self._unread.clear()

    def checkpoint(self) -> Checkpoint:
        """What another loop needs to continue to the same result."""
        self._read_losses()
        states = self._batches.state()
        groups = {
            "student": guard.named_tensors(self._pair.student),
            "optimiser": optimiser_state(self._optimiser),
            "random": states | {"torch": torch.get_rng_state()},
            "best": {} if self.best is None else self.best.tensors,
        }
        tensors = {
            f"{group}/{key}": t.detach().cpu().clone() for group, held in groups.items() for key, t in held.items()
        }
        data = {"losses": list(self.losses), "steps": self._config.steps, "parts": self.parts, "halved": self.halved}
        data |= {name: getattr(self._config, name) for name in ("precision", "layout", "lr")}
        if self.best is not None:
            data |= {"judged": [list(pair) for pair in self.best.errors], "kept": self.best.step}
        return Checkpoint(tensors, data)

    @torch.no_grad()
    def go_to(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: It is from another student, or a run with another number of steps.
        """
        data, saved = checkpoint.data, checkpoint.under("student")
        own = guard.named_tensors(self._pair.student)
        if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
            raise InputError(
                "continuing to mimic from a checkpoint: its tensors are those of another student; give the student "
                "that was cut by the same plan, or start anew without the checkpoint"
            )
        if data["steps"] != self._config.steps:
            raise InputError(
                f"continuing to mimic from a checkpoint: it is from a run of {data['steps']} steps, found "
                f"{self._config.steps} steps; ask for as many, or start anew without the checkpoint"
            )
        guard.put_back((tensor, saved[name].to(tensor)) for name, tensor in own.items())
        load_optimiser_state(self._optimiser, checkpoint.under("optimiser"))
        random = checkpoint.under("random")
        torch.set_rng_state(random.pop("torch"))
        self._batches.go_to(random, len(data["losses"]))
        self.losses, self.parts, self.halved = list(data["losses"]), data.get("parts", 0), data.get("halved", 0)
        if self.best is not None:
            self.best.errors = [tuple(pair) for pair in data["judged"]]
            self.best.step, best = data["kept"], checkpoint.under("best")
            self.best.tensors = {name: tensor.to(own[name]) for name, tensor in best.items()}


def _check_finite(losses: list[float], wanted: list[Tensor], config: MimicConfig) -> None:
    bad = next((step for step, loss in enumerate(losses) if not isfinite(loss)), None)
    if bad is None:
        return
    sound = all(bool(w.float().square().sum().isfinite()) for w in wanted)
    cause = (
        f"the training diverged at a learning rate of {config.lr:.3g}: give a lower one (lr= of the recipe, in "
        "Python), or train nothing, with --effort quick (steps=0): then the layers are only solved in closed form"
        if sound
        else "the teacher's own features are not finite, or their squares: look at its weights, precision and images"
    )
    raise (Diverged if sound else InputError)(
        f"mimicking: the loss at step {bad} of {config.steps} is {losses[bad]}; {cause}. "
        "The student's tensors are as before"
    )
