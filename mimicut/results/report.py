"""What a compression came to: plain data, JSON both ways, and a table for people. Knows no model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from math import isfinite
from typing import Any

from mimicut.base.errors import StoreError
from mimicut.proof.certificate import images_to_halve, in_words


@dataclass(frozen=True, kw_only=True)
class Report:
    """None where unknown.

    params_*: tensors' elements. macs_*: of one image, head included; macs_not_counted: operators that were not counted.
    top1_agreement: share (0 to 1) of the held-out images on which teacher and student name the same class, with its
    exact 95 % interval; min_agreement: what the lower end was to reach. feature_error_relative, feature_cosine,
    agreement_by_class, confidence_*, disagreements: see `verify.Figures`; class_names: class -> what it means, of those
    named there, where the teacher's library says so. top1_teacher, top1_student: accuracy in
    percent on labelled images; top1_difference: student minus teacher in points, with its 95 % interval (paired).
    images_few = images_fit + images_choose. image_hashes: content hashes by use ("fit", "choose", "held_out").
    images_check: what was found of the images that were learned from, see `image_check.ImageCheck`.
    widths: group -> [units kept, units of the teacher]. losses: [step, loss] of mimic, at most a few hundred.
    latency: of both on the runtime that a latency was asked for, as `budgets.compared` has it. exports: format -> file
    name, bytes, opset, and how far it was from the student when it was run by itself, as `deploy` has it.
    int8: teacher and student in float32 and in INT8, as `int8_table` has it.
    alternatives: what cheaper ways came to on the same cut, as `alternatives` has it. crossfit: number of folds, where
    the figures of agreement and features are `crossfit`'s.
    steps: of mimic; seconds: wall time of the whole. seam, budget and preprocessing live in the plan.
    """

    params_teacher: int | None = None
    params_student: int | None = None
    macs_teacher: int | None = None
    macs_student: int | None = None
    macs_not_counted: tuple[str, ...] = ()
    top1_agreement: float | None = None
    top1_agreement_low: float | None = None
    top1_agreement_high: float | None = None
    feature_error_relative: float | None = None
    feature_cosine: float | None = None
    agreement_by_class: dict[str, Any] = field(default_factory=dict)
    confidence_teacher: float | None = None
    confidence_student: float | None = None
    disagreements: tuple[dict[str, Any], ...] = ()
    class_names: dict[str, str] = field(default_factory=dict)
    widths: dict[str, Any] = field(default_factory=dict)
    losses: tuple[Any, ...] = ()
    min_agreement: float | None = None
    top1_teacher: float | None = None
    top1_student: float | None = None
    top1_difference: float | None = None
    top1_difference_low: float | None = None
    top1_difference_high: float | None = None
    images_few: int | None = None
    images_choose: int | None = None
    images_held_out: int | None = None
    images_labelled: int | None = None
    image_hashes: dict[str, list[str]] = field(default_factory=dict)
    images_check: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] | None = None
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    int8: dict[str, Any] | None = None
    alternatives: tuple[dict[str, Any], ...] = ()
    crossfit: int | None = None
    steps: int | None = None
    seconds: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    platform: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become None."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """Raises: StoreError naming what is not a field of a report."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise StoreError(
                f"reading a report: unknown entries {', '.join(unknown)}; it was edited, or made by a newer release: "
                "then update mimicut (pip install --upgrade mimicut)"
            )
        tuples = ("macs_not_counted", "notes", "disagreements", "losses", "alternatives")
        lists = {key: tuple(data[key]) for key in tuples if key in data}
        return cls(**{**data, **lists})

    @property
    def go(self) -> bool | None:
        """Whether the lower end of the agreement's interval reaches min_agreement; None where nothing was asked for."""
        if self.min_agreement is None:
            return None
        return self.top1_agreement_low is not None and self.top1_agreement_low >= self.min_agreement

    def certificate(self) -> list[str]:
        """What the held-out images prove, in sentences; none where agreement is unknown."""
        if self.top1_agreement is None or self.top1_agreement_low is None or not self.images_held_out:
            if self.min_agreement is None:
                return []
            return [f"NO GO: the agreement is unknown, {self.min_agreement:.1%} was asked for"]
        agreeing = round(self.top1_agreement * self.images_held_out)
        more = images_to_halve(agreeing, self.images_held_out)
        words = in_words(self.top1_agreement_low, self.crossfit)
        said = [f"{words}; {more:,} more held-out images would halve the interval"]
        if self.confidence_teacher is not None and self.confidence_student is not None:
            said.append(
                f"the teacher gives its answers {self.confidence_teacher:.1%} on average, the student its own "
                f"{self.confidence_student:.1%}"
            )
        if self.min_agreement is not None:
            said.append(
                f"{'GO' if self.go else 'NO GO'}: the lower end of the interval is {self.top1_agreement_low:.1%}, "
                f"{self.min_agreement:.1%} was asked for"
            )
        return said

    def _in_int8(self) -> list[str]:
        if not self.int8:
            return []
        told = self.int8
        lines = [
            f"float32 and INT8 on {told['runtime']}, threads {told['threads']}, batch {told['batch']}; agreement with "
            f"the {'student' if told['without_teacher'] else 'teacher'} on {told['images']:,} images:"
        ]
        for row in told["rows"]:
            share = "unknown" if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}"
            lines.append(f"  {row['name']}: {row['ms']:.3f} ms, {row['bytes'] / 1e6:.2f} MB, agreement {share}")
        return lines + ([f"note: without the teacher: {told['without_teacher']}"] if told["without_teacher"] else [])

    def table(self, width: int = 100, before_notes: Sequence[str] = ()) -> str:
        """Plain text for people, without colours. The notes come last, shortened; all of them are in the report."""
        from rich.console import Console
        from rich.table import Table

        table = Table("", "teacher", "student", box=None, pad_edge=False)
        for row in self._rows():
            table.add_row(*row)
        out = StringIO()
        Console(file=out, width=width, color_system=None, force_terminal=False).print(
            table, *self._remarks(), *before_notes, *self._notes(), sep="\n"
        )
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def _rows(self) -> list[tuple[str, str, str]]:
        def share(part: float | None, whole: float | None) -> str:
            return f"  ({part / whole:.1%} kept)" if part is not None and whole else ""

        macs = share(self.macs_student, self.macs_teacher)
        rows = [
            ("parameters", _count(self.params_teacher),
             _count(self.params_student) + share(self.params_student, self.params_teacher)),
            ("MACs, one image", _count(self.macs_teacher), _count(self.macs_student) + macs),
        ]  # fmt: skip
        if self.latency:
            told = self.latency
            where = f"ms on {told['runtime']}, threads {told['threads']}, batch {told['batch']}"
            between = f"  ({told['share']:.1%}; quartiles {told['share_low']:.1%} to {told['share_high']:.1%})"
            rows.append((where, f"{told['teacher_ms']:.3f}", f"{told['student_ms']:.3f}{between}"))
        if self.images_labelled:
            rows.append(
                (
                    f"top-1 on {self.images_labelled:,} labelled",
                    _percent(self.top1_teacher),
                    _percent(self.top1_student),
                )
            )
        return rows

    def _remarks(self) -> list[str]:
        """One line each; a figure that is unknown says so."""
        agreement = "unknown"
        if self.top1_agreement is not None:
            agreement = f"{self.top1_agreement:.1%}"
            if self.top1_agreement_low is not None and self.top1_agreement_high is not None:
                agreement += f" (95 % interval {self.top1_agreement_low:.1%} to {self.top1_agreement_high:.1%})"
        error = "unknown" if self.feature_error_relative is None else f"{self.feature_error_relative:.4f}"
        if self.feature_cosine is not None:
            error += f"; cosine {self.feature_cosine:.4f}"
        lines = [
            "",
            f"agreement with the teacher, top-1: {agreement}",
            f"feature error, relative: {error}",
            f"images: {_count(self.images_few)} few, of them {_count(self.images_choose)} to choose by; "
            f"{_count(self.images_held_out)} held out",
            *self.certificate(),
        ]
        if self.top1_difference is not None:
            between = ""
            if self.top1_difference_low is not None and self.top1_difference_high is not None:
                between = f" (95 % interval {self.top1_difference_low:+.2f} to {self.top1_difference_high:+.2f})"
            lines.append(f"student minus teacher: {self.top1_difference:+.2f} points{between}")
        if self.steps is not None or self.seconds is not None:
            lines.append(f"mimic: {_count(self.steps)} steps; all of it {_seconds(self.seconds)}")
        for other in self.alternatives:
            share = "unknown" if other["top1_agreement"] is None else f"{other['top1_agreement']:.1%}"
            lines.append(f"alternative, {other['name']}: agreement {share}, {_seconds(other['seconds'])}")
        for told in self.exports.values():
            lines.append(
                f"{told['file']}: {told['bytes'] / 1e6:.2f} MB, {told['precision']}, batch {told['batch']}; by itself "
                f"within {farthest(told):.0e} of the student"
            )
        lines += self._in_int8()
        if self.macs_not_counted:
            lines.append("not counted as MACs: " + ", ".join(self.macs_not_counted))
        return lines

    def _notes(self) -> list[str]:
        return ["", *(f"note: {shortened(note)}" for note in self.notes)] if self.notes else []


def shortened(note: str, most: int = 150) -> str:
    """At most so many characters, cut between words."""
    if len(note) <= most:
        return note
    return note[: most - 4].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def farthest(export: Mapping[str, Any]) -> float:
    """Of an entry of `Report.exports`: the largest difference of any output, on random and on real images."""
    return max(error for error in (export["error_random"], export["error_real"]) if error is not None)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} %"


def _seconds(value: float | None) -> str:
    return "unknown time" if value is None else f"{value:.1f} s"
