"""The zoo's machinery, and a sample of its models through the whole path."""

import json
import subprocess
from importlib import import_module

import pytest

from benchmarks.zoo import case
from benchmarks.zoo.__main__ import one, read
from benchmarks.zoo.models import specs
from benchmarks.zoo.page import text
from mimicut.base.errors import UnsupportedModel

pytestmark = pytest.mark.long  # minutes: make test-all


@pytest.mark.parametrize(
    "spec", ["timm:levit_128s", "timm:swin_tiny_patch4_window7_224", "torchvision:mobilenet_v3_small"]
)
def test_a_sample_goes_the_whole_way(spec):
    line = case.run(spec)
    assert line["outcome"] == "done", line
    assert 0.69 <= line["keep"] <= 0.7
    assert line["law"]["error"] <= line["law"]["tolerance"]
    assert line["macs_share_pinned"] < 0.03
    assert not line["unread"]
    assert list(line["export"]) == ["pt2", "onnx", "openvino"]
    assert all(error < 1e-5 for error in line["export"].values())
    assert "export_static" not in line
    clock = line["seconds"]
    assert clock["all"] == pytest.approx(sum(clock[s] for s in case.STAGES if s != "export"), abs=0.01)


def test_what_is_refused_and_what_fails_are_distinguished(monkeypatch):
    assert case.run("nowhere.nothing:build")["outcome"] == "failed"
    monkeypatch.setattr(case, "KEEP", 0.0001)
    line = case.run("demo:vgg7")
    assert (line["outcome"], line["stage"]) == ("unreachable", "plan")
    assert "out of reach" in line["error"]


def test_a_model_has_a_process_of_its_own_with_a_limit():
    line = one("demo:vgg7", memory_gb=0.5, seconds=60)
    assert line["outcome"] == "failed"
    assert one("demo:vgg7", memory_gb=20, seconds=1)["error"] == "not done after 1 s"


def test_every_torchvision_classifier_and_a_member_of_every_family_is_listed():
    names = specs()
    assert {"torchvision:resnet18", "torchvision:vit_b_32", "timm:swin_tiny_patch4_window7_224"} <= set(names)
    assert {"torchvision:retinanet_resnet50_fpn", "torchvision:fcn_resnet50", "hf:DetrForObjectDetection"} <= set(names)
    assert len(names) == len(set(names)) > 180


def test_an_export_that_ends_the_process_keeps_the_line(monkeypatch):
    before = []
    after = case.run("demo:vgg7", lambda line: before.append(json.dumps(line)))
    assert after["outcome"] == "done"

    def killed(command, **options):
        return subprocess.CompletedProcess(command, 9, before[0] + "\n", "Killed")

    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout, before[0].encode() + b"\n")

    for run, why in ((killed, "its process ended with 9: Killed"), (hangs, "not done after 5 s")):
        monkeypatch.setattr(subprocess, "run", run)
        line = one("demo:vgg7", memory_gb=20, seconds=5)
        assert (line["outcome"], line["stage"], line["error"]) == ("failed", "export", why)
        assert line["keep"] == after["keep"]
        assert line["seconds"]["all"] == after["seconds"]["all"]


def test_what_the_teacher_cannot_export_either_is_distinguished(monkeypatch):
    module = import_module("mimicut.runtime.export")
    tried = []

    def export(model, few, folder, formats):
        tried.append(sum(p.numel() for p in model.parameters()))
        if len(tried) <= failures:
            raise UnsupportedModel("no such operator")
        return module.Exported({}, {"pt2": 0.0}, None, None)

    monkeypatch.setattr(module, "export", export)
    failures = 2
    line = case.run("demo:vgg7")
    assert (line["outcome"], line["export"]) == ("done", None)
    assert line["export_why"] == "the teacher itself cannot be exported: no such operator"
    assert tried[0] < tried[1] == line["params"]
    failures = 1
    tried.clear()
    line = case.run("demo:vgg7")
    assert (line["outcome"], line["stage"], line["error"]) == ("failed", "export", "RuntimeError: no such operator")
    assert line["keep"] <= 0.7


def test_the_page_counts_outcomes_and_names_reasons(tmp_path):
    size = {"params": 2e6, "input": [3, 224, 224]}
    good = {"model": "timm:a", "outcome": "done", **size, "keep": 0.7, "macs_share_pinned": 0.3, "groups": 8,
            "seconds": {"all": 61, "export": 60}, "cpu_seconds": {"all": 61, "export": 60}, "peak_memory_mib": 4097,
            "export": {"pt2": 0.0, "onnx": 5e-7},
            "pinned": {"size 3 is fixed in the code (reshape in blocks.0)": 1, "the seam's own channels": 1,
                       "the head (fc.weight)": 1, "the network's input": 1, "the network's output": 1}}  # fmt: skip
    fast = good | {"model": "timm:c", "cpu_seconds": {"all": 60, "export": 60}, "macs_share_pinned": 0.1, "groups": 2,
                   "peak_memory_mib": 4096, "export_static": "its code",
                   "export": {"pt2": 0.0, "onnx": 5e-7, "openvino": 2e-6}}  # fmt: skip
    large = good | {"model": "timm:d", "params": 1e8, "export": None, "export_why": "the teacher itself | cannot"}
    lost = good | {"model": "timm:e", "input": [3, 240, 240], "outcome": "failed", "stage": "export", "error": "bad"}
    del lost["export"], lost["cpu_seconds"]
    bad = {"model": "timm:b", "outcome": "unsupported", "stage": "trace", "error": "no\nhead | here", "seconds": {}}
    page = text([good, bad, fast, large, lost], 9)
    assert "5 of 9 models were run: 3 done, 1 unsupported, 1 failed" in page
    assert "- 4 of 5 (80%) reach keep 0.7 with every law satisfied." in page
    assert "- Median over the 4 that could be traced: 12.5% of the groups and 30.0% of the MACs are pinned." in page
    assert (
        "2 of 4 (50%) export to every format tried with equal outputs (1 were tried with OpenVINO too), "
        "1 of them with a fixed batch; for 1, the" in page
    )
    assert "Of the 2 with under 100 M" in page
    assert "1 took over 60 s before the export, 1 over 120 s with it, 1 over 4096 MiB." in page
    row = "| 0.7 | 30.0% | 12.5% | 0e+00 / 5e-07 | 61 + 60 | 4097 | size 3 is fixed in the code (reshape) x1 |"
    assert f"| timm:a | 2.0 | done {row}" in page
    assert "| 50.0% | 0e+00 / 5e-07 / 2e-06, fixed batch |" in page
    assert "| the teacher itself / cannot |" in page
    assert "| (61 + 60) | 4097 | export: bad |" in page
    assert "trace: no head / here |" in page
    path = tmp_path / "zoo.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (good, bad, {**bad, "outcome": "done"})))
    assert read(path)["timm:b"]["outcome"] == "done"


def test_the_page_says_where_another_program_differs():
    same = {"model": "timm:a", "outcome": "agrees", "groups": 8, "compared": 6, "agree": 6, "differences": [],
            "skipped": {"made by no layer": 2}}  # fmt: skip
    found = {"groups": ["x", "y"], "ours_only": ["Conv2d.bias axis 0"], "theirs_only": [], "ours": "law 2 holds",
             "theirs": "does not run: a | b"}  # fmt: skip
    other = {"model": "timm:b", "outcome": "differs", "groups": 4, "compared": 4, "agree": 2, "differences": [found]}
    broken = {"model": "timm:c", "outcome": "failed", "error": "Torch-Pruning: no\nway"}
    page = text([], 3, [broken, other, same])
    assert "Torch-Pruning reads 2 of 3 models. 1 of 2 (50%) of these agree in every group; of the 10 groups" in page
    assert "| timm:a | 8 | 6 | 6 | 2 not compared: made by no layer |" in page
    assert (
        "| timm:b | 4 | 4 | 2 | 2 (x, ...): only ours Conv2d.bias axis 0; only theirs nothing. Ours: law 2 holds. "
        in page
    )
    assert "Theirs: does not run: a / b |" in page
    assert "| timm:c |  |  |  | Torch-Pruning: no way |" in page
    assert "Torch-Pruning" not in text([], 3)
