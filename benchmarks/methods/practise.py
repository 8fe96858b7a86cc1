"""PRACTISE: drop whole residual blocks, the ones whose loss is made good most easily; then MiR.

Source: Wang et al., CVPR 2023, arXiv 2202.07861. For each block that can go: drop it, put identity-initialised 1x1
convolutions around the gap (behind the layers that feed this residual stream before it, in front of those that read the
stream after it), train only them on the features at the seam with norms frozen (SGD 0.02, half of `steps`: 1,000 of
2,000 there); recoverability is the error left on the few images; the score divides it by the share of the cost that the
drop saves. The blocks with the smallest scores go together, the adaptors are thrown away, MiR trains the rest.

The cost is counted in MACs (measured latency in the paper), so that a run can be repeated. Blocks are kept as channels
are by the others: ceil(keep_width x n) of the n that can go, at its own MACs, which the table states; where a share of
the MACs is asked for, as many go as it takes. The paper's code
never adapts the stem and never drops the first block of a stage; here the anatomy says what feeds a stream and can go,
and the halves of transformer blocks count as blocks, with linear adaptors, which the paper does not have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.methods.layers import mixes
from benchmarks.methods.problem import PAPER, Method, Problem, train
from mimicut.anatomy.blocks import droppable
from mimicut.anatomy.cost import count
from mimicut.anatomy.graph import Block
from mimicut.base.errors import InputError
from mimicut.base.guard import full_copy
from mimicut.recovery.mimic import mimic
from mimicut.surgery.cut import drop_modules
from mimicut.surgery.head import put_under_head
from mimicut.surgery.seam import capturing


def run(problem: Problem) -> nn.Module:
    seam, blocks = problem.plan.seam, droppable(problem.anatomy)
    if not blocks:
        raise InputError("PRACTISE: this network has no residual block with an identity shortcut that can be dropped")
    total = count(problem.teacher, problem.few.batch([0]).to(problem.device)).macs
    scores = {block.name: recoverability(problem, block) / saved(problem, block, total) for block in blocks}
    fewest = sorted(blocks, key=lambda block: scores[block.name])
    gone = chosen(problem, fewest, total)
    student = drop_modules(full_copy(problem.teacher), [each for block in gone for each in block.dropped_modules])
    mimic(problem.teacher, student, seam, problem.few, problem.config())
    return put_under_head(problem.teacher, student, seam)


def chosen(problem: Problem, blocks: list[Block], total: int) -> list[Block]:
    """The first of `blocks`, those that go; all of them where even that keeps more MACs than were asked for."""
    share = problem.plan.budget.keep_width
    if share is not None:
        return blocks[: len(blocks) - ceil(share * len(blocks) - 1e-9)]
    for upto in range(len(blocks)):
        left = 1 - sum(saved(problem, block, total) for block in blocks[:upto]) / 100
        if left <= problem.plan.budget.keep:
            return blocks[:upto]
    return blocks


def saved(problem: Problem, block: Block, total: int) -> float:
    """Percent of the teacher's MACs that go with the block."""
    rest = drop_modules(full_copy(problem.teacher), block.dropped_modules)
    return 100 * (1 - count(rest, problem.few.batch([0]).to(problem.device)).macs / total)


def recoverability(problem: Problem, block: Block) -> float:
    """Mean squared error at the seam that adaptors around the gap leave on the few images."""
    probe = drop_modules(full_copy(problem.teacher), block.dropped_modules).eval()
    behind, before = around(problem, block)
    for parameter in probe.parameters():
        parameter.requires_grad_(False)
    with (
        adapted(probe, behind, before) as adaptors,
        capturing(problem.teacher, problem.plan.seam) as target,
        capturing(probe, problem.plan.seam) as learner,
    ):

        def loss_of(x: Tensor, y: Tensor | None, _: float) -> Tensor:
            with torch.no_grad():
                wanted = target.features(x)
            return sum(F.mse_loss(f, w) for f, w in zip(learner.features(x), wanted, strict=True))

        learning = list(adaptors.parameters())
        if learning:
            train(probe, loss_of, problem, lr=PAPER.lr, steps=problem.steps // 2, parameters=learning)
        with torch.no_grad():
            return sum(len(x) * float(loss_of(x, None, 1.0)) for x in problem.views_of_all(0)) / len(problem.few)


def around(problem: Problem, block: Block) -> tuple[list[str], list[str]]:
    """Convolutions that feed the block's residual stream before it, and those that read the stream after it."""
    order = {name: place for place, name in enumerate(problem.calls)}
    inside = [name for name in order if any(name == m or name.startswith(f"{m}.") for m, _ in block.dropped_modules)]
    first, last = min(order[name] for name in inside), max(order[name] for name in inside)
    feed, read = [], []
    for stream in block.streams:
        for member in problem.anatomy.groups[stream].members:
            name, _, kind = member.tensor.rpartition(".")
            module = problem.teacher.get_submodule(name)
            if kind != "weight" or not (mixes(module) or isinstance(module, nn.Linear)) or name in inside:
                continue
            if member.dim == 0 and order[name] < first:
                feed.append(name)
            if member.dim == 1 and order[name] > last:
                read.append(name)
    return feed, read


@contextmanager
def adapted(model: nn.Module, behind: list[str], before: list[str]) -> Iterator[nn.ModuleDict]:
    """`model` with identity-initialised 1x1 convolutions behind and in front of the named ones; gone on leaving."""
    adaptors, handles = nn.ModuleDict(), []
    for side, names in (("behind", behind), ("before", before)):
        for name in names:
            module = model.get_submodule(name)
            width = module.weight.shape[0 if side == "behind" else 1]
            tokens = isinstance(module, nn.Linear)
            adaptor = nn.Linear(width, width, bias=False) if tokens else nn.Conv2d(width, width, 1, bias=False)
            adaptor.to(module.weight.device)
            (nn.init.eye_ if tokens else nn.init.dirac_)(adaptor.weight)
            adaptors[f"{side} {name}".replace(".", "/")] = adaptor
            if side == "behind":
                handles.append(module.register_forward_hook(lambda _, __, out, a=adaptor: a(out)))
            else:
                handles.append(module.register_forward_pre_hook(lambda _, args, a=adaptor: (a(args[0]), *args[1:])))
    try:
        yield adaptors
    finally:
        for handle in handles:
            handle.remove()


METHOD = Method("practise", "PRACTISE, then MiR", "Wang et al., CVPR 2023", run, blocks=True)
