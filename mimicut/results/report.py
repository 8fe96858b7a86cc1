"""The report of a compression: plain data, to and from JSON, and a table for people. It knows no model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from math import isfinite
from typing import Any

from mimicut.base.errors import StoreError
from mimicut.base.schema import faults
from mimicut.proof.certificate import images_to_halve, in_words
from mimicut.results.report_schema import ReportFields
from mimicut.surgery.seam import AGREEING


@dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one compression. None means unknown.

    Attributes:
        params_teacher, params_student: Number of parameters.
        macs_teacher, macs_student: Multiply-accumulates of one image, head included.
        macs_not_counted: Operators whose cost is not in those numbers.
        top1_agreement: Share (0 to 1) of the held-out images for which teacher and student name the same class.
        top1_agreement_low, top1_agreement_high: Its exact 95 % interval.
        feature_error_relative, feature_cosine, agreement_by_class, confidence_teacher, confidence_student,
            disagreements: As in `proof.figures.Figures`.
        outputs: Each tensor that the network returns, as `proof.output_figures.OutputFigures` has it.
        detections: As `proof.detections.DetectionFigures`; None where the output is no boxes.
        feature_maps: Of a few held-out images a thumbnail, and where the features of teacher and student are strong, as
            grey pictures (data URIs; as in `proof.figures.Figures`).
        class_names: Class number -> its name, where the teacher's library or the user gives it.
        widths: Group -> [units that stay, units of the teacher].
        losses: [step, loss] of the mimic stage, at most a few hundred.
        min_agreement: What the lower end of the agreement's interval was required to reach, for every output with one.
        max_error: What the upper end of the error's interval was allowed to reach, for every output that is no classes.
        top1_teacher, top1_student: Accuracy on labelled images, in percent.
        top1_difference: Student minus teacher, in percentage points; top1_difference_low and top1_difference_high are
            its 95 % interval (paired).
        map50_teacher, map50_student, map_teacher, map_student, objects_labelled: As
            `proof.detections.DetectionAccuracy`, where boxes are marked in the labelled images.
        images_few: Images that the student learned from, those of images_choose included.
        images_choose: Images to choose the best step by.
        images_extra: Images of anything that only helped to mimic.
        pictures_extra: The pictures that these are crops of, or are; None if they are drawn.
        extra: Where these come from, "generated" or "given"; None if there are none.
        images_held_out, images_labelled: Images that only measure.
        image_hashes: "fit", "choose" and "held_out" -> SHA-256 of each file or array, and "extra" where
            pictures were given.
        images_check: What was found in the images to learn from, as `image_check.ImageCheck` has it.
        latency: Both networks on the runtime for which a latency was requested, as `budgets.compared` has it.
        exports: Format -> file name, bytes, opset, and its difference from the student in a process of its own, as
            `export_checks.check_exports` has it; "layers", where asked for, as `layer_errors` has it.
        int8: Teacher and student in float32 and in INT8, as `int8_table` has it.
        alternatives: Cheaper ways to recover the same cut, as `alternatives` has them.
        crossfit: Number of folds, where the figures of agreement and features are from `crossfit`.
        steps: Steps of the mimic stage.
        seconds: Wall time of the whole run.
        config: The recipe. Seam, budget and preprocessing are in the plan.
        versions, platform: What the result was made with.
        notes: Sentences that a person should see.
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
    outputs: tuple[dict[str, Any], ...] = ()
    detections: dict[str, Any] | None = None
    feature_maps: tuple[dict[str, Any], ...] = ()
    class_names: dict[str, str] = field(default_factory=dict)
    widths: dict[str, Any] = field(default_factory=dict)
    losses: tuple[Any, ...] = ()
    min_agreement: float | None = None
    max_error: float | None = None
    top1_teacher: float | None = None
    top1_student: float | None = None
    top1_difference: float | None = None
    top1_difference_low: float | None = None
    top1_difference_high: float | None = None
    map50_teacher: float | None = None
    map50_student: float | None = None
    map_teacher: float | None = None
    map_student: float | None = None
    objects_labelled: int | None = None
    images_few: int | None = None
    images_choose: int | None = None
    images_extra: int | None = None
    pictures_extra: int | None = None
    extra: str | None = None
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
        """The report that `to_json` wrote.

        Raises:
            StoreError: An entry is no field of a report, or of another type.
        """
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise StoreError(
                f"reading a report: unknown entries {', '.join(unknown)}; it was edited, or made by a newer release: "
                "then update mimicut (pip install --upgrade mimicut)"
            )
        wrong = faults(data, ReportFields)
        if wrong:
            raise StoreError(
                f"reading a report: {'; '.join(wrong)}; it was edited, or is damaged: copy the folder again"
            )
        for name in ("top1_agreement", "top1_difference"):
            if len({data.get(f"{name}{end}") is None for end in ("", "_low", "_high")}) > 1:
                raise StoreError(f"reading a report: {name} stands without its interval, or the interval without it")
        tuples = ("macs_not_counted", "notes", "disagreements", "losses", "alternatives", "outputs", "feature_maps")
        lists = {key: tuple(data[key]) for key in tuples if key in data}
        return cls(**{**data, **lists})

    @property
    def go(self) -> bool | None:
        """Whether every output reaches min_agreement or max_error; None where neither is set."""
        if self.min_agreement is None and self.max_error is None:
            return None
        return all(reached for _, reached in self._verdicts())

    def _verdicts(self) -> list[tuple[str, bool]]:
        """For each threshold and output a sentence, and whether it is reached."""
        found = []
        if self.min_agreement is not None:
            lows = {_name(o): o["agreement_low"] for o in self.outputs if o["kind"] in AGREEING}
            if self.detections is not None:
                lows["the objects"] = self.detections["agreement_low"]
            for name, low in (lows or {"": self.top1_agreement_low}).items():
                if low is None:
                    which = f" at {name}" if len(lows) > 1 else ""
                    words = f"the agreement{which} is unknown, but at least {self.min_agreement:.1%} was required"
                    found.append((words, False))
                    continue
                whose = f"of the agreement at {name}" if len(lows) > 1 else "of the interval"
                words = f"the lower end {whose} is {low:.1%}, at least {self.min_agreement:.1%} was required"
                found.append((words, low >= self.min_agreement))
            if self.int8 is not None and self.int8.get("required"):
                found.append(self._verdict_in_int8(self.min_agreement))
        if self.max_error is not None:
            others = [o for o in self.outputs if o["kind"] not in AGREEING]
            highs = {_name(o): o["error_high"] for o in others if o["error"] is not None} or dict.fromkeys(
                map(_name, others)
            )
            for name, high in (highs or {"": None}).items():
                if high is None:
                    which = f" at {name}" if len(highs) > 1 else ""
                    found.append((f"the error{which} is unknown, but at most {self.max_error:g} was allowed", False))
                    continue
                whose = f" at {name}" if len(highs) > 1 else ""
                words = f"the upper end of the error{whose} is {high:.4f}, at most {self.max_error:g} was allowed"
                found.append((words, high <= self.max_error))
        return found

    def _verdict_lines(self) -> list[str]:
        return [f"{'GO' if reached else 'NO GO'}: {words}" for words, reached in self._verdicts()]

    @property
    def learned_hashes(self) -> list[str]:
        """Hashes of all images that the student learned from, extra ones included: none of them can certify it."""
        return [one for part in ("fit", "choose", "extra") for one in self.image_hashes.get(part, [])]

    def extra_lines(self) -> list[str]:
        """What the extra images were; nothing where there were none."""
        if not self.images_extra:
            return []
        said = f"{_count(self.images_extra)} drawn pictures"
        if self.extra == "given":
            said = f"{_count(self.pictures_extra)} given pictures"
            if self.images_extra != self.pictures_extra:
                said += f" ({_count(self.images_extra)} crops of them)"
        rehearsal = (self.config.get("recovery") or {}).get("rehearsal") or {}
        without, tried = rehearsal.get("without_extra"), rehearsal.get("tried")
        worth = ""
        if without is not None and tried:
            steps, error = rehearsal.get("longer") or (rehearsal["steps"], tried[-1][1])
            worth = (
                f"; after {steps} trial steps the feature error on {rehearsal['images']} images set aside "
                f"was {error:.3f} with them and {without:.3f} without"
            )
        return [f"extra images: {said}, which only helped to mimic{worth}"]

    def detection_lines(self) -> list[str]:
        """How far a detector finds what its teacher finds; nothing for other networks."""
        if self.detections is None:
            return []
        found = self.detections
        if found["agreement"] is None:
            return [f"objects: neither network finds one with a score of at least {found['least_score']}"]
        low, high = found["agreement_low"], found["agreement_high"]
        theirs, ours, both = (_count(found[f"objects_{which}"]) for which in ("teacher", "student", "matched"))
        lines = [
            f"objects, agreement with the teacher: {found['agreement']:.1%} (95 % interval {low:.1%} to {high:.1%}); "
            f"the teacher finds {theirs}, the student {ours}, and {both} match (same class, IoU of at least "
            f"{found['least_iou']}, score of at least {found['least_score']}), "
            f"in {_count(found['images_with_objects'])} images"
        ]
        if found["map50"] is not None:
            lines.append(
                "mean average precision with the teacher's objects as the truth: "
                f"{found['map50']:.3f} at IoU 0.5, {found['map']:.3f} at 0.5 to 0.95"
            )
        return lines

    def _verdict_in_int8(self, least: float) -> tuple[str, bool]:
        assert self.int8 is not None
        low = next(row["top1_agreement_low"] for row in self.int8["rows"] if row["name"] == "student, INT8")
        if low is None:
            return f"the agreement in INT8 is unknown, but at least {least:.1%} was required", False
        return f"in INT8 the lower end of the interval is {low:.1%}, at least {least:.1%} was required", low >= least

    def certificate(self) -> list[str]:
        """Sentences on what the held-out images prove; none where agreement is unknown and no threshold is set."""
        if self.top1_agreement is None or self.top1_agreement_low is None or not self.images_held_out:
            return self._verdict_lines()
        agreeing = round(self.top1_agreement * self.images_held_out)
        more = images_to_halve(agreeing, self.images_held_out)
        words = in_words(self.top1_agreement_low, self.crossfit)
        sentences = [f"{words}; {more:,} more held-out images would halve the interval"]
        if self.confidence_teacher is not None and self.confidence_student is not None:
            sentences.append(
                f"mean confidence in their own answers: teacher {self.confidence_teacher:.1%}, student "
                f"{self.confidence_student:.1%}"
            )
        return sentences + self._verdict_lines()

    def output_lines(self) -> list[str]:
        """A sentence for each output but a single row of class scores, of which the agreement says all."""
        if len(self.outputs) == 1 and self.outputs[0]["kind"] == "scores" and self.top1_agreement is not None:
            return []
        return [_output_line(output) for output in self.outputs]

    def _in_int8(self) -> list[str]:
        if not self.int8:
            return []
        table = self.int8
        lines = [
            f"float32 and INT8 on {table['runtime']}, threads {table['threads']}, batch {table['batch']}; agreement "
            f"with the {'student' if table['without_teacher'] else 'teacher'} on {table['images']:,} images:"
        ]
        for row in table["rows"]:
            share = "unknown" if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}"
            lines.append(f"  {row['name']}: {row['ms']:.3f} ms, {row['bytes'] / 1e6:.2f} MB, agreement {share}")
        lines += [int8_sentence(table)]
        return lines + ([f"note: without the teacher: {table['without_teacher']}"] if table["without_teacher"] else [])

    def table(self, width: int = 100, before_notes: Sequence[str] = ()) -> str:
        """Plain text for people, `width` columns wide, without colours. The notes come last, shortened, after
        `before_notes`."""
        from rich.console import Console
        from rich.table import Table

        table = Table("", "teacher", "student", box=None, pad_edge=False)
        for row in self._rows():
            table.add_row(*row)
        out = StringIO()
        console = Console(
            file=out, width=width, color_system=None, force_terminal=False, markup=False, emoji=False, highlight=False
        )
        console.print(table, *self._remarks(), *before_notes, *self._notes(), sep="\n")
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
            latency = self.latency
            between = f"  ({latency['share']:.1%}; quartiles {latency['share_low']:.1%} to {latency['share_high']:.1%})"
            rows.append(
                (where_measured(latency), f"{latency['teacher_ms']:.3f}", f"{latency['student_ms']:.3f}{between}")
            )
        where = f"{self.images_labelled or 0:,} labelled"
        if self.images_labelled and self.objects_labelled is not None:
            for name, theirs, ours in (
                ("IoU 0.5", self.map50_teacher, self.map50_student),
                ("0.5 to 0.95", self.map_teacher, self.map_student),
            ):
                first, second = ("unknown" if one is None else f"{one:.3f}" for one in (theirs, ours))
                rows.append((f"mean average precision, {name}, on {where}", first, second))
        elif self.images_labelled:
            rows.append((f"top-1 on {where}", _percent(self.top1_teacher), _percent(self.top1_student)))
        return rows

    def _remarks(self) -> list[str]:
        """Lines under the table; an unknown figure is named as such."""
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
            *(
                []
                if self.outputs and self.top1_agreement is None
                else [f"agreement with the teacher, top-1: {agreement}"]
            ),
            *self.detection_lines(),
            *self.output_lines(),
            *self._guesses(),
            f"feature error, relative: {error}",
            f"images: {_count(self.images_few)} to learn from, {_count(self.images_choose)} of them to choose the best "
            f"step by; {_count(self.images_held_out)} held out",
            *self.extra_lines(),
            *self.certificate(),
        ]
        if self.top1_difference is not None:
            between = ""
            if self.top1_difference_low is not None and self.top1_difference_high is not None:
                between = f" (95 % interval {self.top1_difference_low:+.2f} to {self.top1_difference_high:+.2f})"
            lines.append(f"student minus teacher: {self.top1_difference:+.2f} points{between}")
        if self.steps is not None or self.seconds is not None:
            lines.append(f"mimic: {_count(self.steps)} steps; the whole run took {_seconds(self.seconds)}")
        for other in self.alternatives:
            share = "unknown" if other["top1_agreement"] is None else f"{other['top1_agreement']:.1%}"
            lines.append(f"alternative, {other['name']}: agreement {share}, {_seconds(other['seconds'])}")
        for export in self.exports.values():
            if export.get("size_fixed_because"):
                lines.append(shortened(f"{export['file']} takes one size only: {export['size_fixed_because']}"))
            largest = largest_error(export)
            lines.append(
                f"{export['file']}: {export['bytes'] / 1e6:.2f} MB, {export['precision']}, batch {export['batch']}"
                f"{', any height and width' if export.get('size') == 'any' else ''}; "
                + (f"not run: {export.get('not_run')}" if largest is None
                   else f"run by itself, it is within {largest:.0e} of the student")
            )  # fmt: skip
        lines += self._in_int8()
        if self.macs_not_counted:
            lines.append("not counted as MACs: " + ", ".join(self.macs_not_counted))
        return lines

    def _guesses(self) -> list[str]:
        """Which outputs are taken for classes by their shape alone. Where the classes have names, they are classes."""
        taken = [each for each in self.outputs if each.get("guessed") and not self.class_names]
        if not taken:
            return []
        kinds = ", ".join(f"{_name(each)} {each['kind']}" for each in taken)
        return [f"guessed from the shape: {kinds}; if that is wrong, say what it is (--output)"]

    def _notes(self) -> list[str]:
        return ["", *(f"note: {shortened(note, 400)}" for note in self.notes)] if self.notes else []


def _name(output: Mapping[str, Any]) -> str:
    return f"output {output['part']}" if output["part"] else "the output"


_AGREE = {"scores": "names the same class for {}", "multilabel": "agrees on {} of the labels",
          "map": "names the same class at {} of the positions"}  # fmt: skip


def where_measured(latency: Mapping[str, Any]) -> str:
    """The unit of a measured latency, and where it was measured."""
    in_int8 = ", the student in INT8" if latency.get("precision") == "int8" else ""
    return f"ms on {latency['runtime']}, threads {latency['threads']}, batch {latency['batch']}{in_int8}"


def int8_sentence(table: Mapping[str, Any]) -> str:
    """How the INT8 file was made: the bits of its weights, and what it learned in INT8."""
    mimic, bits = table.get("mimic"), table.get("weight_bits")
    weights = f"INT8 with weights of {bits} bits" if bits else "INT8"
    if mimic is None:
        return f"{weights}, rounded after training"
    if mimic.get("failed"):
        return f"{weights}, rounded after training; it did not mimic in INT8: {mimic['failed']}"
    others = f"on {mimic['judged_by']} other images"
    if not mimic["kept"]:
        return (
            f"{weights}, rounded after training: {mimic['steps']} steps of mimicking in INT8 did not clearly lower its "
            f"error {others}, so the file stays as it was rounded"
        )
    return (
        f"{weights}, mimicked for {mimic['kept']} steps in INT8 on {mimic['images']} images; {others}, "
        f"by which the step was chosen, its loss against float32 fell from {mimic['error_before']:.3g} to "
        f"{mimic['error']:.3g}"
        + (f"; {left} tensors were rounded in the file alone" if (left := mimic.get("unrounded")) else "")
    )


def _output_line(output: Mapping[str, Any]) -> str:
    """What became of an output, in one sentence."""

    def between(name: str, form: str) -> str:
        low, high = output[f"{name}_low"], output[f"{name}_high"]
        return "" if low is None else f" ({format(low, form)} to {format(high, form)})"

    parts = []
    if output["agreement"] is not None:
        share = f"{output['agreement']:.1%}" + between("agreement", ".1%")
        parts.append(_AGREE[output["kind"]].format(share))
        if output["overlap"] is not None:
            parts.append(f"intersection over union {output['overlap']:.3f}")
    if output["cosine"] is not None:
        parts.append(f"cosine {output['cosine']:.4f}" + between("cosine", ".4f"))
    if output["neighbours"] is not None:
        near = f"of the {output['nearest']} nearest images" if output.get("nearest") else "of the nearest images"
        parts.append(f"{output['neighbours']:.1%} {near} of each kept" + between("neighbours", ".1%"))
    error = "unknown" if output["error"] is None else f"{output['error']:.4f}" + between("error", ".4f")
    parts.append(f"relative error {error}")
    if output["correlation"] is not None:
        parts.append(f"correlation {output['correlation']:.4f}")
    if output["psnr"] is not None:
        parts.append(f"PSNR {output['psnr']:.1f} dB")
    kind = "" if output["imitated"] else ", not imitated"
    return f"{_name(output)} ({output['kind']}{kind}): {'; '.join(parts)}"


def shortened(note: str, most: int = 150) -> str:
    """A note cut between words to at most `most` characters.

    >>> shortened("a long sentence about a model", 16)
    'a long ...'
    """
    if len(note) <= most:
        return note
    return note[: most - 4].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def largest_error(export: Mapping[str, Any]) -> float | None:
    """The largest difference in an entry of `Report.exports`: of any output, on random and on real images; None where
    the file was not run."""
    return max((error for error in (export["error_random"], export["error_real"]) if error is not None), default=None)


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
