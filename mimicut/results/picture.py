"""Pictures for people, drawn with matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mimicut.base.disk import write_by
from mimicut.base.errors import InputError
from mimicut.base.scratch import replace_file

_ENDS = (".png", ".svg", ".pdf")


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
    replace_file(path, lambda fresh: write_by(fresh, lambda to: figure.savefig(to, dpi=150)))
