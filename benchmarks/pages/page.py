"""docs/results.md: tables, figures and what they say, all from the result lines."""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.pages import default_page
from benchmarks.pages.tables import Condition, Entry, Table, floors, other_cost, paired, table
from benchmarks.protocol import CURVES, FOR_TRANSFORMERS, PROTOCOLS, TUNING_SEEDS, Cell, Protocol, said
from benchmarks.sweep import RESULTS, missing, read_lines

DOCS = Path(__file__).parents[2] / "docs"
CONCLUSIONS = Path(__file__).parents[1] / "conclusions.md"
TABLE = ("embedded", "embedded_mild")  # the protocols whose lines make the table
LONG = "embedded_long"
TRANSFORMER = "embedded_transformer"
# Margins that MiR is asked to have over the best of these, in points. Set before anything was measured.
FLOORS = {"fine_tune": 5, "distill_labels": 2}
# And how near a transformer is asked to come to its teacher, with half of its heads and MLP widths. Set likewise.
TRANSFORMER_LOSES = 4
ON_ANOTHER_PAGE = default_page.NAMES
_METHODS = """![every method at 50 images](figures/methods.png)

For each family the cut with MiR's smallest loss above 4 points, with 50 images; dots are seeds, bars are means,
the dashed line is the teacher. * uses labels. PRACTISE drops whole blocks, so its MACs differ. These cuts were
chosen by MiR's loss on these seeds; at the heavier cuts (below) it is behind other methods."""
_CURVES = {
    "steps": """## Accuracy against steps

50 images; bars are one standard deviation over the seeds; dotted: methods without steps. Options were tuned at 200
steps; at 200 steps the better of tuned and published options is shown.

![accuracy against steps](figures/steps.png)""",
    "seconds": """## Accuracy against seconds

The same runs against the seconds that the method took on one core.

![accuracy against seconds](figures/seconds.png)""",
    "images": """## Accuracy against images

Options were tuned at 50 or 200 images, whichever is nearer; at 50 images the better of tuned and published options is
shown. 50 images have more seeds than the rest.

![accuracy against images](figures/images.png)""",
}


def write(docs: Path = DOCS, results: Path = RESULTS) -> int:
    """Write the page and its figures. Returns 2, with words, when there are no lines yet."""
    lines = _lines(TABLE, results)
    found = table(lines)
    if not found:
        print("error: there are no lines of embedded: run `sweep embedded` first", file=sys.stderr)
        return 2
    from benchmarks.pages import plots

    columns, drawn = _in_band(found), []
    if columns:
        plots.methods_side_by_side(columns, docs / "figures" / "methods.png")
        drawn.append("methods")
    for name, axes in (("embedded_steps", ("steps", "seconds")), ("embedded_images", ("images",))):
        points = _curve(PROTOCOLS[name], lines, results)
        for x in axes if points else ():
            plots.curves(points, x, docs / "figures" / f"{x}.png")
            drawn.append(x)
    docs.mkdir(parents=True, exist_ok=True)
    longer, attending = (table(_lines([name], results)) for name in (LONG, TRANSFORMER))
    (docs / "results.md").write_text(text(found, longer, attending, lines, drawn, results), encoding="utf-8")
    pages = ["docs/results.md"] + (["docs/default.md"] if default_page.write(docs, results) else [])
    print(json.dumps({"written": pages, "conditions": len(found)}))
    return 0


def _lines(names: Iterable[str], results: Path) -> list[dict[str, Any]]:
    """The lines of protocols that are of their cells: not those of options that they no longer have."""
    found = []
    for name in names:
        cells = {cell.key for cell in PROTOCOLS[name].cells()}
        found += [line for line in read_lines(results / f"{name}.jsonl") if Cell(**line["cell"]).key in cells]
    return found


def text(
    found: Table, longer: Table, attending: Table, lines: list[dict[str, Any]], drawn: list[str], results: Path
) -> str:
    parts = [
        "# Few-image compression methods, side by side",
        "Made by `python -m benchmarks page` from the lines in `benchmarks/results/`; do not edit by hand. How the "
        "figures are measured: [benchmarks/README.md](../benchmarks/README.md).",
        _setting(lines, results),
        _METHODS if "methods" in drawn else "",
        "## What it shows",
        CONCLUSIONS.read_text(encoding="utf-8").strip() if CONCLUSIONS.exists() else "",
        "### Required margins",
        _floors_table(found | longer),
        "## What each method needs",
        _needs(found),
        "## Accuracy",
        *tables_of(found),
        "## Five times the steps" if longer else "",
        *tables_of(longer)[1:],
        _transformer(attending) if attending else "",
        *tables_of(attending)[1:],
        "## Published options and tuned ones",
        _options_table(found),
        *(_CURVES[x] for x in drawn if x in _CURVES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables_of(found: Table) -> list[str]:
    """Markdown: what the cells say, then a table for each teacher."""
    return [
        "Top-1 in percent on the test images, mean ± standard deviation over the seeds; best in bold; below it MiR "
        "minus the method, paired by seed, with the 95 % interval (Student's t). Each method has the best of the "
        "options that were run.",
        *(_teacher_table(found, teacher) for teacher in dict.fromkeys(c.teacher for c in found)),
    ]


def _curve(protocol: Protocol, lines: list[dict[str, Any]], results: Path) -> Table:
    """The protocol's own lines and those points of its curves that the table has; empty before it was run."""
    own = _lines([protocol.name], results)
    where = {(line["cell"]["teacher"], said(line["cell"]["cut"])) for line in own}
    shared = [
        line
        for line in lines
        if line["cell"]["method"] in CURVES
        and (line["cell"]["teacher"], said(line["cell"]["cut"])) in where
        and (len(protocol.images) > 1 or line["cell"]["images"] in protocol.images)
    ]
    return table([*own, *shared]) if own else {}


def _setting(lines: list[dict[str, Any]], results: Path) -> str:
    good = [line for line in lines if "error" not in line]
    kinds = sorted({(line["platform"]["processor"], line["platform"]["threads"]) for line in good}, key=str)
    versions = sorted({f"torch {line['versions']['torch']}, Python {line['versions']['python']}" for line in good})
    seeds, steps = (sorted({line["cell"][key] for line in good}) for key in ("seed", "steps"))
    minutes = sum(line.get("seconds_cell", 0) for line in lines) / 60
    own = [p for p in PROTOCOLS.values() if p.task == "photographs" and p.name not in ON_ANOTHER_PAGE]
    left = [(p.name, len(missing(p.cells(), results / f"{p.name}.jsonl"))) for p in own]
    undone = [f"`{name}`: {count} cells not run yet" for name, count in left if count]
    failed = len(lines) - len(good)
    return (
        f"Task: tell which photograph a 32x32 patch comes from (`mimicut/demo/photographs.py`). The table has "
        f"{len(good)} cells, which took {minutes:.0f} minutes in all; steps {_list(steps)}; seeds {_list(seeds)}; "
        f"{'; '.join(f'{p}, {n} thread(s) per cell' for p, n in kinds)}; {'; '.join(versions)}. Each "
        "baseline has the better of its published options and the best of a grid on seed "
        f"{_list(TUNING_SEEDS)}, judged by the test patches (with 200 images, cuts that were not tuned take the best "
        "for 50); MiR is not tuned. A plain network (vgg7) has no block for PRACTISE to drop. "
        f"{failed or 'No'} cell{'s' * (failed > 1)} of the table ended in an error. "
        + (f"**{'; '.join(undone)}.**" if undone else "")
    ).strip()


def _in_band(found: Table) -> list[tuple[Condition, dict[str, list[Entry]]]]:
    """For each teacher the cut, at 50 images, where MiR loses least beyond 4 points: there methods can differ."""
    best: dict[str, tuple[tuple[bool, float], Condition]] = {}
    for condition, methods in found.items():
        if condition.images == 50 and methods.get("mir"):
            lost = methods["mir"][0].lost
            rank = (lost < 4, lost if lost >= 4 else -lost), condition
            best[condition.teacher] = min(best.get(condition.teacher, rank), rank)
    return [(condition, found[condition]) for _, condition in best.values()]


def _floors_table(found: Table) -> str:
    rows, met = [], {condition.steps: set() for condition in found}
    for row in floors(found):
        condition, margins = row["condition"], row["margins"]
        wins = row["whole"] and all(margins.get(n) and margins[n][0] >= floor for n, floor in FLOORS.items())
        met[condition.steps] |= {condition.teacher} if wins else set()
        intervals = (_interval(of.get(name)) for of in (margins, row["untuned"]) for name in FLOORS)
        where = f"{condition.teacher}, widths x {condition.keep_width}"
        said = ("yes" if wins else "no") if row["whole"] else "seeds are missing"
        rows.append((where, str(condition.steps), f"{row['lost']:.1f}", *intervals, said))
    head = (
        "Requirement: where MiR at 50 images loses 4 to 8 points to its teacher, it beats the best fine-tuning (BP) by "
        f"{FLOORS['fine_tune']} points and the best labelled distillation by {FLOORS['distill_labels']}, as the mean "
        "over the seeds, on at least two families. Families that meet it: "
        + ", ".join(f"{len(families)} after {steps} steps" for steps, families in met.items())
        + "."
    )
    names = (
        "", "steps", "MiR loses", "over the best BP", "over the best labelled KD", "over the published BP",
        "over the published KD", "met",
    )  # fmt: skip
    return head + "\n\n" + _markdown(names, rows) if rows else head + " At no cut does it lose 4 to 8 points."


def _transformer(found: Table) -> str:
    """What was asked of the transformer, and at which steps each recipe does it."""
    rows = []
    for condition, methods in found.items():
        for name in ("mir", FOR_TRANSFORMERS):
            if methods.get(name):
                entry = methods[name][0]
                where = f"{condition.teacher}, widths x {condition.keep_width}"
                met = "yes" if entry.lost <= TRANSFORMER_LOSES else "no"
                seeds = _list(f"{entry.top1_teacher - top1:.1f}" for top1 in entry.top1)
                rows.append(
                    (where, METHODS[name].title, str(condition.steps), f"{entry.lost:.1f}", seeds,
                     f"{entry.seconds:.0f}", met)
                )  # fmt: skip
    return (
        "## A vision transformer\n\n"
        "50 images; half of every block's heads and MLP widths is cut. The `paper` preset (SGD) is compared with the "
        "`transformer` preset (AdamW), whose learning rate comes from a grid on the tuning seed. Requirement: at most "
        f"{TRANSFORMER_LOSES} points below the teacher, mean of the seeds; each seed's loss stands beside it.\n\n"
        + _markdown(("", "method", "steps", "loses", "by seed", "seconds", "met"), rows)
    )


def _needs(found: Table) -> str:
    conditions = [c for c in found if c.images == 50]
    rows = []
    for name, method in METHODS.items():
        entries = [found[c][name][0] for c in conditions if found[c].get(name)]
        memory = [e.peak_memory_mib for e in entries if e.peak_memory_mib is not None]
        if entries:
            seconds = f"{statistics.median(e.seconds for e in entries):.1f}"
            needs = ("yes" if needed else "no" for needed in (method.labels, method.trains))
            rows.append(
                (method.title, method.source, *needs, seconds, f"{statistics.median(memory):.0f}" if memory else "?")
            )
    head = (
        "At 50 images: seconds of the method (fastest seed) and the rise in memory, both as medians over teachers and "
        "cuts. Several cells may have run at once, so compare seconds within this table only."
    )
    return head + "\n\n" + _markdown(("method", "source", "labels", "trains", "seconds", "MiB"), rows)


def _teacher_table(found: Table, teacher: str) -> str:
    columns = sorted((c for c in found if c.teacher == teacher), key=lambda c: (-c.keep_width, c.images, c.steps))
    rows = []
    for name, method in METHODS.items():
        cells = []
        for condition in columns:
            entries, mir = found[condition].get(name), found[condition].get("mir")
            alike = [each for each, *_ in found[condition].values() if not mir or not other_cost(each, mir[0])]
            best = max((each.mean for each in alike), default=None)
            cells.append(_cell(entries[0], mir[0] if mir else None, best) if entries else "")
        if any(cells):
            rows.append((method.title + (" (labels)" if method.labels else ""), *cells))
    several = len({c.steps for c in columns}) > 1
    heads = []
    for c in columns:
        share = next((f" ({e.macs:.0%} MACs)" for n, (e, *_) in found[c].items() if not METHODS[n].blocks), "")
        heads.append(f"x {c.keep_width}{share}, {c.images} images" + (f", {c.steps} steps" if several else ""))
    whole = next(iter(found[columns[0]].values()))[0].top1_teacher
    return f"### {teacher}: teacher {whole:.2f} %\n\n" + _markdown(("method", *heads), rows)


def _cell(entry: Entry, mir: Entry | None, best: float | None) -> str:
    """best: the highest mean at this cost, which is set in bold."""
    words = f"{entry.mean:.1f}" + ("" if entry.deviation is None else f" ± {entry.deviation:.1f}")
    words = f"**{words}**" if entry.mean == best else words
    if mir is not None and entry.seeds != mir.seeds:
        words += f" (seeds {_list(entry.seeds)})"
    if METHODS[entry.method].blocks if mir is None else other_cost(entry, mir):
        return f"{words}<br>at {entry.macs:.0%} of MACs"
    return words if mir is None or entry is mir else f"{words}<br>{_interval(paired(mir, entry))}"


def _interval(difference: tuple[float, float, float] | None) -> str:
    if difference is None:
        return ""
    mean, low, high = difference
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _options_table(found: Table) -> str:
    rows = []
    for name, method in METHODS.items():
        for condition, methods in found.items():
            entries = methods.get(name, [])
            published = next((e for e in entries if e.options == method.published), None)
            if method.grid and published is not None and condition.images == 50:
                tuned = next((e for e in entries if e is not published), None)
                where = f"{condition.teacher} x {condition.keep_width}"
                said = ("the same" if e is None else f"{e.mean:.1f} ({_named(e.options)})" for e in (published, tuned))
                rows.append((method.title, where, *said))
    head = (
        "50 images: mean top-1 with the published options and with the best on the tuning seed (out of `grid` in each "
        "method's file; all its figures: `benchmarks/results/*_tuning.jsonl`). The tables above use the better one."
    )
    return head + "\n\n" + _markdown(("method", "where", "published", "tuned"), rows) if rows else ""


def _named(options: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())


def _list(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in values)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
