"""The file that a stopped run leaves beside its result folder, to be resumed: its checkpoint, as safetensors."""

import json
from pathlib import Path

from mimicut.base.disk import make_folder, remove, write_by
from mimicut.base.errors import StoreError, one_line
from mimicut.base.scratch import replace_file
from mimicut.recovery.checkpoint import Checkpoint

_METADATA_KEY = "stopped"
_DATA_KEYS = ("asked", "plan", "saved", "before", "losses", "steps")


def stopped_path(folder: str | Path) -> Path:
    """Where the checkpoint of a stopped run lies: beside the folder of its result."""
    path = Path(folder).resolve()
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
    from safetensors import SafetensorError, safe_open

    path = stopped_path(folder)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            data = json.loads((file.metadata() or {})[_METADATA_KEY])
            for key in _DATA_KEYS:
                data[key]
            return Checkpoint({name: file.get_tensor(name) for name in file.keys()}, data)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"resuming {path}: {one_line(error)}; it is not the file of a stopped run: remove it and start again"
        ) from error


def remove_stopped(folder: str | Path) -> None:
    """Remove the checkpoint of a stopped run, if there is one."""
    remove(stopped_path(folder))
