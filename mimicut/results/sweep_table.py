"""The jobs of a sweep as one table, for people on a terminal and as a page."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mimicut.base.disk import make_folder, write
from mimicut.base.environment import platform_kind, versions
from mimicut.base.errors import StoreError
from mimicut.base.paths import usable_path
from mimicut.base.scratch import replace_file
from mimicut.results.html_page import template

TABLE, PAGE = "sweep.json", "sweep.html"
HEADER = ("job", "agreement (95 %)", "MACs", "latency", "seconds", "result", "folder, or why not")
_TITLE = "<title>Sweep of "  # of the page
_KINDS = {"GO": "go", "NO GO": "nogo", "failed": "nogo"}


def verdict(row: dict[str, Any]) -> str:
    """GO or NO GO against the job's threshold, "done" without one, "failed", "stopped" or "not started"."""
    if row["exit_code"] == 130:
        return "stopped" if row["starts"] else "not started"
    if row["result"] is None or row["exit_code"] not in (0, 1):
        return "failed"
    return {True: "GO", False: "NO GO", None: "done"}[row["result"].get("go")]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many jobs ended how.

    >>> summary([{"exit_code": 130, "starts": 0}, {"exit_code": 2, "starts": 1, "result": None}])
    '2 jobs: 1 not started, 1 failed'
    """
    counts = Counter(map(verdict, rows))
    return f"{len(rows)} jobs: {', '.join(f'{count} {word}' for word, count in counts.items())}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, in the order of HEADER."""
    result, word = row["result"] or {}, verdict(row)
    last = (row["said"] or "").rpartition("\n")[2].removeprefix("mimicut: ")
    seconds = result.get("seconds", row["seconds"])
    return [
        row["job"], _agreement(result), _share(result, "macs_{}"), _share(result, "latency_ms_{}"),
        "" if seconds is None else f"{seconds:.0f}", word,
        (last or f"exit code {row['exit_code']}") if word == "failed" else row["folder"],
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]], width: int = 120) -> str:
    """Plain text, `width` columns wide where the words allow it."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*HEADER, box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*cells(row))
    out = StringIO()
    Console(file=out, width=width, color_system=None, markup=False, emoji=False, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in [*out.getvalue().splitlines(), summary(rows)])


def page(rows: Sequence[dict[str, Any]], shares: Sequence[str], place: Path) -> str:
    """The page as HTML, with a link to the report of each result.

    Args:
        rows: The jobs.
        shares: Sentences on what each job had of the machine.
        place: The folder where the page will lie.
    """
    drawn = [
        {"cells": cells(row), "link": _link(row, place), "kind": _KINDS.get(verdict(row), "")}
        for row in rows
    ]  # fmt: skip
    said = [(row["job"], row["said"]) for row in rows if row["said"]]
    return template(PAGE).render(rows=drawn, header=HEADER, summary=summary(rows), shares=shares, said=said)


def make_place(folder: Path) -> None:
    """Make the folder of a sweep, if it is not there.

    Raises:
        StoreError: It cannot be made.
    """
    doing = f"saving the table of the sweep to {folder}"
    path = usable_path(folder, doing, StoreError)
    try:
        if not path.is_dir():
            make_folder(path)
    except OSError as error:
        raise StoreError(f"{doing}: {error}; name another folder") from error


def check_replaceable(folder: Path, rows: Sequence[dict[str, Any]], force: bool) -> None:
    """Check that a table and a page which are there are an earlier one of this sweep, before any work.

    Args:
        folder: Of the sweep.
        rows: Its jobs.
        force: Whether those of another sweep may be replaced as well; anything else may not.

    Raises:
        StoreError: They are not; the message says what they are.
    """
    doing = f"saving the table of the sweep to {folder}"
    found = {name: _text(folder / name) for name in (TABLE, PAGE) if os.path.lexists(folder / name)}
    there = _rows(found.get(TABLE, '{"jobs": []}'))
    foreign = [TABLE] if there is None else []
    if _TITLE not in found.get(PAGE, _TITLE):
        foreign.append(PAGE)
    if foreign:
        raise StoreError(
            f"{doing}: its {' and '.join(foreign)} is not one that mimicut sweep wrote; name another folder"
        )
    ours = {(row["job"], row["folder"]) for row in rows}
    others = [name for name, place in there or [] if (name, place) not in ours]
    if others and not force:
        raise StoreError(
            f"{doing}: it holds the table of another sweep (with {', '.join(others[:3])}); name another folder, or "
            "replace it with --force"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _rows(text: str) -> list[tuple[str, str]] | None:
    """(job, folder) of each row of a table; None for what is no table."""
    try:
        return [(row["job"], row["folder"]) for row in json.loads(text)["jobs"]]
    except (ValueError, TypeError, KeyError):
        return None


def write_table(folder: Path, rows: Sequence[dict[str, Any]], shares: Sequence[str], seconds: float) -> None:
    """Write the table of a sweep and its page.

    Args:
        folder: Where to.
        rows, shares: As `page`.
        seconds: Of the sweep, by the clock.

    Raises:
        StoreError: The disk refuses; files of an earlier sweep are then whole.
    """
    data = {
        "jobs": rows, "shares": shares, "seconds": round(seconds, 2), "versions": versions(),
        "platform": platform_kind(),
    }  # fmt: skip
    texts = {TABLE: json.dumps(data, indent=1, allow_nan=False) + "\n", PAGE: page(rows, shares, folder)}
    try:
        for name, text in texts.items():
            replace_file(folder / name, partial(write, content=text))
    except OSError as error:
        raise StoreError(
            f"saving the table of the sweep to {folder}: {error}; the folders of its jobs are whole"
        ) from error


def _agreement(result: dict[str, Any]) -> str:
    if result.get("top1_agreement") is not None:
        low, high = result["top1_agreement_low"], result["top1_agreement_high"]
        return f"{result['top1_agreement']:.1%} ({low:.1%} to {high:.1%})"
    error = result.get("feature_error_relative")
    return "" if error is None else f"feature error {error:.3g}"


def _share(result: dict[str, Any], key: str) -> str:
    whole, part = (result.get(key.format(who)) for who in ("teacher", "student"))
    return f"{part / whole:.0%}" if whole and part is not None else ""


def _link(row: dict[str, Any], place: Path) -> str:
    """The address of the report, from the page; empty where there is none."""
    if not (row["result"] or {}).get("folder"):
        return ""
    try:
        return quote(Path(os.path.relpath(Path(row["folder"], "report.html"), place)).as_posix())
    except ValueError:  # another drive on Windows
        return ""
