"""A folder is whole or not there, and what comes out is what went in, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile import without_plan_digest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mimicut.base import disk
from mimicut.base.errors import InputError, LawBroken, PlanError, StoreError
from mimicut.base.guard import same_bits
from mimicut.base.scratch import locked
from mimicut.recovery.checkpoint import Checkpoint
from mimicut.results import store
from mimicut.results.files import FILES, PAGES, sha256
from mimicut.results.folder import check_writable, previous_path
from mimicut.results.load_result import as_teacher, load
from mimicut.results.report import Report
from mimicut.results.stopped_runs import read_stopped, write_stopped
from mimicut.results.store import digest_notes, put_report, read, save
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import Plan, describe, read_plan
from mimicut.surgery.seam import Seam, SeamPoint

# Written to a file, too, for a fresh process: tied weights, a parametrised layer, a buffer that no state dict holds, an
# expanded one, a batch norm with its scalar counter.
BUILDER = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 1))
        self.fc = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.fc.weight
        self.register_buffer("offset", torch.zeros(5), persistent=False)
        self.register_buffer("places", torch.arange(5).expand(2, 5), persistent=False)
        self.register_buffer("order", torch.arange(2, dtype=torch.int16))

    def forward(self, x):
        x = self.two(self.norm(self.one(x)).relu()).mean((2, 3))
        return self.again(self.fc(x)) + self.offset + self.places[0]


def build():
    return Net()
"""
SPACE: dict = {}
exec(BUILDER, SPACE)
build = SPACE["build"]
SEAM = Seam((SeamPoint("two"),), ((5, 6, 6),), ("fc.weight", "fc.bias"))
KEPT = [0, 3]


def make_plan(teacher, source=None):
    norm = {f"norm.{name}": {0: KEPT} for name in ("weight", "bias", "running_mean", "running_var")}
    slices = {"one.weight": {0: KEPT}, "one.bias": {0: KEPT}, **norm}
    slices["two.parametrizations.weight.original1"] = {1: KEPT}
    sizes = [("one", "out_channels"), ("norm", "num_features"), ("two", "in_channels")]
    edits = [{"module": m, "attribute": a, "index": None, "from": 4, "to": 2} for m, a in sizes]
    return Plan(describe(teacher, source), SEAM, {"one": 2}, {"one": KEPT}, slices, edits)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return build()


@pytest.fixture
def student(teacher):
    model = cut(teacher, make_plan(teacher))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
        model.norm.num_batches_tracked.add_(7)
    return model.eval()


@pytest.fixture
def saved(tmp_path, teacher, student):
    folder = tmp_path / "result"
    save(folder, model=student, plan=make_plan(teacher), report=Report(steps=3, notes=("few",)), extra={"size": [3, 8]})
    return folder


def tensors(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


# --- there and back


def test_every_tensor_comes_back_bit_for_bit(saved, student):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = load(saved, build)
    assert torch.equal(state, torch.get_rng_state())
    loaded, expected = tensors(model), tensors(student)
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not same_bits(loaded[name], expected[name])] == []
    assert model.again.weight is model.fc.weight
    with safe_open(saved / "weights.safetensors", "pt") as file:
        assert expected.keys() - set(file.keys()) == {"again.weight"}
    assert not any(m.training for m in model.modules())
    assert sorted(p.name for p in saved.iterdir()) == sorted([*FILES, *PAGES])
    assert sorted(p.name for p in saved.parent.iterdir()) == ["result"]


@pytest.mark.long
def test_a_fresh_process_gives_the_same_outputs(saved, student, tmp_path):
    (tmp_path / "mine.py").write_text(BUILDER)
    torch.manual_seed(5)
    images = torch.randn(4, 3, 8, 8)
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "from mimicut.results.load_result import load\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "x = load_file('in.safetensors')['x']\n"
        "with torch.no_grad(): save_file({'y': load('result', 'mine.py:build')(x)}, 'out.safetensors')\n"
    )
    save_file({"x": images}, tmp_path / "in.safetensors")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment, timeout=120)
    with torch.no_grad():
        assert same_bits(load_file(tmp_path / "out.safetensors")["y"], student(images))


def test_named_teachers_are_built_without_their_maker(tmp_path):
    import torchvision

    teacher = torchvision.models.shufflenet_v2_x0_5().eval()
    source = {"spec": "torchvision:shufflenet_v2_x0_5", "options": {}}
    seam = Seam((SeamPoint("conv5"),), ((1024, 7, 7),), ("fc.weight", "fc.bias"))
    plan = Plan(describe(teacher, source), seam, {}, {}, {}, [])
    save(tmp_path / "r", model=teacher, plan=plan, report=Report())
    loaded, expected = tensors(load(tmp_path / "r")), tensors(teacher)
    assert all(same_bits(loaded[name], expected[name]) for name in expected)


def test_plan_report_and_extra_come_back(saved, teacher):
    plan, report, extra = read(saved)
    assert plan == make_plan(teacher)
    assert report == Report(steps=3, notes=("few",))
    assert extra == {"size": [3, 8]}


def test_the_same_model_gives_the_same_bytes(saved, tmp_path, teacher, student):
    save(tmp_path / "b", model=student, plan=make_plan(teacher), report=Report(steps=3, notes=("few",)))
    assert (saved / "weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()


def test_nothing_is_pickled(saved):
    for data in contents(saved).values():
        assert b"\x80\x02" not in data[:4]
        assert not data.startswith(b"PK")


def test_views_of_one_storage_and_slices_of_tensors(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.arange(12.0).reshape(3, 4)
            self.register_buffer("whole", base)
            self.register_buffer("turned", base.t())
            self.register_buffer("part", base[1:, 1:])
            self.weight = nn.Parameter(torch.ones(2))

    model = Views()
    plan = Plan(describe(model), Seam((SeamPoint(""),), ((1,),), ()), {}, {}, {}, [])
    save(tmp_path / "v", model=model, plan=plan, report=Report())
    loaded = load(tmp_path / "v", Views)
    assert all(same_bits(value, tensors(loaded)[name]) for name, value in tensors(model).items())


# --- loading what does not fit


def test_own_teachers_must_be_named_again(saved):
    with pytest.raises(InputError, match="build_teacher="):
        load(saved)


def test_another_teacher_is_named_by_its_first_difference(saved):
    def other():
        net = build()
        net.fc = nn.Linear(5, 7)
        return net

    with pytest.raises(PlanError, match=r"fc\.weight is 7x5 float32, expected 5x5 float32"):
        load(saved, other)


def test_weights_of_another_result_are_named_by_their_first_difference(saved, teacher):
    other = saved.parent / "other"
    plan = Plan(describe(teacher), SEAM, {}, {}, {}, [])
    save(other, model=teacher, plan=plan, report=Report())
    for name in ("weights.safetensors", "report.json"):
        shutil.copy(other / name, saved / name)
    with pytest.raises(StoreError, match=r"plan\.json: its content is not what was saved"):
        load(saved, build)
    without_plan_digest(saved)
    with pytest.raises(
        StoreError, match=r"'one\.weight': the model has \(2, 3, 3, 3\) float32, the file \(4, 3, 3, 3\)"
    ):
        load(saved, build)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(StoreError, match=f"found no {name}"):
        load(saved, build)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("plan.json", lambda b: b[: len(b) // 2], "plan.json"),
        ("plan.json", lambda b: b"[1]", "plan.json: found a list, expected an object"),
        ("plan.json", lambda b: b"\xff\xfe" + b, "plan.json"),
        ("report.json", lambda b: b"", "report.json"),
        ("report.json", lambda b: b'{"epochs": 3}', "unknown entries epochs"),
        ("weights.safetensors", lambda b: b[:-1], "weights.safetensors: its content is not what was saved"),
        ("weights.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "weights.safetensors: its content is not"),
        ("weights.safetensors", lambda b: b"", "weights.safetensors: its content"),
    ],
)
def test_a_spoilt_file_is_named(saved, name, change, says):
    spoil(saved, name, change)
    with pytest.raises(StoreError, match=says):
        load(saved, build)


def test_a_weights_file_that_is_none_is_named(saved):
    (saved / "weights.safetensors").write_bytes(b"not tensors at all")
    report = json.loads((saved / "report.json").read_text())
    report["stored"]["weights_sha256"] = sha256(saved / "weights.safetensors")
    (saved / "report.json").write_text(json.dumps(report))
    with pytest.raises(StoreError, match=r"weights\.safetensors: .*expected the safetensors file of a result"):
        load(saved, build)


EDITS = {
    "a module passed by": {"dropped_modules": [["norm", "through"]], "drop": ["norm"]},
    "nothing but its layout": {},
    "the class of the teacher": {"notes": ["edited"]},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("use", [read, lambda folder: load(folder, build), lambda folder: as_teacher(folder, build)])
def test_a_plan_that_is_not_the_saved_one_is_refused(saved, edit, use):
    path = saved / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(StoreError, match=r"plan\.json: its content is not what was saved; .*edit a copy"):
        use(saved)


def test_a_result_without_a_digest_of_its_plan_loads_with_a_note(saved, student):
    without_plan_digest(saved)
    with pytest.warns(UserWarning, match="without a digest of its plan"):
        again = load(saved, build)
    assert all(same_bits(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))
    put_report(saved, Report())  # which does not vouch for a plan that nothing was compared with
    assert digest_notes(saved)


STRANGE = {
    "a stride": {"edits": [{"module": "one", "attribute": "stride", "index": 0, "from": 2, "to": 1}]},
    "a padding": {"edits": [{"module": "one", "attribute": "padding", "index": 0, "from": 1, "to": 0}]},
    "a size that grows": {"edits": [{"module": "one", "attribute": "out_channels", "index": None, "from": 4, "to": 9}]},
    "a stride in a call": {
        "calls": [{"module": "one", "function": "conv2d", "index": 0, "place": 0, "from": 1, "to": 2}]
    },
    "a pooling": {
        "calls": [{"module": "", "function": "avg_pool2d", "index": 0, "place": 0, "from": 3, "to": 2}]
    },
    "many results": {"dropped_modules": [["norm", "zero:99999999"]], "drop": ["norm"]},
    "a dropped module without a block": {"dropped_modules": [["norm", "zero"]]},
}  # fmt: skip


@pytest.mark.parametrize("edit", STRANGE.values(), ids=STRANGE)
def test_a_plan_changes_only_what_counts_channels(teacher, edit):
    data = {**make_plan(teacher).to_json(), **edit}
    with pytest.raises(PlanError, match=r"expected a size|count channels|up to 99|drop has no block"):
        Plan.from_json(json.loads(json.dumps(data)))


EDITED = [
    ("one", "stride", 0, 1), ("one", "__dict__", None, 1), ("one", "weight", None, 1), ("one.weight", "x", None, 1),
    ("norm", "num_batches_tracked", None, 0), ("one", "training", None, 1), ("one", "kernel_size", "0", 3),
    ("one", "kernel_size", -1, 3), ("two", "nothing", None, 4),
]  # fmt: skip


@pytest.mark.parametrize("place", EDITED, ids=str)
def test_a_cut_sets_only_sizes(teacher, place):
    module, attribute, index, value = place
    edit = {"module": module, "attribute": attribute, "index": index, "from": value, "to": 0}
    plan = replace(make_plan(teacher), slices={}, edits=[edit])
    with pytest.raises(PlanError, match="make the plan again"):
        cut(teacher, plan)


def test_a_convolution_in_code_is_given_other_groups_alone():
    class Moving(nn.Module):
        def forward(self, x):
            return nn.functional.conv2d(x, torch.ones(4, 1, 1, 1), None, 2, 0, 1, 4)

    def cut_to(place, given, right):
        call = {"module": "", "function": "conv2d", "index": 0, "place": place, "from": given, "to": right}
        return cut(Moving(), Plan(describe(Moving()), SEAM, {}, {}, {}, [], calls=[call]))

    with pytest.raises(RuntimeError, match="besides its groups"):
        cut_to(0, 2, 1)(torch.ones(1, 4, 4, 4))
    with pytest.raises(RuntimeError, match=r"Given groups=2"):  # torch: they are other groups
        cut_to(3, 4, 2)(torch.ones(1, 4, 4, 4))


def test_a_plan_edited_into_nonsense_is_named(saved):
    plan = json.loads((saved / "plan.json").read_text())
    plan["widths"]["one"] = -3
    (saved / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=r"plan\.json: widths\['one'\] is -3"):
        load(saved, build)


@pytest.mark.parametrize("name", ["plan.json", "report.json"])
@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 300 + "1" + "}" * 300, '{"a": NaN}', "1" * 5000], ids=str)
def test_json_that_no_file_of_ours_holds_is_named(saved, name, text):
    (saved / name).write_text(text)
    with pytest.raises((StoreError, PlanError), match=name.replace(".", r"\.")):
        load(saved, build)
    if name == "plan.json":
        with pytest.raises(PlanError, match=r"plan\.json"):
            read_plan(saved / name)


@pytest.mark.parametrize("metadata", ["[]", '{"shared": []}', '{"shared": {"a": 3}}', "3", "[" * 10**5])
def test_metadata_of_another_form_are_named(saved, metadata):
    path = saved / "weights.safetensors"
    save_file(load_file(path), path, metadata={"mimicut": metadata})
    report = json.loads((saved / "report.json").read_text())
    report["stored"]["weights_sha256"] = sha256(path)
    (saved / "report.json").write_text(json.dumps(report))
    with pytest.raises(StoreError, match=r"weights\.safetensors"):
        load(saved, build)


@pytest.mark.parametrize("metadata", ["[]", "3", "{}", '{"asked": 1, "plan": 2, "saved": 3}', "[" * 10**5])
def test_a_stopped_run_of_another_form_is_named(tmp_path, metadata):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.stopped.safetensors", metadata={"stopped": metadata})
    with pytest.raises(StoreError, match="not the file of a stopped run"):
        read_stopped(tmp_path / "a")


@pytest.mark.parametrize("use", [load, read, check_writable, as_teacher, read_stopped])
@pytest.mark.parametrize("place", ["a" * 255, "a/" * 3000, "loop", "loop/in", "a\0b", ""])
def test_what_cannot_be_the_path_of_a_result_is_named(tmp_path, monkeypatch, use, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreError, match=r"cannot be a path|empty name"):
        use(place)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere: found no plan.json, weights.safetensors, report.json"):
        load(tmp_path / "nowhere")


# --- saving where one may not


def save_again(folder, teacher, student, **options):
    return save(folder, model=student, plan=make_plan(teacher), report=Report(steps=99), **options)


def test_an_existing_folder_needs_force(saved, teacher, student):
    before = contents(saved)
    for attempt in (lambda: save_again(saved, teacher, student), lambda: check_writable(saved)):
        with pytest.raises(StoreError, match=r"it exists; .*--force"):
            attempt()
    assert contents(saved) == before
    save_again(saved, teacher, student, force=True)
    assert read(saved)[1].steps == 99
    assert [p.name for p in saved.parent.iterdir()] == ["result"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["holiday.jpg"], "holiday.jpg"),
        (["plan.json", "thesis.tex"], "thesis.tex"),
        (["report.json"], "no report.json of a result"),
        (["plan.json", "weights.safetensors", "model.onnx"], "no report.json of a result"),
        (["plan.json", ".export_settings"], ".export_settings"),
    ],
)
def test_force_does_not_replace_what_is_not_a_result(tmp_path, teacher, student, files, found):
    for name in files:
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("precious")
    with pytest.raises(StoreError, match=f"not a result of mimicut .found {found}"):
        save_again(tmp_path / "mine", teacher, student, force=True)
    assert sorted(contents(tmp_path / "mine")) == sorted(files)


def test_force_does_not_take_files_that_the_report_does_not_know(saved, teacher, student):
    (saved / "model.onnx").write_text("precious")
    with pytest.raises(StoreError, match=r"found model\.onnx"):
        save_again(saved, teacher, student, force=True)
    assert (saved / "model.onnx").read_text() == "precious"


def test_a_file_in_the_way_and_an_empty_folder(tmp_path, teacher, student):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreError, match="it is a file"):
        save_again(tmp_path / "file", teacher, student, force=True)
    (tmp_path / "empty").mkdir()
    save_again(tmp_path / "empty", teacher, student, force=True)
    assert sorted(contents(tmp_path / "empty")) == sorted([*FILES, *PAGES])


def test_missing_parents_are_made_by_save_only(tmp_path, teacher, student):
    check_writable(tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []
    save_again(tmp_path / "a/b/c", teacher, student)
    assert sorted(contents(tmp_path / "a/b/c")) == sorted([*FILES, *PAGES])


def test_a_read_only_parent_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Permission bits do not bind root, who runs the tests in many containers.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"cannot write in .* \(Permission denied\)"):
        check_writable(tmp_path / "result")


def test_a_read_only_result_is_not_replaced(saved, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StoreError, match="read-only"):
        check_writable(saved, force=True)


# --- interrupted


@pytest.mark.parametrize("where", ["write_weights", "write_json", "sha256"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_the_old_folder_whole(saved, teacher, student, monkeypatch, where, error):
    before = contents(saved)
    original = getattr(store, where)

    def stop(*args):
        original(*args)
        raise error

    monkeypatch.setattr(store, where, stop)
    with pytest.raises((KeyboardInterrupt, StoreError)):
        save_again(saved, teacher, student, force=True)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["result"]
    with pytest.raises((KeyboardInterrupt, StoreError)):
        save_again(saved.parent / "new", teacher, student)
    assert [p.name for p in saved.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_interrupted_between_the_renames(saved, teacher, student, monkeypatch, fails_at):
    before = contents(saved)
    calls = []

    def stop(when, kind, path):
        if (when, kind) == ("before", "move"):
            calls.append(path)
            if len(calls) == fails_at:
                raise KeyboardInterrupt

    monkeypatch.setattr(disk, "observer", stop)
    with pytest.raises(KeyboardInterrupt):
        save_again(saved, teacher, student, force=True)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["result"]


def test_killed_between_the_renames_the_old_result_is_found(saved, teacher, student):
    before = contents(saved)
    os.rename(saved, previous_path(saved))
    load(saved, build)
    check_writable(saved, force=True)
    assert contents(saved) == before


def test_killed_before_tidying_up_the_new_result_stays(saved, teacher, student):
    shutil.copytree(saved, previous_path(saved))
    save_again(saved, teacher, student, force=True)
    assert read(saved)[1].steps == 99
    assert [p.name for p in saved.parent.iterdir()] == ["result"]


# --- several writers


def test_what_another_process_saved_meanwhile_is_not_replaced(tmp_path, teacher, student):
    """Between the check and the save: the later one is kept beside, and says where."""
    folder, said = tmp_path / "result", []

    def meanwhile(fresh):
        save(folder, model=student, plan=make_plan(teacher), report=Report(steps=1))

    for number in (2, 3):
        with pytest.raises(StoreError, match=f"another process saved there .* this result is in .*result-{number}"):
            save_again(folder, teacher, student, check=said.append if folder.exists() else meanwhile)
        if number == 2:
            before = contents(folder)
            shutil.move(folder, tmp_path / "first")
    assert contents(tmp_path / "first") == before
    assert read(tmp_path / "result-2")[1].steps == 99
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "result", "result-2", "result-3"]


@pytest.mark.parametrize("there", ["file", "foreign folder", "export under way"])
def test_whatever_is_in_the_way_by_then_stays(saved, teacher, student, there):
    before = contents(saved)

    def meanwhile(fresh):
        if there == "file":
            shutil.move(saved, saved.with_name("moved"))
            saved.write_text("mine")
        elif there == "foreign folder":
            (saved / "thesis.tex").write_text("mine")
        else:
            held.enter_context(locked(saved))

    with ExitStack() as held, pytest.raises(StoreError, match=r"this result is in .*result-2"):
        save_again(saved, teacher, student, force=True, check=meanwhile)
    assert read(saved.with_name("result-2"))[1].steps == 99
    if there == "file":
        assert saved.read_text() == "mine"
    else:
        assert before.items() <= contents(saved).items()


def test_with_force_both_may_replace_and_the_last_one_stays(saved, teacher, student):
    def meanwhile(fresh):
        save(saved, model=student, plan=make_plan(teacher), report=Report(steps=1), force=True)

    save_again(saved, teacher, student, force=True, check=meanwhile)
    assert read(saved)[1].steps == 99
    assert [p.name for p in saved.parent.iterdir()] == ["result"]


def test_a_folder_that_fails_its_check_replaces_nothing(saved, teacher, student):
    before = contents(saved)

    def check(fresh):
        assert contents(fresh).keys() == before.keys()
        raise LawBroken("not bit-equal")

    with pytest.raises(LawBroken):
        save_again(saved, teacher, student, force=True, check=check)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["result"]


def test_every_file_has_the_mode_of_the_umask(tmp_path, teacher, student):
    before = os.umask(0o027)
    try:
        folder = save_again(tmp_path / "result", teacher, student)
        checkpoint = write_stopped(folder, Checkpoint({"a": torch.zeros(3)}))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in [*folder.iterdir(), checkpoint]} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


# --- what cannot be stored


def test_what_no_file_can_hold_is_named(tmp_path, teacher, student):
    with pytest.raises(StoreError, match=r"'one\.weight' is on meta"):
        save_again(tmp_path / "r", teacher, student.to("meta"))
    with pytest.raises(StoreError, match=r"report\.json: .*not JSON serializable"):
        save(tmp_path / "r", model=build(), plan=make_plan(teacher), report=Report(), extra={"x": {1, 2}})
    with pytest.raises(StoreError, match=r"report\.json: Out of range float"):
        save(tmp_path / "r", model=build(), plan=make_plan(teacher), report=Report(), extra={"x": float("nan")})

    class Remembers(nn.Linear):
        def get_extra_state(self):
            return {"any": "object"}

        def set_extra_state(self, state):
            pass

    with pytest.raises(StoreError, match="'_extra_state' is not a tensor"):
        save(tmp_path / "r", model=Remembers(1, 1), plan=make_plan(teacher), report=Report())
    assert list(tmp_path.iterdir()) == []


def test_a_buffer_that_the_network_makes_anew_is_loaded_as_it_was(tmp_path):
    class Lazy(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("grid", torch.zeros(1), persistent=False)

    def built():
        torch.manual_seed(0)
        return Lazy()

    model = built()
    model.grid = torch.arange(4.0)
    plan = Plan(describe(model), Seam((SeamPoint(""),), ((3,),), ()), {}, {}, {}, [])
    with pytest.raises(PlanError, match="grid"):
        load(save(tmp_path / "a", model=model, plan=plan, report=Report()), built)
    plan = Plan(describe(built()), plan.seam, {}, {}, {}, [])
    again = load(save(tmp_path / "b", model=model, plan=plan, report=Report()), built)
    assert torch.equal(again.grid, model.grid)
    assert "grid" not in again.state_dict()
