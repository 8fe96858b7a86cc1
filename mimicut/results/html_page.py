"""The report as one HTML page that stands alone: no network, no script, light and dark, for screens and for paper.

The page depends on report and plan alone, so that a stored result gives the same page again. Here its words and numbers
are put together as plain values; `page.html` lays them out, and Jinja escapes each of them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from mimicut.proof.certificate import in_words
from mimicut.results import layer_table
from mimicut.results.report import Report, int8_sentence, largest_error, where_measured
from mimicut.results.terms import TERMS, documentation, pieces
from mimicut.surgery.plan import Plan

_HASHES = 24  # of images that are printed; all of them are in report.json. Source: assumption.


def page(report: Report, plan: Plan) -> str:
    """The whole page as HTML. Figures that are unknown are left out.

    Args:
        report: The figures.
        plan: How the student was cut, and from which teacher.
    """
    source = plan.teacher.get("source") or {}
    return template("page.html").render(
        name=str(source.get("spec") or plan.teacher.get("class") or "the teacher"),
        budget=_budget(plan),
        certificate=_certificate(report),
        outputs=[*report.detection_lines(), *report.output_lines()],
        sizes=_sizes(report),
        more=_more(report),
        dropped=", ".join(plan.drop),
        widths=[
            {"name": name, "kept": kept, "whole": whole, "percent": f"{100 * kept / whole:.1f}"}
            for name, (kept, whole) in report.widths.items()
            if whole
        ],
        alternatives=_alternatives(report),
        int8=_int8(report),
        tradeoff=_tradeoff(report),
        losses=_losses(report),
        disagreements=[
            {"thumbnail": None, **each, **{who: _answer(report, each[who]) for who in ("teacher", "student")}}
            for each in report.disagreements
        ],
        classes=_classes(report),
        exports=_exports(report),
        export_remarks=_export_remarks(report),
        layer_header=layer_table.HEADER,
        layer_legend=layer_table.LEGEND,
        layers=_layers(report),
        feature_maps=report.feature_maps,
        notes=report.notes,
        manifest=_manifest(report, plan),
        details=_details(report, plan),
        terms=TERMS,
        documentation=documentation(),
    )


@cache
def template(name: str) -> Template:
    """A page that lies beside this file; every value that it is given is escaped."""
    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=here, autoescape=True, undefined=StrictUndefined)
    environment.filters["pieces"] = pieces
    return environment.get_template(name)


def _budget(plan: Plan) -> str:
    if plan.pruned_by is not None:
        return f"Pruned by another tool ({plan.pruned_by}), recovered by mimicut."
    named = {"keep": "of the MACs", "keep_width": "of every width", "params": "parameters", "size_mb": "MB"}
    budget = plan.budget
    limits = [
        f"{getattr(budget, key):g} {what}" for key, what in named.items() if getattr(budget, key, None) is not None
    ]
    if budget is not None and budget.drop:
        limits.append(f"without {', '.join(budget.drop)}")
    if plan.latency is not None:
        where = plan.latency.setting
        limits.append(
            f"{plan.latency.wanted_share} of the latency on {where.get('runtime')}, threads {where.get('threads')}, "
            f"batch {where.get('batch')}"
        )
    return f"Budget: {', '.join(limits)}." if limits else "Cut by a given plan."


def _certificate(report: Report) -> list[tuple[str, str]]:
    """Sentences with their kinds, "" for plain ones."""
    if report.top1_agreement is None or report.top1_agreement_low is None:
        remarks = [(f"{text}.", "nogo") for text in report.certificate()]
        if report.feature_error_relative is None:
            return remarks
        error = (
            f"Feature error {report.feature_error_relative:.4f} (0 is perfect, 1 no better than the mean feature) on "
            f"{report.images_held_out or 0:,} held-out images. The outputs are not one row of class scores, so there "
            "is no top-1 agreement."
        )
        return [(error, ""), *remarks]
    first, *rest = report.certificate() or [""]
    words = in_words(report.top1_agreement_low, report.crossfit)
    which = "that influenced nothing"
    if report.crossfit is not None:
        which = f"each held out once, in {report.crossfit} folds"
    high = report.top1_agreement_low if report.top1_agreement_high is None else report.top1_agreement_high
    agreement = (
        f"Top-1 agreement with the teacher {report.top1_agreement:.1%} on {report.images_held_out or 0:,} images "
        f"{which}; 95 % interval {report.top1_agreement_low:.1%} to {high:.1%}{first.removeprefix(words)}."
    )
    kinds = {"NO GO": "nogo", "GO": "go"}
    others = [(f"{_capital(text)}.", kinds.get(text.partition(":")[0], "")) for text in rest]
    return [(f"{_capital(words)}.", "big"), (agreement, ""), *others]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sizes(report: Report) -> list[list[str]]:
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("parameters", report.params_teacher, report.params_student, "{:,}"),
        ("MACs of one image", report.macs_teacher, report.macs_student, "{:,}"),
    ]
    if report.latency:
        rows.append(
            (where_measured(report.latency), report.latency["teacher_ms"], report.latency["student_ms"], "{:.3f}")
        )
    if report.images_labelled:
        rows.append(
            (f"top-1 on {report.images_labelled:,} labelled, %", report.top1_teacher, report.top1_student, "{:.2f}")
        )
    return [
        [what, form.format(a), form.format(b), f"{b / a:.1%}" if a else ""]
        for what, a, b, form in rows
        if a is not None and b is not None
    ]


def _more(report: Report) -> str:
    more = []
    if report.feature_error_relative is not None:
        more.append(f"feature error {report.feature_error_relative:.4f}")
    if report.feature_cosine is not None:
        more.append(f"feature cosine {report.feature_cosine:.4f}")
    if report.seconds is not None:
        more.append(f"the whole run took {report.seconds:.0f} s and {report.steps or 0:,} steps")
    return "; ".join(more)


def _alternatives(report: Report) -> list[dict[str, str]]:
    """For each way its agreement, with its interval and the length of a bar."""
    if not report.alternatives or report.top1_agreement is None:
        return []
    own = {
        "name": "this result", "seconds": None, "top1_agreement": report.top1_agreement,
        "top1_agreement_low": report.top1_agreement_low, "top1_agreement_high": report.top1_agreement_high,
    }  # fmt: skip
    return [
        {
            "name": way["name"] + ("" if way["seconds"] is None else f", {way['seconds']:.1f} s"),
            "percent": f"{100 * way['top1_agreement']:.1f}", **_share(way),
        }
        for way in [*report.alternatives, own]
        if way["top1_agreement"] is not None
    ]  # fmt: skip


def _share(row: Mapping[str, Any]) -> dict[str, str]:
    """An agreement and its interval, in words."""
    share, low, high = (row[f"top1_agreement{end}"] for end in ("", "_low", "_high"))
    known = low is not None and high is not None
    return {
        "share": "unknown" if share is None else f"{share:.1%}",
        "between": f"{low:.0%}-{high:.0%}" if share is not None and known else "",
    }


def _int8(report: Report) -> dict[str, Any] | None:
    table = report.int8
    if not table:
        return None
    reference = "student" if table["without_teacher"] else "teacher"
    text = (
        f"On {table['runtime']}, threads {table['threads']}, batch {table['batch']}, timed in turn; quantised on "
        f"{table['images_quantised_by']:,} images; agreement with the {reference} on {table['images']:,} others."
    )
    text += f" {int8_sentence(table)}."
    if table["without_teacher"]:
        text += f" Without the teacher: {table['without_teacher']}"
    rows = [
        {"cells": [row["name"], f"{row['ms']:.3f}", f"{row['share']:.1%}", f"{row['bytes'] / 1e6:.2f}"], **_share(row)}
        for row in table["rows"]
    ]
    return {"text": text, "rows": rows}


def _tradeoff(report: Report) -> dict[str, Any] | None:
    """Each network that was measured on one runtime: its agreement with the teacher over its share of the latency."""
    found: list[dict[str, Any]] = []
    if report.int8 and not report.int8["without_teacher"]:
        found = list(report.int8["rows"])
    elif report.latency:
        own = {"name": "student", "top1_agreement": report.top1_agreement, "share": report.latency["share"]}
        found = [{"name": "teacher", "top1_agreement": 1.0, "share": 1.0}, own]
    found += [
        {**way, "share": row["share"]} for row in found if row["name"] == "student" for way in report.alternatives
    ]
    known = [row for row in found if row["top1_agreement"] is not None]
    points = [(row["name"], 100 * row["share"], 100 * row["top1_agreement"]) for row in known]
    if len(points) < 2 or min(x for _, x, _ in points) <= 0:
        return None
    return _scatter(points, "latency, % of the teacher's", "agreement with the teacher, %")


def _scatter(points: Sequence[tuple[str, float, float]], x_name: str, y_name: str) -> dict[str, Any]:
    """A chart of points with their names, which are moved down where they would overlap."""
    wide, high, left, bottom, top, right = 480, 300, 50, 48, 24, 150
    x1, y1 = max(x for _, x, _ in points), 100.0
    y0 = y1 - 3 * 5 * max(1, math.ceil((y1 - min(y for *_, y in points)) / 15))  # marks at whole fives

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + x / x1 * (wide - left - right)
        return round(across, 1), round(top + (y1 - y) / (y1 - y0) * (high - top - bottom), 1)

    marks = [_mark(at, x1 * i / 3, y0 + (y1 - y0) * i / 3, ".3g", ".0f") for i in range(4)]
    placed: list[dict[str, Any]] = []
    for name, x, y in sorted(points, key=lambda p: -p[2]):
        across, down = at(x, y)
        line = down + 5
        while any(abs(line - p["line"]) < 15 and abs(across - p["across"]) < right for p in placed):
            line += 1
        placed.append({"name": name, "across": across, "down": down, "line": line})
    captions = [
        {"x": left, "y": high - 6, "text": x_name, "anchor": ""},
        {"x": 2, "y": 13, "text": y_name, "anchor": ""},
    ]
    return {
        "wide": wide, "high": high, "left": left, "end": wide - right, "x_marks_at": high - 28, "x_name": x_name,
        "y_name": y_name, "marks": marks, "line": "", "points": placed, "captions": captions,
    }  # fmt: skip


def _mark(at: Any, x: float, y: float, x_form: str, y_form: str, shown: float | None = None) -> dict[str, Any]:
    """A mark on both axes. shown: what is written beside y, where that is another number."""
    across, down = at(x, y)
    return {"across": across, "down": down, "x": format(x, x_form), "y": format(y if shown is None else shown, y_form)}


def _losses(report: Report) -> dict[str, Any] | None:
    points = [(step, loss) for step, loss in report.losses if loss is not None and loss > 0]
    if len(points) < 2:
        return None
    return _line_chart(points, "step", "loss")


def _line_chart(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> dict[str, Any]:
    """A chart of one line over a logarithmic axis; each axis has four marks."""
    wide, high, left, bottom, top = 480, 230, 66, 44, 12
    xs = [x for x, _ in points]
    ys = [math.log10(y) for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (wide - left - 12)
        return round(across, 1), round(top + (y1 - y) / (y1 - y0) * (high - top - bottom), 1)

    thirds = [(x0 + (x1 - x0) * i / 3, y0 + (y1 - y0) * i / 3) for i in range(4)]
    line = " ".join(f"{x},{y}" for x, y in (at(x, y) for x, y in zip(xs, ys, strict=True)))
    captions = [
        {"x": wide - 12, "y": high - 3, "text": x_name, "anchor": "end"},
        {"x": left, "y": high - 3, "text": f"{y_name}, logarithmic", "anchor": ""},
    ]
    return {
        "wide": wide, "high": high, "left": left, "end": wide - 12, "x_marks_at": high - 24, "x_name": x_name,
        "y_name": y_name, "marks": [_mark(at, x, y, ".4g", ".3g", 10**y) for x, y in thirds], "line": line,
        "points": [], "captions": captions,
    }  # fmt: skip


def _answer(report: Report, answer: Sequence[Any]) -> str:
    return f"{_class(report, answer[0])} ({answer[1]:.0%})"


def _class(report: Report, number: int | str) -> str:
    """The name of a class, where it is known."""
    return report.class_names.get(str(number), f"class {number}")


def _classes(report: Report) -> list[list[str]]:
    """Lowest agreement first."""
    rows = sorted(report.agreement_by_class.items(), key=lambda item: item[1][0] / item[1][1])
    return [
        [_class(report, name), f"{agree:,} of {images:,}", f"{agree / images:.1%}"] for name, (agree, images) in rows
    ]


def _exports(report: Report) -> list[list[Any]]:
    rows = []
    for e in report.exports.values():
        within = "" if e["tolerance"] is None else f" of at most {e['tolerance']:.0e}"
        size, error = f"{e['bytes'] / 1e6:.2f} MB", largest_error(e)
        shown = "not run" if error is None else f"{error:.0e}{within}"
        rows.append([e["file"], size, e["precision"], e["batch"], e["opset"] or "", shown])
    return rows


def _export_remarks(report: Report) -> list[str]:
    remarks = []
    for e in report.exports.values():
        real = "random and real images" if e["error_real"] is not None else "random images"
        compared = e.get("not_run") or f"compared on {real}"
        remarks.append(f"{e['file']}: {compared}" + ("; it normalises by itself" if e.get("normalises") else ""))
        if e["fixed_because"]:
            remarks[-1] += f"; its batch is fixed: {e['fixed_because']}"
        if e.get("size_fixed_because"):
            remarks[-1] += f"; its height and width are fixed: {e['size_fixed_because']}"
        elif e.get("size") == "any":
            remarks[-1] += "; it takes images of any height and width"
    return remarks


def _layers(report: Report) -> list[dict[str, Any]]:
    """For each file whose layers were compared: sentences and rows."""
    return [
        {
            "title": layer_table.title(e), "verdict": layer_table.verdict(e),
            "rows": [
                {"cells": cells, "remark": remark, "jumps": cells[0] == layers["jump"]}
                for cells, remark in zip(layer_table.layer_rows(layers), layer_table.remarks(layers), strict=True)
            ],
        }
        for e in report.exports.values() if (layers := e.get("layers"))
    ]  # fmt: skip


def _manifest(report: Report, plan: Plan) -> list[tuple[str, str]]:
    digest = sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()
    seed = (report.config.get("mimic") or {}).get("seed")
    entries = {
        "plan": f"sha256 {digest}",
        "seeds": f"recipe {seed}, plan {None if plan.budget is None else plan.budget.seed}",
        "images": f"{report.images_few or 0:,} to learn from, {report.images_choose or 0:,} of them to choose the best "
        f"step by; {report.images_held_out or 0:,} held out",
        "extra images": "; ".join(line.removeprefix("extra images: ") for line in report.extra_lines()),
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
        "machine": ", ".join(f"{k} {v}" for k, v in report.platform.items() if v is not None),
        "not counted as MACs": ", ".join(report.macs_not_counted),
    }
    return [(key, value) for key, value in entries.items() if value]


def _details(report: Report, plan: Plan) -> list[tuple[str, str]]:
    """What is unfolded on request: its summary and its text."""
    recipe = json.dumps(report.config.get("mimic") or {}, indent=1)
    options = json.dumps(plan.budget and plan.budget.to_json(), indent=1)
    hashes = [_hashes(use, hashes) for use, hashes in report.image_hashes.items() if hashes]
    return [*hashes, ("The recipe", recipe), ("Budget and options", options)]


def _hashes(use: str, hashes: Sequence[str]) -> tuple[str, str]:
    named = {
        "fit": "Images to learn from",
        "choose": "Images to choose the best step by",
        "held_out": "Held-out images",
        "extra": "Extra images",
    }
    whole = sha256("\n".join(hashes).encode()).hexdigest()
    more = f"\n... and {len(hashes) - _HASHES:,} more, in report.json" if len(hashes) > _HASHES else ""
    return f"{named.get(use, use)}: {len(hashes):,}, together sha256 {whole[:16]}", "\n".join(hashes[:_HASHES]) + more
