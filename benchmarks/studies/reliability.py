"""docs/reliability.md from what `make attack` counted: python -m benchmarks.studies.reliability"""

import json
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).parents[1] / "results" / "attacks.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
# How the names of attacks begin -> words for them, what must hold, and how many the project wants.
_KINDS = {
    "kills": (
        "kill -9 before each change of a file, or inside a write (exports: of files with other content)",
        "the folder is old, new or absent; the rerun gives the same bytes without --force",
        500,
    ),
    "SIGINT while it imports": ("SIGINT while it starts and imports", "exit code 130, and nothing is left", 50),
    "SIGTERM while it imports": ("SIGTERM while it starts and imports", "exit code 130, and nothing is left", 50),
    "SIGINT while it works": ("SIGINT while it works", "exit code 130, and resumed to the same bits", 50),
    "SIGTERM while it works": ("SIGTERM while it works", "exit code 130, and resumed to the same bits", 50),
    "disk that refuses": ("a disk that refuses", "the old result or none, said in plain words", 0),
    "file systems of small sizes": ("file systems of small sizes", "saved, or refused in plain words", 0),
    "read-only file system": ("a read-only file system", "refused in plain words", 0),
    "races of three writers": (
        "races of three writers", "one result is in place, and every other is refused or kept beside", 0,
    ),
    "clocks that jump": ("clocks that jump", "the same bytes", 0),
    "injected exceptions": ("injected exceptions", "the teacher is as before, to the bit", 300),
    "changes of a result": (
        "changes of plan, report and weights header", "refused in plain words, or the same outputs", 10_000,
    ),
    "hostile images": (
        "hostile images and arrays", "read or refused in plain words, under 2 s and 500 MB", 1_000,
    ),
}  # fmt: skip


def survived(counts: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Kind of attack -> how many were survived. Those of a test that failed were not counted."""
    found = dict.fromkeys(_KINDS, 0)
    for name, entry in counts.items():
        kind = next((kind for kind in _KINDS if name.startswith(kind)), None)
        if kind is not None:
            found[kind] += entry["attacks"]
    return found


def text(counts: dict[str, dict[str, Any]]) -> str:
    """The page."""
    rows = []
    for kind, number in survived(counts).items():
        words, must, wanted = _KINDS[kind]
        floor = f"{wanted:,}" if wanted else ""
        rows.append(f"| {words} | {must} | {number:,} | {floor}{'' if number >= wanted else ': open'} |")
    run, images = counts.get("whole run"), counts.get("hostile images")
    lines = [
        "# What was survived", "",
        "Made by `python -m benchmarks.studies.reliability` from `benchmarks/results/attacks.json`, which",
        "`make attack` writes; do not edit by hand. `ATTACKS=0.1 make attack` tries a tenth and counts nothing. A",
        "sample of most kinds is part of `make test`. Counted is what was survived: the attacks of a test that fails",
        "are not in the table.", "",
        "| attack | what must hold | survived | wanted |", "|---|---|--:|--:|", *rows, "",
    ]  # fmt: skip
    if images is not None:
        lines += [
            f"Of the hostile images the slowest took {images['most_seconds']:g} s of processor time, and memory grew "
            f"by {images['grown_mb']} MB over all of them.", "",
        ]  # fmt: skip
    if run is not None:
        lines += [f"The last whole run: {run['tests']} tests in {run['minutes']:g} minutes, {run['where']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(text(json.loads(COUNTS.read_text(encoding="utf-8"))), encoding="utf-8")
