"""The order of pixels in memory: channel after channel ("contiguous"), or all channels of a pixel together.

Convolutions on a CPU are mostly faster with the second, "channels_last". A convolution passes the layout of its input
on, so that the layout of the images alone decides. Most networks work with both. Code that views its tensors in another
shape (`x.view(n, -1)`) fails, so the layout is tried first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LAST = "channels_last"
LAYOUTS = {"contiguous": torch.contiguous_format, LAST: torch.channels_last}
# Results in both layouts may differ by this share of the largest value. Source: assumption; rounding is 1e-6 to 1e-5.
_MOST_APART = 1e-3
# The backward pass of torch 2.15 writes outside its memory in a strided 1x1 convolution with channels last and fewer
# inputs than a vector register holds: 16 with AVX-512, 8 with AVX2. Source: measured (`python -m
# benchmarks.studies.strided_backward`). 16 for all, as torch may report less (ATEN_CPU_CAPABILITY) than it uses.
_FEWEST_INPUTS = 16


def laid(value: Any, layout: str) -> Any:
    """`value` with its floating-point tensors of four axes in `layout`, also inside tuples and dicts."""
    if isinstance(value, dict):
        return {key: laid(each, layout) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(laid(each, layout) for each in value)
    if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.contiguous(memory_format=LAYOUTS[layout])
    return value


def takes_channels_last(run: Callable[[str], Sequence[Tensor]]) -> bool:
    """Whether a network runs on images with channels last and gives the same outputs.

    Args:
        run: Runs the network on the CPU on images in the layout that it is given, and returns the output tensors.
    """
    with torch.no_grad():
        plain = [each.clone() for each in run("contiguous")]
        try:
            found = run("channels_last")
        except RuntimeError:  # code that views its tensors in another shape
            return False
        pairs = zip(found, plain, strict=True)
        return all(a.shape == b.shape and _near(a, b) for a, b in pairs)


def _near(found: Tensor, wanted: Tensor) -> bool:
    return not found.numel() or bool((found - wanted).abs().max() <= _MOST_APART * wanted.abs().max())


def learns_channels_last(*models: nn.Module) -> bool:
    """Whether a backward pass with channels last is safe for these networks."""
    return not any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < _FEWEST_INPUTS
        for model in models
        for m in model.modules()
    )


def layout_for(model: nn.Module, batch: tuple[tuple, dict[str, Any]]) -> str:
    """The layout in which a network of convolutions on a CPU trains faster.

    The kind of network decides and not a clock, because one seed must give one student. One image of `batch`, (args,
    kwargs), is run through the network in its current mode, to find code that cannot use channels last.

    Source: measured, ResNet-50 and EfficientNet-Lite0 take 0.75 to 0.85 of the time on AVX-512.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or convolutions[0].weight.device.type != "cpu" or not learns_channels_last(model):
        return "contiguous"
    whole = next((len(t) for t in (*batch[0], *batch[1].values()) if isinstance(t, Tensor) and t.ndim), 0)

    def one(value: Any) -> Any:  # of its own: the network may write into it
        return value[:1].clone() if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    args, kwargs = laid((tuple(map(one, batch[0])), {key: one(value) for key, value in batch[1].items()}), LAST)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except RuntimeError:  # code that views its tensors in another shape
        return "contiguous"
    return LAST
