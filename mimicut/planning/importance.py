"""Scores of the units of a group; larger scores are kept. Add a function to SCORES for another score."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mimicut.anatomy.graph import Anatomy, Group
from mimicut.anatomy.tracing import shape


@dataclass(frozen=True)
class Evidence:
    """Evidence from the images for the groups that linear layers read.

    Attributes:
        scores: Group -> (width,); units with larger scores are kept.
        errors: Group -> (width + 1,): squared error at the seam over the teacher's squared deviation, predicted for
            each number of its best units kept; infinite for none.
    """

    scores: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


Score = Callable[[Group, dict[str, torch.Tensor], Anatomy, int], np.ndarray]


def l1(group: Group, tensors: dict[str, torch.Tensor], anatomy: Anatomy, seed: int = 0) -> np.ndarray:
    """L1 norm of each unit's filters, (width,) float64.

    Where several weights make the same channels (a residual stream), each counts relative to its own mean. Depthwise
    weights count only where no dense weight makes the channels; gates (squeeze-excite) do not count, since they scale
    whole maps and make none.
    Source: MiR prunes by the L1 norm of the filters of each block's first convolution (arXiv 2201.02620).
    """
    return _filters(group, tensors, 1)


def l2(group: Group, tensors: dict[str, torch.Tensor], anatomy: Anatomy, seed: int = 0) -> np.ndarray:
    """L2 norm of each unit's filters, (width,) float64; several weights as in `l1`."""
    return _filters(group, tensors, 2)


def bn(group: Group, tensors: dict[str, torch.Tensor], anatomy: Anatomy, seed: int = 0) -> np.ndarray:
    """Magnitude of the batch norms' scales, (width,) float64; a group without any falls back to `l1`.

    Source: Network Slimming (arXiv 1708.06519).
    """
    scores = [
        _per_unit(m.units, tensors[m.tensor].detach().double().abs().cpu().numpy(), group.width)
        for m in group.members
        if m.tensor in anatomy.scales
    ]
    return np.sum(scores, axis=0) if scores else _filters(group, tensors, 1)


def random(group: Group, tensors: dict[str, torch.Tensor], anatomy: Anatomy, seed: int = 0) -> np.ndarray:
    """Random scores, (width,), the same for one seed and group name."""
    return np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.width)


SCORES: dict[str, Score] = {"l1": l1, "l2": l2, "bn": bn, "random": random}


def _filters(group: Group, tensors: dict[str, torch.Tensor], power: int) -> np.ndarray:
    producers = [p for p in group.producers if p.dense] or list(group.producers)
    sizes = [math.prod(shape(p.node) or ()) for p in producers]
    largest = max(sizes)
    producers = [p for p, size in zip(producers, sizes, strict=True) if size == largest]
    producers = list({p.tensor: p for p in producers}.values())  # a shared layer counts once
    total = np.zeros(group.width)
    for producer in producers:
        rows = tensors[producer.tensor].detach().double().movedim(producer.dim, 0).flatten(1)
        norms = torch.linalg.vector_norm(rows, power, dim=1).cpu().numpy()
        scores = _per_unit(producer.units, norms, group.width)
        total += scores / max(scores.mean(), 1e-300) if len(producers) > 1 else scores
    return total


def _per_unit(units: np.ndarray, values: np.ndarray, width: int) -> np.ndarray:
    return np.bincount(units[units >= 0], weights=values[units >= 0], minlength=width)
