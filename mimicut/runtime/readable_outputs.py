"""Outputs that only the model's own code can read, as a dict of tensors that every process can read."""

from typing import Any

from torch import Tensor, nn

from mimicut.surgery.seam import tensors


class ReadableOutputs(nn.Module):
    """`model` with outputs that every process can read: a dict of tensors under their names (in a tuple, their places).

    A dataclass, a namedtuple or transformers' ModelOutput can only be read where its class is known, and no
    format can write what is no tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return dict(tensors(self.model(*args, **kwargs)))


def model_name(model: nn.Module) -> str:
    """The name of the model's class, also of one inside `ReadableOutputs`."""
    return type(model.model if isinstance(model, ReadableOutputs) else model).__name__


def is_readable(value: Any) -> bool:
    """Whether every process can read these outputs: tensors in plain tuples, lists and dicts."""
    if type(value) in (dict, tuple, list):
        return all(map(is_readable, value.values() if type(value) is dict else value))
    return value is None or isinstance(value, Tensor)
