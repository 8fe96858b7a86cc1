"""The report as one HTML page that stands alone: no network, no script, light and dark, for screens and for paper.

The page depends on report and plan alone, so that a stored result gives the same page again.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from typing import Any

from mimicut.proof.certificate import in_words
from mimicut.results.report import Report, largest_error
from mimicut.surgery.plan import Plan

_HASHES = 24  # of images that are printed; all of them are in report.json. Source: assumption.
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2430; --soft: #5a6675; --line: #d9dee5; --fill: #eef1f5;
  --accent: #1f6f8b; --cut: #c9d3dc; --good: #1a7f4b; --bad: #b3362b; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e5e9ee; --soft: #9aa6b3; --line: #313a45;
  --fill: #1d232b; --accent: #62b6d1; --cut: #3a4653; --good: #5fcf95; --bad: #f0877d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .scroll { overflow-x: auto; }
.card { background: var(--fill); border-radius: .5rem; padding: .8rem 1rem; } .big { font-size: 1.15rem; }
.go { color: var(--good); font-weight: 600; } .nogo { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: normal; }
  th { font-weight: 600; color: var(--soft); }
svg { display: block; width: 100%; max-width: 40rem; height: auto; } svg text { fill: var(--ink);
  font: 14px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } svg .soft { fill: var(--soft); }
.bars { display: grid; grid-template-columns: minmax(7rem, 16rem) 1fr 7rem; gap: .15rem .6rem; align-items: center;
  font-size: .85rem; } .bars .bar { background: var(--cut); height: .75rem; border-radius: .2rem; overflow: hidden; }
.bars .bar i { display: block; height: 100%; background: var(--accent); } .bars .n { text-align: right; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; font-size: .85rem; } figure img { width: 100%; max-width: 9.5rem; image-rendering: pixelated;
  border-radius: .3rem; display: block; } details { margin: .4rem 0; } summary { cursor: pointer; }
code, pre { font: .82rem/1.45 ui-monospace, monospace; } pre { white-space: pre-wrap; margin: .3rem 0; }
@media (max-width: 480px) { th, td { padding: .3rem .25rem; }
  svg { overflow: visible; margin-top: .6rem; } svg text { font-size: 18px; }
  .bars { grid-template-columns: 1fr 6rem; } .bars .name { grid-column: 1 / -1; } }
@media print { body { max-width: none; font-size: 11pt; } h2, figure, .card { break-inside: avoid; } }
"""


def page(report: Report, plan: Plan) -> str:
    """The whole page as HTML. Figures that are unknown are left out.

    Args:
        report: The figures.
        plan: How the student was cut, and from which teacher.
    """
    source = plan.teacher.get("source") or {}
    name = str(source.get("spec") or plan.teacher.get("class") or "the teacher")
    parts = [
        f"<h1>Student of {escape(name)}</h1>",
        f'<p class="soft">{escape(_budget(plan))}</p>',
        _certificate(report),
        _section("Teacher and student", _sizes(report)),
        _section("Widths and blocks", _widths(report, plan)),
        _section("Cheaper alternatives", _alternatives(report)),
        _section("Float32 and INT8", _int8(report)),
        _section("Agreement against latency", _tradeoff(report)),
        _section("Loss over steps", _losses(report)),
        _section("Answered differently", _disagreements(report)),
        _section("Agreement by the teacher's answer", _classes(report)),
        _section("Files", _exports(report)),
        _section("Notes", _list(report.notes)),
        _section("Manifest", _manifest(report, plan)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>Student of {escape(name)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{''.join(p for p in parts if p)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


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


def _certificate(report: Report) -> str:
    if report.top1_agreement is None or report.top1_agreement_low is None:
        remarks = "".join(f'<p class="nogo">{escape(text)}.</p>' for text in report.certificate())
        if report.feature_error_relative is None:
            return f'<div class="card">{remarks}</div>' if remarks else ""
        return (
            f'<div class="card"><p>Feature error {report.feature_error_relative:.4f} (0 is perfect, 1 no better than '
            f"the mean feature) on {report.images_held_out:,} held-out images. The outputs are not one row of class "
            f"scores, so there is no top-1 agreement.</p>{_outputs(report)}{remarks}"
            "</div>"
        )
    first, *rest = report.certificate()
    words = in_words(report.top1_agreement_low, report.crossfit)
    lines = [f'<p class="big">{escape(words[0].upper() + words[1:])}.</p>']
    which = "that influenced nothing"
    if report.crossfit is not None:
        which = f"each held out once, in {report.crossfit} folds"
    lines.append(
        f"<p>Top-1 agreement with the teacher {report.top1_agreement:.1%} on {report.images_held_out:,} images {which};"
        f" 95 % interval {report.top1_agreement_low:.1%} to {report.top1_agreement_high:.1%}"
        f"{escape(first.removeprefix(words))}.</p>"
    )
    for text in rest:
        kind = ' class="nogo"' if text.startswith("NO GO") else ' class="go"' if text.startswith("GO") else ""
        lines.append(f"<p{kind}>{escape(text[0].upper() + text[1:])}.</p>")
    return f'<div class="card">{"".join(lines)}{_outputs(report)}</div>\n'


def _outputs(report: Report) -> str:
    """A line for what a detector finds, and one for each output."""
    items = "".join(f"<li>{escape(line)}</li>" for line in (*report.detection_lines(), *report.output_lines()))
    return f"<ul>{items}</ul>" if items else ""


def _sizes(report: Report) -> str:
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("parameters", report.params_teacher, report.params_student, "{:,}"),
        ("MACs of one image", report.macs_teacher, report.macs_student, "{:,}"),
    ]
    if report.latency:
        how = f"ms on {report.latency['runtime']}, threads {report.latency['threads']}, batch {report.latency['batch']}"
        rows.append((how, report.latency["teacher_ms"], report.latency["student_ms"], "{:.3f}"))
    if report.images_labelled:
        rows.append(
            (f"top-1 on {report.images_labelled:,} labelled, %", report.top1_teacher, report.top1_student, "{:.2f}")
        )
    body = "".join(
        f"<tr><td>{escape(what)}</td><td>{form.format(a)}</td><td>{form.format(b)}</td>"
        f"<td>{f'{b / a:.1%}' if a else ''}</td></tr>"
        for what, a, b, form in rows
        if a is not None and b is not None
    )
    more = []
    if report.feature_error_relative is not None:
        more.append(f"feature error {report.feature_error_relative:.4f}")
    if report.feature_cosine is not None:
        more.append(f"feature cosine {report.feature_cosine:.4f}")
    if report.seconds is not None:
        more.append(f"the whole run took {report.seconds:.0f} s and {report.steps or 0:,} steps")
    table = f"<table><tr><th></th><th>teacher</th><th>student</th><th>student / teacher</th></tr>{body}</table>"
    return f'<div class="scroll">{table}</div><p class="soft">{escape("; ".join(more))}</p>' if body else ""


def _widths(report: Report, plan: Plan) -> str:
    rows = "".join(
        f'<span class="name">{escape(name)}</span><span class="bar"><i style="width:{100 * kept / whole:.1f}%"></i>'
        f'</span><span class="n">{kept} of {whole}</span>'
        for name, (kept, whole) in report.widths.items()
        if whole
    )
    dropped = f"<p>Dropped blocks: {escape(', '.join(plan.drop))}.</p>" if plan.drop else ""
    return dropped + (f'<div class="bars">{rows}</div>' if rows else "")


def _alternatives(report: Report) -> str:
    """A bar for the agreement of each way, with its interval."""
    if not report.alternatives or report.top1_agreement is None:
        return ""
    own = {
        "name": "this result", "seconds": None, "top1_agreement": report.top1_agreement,
        "top1_agreement_low": report.top1_agreement_low, "top1_agreement_high": report.top1_agreement_high,
    }  # fmt: skip
    rows = "".join(
        f'<span class="name">{escape(way["name"])}{_time(way["seconds"])}</span><span class="bar">'
        f'<i style="width:{100 * way["top1_agreement"]:.1f}%"></i></span><span class="n">{way["top1_agreement"]:.1%} '
        f"<span class='soft'>{way['top1_agreement_low']:.0%}-{way['top1_agreement_high']:.0%}</span></span>"
        for way in [*report.alternatives, own]
        if way["top1_agreement"] is not None
    )
    text = "Agreement with the teacher on the held-out images, with its 95 % interval, for the same cut."
    return f'<p class="soft">{text}</p><div class="bars">{rows}</div>'


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f", {seconds:.1f} s"


def _losses(report: Report) -> str:
    points = [(step, loss) for step, loss in report.losses if loss > 0]
    if len(points) < 2:
        return ""
    return _line_chart(points, "step", "loss", log=True)


def _int8(report: Report) -> str:
    table = report.int8
    if not table:
        return ""
    reference = "student" if table["without_teacher"] else "teacher"
    text = (
        f"On {table['runtime']}, threads {table['threads']}, batch {table['batch']}, timed in turn; quantised on "
        f"{table['images_quantised_by']:,} images; agreement with the {reference} on {table['images']:,} others."
    )
    body = "".join(
        f"<tr><td>{escape(row['name'])}</td><td>{row['ms']:.3f}</td><td>{row['share']:.1%}</td>"
        f"<td>{row['bytes'] / 1e6:.2f}</td><td>{_share(row)}</td></tr>"
        for row in table["rows"]
    )
    head = "<tr><th></th><th>ms</th><th>relative to the first</th><th>MB</th><th>agreement</th></tr>"
    if table["without_teacher"]:
        text += f" Without the teacher: {table['without_teacher']}"
    return f'<p class="soft">{escape(text)}</p><div class="scroll"><table>{head}{body}</table></div>'


def _share(row: Mapping[str, Any]) -> str:
    if row["top1_agreement"] is None:
        return "unknown"
    low, high = row["top1_agreement_low"], row["top1_agreement_high"]
    return f"{row['top1_agreement']:.1%} <span class='soft'>{low:.0%}-{high:.0%}</span>"


def _tradeoff(report: Report) -> str:
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
    return _scatter(points, "latency, % of the teacher's", "agreement with the teacher, %") if len(points) > 1 else ""


def _scatter(points: Sequence[tuple[str, float, float]], x_name: str, y_name: str) -> str:
    """A chart of points with their names, which are moved down where they would overlap."""
    wide, high, left, bottom, top, right = 480, 300, 50, 48, 24, 150
    x1, y1 = max(x for _, x, _ in points), 100.0
    y0 = y1 - 3 * 5 * max(1, math.ceil((y1 - min(y for *_, y in points)) / 15))  # marks at whole fives

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + x / x1 * (wide - left - right)
        return round(across, 1), round(top + (y1 - y) / (y1 - y0) * (high - top - bottom), 1)

    marks = []
    for i in range(4):
        x, y = x1 * i / 3, y0 + (y1 - y0) * i / 3
        across, down = at(x, y)
        marks.append(
            f'<line class="axis" x1="{left}" x2="{wide - right}" y1="{down}" y2="{down}"/>'
            f'<text class="soft" x="{left - 6}" y="{down + 4}" text-anchor="end">{y:.0f}</text>'
            f'<text class="soft" x="{across}" y="{high - 28}" text-anchor="middle">{x:.3g}</text>'
        )
    taken: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda p: -p[2]):
        across, down = at(x, y)
        line = down + 5
        while any(abs(line - other) < 15 and abs(across - beside) < right for beside, other in taken):
            line += 1
        taken.append((across, line))
        marks.append(
            f'<circle cx="{across}" cy="{down}" r="5" fill="var(--accent)"/>'
            f'<text x="{across + 9}" y="{line}">{escape(name)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">'
        f'{"".join(marks)}<text class="soft" x="{left}" y="{high - 6}">{escape(x_name)}</text>'
        f'<text class="soft" x="2" y="13">{escape(y_name)}</text></svg>'
    )


def _line_chart(points: Sequence[tuple[float, float]], x_name: str, y_name: str, *, log: bool) -> str:
    """A chart of one line; each axis has four marks."""
    wide, high, left, bottom, top = 480, 230, 66, 44, 12
    xs = [x for x, _ in points]
    ys = [math.log10(y) if log else y for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (wide - left - 12)
        return round(across, 1), round(top + (y1 - y) / (y1 - y0) * (high - top - bottom), 1)

    marks = []
    for i in range(4):
        x, y = x0 + (x1 - x0) * i / 3, y0 + (y1 - y0) * i / 3
        across, down = at(x, y)
        marks.append(
            f'<line class="axis" x1="{left}" x2="{wide - 12}" y1="{down}" y2="{down}"/>'
            f'<text class="soft" x="{left - 6}" y="{down + 4}" text-anchor="end">{10**y if log else y:.3g}</text>'
            f'<text class="soft" x="{across}" y="{high - 24}" text-anchor="middle">{x:.4g}</text>'
        )
    line = " ".join(f"{x},{y}" for x, y in (at(x, y) for x, y in zip(xs, ys, strict=True)))
    return (
        f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">'
        f'{"".join(marks)}<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>'
        f'<text class="soft" x="{wide - 12}" y="{high - 3}" text-anchor="end">{escape(x_name)}</text>'
        f'<text class="soft" x="{left}" y="{high - 3}">{escape(y_name)}{", logarithmic" if log else ""}</text></svg>'
    )


def _disagreements(report: Report) -> str:
    cards = []
    for each in report.disagreements:
        picture = f'<img alt="" src="{escape(each["thumbnail"])}">' if each.get("thumbnail") else ""
        cards.append(
            f"<figure>{picture}<figcaption>{escape(str(each['image']))}<br>teacher: "
            f"{_class(report, each['teacher'][0])} ({each['teacher'][1]:.0%})<br>student: "
            f"{_class(report, each['student'][0])} ({each['student'][1]:.0%})</figcaption></figure>"
        )
    if not cards:
        return ""
    text = "Held-out images with different answers, then those with different probabilities, largest difference first."
    return f'<p class="soft">{text}</p><div class="grid">{"".join(cards)}</div>'


def _class(report: Report, number: int | str) -> str:
    """The name of a class, where it is known."""
    return escape(report.class_names.get(str(number), f"class {number}"))


def _classes(report: Report) -> str:
    if not report.agreement_by_class:
        return ""
    rows = sorted(report.agreement_by_class.items(), key=lambda item: item[1][0] / item[1][1])
    body = "".join(
        f"<tr><td>{_class(report, name)}</td><td>{agree:,} of {images:,}</td><td>{agree / images:.1%}</td></tr>"
        for name, (agree, images) in rows
    )
    table = f"<table><tr><th></th><th>student agrees</th><th></th></tr>{body}</table>"
    if len(rows) <= 12:
        return f'<div class="scroll">{table}</div>'
    summary = f"{len(rows)} classes, lowest agreement first"
    return f'<details><summary>{summary}</summary><div class="scroll">{table}</div></details>'


def _exports(report: Report) -> str:
    rows, remarks = [], []
    for e in report.exports.values():
        within = "" if e["tolerance"] is None else f" of at most {e['tolerance']:.0e}"
        real = "random and real images" if e["error_real"] is not None else "random images"
        rows.append(
            f"<tr><td>{escape(e['file'])}</td><td>{e['bytes'] / 1e6:.2f} MB</td><td>{escape(e['precision'])}</td>"
            f"<td>{escape(e['batch'])}</td><td>{e['opset'] or ''}</td><td>{largest_error(e):.0e}{within}</td></tr>"
        )
        remarks.append(f"{e['file']}: compared on {real}" + ("; it normalises by itself" if e["normalises"] else ""))
        if e["fixed_because"]:
            remarks[-1] += f"; its batch is fixed: {e['fixed_because']}"
        if e.get("size_fixed_because"):
            remarks[-1] += f"; its height and width are fixed: {e['size_fixed_because']}"
        elif e.get("size") == "any":
            remarks[-1] += "; it takes images of any height and width"
    head = (
        "<tr><th></th><th>size</th><th>precision</th><th>batch</th><th>opset</th>"
        "<th>largest difference from the student</th></tr>"
    )
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>{_list(remarks)}' if rows else ""


def _manifest(report: Report, plan: Plan) -> str:
    mimic = report.config.get("mimic") or {}
    digest = sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()
    entries = {
        "plan": f"sha256 {digest}",
        "seeds": f"recipe {mimic.get('seed')}, plan {None if plan.budget is None else plan.budget.seed}",
        "images": f"{report.images_few or 0:,} to learn from, {report.images_choose or 0:,} of them to choose the best "
        f"step by; {report.images_held_out or 0:,} held out",
        "extra images": "; ".join(line.removeprefix("extra images: ") for line in report.extra_lines()),
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
        "machine": ", ".join(f"{k} {v}" for k, v in report.platform.items() if v is not None),
        "not counted as MACs": ", ".join(report.macs_not_counted),
    }
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td style='white-space:normal'>{escape(v)}</td></tr>" for k, v in entries.items() if v
    )
    shown = "".join(_hashes(use, hashes) for use, hashes in report.image_hashes.items() if hashes)
    recipe, options = json.dumps(mimic, indent=1), json.dumps(plan.budget and plan.budget.to_json(), indent=1)
    return (
        f"<table>{rows}</table>{shown}<details><summary>The recipe</summary><pre>{escape(recipe)}</pre></details>"
        f"<details><summary>Budget and options</summary><pre>{escape(options)}</pre></details>"
    )


def _hashes(use: str, hashes: Sequence[str]) -> str:
    named = {
        "fit": "Images to learn from",
        "choose": "Images to choose the best step by",
        "held_out": "Held-out images",
        "extra": "Extra images",
    }
    whole = sha256("\n".join(hashes).encode()).hexdigest()
    more = f"\n... and {len(hashes) - _HASHES:,} more, in report.json" if len(hashes) > _HASHES else ""
    return (
        f"<details><summary>{escape(named.get(use, use))}: {len(hashes):,}, together sha256 {whole[:16]}</summary>"
        f"<pre>{escape(chr(10).join(hashes[:_HASHES]) + more)}</pre></details>"
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
