"""Where in an image the features of both networks are strong: a few maps to look at, no figure."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SHOWN = 4  # images. Source: assumption: as many as a person compares.
_SIDE = 32  # places along a side; larger maps are averaged. Source: assumption: more is not seen in a small picture.
# Tokens that stand before those of the image's patches: one for the class, and registers. Source: assumption; DINOv2
# with registers has five.
_MOST_OTHERS = 8


def feature_maps(theirs: Tensor, ours: Tensor, first: int, size_hw: tuple[int, int] | None) -> list[dict[str, Any]]:
    """The strength of both networks' features at each place, for every image of a batch.

    Strength is the norm over channels. Both maps of an image have one scale: 1 is the strongest place of either.

    Args:
        theirs, ours: Features (N, C, H, W) of teacher and student; (N, H, W, C) where only that gives a square map;
            (N, T, C) of tokens, the last of which are square patches of the image, row by row.
        first: The number of the first image.
        size_hw: Height and width of the images, by which tokens are known as patches.

    Returns:
        For each image its number ("image"), and rows of values from 0 to 1 ("teacher", "student"); nothing if the
        features have no places: another number of axes, or one place. Of (N, C, places) the channels are taken for
        tokens where they are as many as patches would be.

    >>> feature_maps(torch.ones(1, 2, 1, 2), torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]]), 5, None)
    [{'image': 5, 'teacher': [[0.71, 0.71]], 'student': [[1.0, 0.0]]}]
    >>> feature_maps(torch.ones(1, 3, 8), torch.ones(1, 3, 8), 0, (16, 32))  # a class, and two patches
    [{'image': 0, 'teacher': [[1.0, 1.0]], 'student': [[1.0, 1.0]]}]
    >>> feature_maps(torch.ones(1, 8), torch.ones(1, 8), 0, (16, 32))
    []
    """
    grid = _patches(theirs.shape[1], size_hw) if theirs.ndim == 3 and size_hw is not None else None
    if theirs.ndim != 4 and grid is None:
        return []
    if grid is not None:
        theirs, ours = (each[:, -grid[0] * grid[1] :].unflatten(1, grid) for each in (theirs, ours))
    channels = 3 if grid is not None or theirs.shape[1] == theirs.shape[2] != theirs.shape[3] else 1
    maps = torch.stack([torch.linalg.vector_norm(each.double(), dim=channels) for each in (theirs, ours)], 1)
    if maps[0, 0].numel() < 2:
        return []
    height, width = (min(side, _SIDE) for side in maps.shape[2:])
    maps = adaptive_avg_pool2d(maps, (height, width))
    maps = maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    rows = [[[round(value, 2) for value in row] for row in each] for pair in maps.tolist() for each in pair]
    return [
        {"image": first + i, "teacher": teacher, "student": student}
        for i, (teacher, student) in enumerate(zip(rows[::2], rows[1::2], strict=True))
    ]


def _patches(tokens: int, size_hw: tuple[int, int]) -> tuple[int, int] | None:
    """How many square patches lie below and beside each other, if so many tokens are those of an image and few others.

    >>> _patches(197, (224, 224)), _patches(577, (384, 384)), _patches(50, (224, 224)), _patches(64, (224, 224))
    ((14, 14), (24, 24), (7, 7), (8, 8))
    >>> _patches(10, (7, 5)), _patches(1, (224, 224))
    (None, None)
    """
    height, width = size_hw
    sides = (side for side in range(1, min(size_hw) + 1) if height % side == width % side == 0)
    grids = ((height // side, width // side) for side in sides)
    return next((g for g in grids if 1 < g[0] * g[1] <= tokens <= g[0] * g[1] + _MOST_OTHERS), None)
