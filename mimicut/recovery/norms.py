"""NORMS: which running statistics the batch norms have after a cut, chosen on images set aside for that.

With the cut's statistics S and those of the few images in the student N, the statistics become (1 - a) S + a N, with a
one of SHARES: few images estimate a variance badly, so that shrinking towards the old values can win. Layer norms keep
no statistics: there is nothing to choose.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from mimicut.base import guard
from mimicut.recovery.batches import Batch

VIEWS = 256  # Views of the few images from which statistics are measured. Source: assumption.
# The share a of the few images' statistics in the mixture. Source: assumption; 0 is the cut's own.
SHARES = (0.0, 0.25, 0.5, 1.0)
_Norms = list[Any]  # batch norms with statistics, of which torch's types say that there may be none


@torch.no_grad()
def settle_norms(student: nn.Module, head: Collection[str], batches: list[Batch], error: Callable[[], float]) -> float:
    """Choose the best mixture and leave it in the student's batch norms.

    The student is used in eval mode but for its batch norms, and comes back in eval mode with its other tensors as they
    were.

    Args:
        student: The network, changed in place.
        head: Names of the tensors that may not be changed.
        batches: Views of the images to fit.
        error: The error of the student as it is, on images to choose by.

    Returns:
        The share of the few images' statistics in the mixture, one of SHARES.
    """
    norms = _body_norms(student, head)
    student.eval()
    if not norms or not batches:
        return 0.0
    old, new = _measure(student, norms, batches)
    errors = {}
    for share in SHARES:
        _mix(norms, old, new, share)
        errors[share] = error()
    best = min(SHARES, key=lambda share: errors[share])
    _mix(norms, old, new, best)
    return best


@torch.no_grad()
def refit_norms(student: nn.Module, head: Collection[str], batches: list[Batch]) -> bool:
    """Give the student's batch norms the statistics of the few images alone.

    Args:
        student: The network, changed in place; it comes back in eval mode.
        head: Names of the tensors that may not be changed.
        batches: Views of the images.

    Returns:
        Whether there are any batch norms.
    """
    norms = _body_norms(student, head)
    student.eval()
    if not norms:
        return False
    old, new = _measure(student, norms, batches)
    _mix(norms, old, new, 1.0)
    return True


def _body_norms(student: nn.Module, head: Collection[str]) -> _Norms:
    kind = nn.modules.batchnorm._BatchNorm
    fixed = {id(t) for name, t in guard.named_tensors(student).items() if name in head}
    norms = [m for m in student.modules() if isinstance(m, kind) and m.running_var is not None]
    return [m for m in norms if id(m.running_var) not in fixed]


def _measure(student: nn.Module, norms: _Norms, batches: list[Batch]) -> tuple[list[tuple], list[tuple]]:
    """Mean and variance (channels,) of each norm, as they are and over the batches; the norms come back unchanged."""
    old = [(m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    momenta = [m.momentum for m in norms]
    with guard.seeded(0):
        try:
            for module in norms:
                module.training, module.momentum = True, None  # a plain average over all batches
                module.reset_running_stats()
            for args, kwargs in batches:
                student(*args, **kwargs)
            new = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
        except ValueError:  # a single value for each channel has no variance
            new = [pair[:2] for pair in old]
        finally:
            for module, momentum, (mean, variance, tracked) in zip(norms, momenta, old, strict=True):
                module.training, module.momentum = False, momentum
                _put(module, mean, variance)
                module.num_batches_tracked.copy_(tracked)
    return old, new


def _mix(norms: _Norms, old: list[tuple], new: list[tuple], share: float) -> None:
    for module, (mean, variance, *_), (other, spread) in zip(norms, old, new, strict=True):
        _put(module, mean.lerp(other, share), variance.lerp(spread, share))


def _put(module: Any, mean: Tensor, variance: Tensor) -> None:
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)
