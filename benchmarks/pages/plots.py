"""The results page's pictures, drawn from the result lines."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.methods import METHODS
from benchmarks.pages.tables import Condition, Entry, Table, other_cost
from benchmarks.protocol import CURVES, OWN

# Colour-blind safe. Source: Okabe and Ito 2008.
COLOURS = dict(zip(CURVES, ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#0072B2", "#D55E00"), strict=True))
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "savefig.dpi": 130, "savefig.facecolor": "white", "legend.frameon": False,
}  # fmt: skip


def short(teacher: str) -> str:
    return teacher.partition(":")[2]


def methods_side_by_side(columns: list[tuple[Condition, dict[str, list[Entry]]]], path: Path) -> None:
    """One panel a condition: every method's seeds as dots, its mean as a bar, the teacher as a line."""
    names = [name for name in METHODS if any(name in methods for _, methods in columns)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(columns), figsize=(3.1 * len(columns) + 2, 4), sharey=True, squeeze=False)
        for axis, (condition, methods) in zip(axes[0], columns, strict=True):
            rows = [(place, methods[name][0]) for place, name in enumerate(names) if name in methods]
            for place, entry in rows:
                colour = {"mir": COLOURS["mir"], OWN: "#0072B2"}.get(entry.method, "#999999")
                axis.barh(place, entry.mean, color=colour, alpha=0.75, height=0.62)
                axis.plot(entry.top1, [place] * len(entry.top1), "k.", markersize=3)
                axis.text(115, place, f"{entry.mean:.1f}", va="center", ha="right", fontsize=8)
                if "mir" in methods and other_cost(entry, methods["mir"][0]):
                    axis.text(2, place, f"at {entry.macs:.0%} of MACs", va="center", fontsize=7)
            axis.axvline(rows[0][1].top1_teacher, color="black", linestyle="--", linewidth=0.8)
            share = methods["mir"][0].macs
            axis.set_title(
                f"{short(condition.teacher)}\nwidths x {condition.keep_width} ({share:.0%} of MACs)", fontsize=9
            )
            axis.set_xlim(0, 116)
            axis.set_xticks(range(0, 101, 20))
            axis.set_xlabel("top-1, % of 10,000 test patches")
            axis.set_yticks(range(len(names)), [_label(name) for name in names])
            axis.grid(axis="y", visible=False)
        save(figure, path)


def _label(name: str) -> str:
    return METHODS[name].title + (" *" if METHODS[name].labels else "")


def curves(found: Table, x: str, path: Path) -> None:
    """One panel a teacher: mean accuracy of each method against "steps", "seconds" or "images", bars one deviation."""
    teachers = list(dict.fromkeys(condition.teacher for condition in found))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(teachers), figsize=(3.4 * len(teachers), 3.4), squeeze=False)
        for axis, teacher in zip(axes[0], teachers, strict=True):
            own = {c: methods for c, methods in found.items() if c.teacher == teacher}
            for name, colour in COLOURS.items():
                points = sorted(_point(c, methods[name][0], x) for c, methods in own.items() if methods.get(name))
                if x != "images" and not METHODS[name].trains:
                    points = points[:1]
                if points:
                    style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.4, "capsize": 2}
                    if len(points) == 1 and x == "steps":
                        axis.axhline(points[0][1], color=colour, linestyle=":", label=METHODS[name].title)
                        continue
                    axis.errorbar(*zip(*points, strict=True), color=colour, label=METHODS[name].title, **style)
            whole = next(entries[0].top1_teacher for m in own.values() for entries in m.values())
            axis.axhline(whole, color="black", linestyle="--", linewidth=0.8)
            axis.set_xscale("log")
            if x != "seconds":
                ticks = sorted({getattr(c, x) for c in own})
                axis.set_xticks(ticks, [str(tick) for tick in ticks])
                axis.minorticks_off()
            axis.set_xlabel({"seconds": "seconds of the method, one core", "images": "unlabelled images"}.get(x, x))
            kept = next(iter(own)).keep_width
            axis.set_title(f"{short(teacher)}, widths x {kept}", fontsize=9)
        axes[0][0].set_ylabel("top-1, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, bbox_to_anchor=(0.5, -0.16))
        save(figure, path)


def _point(condition: Condition, entry: Entry, x: str) -> tuple[float, float, float]:
    where = entry.seconds if x == "seconds" else getattr(condition, x)
    return max(where, 0.01), entry.mean, entry.deviation or 0.0


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version of the drawing library in the file: the same lines give the same bytes.
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def against_seconds(panels: dict[str, dict[str, list[tuple[float, float, int]]]], path: Path) -> None:
    """One panel a teacher and cut: mean accuracy against seconds (logarithmic), a point a number of steps."""
    colours = {
        "mir": COLOURS["mir"], "mir_extra": "#CC79A7", "mimicut": "#0072B2", "mimicut_same_cut": "#56B4E9",
        "mimicut_no_extra": "#999999", "mimicut_pictures": "#009E73",
    }  # fmt: skip
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False)
        for axis, (title, methods) in zip(axes[0], panels.items(), strict=True):
            for name, points in methods.items():
                axis.plot(
                    [p[0] for p in points],
                    [p[1] for p in points],
                    "o-",
                    color=colours[name],
                    markersize=4,
                    label=METHODS[name].title,
                )
                for x, y, count in points:
                    axis.annotate(str(count), (x, y), textcoords="offset points", xytext=(3, -9), fontsize=6)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("seconds on one core; small: steps")
        axes[0][0].set_ylabel("top-1, % of 10,000 test patches")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(labels))
        save(figure, path)
