"""Muon: every weight moves by its momentum with all singular values made alike, so that no direction learns slower.

With the momentum as a matrix M (outputs, inputs x kernel) = U diag(s) V', a weight moves by -lr * scale * U V'.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024), iteration and momentum; the scale
that makes its steps as long as AdamW's from Liu et al., arXiv 2502.16982. torch.optim.Muon takes matrices alone; here
a convolution is a matrix of outputs x (inputs x kernel), and each filter of a depthwise one is normalised by itself.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SCALE = 0.2  # root mean square of AdamW's steps
# Vectors (biases, norms) move by AdamW with this share of the learning rate. Source: measured (docs/LOG.md).
_VECTOR_RATE = 0.1


class Muon(torch.optim.Optimizer):
    """Weights with two axes and more move by Muon, the rest by AdamW, which is `vectors`.

    Args:
        params: What to optimise.
        lr: Of Muon; AdamW has a tenth of it.
        weight_decay: Of Muon; AdamW has none.
        momentum: Of Muon, Nesterov's.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        vectors = [p for group in self.param_groups for p in group["params"] if _is_vector(p)]
        self.vectors = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0, foreach=True) if vectors else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # it gives no loss
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None or _is_vector(weight):
                    continue
                state = self.state[weight]
                average = state.setdefault("momentum", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                move = weight.grad.lerp(average, group["momentum"]).flatten(1)
                depthwise = weight.ndim > 2 and weight.shape[1] == 1
                move = nn.functional.normalize(move, dim=1) if depthwise else orthogonal(move)
                length = _SCALE * math.sqrt(move.shape[1] if depthwise else max(move.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(move.view(weight.shape), alpha=-group["lr"] * length)
            if self.vectors is not None:
                self.vectors.param_groups[0]["lr"] = group["lr"] * _VECTOR_RATE
        if self.vectors is not None:
            self.vectors.step()


def _is_vector(weight: Tensor) -> bool:
    """Whether a weight has a single axis longer than one, as layer scales do too."""
    return weight.ndim < 2 or weight.numel() == max(weight.shape)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V' of a matrix (rows, columns) with the singular value decomposition U S V'.

    Its singular values are between 0.7 and 1.2: five steps of a Newton-Schulz iteration, no more.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp_min(1e-12)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
