"""The file that a stopped run leaves beside its result folder, to be resumed: its checkpoint, as safetensors."""

import json
import os
import secrets
from pathlib import Path

from mimicut.base.errors import StoreError, one_line
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
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, fresh, metadata={_METADATA_KEY: json.dumps(checkpoint.data)})
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"saving {path}: {error}; nothing was changed there") from error
    finally:
        fresh.unlink(missing_ok=True)
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
    stopped_path(folder).unlink(missing_ok=True)
