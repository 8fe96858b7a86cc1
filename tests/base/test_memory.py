"""The bound on memory: how it is given, what it is by default, and what is refused before the work."""

import ctypes
import gc
import os
import sys
import weakref

import pytest
import torch
from nets import Chain
from torch import nn

from mimicut.anatomy import footprint
from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.tracing import shape
from mimicut.base import memory, progress
from mimicut.base.errors import InputError
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.planning.planner import make_plan
from mimicut.recovery.config import MimicConfig
from mimicut.recovery.cut_student import CutStudent
from mimicut.recovery.recover import recover
from mimicut.recovery.view_budget import needed_bytes
from mimicut.surgery.cut import cut
from mimicut.workflow.compress import compress


@pytest.mark.parametrize(
    ("text", "size"), [("3G", 3 * 10**9), ("2.5gb", 25 * 10**8), ("3000M", 3 * 10**9), ("64k", 64_000), (" 12 ", 12)]
)
def test_sizes_are_read(text, size):
    assert memory.parsed(text) == size


@pytest.mark.parametrize("text", ["", "G", "-3G", "3 apples", "0", "3Gi"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"--max-memory.*3G"):
        memory.parsed(text)


def test_the_default_is_4_gb_or_half_of_what_is_free(monkeypatch):
    for free, size in ((100 * 10**9, memory.DEFAULT_BYTES), (6 * 10**9, 3 * 10**9), (None, memory.DEFAULT_BYTES)):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        assert memory.bound() == size
    assert memory.bound(123) == 123
    for wrong in (0, -1, 1.5, "3G", True):
        with pytest.raises(InputError, match="max_memory"):
            memory.bound(wrong)


def test_a_container_that_has_less_counts(monkeypatch, tmp_path):
    limit, usage = tmp_path / "max", tmp_path / "current"
    usage.write_text("300")
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, usage),))
    monkeypatch.setattr(memory, "_of_machine", lambda: 5000)
    assert memory.available() == 5000  # there is no such file
    limit.write_text("max\n")
    assert memory.available() == 5000
    limit.write_text("1000\n")
    assert memory.available() == 700


def test_what_this_process_holds_grows_with_what_it_holds():
    before = memory.resident()
    if before is None:
        pytest.skip("this system does not say")
    held = torch.ones(20_000_000)
    assert memory.resident() - before > 0.8 * held.nbytes
    assert memory.available() > 0


def test_what_was_freed_in_small_pieces_goes_back():
    before = memory.resident()
    if before is None or not sys.platform.startswith("linux"):
        pytest.skip("only glibc keeps it, and only Linux says so")
    pieces = [torch.ones(16_000) for _ in range(3000)]
    last = pieces[-1]  # on top of the heap: the others cannot go back by themselves
    del pieces
    memory.trim()
    assert memory.resident() - before < 60_000_000
    assert len(last)


class Steps(nn.Module):
    """Values of 4 x 8 x 8, 6 x 8 x 8 and, behind a view and in place, 6 x 64 numbers; a shortcut keeps the first."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.back, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        first = self.one(x)
        wide = self.two(first).relu_().view(len(x), 6, 8, 8)
        return self.fc((self.back(wide) + first).mean((2, 3)))


def test_what_a_pass_holds_is_read_from_the_graph():
    traced = trace(Steps(), torch.zeros(2, 3, 8, 8)).traced
    pixels = 4 * 64
    # At the layer `back`: the first value, the wide one, and what it makes.
    assert footprint.held_bytes(traced) == (4 + 6 + 4) * pixels
    floats = [n for n in traced.nodes if shape(n) is not None]
    assert footprint.made_bytes(traced) == (4 + 6 + 4 + 4) * pixels + 4 * (4 + 5), floats


def test_fewer_images_at_once_where_there_is_less_room():
    anatomy = trace(Steps(), torch.zeros(2, 3, 8, 8))
    one = 2 * footprint.held_bytes(anatomy.traced)
    assert [footprint.images_within(anatomy, room) for room in (0, one, 5.5 * one, 1e12)] == [1, 1, 5, 64]


def test_too_little_memory_is_reported_before_any_work():
    teacher = own_teacher(Chain(), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    images, stages = torch.randn(12, 3, 8, 8), []
    with pytest.raises(InputError, match=r"needs about [\d.]+ [GM]B, and max_memory is 1 MB.*--max-memory [\d.]+G"):
        compress(teacher, images, keep=0.5, max_memory=10**6, on_stage=stages.append)
    assert "cutting" not in stages
    assert "looking at the images" not in stages
    config = MimicConfig(steps=1, views="none")
    report = compress(teacher, images, keep=0.5, config=config, max_memory=10**11).report
    assert report.config["max_memory"] == 10**11


def test_a_stage_of_passes_that_needs_more_than_its_share_is_refused():
    anatomy = trace(Steps(), torch.zeros(2, 3, 8, 8))
    footprint.check_memory(anatomy, 10**11, asked=True, passes=int(memory.PASSES * 10**11))
    with pytest.raises(InputError, match=r"needs about 100\.3 GB, and max_memory is 100\.0 GB"):
        footprint.check_memory(anatomy, 10**11, asked=True, passes=int(memory.PASSES * 1.00251 * 10**11))


def test_no_room_for_a_view_of_every_image_is_said():
    teacher = own_teacher(Chain(), Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3))
    anatomy = trace(teacher.model, teacher.example())
    plan = make_plan(teacher.model, anatomy, keep=0.5, score="l1")
    images, config = torch.randn(30, 3, 8, 8), MimicConfig(steps=0, views="none", start="closed_form")
    said, logs = [], []
    for most in (None, needed_bytes(anatomy, plan, cut(teacher.model, plan)) // 2):
        said.append([])
        student = cut(teacher.model, plan).eval()
        logs.append(
            recover(
                CutStudent(teacher.model, student, anatomy, plan),
                images,
                config,
                on_stage=said[-1].append,
                max_memory=most,
            )
        )
    assert [any("of 30 images; with more (--max-memory)" in text for text in texts) for texts in said] == [False, True]
    assert logs[0].closed_form.views_room == logs[0].closed_form.views_useful == logs[0].closed_form.views
    assert logs[1].closed_form.views_room < 30


def test_work_of_unknown_length_is_counted_aloud(monkeypatch):
    said, now = [], iter([0.0, 1.0, 9.0, 10.0, 18.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    tell = progress.SpokenProgress(said.append, "trial step")
    for step in range(1, 5):
        tell(step, 0)
    assert said == ["  trial step 2", "  trial step 4"]


def test_what_is_freed_is_kept_inside_and_handed_back_behind(monkeypatch):
    if memory._figures() is None:
        pytest.skip("not glibc")
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    memory.trim()
    before = memory.resident()
    with memory.kept():
        torch.ones(50_000_000)
        inside = memory.resident()
    behind = memory.resident()
    assert inside - before > 150_000_000
    assert behind - before < 100_000_000


def test_an_allocator_that_the_environment_tunes_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("it was tuned"))
    with memory.kept():
        pass


def scattered(count=3000, size=60_000):
    """Blocks too small for maps of their own; every second one is freed."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[::2]:
        libc.free(block)
    return lambda: [libc.free(block) for block in blocks[1::2]]


@pytest.mark.skipif(memory._figures() is None, reason="glibc alone tells how much is free")
def test_what_was_freed_is_returned(monkeypatch):
    monkeypatch.setattr(memory, "SLACK_BYTES", 2**26)
    slack = memory.Slack()
    finish = scattered()
    held = memory.resident()
    slack.trim()
    assert memory.resident() < held - 2**26
    finish()
    finish = scattered()
    held = memory.resident()
    memory.trim()
    assert memory.resident() < held - 2**26
    finish()


def test_little_is_left_alone(monkeypatch):
    returned = []
    monkeypatch.setattr(memory, "_return_freed", lambda: returned.append(1))
    freed = iter([0, memory.SLACK_BYTES - 1, memory.SLACK_BYTES + 1, 0, memory.SLACK_BYTES + 1])
    monkeypatch.setattr(memory, "_freed", lambda: next(freed))
    slack = memory.Slack()
    slack.trim()
    assert not returned
    slack.trim()
    assert returned == [1]


def test_another_c_library_is_no_error(monkeypatch):
    def none(name):
        raise OSError(name)

    memory._figures.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    try:
        memory.trim()
        memory.Slack().trim()
    finally:
        memory._figures.cache_clear()


class Cycle:
    def __init__(self):
        self.own = self


def test_collections_of_a_run_leave_out_what_was_there_before():
    gc.unfreeze()  # of the tests
    before = Cycle()
    was, inside = weakref.ref(before), None
    with memory.own_garbage():
        frozen = gc.get_freeze_count()
        assert frozen
        with memory.own_garbage():
            pass
        assert gc.get_freeze_count() > 0.9 * frozen  # the outer one's stays, but for what nothing names any more
        del before
        inside = weakref.ref(Cycle())
        gc.collect()
        assert inside() is None
        assert was() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert was() is None
