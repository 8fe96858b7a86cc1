"""A result as the teacher of the next compression: what comes along, and that no generation needs the one before."""

import json
import shutil
import subprocess
import sys
from importlib import import_module

import nets
import numpy as np
import pytest
import torch
from command_line import call
from hostile import without_plan_digest
from nets import Boxed, Chain, Encoder, HandWritten, Residual, Segmenter
from torch import nn

import mimicut as us
from mimicut.base.errors import InputError, PlanError, Stopped, StoreError
from mimicut.base.guard import named_tensors, same_bits
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.results import store
from mimicut.results.folder import previous_path
from mimicut.results.stopped_runs import stopped_path
from mimicut.results.teachers import load_teacher
from mimicut.workflow.compress import compress
from mimicut.workflow.verify import verify_folder

pytestmark = pytest.mark.long  # minutes: make test-all

SAID = us.Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.3, 0.2, 0.1), 9, "bicubic")
CONFIG = us.MimicConfig(steps=2, views="none", batch_size=8)
TIMM = "timm:test_resnet"
BUILDER = f"{nets.__file__}:Residual"


def images(count=12, seed=0, side=8):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def first(folder, net=Residual, **options):
    """A result made of a module in hand."""
    teacher = own_teacher(randomised(net()), SAID, views="pad_crop", part=options.pop("part", ""))
    return compress(teacher, images(), **({"keep": 0.7} | options), folder=folder, config=CONFIG)


def again(folder, to, net=Residual, **options):
    """What is made of the result in `folder`."""
    teacher = load_teacher(folder, build_teacher=net)
    return compress(teacher, images(), **({"keep": 0.7} | options), folder=to, config=CONFIG)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A result that no test changes."""
    return first(tmp_path_factory.mktemp("results") / "one").folder


def same(one, other):
    theirs, ours = named_tensors(one), named_tensors(other)
    return theirs.keys() == ours.keys() and all(same_bits(tensor, ours[name]) for name, tensor in theirs.items())


# --- without the folders before


def test_three_generations_each_in_a_fresh_process_without_the_others(tmp_path):
    teacher = load_teacher(TIMM, pretrained=False, num_classes=7, input_size=(3, 32, 32))
    randomised(teacher.model)
    x, macs = images(3, side=32), []
    for name in ("one", "two", "three"):
        result = compress(teacher, images(side=32), keep=0.8, folder=tmp_path / name, config=CONFIG)
        torch.save(result.model(x).detach(), tmp_path / f"{name}.pt")
        macs.append((result.report.macs_teacher, result.report.macs_student))
        teacher = load_teacher(tmp_path / name)
        assert same(teacher.model, result.model)
    assert [student for _, student in macs[:2]] == [teacher for teacher, _ in macs[1:]]
    assert teacher.model.fc.out_features == 7
    shutil.rmtree(tmp_path / "one")
    for name in ("two", "three"):
        shutil.move(tmp_path / name, tmp_path / f"moved_{name}")
    code = """
import torch, mimicut
torch.set_num_threads(1)
x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for name in ("three", "two"):
    model = mimicut.load("moved_" + name)
    assert not model.training
    assert torch.equal(model(x), torch.load(name + ".pt")), name
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("net", [Residual, HandWritten, Encoder])
def test_whatever_a_cut_leaves_behind_is_cut_again(tmp_path, net):
    """Dropped blocks; numbers that modules are given, twice; stand-ins of torch's own modules."""
    made = first(tmp_path / "one", net, keep_width=0.6, keep=None, drop=["stage1.1"] if net is Residual else [])
    then = again(tmp_path / "one", tmp_path / "two", net, keep_width=0.5, keep=None)
    assert then.report.macs_student < then.report.macs_teacher == made.report.macs_student
    assert type(then.model).__qualname__ == net.__qualname__
    assert bool(made.plan.calls and then.plan.calls) == (net is HandWritten)
    shutil.rmtree(tmp_path / "one")
    loaded = us.load(tmp_path / "two", net)
    assert same(loaded, then.model)
    with torch.no_grad():
        assert torch.equal(loaded(images(3)), then.model(images(3)))


def test_a_buffer_that_is_made_anew_when_images_come(tmp_path):
    class Grid(Chain):
        def __init__(self):
            super().__init__()
            self.register_buffer("grid", torch.zeros(1), persistent=False)

        def forward(self, x):
            if self.grid.shape != (8,):
                self.grid = torch.linspace(0, 1, 8)
            return super().forward(x + self.grid)

    model = Grid()
    own = own_teacher(model, SAID)
    plan = us.make_plan(own.model, us.trace(own.model, own.example()), keep=0.7, source=own.to_json())
    student = us.cut(own.model, plan)
    student(images(2))
    assert student.grid.shape == (8,)
    us.save(tmp_path / "one", model=student, plan=plan, report=us.Report())
    then = again(tmp_path / "one", tmp_path / "two", Grid)
    assert same(us.load(tmp_path / "two", Grid), then.model)


def test_what_was_saved_is_loaded_through_all_plans_and_not_by_way_of_the_teacher_in_hand(one, tmp_path):
    teacher, asked = load_teacher(one, build_teacher=Residual), []
    teacher.build_teacher = lambda: asked.append("code") or Residual()
    compress(teacher, images(), keep=0.7, folder=tmp_path / "two", config=CONFIG)
    assert asked == ["code"]


# --- what comes along


def test_preprocessing_and_views_come_along_and_can_be_overridden(one, tmp_path):
    teacher = load_teacher(one, build_teacher=Residual)
    assert (teacher.preprocessing, teacher.views, teacher.part, teacher.call) == (SAID, "pad_crop", "", None)
    assert same(teacher.model, us.load(one, Residual))
    assert teacher.notes == ["the teacher is itself a result, made from module: figures are against it"]
    said = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "resize": "exact", "input_size": (3, 16, 16), "views": "none"}
    teacher = load_teacher(one, build_teacher=Residual, **said)
    assert teacher.preprocessing == us.Preprocessing((3, 16, 16), (0.1,) * 3, (0.2,) * 3, None, "bicubic")
    assert teacher.views == "none"
    compress(teacher, images(side=16), keep=0.7, folder=tmp_path / "two", config=CONFIG)
    then = load_teacher(tmp_path / "two", build_teacher=Residual)
    assert (then.preprocessing, then.views) == (teacher.preprocessing, "none")


def test_a_folder_without_a_source_is_taken_as_a_module_in_hand(tmp_path):
    model = randomised(Chain())
    plan = us.make_plan(model, us.trace(model, model.example()), keep=1)
    us.save(tmp_path / "one", model=model, plan=plan, report=us.Report())
    teacher = load_teacher(tmp_path / "one", build_teacher=Chain)
    assert teacher.preprocessing == own_teacher(model).preprocessing
    assert "the folder does not say how its teacher expects images" in teacher.notes[1]
    assert same(teacher.model, model)


def test_how_it_takes_its_images_comes_along(tmp_path, capsys):
    example = ((), {"pixel_values": torch.zeros(2, 3, 8, 8), "sharp": True})
    first(tmp_path / "one", Segmenter, example=example)
    teacher = load_teacher(tmp_path / "one", build_teacher=Segmenter)
    assert teacher.call == {"keyword": "pixel_values", "options": {"sharp": True}}
    np.save(tmp_path / "images.npy", images().numpy())
    own = (BUILDER.replace("Residual", "Segmenter"), "--weights", tmp_path / "one")
    assert call(capsys, "inspect", *own)[0] == 0
    assert call(capsys, "plan", *own, "--keep", 0.7, "--images", tmp_path / "images.npy")[0] == 0
    then = compress(teacher, images(), keep=0.7, folder=tmp_path / "two", config=CONFIG)
    assert then.plan.call == teacher.call
    loaded = us.load(tmp_path / "two", Segmenter)
    with torch.no_grad():
        found, wanted = (m(pixel_values=images(2), sharp=True)["out"] for m in (loaded, then.model))
    assert torch.equal(found, wanted)


def test_the_part_comes_along(tmp_path):
    made = first(tmp_path / "one", Boxed, part="body")
    teacher = load_teacher(tmp_path / "one", build_teacher=Boxed)
    assert (teacher.part, type(teacher.whole), type(teacher.model)) == ("body", Boxed, Residual)
    assert same(teacher.whole, made.model)
    then = compress(teacher, images(), keep=0.7, folder=tmp_path / "two", config=CONFIG)
    assert then.report.macs_teacher == made.report.macs_student
    assert isinstance(then.model(images(1)), list)
    verified = verify_folder(tmp_path / "two", images(4, seed=3), weights=tmp_path / "one", teacher=_boxed(tmp_path))
    assert verified.images_held_out == 4
    shutil.rmtree(tmp_path / "one")
    loaded = us.load(tmp_path / "two", Boxed)
    assert same(loaded, then.model)
    assert same_bits(loaded.scale.weight, made.model.scale.weight)
    deeper = load_teacher(tmp_path / "two", build_teacher=Boxed, part="body.stage2")
    assert type(deeper.model) is nn.Sequential


def _boxed(folder):
    (folder / "own.py").write_text("from nets import Boxed\ndef build():\n    return Boxed()\n")
    return f"{folder / 'own.py'}:build"


def test_images_that_trained_an_earlier_generation_are_reported(tmp_path):
    made = first(tmp_path / "one")
    fit = made.report.image_hashes["fit"]
    teacher = load_teacher(tmp_path / "one", build_teacher=Residual)
    options = {"keep": 0.7, "held_out": images()[:12], "config": CONFIG}
    then = compress(teacher, images(12, seed=4), folder=tmp_path / "two", **options)
    assert len(fit) == 10
    assert any(note.startswith("10 held-out image(s) trained the teacher") for note in then.report.notes)
    third = load_teacher(tmp_path / "two", build_teacher=Residual)
    last = compress(third, images(12, seed=5), folder=tmp_path / "three", **options)
    assert any(note.startswith("10 held-out image(s) trained the teacher") for note in last.report.notes)
    report = verify_folder(tmp_path / "three", images(), weights=tmp_path / "two", teacher=BUILDER)
    assert report.notes[0].startswith("10 of these images trained the student")
    clean = compress(teacher, images(12, seed=4), keep=0.7, held_out=images(5, seed=6), config=CONFIG)
    assert not any("trained the teacher" in note for note in clean.report.notes)


# --- code of one's own


def test_ones_own_code_is_named_again_and_never_run_from_a_folder(tmp_path):
    (tmp_path / "own.py").write_text(
        f"from pathlib import Path\nfrom nets import Residual\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "def build(): return Residual(), {'input_size': (3, 8, 8)}\n"
    )
    code = f"{tmp_path / 'own.py'}:build"
    compress(load_teacher(code), images(), keep=0.7, folder=tmp_path / "one", config=CONFIG)
    (tmp_path / "ran").unlink()
    with pytest.raises(InputError, match=r"never run from a folder.*FILE\.py:FUNCTION with --weights FOLDER"):
        load_teacher(tmp_path / "one")
    assert not (tmp_path / "ran").exists()
    teacher = load_teacher(code, weights=tmp_path / "one", pretrained=False)
    assert same(teacher.model, us.load(tmp_path / "one", code))
    assert teacher.spec == str(tmp_path / "one")
    then = compress(teacher, images(), keep=0.7, folder=tmp_path / "two", config=CONFIG)
    (tmp_path / "ran").unlink()
    for what in (us.load, load_teacher, lambda folder: verify_folder(folder, images(3))):
        with pytest.raises(InputError, match="never run from a folder"):
            what(tmp_path / "two")
    assert not (tmp_path / "ran").exists()
    for build in (code, Residual):
        assert same(us.load(tmp_path / "two", build), then.model)
    with pytest.raises(PlanError, match="plan for Residual to Chain"):
        load_teacher(BUILDER.replace("Residual", "Chain"), weights=tmp_path / "one")
    with pytest.raises(InputError, match=r"found the folder .*, expected what builds the network that was"):
        us.load(tmp_path / "two", str(tmp_path / "one"))


# --- verify


@pytest.fixture
def two(tmp_path):
    teacher = load_teacher(BUILDER, input_size=(3, 8, 8))
    randomised(teacher.model)
    compress(teacher, images(), keep=0.7, folder=tmp_path / "one", config=CONFIG)
    teacher = load_teacher(BUILDER, weights=tmp_path / "one", std=(0.5,) * 3)
    compress(teacher, images(), keep=1, folder=tmp_path / "two", config=CONFIG)
    return tmp_path / "two"


def test_verify_measures_against_the_earlier_result(two, tmp_path):
    report = verify_folder(two, images(5, seed=8), teacher=BUILDER)
    assert (report.top1_agreement, report.feature_error_relative, report.images_held_out) == (1.0, 0.0, 5)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    with pytest.raises(InputError, match=r"there is none at .*one; say where it is: --teacher FOLDER"):
        verify_folder(two, images(5, seed=8), teacher=BUILDER)
    report = verify_folder(two, images(5, seed=8), teacher=BUILDER, weights=tmp_path / "moved")
    assert report.top1_agreement == 1.0
    with pytest.raises(InputError, match="found pretrained False"):
        verify_folder(two, images(5, seed=8), teacher=BUILDER, weights=tmp_path / "moved", pretrained=False)


def test_verify_prepares_images_as_the_second_generation_was_set(two, tmp_path, monkeypatch):
    seen = []
    module = import_module("mimicut.workflow.intake")
    monkeypatch.setattr(
        module, "read_images", lambda source, said, **options: seen.append(said) or us.read_images(source, said)
    )
    verify_folder(two, images(5, seed=8), teacher=BUILDER)
    assert [said.std for said in seen] == [(0.5,) * 3]


def test_verify_knows_the_earlier_result_by_its_weights(two, tmp_path):
    teacher = load_teacher(BUILDER, input_size=(3, 8, 8))
    randomised(teacher.model)
    compress(teacher, images(seed=1), keep=0.7, folder=tmp_path / "one", config=CONFIG, force=True)
    with pytest.raises(InputError, match=r"the result .*one is not what it was as the teacher"):
        verify_folder(two, images(5, seed=8), teacher=BUILDER)


def test_verify_takes_the_folder_itself_where_its_code_is_a_librarys(tmp_path):
    teacher = load_teacher(TIMM, pretrained=False, input_size=(3, 32, 32))
    randomised(teacher.model)
    compress(teacher, images(side=32), keep=0.8, folder=tmp_path / "one", config=CONFIG)
    compress(load_teacher(tmp_path / "one"), images(side=32), keep=1, folder=tmp_path / "two", config=CONFIG)
    assert verify_folder(tmp_path / "two", images(5, seed=8, side=32)).top1_agreement == 1.0
    shutil.move(tmp_path / "one", tmp_path / "moved")
    for options in ({"teacher": str(tmp_path / "moved")}, {"weights": tmp_path / "moved"}):
        assert verify_folder(tmp_path / "two", images(5, seed=8, side=32), **options).top1_agreement == 1.0
    with pytest.raises(InputError, match="found weights"):
        verify_folder(tmp_path / "two", images(5), teacher=str(tmp_path / "moved"), weights=tmp_path / "two")


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "w.pth"}, "found weights 'w.pth'; a result has its own weights"),
        ({"pretrained": False}, "found pretrained False"),
        ({"num_classes": 5}, "found num_classes 5"),
        ({"in_chans": 3}, "found in_chans 3"),
        ({"model_kwargs": {"a": 1}}, "found model_kwargs"),
        ({"input_size": (1, 8, 8)}, r"found input_size \(1, 8, 8\)"),
        ({"input_size": (3, 8)}, "three whole numbers"),
        ({"views": "cifar"}, "found views 'cifar'"),
        ({"part": "stage9"}, "no such module"),
    ],
)
def test_options_that_make_no_sense_with_a_result(one, options, words):
    with pytest.raises(InputError, match=words):
        load_teacher(one, build_teacher=Residual, **options)


def test_what_is_no_result(one, tmp_path):
    shutil.copytree(one, tmp_path / "one")
    with pytest.raises(InputError, match=r"found '.*nowhere', expected timm:NAME.*, or the folder of a result"):
        load_teacher(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(StoreError, match=r"photos: found no plan\.json, weights\.safetensors, report\.json"):
        load_teacher(tmp_path / "photos")
    (tmp_path / "photos" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="a model of transformers is named hf:"):
        load_teacher(tmp_path / "photos")
    with pytest.raises(InputError, match="build_teacher, which is for a result folder"):
        load_teacher(TIMM, pretrained=False, build_teacher=Residual)
    data = json.loads((tmp_path / "one" / "plan.json").read_text())
    data["teacher"]["source"]["views"] = "sepia"
    (tmp_path / "one" / "plan.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match=r"plan\.json: its content is not what was saved"):
        load_teacher(tmp_path / "one", build_teacher=Residual)
    without_plan_digest(tmp_path / "one")
    with pytest.raises(InputError, match="its plan has views 'sepia'"):
        load_teacher(tmp_path / "one", build_teacher=Residual)
    (tmp_path / "one" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="its content is not what was saved"):
        load_teacher(tmp_path / "one", build_teacher=Residual)
    (tmp_path / "one" / "weights.safetensors").unlink()
    with pytest.raises(StoreError, match=r"found no weights\.safetensors"):
        load_teacher(tmp_path / "one", build_teacher=Residual)


def test_a_save_that_was_killed_is_found(one, tmp_path):
    shutil.copytree(one, previous_path(tmp_path / "one"))
    teacher = load_teacher(tmp_path / "one", build_teacher=Residual)
    assert teacher.result["weights_sha256"] == store.weights_digest(one) is not None


def test_an_earlier_plan_that_was_edited_into_nonsense_is_named(two):
    data = json.loads((two / "plan.json").read_text())
    edited = json.loads(json.dumps(data))
    edited["teacher"]["source"]["result"]["plan"]["widths"]["stem"] = -1
    (two / "plan.json").write_text(json.dumps(edited))
    without_plan_digest(two)
    with pytest.raises(PlanError, match=r"reading the plan of the teacher .*one: widths\['stem'\] is -1"):
        us.load(two, Residual)
    for nonsense, said in (
        (3, r"teacher: source\.result is 3: Input should be an object"),
        ({}, r"teacher: source\.result\.plan is missing"),
        ({"plan": {}, "images": 3}, r"teacher: source\.result\.images is 3"),
    ):
        data["teacher"]["source"]["result"] = nonsense
        (two / "plan.json").write_text(json.dumps(data))
        with pytest.raises(PlanError, match=said):
            us.load(two, Residual)


def test_a_run_that_was_stopped_is_no_teacher_yet(tmp_path):
    def stop(done, total, loss):
        raise KeyboardInterrupt

    teacher = own_teacher(randomised(Residual()), SAID)
    with pytest.raises(Stopped):
        compress(teacher, images(), keep=0.7, folder=tmp_path / "one", config=CONFIG, on_step=stop)
    with pytest.raises(StoreError, match=r"was stopped; resume it first \(--resume\)"):
        load_teacher(tmp_path / "one", build_teacher=Residual)
    shutil.move(tmp_path / "one", tmp_path / "part")
    with pytest.raises(StoreError, match=r"was stopped; resume it first \(--resume\)"):
        load_teacher(tmp_path / "one", build_teacher=Residual)
    # What was moved away, and what another run left beside a whole result, are results.
    load_teacher(tmp_path / "part", build_teacher=Residual)
    compress(teacher, images(), keep=0.6, folder=tmp_path / "whole", config=CONFIG)
    shutil.move(tmp_path / "whole", tmp_path / "one")
    load_teacher(tmp_path / "one", build_teacher=Residual)


# --- going on, and the command line


def test_a_second_generation_that_was_stopped_goes_on(one, tmp_path):
    first(tmp_path / "other", keep=0.6)
    whole = again(one, tmp_path / "whole")

    def stop(done, total, loss):
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        again(one, tmp_path / "two", on_step=stop)
    with pytest.raises(InputError, match="stopped with other teacher"):
        again(tmp_path / "other", tmp_path / "two", resume=True)
    assert same(again(one, tmp_path / "two", resume=True).model, whole.model)
    assert not stopped_path(tmp_path / "two").exists()


def test_a_result_does_not_take_the_place_of_its_teacher(one):
    teacher, before = load_teacher(one, build_teacher=Residual), sorted(one.rglob("*"))
    for folder in (one, one.parent):
        with pytest.raises(us.MimicutError, match=r"the teacher .* is in it|not a result"):
            compress(teacher, images(), keep=0.7, folder=folder, force=True, config=CONFIG)
    assert sorted(one.rglob("*")) == before


def test_the_command_line(place, capsys):
    made = ("compress", "net.py:build", "photos", "--keep", 0.8, "--out", "one", "--steps", 1)
    assert call(capsys, *made)[0] == 0
    code, _, err = call(capsys, "inspect", "one")
    assert code == 2
    assert "with --weights FOLDER" in err
    own = ("net.py:build", "--weights", "one")
    code, line, err = call(capsys, "inspect", *own)
    assert (code, line["model"]) == (0, "Net")
    assert "note: the teacher is itself a result, made from net.py:build" in err
    code, line, _ = call(capsys, "plan", *own, "--keep", 0.7, "--images", "photos", "--out", "plan.json")
    assert code == 0
    source = json.loads((place / "plan.json").read_text())["teacher"]["source"]
    assert (source["spec"], source["preprocessing"]["input_size"]) == ("one", [3, 16, 16])
    code, line, _ = call(capsys, "compress", *own, "photos", "--plan", "plan.json", "--out", "two", "--steps", 1)
    assert code == 0
    code, line, _ = call(capsys, "verify", "two", "photos", "--teacher", "net.py:build", "--labelled", "photos")
    assert code == 0
    assert line["top1_teacher"] is not None
    shutil.move(place / "one", place / "moved")
    assert call(capsys, "verify", "two", "photos", "--teacher", "net.py:build")[0] == 2
    assert call(capsys, "verify", "two", "photos", "--teacher", "net.py:build", "--weights", "moved")[0] == 0


def test_a_misspelt_option_of_a_teacher_gets_the_nearest_one():
    for name, near in (("inputsize", "input_size"), ("weigths", "weights")):
        with pytest.raises(InputError, match=f"no option '{name}'; did you mean '{near}'"):
            load_teacher("demo:resnet14", **{name: None})
