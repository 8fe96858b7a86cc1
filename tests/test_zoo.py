"""The zoo's machinery, and a sample of its models through the whole path."""

import json

import pytest

from benchmarks.zoo import case
from benchmarks.zoo.__main__ import one, read
from benchmarks.zoo.models import specs
from benchmarks.zoo.page import text


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


def test_what_is_refused_and_what_fails_are_told_apart(monkeypatch):
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


def test_the_page_counts_outcomes_and_names_reasons(tmp_path):
    good = {"model": "timm:a", "outcome": "done", "params": 2e6, "keep": 0.7, "macs_share_pinned": 0.3,
            "seconds": {"all": 3}, "pinned": {"size 3 is fixed in the code (reshape in blocks.0)": 1}}  # fmt: skip
    bad = {"model": "timm:b", "outcome": "unsupported", "stage": "trace", "error": "no\nhead | here", "seconds": {}}
    page = text([good, bad], 5)
    assert "2 of 5 models were run: 1 done, 1 unsupported" in page
    assert "| timm:a | 2.0 | done | 0.7 | 30% | 3 |  | size 3 is fixed in the code (reshape) x1 |" in page
    assert "trace: no head / here |" in page
    path = tmp_path / "zoo.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (good, bad, {**bad, "outcome": "done"})))
    assert read(path)["timm:b"]["outcome"] == "done"
