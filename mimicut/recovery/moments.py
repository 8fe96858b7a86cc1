"""What the least squares of one layer need of the images: moments of its inputs and outputs, collected in one pass.

Axes of the tensors: g groups of a convolution (1 otherwise), n rows (a row is one output position of one view),
D inputs of a group x kernel, and one more that is always 1 where a constant can be learned too, m outputs of a group,
p parts of the images.

With the inputs X (g, n, D) that the student's layer sees, the outputs Y (g, n, m) that the teacher's layer gives, and
the prior weights W (g, m, D) that the cut left, the layer is solved for the residual R = Y - X W'. Its solution needs
no more of the rows than X'X (g, D, D) and X'R (g, D, m) of every part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mimicut.base.ranks import Ranks
from mimicut.recovery.gated import Gated
from mimicut.recovery.layers import Layer, affine_of, channels_last, columns, geometry
from mimicut.recovery.lockstep import Seen

# Positions of all views that a layer is solved from. Source: measured, 4 times as many change nothing.
ROWS, LEAST_POSITIONS = 12_500, 16
# Inputs of a layer above which there are two parts instead of the folds, of which one alone judges what is solved from
# the other, and two rounds for an activation. Source: assumption, for time.
LARGE = 600
# Rows that are added to a layer's moments at once. Source: assumption, for time.
ROWS_AT_ONCE = 2048
_BLOCK = 512  # Columns of X'X that are computed at once, since half of it mirrors the other. Source: measured.
_LEAST_SCALE = 1e-3  # Outputs that are scaled by less on their way can make up for nothing. Source: assumption.


@dataclass
class Moments:
    """The moments of a layer.

    gram: X'X of each part (p, g, D, D). cross: X'R of each part (p, g, D, m). residual: squared sum of R of each part
    (p,); target: of Y (p,). rows: how many rows each part has (p,). prior: W (g, m, D). constant: whether the last
    input is 1. inputs: D without it. gated: the rows themselves, where an activation follows. All in float64.
    """

    gram: Tensor
    cross: Tensor
    residual: Tensor
    target: Tensor
    rows: Tensor
    prior: Tensor
    constant: bool
    inputs: int
    gated: Gated | None
    sums: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def add_up(self, ranks: Ranks) -> None:
        """Over the batches of all processes, in place."""
        for each in (self.gram, self.cross, self.residual, self.target, self.rows):
            ranks.add_up([each])
        if self.gated is not None:
            self.gated.collect(ranks, len(self.rows))

    def gram_of(self, parts: Sequence[int]) -> Tensor:
        """X'X over these parts (g, D, D)."""
        at = tuple(parts)
        if len(at) == 1:
            return self.gram[at[0]]
        if at not in self.sums:
            self.sums[at] = self.gram[list(at)].sum(0) if len(at) < len(self.gram) else self.gram.sum(0)
        return self.sums[at]

    def cross_of(self, parts: Sequence[int]) -> Tensor:
        """X'R over these parts (g, D, m)."""
        return self.cross[parts[0]] if len(parts) == 1 else self.cross[list(parts)].sum(0)


@dataclass(frozen=True)
class CutTensors:
    """Tensors of the teacher and the student by name, and what the student keeps of each: name -> axis -> indices."""

    teacher: Mapping[str, Tensor]
    student: Mapping[str, Tensor]
    slices: Mapping[str, Mapping[int, list[int]]]


@dataclass(frozen=True)
class Sampling:
    """Which rows a layer is solved from.

    fold_of: the fold of each batch. folds: how many there are. rows: how many rows of all views are taken. most_kept:
    how many inputs of rows may be kept for a layer that an activation follows. draws: random positions. ranks: the
    processes whose batches count too; None: this one is alone.
    """

    fold_of: Sequence[int]
    folds: int
    rows: int
    most_kept: int
    draws: torch.Generator
    ranks: Ranks | None = None


def collect_moments(
    layer: Layer, wanted: Sequence[Seen], found: Sequence[Seen], tensors: CutTensors, sampling: Sampling
) -> Moments:
    """Collect the moments of a layer.

    Args:
        layer: The layer.
        wanted: What each batch sees at the teacher's layer, after it.
        found: What each batch sees at the student's layer, before it.
        tensors: Of both networks.
        sampling: Which rows to take. The first of its batches are those of `wanted` and `found`.
    """
    rows = _Rows(layer, tensors, sampling, found)
    sums = _Sums(rows, sampling.folds)
    for fold, theirs, ours in zip(sampling.fold_of[: len(found)], wanted, found, strict=True):
        sums.add(fold % sums.parts, *rows.read(theirs, ours))
    moments = sums.finish()
    if sampling.ranks is not None:
        moments.add_up(sampling.ranks)
    return moments


class _Rows:
    """Reads rows from what the teacher's and the student's layer see."""

    def __init__(self, layer: Layer, tensors: CutTensors, sampling: Sampling, found: Sequence[Seen]):
        weight = tensors.student[layer.weight]
        # float32 or float64, for rows; sums over rows are in float64.
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._layer = layer
        self._geometry = geometry(found[0], weight)
        self._spatial = len(self._geometry.kernel)
        self.constant = layer.constant is not None
        self.prior = weight.detach().double().flatten(1).unflatten(0, (self._geometry.groups, -1))  # (g, m, D)
        self.prior_transposed = self.prior.mT.to(self._dtype)  # (g, D, m)
        kept = tensors.slices.get(layer.weight, {}).get(0)
        self._kept = None if kept is None else torch.tensor(kept, device=weight.device)
        self._read_affine(tensors.teacher, weight)
        bias = None if layer.bias is None else tensors.student[layer.bias].detach().to(self._dtype)
        self._bias = None if bias is None else bias.unflatten(0, (self._geometry.groups, -1))[:, None]
        views = sum(len(seen.input) for seen in found)
        if sampling.ranks is not None:
            of_all = torch.tensor([views], device=weight.device)
            sampling.ranks.add_up([of_all])
            views = int(of_all)
        each = max(LEAST_POSITIONS, -(-sampling.rows // views))
        if layer.gate is not None:
            each = max(1, min(each, sampling.most_kept // (self.prior[:, 0].numel() * views)))
        self._positions_each, self._draws = each, sampling.draws
        self._chosen: dict[int, Tensor] = {}

    def _read_affine(self, teacher: Mapping[str, Tensor], weight: Tensor) -> None:
        """The factor and offset of each output on its way to the addition or activation that follows."""
        layer = self._layer
        affine = affine_of(layer, dict(teacher)) if layer.shortcut or layer.gate else None
        self._scale: Any = None
        self._offset: Any = None
        self._inverse: Any = None
        self.gated: Gated | None = None
        if affine is None:
            return
        self._scale, self._offset = (each.to(weight.device, self._dtype) for each in affine)
        self._inverse = torch.where(self._scale.abs() > _LEAST_SCALE, 1 / self._scale, 0.0)
        if layer.gate is not None:
            scale = torch.where(self._inverse == 0, 0.0, self._scale)
            self.gated = Gated(layer.gate, self._grouped(scale[None]), self._grouped(self._inverse[None]))

    def read(self, theirs: Seen, ours: Seen) -> tuple[Tensor, Tensor, Tensor | None]:
        """The student's inputs (g, n, D), the outputs that it should give (g, n, m), and what the activation that
        follows would then be given (g, n, m), None where none does."""
        size = tuple(theirs.output.shape[2:]) if self._spatial else ()
        x = columns(ours.input, self._geometry, self._positions, size).to(self._dtype)
        y = self._sampled(theirs.output)
        activated: Any = None if self.gated is None else self._scale * y + self._offset
        if self._layer.shortcut is not None and self._scale is not None:
            error = shortcut_error(self._layer, theirs, ours, self._sampled, self._kept)
            if error is not None:
                y = y + error * self._inverse
            if error is None:
                self.gated = activated = None
            elif self.gated is not None:
                activated = activated + self._sampled(theirs.held[self._layer.shortcut])
        y = self._grouped(y)
        if self._bias is not None:
            y = y - self._bias
        x = x.flatten(0, 1).transpose(0, 1)
        return x, y, None if activated is None else self._grouped(activated)

    def _positions(self, total: int) -> Tensor:
        """The same random positions for all tensors with this number of positions."""
        if total not in self._chosen:
            self._chosen[total] = torch.randperm(total, generator=self._draws)[: self._positions_each]
        return self._chosen[total]

    def _sampled(self, value: Tensor) -> Tensor:
        """A feature map at the chosen positions, (views, positions, channels)."""
        value = channels_last(value, self._spatial)
        return value[:, self._positions(value.shape[1]).to(value.device)].to(self._dtype)

    def _grouped(self, value: Tensor) -> Tensor:
        """(..., channels) -> (g, n, m), without the channels that the student does not have."""
        value = value if self._kept is None else value[..., self._kept]
        return value.flatten(0, -2).unflatten(1, (self._geometry.groups, -1)).transpose(0, 1)


class _Sums:
    """Adds rows to the moments, many at once: each addition costs as much as the moments are large."""

    def __init__(self, rows: _Rows, folds: int):
        groups, outputs, inputs = rows.prior.shape
        self.parts = folds if inputs <= LARGE else min(2, folds)
        size = inputs + rows.constant
        self._rows = rows
        self._gram = rows.prior.new_zeros(self.parts, groups, size, size)
        self._cross = rows.prior.new_zeros(self.parts, groups, size, outputs)
        self._residual, self._target, self._row_counts = (rows.prior.new_zeros(self.parts) for _ in range(3))
        self._waiting: dict[int, list[tuple[Tensor, Tensor, Any]]] = {}  # arguments of `add`

    def add(self, part: int, x: Tensor, y: Tensor, activated: Tensor | None) -> None:
        self._waiting.setdefault(part, []).append((x, y, activated))
        if sum(x.shape[1] for x, *_ in self._waiting[part]) >= ROWS_AT_ONCE:
            self._add_waiting(part)

    def _add_waiting(self, part: int) -> None:
        waiting = self._waiting.pop(part)
        x, y = (torch.cat([each[at] for each in waiting], 1) for at in (0, 1))
        residual = y - x @ self._rows.prior_transposed
        if self._rows.constant:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        _add_square(self._gram[part], x)
        self._cross[part] += x.mT @ residual
        self._residual[part] += residual.square().sum((0, 1)).double().sum()
        self._target[part] += y.square().sum((0, 1)).double().sum()
        self._row_counts[part] += x.shape[1]
        if self._rows.gated is not None:
            self._rows.gated.add(part, x, residual, torch.cat([activated for *_, activated in waiting], 1))

    def finish(self) -> Moments:
        for part in list(self._waiting):
            self._add_waiting(part)
        gram, prior = self._gram, self._rows.prior
        for start in range(_BLOCK, gram.shape[-1], _BLOCK):  # the half that `_add_square` leaves out
            gram[..., start:, start - _BLOCK : start] = gram[..., start - _BLOCK : start, start:].mT
        inputs = prior.shape[2]
        if self._rows.constant:
            prior = torch.cat([prior, prior.new_zeros(*prior.shape[:2], 1)], 2)
        return Moments(
            gram, self._cross, self._residual, self._target, self._row_counts, prior, self._rows.constant, inputs,
            self._rows.gated,
        )  # fmt: skip


def _add_square(gram: Tensor, x: Tensor) -> None:
    """Add X'X to gram (g, D, D), of large ones only the blocks on and above the diagonal. x: (g, n, D)."""
    size = x.shape[2]
    if size <= _BLOCK:
        gram += x.mT @ x
        return
    for start in range(0, size, _BLOCK):
        gram[:, start : start + _BLOCK, start:] += x[:, :, start : start + _BLOCK].mT @ x[:, :, start:]


def shortcut_error(
    layer: Layer, theirs: Seen, ours: Seen, sampled: Callable[[Tensor], Tensor], kept: Tensor | None
) -> Tensor | None:
    """The teacher's shortcut minus the student's, (views, positions, channels); None where they cannot be compared.

    Args:
        layer: The last layer of the branch that is added to the shortcut.
        theirs: What the teacher's layer sees, with the shortcut in `held`.
        ours: What the student's layer sees, with the shortcut in `held`.
        sampled: Takes the chosen positions of a tensor.
        kept: The channels that the student keeps; None where it keeps all.
    """
    assert layer.shortcut is not None
    teacher, student = theirs.held.get(layer.shortcut), ours.held.get(layer.shortcut)
    if teacher is None or student is None or teacher.shape != theirs.output.shape:
        return None
    error, student = sampled(teacher), sampled(student)
    if student.shape == error.shape:
        return error - student
    if kept is None or student.shape[-1] != len(kept):
        return None
    error[..., kept] -= student
    return error
