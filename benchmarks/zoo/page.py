"""docs/zoo.md, from the zoo's lines."""

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.zoo.case import KEEP, STAGES

_HEAD = f"""Made by `python -m benchmarks.zoo page` from `benchmarks/results/zoo.jsonl`; do not edit by hand. Every
model, with random weights, in a process of its own: {", ".join(STAGES)}; {KEEP:.0%} of the MACs are kept, law 2 (cut =
zero) is checked, the saved folder is loaded again in a fresh process and compared bit for bit. pinned: share of the
MACs in operators of which no channel can be cut. One thread; other work ran beside: the seconds are upper bounds."""
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def text(lines: list[dict[str, Any]], listed: int) -> str:
    """The page: what became of how many, then a row for each model."""
    outcomes = Counter(line["outcome"] for line in lines)
    pinned = [line["macs_share_pinned"] for line in lines if "macs_share_pinned" in line]
    share = f"; of the median model {statistics.median(pinned):.1%} of the MACs are pinned" if pinned else ""
    head = [
        "# Zoo",
        _HEAD,
        f"{len(lines)} of {listed} models were run: "
        + ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        + f" (unsupported and unreachable: refusals that say why; failed: a fault of ours){share}.",
        "| model | M params | outcome | keep | pinned | s | MiB | why |\n|---|--:|---|--:|--:|--:|--:|---|",
    ]
    return "\n\n".join(head) + "\n" + "\n".join(_row(line) for line in sorted(lines, key=lambda x: x["model"])) + "\n"


def _row(line: dict[str, Any]) -> str:
    share = line.get("macs_share_pinned")
    cells = (
        line["model"],
        f"{line['params'] / 1e6:.1f}" if "params" in line else "",
        line["outcome"],
        line.get("keep", ""),
        "" if share is None else f"{share:.0%}",
        f"{line.get('seconds', {}).get('all', 0):.0f}",
        line.get("peak_memory_mib", ""),
        _why(line),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _why(line: dict[str, Any]) -> str:
    """Where it ended and the error, or, where more than a tenth is pinned, the reasons that pin most groups."""
    if "error" in line:
        return f"{line.get('stage', '')}: {' '.join(line['error'].split())[:160]}".replace("|", "/")
    if line["macs_share_pinned"] <= 0.1:
        return ""
    kinds = Counter()
    for reason, times in line["pinned"].items():
        kinds[re.sub(r" in [^ ]+\)$", ")", reason)] += times
    known = ("the seam's own channels", "the network's output")
    return "; ".join(f"{kind} x{n}" for kind, n in kinds.most_common(4) if kind not in known)[:160].replace("|", "/")
