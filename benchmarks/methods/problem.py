"""What a method is given, what describes it, and the training loop that the gradient-based baselines share."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.anatomy.graph import Anatomy
from mimicut.base.layout import laid, learns_channels_last
from mimicut.base.memory import DEFAULT_BYTES
from mimicut.inputs.extra_images import GENERATED, ExtraImages, read_extra
from mimicut.inputs.image_set import ImageSet
from mimicut.proof.figures import quick_layout
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan

# Steps, batch, momentum, weight decay and schedule of every gradient-based baseline are those of MiR, so that methods
# differ in what they learn from and not in how long. Source: MiR, arXiv 2201.02620, see mimicut/recover/config.py.
PAPER = PRESETS["paper"]
MAX_VIEWS = 3200


@dataclass(frozen=True)
class Problem:
    """teacher: eval mode; it must come back as it was. plan: what the student keeps. few: unlabelled images.

    labels: int64 (n,), one an image of `few`; None for every method that does not declare that it needs them.
    views: key of `augment.VIEWS`. steps: of the whole method. seed: of batches and views. options: of the method.
    extra: images of anything, for methods that use some beside the few; they have no labels.
    """

    teacher: nn.Module
    anatomy: Anatomy
    plan: Plan
    few: ImageSet
    labels: Tensor | None
    views: str
    steps: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    extra: ExtraImages | None = None

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    @cached_property
    def calls(self) -> list[str]:
        """Names of the teacher's modules in the order of their first call."""
        order: dict[str, None] = {}
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
            for name, module in self.teacher.named_modules()
        ]
        try:
            with torch.no_grad():
                self.teacher(self.few.batch([0]).to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        return list(order)

    def with_extra(self) -> "Problem":
        """The same with drawn pictures beside the few images, half of each batch."""
        extra = read_extra(GENERATED, self.few, self.views, seed=self.seed, memory_bytes=DEFAULT_BYTES)
        return replace(self, extra=extra)

    def student(self) -> nn.Module:
        """The cut network with the teacher's weights, in eval mode."""
        return cut(self.teacher, self.plan).eval()

    @cached_property
    def layout(self) -> str:
        """Of the images in memory: the product's rule, so that every method's seconds are what users get."""
        if not learns_channels_last(self.teacher):
            return "contiguous"
        return quick_layout([self.teacher], self.few.batch([0]))

    def config(self, **changes: Any) -> MimicConfig:
        """The paper's recipe for this problem."""
        return MimicConfig(**{"steps": self.steps, "views": self.views, "seed": self.seed} | changes)

    def batches(self, size: int = PAPER.batch_size) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Endless passes over the images, a new order and new views each: (images, labels or None).

        The draws are those of `mimicut.mimic`: with one seed every method sees the same pictures in the same order.
        Extra ones, where there are some, are drawn at random and stand last in the batch; they have no labels.
        """
        count = len(self.few)
        own = min(size - size // 2 if self.extra is not None else size, count)
        order, views = (torch.Generator().manual_seed(self.seed) for _ in range(2))
        while True:
            shuffled = torch.randperm(count, generator=order)
            for where in shuffled[: count - count % own].split(own):
                x = self.few.view(where.tolist(), self.views, views)
                if self.extra is not None:
                    others = torch.randint(len(self.extra), (size - own,), generator=order).tolist()
                    x = torch.cat([x, self.extra.view(others, self.views, views)])
                labels = None if self.labels is None else self.labels[where].to(self.device)
                yield laid(x.to(self.device), self.layout), labels

    def views_of_all(self, rounds: int) -> list[Tensor]:
        """`rounds` views of every image (0: the images as they are), in equal batches of at most the paper's size, for
        what is fitted and not trained. At most 3,200 views in all, which bounds the memory."""
        views = torch.Generator().manual_seed(self.seed)
        parts = [part.tolist() for part in torch.arange(len(self.few)).chunk(-(-len(self.few) // PAPER.batch_size))]
        if not rounds:
            return [laid(self.few.batch(part).to(self.device), self.layout) for part in parts]
        return [
            laid(self.few.view(part, self.views, views).to(self.device), self.layout)
            for _ in range(min(rounds, max(1, MAX_VIEWS // len(self.few))))
            for part in parts
        ]


@dataclass(frozen=True)
class Method:
    """run: from a Problem to the finished network. labels: whether it is given them. trains: whether steps matter.

    published: options as its source gives them; grid: options tried for it on seeds that the table does not use.
    blocks: it drops whole blocks, so its cut is not the table's.
    """

    name: str
    title: str
    source: str
    run: Callable[[Problem], nn.Module]
    labels: bool = False
    trains: bool = True
    blocks: bool = False
    published: dict[str, Any] = field(default_factory=dict)
    grid: tuple[dict[str, Any], ...] = ()


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor | None, float], Tensor],
    problem: Problem,
    *,
    lr: float,
    steps: int | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    batches: Iterator[tuple[Tensor, Tensor | None]] | None = None,
) -> nn.Module:
    """`steps` steps of SGD on `loss_of(images, labels, share of the steps done)`, in the modes that `model` has.

    parameters: those that learn; all of the model's by default. batches: those of the problem, from the first on, by
    default. Returns the model, in eval mode.
    """
    config = problem.config(lr=lr, steps=problem.steps if steps is None else steps)
    learning = list(model.parameters() if parameters is None else parameters)
    optimiser = torch.optim.SGD(learning, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
    for step, (x, y) in enumerate(islice(batches or problem.batches(), config.steps)):
        for group in optimiser.param_groups:
            group["lr"] = config.lr_at(step)
        loss = loss_of(x, y, step / config.steps)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss at step {step} of {config.steps} is {loss.item()}; lr {lr}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def head_layer(problem: Problem) -> str:
    """The layer that holds the head's first weight: what it is given are the features after the pool."""
    return next(name for name in problem.plan.seam.head if name.endswith("weight")).rpartition(".")[0]
