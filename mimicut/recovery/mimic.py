"""MIMIC: the student's body learns the teacher's features at the seam, from a few unlabelled images.

The loss is the paper's and nothing else: with F the student's features and T the teacher's, the mean of (F - T)^2. No
labels, no logits, no head. Of a seam with several points it is the sum of their errors, each in units of the teacher's
own variance there.
Several processes, one for each device, may take the steps together: each passes its share of the same batch, and their
gradients are added up: each step is that of one process up to rounding, which grows with the steps.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.base.errors import InputError
from mimicut.base.ranks import Ranks
from mimicut.recovery.batches import Source, count
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.recovery.config import PRESETS, MimicConfig
from mimicut.recovery.pair import Pair, check_pair
from mimicut.recovery.settle_options import settle
from mimicut.recovery.training import MimicLog, train
from mimicut.surgery.seam import Seam


@guard.exact_float32()
def mimic(
    teacher: nn.Module,
    student: nn.Module,
    seam: Seam | Sequence[Seam],
    few: Source | Tensor,
    config: MimicConfig = PRESETS["paper"],
    *,
    choose: Source | Tensor | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
    on_checkpoint: Callable[[Checkpoint], None] | None = None,
    max_memory: int | None = None,
    ranks: Ranks | None = None,
) -> MimicLog:
    """Train the body of `student` in place until its features at the seam are the teacher's.

    Only norm layers are in train mode, so auxiliary branches, dropout and stochastic depth never run. The student comes
    back in eval mode, its `requires_grad` as before and gradients cleared; on an error its tensors are as they were.
    Ctrl-C waits for the step to end and raises Stopped, a KeyboardInterrupt: the student is as after that step, with
    `choose` as after the best one. The teacher is as before in every case.

    Args:
        teacher: The network to imitate.
        student: Any network with the teacher's feature shapes at the seam, however it was made. Its head, whose names
            are in the seam, is not touched.
        seam: Where the features are. Where the student's module names differ: (the teacher's, the same points in the
            student).
        few: Images: an ImageSet, or a float tensor with images on axis 0, as the teacher takes them; `WithExtra` puts
            extra images beside them, which take the share of a batch that the config says.
        config: How. Precision and layout that are "auto", and a rate that is None, are decided on here; the log's
            config has what was taken.
        choose: Images, none of `few`, on which the student is judged before the first step and after every twentieth of
            the steps: it comes back as it was when it was best on them. Without them, as after the last step.
        on_step: Called with (steps done, steps in all, loss) after every step on a CPU, elsewhere after every tenth and
            the last one.
        checkpoint: Where to continue; the result is the same as without the interruption.
        on_checkpoint: Called, about every minute, with what another call with the same arguments needs as `checkpoint`.
        max_memory: Bytes that a step may hold for its gradients. A batch that would hold more goes through in equal
            parts, but not with norm_mode "train", where batches are normalised as a whole.
        ranks: The processes that take the steps together (`base.ranks.current()`), each with the same arguments but its
            own device; not with norm_mode "train". Every process gets the first one's student to begin with.
            If another process ends, Stopped is raised, as by Ctrl-C.

    Returns:
        How it went.

    Raises:
        InputError: Images, student or options do not fit, the loss stops being finite, or this process has another
            teacher or other images than the first one of `ranks`.
        UnsupportedModel: The seam cannot be captured.

    Source: MiR (Wang et al., CVPR 2022, arXiv 2201.02620): pre-pool mean squared error under a frozen head.
    """
    pair = Pair.of(teacher, student, seam)
    check_pair(pair)
    count(few)
    check_ranks(config, ranks)
    if ranks is not None:
        check_same(ranks, teacher, few)
    config, ways = settle(pair, few, config, checkpoint=checkpoint, max_memory=max_memory)
    if ranks is not None:  # what is measured differs by rounding
        config = replace(ranks.of_first(config), device=config.device)
    return train(
        pair, few, config, choose=choose, on_step=on_step, checkpoint=checkpoint, on_checkpoint=on_checkpoint,
        max_memory=max_memory, ways=ways, ranks=ranks,
    )  # fmt: skip


def check_ranks(config: MimicConfig, ranks: Ranks | None) -> None:
    """Check that several processes can mimic together as the config says.

    Raises:
        InputError: They cannot.
    """
    if ranks is not None and config.norm_mode == "train":
        raise InputError(
            f"mimicking on {ranks.count} devices: norm_mode is 'train', which normalises each device's images by "
            "themselves; expected 'eval', as in the preset default, or one device"
        )


def check_same(ranks: Ranks, teacher: nn.Module, few: Source | Tensor) -> None:
    """Check that this process has the teacher and the images of the first one: else sums of two tasks add up.

    Raises:
        InputError: It has others.
    """
    images = _digest([few]) if isinstance(few, Tensor) else [str(each) for each in getattr(few, "hashes", ())]
    own = {"teacher": _digest(guard.named_tensors(teacher).values()), "images": images}
    wanted = ranks.of_first(own)
    for what, found in own.items():
        if found != wanted[what]:
            raise InputError(
                f"working on {ranks.count} devices: the {what} of process {ranks.rank} differ(s) from those of the "
                "first one; give every process the same weights, and the same images in the same order"
            )


def _digest(tensors: Iterable[Tensor]) -> str:
    whole = sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
