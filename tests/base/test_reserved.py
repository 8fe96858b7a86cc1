"""One run at a time saves to a folder: what keeps the others away, and what a killed one leaves."""

import errno
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("fcntl")  # Windows has no locks or forks

import fcntl

from mimicut.base import disk, scratch
from mimicut.base.scratch import came_meanwhile, reserved


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(scratch, "_MOMENT_SECONDS", 0.0)


def elsewhere(work):
    """What `work` raises in another thread, which is as good as another process: None, or its exception."""
    raised = []

    def run():
        try:
            work()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return raised[0]


def take(path):
    with reserved(path):
        pass


def test_the_second_one_is_refused_while_the_first_one_is_at_work(tmp_path):
    path = tmp_path / "runs/inner/small"
    with reserved(path):
        assert isinstance(elsewhere(lambda: take(path)), BlockingIOError)
        assert elsewhere(lambda: take(path.with_name("other"))) is None
        take(path)  # a run inside this one
        assert isinstance(elsewhere(lambda: take(path)), BlockingIOError)
    assert list(tmp_path.iterdir()) == []
    assert elsewhere(lambda: take(path)) is None


def test_a_folder_that_was_made_for_it_stays_if_something_is_in_it(tmp_path):
    with reserved(tmp_path / "runs/small"):
        (tmp_path / "runs/small").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]


def test_what_a_killed_run_left_keeps_nobody_away(tmp_path):
    child = os.fork()
    if not child:
        with reserved(tmp_path / "small"):
            os._exit(9)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.iterdir()] == [".small.running"]
    take(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_one_that_waits_gets_it_when_the_first_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_MOMENT_SECONDS", 30.0)
    path, inside = tmp_path / "small", threading.Event()

    def work():
        with reserved(path):
            inside.set()

    with reserved(path):
        thread = threading.Thread(target=work)
        thread.start()
        assert not inside.wait(0.1)
    thread.join(60)
    assert inside.is_set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_disk_without_locks_it_goes_on_without(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with reserved(tmp_path / "small"):
        assert list(tmp_path.iterdir()) == []
        assert elsewhere(lambda: take(tmp_path / "small")) is None


def test_where_no_file_can_be_made_it_goes_on_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    take(tmp_path / "file/small")  # what saves there says why it cannot
    take(Path("/"))

    def refuse(when, kind, path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(disk, "observer", refuse)
    take(tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_another_hand_put_there_meanwhile_is_known(tmp_path):
    path = tmp_path / "small"
    with reserved(path):
        assert not came_meanwhile(path)
        path.mkdir()
        assert came_meanwhile(path)
    assert not came_meanwhile(path)
    with reserved(path):
        assert not came_meanwhile(path)
