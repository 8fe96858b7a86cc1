"""The file that a stopped run leaves beside its result folder, to be resumed: its checkpoint, as safetensors."""

import json
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from mimicut.base.disk import make_folder, remove, write_by
from mimicut.base.errors import StoreError, one_line
from mimicut.base.paths import result_path
from mimicut.base.schema import faults, read_plain
from mimicut.base.scratch import replace_file
from mimicut.recovery.checkpoint import Checkpoint

_METADATA_KEY = "stopped"


class _Before(TypedDict):
    closed_form: dict[str, Any] | None
    errors: dict[str, float] | None
    norms_share: float | None


class _Data(TypedDict):
    """What a checkpoint holds besides tensors."""

    asked: dict[str, Any]
    plan: dict[str, Any]
    saved: str | None
    before: _Before
    losses: list[float]
    steps: int
    parts: NotRequired[int]
    judged: NotRequired[list[tuple[int, float]]]
    kept: NotRequired[int]


def stopped_path(folder: str | Path) -> Path:
    """Where the checkpoint of a stopped run lies: beside the folder of its result."""
    path = result_path(folder, "looking for a stopped run")
    return path.with_name(path.name + ".stopped.safetensors")


def write_stopped(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint of a run whose result goes to `folder`, and return the file.

    Raises:
        StoreError: It cannot be written; an older file is then whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = stopped_path(folder)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {_METADATA_KEY: json.dumps(checkpoint.data)}
    try:
        if not path.parent.exists():
            make_folder(path.parent)
        size = sum(tensor.nbytes for tensor in tensors.values())
        replace_file(path, lambda fresh: write_by(fresh, lambda to: save_file(tensors, to, metadata=metadata), size))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"saving {path}: {error}; nothing was changed there") from error
    return path


def read_stopped(folder: str | Path) -> Checkpoint | None:
    """Read the checkpoint of the stopped run; None if there is none.

    Raises:
        StoreError: The file cannot be read.
    """
    from safetensors import safe_open

    path = stopped_path(folder)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            data = read_plain((file.metadata() or {})[_METADATA_KEY], finite=False)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            wrong = "; ".join(faults(data, _Data))
    except Exception as error:  # a damaged file raises many kinds
        wrong = one_line(error)
    if wrong:
        raise StoreError(f"resuming {path}: {wrong}; it is not the file of a stopped run: remove it and start again")
    return Checkpoint(tensors, data)


def remove_stopped(folder: str | Path) -> None:
    """Remove the checkpoint of a stopped run, if there is one."""
    remove(stopped_path(folder))
