"""Operators over space: pooling, resizing, padding, sampling at a grid, Fourier transforms, windows, pixel shuffles."""

from typing import Any

import numpy as np
from torch.fx import Node

from mimicut.anatomy.channels import Axes
from mimicut.anatomy.operators.rule_interface import Reader, Rule, argument, why
from mimicut.anatomy.tracing import operator, shape


def pool(reader: Reader, node: Node) -> Any:
    """Pooling, resizing and padding by what is there: over the last one, two or three axes, each channel alone."""
    axes, name = list(reader.axes(node.args[0])), operator(node)
    count = 3 if "3d" in name or "trilinear" in name else 1 if "1d" in name else 2
    for axis in range(len(axes) - count, len(axes)):
        reader.channels.pin(axes[axis], why(reader, node, "pooled, resized or padded along its channels"))
        axes[axis] = None
    values = node.meta["val"]
    return [axes] * len(values) if isinstance(values, (tuple, list)) else axes


def pad(reader: Reader, node: Node) -> Axes:
    """Amounts before and after, for the last axis first."""
    axes, amounts = list(reader.axes(node.args[0])), node.args[1]
    for i in range(len(amounts) // 2):
        if amounts[2 * i] or amounts[2 * i + 1]:
            axis = len(axes) - 1 - i
            reader.channels.pin(axes[axis], why(reader, node, "padded along its channels"))
            axes[axis] = None
    return axes


def grid_sampler(reader: Reader, node: Node) -> Axes:
    """(N, C, H, W) or (N, C, D, H, W) looked up at the places of a grid, the same for every channel."""
    axes, grid = reader.axes(node.args[0]), reader.axes(node.args[1])
    for ids in (axes[0], *axes[2:], *grid):
        reader.channels.pin(ids, why(reader, node, "sampled along its channels"))
    return [None, axes[1], *([None] * (len(axes) - 2))]


def fourier(reader: Reader, node: Node) -> Axes:
    """fft, rfft2, irfftn...: what stands on the transformed axes is mixed, and often of another length."""
    axes, name = list(reader.axes(node.args[0])), operator(node)
    whole = None if name.endswith("n") else [-2, -1] if name.endswith("2") else [-1]
    dims = argument(node, 2, "dim", whole)
    for dim in range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims:
        reader.channels.pin(axes[dim], why(reader, node, "transformed along its channels"))
        axes[dim] = None
    return axes


def windows(reader: Reader, node: Node) -> Axes:
    """Tensor.unfold: windows along one axis, their inside as a new last axis."""
    axes = list(reader.axes(node.args[0]))
    dim = node.args[1] % len(axes)
    reader.channels.pin(axes[dim], why(reader, node, "unfolded along its channels"))
    axes[dim] = None
    return [*axes, None]


def pixel_shuffle(reader: Reader, node: Node) -> Axes:
    """(..., C x r x r, H, W) to (..., C, H x r, W x r): the channels that make one go together."""
    axes = list(reader.axes(node.args[0]))
    if axes[-3] is not None:
        axes[-3] = reader.channels.join_rows(axes[-3].reshape(shape(node)[-3], -1))
    return axes


def pixel_unshuffle(reader: Reader, node: Node) -> Axes:
    """(..., C, H x r, W x r) to (..., C x r x r, H, W): each channel stands there r x r times in a row."""
    axes = list(reader.axes(node.args[0]))
    if axes[-3] is not None:
        axes[-3] = np.repeat(axes[-3], node.args[1] ** 2)
    return axes


_POOLS = """_adaptive_avg_pool2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool2d max_pool1d
    max_pool2d max_pool2d_with_indices max_pool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d""".split()
_FOURIER = [f"fft_{inverse}{real}fft{axes}" for inverse in ("", "i") for real in ("", "r") for axes in ("", "2", "n")]

RULES: dict[str, Rule] = {
    **dict.fromkeys(_POOLS, pool),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
    **dict.fromkeys(_FOURIER, fourier),
    "unfold": windows,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
}
