"""Channels taken away one after the other, each time those whose loss the others can best make good.

A reader is a layer that reads the group. X (rows, inputs): its inputs; W (outputs, inputs): its weights; S: how
strongly each of its outputs acts. Kept up to date are

    H = inv(X'X + ridge)        (inputs, inputs)
    A = W'SW                    (inputs, inputs), W being refitted with every input that goes

Taking away the inputs g costs tr(inv(H_gg) A_gg). With L L' = H_gg, Z = inv(L) H_g and
P = inv(L) A_g - inv(L) A_gg inv(L') Z / 2, both (|g|, inputs), it leaves H - Z'Z and A - Z'P - P'Z.

These products are put off until there are _PANEL rows of Z, and then made at once: one after the other they are bound
by the memory, not by the multiplications. The diagonal blocks, of which costs are made, follow at once.
Source: the elimination is that of the Optimal Brain Surgeon (Hassibi and Stork, 1992), the putting off that of GPTQ
(Frantar et al., arXiv 2210.17323, section 3.3).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RIDGE = 1e-3  # in units of the mean squared input. Source: GRAIL's (CPAL 2026), as read in its code.
# Units taken away at once: this share of those that are left. Source: assumption, for time; one by one below 128.
_AT_ONCE = 64
_PANEL = 128  # Source: measured on widths of 64 to 2048: 64 and 256 are no faster.
_DEAD = 0.125  # of the inputs, from which on matrices are made smaller when they are brought up to date. As _PANEL.


class Reader:
    """One layer that reads a group of `width` units.

    gram: X'X. acts: W'SW. at: (width, taps) inputs of each unit, -1 where a unit has fewer than others. What belongs to
    no unit stays, and helps to make good.
    """

    def __init__(self, gram: Tensor, acts: Tensor, at: np.ndarray):
        width, self._taps = at.shape
        rest = np.setdiff1d(np.arange(len(gram)), at)
        order = torch.from_numpy(np.concatenate([at.ravel(), rest])).to(gram.device)
        self._inverse, self._acts = _padded(_inverse(gram), order, 1.0), _padded(acts, order, 0.0)
        self._units = torch.arange(width, device=gram.device)  # which unit stands at each place
        self._place = self._units.clone()  # and where each unit stands
        self._left = torch.ones(width, dtype=torch.bool, device=gram.device)  # by place
        self._blocks = [self._diagonal(matrix) for matrix in (self._inverse, self._acts)]
        self._pending = 0
        self._zed, self._pea = self._inverse.new_empty(2, _PANEL, len(order))

    def _inputs(self, places: Tensor) -> Tensor:
        return (places[:, None] * self._taps + torch.arange(self._taps, device=places.device)).flatten()

    def _diagonal(self, matrix: Tensor) -> Tensor:
        """(places, taps, taps)"""
        at = self._inputs(torch.arange(len(self._units), device=matrix.device)).unflatten(0, (-1, self._taps))
        return matrix[at[:, :, None], at[:, None, :]]

    def costs(self) -> np.ndarray:
        """(width,) of taking each unit away; infinite for those that are dropped."""
        inverse, acts = self._blocks
        if self._taps == 1:
            costs = (acts / inverse).flatten()
        else:
            costs = torch.linalg.solve(inverse, acts).diagonal(dim1=1, dim2=2).sum(1)
        found = costs.new_full((len(self._place),), torch.inf)
        found[self._units[self._left]] = costs[self._left]
        return found.cpu().numpy()

    def take(self, dropped: np.ndarray) -> None:
        """Without the units `dropped`."""
        places = self._place[torch.from_numpy(dropped).to(self._place.device)]
        at = self._inputs(places)
        if self._pending and self._pending + len(at) > len(self._zed):
            self._catch_up()
            places = self._place[torch.from_numpy(dropped).to(self._place.device)]
            at = self._inputs(places)
        if len(at) > len(self._zed):
            self._zed, self._pea = self._zed.new_empty(2, len(at), self._zed.shape[1])
        before = slice(self._pending)
        zed, pea = self._zed[before], self._pea[before]
        mine, own = self._inverse[at], self._acts[at]
        if self._pending:
            mine.addmm_(zed[:, at].T, zed, alpha=-1)
            own.addmm_(zed[:, at].T, pea, alpha=-1).addmm_(pea[:, at].T, zed, alpha=-1)
        factor = _factor(mine[:, at])
        mine = torch.linalg.solve_triangular(factor, mine, upper=False)
        own = torch.linalg.solve_triangular(factor, own, upper=False)
        middle = torch.linalg.solve_triangular(factor, own[:, at].mT, upper=False)
        own.addmm_(middle, mine, alpha=-0.5)
        now = slice(self._pending, self._pending + len(at))
        self._zed[now], self._pea[now] = mine, own
        self._pending += len(at)
        self._follow(mine, own)
        self._left[places] = False
        inverse, acts = self._blocks
        inverse[places], acts[places] = torch.eye(self._taps, dtype=acts.dtype, device=acts.device), 0.0

    def _follow(self, zed: Tensor, pea: Tensor) -> None:
        """The diagonal blocks, brought up to date."""
        inverse, acts = self._blocks
        zed, pea = (
            each[:, : len(self._units) * self._taps].unflatten(1, (-1, self._taps)).transpose(0, 1)
            for each in (zed, pea)
        )  # (places, rows, taps)
        inverse -= zed.mT @ zed
        both = zed.mT @ pea
        acts -= both + both.mT

    def _catch_up(self) -> None:
        """Make the products that were put off, and leave out what is dropped where that is enough to be worth it."""
        zed, pea = self._zed[: self._pending], self._pea[: self._pending]
        self._pending = 0
        if int(self._left.sum()) < (1 - _DEAD) * len(self._left):
            places = self._left.nonzero()[:, 0]
            others = torch.arange(len(self._left) * self._taps, len(self._inverse), device=places.device)
            keep = torch.cat([self._inputs(places), others])
            zed, pea = zed[:, keep], pea[:, keep]
            self._inverse, self._acts = self._inverse[keep][:, keep], self._acts[keep][:, keep]
            self._blocks = [block[places] for block in self._blocks]
            self._units, self._left = self._units[places], self._left[places]
            self._place[self._units] = torch.arange(len(places), device=places.device)
            self._zed, self._pea = self._zed[:, : len(keep)], self._pea[:, : len(keep)]
        self._inverse.addmm_(zed.mT, zed, alpha=-1)
        self._acts.addmm_(torch.cat([zed, pea]).mT, torch.cat([pea, zed]), alpha=-1)


def eliminate(readers: Sequence[Reader], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (width,), larger is kept, and errors (width + 1,): what is lost in all with so many units left; infinite
    with none."""
    scores, errors, total = np.zeros(width), np.zeros(width + 1), 0.0
    left = width
    while left > 1:
        costs: Any = sum(reader.costs() for reader in readers)
        dropped = np.argsort(costs, kind="stable")[: min(max(1, left // _AT_ONCE), left - 1)]
        for unit in dropped:
            scores[unit] = width - left
            total += max(float(costs[unit]), 0.0)
            left -= 1
            errors[left] = total
        for reader in readers:
            reader.take(dropped)
    scores[np.isfinite(sum(reader.costs() for reader in readers))] = width - 1
    errors[0] = np.inf
    return scores, errors


def _inverse(gram: Tensor) -> Tensor:
    """inv(gram + ridge)"""
    held = gram.clone()
    held.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-300))
    factor, failed = torch.linalg.cholesky_ex(held)
    return torch.linalg.inv(held) if bool(failed) else torch.cholesky_inverse(factor)


def _factor(block: Tensor) -> Tensor:
    """Lower Cholesky factor. Rounding can leave the block of what others all but give not quite positive: then it is
    lifted."""
    factor, failed = torch.linalg.cholesky_ex(block)
    if bool(failed):
        lift = (1e-9 * block.diagonal().abs().max()).clamp_min(1e-300) - torch.linalg.eigvalsh(block)[0].clamp_max(0.0)
        factor = torch.linalg.cholesky(block + lift * torch.eye(len(block), dtype=block.dtype, device=block.device))
    return factor


def _padded(matrix: Tensor, order: Tensor, diagonal: float) -> Tensor:
    """In that order; where it says -1, an input that has nothing to do with any other."""
    if torch.equal(order, torch.arange(len(matrix), device=order.device)):
        return matrix
    found = matrix[order][:, order]  # -1 is the last one, for now
    none = order < 0
    if bool(none.any()):
        found[none], found[:, none] = 0.0, 0.0
        found.diagonal()[none] = diagonal
    return found
