"""The whole path on tiny nets: what comes out, what stays as it was, what is refused before any work."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import nets
import pytest
import torch
from nets import Chain, Residual
from torch import nn

import mimicut as us
from mimicut.base import disk
from mimicut.base.errors import InputError, LawBroken, PlanError, Stopped, StoreError, UnsupportedModel
from mimicut.demo import few_images
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.randomised import randomised
from mimicut.recovery.config import preset
from mimicut.results.stopped_runs import stopped_path
from mimicut.workflow.compress import compress
from mimicut.workflow.request import teacher_of
from mimicut.workflow.verify import verify_folder

PREPROCESSING = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
CONFIG = us.MimicConfig(steps=4, views="none", batch_size=8)
BUILDER = f"{nets.__file__}:Residual"


def images(count=20, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def make_teacher(net=Residual):
    return own_teacher(randomised(net()), PREPROCESSING)


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_the_whole_path(tmp_path):
    teacher = make_teacher()
    before = state(teacher.model)
    stages = []
    result = compress(
        teacher, images(), keep=0.5, folder=tmp_path / "small", config=CONFIG, on_stage=stages.append,
        labelled=images(30, seed=5), labels=[0] * 30,
    )  # fmt: skip
    report = result.report
    assert type(result.model) is Residual
    assert report.macs_student == result.plan.macs["student"] <= 0.5 * report.macs_teacher == 0.5 * Residual.macs
    assert report.params_student == sum(p.numel() for p in result.model.parameters()) < report.params_teacher
    assert (report.images_few, report.images_held_out, report.images_labelled) == (16, 4, 30)
    assert len(result.recovery.mimic.losses) == report.steps == 4
    assert 0 <= report.top1_agreement_low <= report.top1_agreement <= report.top1_agreement_high <= 1
    assert report.feature_error_relative > 0
    assert 0 <= report.top1_student <= 100
    assert set(report.image_hashes["fit"]).isdisjoint(report.image_hashes["held_out"])
    assert report.config["cut_equals_zero"]["error"] <= 1e-10
    assert any("mimicking 4 steps" in s for s in stages)
    assert all(torch.equal(t, before[n]) for n, t in teacher.model.state_dict().items())
    for name in ("fc.weight", "fc.bias"):
        assert torch.equal(result.model.state_dict()[name], before[name])
    assert not torch.equal(
        result.model.stage1[0].conv2.weight, us.cut(teacher.model, result.plan).stage1[0].conv2.weight
    )
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == [
        "README.md", "plan.json", "report.html", "report.json", "run.toml", "weights.safetensors",
    ]  # fmt: skip
    json.loads((tmp_path / "small" / "report.json").read_text())


def test_a_fresh_process_loads_it_bit_equal(tmp_path):
    result = compress(make_teacher(), images(), keep_width=0.5, folder=tmp_path / "small", config=CONFIG)
    torch.save(result.model(images(3)).detach(), tmp_path / "out.pt")
    code = f"""
import torch, mimicut
x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(1)
model = mimicut.load({str(tmp_path / "small")!r}, {BUILDER!r})
assert not model.training
assert torch.equal(model(x), torch.load({str(tmp_path / "out.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_seed_gives_one_student_bit_for_bit():
    one, two = (compress(make_teacher(), images(), keep=0.5, config=CONFIG).model for _ in range(2))
    other = compress(make_teacher(), images(), keep=0.5, config=dataclasses.replace(CONFIG, seed=1)).model
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.stem.weight, other.stem.weight)


def test_keep_1_is_bit_equal_and_says_that_nothing_was_cut():
    teacher = make_teacher()
    result = compress(teacher, images(), keep=1, config=CONFIG)
    assert any("nothing is cut" in n for n in result.report.notes)
    assert all(torch.equal(t, teacher.model.state_dict()[n]) for n, t in result.model.state_dict().items())
    assert (result.report.top1_agreement, result.report.feature_error_relative) == (1.0, 0.0)


def test_mimicking_lowers_the_feature_error():
    worth = [
        compress(make_teacher(), images(40), keep_width=0.5, config=dataclasses.replace(CONFIG, steps=n)).report
        for n in (0, 200)
    ]
    assert worth[1].feature_error_relative < 0.5 * worth[0].feature_error_relative


def test_a_plan_is_replayed_and_an_edited_one_resolved(tmp_path):
    teacher = make_teacher()
    first = compress(teacher, images(), keep=0.5, folder=tmp_path / "a", config=CONFIG)
    plan = us.read_plan(tmp_path / "a" / "plan.json")
    again = compress(teacher, images(), plan=plan, config=CONFIG)
    assert all(torch.equal(t, first.model.state_dict()[n]) for n, t in again.model.state_dict().items())
    plan.widths["stage1.0.conv1"] = 1
    edited = compress(teacher, images(), plan=plan, folder=tmp_path / "b", config=CONFIG)
    assert edited.model.stage1[0].conv1.out_channels == 1
    assert us.load(tmp_path / "b", Residual).stage1[0].conv1.weight.shape[0] == 1


def test_dropped_blocks_and_named_seams(tmp_path):
    result = compress(
        make_teacher(),
        images(),
        keep=0.6,
        drop=["stage1.1"],
        seam=["stage1", "stage2"],
        folder=tmp_path / "a",
        config=CONFIG,
    )
    assert isinstance(result.model.stage1[1], torch.nn.Identity)
    assert len(result.plan.seam.points) == 2
    assert torch.equal(us.load(tmp_path / "a", Residual)(images(2)), result.model(images(2)))


def test_a_student_of_another_tool_is_mimicked_and_replaced():
    teacher = randomised(Residual())
    seam = us.find_seam(teacher, teacher.example())
    student = randomised(Residual(), seed=1)
    student.stage2[0].conv1 = torch.nn.Conv2d(8, 3, 3, 2, 1, bias=False)
    student.stage2[0].bn1 = torch.nn.BatchNorm2d(3)
    student.stage2[0].conv2 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    log = us.mimic(teacher, student, seam, images(), dataclasses.replace(CONFIG, steps=30))
    assert log.losses[-1] < log.losses[0]
    assert torch.equal(us.put_under_head(teacher, student, seam).fc.weight, teacher.fc.weight)


def test_held_out_from_another_source_must_be_other_images():
    with pytest.raises(InputError, match=r"4 of them are among the images to learn from"):
        compress(make_teacher(), images(), keep=0.5, held_out=images()[:4], config=CONFIG)
    report = compress(make_teacher(), images(), keep=0.5, held_out=images(7, seed=3), config=CONFIG).report
    assert (report.images_few, report.images_held_out) == (20, 7)


def test_three_images_work_and_say_what_they_prove():
    report = compress(make_teacher(), images(3), keep=0.5, config=CONFIG).report
    assert (report.images_few, report.images_held_out) == (2, 1)
    assert any("held-out image(s)" in n for n in report.notes)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, PlanError, "no budget"),
        ({"keep": 0}, PlanError, "keep is 0"),
        ({"keep": float("nan")}, PlanError, "keep is nan"),
        ({"keep": 0.5, "seam": ["nowhere"]}, UnsupportedModel, "nowhere"),
        ({"keep": 0.5, "drop": ["stage2.0"]}, InputError, "of the same shape"),
        ({"keep": 0.5, "labelled": images(4)}, InputError, "without labels"),
        ({"keep": 0.5, "labelled": images(4), "labels": [1, 2]}, InputError, "2 labels for 4 images"),
        ({"keep": 0.5, "labelled": images(4), "labels": [1, 2, 3, 99]}, InputError, "has 5 classes"),
        ({"keep": 0.5, "held_out_share": 2}, InputError, "held_out_share"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(tmp_path, options, error, words):
    teacher = make_teacher()
    before = state(teacher.model)
    with pytest.raises(error, match=words):
        compress(teacher, images(), folder=tmp_path / "small", config=CONFIG, **options)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(t, before[n]) for n, t in teacher.model.state_dict().items())


@pytest.mark.parametrize("kept", [False, True])
def test_memory_that_runs_out_is_one_clear_line_with_the_file_to_go_on_from(tmp_path, monkeypatch, kept):
    def no_room_left(*arguments):
        if kept:
            stopped_path(tmp_path / "small").touch()
        no_room()

    monkeypatch.setattr("mimicut.workflow.compress.decide", no_room_left)
    words = r"its memory ran out \(OutOfMemoryError: CUDA.*another device"
    with pytest.raises(InputError, match=words + (r"; .*small\.stopped\.safetensors has .*--resume" if kept else "$")):
        compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "small")


def test_every_pass_is_in_exact_float32(monkeypatch):
    seen, run = set(), torch.nn.Conv2d.forward

    def forward(self, x):
        seen.add(torch.backends.cudnn.allow_tf32)
        return run(self, x)

    teacher = make_teacher()
    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    compress(teacher, images(), keep=0.5, config=replace(CONFIG, steps=1, start="closed_form"))
    assert seen == {False}


def no_room(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_while_it_verifies_is_one_clear_line(tmp_path, monkeypatch):
    few = few_images(8, 0)
    compress("demo:vgg7", few, keep=0.5, folder=tmp_path / "small", config=replace(CONFIG, steps=0, start="cut"))
    monkeypatch.setattr("mimicut.workflow.verify.figures", no_room)
    with pytest.raises(InputError, match=r"verifying .*small on cpu: its memory ran out \(OutOfMemoryError: CUDA"):
        verify_folder(tmp_path / "small", few, device="cpu")


def test_memory_that_runs_out_while_a_pruned_student_is_recovered_is_one_clear_line(monkeypatch):
    teacher = make_teacher()
    monkeypatch.setattr("mimicut.workflow.recover_pruned.check_images", no_room)
    with pytest.raises(InputError, match=r"recovering a pruned student on the device of the teacher: its memory ran"):
        us.recover_pruned(teacher, teacher.model, images(), config=CONFIG)


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    stages = []
    for force in (False, True):
        with pytest.raises(StoreError):
            compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "mine", force=force, on_stage=stages.append)
    assert stages == []
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_interrupt_leaves_the_old_result_and_the_teacher_whole(tmp_path):
    teacher = make_teacher()
    compress(teacher, images(), keep=0.5, folder=tmp_path / "small", config=CONFIG)
    before, files = state(teacher.model), {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}

    def stop(done, total, loss):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(teacher, images(), keep=0.4, folder=tmp_path / "small", force=True, config=CONFIG, on_step=stop)
    assert {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small.stopped.safetensors"]
    assert all(torch.equal(t, before[n]) for n, t in teacher.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.model.modules())


def test_verify_folder_measures_again_and_knows_its_teacher(tmp_path):
    path = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    teacher = us.load_teacher(BUILDER, input_size=(3, 8, 8), views="none")
    teacher.model.load_state_dict(randomised(Residual()).state_dict())
    save_file(teacher.model.state_dict(), path)
    compress(teacher, images(), keep=0.5, folder=tmp_path / "small", config=CONFIG)
    report = verify_folder(tmp_path / "small", _saved(tmp_path, images(9, seed=9)), teacher=BUILDER, weights=path)
    assert report.images_held_out == 9
    assert report.macs_student < Residual.macs
    seen = verify_folder(tmp_path / "small", _saved(tmp_path, images()), teacher=BUILDER, weights=path)
    assert "trained the student" in seen.notes[0]
    with pytest.raises(LawBroken, match=r"fc\.weight"):
        verify_folder(tmp_path / "small", _saved(tmp_path, images()), teacher=BUILDER)
    with pytest.raises(PlanError, match="plan for Residual to Chain"):
        verify_folder(tmp_path / "small", _saved(tmp_path, images()), teacher=BUILDER.replace("Residual", "Chain"))


def _saved(folder, tensor):
    import numpy as np

    np.save(folder / "images.npy", tensor.numpy())
    return folder / "images.npy"


class _Items(torch.utils.data.Dataset):
    """Images with labels. key: of the image, in a dict."""

    def __init__(self, values, key=None):
        self.values, self.key = values, key

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return (self.values[i], 1) if self.key is None else {self.key: self.values[i], "label": 1}


@pytest.mark.parametrize(
    "given",
    [
        lambda x, _: x,
        lambda x, _: x.numpy(),
        lambda x, _: list(x),
        lambda x, _: _Items(x),
        lambda x, _: _Items(x, "pixel_values"),
        lambda x, folder: _saved(folder, x),
    ],
    ids=["tensor", "array", "list", "pairs", "dicts", "file"],
)
def test_a_module_takes_its_size_from_floating_point_images(given, tmp_path):
    wide = torch.randn(12, 3, 8, 12)
    result = compress(randomised(Chain()).train(), given(wide, tmp_path), keep=0.5, config=CONFIG)
    assert result.report.macs_teacher == Chain.macs + (Chain.macs - 16 * 5) // 2
    assert not any("nothing says" in note for note in result.report.notes)


def test_a_module_takes_its_size_from_the_example():
    model, pixels = randomised(Chain()).train(), torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8)
    result = compress(model, pixels, keep=0.5, config=CONFIG, example=torch.zeros(2, 3, 8, 8))
    assert result.report.macs_teacher == Chain.macs
    grey = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    result = compress(grey, torch.rand(12, 1, 9, 9), keep_width=0.5, config=CONFIG)
    assert result.report.macs_teacher == 49 * 6 * 9 + 25 * 6 * 8 * 9 + 8 * 3
    assert model.training


def test_a_module_without_a_known_size_is_a_teacher_of_224_pixels_and_a_note_says_so():
    teacher = teacher_of(randomised(Chain()), torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert teacher.preprocessing.input_size == (3, 224, 224)
    assert teacher.notes == [
        "nothing says for which size the network is: images are resized to 3x224x224; give example=, a batch as it "
        "takes them, or the teacher own_teacher(module, Preprocessing(...))"
    ]
    read = us.read_images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), PREPROCESSING)
    assert teacher_of(randomised(Chain()), read).preprocessing == PREPROCESSING


@pytest.mark.long
@pytest.mark.parametrize("few", [24, 260], ids=["last step", "best step"])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_result(tmp_path, few, monkeypatch):
    config, given = preset("default", steps=6, lr=3e-3, views="none"), images(few)
    whole = compress(make_teacher(), given, keep=0.5, folder=tmp_path / "whole", config=config)

    def stop(done, total, loss):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stopped:
        compress(make_teacher(), given, keep=0.5, folder=tmp_path / "small", config=config, on_step=stop)
    part = stopped.value.log
    assert part.stopped
    assert part.report.steps == 2
    assert "stopped after 2 of 6 steps" in part.report.notes
    assert equal_models(part.model, us.load(tmp_path / "small", lambda **_: make_teacher().model))
    assert not equal_models(part.model, whole.model)

    # Other options, other images: it says so, and nothing changes.
    for change in ({"keep": 0.4}, {"config": replace(config, seed=7)}, {"images": images(few, seed=3)}):
        asked = {"images": given, "keep": 0.5, "config": config} | change
        with pytest.raises(InputError, match=r"stopped with other .*(budget \(keep\)|config \(seed\)|images)"):
            compress(make_teacher(), folder=tmp_path / "small", resume=True, **asked)
    with pytest.raises(StoreError, match="exist"):
        compress(make_teacher(), given, keep=0.5, folder=tmp_path / "small", config=config)
    # Another teacher of the same shape, or prepared otherwise.
    other = own_teacher(randomised(Residual(), seed=5), PREPROCESSING)
    brighter = own_teacher(randomised(Residual()), us.Preprocessing((3, 8, 8), (0.4,) * 3, (0.5,) * 3))
    for teacher in (other, brighter):
        with pytest.raises(InputError, match="stopped with other teacher"):
            compress(teacher, given, keep=0.5, folder=tmp_path / "small", config=config, resume=True)

    # The closed form and the evidence are not asked for again.
    for name in ("channel_evidence", "recover"):
        module = import_module(
            "mimicut.workflow.deciding" if name == "channel_evidence" else "mimicut.recovery.recover"
        )
        what = name if name == "channel_evidence" else "closed_form"
        monkeypatch.setattr(module, what, lambda *_, **__: pytest.fail("done before"))
    again = compress(make_teacher(), given, keep=0.5, folder=tmp_path / "small", config=config, resume=True)
    assert equal_models(again.model, whole.model)
    assert again.plan.to_json() == whole.plan.to_json()
    assert again.recovery.to_json().keys() == whole.recovery.to_json().keys()
    assert (again.recovery.mimic.losses, again.report.steps) == (whole.recovery.mimic.losses, 6)
    assert not any("stopped" in note for note in again.report.notes)
    assert equal_models(again.model, us.load(tmp_path / "small", lambda **_: make_teacher().model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "whole"]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """Nothing but the file beside the folder is there then; resume without one is a run like any other."""
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_PAUSE", 0.0)
    whole = compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "whole", config=CONFIG, resume=True)

    def die(done, total, loss):
        if done == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "small", config=CONFIG, on_step=die)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.stopped.safetensors", "whole"]
    steps = []
    again = compress(
        make_teacher(), images(), keep=0.5, folder=tmp_path / "small", config=CONFIG, resume=True,
        on_step=lambda done, *_: steps.append(done),
    )  # fmt: skip
    assert steps[0] == 3
    assert equal_models(again.model, whole.model)
    (tmp_path / "small.stopped.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StoreError, match="not the file of a stopped run"):
        compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "small", config=CONFIG, resume=True)


def equal_models(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def stopping(at=2):
    def stop(done, total, loss):
        if done == at:
            raise KeyboardInterrupt

    return stop


def killed_before(kind, name, number=1):
    """An observer that stops, as a kill does, before the nth change of a kind that concerns a path."""
    left = [number]

    def observe(when, what, path):
        if (when, what) == ("before", kind) and path.name == name:
            left[0] -= 1
            if not left[0]:
                raise MemoryError("killed")

    return observe


def test_a_run_that_is_complete_is_there_already(tmp_path, monkeypatch):
    """Also when it was killed between saving and tidying; another run is refused, and with force it starts again."""
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_PAUSE", 0.0)
    folder = tmp_path / "small"
    asked = {"keep": 0.5, "folder": folder, "config": CONFIG, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(disk, "observer", killed_before("remove", stopped_path(folder).name))
        with pytest.raises(MemoryError):
            compress(make_teacher(), images(), **asked)
    assert stopped_path(folder).exists()
    before, said = (folder / "report.json").read_bytes(), []
    again = compress(make_teacher(), images(), **asked, on_stage=said.append)
    assert "already complete" in said
    assert again.recovery is None
    assert (folder / "report.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    assert equal_models(again.model, us.load(folder, lambda **_: make_teacher().model))
    with pytest.raises(StoreError, match="it exists, and was made with other images"):
        compress(make_teacher(), images(seed=3), **asked)
    with pytest.raises(StoreError, match="it exists, and was made with other budget"):
        compress(make_teacher(), images(), **(asked | {"keep": 0.6}))
    with pytest.raises(StoreError, match="it exists"):
        compress(make_teacher(), images(), **(asked | {"resume": False}))
    assert compress(make_teacher(), images(), **(asked | {"keep": 0.6, "force": True})).recovery is not None


def test_a_stopped_run_that_was_killed_while_it_saved_its_part_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    whole = compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "whole", config=CONFIG)
    with monkeypatch.context() as patch:
        # The second checkpoint says what was saved.
        patch.setattr(disk, "observer", killed_before("move", stopped_path(folder).name, 2))
        with pytest.raises(MemoryError):
            compress(make_teacher(), images(), keep=0.5, folder=folder, config=CONFIG, on_step=stopping())
    assert us.load(folder, lambda **_: make_teacher().model)
    again = compress(make_teacher(), images(), keep=0.5, folder=folder, config=CONFIG, resume=True)
    assert equal_models(again.model, whole.model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "whole"]


@pytest.mark.long
def test_folds_that_were_interrupted_are_made_when_the_run_is_resumed(tmp_path, monkeypatch):
    module, folder = import_module("mimicut.workflow.crossfit"), tmp_path / "small"
    asked = {"keep": 0.5, "folder": folder, "config": CONFIG, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(module, "_pooled", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            us.crossfit(make_teacher(), images(), 2, **asked)
    again = us.crossfit(make_teacher(), images(), 2, **asked)
    assert again.report.crossfit == 2
    monkeypatch.setattr(module, "_pooled", lambda *_: pytest.fail("made before"))
    assert us.crossfit(make_teacher(), images(), 2, **asked).report.crossfit == 2
    with pytest.raises(StoreError, match="it exists, and was made with other crossfit"):
        us.crossfit(make_teacher(), images(), 3, **asked)


def test_a_student_that_does_not_load_back_replaces_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    compress(make_teacher(), images(), keep=0.5, folder=folder, config=CONFIG)
    before = (folder / "weights.safetensors").read_bytes()

    def other(*args):
        model = us.load(*args)
        next(model.parameters()).data.add_(1)
        return model

    monkeypatch.setattr(import_module("mimicut.workflow.compress"), "load_model", other)
    with pytest.raises(LawBroken, match="nothing was changed there"):
        compress(make_teacher(), images(), keep=0.6, folder=folder, config=CONFIG, force=True)
    assert (folder / "weights.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_stopped_run_is_given_up_by_force_alone_and_replaces_its_own_part_alone(tmp_path):
    folder = tmp_path / "small"
    with pytest.raises(Stopped):
        compress(make_teacher(), images(), keep=0.5, folder=folder, config=CONFIG, on_step=stopping())
    before = stopped_path(folder).read_bytes()
    shutil.move(folder, tmp_path / "part")
    with pytest.raises(StoreError, match=r"resume continues it, force discards it"):
        compress(make_teacher(), images(), keep=0.4, folder=folder, config=CONFIG)
    assert stopped_path(folder).read_bytes() == before
    compress(make_teacher(), images(), keep=0.6, folder=tmp_path / "other", config=CONFIG)
    shutil.move(tmp_path / "other", folder)
    with pytest.raises(StoreError, match="exists"):
        compress(make_teacher(), images(), keep=0.5, folder=folder, config=CONFIG, resume=True)
    shutil.rmtree(folder)
    folder.mkdir()
    compress(make_teacher(), images(), keep=0.4, folder=folder, config=CONFIG, force=True)
    assert not stopped_path(folder).exists()


def test_ctrl_c_in_the_trial_of_the_pace_keeps_nothing(tmp_path, monkeypatch):
    right = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return right(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(KeyboardInterrupt) as error:
        compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "small", config=CONFIG)
    assert type(error.value) is KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("mimicut.recovery.training_loop._CHECKPOINT_PAUSE", 0.0)
    said = []

    def full(when, kind, path):
        if (when, kind) == ("before", "move") and path.name.endswith(".stopped.safetensors"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "observer", full)
    result = compress(
        make_teacher(), images(), keep=0.5, folder=tmp_path / "small", config=CONFIG, on_stage=said.append
    )  # fmt: skip
    assert result.folder == tmp_path / "small"
    assert any("No space left" in text and "it cannot be resumed" in text for text in said)
    with pytest.raises(Stopped) as stopped:
        compress(make_teacher(), images(), keep=0.5, folder=tmp_path / "again", config=CONFIG, on_step=stopping())
    assert stopped.value.log.folder == tmp_path / "again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "small"]


def test_no_time_is_said_and_still_gives_a_result():
    said = []
    result = compress(
        make_teacher(), images(), keep=0.5, config=preset("default", steps=3, views="none"), max_seconds=0.0,
        on_stage=said.append,
    )  # fmt: skip
    assert result.report.steps == 0
    assert result.recovery.closed_form is None
    assert "there is no time for the closed form" in said
    assert "there is no time left to mimic" in said


def test_a_device_without_data_is_refused_before_any_work():
    with pytest.raises(InputError, match="'meta': it holds no data"):
        compress(make_teacher(), images(), keep=0.5, config=replace(CONFIG, device="meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_teacher_that_is_not_finite_any_more_is_the_reason_before_any_work(value):
    teacher = make_teacher()
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(value)
    stages = []
    with pytest.raises(UnsupportedModel, match=r"checking the (teacher|images)") as caught:
        compress(teacher, images(), keep=0.5, config=CONFIG, on_stage=stages.append)
    assert caught.value.exit_code == 3
    assert "lower lr" not in str(caught.value)
    assert not any("cutting" in stage for stage in stages)


def test_images_of_absurd_values_are_the_reason():
    with pytest.raises(InputError, match=r"hold values up to 1\.\de\+3\d.*prepare them"):
        compress(make_teacher(), 1e30 * images().clamp(-1, 1), keep=0.5, config=CONFIG)
