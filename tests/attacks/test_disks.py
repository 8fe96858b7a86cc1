"""Disks that are full, read-only, failing or slow; two writers; clocks that jump."""

import errno
import os
import random
import subprocess
import threading
import time
from contextlib import contextmanager

import nets
import pytest
from attack_scenarios import CONFIG, NEW, OLD, SCENARIOS, compressing, copied, result_state, saving
from attacks import changes_of, in_child, in_fresh_process, record, thinned, tree

import mimicut as us
from mimicut.base import disk
from mimicut.base.errors import StoreError

NAMES = ("save Chain", "replace Chain", "report Chain", "export", "checkpoint")


def refusing(number, code, removes):
    """An observer of a disk that refuses change `number` and all later ones; a full one still removes."""
    left = [number]

    def observe(when, kind, path):
        if when == "before":
            left[0] -= 1
            if left[0] < 0 and not (removes and "remove" in kind) and "sync" not in kind:
                raise OSError(code, os.strerror(code))

    return observe


def refuse(scenario, tmp_path, code, share):
    """The disk refuses from each change on; return how often that was survived."""
    start, place, done = tmp_path / "start", tmp_path / "place", tmp_path / "done"
    start.mkdir()
    scenario.prepare(start)
    before = scenario.state(start)
    copied(start, done)
    number = tmp_path / "number"
    assert in_child(lambda: number.write_text(str(len(changes_of(lambda: scenario.act(done)))))) == 0
    after, end = scenario.state(done), tree(done)
    places = thinned(range(int(number.read_text())), share)

    def act():
        try:
            scenario.act(place)
        except StoreError as error:
            assert os.strerror(code) in str(error)  # noqa: PT017

    for at in places:
        copied(start, place)
        assert in_child(act, refusing(at, code, code == errno.ENOSPC)) == 0, at
        assert scenario.state(place) in (before, after), at
        if scenario.state(place) == before or not scenario.refuses:
            assert in_child(lambda: scenario.act(place)) == 0, at
            assert tree(place) == end, at
    return len(places)


@pytest.mark.attack
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_refuses_is_named_and_nothing_is_lost(name, code, tmp_path):
    number = refuse(SCENARIOS[name], tmp_path, code, 10)
    record(f"disk that refuses ({errno.errorcode[code]}): {name}", attacks=number)


@pytest.mark.parametrize("name", ["replace Chain", "export"])
def test_a_sample_of_disks_that_refuse(name, tmp_path):
    refuse(SCENARIOS[name], tmp_path, errno.ENOSPC, 0.15)


@contextmanager
def small_disk(place, options):
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.attack
def test_a_disk_of_any_small_size(tmp_path):
    """A real file system, from one that holds nothing to one that holds the result."""
    ended = {}
    for pages in range(1, 40, 2):
        with small_disk(tmp_path / "disk", f"size={pages * 4096}"):
            place = tmp_path / "disk"
            try:
                saving("Chain", NEW, 0.5)(place)
                ended["saved"] = ended.get("saved", 0) + 1
            except StoreError as error:
                assert "No space left" in str(error)  # noqa: PT017
                assert list(place.iterdir()) == []
                ended["refused"] = ended.get("refused", 0) + 1
            result_state("Chain")(place)
        (tmp_path / "disk").rmdir()
    assert set(ended) == {"saved", "refused"}
    record("file systems of small sizes", attacks=sum(ended.values()), **ended)


@pytest.mark.attack
def test_a_disk_that_is_read_only(tmp_path):
    with small_disk(tmp_path / "disk", "size=4m"):
        place = tmp_path / "disk"
        saving("Chain", OLD, 0.8)(place)
        before = tree(place)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for force in (True, False):
            with pytest.raises(StoreError):
                saving("Chain", NEW, 0.5, force=force)(place)
        with pytest.raises(StoreError, match="Read-only"):
            us.export_folder(place / "small", ["pt2"], teacher=nets.Chain)
        assert result_state("Chain")(place)[0] == 1
        assert tree(place) == before
    record("read-only file system", attacks=3)


def slow(when, kind, path):
    time.sleep(random.random() * 0.005)


def race(place, number, **options):
    """Save at the same time from several processes; return how each ended."""
    children = []
    for steps in range(number):
        child = os.fork()
        if not child:
            code = 1
            try:
                disk.observer = slow
                random.seed(os.getpid())
                saving("Chain", us.Report(steps=steps), 0.5, **options)(place)
                code = 0
            except StoreError as error:
                code = 3 if "this result is in" in str(error) else 2 if "it exists" in str(error) else 1
            finally:
                os._exit(code)
        children.append(child)
    return sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


@pytest.mark.attack
def test_writers_at_once_on_a_slow_disk(tmp_path):
    counts = {"attacks": 0, "kept_beside": 0}
    for number in range(len(thinned(range(60)))):
        place = tmp_path / str(number)
        place.mkdir()
        ends = race(place, 3)
        assert ends.count(0) == 1, ends
        assert set(ends) <= {0, 2, 3}, ends
        folders = sorted(place.iterdir())
        assert len(folders) == 1 + ends.count(3)  # every complete student is there, and nothing else
        assert all(len(list(folder.iterdir())) == 5 for folder in folders)
        assert len({us.read_plan(folder / "plan.json").dumps() for folder in folders}) == 1
        counts["attacks"] += 1
        counts["kept_beside"] += ends.count(3)
        assert race(place, 3, force=True) == [0, 0, 0]
        assert sorted(place.iterdir()) == folders
        result_state("Chain")(place)
    record("races of three writers", **counts)


def test_a_sample_of_writers_at_once(tmp_path):
    ends = race(tmp_path, 2)
    assert ends.count(0) == 1
    assert len(list(tmp_path.iterdir())) == 1 + ends.count(3)


def _under_jumping_clocks(number, place):
    """Compress while every clock jumps, and return the names of files that differ from those of right clocks."""

    def jumping():
        jump, lock = random.Random(number), threading.Lock()
        for name in ("time", "monotonic", "perf_counter"):
            right = getattr(time, name)

            def wrong(right=right):
                with lock:
                    return right() + jump.uniform(-1e5, 1e5)

            setattr(time, name, wrong)
        compressing(place / "wrong")

    assert in_child(lambda: compressing(place / "right")) == 0
    assert in_child(jumping) == 0
    right, wrong = (place / side / "small" for side in ("right", "wrong"))
    files = ("weights.safetensors", "plan.json")
    return [file for file in files if (wrong / file).read_bytes() != (right / file).read_bytes()]


@pytest.mark.attack
def test_clocks_that_jump(tmp_path):
    """Time limits, pauses and names come from clocks, results do not."""
    numbers = thinned(range(10))
    for number in numbers:
        place = tmp_path / str(number)
        place.mkdir()
        assert not in_fresh_process(_under_jumping_clocks, number, place)
    assert CONFIG.steps == 3
    record("clocks that jump", attacks=len(numbers))
