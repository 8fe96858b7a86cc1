"""The weights of a result: every tensor of a network in one safetensors file, tensors that share memory once."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from mimicut.base.disk import write_by
from mimicut.base.errors import StoreError, one_line
from mimicut.base.guard import named_tensors
from mimicut.base.schema import faults, read_plain
from mimicut.results.files import sha256

# Keys under which the file describes itself; the second one until release 0.1, when the project had another name.
_METADATA_KEYS = ("mimicut", "understudy")


class _Description(TypedDict, total=False):
    shared: dict[str, str]  # further name of a tensor -> the name under which it is stored


def write_weights(path: Path, model: nn.Module) -> None:
    """Write every parameter and buffer of `model`, also buffers that a state dict leaves out.

    Raises:
        StoreError: The model holds something that is no plain tensor, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    states = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if states:
        raise StoreError(
            f"saving {path.name}: {states[0]!r} is not a tensor; only tensors can be stored without pickle"
        )
    tensors, shared = _distinct_tensors(model, path)
    try:
        # One entry: the order of several is not fixed, and the same model should give the same bytes.
        metadata = {_METADATA_KEYS[0]: json.dumps({"shared": shared}, sort_keys=True)}
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_by(path, lambda to: save_file(tensors, to, metadata=metadata), size)
    except SafetensorError as error:
        raise StoreError(f"saving {path.name}: {error}") from error


def _distinct_tensors(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, each once, and for every further name of a tensor the name under which it is stored."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[int, torch.dtype, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in named_tensors(model).items():
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise StoreError(
                f"saving {path.name}: {name!r} is on {tensor.device} as {tensor.layout}; expected plain data"
            )
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, shared


def read_weights(path: Path, expected_sha256: str | None) -> dict[str, Tensor]:
    """The tensors by all of their names; names that share a tensor share it here too.

    Args:
        path: A file that `write_weights` wrote.
        expected_sha256: The digest that the report has of it.

    Raises:
        StoreError: The content is not what was saved, or no safetensors file.
    """
    from safetensors import safe_open

    try:
        digest = sha256(path)
    except OSError as error:
        raise StoreError(f"reading {path}: {error}; expected the safetensors file of a result") from error
    if digest != expected_sha256:
        raise StoreError(f"reading {path}: its content is not what was saved; copy the folder again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = read_plain(next((metadata[key] for key in _METADATA_KEYS if key in metadata), "{}"))
    except Exception as error:  # a damaged file raises many kinds
        raise StoreError(f"reading {path}: {one_line(error)}; expected the safetensors file of a result") from error
    wrong = faults(description, _Description)
    if wrong:
        raise StoreError(f"reading {path}: its metadata: {'; '.join(wrong)}; copy the folder again")
    aliases = description.get("shared", {})
    return tensors | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}
