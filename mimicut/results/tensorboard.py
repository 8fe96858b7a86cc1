"""A run in TensorBoard: the loss while the student mimics, then the figures of its report."""

import atexit
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimicut.base.errors import InputError

if TYPE_CHECKING:
    from mimicut.results.report import Report

_FIGURES = (
    "top1_agreement", "top1_agreement_low", "top1_agreement_high", "feature_error_relative", "feature_cosine",
    "top1_teacher", "top1_student",
)  # fmt: skip


class TensorBoard:
    """An `on_step` of `compress` that writes each loss to `directory`; `report` adds the figures at the end.

    `tensorboard --logdir` on the folder above shows all runs that were written there; nothing there is ever replaced.

    Raises:
        InputError: tensorboard is not installed, or `directory` is a file.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory, self._part, self._last = Path(directory), 0, 0
        self._made: Any = None
        if find_spec("tensorboard") is None:
            raise InputError(
                f"logging to {directory}: tensorboard is not installed; pip install 'mimicut[tensorboard]'"
            )
        if any(place.is_file() for place in (self._directory, *self._directory.parents)):
            raise InputError(f"logging to {directory}: there is a file; expected a folder, or none yet")

    @property
    def _writer(self) -> Any:
        # Made with the first line: a run that is refused leaves no empty file.
        if self._made is None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._made = SummaryWriter(str(self._directory))
            except OSError as error:
                raise InputError(f"logging to {self._directory}: {error}; name a folder that can be written") from error
            atexit.register(self._made.close)  # what was logged before an error or Ctrl-C is written too
        return self._made

    def __call__(self, done: int, total: int, loss: float) -> None:
        self._part, self._last = (
            self._part + (done <= self._last),
            done,
        )  # the count started again: the student of another fold
        self._writer.add_scalar(f"mimic/loss, fold {self._part}" if self._part else "mimic/loss", loss, done)

    def report(self, report: "Report") -> None:
        """Write the figures at the last step, the loss on the images to choose by, and the table; close the run."""
        values = report.to_json()
        for step, error in (report.config.get("recovery") or {}).get("choose", ()):
            self._writer.add_scalar("mimic/loss on images to choose by", error, step)
        figures: dict[str, Any] = {name: values[name] for name in _FIGURES}
        figures |= {
            f"share of {kind}": values[f"{kind}_student"] / values[f"{kind}_teacher"] for kind in ("macs", "params")
        }
        if report.latency:
            figures["share of latency"] = report.latency["share"]
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(f"report/{name}", value, report.steps)
        self._writer.add_text("report", "\n".join(f"    {line}" for line in report.table().splitlines()))
        self._writer.close()
