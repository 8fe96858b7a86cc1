"""Progress on stderr: stages in words, and the steps of a loop."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicut.cli.printing import say

if TYPE_CHECKING:
    from mimicut.results.report import Report

_EVERY = 10.0  # seconds between two lines where stderr is no terminal


class StepProgress:
    """Progress of a loop: a bar on a terminal, else a line every ten seconds; with a folder, TensorBoard files too."""

    def __init__(self, folder: Path | None = None) -> None:
        from mimicut.results.tensorboard import TensorBoard

        self._log = None if folder is None else TensorBoard(folder)
        self._show: Callable[[int, int, float], None] = _bar() if sys.stderr.isatty() else _Lines()

    def end(self, report: "Report") -> None:
        """Also write the report's figures to TensorBoard."""
        if self._log is not None:
            self._log.report(report)

    def __call__(self, done: int, total: int, loss: float) -> None:
        if self._log is not None:
            self._log(done, total, loss)
        self._show(done, total, loss)


class _Lines:
    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._shown = 0.0

    def __call__(self, done: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now  # the first step warms up: the pace is that of the others
        since = done - self._first[0]
        if done != total and (since < 2 or now - self._shown < _EVERY):
            return
        self._shown = now
        left = (now - self._first[1]) / max(since, 1) * (total - done)
        print(f"  step {done} of {total}, loss {loss:.3g}, {left:.0f} s left", file=sys.stderr)


def _bar() -> Callable[[int, int, float], None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  step"), MofNCompleteColumn(), BarColumn(bar_width=30), TextColumn("loss {task.fields[loss]:.3g}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    shown: dict[str, Any] = {}

    def show(done: int, total: int, loss: float) -> None:
        if not shown:
            bar = Progress(*columns, console=Console(stderr=True), transient=False)
            bar.start()
            shown.update(bar=bar, task=bar.add_task("", total=total, loss=loss))
        shown["bar"].update(shown["task"], completed=done, total=total, loss=loss)
        if done == total:
            shown["bar"].stop()
            shown.clear()

    return show


def stages() -> Callable[[str], None]:
    """Print the stages. Notes are only counted here, since they follow below the table and in the report."""
    waiting = 0

    def stage(text: str) -> None:
        nonlocal waiting
        if text.startswith("note: "):
            waiting += 1
            return
        if waiting:
            say(f"({waiting} note{'s' * (waiting > 1)}, below the table)")
            waiting = 0
        say(text)

    return stage
