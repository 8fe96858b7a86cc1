"""Where in an image the features of both networks are strong: a few maps to look at, no figure."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SHOWN = 4  # images. Source: assumption: as many as a person compares.
_SIDE = 32  # places along a side; larger maps are averaged. Source: assumption: more is not seen in a small picture.


def feature_maps(theirs: Tensor, ours: Tensor, first: int) -> list[dict[str, Any]]:
    """The strength of both networks' features at each place, for every image of a batch.

    Strength is the norm over channels. Both maps of an image have one scale: 1 is the strongest place of either.

    Args:
        theirs, ours: Features (N, C, H, W) of teacher and student; (N, H, W, C) where only that gives a square map.
        first: The number of the first image.

    Returns:
        For each image its number ("image"), and rows of values from 0 to 1 ("teacher", "student"); nothing if the
        features have no places: another number of axes, or one place.

    >>> feature_maps(torch.ones(1, 2, 1, 2), torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]]), first=5)
    [{'image': 5, 'teacher': [[0.71, 0.71]], 'student': [[1.0, 0.0]]}]
    >>> feature_maps(torch.ones(1, 9, 8), torch.ones(1, 9, 8), first=0)
    []
    """
    if theirs.ndim != 4:
        return []
    channels = 3 if theirs.shape[1] == theirs.shape[2] != theirs.shape[3] else 1
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
