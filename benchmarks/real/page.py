"""docs/real.md and its figure: what every method makes of the real networks, ours against MiR and distillation, from
the lines."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.methods import METHODS
from benchmarks.pages.plots import COLOURS, STYLE, save
from benchmarks.protocol import Cell
from benchmarks.real.run import NAMED, OWN, cells, size_of
from benchmarks.real.task import BINS, SURE, unpacked
from benchmarks.sweep import read_lines

Condition = tuple[str, int, float, int, int]  # teacher, size, keep, images, steps
Line = dict[str, Any]
Table = dict[Condition, dict[str, dict[int, Line]]]  # method, seed
PICTURES, ALONE = "mimicut_pictures", "mimicut_no_extra"
PAIRS = ((OWN, "mir"), (OWN, "distill"), (OWN, ALONE), (PICTURES, ALONE), (PICTURES, OWN))
DRAWS = 2000  # of the bootstrap. Source: assumption: the ends of an interval move by less than a tenth of a point.
_SHORT = {
    "none": "cut alone", "batch_norm": "batch norms", "least_squares": "least squares", "distill": "distillation",
    "practise": "PRACTISE", "mir": "MiR", "mimicut_same_cut": "ours, MiR's cut",
    "mimicut_no_extra": "ours, the few alone", OWN: "ours", "mimicut_pictures": "ours, with pictures",
}  # fmt: skip
_COLOURS = {
    "none": "#DDDDDD", "batch_norm": COLOURS["batch_norm"], "least_squares": COLOURS["least_squares"],
    "distill": COLOURS["distill_labels"], "practise": COLOURS["fskd"], "mir": COLOURS["mir"],
    "mimicut_same_cut": "#777777", "mimicut_no_extra": "#555555", OWN: "#222222", "mimicut_pictures": "#117733",
}  # fmt: skip
_ORDER = (
    "none", "batch_norm", "least_squares", "distill", "practise", "mir", "mimicut_same_cut", "mimicut_no_extra", OWN,
    "mimicut_pictures",
)  # fmt: skip


def write(lines: Path, page: Path) -> bool:
    """Write the page; False, and nothing written, where no cell has ended well."""
    found = read_lines(lines)
    done = [line for line in found if "error" not in line]
    if not done:
        return False
    page.parent.mkdir(parents=True, exist_ok=True)
    table = by_condition(done)
    draw(table, page.parent / "figures" / "real.png")
    page.write_text(_text(found, done, table), encoding="utf-8")
    return True


def draw(table: Table, path: Path) -> None:
    """Agreement by each method on each teacher, a panel for each share of MACs kept; at the number of steps, images
    and pixels that most teachers and methods have."""
    count: dict[tuple[int, int, int], int] = defaultdict(int)
    for (_, size, _, images, steps), methods in table.items():
        count[size, images, steps] += len(methods)
    size, images, steps = max(count, key=lambda at: (count[at], at))
    shown = {where: methods for where, methods in table.items() if (where[1], *where[3:]) == (size, images, steps)}
    keeps = sorted({keep for _, _, keep, _, _ in shown}, reverse=True)
    teachers = list(dict.fromkeys(where[0] for where in shown))
    names = [name for name in _ORDER if any(name in methods for methods in shown.values())]
    wide = 0.8 / len(names)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(keeps), figsize=(5.2 * len(keeps), 3.4), sharey=True, squeeze=False)
        for axis, keep in zip(axes[0], keeps, strict=True):
            for place, name in enumerate(names):
                for at, teacher in enumerate(teachers):
                    runs = shown.get((teacher, size, keep, images, steps), {}).get(name)
                    if runs:
                        x, height = at + (place - (len(names) - 1) / 2) * wide, 100 * _agreement(runs)
                        axis.bar(x, height, 0.92 * wide, color=_COLOURS[name], label=_SHORT[name])
                        axis.text(x, height + 1, f"{height:.0f}", ha="center", fontsize=8)
            axis.set_xticks(range(len(teachers)), teachers)
            axis.set_ylim(0, 100)
            axis.set_title(f"{keep:.0%} of the teacher's MACs", fontsize=9)
            axis.grid(axis="x", visible=False)
        axes[0][0].set_ylabel("agreement with the teacher, % of test pictures")
        found = [pair for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in found}
        order = [_SHORT[name] for name in names if _SHORT[name] in handles]
        axes[0][-1].legend([handles[label] for label in order], order, loc="upper right")
        seeds = {len(runs) for methods in shown.values() for runs in methods.values()}
        of = " to ".join(str(number) for number in sorted({min(seeds), max(seeds)}))
        said = f"{images} unlabelled pictures, {steps} steps, {size} pixels; seeds: {of}"
        figure.suptitle(said, fontsize=10)
        save(figure, path)


def _text(found: list[Line], done: list[Line], table: Table) -> str:
    first = done[0]["figures"]
    parts = [
        "# Real networks on real pictures",
        "Made by `python -m benchmarks.real page` from `benchmarks/results/real.jsonl` (`python -m benchmarks.real "
        "fetch`, then `run`); do not edit by hand. The networks have their ImageNet weights. The pictures are none "
        "that ImageNet networks were trained on: crops of wallpapers, four in five with cut-out photographs over them. "
        f"They are divided by picture into those to learn from and {first['test_images']:,} to test on; the teachers "
        f"are sure (confidence of {SURE} or more) on about {_about_sure(done)} of the latter. "
        f"The {first['labelled_images']:,} labelled pictures are cut-outs whose names are classes of ImageNet "
        "([stamps.json](../benchmarks/real/stamps.json)), each over several wallpapers. "
        f"Pictures `{done[0]['pictures']}`.",
        _state(found, done),
        "\n".join(f"- {place}" for place in _places(done)),
        "*Ours*: the default recipe with its own cut and drawn pictures beside the few. *Ours, the few alone*: "
        "without these, and cut inside blocks, as it was before the scheme asked the images. *Ours, with pictures*: "
        "with other wallpapers beside the few in place of drawn pictures. *Ours, MiR's cut*: the same recipe on the "
        "student from which the other methods start, cut by L1 norm at uniform widths inside residual blocks. Where "
        "a method was run with several options, the tables show those with the best agreement. Methods that do not "
        "train appear at every number of steps.",
        "![agreement with the teacher, by method](figures/real.png)",
        "## Agreement with the teacher",
        "Percent of the test pictures, mean over the seeds (in brackets: their number, if not three).",
        *_tables(table, _percent("agreement"), "{:.1f}"),
        "## One method minus another, in points of agreement",
        "Paired by picture: a picture's difference is the mean over the seeds that both have; 95 % intervals by "
        f"bootstrap over the pictures ({DRAWS:,} draws). Pictures of one wallpaper are alike, so these intervals "
        "are a little too narrow. *Where sure*: on pictures on which the teacher is sure. *Removed*: share of the "
        "other method's disagreement that ours removes.",
        _differences(table),
        "## Where the teacher is sure",
        f"Agreement, percent, on pictures on which the teacher's confidence is {SURE} or more.",
        *_tables(table, _percent("agreement_sure"), "{:.1f}"),
        "## Features",
        "Relative feature error (0 is perfect, 1 is no better than the teacher's mean feature) / cosine.",
        *_tables(table, lambda f: f["feature_error"], "{:.3f}", lambda f: f["cosine"]),
        "## Labelled cut-outs",
        f"Top-1, percent. {_teachers_top1(done)}",
        *_tables(table, _percent("top1_labelled"), "{:.1f}"),
        "## Calibration",
        f"Expected calibration error, percent: confidence of the student against its agreement, {BINS} bins.",
        *_tables(table, _percent("calibration_error"), "{:.1f}"),
        "## MACs kept",
        "Percent of the teacher's.",
        *_tables(table, _percent("macs"), "{:.1f}"),
        "## Seconds and memory",
        "Wall-clock seconds of the whole method, whatever else the machine was doing; the fastest seed. MiB: the "
        "largest rise in memory.",
        *_costs(table),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def by_condition(done: Iterable[Line]) -> Table:
    """Condition -> method -> seed -> line; of several options of a method those with the best mean agreement."""
    every: dict[Condition, dict[str, dict[str, dict[int, Line]]]] = defaultdict(lambda: defaultdict(dict))
    untrained: dict[tuple, list[Line]] = defaultdict(list)
    for line in done:
        cell = Cell(**line["cell"])
        place = (cell.teacher.partition(":")[2] or cell.teacher, size_of(cell), cell.cut["keep"], cell.images)
        if cell.steps == 0 and not METHODS[cell.method].trains:
            untrained[place].append(line)
            continue
        every[*place, cell.steps][cell.method].setdefault(_options(cell), {})[cell.seed] = line
    for place, lines in untrained.items():
        at = [where for where in every if where[:4] == place] or [(*place, 0)]
        for where in at:
            for line in lines:
                cell = Cell(**line["cell"])
                every[where][cell.method].setdefault(_options(cell), {})[cell.seed] = line
    return {
        where: {name: max(tried.values(), key=_agreement) for name, tried in every[where].items()}
        for where in sorted(every)
    }


def _options(cell: Cell) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(cell.options.items()))


def _agreement(runs: dict[int, Line]) -> float:
    return statistics.mean(line["figures"]["agreement"] for line in runs.values())


def difference(
    ours: dict[int, Line], theirs: dict[int, Line], sure: bool = False
) -> tuple[float, float, float, int] | None:
    """Ours minus theirs in points of agreement, its 95 % interval, and the number of seeds that both have; None where
    there is none. sure: only on pictures on which the teacher is sure."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    gaps = np.mean([_bits(ours[s], "agree") - _bits(theirs[s], "agree") for s in seeds], axis=0)
    if sure:
        gaps = gaps[_bits(ours[seeds[0]], "sure") == 1]
    if not len(gaps):
        return None
    draws = np.random.RandomState(0).randint(0, len(gaps), size=(DRAWS, len(gaps)))
    low, high = np.percentile(gaps[draws].mean(1), [2.5, 97.5])
    return 100 * float(gaps.mean()), 100 * float(low), 100 * float(high), len(seeds)


def _bits(line: Line, name: str) -> np.ndarray:
    figures = line["figures"]
    return _unpacked(figures["bits"][name], figures["test_images"])


@cache
def _unpacked(digits: str, count: int) -> np.ndarray:
    return np.array(unpacked(digits, count), dtype=np.int8)


def _differences(table: Table) -> str:
    rows = [
        "| teacher | size | keep | images | steps | seeds | method | minus | points | where sure | removed |",
        "|---|--:|--:|--:|--:|--:|---|---|--:|--:|--:|",
    ]
    for where, methods in table.items():
        for first, second in PAIRS:
            if first not in methods or second not in methods:
                continue
            ours, theirs = methods[first], methods[second]
            whole, sure = difference(ours, theirs), difference(ours, theirs, sure=True)
            if whole is None:
                continue
            both = ours.keys() & theirs.keys()
            left = [1 - _agreement({s: m[s] for s in both}) for m in (ours, theirs)]
            gone = f"{100 * (1 - left[0] / left[1]):.0f} %" if left[1] else ""
            names = f"{_SHORT[first]} | {_SHORT[second]}"
            rows.append(f"| {_place(where)} | {whole[3]} | {names} | {_said(whole)} | {_said(sure)} | {gone} |")
    return "\n".join(rows) if len(rows) > 2 else "No condition has both yet."


def _said(found: tuple[float, float, float, int] | None) -> str:
    return "" if found is None else f"{found[0]:+.1f} ({found[1]:+.1f} to {found[2]:+.1f})"


def _place(where: Condition) -> str:
    teacher, size, keep, images, steps = where
    return f"{teacher} | {size} | {keep:g} | {images} | {steps}"


def _tables(table: Table, figure: Any, form: str, second: Any = None) -> list[str]:
    """One table a teacher and size; a column for each method that has a line there."""
    parts = []
    for teacher, size in dict.fromkeys(where[:2] for where in table):
        rows = {where: methods for where, methods in table.items() if where[:2] == (teacher, size)}
        names = [name for name in _ORDER if any(name in methods for methods in rows.values())]
        text = [
            f"**{teacher}, {size} pixels**\n",
            "| keep | images | steps | " + " | ".join(_SHORT[name] for name in names) + " |",
            "|--:|--:|--:|" + "--:|" * len(names),
        ]
        for (_, _, keep, images, steps), methods in rows.items():
            shown = [_mean(methods.get(name), figure, form, second) for name in names]
            text.append(f"| {keep:g} | {images} | {steps} | " + " | ".join(shown) + " |")
        parts.append("\n".join(text))
    return parts


def _percent(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda figures: None if figures[name] is None else 100 * figures[name]


def _mean(runs: dict[int, Line] | None, figure: Any, form: str, second: Any) -> str:
    if not runs:
        return ""
    figures = [line["figures"] for line in runs.values() if figure(line["figures"]) is not None]
    if not figures:
        return ""
    shown = form.format(statistics.mean(map(figure, figures)))
    shown += "" if second is None else f" / {statistics.mean(map(second, figures)):.3f}"
    return shown + ("" if len(figures) == 3 else f" ({len(figures)})")


def _costs(table: Table) -> list[str]:
    names = [name for name in _ORDER if any(name in methods for methods in table.values())]
    rows = [
        "| teacher | size | keep | images | steps | " + " | ".join(_SHORT[name] for name in names) + " |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(names),
    ]
    for where, methods in table.items():
        shown = []
        for name in names:
            runs = list(methods.get(name, {}).values())
            peaks = [line["peak_memory_mib"] for line in runs if line["peak_memory_mib"] is not None]
            memory = f", {max(peaks):,.0f} MiB" if peaks else ""
            shown.append(f"{min(line['seconds'] for line in runs):.0f} s{memory}" if runs else "")
        rows.append(f"| {_place(where)} | " + " | ".join(shown) + " |")
    return ["\n".join(rows)]


def _state(found: list[Line], done: list[Line]) -> str:
    """How many of the cells of the full design are there, which are not, and what failed."""
    have = {Cell(**line["cell"]).key for line in done}
    wanted = cells()
    left = [cell for cell in wanted if cell.key not in have]
    parts = [f"{len(wanted) - len(left)} of the {len(wanted)} cells at 160 pixels have been run"]
    more = len(have - {cell.key for cell in wanted})
    parts += [f"and {more} others"] if more else []
    text = " ".join(parts) + "."
    if left:
        counts: dict[str, int] = defaultdict(int)
        for cell in left:
            counts[f"{cell.teacher.partition(':')[2]} seed {cell.seed}"] += 1
        text += " **Missing: " + ", ".join(f"{count} of {name}" for name, count in counts.items()) + ".**"
    failed = [line for line in found if "error" in line]
    for line in failed:
        text += f"\n- failed: {Cell(**line['cell'])}: {line['error']}"
    return text


def _places(done: list[Line]) -> list[str]:
    shown: dict[str, int] = defaultdict(int)
    for line in done:
        at, made = line["platform"], line["versions"]
        device = "" if at["device"] == "cpu" else f", on a GPU ({at['device']})"
        shown[
            f"{at['processor']}, {at['cores']} cores, {at['threads']} threads{device}; torch {made['torch']}, timm "
            f"{made.get('timm')}, Python {made['python']}, mimicut {made.get('mimicut') or made.get('understudy')}"
        ] += 1
    return [f"{count} cells: {place}" for place, count in shown.items()]


def _about_sure(done: list[Line]) -> str:
    shares = [round(100 * line["figures"]["sure_images"] / line["figures"]["test_images"]) for line in done]
    low, high = min(shares), max(shares)
    return f"{low} %" if low == high else f"{low} to {high} %"


def _teachers_top1(done: list[Line]) -> str:
    found = {}
    for line in done:
        cell = Cell(**line["cell"])
        name = f"{cell.teacher.partition(':')[2]} at {size_of(cell)} pixels"
        found[name] = f"{100 * line['figures']['top1_labelled_teacher']:.1f}"
    return "The teachers themselves: " + ", ".join(f"{name} {top1}" for name, top1 in sorted(found.items())) + "."


assert set(NAMED) <= set(_ORDER) == set(_SHORT)
