"""Pictures for people, drawn with matplotlib."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mimicut.base.disk import write_by
from mimicut.base.errors import InputError
from mimicut.base.scratch import replace_file

_ENDS = (".png", ".svg", ".pdf")
_PARTS = {"cut": "channels can be cut", "pinned": "cannot be cut", "head": "the head, which stays as it is"}
# Ending of the file's name -> colours on a transparent ground; each has three to one against its page at least.
_THEMES = {
    "": {"ink": "#1c2430", "cut": "#1f6f8b", "pinned": "#8a5a14", "head": "#7b8794"},
    "-dark": {"ink": "#e5e9ee", "cut": "#62b6d1", "pinned": "#e0a458", "head": "#8d99a6"},
}


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn to `path`; call it before long work.

    Raises:
        InputError: The name or folder does not fit, or matplotlib is not installed.
    """
    if path.suffix.lower() not in _ENDS:
        raise InputError(f"drawing {path}: expected a name that ends in {', '.join(_ENDS)}")
    if not path.resolve().parent.is_dir():
        raise InputError(f"drawing {path}: there is no folder {path.resolve().parent}")
    if find_spec("matplotlib") is None:
        raise InputError("drawing a picture: matplotlib is not installed; pip install 'mimicut[report]'")


def draw_frontier(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw the predicted error over the measured latency, or over the MACs where none was measured.

    Args:
        path: A .png, .svg or .pdf file.
        rows: As `budgets.frontier` gives them.
        title: A line above the chart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = all("latency_ms" in row for row in rows)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x = [row["latency_ms"] if measured else 100 * row["macs_share"] for row in rows]
    axes.plot(x, [row["error"] for row in rows], "o-", color="#1f6f8b")
    for where, row in zip(x, rows, strict=True):
        dropped = len(row["drop"])
        text = f"{100 * row['latency_share' if measured else 'macs_share']:.0f} %" + (
            f", {dropped} blocks dropped" if dropped else ""
        )
        axes.annotate(text, (where, row["error"]), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xlabel("milliseconds of a forward pass, measured" if measured else "MACs, % of the teacher's")
    axes.set_ylabel("error at the seam, closed form alone")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_layers(path: Path, facts: Mapping[str, Any], title: str) -> list[Path]:
    """Draw a network as bars in the order of its pass: the MACs of each layer, what can be cut, what cannot.

    Args:
        path: A .png, .svg or .pdf file. A second picture for dark pages has "-dark" before its ending.
        facts: As `inspect` gives them.
        title: A line above the chart.

    Returns:
        The two files.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers = facts["layers"]
    written = []
    for end, theme in _THEMES.items():
        figure = Figure(figsize=(max(6.4, min(14.0, 0.11 * len(layers))), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        shares = [100 * each["macs_share"] for each in layers]
        axes.bar(range(len(layers)), shares, 0.85, color=[theme[each["part"]] for each in layers])
        axes.set_xlim(-0.7, len(layers) - 0.3)
        ticks = _ticks([each["name"] for each in layers])
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=35, ha="right", fontsize=8)
        axes.set_ylabel("share of the MACs, %")
        sums = {part: sum(each["macs_share"] for each in layers if each["part"] == part) for part in _PARTS}
        axes.legend(
            handles=[Patch(color=theme[p], label=f"{text}: {sums[p]:.1%}") for p, text in _PARTS.items() if sums[p]],
            frameon=False, fontsize=8, labelcolor=theme["ink"],
        )  # fmt: skip
        axes.set_title(f"{title}: {facts['macs'] / 1e6:,.0f} M MACs in {len(layers)} layers", color=theme["ink"])
        axes.title.set_fontsize(10)
        axes.yaxis.label.set_color(theme["ink"])
        axes.tick_params(colors=theme["ink"])
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(theme["ink"])
        written.append(path.with_stem(path.stem + end))
        with rc_context({"svg.fonttype": "none"}):  # letters as text: a tenth of the size
            _save(figure, written[-1])
    return written


def _save(figure: Any, path: Path) -> None:
    """An old picture stays whole until the new one takes its place."""
    replace_file(path, lambda fresh: write_by(fresh, lambda to: figure.savefig(to, dpi=150)))


def _ticks(names: Sequence[str]) -> dict[int, str]:
    """Place -> beginning of the name, where another one begins: as much of the names as gives at most 24 of them."""
    found: dict[int, str] = {}
    for depth in range(1, 1 + max(name.count(".") + 1 for name in names)):
        cut = [".".join(name.split(".")[:depth]) for name in names]
        starts = {i: name for i, name in enumerate(cut) if i == 0 or name != cut[i - 1]}
        if found and len(starts) > 24:
            break
        found = starts
    every = -(-len(found) // 24)
    return {place: name for i, (place, name) in enumerate(found.items()) if i % every == 0}
