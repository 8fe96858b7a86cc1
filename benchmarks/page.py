"""docs/results.md: tables, figures and what they say, all from the result lines."""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.protocol import CURVES, PROTOCOLS, TUNING_SEEDS, Protocol
from benchmarks.sweep import RESULTS, missing, read_lines
from benchmarks.tables import Condition, Entry, Table, floors, paired, table

DOCS = Path(__file__).parents[1] / "docs"
CONCLUSIONS = Path(__file__).parent / "conclusions.md"


def write(docs: Path = DOCS, results: Path = RESULTS) -> int:
    """Write the page and its figures. Returns 2, with words, when there are no lines yet."""
    found = table(read_lines(results / "embedded.jsonl"))
    if not found:
        print("error: there are no lines of embedded: run `sweep embedded` first", file=sys.stderr)
        return 2
    from benchmarks import figures

    figures.methods_side_by_side(_in_band(found), docs / "figures" / "methods.png")
    for name, axes in (("embedded_steps", ("steps", "seconds")), ("embedded_images", ("images",))):
        points = _curve(PROTOCOLS[name], results)
        for x in axes if points else ():
            figures.curves(points, x, docs / "figures" / f"{x}.png")
    (docs / "results.md").write_text(text(found, docs, results), encoding="utf-8")
    print(json.dumps({"written": "docs/results.md", "conditions": len(found)}))
    return 0


def _curve(protocol: Protocol, results: Path) -> Table:
    """The protocol's own lines and those points of its curves that the table has; empty before it was run."""
    own = read_lines(results / f"{protocol.name}.jsonl")
    where = {(line["cell"]["teacher"], json.dumps(line["cell"]["cut"])) for line in own}
    shared = [
        line
        for line in read_lines(results / "embedded.jsonl")
        if line["cell"]["method"] in CURVES
        and (line["cell"]["teacher"], json.dumps(line["cell"]["cut"])) in where
        and (len(protocol.images) > 1 or line["cell"]["images"] in protocol.images)
    ]
    return table([*own, *shared]) if own else {}


def text(found: Table, docs: Path, results: Path) -> str:
    lines = read_lines(results / "embedded.jsonl")
    parts = [
        "# Every method of the field, side by side",
        "Made by `python -m benchmarks page` from the lines in `benchmarks/results/`; do not edit by hand. How the "
        "figures come about: [benchmarks/README.md](../benchmarks/README.md).",
        _setting(lines, results),
        "![every method at 50 images](figures/methods.png)",
        "The cut at which MiR loses least beyond 2 points, for each family, 50 images, five seeds (dots). Dashed: the "
        "teacher. * uses labels. PRACTISE drops whole blocks, so it stands at other MACs (tables below).",
        "## What it shows",
        CONCLUSIONS.read_text(encoding="utf-8").strip() if CONCLUSIONS.exists() else "",
        "### MiR against the best of two baselines",
        _floors_table(found),
        "## What each method needs",
        _needs(found),
        "## Published options and tuned ones",
        _options_table(table(read_lines(results / "embedded_tuning.jsonl"))),
        "## Accuracy",
        "Top-1 in percent on the 10,000 test patches, mean ± standard deviation over the seeds; below it MiR minus the "
        "method, paired by seed, with the 95 % interval (Student's t).",
        *(_teacher_table(found, teacher) for teacher in dict.fromkeys(c.teacher for c in found)),
        *_curve_parts(docs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(lines: list[dict[str, Any]], results: Path) -> str:
    good = [line for line in lines if "error" not in line]
    kinds = sorted({(line["platform"]["processor"], line["platform"]["threads"]) for line in good}, key=str)
    versions = sorted({f"torch {line['versions']['torch']}, Python {line['versions']['python']}" for line in good})
    seeds = sorted({line["cell"]["seed"] for line in good})
    steps = sorted({line["cell"]["steps"] for line in good})
    minutes = sum(line["seconds_cell"] for line in lines) / 60
    left = [(p, len(missing(p.cells(), results / f"{p.name}.jsonl"))) for p in _embedded()]
    undone = [f"{count} cells of `{p.name}` are not done" for p, count in left if count]
    failed = len(lines) - len(good)
    return (
        f"Task: which photograph does a 32x32 patch come from (`understudy/demo/photographs.py`). {len(good)} cells, "
        f"{minutes:.0f} minutes of one core in all; steps {_list(steps)}; seeds {_list(seeds)}; "
        f"{'; '.join(f'{p}, {n} thread(s) a cell' for p, n in kinds)}; {'; '.join(versions)}. Baselines are tuned on "
        f"seed {_list(TUNING_SEEDS)}, on test patches: their best chance. MiR is not tuned. "
        + (f"{failed} cells ended in an error. " if failed else "No cell failed. ")
        + (f"**{'; '.join(undone)}.**" if undone else "")
    )


def _embedded() -> list[Protocol]:
    return [p for p in PROTOCOLS.values() if p.task == "photographs"]


def _in_band(found: Table) -> list[tuple[Condition, dict[str, list[Entry]]]]:
    """For each teacher the cut, at 50 images, where MiR loses least beyond 2 points: there methods can differ."""
    best: dict[str, tuple[float, Condition]] = {}
    for condition, methods in found.items():
        if condition.images == 50 and methods.get("mir"):
            lost = methods["mir"][0].lost
            rank = (lost < 2, lost), condition
            best[condition.teacher] = min(best.get(condition.teacher, rank), rank)
    return [(condition, found[condition]) for _, condition in best.values()]


def _floors_table(found: Table) -> str:
    rows = [
        (
            f"{row['condition'].teacher} at widths x {row['condition'].keep_width}", f"{row['lost']:.1f}",
            *(_interval(row["margins"].get(name)) for name in ("fine_tune", "distill_labels")),
        )
        for row in floors(found)
    ]  # fmt: skip
    if not rows:
        return "At no cut does MiR at 50 images lose 4 to 8 points."
    head = "Where MiR at 50 images loses 4 to 8 points to its teacher (points, mean of the seeds, 95 % interval):"
    return head + "\n\n" + _markdown(("", "MiR loses", "over the best BP", "over the best labelled KD"), rows)


def _needs(found: Table) -> str:
    conditions = [c for c in found if c.images == 50]
    rows = []
    for name, method in METHODS.items():
        entries = [found[c][name][0] for c in conditions if found[c].get(name)]
        if not entries:
            continue
        memory = [e.peak_memory_mib for e in entries if e.peak_memory_mib is not None]
        rows.append(
            (
                method.title, method.source, "yes" if method.labels else "no", "yes" if method.trains else "no",
                f"{statistics.median(e.seconds for e in entries):.1f}",
                f"{max(memory):.0f}" if memory else "?",
            )
        )  # fmt: skip
    head = (
        "At 50 images: seconds of one core, median over teachers and cuts; the largest rise of memory of any of them."
    )
    return head + "\n\n" + _markdown(("method", "source", "labels", "trains", "seconds", "MiB"), rows)


def _teacher_table(found: Table, teacher: str) -> str:
    columns = [c for c in found if c.teacher == teacher]
    columns.sort(key=lambda c: (-c.keep_width, c.images))
    first = found[columns[0]]
    whole = next(iter(first.values()))[0].top1_teacher
    rows = []
    for name, method in METHODS.items():
        cells = []
        for condition in columns:
            entries, mir = found[condition].get(name), found[condition].get("mir")
            cells.append(_cell(entries[0], mir[0] if mir else None) if entries else "")
        if any(cells):
            rows.append((method.title + (" (labels)" if method.labels else ""), *cells))
    shares = {c.keep_width: next(iter(found[c].values()))[0].macs for c in columns}
    heads = [f"x {c.keep_width} ({shares[c.keep_width]:.0%} MACs), {c.images} images" for c in columns]
    return f"### {teacher}: teacher {whole:.2f} %\n\n" + _markdown(("method", *heads), rows)


def _cell(entry: Entry, mir: Entry | None) -> str:
    said = f"{entry.mean:.1f}" + ("" if entry.deviation is None else f" ± {entry.deviation:.1f}")
    if METHODS[entry.method].blocks:
        return f"{said}<br>at {entry.macs:.0%} of MACs"
    if mir is None or entry.method == "mir":
        return f"**{said}**" if entry.method == "mir" else said
    return f"{said}<br>{_interval(paired(mir, entry))}"


def _interval(difference: tuple[float, float, float] | None) -> str:
    if difference is None:
        return ""
    mean, low, high = difference
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _options_table(tuning: Table) -> str:
    rows = []
    for name, method in METHODS.items():
        for condition, methods in tuning.items():
            entries = methods.get(name, [])
            published = next((e for e in entries if e.options == method.published), None)
            if published is not None and condition.images == 50:
                best = entries[0]
                said = "the published" if best is published else f"{best.mean:.1f} ({_said(best.options)})"
                rows.append((method.title, f"{condition.teacher} x {condition.keep_width}",
                             f"{published.mean:.1f} ({_said(published.options)})", said))  # fmt: skip
    if not rows:
        return ""
    head = (
        "On the tuning seed, 50 images: top-1 with the published options and with the best of the grid "
        "(`grid` in each method's file; all of its figures: `benchmarks/results/embedded_tuning.jsonl`). The table "
        "below has the best."
    )
    return head + "\n\n" + _markdown(("method", "where", "published", "best of the grid"), rows)


def _curve_parts(docs: Path) -> list[str]:
    said = {
        "steps": "## Accuracy against steps\n\n50 images, three seeds, tuned options; dotted: methods without steps.",
        "seconds": "## Accuracy against seconds\n\nThe same runs against the seconds of the method on one core.",
        "images": "## Accuracy against images\n\n200 steps, three seeds, tuned options.",
    }
    return [
        f"{words}\n\n![accuracy against {x}](figures/{x}.png)"
        for x, words in said.items()
        if (docs / "figures" / f"{x}.png").exists()
    ]


def _said(options: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())


def _list(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
