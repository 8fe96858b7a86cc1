"""The names of the files in a result folder, and JSON files that are read and written with plain messages."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mimicut.base.disk import write
from mimicut.base.errors import StoreError
from mimicut.base.schema import read_plain

PLAN, WEIGHTS, REPORT = FILES = ("plan.json", "weights.safetensors", "report.json")
PAGES = ("report.html", "README.md")
RUN = "run.toml"  # the options that make the result again
# Files that may lie beside those of a result, and are replaced with them.
BESIDE = (*PAGES, RUN, "model.pt2", "model.onnx", "model.onnx.data", "model.xml", "model.bin", "model.int8.onnx",
          "model.int8.onnx.data", "model.tflite", "model.pte", "model.mlpackage.zip", "model.engine",
          "preprocessing.json")  # fmt: skip
PLAN_DIGEST = "plan_sha256"  # key under STORED; results of release 0.1 have none
STORED = "stored"  # key of report.json: what belongs to the folder and not to the report
VERSION = 1  # of the folder; kept under STORED. Results of release 0.1 have none, which counts as 1.


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a result.

    Raises:
        StoreError: The file cannot be read, or holds something else.
    """
    try:
        data = read_plain(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"reading {path}: {error}; expected the {path.name} of a result") from error
    if not isinstance(data, dict):
        raise StoreError(f"reading {path}: found a {type(data).__name__}, expected an object")
    return data


def write_json(path: Path, data: dict[str, Any], text: str | None = None) -> None:
    """Write `data` to `path` and wait until the disk has it.

    Args:
        path: The file; an existing one is overwritten.
        data: Plain data with finite numbers.
        text: The same data as JSON text, where its owner lays it out.

    Raises:
        StoreError: `data` cannot be written as JSON.
    """
    try:
        plain = json.dumps(data, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StoreError(f"saving {path.name}: {error}; expected plain data with finite numbers") from error
    write(path, text or plain)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
