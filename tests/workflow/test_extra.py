"""Extra images in whole runs: they change what is mimicked and nothing else; held-out ones among them are refused."""

import json
from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mimicut.base.errors import InputError, Stopped
from mimicut.inputs.extra_images import read_extra
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.image_check import refuse_shared
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import PRESETS, preset
from mimicut.results.store import read
from mimicut.results.teachers import load_teacher
from mimicut.workflow.compress import compress
from mimicut.workflow.crossfit import crossfit
from mimicut.workflow.recover_pruned import recover_pruned
from mimicut.workflow.verify import verify_folder

PREPROCESSING = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3, None, "bilinear")
BUILDER = f"{nets.__file__}:Residual"
CONFIG = preset("default", steps=3, views="pad_crop", batch_size=8)


def pictures(folder, count, seed, side=40):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    for number in range(count):
        small = Image.fromarray(random.randint(0, 256, (5, 5, 3)).astype(np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{seed}_{number}.png")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("few"), 12, 1)


@pytest.fixture(scope="module")
def teacher():
    return own_teacher(randomised(nets.Residual()), PREPROCESSING)


def weights(result):
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


@pytest.mark.long
def test_by_default_pictures_are_drawn_and_the_report_says_so(teacher, few, tmp_path):
    result = compress(teacher, few, keep=0.5, config=CONFIG, folder=tmp_path / "small")
    report = result.report
    assert report.extra == "generated"
    assert report.images_extra == 24  # 3 steps of 8 show no more
    assert report.image_hashes["extra"] == []
    rehearsal = report.config["recovery"]["rehearsal"]
    assert "24 drawn pictures" in report.table()
    if rehearsal["rate"]:
        assert f"{rehearsal['without_extra']:.3f} without" in report.table()
    assert "24 drawn pictures" in (tmp_path / "small" / "report.html").read_text()
    assert 'extra = "generated"' in (tmp_path / "small" / "run.toml").read_text()


@pytest.mark.long
def test_given_pictures_help_to_mimic_and_to_nothing_else(teacher, few, tmp_path):
    others = pictures(tmp_path / "others", 5, 7)
    runs = {
        name: compress(teacher, few, keep=0.5, config=CONFIG, extra=extra)
        for name, extra in (("none", "none"), ("given", others), ("drawn", "generated"))
    }
    assert runs["given"].plan.to_json() == runs["none"].plan.to_json() == runs["drawn"].plan.to_json()
    logs = [run.recovery.closed_form.to_json() | {"seconds": 0} for run in runs.values()]
    assert logs[0] == logs[1] == logs[2]
    assert [run.report.images_held_out for run in runs.values()] == [2, 2, 2]
    assert len(runs["given"].report.image_hashes["extra"]) == 5
    assert "5 given pictures (2,000 crops of them)" in runs["given"].report.table()
    assert runs["none"].report.extra is None
    assert "extra images" not in runs["none"].report.table()
    assert any(not torch.equal(t, weights(runs["none"])[name]) for name, t in weights(runs["given"]).items())
    assert any(not torch.equal(t, weights(runs["drawn"])[name]) for name, t in weights(runs["given"]).items())


@pytest.mark.long
def test_the_same_run_gives_the_same_bits(teacher, few):
    first, second = (compress(teacher, few, keep=0.5, config=CONFIG) for _ in range(2))
    assert all(torch.equal(t, weights(second)[name]) for name, t in weights(first).items())


@pytest.mark.long
def test_a_stopped_run_with_extra_images_continues_to_the_same_bits(teacher, few, tmp_path):
    options = {"keep": 0.5, "config": preset("default", steps=9, views="pad_crop", batch_size=8)}
    whole = compress(teacher, few, **options)

    def stop(done, total, loss):
        if done == 4 and total == 9:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        compress(teacher, few, folder=tmp_path / "small", on_step=stop, **options)
    again = compress(teacher, few, folder=tmp_path / "small", resume=True, **options)
    assert len(again.recovery.mimic.losses) == 9
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(whole).items())
    with pytest.raises(Stopped):
        compress(teacher, few, folder=tmp_path / "other", on_step=stop, **options)
    with pytest.raises(InputError, match="stopped with other extra"):
        compress(teacher, few, folder=tmp_path / "other", resume=True, extra="none", **options)


def test_held_out_images_among_the_extra_ones_are_refused_by_name(teacher, few, tmp_path):
    held_out = pictures(tmp_path / "held_out", 3, 3)
    others = pictures(tmp_path / "others", 4, 4)
    compress(teacher, few, keep=0.5, config=CONFIG, held_out=held_out, extra=others, max_seconds=0)
    (others / "again.png").write_bytes((held_out / "3_1.png").read_bytes())
    with pytest.raises(InputError, match=r"1 of 3 held-out images .*3_1\.png” is “.*again\.png"):
        compress(teacher, few, keep=0.5, config=CONFIG, held_out=held_out, extra=others)
    with Image.open(held_out / "3_2.png") as image:  # saved again: other bytes, nearly the same pixels
        image.resize((55, 55), Image.Resampling.BICUBIC).save(others / "again.png", "JPEG", quality=80)
    with pytest.raises(InputError, match=r"3_2\.png” is “.*again\.png"):
        compress(teacher, few, keep=0.5, config=CONFIG, held_out=held_out, extra=others)


def test_the_images_set_aside_of_the_same_folder_are_refused(teacher, few):
    with pytest.raises(InputError, match="held-out images are among them"):
        compress(teacher, few, keep=0.5, config=CONFIG, extra=few)


@pytest.mark.parametrize(
    ("size", "resize"), [((3, 16, 16), 18), ((1, 16, 16), 20), ((3, 16, 24), 30), ((3, 24, 16), None)]
)
@pytest.mark.parametrize("views", ["pad_crop", "imagenet"])
def test_they_are_found_however_the_network_takes_its_images(few, tmp_path, size, resize, views):
    preprocessing = Preprocessing(size, (0.5,) * size[0], (0.25,) * size[0], resize, "bilinear")
    own = read_images(few, preprocessing)
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(4):
        small = Image.fromarray(np.random.RandomState(number).randint(0, 256, (4, 8, 3)).astype(np.uint8))
        small.resize((120, 60), Image.Resampling.BICUBIC).save(wide / f"{number}.png")
    extra = read_extra(wide, own, views, seed=1, memory_bytes=2**30)
    with pytest.raises(InputError, match="4 of 4 held-out images"):
        refuse_shared(extra.pictures, {"held-out": read_images(wide, preprocessing)})
    with Image.open(wide / "2.png") as image:
        image.save(tmp_path / "again.jpg", quality=95)
    with pytest.raises(InputError, match=r"1 of 1 held-out images .*again\.jpg” is “.*2\.png"):
        refuse_shared(extra.pictures, {"held-out": read_images(tmp_path / "again.jpg", preprocessing)})
    refuse_shared(extra.pictures, {"held-out": own})


def test_labelled_images_and_those_to_choose_by_are_refused_too(teacher, few, tmp_path):
    others = pictures(tmp_path / "others", 4, 4)
    options = {"keep": 0.5, "config": CONFIG, "extra": others}
    with pytest.raises(InputError, match="4 of 4 labelled images"):
        compress(teacher, few, labelled=others, labels=[0] * 4, **options)
    many = pictures(tmp_path / "many", 200, 9, side=20)
    with pytest.raises(InputError, match="20 of 20 choosing images"):
        compress(teacher, many, held_out=others, keep=0.5, config=CONFIG, extra=many)


@pytest.mark.long
def test_what_trained_never_certifies_afterwards(teacher, few, tmp_path):
    others, small = pictures(tmp_path / "others", 4, 4), tmp_path / "small"
    compress(teacher, few, keep=0.6, config=CONFIG, extra=others, folder=small)
    assert len(read(small)[1].learned_hashes) == 10 + 4
    save_file(teacher.model.state_dict(), tmp_path / "teacher.safetensors")
    known = {"teacher": BUILDER, "weights": tmp_path / "teacher.safetensors"}
    with pytest.raises(InputError, match="0 held-out images"):
        verify_folder(small, others, min_agreement=0.1, **known)
    assert "4 of these images trained" in verify_folder(small, others, **known).notes[0]
    again = load_teacher(small, build_teacher=nets.Residual)
    with pytest.raises(InputError, match="trained the teacher"):
        compress(again, few, keep=0.6, config=CONFIG, held_out=others, min_agreement=0.1)


@pytest.mark.long
def test_crossfit_with_its_own_images_among_the_extra_ones_is_refused_before_any_work(teacher, few, tmp_path):
    with pytest.raises(InputError, match="12 of 12 given images"):
        crossfit(teacher, few, 2, keep=0.5, config=CONFIG, extra=few, folder=tmp_path / "small")
    assert not (tmp_path / "small").exists()
    others = pictures(tmp_path / "others", 3, 4)
    found = crossfit(teacher, few, 2, keep=0.5, config=replace(CONFIG, start="cut"), extra=others)
    assert found.report.extra == "given"


def test_where_nothing_was_mimicked_the_report_says_nothing_of_extra_images(teacher, few):
    report = compress(teacher, few, keep=0.5, config=CONFIG, max_seconds=0).report
    assert report.steps == 0
    assert report.extra is None
    assert "extra images" not in report.table()


@pytest.mark.long
def test_what_is_also_learned_from_is_said_and_what_did_not_help_trained_nothing(teacher, few, tmp_path):
    aside = pictures(tmp_path / "aside", 3, 9)
    report = compress(teacher, few, keep=0.5, config=CONFIG, extra=few, held_out=aside).report
    assert any("extra images: 12 of 12 are among the images to learn from" in note for note in report.notes)
    given = pictures(tmp_path / "others", 3, 2)
    report = compress(teacher, few, keep=0.5, config=CONFIG, extra=given, max_seconds=0).report
    assert "the extra images were not used: nothing was mimicked" in report.notes
    assert report.image_hashes["extra"] == []


def test_the_papers_recipe_uses_none_and_refuses_given_ones(teacher, few, tmp_path):
    paper = preset("paper", steps=2, views="pad_crop", batch_size=8)
    assert compress(teacher, few, keep=0.5, config=paper).report.extra is None
    with pytest.raises(InputError, match="recipe that uses none"):
        compress(teacher, few, keep=0.5, config=paper, extra=pictures(tmp_path / "others", 3, 2))


def test_without_steps_they_are_not_used_and_that_is_said(teacher, few, tmp_path):
    quick = preset("default", steps=0, views="pad_crop")
    report = compress(teacher, few, keep=0.5, config=quick, extra=pictures(tmp_path / "others", 3, 2)).report
    assert report.extra is None
    assert any("extra images are not used" in note for note in report.notes)
    assert not any("extra" in note for note in compress(teacher, few, keep=0.5, config=quick).report.notes)


def test_grey_pictures_help_a_network_of_colours(teacher, few, tmp_path):
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 256, (30, 50)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert compress(teacher, few, keep=0.5, config=CONFIG, extra=tmp_path).report.extra == "given"


@pytest.mark.long
def test_a_student_that_another_tool_pruned_learns_from_them_too(teacher, few, tmp_path):
    from mimicut.surgery.cut import cut

    plan = compress(teacher, few, keep=0.5, config=preset("default", steps=0, views="pad_crop")).plan
    students = [
        recover_pruned(teacher, cut(teacher.model, plan), few, config=CONFIG, extra=extra)
        for extra in ("none", "generated")
    ]
    (alone, _), (beside, report) = students
    assert report.images_extra == 24  # 3 steps of 8 show no more
    assert any(not torch.equal(t, beside.state_dict()[name]) for name, t in alone.state_dict().items())


def test_the_share_of_extra_images_is_checked():
    assert PRESETS["paper"].extra_share == 0
    for wrong in (1.0, -0.1, float("nan"), "half"):
        with pytest.raises(InputError, match="extra_share must be a share"):
            preset("default", extra_share=wrong)
    assert json.loads(json.dumps(preset("default").to_json()))["extra_share"] == 0.5
