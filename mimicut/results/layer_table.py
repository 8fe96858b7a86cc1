"""The errors of a file's layers, as `layer_errors` has them, in words and rows."""

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from mimicut.results.report import Report
from mimicut.runtime.edge_formats import EDGE

HEADER = ("layer", "error", "dB", "own")
_MOST = 3  # layers that are named


LEGEND = (
    "error: norm of the difference from what the student's layer gives, over the norm of that; it adds up from layer "
    "to layer. dB: the same as signal to noise. own: what the layer alone adds, given the student's own values."
)


def layer_table(report: Report, formats: Iterable[str]) -> str:
    """A table as text for each of the formats whose layers were compared, and a sentence for those for phones."""
    formats, lines = tuple(formats), list[str]()
    for export in (report.exports[kind] for kind in formats if kind in report.exports):
        layers = export.get("layers")
        if not layers:
            continue
        rows = [HEADER, *layer_rows(layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines += ["", title(export)]
        for (name, *numbers), remark in zip(rows, ["", *remarks(layers)], strict=True):
            columns = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *columns, remark]).rstrip())
        lines += verdict(export)
    lines += [
        f"{EDGE[kind].file}: not compared layer by layer, as it shows no values of its layers"
        for kind in formats
        if lines and kind in EDGE
    ]
    return "\n".join([*lines, "", LEGEND] if lines else [])


def title(export: Mapping[str, Any]) -> str:
    """What was compared."""
    return f"{export['file']}, layer by layer, on {export['layers']['images']:,} {export['layers']['kind']} images"


def layer_rows(layers: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The texts under HEADER for each layer."""
    return [(r["layer"], _number(r["error"]), _decibels(r["error"]), _number(r["own"])) for r in layers["rows"]]


def remarks(layers: Mapping[str, Any]) -> list[str]:
    """For each layer whether the error jumps there, and what the file holds as one with it: an activation after it, and
    layers before it."""
    found = []
    for row in layers["rows"]:
        parts = ["jumps here"] if row["layer"] == layers["jump"] else []
        parts += [f"after {row['after']}"] if row.get("after") else []
        parts += [f"one with {', '.join(row['within'])}"] if row["within"] else []
        found.append("; ".join(parts))
    return found


def verdict(export: Mapping[str, Any]) -> list[str]:
    """Sentences: where the error jumps, what adds most, and what could not be compared."""
    layers, rows = export["layers"], [row for row in export["layers"]["rows"] if row["own"] is not None]
    at = next((row for row in layers["rows"] if row["layer"] == layers["jump"]), None)
    others = [row["own"] for row in rows if row is not at]
    if at is None:
        lines = ["no layer stands out"]
    else:
        beside = f"; the median of the others is {_number(median(others))}" if others else ""
        lines = [f"the error jumps at {at['layer']}, which alone adds {_number(at['own'])}{beside}"]
    if export["precision"] == "int8" and rows:
        most = sorted(rows, key=lambda row: -row["own"])[:_MOST]
        named = ", ".join(f"{row['layer']} ({_number(row['own'])})" for row in most)
        lines.append(f"most is added by {named}")
    if layers["unseen"]:
        lines.append(f"not found in the file: {', '.join(layers['unseen'])}")
    return lines


def _number(error: float | None) -> str:
    return "no number" if error is None or not math.isfinite(error) else f"{error:.1e}" if error else "0"


def _decibels(error: float | None) -> str:
    return f"{-20 * math.log10(error):.1f}" if error and math.isfinite(error) else ""
