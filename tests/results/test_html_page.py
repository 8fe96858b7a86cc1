"""The page and the README of a result: what they hold, that they stand alone, that their code runs."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from nets import Chain

import mimicut as us
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results.html_page import page
from mimicut.results.readme import readme
from mimicut.results.report_schema import ReportFields
from mimicut.results.terms import TERMS

SAID = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
VOID = {"meta", "link", "br", "img"}


class Read(HTMLParser):
    """Texts, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    photos = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)
    config = us.preset("default", steps=5)
    us.compress(
        own_teacher(randomised(Chain()), SAID), photos, keep=0.5, folder=folder / "small", config=config,
        held_out_share=0.5, min_agreement=0.8,
    )  # fmt: skip
    return folder / "small"


def test_the_page_tells_what_the_report_does(result):
    from mimicut.results.store import read

    plan, report, _ = read(result)
    text = (result / "report.html").read_text()
    assert text == page(report, plan)
    said = " ".join(" ".join(Read(re.sub(r"</?a\b[^>]*>", "", text)).words).split())
    for words in (
        "Student of module", "Budget: 0.5 of the MACs.", f"{report.top1_agreement:.1%} on 20 images",
        f"{report.macs_teacher:,}", f"{report.macs_student:,}", "Loss over steps", "Manifest", "seeds",
        "GO: the lower end of the interval is", report.image_hashes["fit"][0],
        f"torch {report.versions['torch']}",
    ):  # fmt: skip
        assert words in said, words
    assert len(report.losses) == 5
    assert any(kept < whole for kept, whole in report.widths.values())
    for kept, whole in report.widths.values():
        assert f"{kept} of {whole}" in said
    first = report.disagreements[0]
    assert f"teacher: class {first['teacher'][0]} ({first['teacher'][1]:.0%})" in said
    assert first["thumbnail"] in text
    assert len(report.feature_maps) == 4
    assert all(each[picture] in text for each in report.feature_maps for picture in ("thumbnail", "teacher", "student"))


def test_the_page_stands_alone_and_is_small(result):
    text = (result / "report.html").read_text()
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|@import|url\(", text)
    attributes = Read(text).attributes
    places = {f"#{v}" for k, v in attributes if k == "id"}
    links = {v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")}
    assert links <= places
    assert {"#agreement", "#macs", "#seam", "#feature-error"} <= links
    assert len(text) < 2_000_000


def test_words_lead_to_the_documentation_where_its_address_is_known(monkeypatch):
    plan = us.make_plan(Chain(), us.trace(Chain(), torch.zeros(2, 3, 8, 8)), keep=0.5)
    urls = Message()
    urls["Project-URL"] = "Paper, https://example.org/paper"
    monkeypatch.setattr("mimicut.results.terms.metadata", lambda name: urls)
    assert "example.org" not in page(us.Report(), plan)
    urls["Project-URL"] = "Documentation, https://example.org/docs"
    links = [v for k, v in Read(page(us.Report(), plan)).attributes if k == "href" and "example.org" in v]
    assert links == [f"https://example.org/docs/{term.page}/" for term in TERMS.values()]
    docs = Path(__file__).parents[2] / "docs"
    assert all((docs / f"{term.page}.md").is_file() for term in TERMS.values())


def test_what_is_named_like_markup_is_text():
    plan = us.make_plan(Chain(), us.trace(Chain(), torch.zeros(2, 3, 8, 8)), keep=0.5)
    report = us.Report(notes=("<script>alert(1)</script>",), widths={"<b>": [1, 2]}, images_held_out=0)
    text = page(report, plan)
    Read(text)
    assert "<script>" not in text
    assert "<b>" not in text
    assert page(us.Report(), plan)  # nothing is known


BAD = "</title><script>alert(1)</script>\"' onload=x \n```\nimport os\n[a](javascript:x)"
DOT = "data:image/png;base64,YQ=="
SHARES = dict.fromkeys(("top1_agreement", "top1_agreement_low", "top1_agreement_high"), 0.5)


def hostile_report():
    """Every text that a report may hold, as an attacker would fill it."""
    entry = {"file": "model.onnx", "bytes": 9, "precision": BAD, "tolerance": 1e-4, "opset": 18, "batch": "any",
             "fixed_because": BAD, "error_random": 1e-6, "error_real": None,
             "layers": {"images": 3, "kind": "real", "jump": BAD, "unseen": [BAD],
                        "rows": [{"layer": BAD, "error": 0.5, "own": None, "within": [BAD]}]}}  # fmt: skip
    latency = {"runtime": BAD, "threads": 1, "batch": 1, "teacher_ms": 2.0, "student_ms": 1.0, "share": 0.5,
               "share_low": 0.4, "share_high": 0.6}  # fmt: skip
    rows = [{"name": name, "ms": 1.0, "share": 1.0, "bytes": 3, **SHARES} for name in (BAD, "student")]
    int8 = {"runtime": BAD, "threads": 1, "batch": 1, "images": 3, "images_quantised_by": 3, "without_teacher": None,
            "rows": rows}  # fmt: skip
    return {
        **SHARES, "images_held_out": 9, "exports": {BAD: entry}, "latency": latency, "int8": int8, "notes": [BAD],
        "disagreements": [{"image": BAD, "teacher": [1, 0.5], "student": [2, 0.5], "thumbnail": None}],
        "class_names": {"1": BAD}, "agreement_by_class": {"1": [1, 2], BAD: [0, 1]}, "widths": {BAD: [1, 2]},
        "alternatives": [{"name": BAD, "seconds": 1.0, **SHARES}], "versions": {"mimicut": BAD, BAD: BAD},
        "platform": {BAD: BAD}, "macs_not_counted": [BAD], "image_hashes": {BAD: [BAD]}, "losses": [[1, 0.5], [2, 0.1]],
        "config": {"mimic": {BAD: BAD, "seed": BAD}}, "crossfit": 5,
        "feature_maps": [{"image": BAD, "thumbnail": None, **dict.fromkeys(("teacher", "student"), DOT)}],
    }  # fmt: skip


def test_nothing_of_a_report_that_comes_from_elsewhere_is_markup_or_code():
    plan = us.make_plan(Chain(), us.trace(Chain(), torch.zeros(2, 3, 8, 8)), keep=0.5)
    plan = replace(plan, teacher={**plan.teacher, "source": {"spec": BAD}}, pruned_by=BAD, drop=[BAD])
    report = us.Report.from_json(hostile_report())
    text = page(report, plan)
    read = Read(text)
    assert "script" not in read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "alert(1)" in " ".join(read.words)
    for by_hand in (plan, replace(plan, pruned_by=None)):
        card = readme(report, by_hand)
        assert "<script" not in card
        assert "](javascript" not in card
        assert "import os" not in re.findall(r"```python\n(.*?)```", card, re.S)[0]
        assert not any(line.startswith("import os") for line in card.splitlines())
    assert "[a]" in report.table()  # and its brackets are no colours


STRANGE = {
    "an address": {"disagreements": [{"image": "a", "teacher": [1, 0.5], "student": [2, 0.5], "thumbnail": "//x/a"}]},
    "a page as a picture": {"disagreements": [
        {"image": "a", "teacher": [1, 0.5], "student": [2, 0.5], "thumbnail": "data:text/html;base64,YQ=="}]},
    "an address as a map": {"feature_maps": [
        {"image": "a", "thumbnail": None, "teacher": "https://x/a.png", "student": "data:image/png;base64,YQ=="}]},
    "text for a number": {"crossfit": "<b>"},
    "an opset": {"exports": {"onnx": {**hostile_report()["exports"][BAD], "opset": "<b>"}}},
    "a class": {"disagreements": [{"image": "a", "teacher": ["<b>", 0.5], "student": [2, 0.5]}]},
    "code as a batch": {"exports": {"onnx": {**hostile_report()["exports"][BAD], "batch": "1), x("}}},
    "an error below nothing": {"exports": {"onnx": {**hostile_report()["exports"][BAD], "layers": {
        **hostile_report()["exports"][BAD]["layers"],
        "rows": [{"layer": "a", "error": -1.0, "own": 0.1, "within": []}]}}}},
    "no images of a class": {"agreement_by_class": {"1": [0, 0]}},
    "half an interval": {"top1_agreement": 0.5, "top1_agreement_low": 0.4},
    "a list of pairs": {"exports": [1]},
}  # fmt: skip


@pytest.mark.parametrize("fields", STRANGE.values(), ids=STRANGE)
def test_a_field_of_another_type_is_refused(fields):
    with pytest.raises(us.MimicutError, match="reading a report: "):
        us.Report.from_json(fields)


@pytest.mark.parametrize(
    "call",
    [
        {"keyword": "x=1)\n```\nimport os", "options": {}}, {"keyword": 3, "options": {}},
        {"keyword": None, "options": {"a b": 1}}, {"keyword": "class", "options": {}},
        {"keyword": None, "options": {}, "inputs": [["x", [3], "float32)\nimport os"]]},
        {"keyword": None, "options": {}, "inputs": [["x", ["y"], "float32"]]},
    ],
)  # fmt: skip
def test_a_call_that_is_no_call_is_refused(call):
    plan = us.make_plan(Chain(), us.trace(Chain(), torch.zeros(2, 3, 8, 8)), keep=0.5)
    with pytest.raises(us.MimicutError, match="call"):
        us.Plan.from_json({**plan.to_json(), "call": call})


def test_the_schema_has_every_field_of_a_report():
    assert set(ReportFields.__annotations__) - {"__pydantic_config__"} == {f.name for f in fields(us.Report)}


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser_without_errors_and_fits(result, width, tmp_path):
    probe = (
        "<script>document.documentElement.dataset.wide = document.documentElement.scrollWidth > innerWidth + 1;"
        "document.documentElement.dataset.small = [...document.querySelectorAll('body *')].filter(e => "
        "e.childNodes.length && e.getBoundingClientRect().height > 0 && e.getBoundingClientRect().height < 9 "
        "&& e.textContent.trim()).length</script></body>"
    )
    (tmp_path / "page.html").write_text((result / "report.html").read_text().replace("</body>", probe))
    found = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in found.stderr
    assert 'data-wide="false"' in found.stdout
    assert 'data-small="0"' in found.stdout


@pytest.mark.long
def test_the_readme_code_runs(result, tmp_path):
    us.export_folder(result, ["onnx", "pt2", "openvino"], teacher=Chain)
    page = (result / "report.html").read_text()
    assert page.count("of at most 1e-04") == 3
    assert "model.pt2: compared on random images" in page
    text = (result / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    tests = str(Path(nets.__file__).parent)
    code = f"import sys\nsys.path.insert(0, {tests!r})\nfrom nets import Chain\ndef build(): return Chain()\n"
    (tmp_path / "net.py").write_text(code)
    for block in blocks:
        code = block.replace("FILE.py:FUNCTION", f"{tmp_path / 'net.py'}:build") + "assert scores.shape == (1, 5)\n"
        subprocess.run([sys.executable, "-c", code], cwd=result, check=True)


def test_the_readme_of_a_named_teacher_needs_no_code():
    model = us.load_teacher("demo:vgg7")
    plan = us.make_plan(model.model, us.trace(model.model, model.example()), keep=0.9, source=model.to_json())
    text = readme(us.Report(), plan)
    assert 'model = mimicut.load(".")\n' in text
    assert "`pip install mimicut`" in text
    assert "(1, 1, 32, 32)" in text


def test_the_readme_follows_the_files_and_the_call():
    teacher = us.load_teacher("demo:vgg7")
    plan = us.make_plan(teacher.model, us.trace(teacher.model, teacher.example()), keep=0.9, source=teacher.to_json())
    plan = replace(plan, call={"keyword": "pixels", "options": {"scale": True}})
    text = readme(us.Report(exports={"onnx": {"normalises": True}}, top1_agreement=0.0), plan)
    assert text.count("scores = model(pixels=torch.zeros(1, 1, 32, 32), scale=True)") == 2
    assert "agreement with the teacher: 0.0%" in text
    assert "ONNX Runtime alone (this file normalises by itself" in text
    fixed = {"batch": "2", "normalises": False}
    text = readme(us.Report(exports={"onnx": fixed, "pt2": fixed}), plan)
    assert "PyTorch alone (it takes 2 images at a time, no more and no fewer)" in text
    assert "scores = model(pixels=torch.zeros(2, 1, 32, 32), scale=True)" in text
    assert "numpy.zeros((2, 1, 32, 32)" in text
    assert "OpenVINO alone, after `mimicut export . --to openvino`" in text
    source = {**plan.teacher["source"], "spec": "small", "result": {"plan": {"teacher": plan.teacher}}}
    again = replace(plan, teacher={**plan.teacher, "source": source})
    assert 'mimicut.load(".")\n' in readme(us.Report(), again)
