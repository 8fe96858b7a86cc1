"""docs/reliability.md from what `make attack` counted: python -m benchmarks.studies.reliability"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_KILLED = "kill -9 before each change of a file, or inside a write"
# Words for a kind of attack -> what must hold, and how many the project wants to have survived.
_WANTED = {
    _KILLED: ("the folder is old, new or absent; the rerun gives the same bytes without --force", 500),
    "SIGINT": ("exit code 130, and resumed to the same bits", 100),
    "SIGTERM": ("exit code 130, and resumed to the same bits", 100),
    "disk that refuses": ("the old result or none, said in plain words", 0),
    "file systems of small sizes": ("saved, or refused in plain words", 0),
    "races of three writers": ("one result is in place, and every other is refused or kept beside", 0),
    "clocks that jump": ("the same bytes", 0),
    "injected exceptions": ("the teacher is as before, to the bit", 300),
    "changes of plan, report and weights header": ("refused in plain words, or the same outputs", 10_000),
    "hostile images and arrays": ("read or refused in plain words, under 2 s and 500 MB", 1_000),
}


def counts(crash: dict[str, dict[str, Any]], files: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Kind of attack -> how many were tried, and how many survived."""
    found = dict.fromkeys(_WANTED, (0, 0))
    for name, entry in crash.items():
        kind = _KILLED if name.startswith("kills") else next(k for k in _WANTED if name.startswith(k))
        if "saved" in entry:
            entry = {"attacks": entry["saved"] + entry["refused"]}
        tried = next(
            entry[key] for key in ("kills", "signals", "exceptions", "attacks", "races", "runs") if key in entry
        )
        survived = entry.get("survived", entry.get("bit_equal", tried))
        found[kind] = (found[kind][0] + tried, found[kind][1] + survived)
    changes, images = files["result_files"], files["images"]
    ends = ("", ", digests rewritten")
    found["changes of plan, report and weights header"] = (
        changes["tries"], sum(changes.get(how + end, 0) for how in ("refused", "same") for end in ends),
    )  # fmt: skip
    found["hostile images and arrays"] = images["tries"], images["read"] + images["refused"]
    return found


def text(crash: dict[str, dict[str, Any]], files: dict[str, dict[str, Any]]) -> str:
    """The page."""
    rows = []
    for kind, (must, wanted) in _WANTED.items():
        tried, survived = counts(crash, files)[kind]
        floor = f"{wanted:,}" if wanted else ""
        rows.append(f"| {kind} | {must} | {tried:,} | {survived:,} | {floor}{'' if tried >= wanted else ': open'} |")
    images = files["images"]
    return "\n".join([
        "# What was survived", "",
        "Made by `python -m benchmarks.studies.reliability` from `benchmarks/results/attacks_*.json`, which",
        "`make attack` writes (Linux, Python 3.11; `ATTACKS=0.1 make attack` tries a tenth). Do not edit by hand. A",
        "sample of each kind is part of `make test`.", "",
        "| attack | what must hold | tried | survived | wanted |", "|---|---|--:|--:|--:|", *rows, "",
        f"Of the hostile images the slowest took {images['most_seconds']:g} s of processor time, and memory grew by "
        f"{images['grown_mb']} MB over all of them.", "",
    ])  # fmt: skip


if __name__ == "__main__":
    crash, files = (json.loads((RESULTS / f"attacks_{name}.json").read_text("utf-8")) for name in ("crash", "files"))
    PAGE.write_text(text(crash, files), encoding="utf-8")
