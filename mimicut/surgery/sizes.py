"""Which numbers of a network a plan may change: those that count channels, heads or groups of them.

How a layer moves over an image (stride, padding, dilation, kernel) belongs to the architecture, which a plan cannot
change. The anatomy looks for sizes among the same numbers.
"""

import re
from typing import Any

from torch import nn

HOW = re.compile(r"(through|zero)(:[1-9]\d?)?")  # what takes the place of a dropped module, and in a tuple of how many
GEOMETRIC = frozenset(
    "kernel_size stride padding dilation output_padding output_size scale_factor upscale_factor downscale_factor "
    "ceil_mode num_layers".split()
)  # attributes, in whichever class
# Functions of torch that take no number of channels; a convolution takes one, its groups.
_MOVING = re.compile(
    r"(lp|avg|max|adaptive|fractional)_.*pool.*|.*interpolate.*|.*upsample.*|pad|unfold|fold|col2im|im2col"
)
CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
# What torch's own layers hold and count channels, heads or groups by.
_COUNTS = frozenset(
    "in_channels out_channels groups num_features num_groups num_channels normalized_shape input_size hidden_size "
    "proj_size in_features out_features in1_features in2_features num_parameters embedding_dim unflattened_size "
    "embed_dim kdim vdim num_heads head_dim".split()
)


def may_be_size(module: nn.Module, attribute: str) -> bool:
    """Whether a number that `module` holds in `attribute` may count channels.

    >>> may_be_size(nn.Conv2d(4, 4, 1), "groups"), may_be_size(nn.Conv2d(4, 4, 1), "stride")
    (True, False)
    """
    if attribute in _COUNTS:
        return True
    if attribute in GEOMETRIC or attribute.startswith("__"):
        return False
    torch_own = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    return not any(
        attribute in (*getattr(kind, "__constants__", ()), *vars(kind).get("__annotations__", ())) for kind in torch_own
    )


def may_correct(call: dict[str, Any]) -> bool:
    """Whether an entry of `Plan.calls` may give another number to its torch function. Which number of a convolution it
    is, is known when the network runs (`stand_ins`)."""
    if call["function"] in CONVOLUTIONS:
        return type(call["from"]) is int and type(call["to"]) is int and 0 < call["to"] < call["from"]
    return _MOVING.fullmatch(call["function"]) is None
