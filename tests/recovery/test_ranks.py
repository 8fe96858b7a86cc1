"""Several processes that mimic one student, and a device whose memory runs out."""

import copy
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nets
import pytest
import torch
from command_line import call
from nets import Chain

import mimicut
from mimicut.anatomy.find_seam import trace
from mimicut.base import guard, ranks
from mimicut.base.errors import InputError, Stopped
from mimicut.base.ranks import RankLost, Ranks, joined
from mimicut.planning import evidence
from mimicut.planning.planner import make_plan
from mimicut.proof.randomised import randomised
from mimicut.recovery.closed_form import ClosedFormOptions, closed_form
from mimicut.recovery.config import preset
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.mimic import mimic
from mimicut.recovery.training_loop import TrainingLoop
from mimicut.results.stopped_runs import stopped_path
from mimicut.surgery.cut import cut

PACKAGE = Path(mimicut.__file__).parent
FEW = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def networks():
    torch.manual_seed(0)
    teacher = Chain().eval()
    anatomy = trace(teacher, FEW[:2])
    return teacher, cut(teacher, make_plan(teacher, anatomy, keep_width=0.5)), anatomy.seam


def recipe(steps=6, **changes):
    return preset("default", steps=steps, lr=1e-2, views="none", batch_size=8, **changes)


class Alone:
    """One process of one: there is nothing to add, and the others are lost at a step."""

    rank, count, first = 0, 1, True

    def __init__(self, lost_at, error=RankLost):
        self.left, self.error = lost_at, error

    def share(self, images):
        return slice(0, images)

    def add_up(self, tensors):
        if not self.left:
            raise self.error("another process of this run ended (test)")
        self.left -= 1

    def copy_first(self, tensors):
        pass

    def of_first(self, value):
        return value


class Side:
    """One of several processes that are threads here: each tensor goes through a list that all of them see."""

    def __init__(self, rank, count, shared):
        self.rank, self.count, self.first, self.shared = rank, count, not rank, shared

    owns = Ranks.owns

    def _all(self, value):
        values, barrier = self.shared
        values[self.rank] = value
        barrier.wait(60)
        found = list(values)
        barrier.wait(60)
        return found

    def of_first(self, value):
        return self._all(value)[0]

    def copy_first(self, tensors):
        for tensor in tensors:
            tensor.copy_(self._all(tensor.clone())[0])

    def add_up(self, tensors):
        for tensor in tensors:
            found = self._all(tensor.clone())
            assert len({(each.shape, each.dtype) for each in found}) == 1
            tensor.copy_(sum(found))


def side_by_side(count, work):
    """What `work(ranks)` returns in each of so many processes."""
    shared = [None] * count, threading.Barrier(count)

    def run(rank):
        try:
            with torch.no_grad():
                return work(Side(rank, count, shared))
        except BaseException:
            shared[1].abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("points", [None, ["stage1", "stage2"]], ids=["one point", "two points"])
@pytest.mark.parametrize(
    ("count", "seconds", "part"), [(2, None, 16), (5, None, 8), (3, 1e9, 16), (60, None, 16)],
    ids=["two", "some without gradients", "a time limit", "more than parts"],
)  # fmt: skip
def test_processes_have_the_evidence_of_one(points, count, seconds, part, monkeypatch):
    monkeypatch.setattr(evidence, "_PART", part)
    monkeypatch.setattr(evidence, "affordable_views", lambda anatomy: 2 * 90)
    teacher = randomised(nets.Residual())
    anatomy, few = trace(teacher, FEW[:2], points=points), FEW

    def work(ranks, model=teacher):
        return evidence.channel_evidence(copy.deepcopy(model), anatomy, few, max_seconds=seconds, ranks=ranks)

    alone, found = work(None), side_by_side(count, work)
    assert len(alone.scores) > 3
    for each in found if count < 60 else found[:1]:
        assert each.scores.keys() == alone.scores.keys()
        for name, scores in alone.scores.items():
            assert (each.scores[name] == scores).all(), name
            assert each.errors[name][1:] == pytest.approx(alone.errors[name][1:], rel=1e-4), name
    assert count < 60 or not any(each.scores for each in found[1:])


@pytest.mark.parametrize(
    ("count", "views"), [(2, 300), (3, 300), pytest.param(9, 24, marks=pytest.mark.long)],
    ids=["two", "three", "more than batches"],
)  # fmt: skip
def test_processes_solve_the_layers_of_one(count, views):
    teacher = randomised(nets.Residual())
    anatomy = trace(teacher, FEW[:2])
    plan = make_plan(teacher, anatomy, keep_width=0.5)

    def work(ranks):
        student = cut(teacher, plan).eval()
        case = CutStudent(copy.deepcopy(teacher), student, anatomy, plan)
        log = closed_form(case, FEW, ClosedFormOptions(count_views=views), ranks=ranks)
        return student(FEW), [(each.layer, each.ridge, each.gated) for each in log.layers]

    (alone, layers), found = work(None), side_by_side(count, work)
    assert any(gated for *_, gated in layers)
    for features, own in found:
        assert own == layers
        assert torch.allclose(features, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cut(teacher, plan).eval()(FEW), alone, rtol=1e-2)


def test_the_shares_of_all_processes_are_the_batch():
    shares = [Ranks(rank, 3).share(8) for rank in range(3)]
    assert [i for share in shares for i in range(8)[share]] == list(range(8))
    with pytest.raises(InputError, match="at least one for each device"):
        Ranks(0, 3).share(2)


def test_gradients_of_the_shares_add_up_to_those_of_the_batch(monkeypatch):
    found = []
    monkeypatch.setattr(Ranks, "add_up", lambda self, tensors: found.append([t.clone() for t in tensors]))
    monkeypatch.setattr(Ranks, "copy_first", lambda self, tensors: None)
    monkeypatch.setattr(Ranks, "of_first", lambda self, value: value)
    teacher, student, seam = networks()
    for each in (Ranks(0, 1), Ranks(0, 3), Ranks(1, 3), Ranks(2, 3)):
        mimic(teacher, copy.deepcopy(student), seam, FEW, recipe(steps=1), ranks=each)
    whole, *parts = found
    assert len(whole) > 3
    for place, wanted in enumerate(whole):
        total = sum(part[place] for part in parts)
        assert torch.allclose(total, wanted, rtol=1e-4, atol=1e-7)


def test_a_lost_process_stops_the_run_between_steps_and_it_goes_on_to_the_same_bits():
    teacher, student, seam = networks()
    whole, other = copy.deepcopy(student), copy.deepcopy(student)
    mimic(teacher, whole, seam, FEW, recipe())
    with pytest.raises(Stopped, match="stopped") as stopped:
        mimic(teacher, other, seam, FEW, recipe(), ranks=Alone(lost_at=4))
    assert "another process" in stopped.value.reason
    assert len(stopped.value.log.losses) == 4
    mimic(teacher, other, seam, FEW, recipe(), checkpoint=stopped.value.checkpoint)
    for name, tensor in guard.named_tensors(whole).items():
        assert guard.same_bits(tensor, guard.named_tensors(other)[name]), name


def test_batch_statistics_of_several_devices_are_refused():
    teacher, student, seam = networks()
    with pytest.raises(InputError, match="2 devices: norm_mode is 'train'"):
        mimic(teacher, student, seam, FEW, recipe(norm_mode="train"), ranks=Ranks(0, 2))


@pytest.mark.parametrize("what", ["teacher", "images"])
def test_a_process_with_another_teacher_or_other_images_is_refused(monkeypatch, what):
    teacher, student, seam = networks()
    monkeypatch.setattr(Ranks, "of_first", lambda self, value: {**value, what: "other"})
    with pytest.raises(InputError, match=f"2 devices: the {what} of process 1 differ"):
        mimic(teacher, student, seam, FEW, recipe(), ranks=Ranks(1, 2))


def test_more_devices_than_there_are_is_one_clear_line():
    with pytest.raises(InputError, match=r"working on 4000 devices: found \d+ processor core"), joined(4000, "cpu", []):
        pass
    with pytest.raises(InputError, match="--devices 2 and --device cuda:1"), joined(2, "cuda:1", []):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", 0.5, "--keep", 0.7), "working on 2 devices: found several budgets, whose runs follow one another"),
        (("--keep", 0.5, "--crossfit", 3), "working on 2 devices: found crossfit, whose runs follow one another"),
        (("--keep", 0.5, "--preset", "paper"), "mimicking on 2 devices: norm_mode is 'train'"),
        (("--keep", 0.5, "--device", "cpu:0"), "working on several devices: found --devices 2 and --device cpu:0"),
    ],
)
def test_what_several_devices_cannot_do_is_refused_before_processes_start(place, capsys, monkeypatch, options, words):
    monkeypatch.setattr(ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(ranks, "_others", lambda *given: pytest.fail("a process was started"))
    shared = ("compress", "net.py:build", "photos", "--out", "small", "--devices", 2)
    code, _, said = call(capsys, *shared, *(() if "--device" in options else ("--device", "cpu")), *options)
    assert code == 2
    assert words in said


def test_torchrun_with_another_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="torchrun started 3"), joined(2, "cpu", []):
        pass


# --- what goes between processes


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Ranks(0, 1)
    torch.distributed.destroy_process_group()


@pytest.fixture
def other(monkeypatch):
    """Another process, as if started here."""
    with tempfile.TemporaryFile() as words, subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as process:
        monkeypatch.setattr(ranks, "_started", [(process, words)])
        words.write(b"no room left\n")
        yield process
        process.kill()


class Hanging:
    """What another process never answers."""

    def is_completed(self):
        return False


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.bfloat16, torch.complex64, torch.int64])
def test_tensors_of_every_type_are_sent(alone, dtype):
    for tensor in (torch.ones((), dtype=dtype), torch.ones(2, 3, dtype=dtype).T, torch.ones(0, dtype=dtype)):
        before = tensor.clone()
        alone.copy_first([tensor])
        assert guard.same_bits(tensor, before)
    assert alone.of_first({"plan": [1, None]}) == {"plan": [1, None]}


def test_what_cannot_be_added_up_is_not_called_a_lost_process(alone):
    with pytest.raises(RuntimeError, match="type"):
        alone.add_up([torch.ones(2, dtype=torch.int16)])


def test_an_interrupt_ends_the_wait_for_a_process_that_hangs(other, monkeypatch):
    monkeypatch.setattr(ranks, "time", SimpleNamespace(sleep=lambda seconds: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        ranks._await(Hanging(), torch.ones(1))
    assert other.wait(10) != 0  # else the end of this process would wait for it


def test_the_end_of_a_process_ends_the_wait_for_it(other, monkeypatch):
    monkeypatch.setattr(ranks, "_END_SECONDS", 0.0)
    other.communicate(b"")
    with pytest.raises(RankLost, match="ended; its last words: no room left"):
        ranks._await(Hanging(), torch.ones(1))


def test_a_process_that_ends_before_it_is_connected_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(ranks, "usable_cores", lambda: 2)
    expected = pytest.raises(InputError, match="could not be connected: one of them ended; its last words")
    with expected, joined(2, "cpu", ["no-such-command"]):
        pass


def test_an_interrupt_while_gradients_are_added_up_leaves_the_student_as_before_that_step():
    teacher, student, seam = networks()
    whole = copy.deepcopy(student)
    mimic(teacher, whole, seam, FEW, recipe())
    with pytest.raises(Stopped) as stopped:
        mimic(teacher, student, seam, FEW, recipe(), ranks=Alone(lost_at=4, error=KeyboardInterrupt))
    assert len(stopped.value.log.losses) == 4
    mimic(teacher, student, seam, FEW, recipe(), checkpoint=stopped.value.checkpoint)
    for name, tensor in guard.named_tensors(whole).items():
        assert guard.same_bits(tensor, guard.named_tensors(student)[name]), name


# --- memory of the device


def memory_runs_out(monkeypatch, most):
    """Let a pass over more than `most` images end as on a device whose memory ran out."""
    plain = TrainingLoop._features

    def features(self, capture, folded, batch):
        if len(batch[0][0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, capture, folded, batch)

    monkeypatch.setattr(TrainingLoop, "_features", features)


def test_a_batch_that_does_not_fit_goes_through_in_parts_to_the_same_student(monkeypatch):
    teacher, student, seam = networks()
    whole, parted = copy.deepcopy(student), copy.deepcopy(student)
    mimic(teacher, whole, seam, FEW, recipe())
    memory_runs_out(monkeypatch, 3)
    log = mimic(teacher, parted, seam, FEW, recipe())
    assert (log.parts, log.halved) == (4, 2)
    with torch.no_grad():
        wanted, found = whole(FEW), parted(FEW)
    assert float((wanted - found).norm() / wanted.norm()) < 1e-4


def test_no_room_for_one_image_ends_in_a_clear_line_and_the_student_is_as_before(monkeypatch):
    teacher, student, seam = networks()
    before = copy.deepcopy(student.state_dict())
    memory_runs_out(monkeypatch, 0)
    with pytest.raises(InputError, match=r"its memory ran out with 1 image\(s\) at once"):
        mimic(teacher, student, seam, FEW, recipe(layout="contiguous"))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# --- two processes

_MIMIC = """
import sys
import torch
from test_ranks import FEW, networks, recipe
from mimicut.base.ranks import current
from mimicut.recovery.mimic import mimic

torch.set_num_threads(1)
if sys.argv[2] == "two":
    rank = int(sys.argv[3])
    torch.distributed.init_process_group(init_method=f"file://{sys.argv[4]}", rank=rank, world_size=2)
    for dtype in (torch.float32, torch.float64, torch.int64):  # one alone is added in place, others in a copy
        own = [torch.full((2, 3), rank + 1, dtype=dtype), torch.full((3, 2), rank + 1, dtype=dtype).T]
        for tensors in (own[:1], own[1:], [each.clone() for each in own]):
            before = [each.clone() for each in tensors]
            current().add_up(tensors)
            assert all((each == 3).all() and not (each == old).all() for each, old in zip(tensors, before)), tensors
teacher, student, seam = networks()
mimic(teacher, student, seam, FEW, recipe(steps=20), ranks=current())
with torch.no_grad():
    torch.save(student(FEW), sys.argv[1])
"""


@pytest.mark.long
def test_two_processes_give_the_student_of_one(tmp_path):
    def start(*arguments):
        path = os.pathsep.join([str(PACKAGE.parent), str(Path(nets.__file__).parent)])
        command = [sys.executable, "-c", _MIMIC, *map(str, arguments)]
        return subprocess.Popen(command, cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": path})

    out = [tmp_path / name for name in ("one", "first", "second")]
    processes = [start(out[0], "one"), *(start(out[1 + r], "two", r, tmp_path / "store") for r in range(2))]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    one, first, second = (torch.load(each) for each in out)
    assert torch.equal(first, second)
    assert float((one - first).norm() / one.norm()) < 1e-4
    assert not torch.equal(one, networks()[1](FEW))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the other process in /proc")
def test_a_process_that_is_killed_leaves_a_file_to_go_on_from(place, monkeypatch):
    options = ["--keep", "0.5", "--extra", "none", "--out", "small", "--steps", "100", "--device", "cpu"]
    options += ["--devices", "2", "--tensorboard", "log"]
    command = [sys.executable, "-m", "mimicut", "compress", "net.py:build", "photos", *options]
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        said = ""
        while "  step " not in said:
            line = first.stderr.readline()
            assert line, said
            said += line
        (other,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(other), signal.SIGKILL)
        said += first.stderr.read()
        assert first.wait(60) == 130, said
    assert "another process of this run ended" in said
    assert "the same command with --resume continues" in said
    assert stopped_path("small").exists()
    assert len(list(Path("log").iterdir())) == 1  # of the first process alone
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "continuing after" in again.stderr
    assert not stopped_path("small").exists()


def test_the_others_end_with_a_first_process_that_is_killed(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(120)\n")
    first = (
        "import os\nfrom mimicut.base import ranks\n"
        "with ranks._others(2, {}, ['inspect', 'slow.py:build']):\n"
        "    print(ranks._started[0][0].pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", first], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL, run.stderr
    for _ in range(300):
        try:
            os.kill(int(run.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the other process is still there")
