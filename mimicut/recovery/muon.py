"""Muon: every weight moves by its momentum with all singular values made alike, so that no direction learns slower.

With the momentum as a matrix M (outputs, inputs x kernel) = U diag(s) V', a weight moves by -lr * scale * U V'.

Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024), iteration and momentum; the scale
that makes its steps as long as AdamW's from Liu et al., arXiv 2502.16982. torch.optim.Muon takes matrices alone; here
a convolution is a matrix of outputs x (inputs x kernel), and each filter of a depthwise one is normalised by itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SCALE = 0.2  # root mean square of AdamW's steps
# Vectors (biases, norms) move by AdamW with this share of the learning rate. Source: measured (docs/LOG.md).
_VECTOR_RATE = 0.1
# Columns for each row from which the Gram matrix alone is iterated: five steps on the matrix cost 5 (2 r + 1) products
# of its rows' size, on the Gram matrix 2 r + 17. Source: counted, without _STRIPS; measured on one core, a third of
# the time for 256 x 2304, five sixths for 768 x 1536 (docs/LOG.md).
_LONG = 1.5
# Rows from which a symmetric product is computed by its upper triangle on a CPU, in so many strips of rows. Source:
# measured on one core (docs/LOG.md): three quarters of the time at 768 rows, no gain at 192.
_SPLIT, _STRIPS = 256, 4
_TOGETHER = 2**24  # Numbers that move at once, for the memory of their copies. Source: assumption.


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
        self.vectors = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0, **at_once(vectors)) if vectors else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # it gives no loss
        for group in self.param_groups:
            for weights in _alike(p for p in group["params"] if p.grad is not None and not _is_vector(p)):
                self._move(weights, group["lr"], group["weight_decay"], group["momentum"])
            if self.vectors is not None:
                self.vectors.param_groups[0]["lr"] = group["lr"] * _VECTOR_RATE
        if self.vectors is not None:
            self.vectors.step()

    def _move(self, weights: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        """Move weights of one shape by their gradients."""
        gradients = [w.grad for w in weights if w.grad is not None]
        for w in weights:
            if "momentum" not in self.state[w]:
                self.state[w]["momentum"] = torch.zeros_like(w)
        averages = [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        moves = torch.stack(torch._foreach_lerp(gradients, averages, momentum)).flatten(2)
        depthwise = weights[0].ndim > 2 and weights[0].shape[1] == 1
        moves = nn.functional.normalize(moves, dim=2) if depthwise else orthogonal(moves)
        moves *= -lr * _SCALE * math.sqrt(moves.shape[2] if depthwise else max(moves.shape[1:]))
        if weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, list(moves.view(len(weights), *weights[0].shape)))


def _alike(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield weights of one shape together, as many as _TOGETHER allows: a network has many alike, and small operations
    one by one cost more than what they compute, on an accelerator above all."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(weight.shape, []).append(weight)
    for shape, found in by_shape.items():
        most = max(1, _TOGETHER // shape.numel())
        yield from (found[at : at + most] for at in range(0, len(found), most))


def at_once(parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The option with which torch's optimisers move all parameters at once: in one kernel on CUDA, else in a few."""
    return {"fused": True} if parameters[0].device.type == "cuda" else {"foreach": True}


def _is_vector(weight: Tensor) -> bool:
    """Whether a weight has a single axis longer than one, as layer scales do too."""
    return weight.ndim < 2 or weight.numel() == max(weight.shape)


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V' of each matrix (..., rows, columns) with the singular value decomposition U S V'.

    Its singular values are between 0.7 and 1.2: five steps of a Newton-Schulz iteration, no more. A step is
    X <- P X with P = a I + b G + c G^2 and G = X X'. All these commute, so that of a long matrix the small G alone is
    iterated, G <- P G P, and X is multiplied by the product of all P at the end.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-12)
    found = _by_gram(wide) if wide.shape[-1] >= _LONG * wide.shape[-2] else _by_steps(wide)
    return found.mT if tall else found


def _polynomial(gram: Tensor) -> Tensor:
    """P of a Gram matrix G."""
    a, b, c = _COEFFICIENTS
    made = b * gram + c * _symmetric(gram, gram)
    made.diagonal(dim1=-2, dim2=-1).add_(a)
    return made


def _by_steps(wide: Tensor) -> Tensor:
    for _ in range(_ITERATIONS):
        wide = _polynomial(_symmetric(wide, wide.mT)) @ wide
    return wide


def _by_gram(wide: Tensor) -> Tensor:
    gram = _symmetric(wide, wide.mT)
    product = step = _polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = _symmetric(step, _symmetric(gram, step))
        step = _polynomial(gram)
        product = _symmetric(step, product)
    return product @ wide


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """left @ right (..., n, n), of which it is known that it is symmetric."""
    rows = left.shape[-2]
    if rows < _SPLIT or left.device.type != "cpu":
        return left @ right
    made, strip = left.new_empty((*left.shape[:-1], rows)), -(-rows // _STRIPS)
    for at in range(0, rows, strip):
        upper = left[..., at : at + strip, :] @ right[..., at:]
        made[..., at : at + strip, at:] = upper
        made[..., at + strip :, at : at + strip] = upper[..., strip:].mT
    return made
