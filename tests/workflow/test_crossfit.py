"""Every image trains and every image certifies, though never the same student."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call
from nets import Chain, Residual
from scipy.stats import binomtest

import mimicut as us
from mimicut.base.errors import InputError
from mimicut.cli import terminal_progress
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results.store import read
from mimicut.workflow.crossfit import _folds

pytestmark = pytest.mark.long  # minutes: make test-all

SAID = Preprocessing(Chain.size, (0.5,) * 3, (0.25,) * 3)
CONFIG = us.preset("default", steps=2, views="none")


def photos(n, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 8, 8, 3), np.uint8)


def test_every_image_is_held_out_once_and_copies_stay_together():
    images = photos(11)
    images[7] = images[2]
    found = read_images(images, SAID)
    parts = _folds(found, 3, 5)
    held = [i for _, part in parts for i in part]
    assert sorted(held) == sorted({*range(11)} - {7})
    for rest, part in parts:
        assert not set(rest) & set(part)
        assert len(rest) + len(part) in (10, 11)
        assert not (2 in part and 7 in rest)
    assert _folds(found, 3, 5) == parts
    for folds in (1, 11):
        with pytest.raises(InputError, match=f"found {folds} folds for 10 different images"):
            _folds(found, folds, 5)


def test_the_certificate_is_of_all_folds_and_the_student_of_all_images(tmp_path):
    own = own_teacher(randomised(Chain()), SAID)
    result = us.crossfit(own, photos(20), 4, keep=0.6, config=CONFIG, folder=tmp_path / "small", min_agreement=0.01)
    report = result.report
    assert (report.images_few, report.images_held_out, report.crossfit) == (20, 20, 4)
    agreeing = round(report.top1_agreement * 20)
    interval = binomtest(agreeing, 20).proportion_ci(method="exact")
    assert (report.top1_agreement_low, report.top1_agreement_high) == pytest.approx((interval.low, interval.high))
    assert sum(seen for _, seen in report.agreement_by_class.values()) == 20
    assert sum(agree for agree, _ in report.agreement_by_class.values()) == agreeing
    assert report.go is (report.top1_agreement_low >= 0.01)
    assert any("each of 20 images was held out once" in note for note in report.notes)
    assert not any("no image was held out" in note for note in report.notes)
    assert 0 < report.feature_error_relative < 2
    assert read(tmp_path / "small")[1].crossfit == 4
    assert "a student made in this way gives the teacher's answer" in report.certificate()[0]
    page = re.sub("<[^>]*>", "", (tmp_path / "small" / "report.html").read_text())
    assert "each held out once, in 4 folds" in page
    alone = us.compress(own, photos(20), keep=0.6, config=CONFIG, held_out_share=0.0)
    mine, theirs = result.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_plan_is_the_folds_own_where_it_is_given():
    own = own_teacher(randomised(Residual()), Preprocessing(Residual.size, (0.5,) * 3, (0.25,) * 3))
    plan = us.make_plan(own.model, us.trace(own.model, own.example(), drop=["stage1.1"]), keep=0.7)
    assert plan.drop == ["stage1.1"]
    report = us.crossfit(own, photos(8), 2, plan=plan, config=CONFIG).report
    assert report.images_held_out == 8


def test_what_cannot_be_is_said_before_any_work(tmp_path):
    own = own_teacher(Chain(), SAID)
    with pytest.raises(InputError, match="found held-out images as well"):
        us.crossfit(own, photos(8), 2, keep=0.6, held_out=photos(3, 1))
    with pytest.raises(InputError, match="hold out 72 or more"):
        us.crossfit(own, photos(8), 2, keep=0.6, min_agreement=0.95, folder=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_the_command_line(place, capsys):
    own = ("compress", "net.py:build", "photos", "--keep", 0.5, "--out", "small", "--steps", 1)
    code, line, err = call(capsys, *own, "--crossfit", 2)
    assert code == 0
    assert (line["images_few"], line["images_held_out"]) == (10, 10)
    assert "fold 2 of 2: 5 images, 5 held out" in err
    code, line, err = call(capsys, *own[:-4], "--out", "b", "--steps", 1, "--crossfit", 1)
    assert (code, line) == (2, None)


def test_images_that_made_teacher_or_plan_cannot_show_an_agreement(tmp_path):
    own, images = own_teacher(randomised(Chain()), SAID), read_images(photos(20), SAID)
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.6)
    plan = replace(plan, images=images.hashes[:7])
    with pytest.raises(InputError, match="7 of the held-out images trained the teacher or helped to make the plan"):
        us.crossfit(own, images, 4, plan=plan, config=CONFIG, min_agreement=0.01)
    report = us.crossfit(own, images, 2, plan=plan, config=CONFIG).report
    assert any("7 held-out image(s) helped to make this plan" in note for note in report.notes)


def test_a_plan_that_all_images_make_cannot_show_an_agreement():
    with pytest.raises(InputError, match="together with a latency or depth"):
        us.crossfit(
            own_teacher(Chain(), SAID), photos(20), 4, keep=0.6, depth="auto", config=CONFIG, min_agreement=0.01
        )


def test_alternatives_have_no_image_to_be_judged_by():
    with pytest.raises(InputError, match="found alternatives as well"):
        us.crossfit(own_teacher(Chain(), SAID), photos(20), 4, keep=0.6, config=CONFIG, with_alternatives=True)


def test_an_interrupted_fold_leaves_the_result_and_says_so(place, capsys, monkeypatch):

    seen, show = [], terminal_progress.StepProgress.__call__

    def once(self, done, total, loss):
        seen.append(done)
        if len(seen) == 4:  # the second step of the first fold
            raise KeyboardInterrupt
        show(self, done, total, loss)

    monkeypatch.setattr(terminal_progress.StepProgress, "__call__", once)
    asked = ("compress", "net.py:build", "photos", "--keep", 0.5, "--steps", 2, "--out", "small")
    code, line, err = call(capsys, *asked, "--crossfit", 2)
    assert (code, line) == (130, None)
    assert "the student in small is complete" in err
    assert read(place / "small")[1].steps == 2
    assert read(place / "small")[1].crossfit is None
    code, resumed, _ = call(capsys, *asked, "--crossfit", 2, "--resume")
    assert code == 0
    _, whole, _ = call(capsys, *asked[:-1], "whole", "--crossfit", 2)
    assert resumed["top1_agreement"] == whole["top1_agreement"] is not None
    assert read(place / "small")[1].crossfit == read(place / "whole")[1].crossfit is not None
