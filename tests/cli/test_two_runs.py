"""Two runs with one folder: the second is refused before it loads anything, and no work is lost."""

import threading
from contextlib import contextmanager

import pytest
from command_line import call

pytest.importorskip("fcntl")  # Windows has no locks

import mimicut as us
from mimicut.base import ranks, scratch
from mimicut.base.errors import StoreError
from mimicut.results.folder import one_run

UNDER_WAY = "another run that saves there is under way; wait for its end, stop it, or name another folder"


@contextmanager
def another_run(*folders):
    """Of another thread, which is as good as another process."""
    inside, end = threading.Event(), threading.Event()

    def work():
        with one_run(*folders):
            inside.set()
            end.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        end.set()
        thread.join(60)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(scratch, "_MOMENT_SECONDS", 0.0)


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "no:such", "photos", "--keep", 0.5),
        ("compress", "no:such", "photos", "--keep", 0.5, "--resume"),
        ("compress", "no:such", "photos", "--keep", 0.5, "--crossfit", 3),
        ("compress", "no:such", "photos", "--keep", 0.5, "--device", "cpu", "--devices", 2),
        ("recover", "net.py:build", "net.py:build", "photos"),
    ],
    ids=["compress", "resume", "crossfit", "devices", "recover"],
)
def test_the_second_run_is_refused_in_one_line(place, capsys, monkeypatch, command):
    monkeypatch.setattr(ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(ranks, "_others", lambda *given: pytest.fail("a process was started"))
    with another_run("small"):
        code, _, said = call(capsys, *command, "--out", "small")
    assert code == 2
    assert said == f"mimicut: saving to small: {UNDER_WAY}\n"
    assert not list(place.glob(".*"))


def test_one_of_several_budgets_is_enough_to_refuse_them(place, capsys):
    with another_run("sizes/keep-0.5"):
        command = ("compress", "no:such", "photos", "--keep", 0.7, "--keep", 0.5, "--out", "sizes")
        code, _, said = call(capsys, *command)
    assert (code, said) == (2, f"mimicut: saving to sizes/keep-0.5: {UNDER_WAY}\n")
    assert not (place / "sizes").exists()


def test_two_sweeps_with_one_folder(place, capsys):
    (place / "jobs.toml").write_text('[[job]]\nteacher = "net.py:build"\nimages = "photos"\nkeep = 0.5\n')
    with another_run("fleet"):
        code, _, said = call(capsys, "sweep", "jobs.toml", "--out", "fleet")
        assert call(capsys, "sweep", "jobs.toml", "--out", "fleet", "--dry-run")[0] == 0
    assert (code, said) == (2, (
        "mimicut: saving the table of the sweep to fleet: another sweep or run that saves there is under way; wait for "
        "its end, stop it, or name another folder\n"
    ))  # fmt: skip
    assert not (place / "fleet").exists()


def test_a_process_that_is_not_the_first_one_takes_no_folder(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, first in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert ranks.is_first() is first


def test_in_python_too_and_what_came_meanwhile_loses_no_work(place):
    teacher, config = us.load_teacher("net.py:build"), us.preset("default", steps=2)
    options = {"keep": 0.5, "config": config, "extra": "none", "folder": place / "small"}
    with another_run(place / "small"), pytest.raises(StoreError, match=UNDER_WAY):
        us.compress(teacher, "photos", **options)
    before = sorted(place.iterdir())

    def meddle(step, steps, loss):
        (place / "small").mkdir(exist_ok=True)
        (place / "small/mine").touch()

    with pytest.raises(StoreError, match=r"nothing was changed there, and this result is in .*small-2"):
        us.compress(teacher, "photos", on_step=meddle, **options)
    assert sorted(place.iterdir()) == sorted([*before, place / "small", place / "small-2"])
    assert us.load(place / "small-2", "net.py:build")
