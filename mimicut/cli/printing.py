"""Printing of the commands: words and tables on stderr, one JSON line on stdout."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from mimicut.results.report import Report

INTERRUPTED = 130  # exit code


def say(text: str) -> None:
    if text.strip():
        print(without_controls(text), file=sys.stderr, flush=True)


def without_controls(text: str) -> str:
    r"""`text` with what would steer a terminal, or turn the order of letters round, written out: names of files and
    fields of a report may come from anyone.

    >>> without_controls("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cf", "Cs") else ascii(c)[1:-1] for c in text)


def answer(data: dict[str, Any]) -> None:
    print(json.dumps(data, allow_nan=False), flush=True)


def result_line(report: "Report", folder: str | None) -> dict[str, Any]:
    names = """macs_teacher macs_student params_teacher params_student top1_agreement top1_agreement_low
        top1_agreement_high feature_error_relative images_few images_held_out steps seconds top1_teacher top1_student"""
    data = report.to_json()
    latency = {f"latency_ms_{who}": (data["latency"] or {}).get(f"{who}_ms") for who in ("teacher", "student")}
    outputs = [{k: v for k, v in each.items() if v is not None} for each in data["outputs"]]
    found = {"outputs": outputs, "detections": data["detections"]}
    return {**{name: data[name] for name in names.split()}, **latency, **found, "go": report.go, "folder": folder}


def end_interrupted(place: Path, changed: bool) -> None:
    """Say what exists after Ctrl-C. changed: whether a result was saved."""
    from mimicut.results.stopped_runs import stopped_path

    kept = stopped_path(place)
    if not kept.exists() and changed:
        say(
            f"mimicut: interrupted; the student in {place} is complete, but what should follow (--crossfit, --to) may "
            "be missing; the same command with --resume makes it"
        )
        sys.exit(INTERRUPTED)
    if not kept.exists():
        raise KeyboardInterrupt
    say(f"mimicut: interrupted; the same command with --resume continues from {kept}")
    sys.exit(INTERRUPTED)


def anatomy_table(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['model']}: {facts['macs']:,} MACs, {facts['params']:,} parameters",
        *(f"seam: {point} {shape}" for point, shape in zip(facts["seam"], facts["seam_shapes"], strict=True)),
        _head(facts),
        *(_output(each) for each in facts["outputs"]),
        "",
        f"{'group':<46}{'units':>6}{'channels':>9}{'MACs':>8}  scheme",
    ]
    for group in facts["groups"]:
        where = f"pinned: {group['pinned']}" if group["pinned"] else "mid, all" if group["mid"] else "all"
        lines.append(
            f"{group['name']:<46}{group['width']:>6}{group['channels']:>9}{group['macs_share']:>8.1%}  {where}"
        )
    for scheme, shares in facts["keep_width"].items():
        left = ", ".join(f"{width}: {macs:.2f}" for width, macs in shares.items())
        lines.append(
            f"scheme {scheme}: MACs left at keep-width {left}; least possible {facts['smallest_keep'][scheme]:.2f}"
        )
    for keep, student in facts["keep"].items():
        if "unreachable" in student:
            lines.append(f"keep {keep}: {student['unreachable']}")
        else:
            lines.append(
                f"keep {keep} (scheme {student['scheme']}): {student['macs'] / 1e6:,.1f} M MACs, "
                f"{student['params'] / 1e6:,.2f} M parameters, {student['mb']:,.1f} MB"
            )
    lines += [f"not read: {each}" for each in facts["unread"]]
    if facts["blocks"]:
        lines += ["", f"{'block':<69}{'MACs':>8}"]
    for block in facts["blocks"]:
        can = f"cannot be dropped: {block['pinned']}" if block["pinned"] else "can be dropped"
        lines.append(f"{block['name'] or '<model>':<69}{block['macs_share']:>8.1%}  {can}")
    if facts["unused_parameters"]:
        lines.append(f"parameters that no forward pass uses: {len(facts['unused_parameters'])}")
    return "\n".join(lines)


def frontier_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'asked':>6}{'latency':>9}{'ms':>9}{'MACs':>7}{'error':>8}  blocks dropped"]
    for row in rows:
        measured = f"{row['latency_share']:>9.2f}{row['latency_ms']:>9.3f}" if "latency_ms" in row else f"{'':18}"
        dropped = ", ".join(row["drop"]) or "none"
        lines.append(f"{row['asked']:>6g}{measured}{row['macs_share']:>7.0%}{row['error']:>8.3f}  {dropped}")
    return "\n".join(lines)


def _output(output: dict[str, Any]) -> str:
    kind = output["kind"] + (f" ({output['activation']})" if output["activation"] else "")
    guessed = output["kind"] in ("scores", "multilabel", "map") and not (output["activation"] or output["declared"])
    kind += "; guessed from its shape (compress --output says what it is)" if guessed else ""
    apart = "" if output["imitated"] else "; not imitated: a path leads to it past the seam"
    return f"{'output ' + output['part'] if output['part'] else 'output'}: {kind}{apart}"


def _head(facts: dict[str, Any]) -> str:
    if not facts["headless"]:
        return f"head: {', '.join(facts['head']) or 'no learned layer follows the seam'}"
    own = all(point.startswith("<model>:output") for point in facts["seam"])
    return "head: none; the network returns features" + (", and the seam is the output itself" if own else "")
