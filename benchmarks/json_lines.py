"""JSON lines of the commands that are not sweeps of cells: read, and written one by one so that a command can go on."""

import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, line: dict[str, Any]) -> None:
    """To the file, and to stderr."""
    text = json.dumps(line)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, file=sys.stderr, flush=True)


def machine(lines: list[dict[str, Any]]) -> str:
    """Where the lines were measured, in words, by the first that says it."""
    line = next(x for x in lines if "platform" in x)
    return f"{line['platform']['cores']} cores of an {line['platform']['processor']}, torch {line['versions']['torch']}"
