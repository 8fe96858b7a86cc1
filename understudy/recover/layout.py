"""The memory layout in which a network's convolutions are quick: of the images, the rest follows from them."""

from typing import Any

import torch
from torch import Tensor, nn

from understudy.recover.batches import Batch, copied


def layout_for(model: nn.Module, batch: Batch) -> torch.memory_format:
    """Channels last for networks of convolutions on a CPU, where they run so; contiguous for all else.

    By the kind of network and not by a clock: one seed must give one student. batch: one is run through `model`, in the
    mode that it is in, for code that cannot (`view` of a feature map). Source: measured, ResNet-50 and
    EfficientNet-Lite0 take 0.75 to 0.85 of the time forwards and backwards on AVX-512 (docs/LOG.md).
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or convolutions[0].weight.device.type != "cpu" or any(map(_unsafe, convolutions)):
        return torch.contiguous_format
    try:
        with torch.no_grad():
            args, kwargs = laid_out(_first(copied(batch)), torch.channels_last)
            model(*args, **kwargs)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def _unsafe(conv: nn.Conv2d) -> bool:
    """On processors with AVX2 and no AVX-512, torch 2.15's backward pass of these writes outside its memory when they
    lie channels last (glibc's MALLOC_CHECK_=3 shows it; measured)."""
    return conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < 8


def laid_out(batch: Batch, layout: torch.memory_format) -> Batch:
    """`batch` with its images, (n, C, H, W) floats, in that layout."""
    args, kwargs = batch

    def put(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return value.contiguous(memory_format=layout)
        return value

    return tuple(map(put, args)), {key: put(value) for key, value in kwargs.items()}


def _first(batch: Batch) -> Batch:
    """One image of a batch. What else has as many entries is cut alike."""
    args, kwargs = batch
    whole = next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), 0)

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}
