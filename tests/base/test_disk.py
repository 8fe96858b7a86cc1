"""The one place where files are changed: modes, full disks, and hidden folders that killed processes left."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("fcntl")  # Windows has no locks, forks or modes

from mimicut.base import disk
from mimicut.base.scratch import clear, is_leftover, locked, replace_file, replace_files, scratch


@pytest.fixture
def changes(monkeypatch):
    found = []
    monkeypatch.setattr(disk, "observer", lambda *change: found.append(change))
    return found


def die_at(number, kind="move"):
    """A process that is killed before its nth change of a kind leaves what an exception that nobody handles leaves."""
    left = [number]

    def observe(when, what, path):
        if (when, what) == ("before", kind):
            left[0] -= 1
            if not left[0]:
                os._exit(9)

    return observe


def in_child(work, observer):
    child = os.fork()
    if not child:
        disk.observer = observer
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_every_change_is_announced(tmp_path, changes):
    disk.make_folder(tmp_path / "a" / "b")
    disk.write(tmp_path / "a/b/c", "text")
    disk.move(tmp_path / "a/b/c", tmp_path / "a/b/d")
    disk.remove_folder(tmp_path / "a")
    kinds = [kind for when, kind, _ in changes if when == "before" and "sync" not in kind]
    assert kinds == ["make folder", "make folder", "write", "move", "remove", "remove folder", "remove folder"]
    assert [when for when, *_ in changes] == ["before", "after"] * (len(changes) // 2)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_what_a_library_writes_has_the_mode_of_the_umask(tmp_path, umask, mode):
    def private(path):
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        disk.write_by(tmp_path / "file", private)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_links_are_removed_and_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/link").symlink_to(tmp_path / "mine")
    disk.remove_folder(tmp_path / "ours")
    assert (tmp_path / "mine/precious").exists()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    disk.remove_folder(tmp_path / "link")
    assert (tmp_path / "mine/precious").exists()


def test_a_library_that_fails_on_a_full_disk_is_no_reason_to_blame_the_model(tmp_path, monkeypatch):
    def fail(path):
        monkeypatch.setattr(os, "posix_fallocate", full)
        raise RuntimeError("basic_ios::clear: iostream error")

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device for a file of"):
        disk.write_by(tmp_path / "file", fail, 1000)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="no operator"):
        disk.write_by(tmp_path / "file", lambda path: (_ for _ in ()).throw(RuntimeError("no operator")), 1000)


def test_where_no_space_can_be_asked_for_what_is_free_counts(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    free = disk.shutil.disk_usage(tmp_path).free
    disk.check_space(tmp_path, free // 2)
    with pytest.raises(OSError, match="No space left on device for a file of"):
        disk.check_space(tmp_path, 2 * free)
    assert list(tmp_path.iterdir()) == []


def test_scratch_folders_of_the_dead_are_removed_and_of_the_living_stay(tmp_path):
    code = "import sys, os; from pathlib import Path; from mimicut.base.scratch import scratch\n"
    code += "with scratch(Path(sys.argv[1]), 'small'): print('made', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    (tmp_path / ".small.0a1b2c3d.saving").mkdir()
    (tmp_path / ".small.0a1b2c3d.probe").mkdir()  # of an earlier release
    (tmp_path / ".small.stopped.safetensors.0a1b2c3d.saving").touch()
    others = [".small.notes.saving", ".smaller.0a1b2c3d.saving", "small.0a1b2c3d.saving", ".small.0a1b2c3d.saved"]
    for name in others:
        (tmp_path / name).mkdir()
    with scratch(tmp_path, "small"):
        found = {path.name for path in tmp_path.iterdir()}
    assert len(found - set(others)) == 2  # that of the other process, and this one
    other.kill()
    other.wait()
    clear(tmp_path, "small")
    assert {path.name for path in tmp_path.iterdir()} == set(others)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_replacement_of_files_that_was_killed_is_undone_or_finished(tmp_path, number):
    old = {"model.onnx": "old", "model.onnx.data": "old data", "report.json": "old report", "notes.txt": "mine"}
    new = {"model.onnx": "new", "model.onnx.data": "", "model.xml": "new", "report.json": "new report"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def fill(fresh):
        for name, text in new.items():
            disk.write(fresh / name, text)

    def work():
        with locked(tmp_path):
            replace_files(tmp_path, fill)

    assert in_child(work, die_at(number)) == 9
    assert (tmp_path / "report.json").read_text() in ("old report", "new report")
    assert all(is_leftover(path) for path in tmp_path.iterdir() if path.name.startswith("."))
    with locked(tmp_path) as begun:
        assert begun == (set() if number == 1 else set(new))
    complete = {"model.onnx": "new", "model.xml": "new", "report.json": "new report", "notes.txt": "mine"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == (old if number == 1 else complete)


@pytest.mark.parametrize("number", [1])
def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path, number):
    path = tmp_path / "plan.json"
    path.write_text("old")
    assert in_child(lambda: replace_file(path, lambda fresh: disk.write(fresh, "new")), die_at(number)) == 9
    assert path.read_text() == "old"
    replace_file(path, lambda fresh: disk.write(fresh, "new"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"plan.json": "new"}


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "", ".", "..", "link", "inner"])
def test_a_replacement_that_another_hand_left_reaches_nothing_outside(tmp_path, name):
    own, outside = tmp_path / "own", tmp_path / "outside"
    complete = own / ".export.complete"
    (complete / "inner").mkdir(parents=True)
    outside.write_text("theirs")
    (complete / "link").symlink_to(outside)
    (complete / ".names").write_text(f"plan.json\n{outside if name == '/outside' else name}\n")
    (complete / "plan.json").write_text("new")
    with (
        pytest.raises(OSError, match=r"\.export\.complete is none that mimicut left, as it names .*: remove it"),
        locked(own),
    ):
        raise AssertionError
    assert outside.read_text() == "theirs"
    assert not (own / "plan.json").exists()


def test_a_replacement_that_is_a_link_moves_nothing(tmp_path):
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir()
    theirs.mkdir()
    for name in (".names", "plan.json"):
        (theirs / name).write_text("plan.json")
    (own / ".export.complete").symlink_to(theirs)
    with pytest.raises(OSError, match="is none that mimicut left: remove it"), locked(own):
        raise AssertionError
    assert sorted(p.name for p in theirs.iterdir()) == [".names", "plan.json"]


@pytest.mark.parametrize(
    ("name", "folder", "ours"),
    [
        (".export.0a1b2c3d.saving", True, True),
        (".export.complete", True, True),
        (".report.json.0a1b2c3d.saving", False, True),  # of an earlier release
        (".export_backups", True, False),
        (".export_settings", True, False),
        (".notes.0a1b2c3d.saving", False, False),
        ("export.0a1b2c3d.saving", True, False),
    ],
)
def test_leftovers_are_known_by_their_names(tmp_path, name, folder, ours):
    path = tmp_path / name
    path.mkdir() if folder else path.touch()
    assert is_leftover(path) is ours
