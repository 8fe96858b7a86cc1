"""docs/default.md: this project's recipe against the paper's, at equal steps and at equal seconds, from the lines."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.protocol import NO_EXTRA, OTHERS_WITH_EXTRA, OURS, OWN, PROTOCOLS, SAME_CUT, Cell, said
from benchmarks.sweep import RESULTS, read_lines

NAMES = (
    "embedded_default", "embedded_default_long", "embedded_heavy", "embedded_default_images", "embedded_default_short",
    "embedded_quick", "embedded_ablation",
)  # fmt: skip
_LONG = 2000  # the paper's steps
Lines = list[dict[str, Any]]
Condition = tuple[str, str, int]  # teacher, cut, images


def write(docs: Path, results: Path = RESULTS) -> bool:
    """Write the page and its figure; False, and nothing written, where there are no lines."""
    lines = {name: _lines(name, results) for name in NAMES}
    if not lines[NAMES[0]]:
        return False
    from benchmarks.pages.plots import against_seconds

    if lines["embedded_default_short"]:
        both = lines["embedded_default"] + lines["embedded_default_short"]
        against_seconds(_curves(both), docs / "figures" / "default.png")
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "default.md").write_text(_text(lines), encoding="utf-8")
    return True


def _lines(name: str, results: Path) -> Lines:
    cells = {cell.key for cell in PROTOCOLS[name].cells()}
    found = [line for line in read_lines(results / f"{name}.jsonl") if "error" not in line]
    return [line for line in found if Cell(**line["cell"]).key in cells]


def _text(lines: dict[str, Lines]) -> str:
    undone = {name: len(PROTOCOLS[name].cells()) - len(found) for name, found in lines.items()}
    full = lines["embedded_default"] + lines["embedded_default_long"] + lines["embedded_default_short"]
    sooner = _sooner(full)
    parts = [
        "# The default recipe against the paper's",
        "Made by `python -m benchmarks page` from `benchmarks/results/embedded_default*.jsonl`, "
        "`embedded_heavy.jsonl`, `embedded_quick.jsonl` and `embedded_ablation.jsonl` (`python -m benchmarks sweep "
        "NAME`); do not edit by hand. Task: the demo's, "
        "top-1 on 10,000 test patches. Lost: points below the teacher, mean over the seeds. Seconds: of the method in "
        "one thread, the fastest seed, on a machine that also did other work.",
        "\n".join(f"- `{name}`: {_place(found)}" for name, found in lines.items() if found),
        f"*MiR*: the paper's recipe at the table's cut. *{METHODS[SAME_CUT].title}*: ours on that same student. "
        f"*{METHODS[OWN].title}*: ours, which also chooses where the same MACs are cut; in half of each batch it sees "
        "pictures that it has drawn. *The few images alone*: without these. *Other people's pictures beside*: with "
        "crops of wallpapers in their place (`python -m benchmarks.real fetch`). Difference: ours minus MiR, paired by "
        "seed, with its 95 % interval (Student's t).",
        " ".join(f"**`{name}`: {left} cells not run yet.**" for name, left in undone.items() if left),
        "![accuracy against seconds](figures/default.png)" if lines["embedded_default_short"] else "",
        sooner and "## How soon it matches the paper's recipe",
        sooner
        and "The smallest number of steps tried after which ours, with its own cut, loses no more than MiR after its "
        "2,000, over the same seeds.",
        sooner,
        "## At equal steps",
        _equal_steps(lines["embedded_default"]),
    ]
    if lines["embedded_default_images"]:
        parts += [
            "## With and without drawn pictures",
            "Ours, 400 steps; points lost with the few images alone, then with drawn pictures beside (seeds). 50 "
            "images are the rows above.",
            _with_and_without(lines["embedded_default"] + lines["embedded_default_images"]),
        ]
    if lines["embedded_heavy"]:
        parts += [
            "## Heavy cuts",
            "50 images, 400 steps; points lost. The others have the better of their published options and of those "
            "that were best on another seed. Ahead: ours minus the best of the others, paired by seed, with its 95 % "
            "interval.",
            _heavy(lines["embedded_heavy"]),
        ]
    if lines["embedded_default_short"]:
        parts += ["## In few steps", "0 steps is the closed form alone (`--effort quick`)."]
        parts += [_short(full)]
    if lines["embedded_quick"]:
        parts += ["## The closed form alone at half the MACs and half the widths", _quick(lines["embedded_quick"])]
    if lines["embedded_ablation"]:
        parts += ["## Without each part", "Ours, 50 images, 400 steps, one seed: points lost."]
        parts += [_ablation(lines["embedded_ablation"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _place(lines: Lines) -> str:
    shown = {}
    for line in lines:
        at, made = line["platform"], line["versions"]
        device = "" if at["device"] == "cpu" else f" with a GPU ({at['device']}), several cells at once on it"
        shown[f"{at['processor']}{device}, torch {made['torch']}, Python {made['python']}"] = None
    return "; ".join(shown)


def _sooner(lines: Lines) -> str:
    rows = [
        "| teacher, cut | MiR lost | after s | ours lost | steps | after s | share of the seconds |",
        "|---|" + "--:|" * 6,
    ]
    runs = _runs(lines)
    for (where, steps), methods in runs.items():
        if steps != _LONG or "mir" not in methods:
            continue
        paper = methods["mir"]
        for (_, few), found in sorted((key, m) for key, m in runs.items() if key[0] == where and OWN in m):
            ours = found[OWN]
            if ours.keys() >= paper.keys() and _lost(ours) <= _lost(paper):
                share = _seconds(ours) / _seconds(paper)
                rows.append(
                    f"| {where[0].partition(':')[2]}, {where[1]} | {_lost(paper):.2f} | {_seconds(paper):.0f} | "
                    f"{_lost(ours):.2f} | {few} | {_seconds(ours):.0f} | {share:.1%} |"
                )
                break
    return "\n".join(rows) if len(rows) > 2 else ""


def _with_and_without(lines: Lines) -> str:
    runs = {where: methods for (where, _), methods in _runs(lines).items() if {OWN, NO_EXTRA} <= methods.keys()}
    images = sorted({where[2] for where in runs})
    rows = ["| teacher, cut | " + " | ".join(f"{n:,} images" for n in images) + " |", "|---|" + "--:|" * len(images)]
    for place in sorted({where[:2] for where in runs}):
        cells = []
        for number in images:
            methods = runs.get((*place, number))
            lost = "" if methods is None else f"{_lost(methods[NO_EXTRA]):.2f}, {_lost(methods[OWN]):.2f}"
            cells.append("" if methods is None else f"{lost} ({len(methods[OWN])})")
        rows.append(f"| {place[0].partition(':')[2]}, {place[1]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _ablation(lines: Lines) -> str:
    found: dict[str, dict[Condition, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        options = " ".join(f"{key}={value}" for key, value in line["cell"]["options"].items()) or "the default"
        options = "the table's cut" if line["cell"]["method"] == SAME_CUT else options
        found.setdefault(options, {}).setdefault(_where(line), {})[line["cell"]["seed"]] = line
    places = sorted({where for runs in found.values() for where in runs})
    rows = ["| recipe | " + " | ".join(f"{w[0].partition(':')[2]}, {w[1]}" for w in places) + " |"]
    rows.append("|---|" + "--:|" * len(places))
    for options in sorted(found, key=lambda options: options != "the default"):
        shown = [f"{_lost(r):.2f} ({len(r)} seeds)" if (r := found[options].get(w)) else "" for w in places]
        rows.append(f"| {options} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def _where(line: dict[str, Any]) -> Condition:
    cell = line["cell"]
    return cell["teacher"], said(cell["cut"]), cell["images"]


def _runs(lines: Lines) -> dict[tuple[Condition, int], dict[str, dict[int, dict[str, Any]]]]:
    """(condition, steps) -> method -> seed -> line."""
    found: dict[tuple[Condition, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        cell = line["cell"]
        methods = found.setdefault((_where(line), cell["steps"]), {})
        methods.setdefault(cell["method"], {})[cell["seed"]] = line
    return dict(sorted(found.items()))


def _lost(runs: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(r["figures"]["top1_teacher"] - r["figures"]["top1"] for r in runs.values())


def _seconds(runs: dict[int, dict[str, Any]]) -> float:
    return min(r["seconds"] for r in runs.values())


def difference(ours: dict[int, dict[str, Any]], paper: dict[int, dict[str, Any]]) -> tuple[float, float] | None:
    """Mean of ours - paper over the seeds that both have, and half its 95 % interval; None below two seeds."""
    from scipy.stats import t as student_t

    pairs = [ours[s]["figures"]["top1"] - paper[s]["figures"]["top1"] for s in ours if s in paper]
    if len(pairs) < 2:
        return None
    half = float(student_t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return statistics.mean(pairs), half


def _equal_steps(lines: Lines) -> str:
    rows = [
        "| teacher, cut | images | steps | seeds | MiR lost | ours | lost | difference | gap closed | s, MiR / ours |",
        "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for ((teacher, cut, images), steps), methods in _runs(lines).items():
        for name in ("mir_extra", *OURS):
            paper, ours = methods.get("mir", {}), methods.get(name, {})
            both = paper.keys() & ours.keys()
            if not both:
                continue
            paper, ours = ({s: m[s] for s in both} for m in (paper, ours))
            found = difference(ours, paper)
            said_difference = "" if found is None else f"{found[0]:+.2f} ± {found[1]:.2f}"
            closed = 1 - _lost(ours) / _lost(paper)
            rows.append(
                f"| {teacher.partition(':')[2]}, {cut} | {images} | {steps} | {len(both)} | {_lost(paper):.2f} | "
                f"{METHODS[name].title} | {_lost(ours):.2f} | {said_difference} | {closed:.0%} | "
                f"{_seconds(paper):.0f} / {_seconds(ours):.0f} |"
            )
    return "\n".join(rows)


def _heavy(lines: Lines) -> str:
    names = ("mir", "distill", *OTHERS_WITH_EXTRA, *OURS[1:])
    others = [name for name in names if name not in OURS]
    rows = [
        "| teacher, cut | MACs | " + " | ".join(METHODS[name].title for name in names) + " | ahead | seeds |",
        "|---|--:|" + "--:|" * (len(names) + 2),
    ]
    for ((teacher, cut, _), _), methods in _runs(lines).items():
        shown = [f"{_lost(methods[name]):.2f}" if name in methods else "" for name in names]
        ours = methods.get(OWN, {})
        there = [methods[name] for name in others if name in methods and methods[name].keys() >= ours.keys()]
        found = difference(ours, min(there, key=_lost)) if ours and there else None
        ahead = "" if found is None else f"{found[0]:+.2f} ± {found[1]:.2f}"
        macs = [r["figures"]["macs"] for runs in methods.values() for r in runs.values()]
        rows.append(
            f"| {teacher.partition(':')[2]}, {cut} | {statistics.median(macs):.0%} | " + " | ".join(shown)
            + f" | {ahead} | {len(ours)} |"
        )  # fmt: skip
    return "\n".join(rows)


def _short(lines: Lines) -> str:
    runs = {key: methods[OWN] for key, methods in _runs(lines).items() if OWN in methods}
    every = sorted({steps for _, steps in runs})
    if not every:
        return ""
    rows = ["| teacher, cut | " + " | ".join(f"{s} steps" for s in every) + " |", "|---|" + "--:|" * len(every)]
    for where in dict.fromkeys(where for where, _ in runs):
        cells = [runs.get((where, s)) for s in every]
        shown = [f"{_lost(c):.2f} in {_seconds(c):.0f} s ({len(c)} seeds)" if c else "" for c in cells]
        rows.append(f"| {where[0].partition(':')[2]}, {where[1]} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def _quick(lines: Lines) -> str:
    rows = ["| teacher | cut | method | MACs kept | lost | seeds | seconds |", "|---|---|---|--:|--:|--:|--:|"]
    for ((teacher, cut, _), _), methods in _runs(lines).items():
        for name in OURS:
            if runs := methods.get(name):
                macs = statistics.mean(r["figures"]["macs"] for r in runs.values())
                rows.append(
                    f"| {teacher.partition(':')[2]} | {cut} | {METHODS[name].title} | {macs:.0%} | {_lost(runs):.2f} | "
                    f"{len(runs)} | {_seconds(runs):.1f} |"
                )
    return "\n".join(rows) if len(rows) > 2 else ""


def _curves(lines: Lines) -> dict[str, dict[str, list[tuple[float, float, int]]]]:
    """teacher, cut -> method -> (seconds, top-1, steps), by steps."""
    found: dict[str, dict[str, list[tuple[float, float, int]]]] = {}
    for ((teacher, cut, _), steps), methods in _runs(lines).items():
        for name, runs in methods.items():
            top1 = statistics.mean(r["figures"]["top1"] for r in runs.values())
            place = found.setdefault(f"{teacher.partition(':')[2]}, {cut}", {})
            place.setdefault(name, []).append((_seconds(runs), top1, steps))
    return found
