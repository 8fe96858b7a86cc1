"""docs/zoo.md, from the zoo's lines."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo.case import KEEP, STAGES

_HEAD = f"""Made by `python -m benchmarks.zoo page` from `benchmarks/results/zoo.jsonl`; do not edit by hand. Each
model, with random weights, goes through these stages in a process of its own: {", ".join(STAGES)}. {KEEP:.0%} of the
MACs are kept, law 2 (cut = zero) is checked, and the saved folder is loaded again in a fresh process and compared bit
for bit. MACs pinned: share of the MACs in operators of which no channel can be cut. Groups pinned: share of the groups
that are pinned for a reason other than the seam, the head, or the network's input or output. Export: the largest
difference of the exported program (pt2), of ONNX Runtime and, if there is a third figure, of OpenVINO (float32, CPU)
from the cut model, as a share of the largest output; the batch size is free unless "fixed batch" is noted. Seconds
(before export + export): processor time of one thread, the fresh process included, which is what it takes on an idle
machine; in brackets, where that is not known, wall-clock time beside other work."""
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
_ORACLE_HEAD = """`python -m benchmarks.zoo oracle` hands the first and the last unit of every group (all its channels
in the layer that makes them) to Torch-Pruning's dependency graph and compares what each of the two would cut: tensor,
axis and position. Where they differ, each cuts one unit: ours must hold law 2; theirs must run and give the same output
as ours."""
_AT_THE_SEAM = ("the seam's own channels", "the network's output", "the network's input", "the head")
_SECONDS, _SECONDS_WITH_EXPORT, _MIB = 60, 120, 4096  # of a model of less than 100 M parameters at up to 224 pixels


def text(lines: list[dict[str, Any]], listed: int, oracle: Sequence[dict[str, Any]] = ()) -> str:
    """The page: what became of how many, then a row for each model; the same for the comparison with Torch-Pruning."""
    outcomes = Counter(line["outcome"] for line in lines)
    head = [
        "# Zoo",
        _HEAD,
        f"{len(lines)} of {listed} models were run: "
        + ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
        + " (unsupported and unreachable: refusals with a reason; failed: a fault of mimicut).",
        "\n".join(f"- {fact}" for fact in _facts(lines)),
        "| model | M params | outcome | keep | MACs pinned | groups pinned | export pt2 / onnx / openvino | s | MiB "
        "| why |\n"
        "|---|--:|---|--:|--:|--:|---|--:|--:|---|",
    ]
    return _table(head, lines, _row) + (f"\n{_table(_oracle_head(oracle), oracle, _oracle_row)}" if oracle else "")


def _table(head: list[str], lines: Sequence[dict[str, Any]], row: Callable[[dict[str, Any]], list]) -> str:
    rows = (" | ".join(str(cell).replace("|", "/") for cell in row(x)) for x in sorted(lines, key=lambda x: x["model"]))
    return "\n\n".join(head) + "\n" + "".join(f"| {cells} |\n" for cells in rows)


def _oracle_head(lines: Sequence[dict[str, Any]]) -> list[str]:
    read = [x for x in lines if "compared" in x]
    agrees = [x for x in read if x["outcome"] == "agrees"]
    compared, agree = (sum(x[key] for x in read) for key in ("compared", "agree"))
    return [
        "## Against Torch-Pruning",
        _ORACLE_HEAD,
        f"Torch-Pruning reads {len(read)} of {len(lines)} models. {_of(agrees, read)} of these agree in every group; "
        f"of the {compared} groups that were compared, {agree} agree.",
        "| model | groups | compared | agree | where they differ, and the outcome of each cut |\n|---|--:|--:|--:|---|",
    ]


def _oracle_row(line: dict[str, Any]) -> list[Any]:
    said = [
        f"{len(d['groups'])} ({d['groups'][0]}, ...): only ours {', '.join(d['ours_only']) or 'nothing'}; only theirs "
        f"{', '.join(d['theirs_only']) or 'nothing'}. Ours: {d['ours']}. Theirs: {d['theirs']}"
        for d in line.get("differences", ())
    ]
    said += [f"{n} not compared: {why}" for why, n in line.get("skipped", {}).items()]
    why = " ".join(line["error"].split())[:200] if "error" in line else "<br>".join(said)
    return [line["model"], *(line.get(key, "") for key in ("groups", "compared", "agree")), why]


def _facts(lines: list[dict[str, Any]]) -> list[str]:
    through = [x for x in lines if x["outcome"] == "done" or x.get("stage") == "export"]
    facts = [f"{_of(through, lines)} reach keep {KEEP} with every law satisfied."]
    read = [x for x in lines if "macs_share_pinned" in x]
    if read:
        groups, macs = map(_groups_pinned, read), (x["macs_share_pinned"] for x in read)
        facts.append(
            f"Median over the {len(read)} that could be traced: {statistics.median(groups):.1%} of the groups and "
            f"{statistics.median(macs):.1%} of the MACs are pinned."
        )
    tried = [x for x in through if "export" in x or x.get("stage") == "export"]
    if tried:
        done, never = [x for x in tried if x.get("export")], [x for x in tried if "export_why" in x]
        facts.append(
            f"{_of(done, tried)} export to every format tried with equal outputs "
            f"({sum('openvino' in x['export'] for x in done)} were tried with OpenVINO too), "
            f"{sum('export_static' in x for x in done)} of them with a fixed batch; for {len(never)}, the "
            "uncut teacher cannot be exported either."
        )
    size = [x for x in through if x["params"] < 1e8 and max(x["input"][1:]) <= 224]
    before = [_seconds(x)["all"] for x in size]
    whole = [_seconds(x)["all"] + _seconds(x).get("export", 0) for x in size]
    facts.append(
        f"Of the {len(size)} with under 100 M parameters at up to 224 pixels: {sum(s > _SECONDS for s in before)} "
        f"took over {_SECONDS} s before the export, {sum(s > _SECONDS_WITH_EXPORT for s in whole)} over "
        f"{_SECONDS_WITH_EXPORT} s with it, {sum(x['peak_memory_mib'] > _MIB for x in size)} over {_MIB} MiB."
    )
    return facts


def _of(some: list, everything: list) -> str:
    return f"{len(some)} of {len(everything)} ({len(some) / max(len(everything), 1):.0%})"


def _seconds(line: dict[str, Any]) -> dict[str, float]:
    return line.get("cpu_seconds") or line.get("seconds", {})


def _groups_pinned(line: dict[str, Any]) -> float:
    """Share of the groups that are pinned behind no seam."""
    pinned = sum(n for why, n in line["pinned"].items() if not why.startswith(_AT_THE_SEAM))
    return pinned / max(line["groups"], 1)


def _row(line: dict[str, Any]) -> list[Any]:
    share, seconds = line.get("macs_share_pinned"), _seconds(line)
    took = f"{seconds.get('all', 0):.0f}" + (f" + {seconds['export']:.0f}" if "export" in seconds else "")
    return [
        line["model"],
        f"{line['params'] / 1e6:.1f}" if "params" in line else "",
        line["outcome"],
        line.get("keep", ""),
        "" if share is None else f"{share:.1%}",
        "" if share is None else f"{_groups_pinned(line):.1%}",
        _export(line),
        took if "cpu_seconds" in line else f"({took})",
        line.get("peak_memory_mib", ""),
        _why(line),
    ]


def _export(line: dict[str, Any]) -> str:
    if "export_why" in line:
        return " ".join(line["export_why"].split())[:160]
    errors = line.get("export") or {}
    return " / ".join(f"{e:.0e}" for e in errors.values()) + (", fixed batch" if "export_static" in line else "")


def _why(line: dict[str, Any]) -> str:
    """Where it ended and the error, or the reasons that pin most groups; the seam's only where there is no other."""
    if "error" in line:
        return f"{line.get('stage', '')}: {' '.join(line['error'].split())[:700]}"  # whole, as the remedy comes last
    if not line["macs_share_pinned"]:
        return ""
    kinds = Counter()
    for reason, times in line["pinned"].items():
        kinds[re.sub(r" in [^ ]+\)$", ")", reason)] += times
    inner = {kind: n for kind, n in kinds.items() if not kind.startswith(_AT_THE_SEAM)}
    return "; ".join(f"{kind} x{n}" for kind, n in Counter(inner or kinds).most_common(4))[:160]
