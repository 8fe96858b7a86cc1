"""Ctrl-C and SIGTERM: one meaning, and none while a module is imported."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("fcntl")  # Windows has no timers by signal

from mimicut.base import interrupts

ROOT = Path(__file__).parents[2]
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture
def raising():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    hook = sys.unraisablehook
    interrupts.raise_interrupts()
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@SIGNALS
def test_it_is_raised(raising, number):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@SIGNALS
def test_it_waits_for_an_import(raising, number, tmp_path, monkeypatch):
    (tmp_path / "heavy.py").write_text(
        f"import signal, time\ntry:\n    signal.raise_signal({int(number)}); time.sleep(0.12); done = True\n"
        "except BaseException:\n    done = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def work():
        import heavy  # noqa: F401

        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert sys.modules.pop("heavy").done


@SIGNALS
def test_an_import_that_never_ends_is_ended(raising, number, tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\nwhile True: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(interrupts, "_WAIT_SECONDS", 0.2)

    def work():
        import endless  # noqa: F401

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not interrupts._held_back


@SIGNALS
def test_it_is_raised_again_where_a_destructor_swallows_it(raising, number):
    class Held:
        def __del__(self):
            signal.raise_signal(number)

    def work():
        held = [Held()]
        held.clear()
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        work()


@SIGNALS
def test_it_waits_for_python_code_inside_an_operator(raising, number):
    done = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            signal.raise_signal(number)
            done.append(func)
            return func(*args, **(kwargs or {}))

    def work():
        with Mode():
            torch.ones(2) + 1
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done


def test_it_does_not_become_an_error_where_torch_reads_a_storage_item_by_item(raising):
    storage = torch.UntypedStorage(1000)

    def work():
        threading.Timer(0.01, signal.raise_signal, [signal.SIGTERM]).start()
        while True:
            torch.asarray(storage, dtype=torch.uint8)

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            work()


@SIGNALS
def test_it_is_held(raising, number):
    done = []

    def work(times):
        with interrupts.interrupts_held():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(times)

    for times in (1, 2):  # the second is raised at once
        with pytest.raises(KeyboardInterrupt):
            work(times)
    assert done == [1]
    assert signal.getsignal(number) is interrupts.interrupt


@SIGNALS
@pytest.mark.parametrize("late", [False, True], ids=["before an error", "while the handlers are put back"])
def test_one_that_waits_is_never_lost(raising, number, late, monkeypatch):
    put_back = signal.signal

    def interrupted(which, handler):
        if late and which == number and handler is interrupts.interrupt and signal.getsignal(which) is not handler:
            os.kill(os.getpid(), number)
        return put_back(which, handler)

    def work():
        with suppress(OSError), interrupts.interrupts_held():
            if not late:
                signal.raise_signal(number)
                raise OSError

    monkeypatch.setattr(interrupts.signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work()


def test_handlers_of_the_caller_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with interrupts.interrupts_held():
            signal.raise_signal(signal.SIGTERM)
            assert heard
    finally:
        signal.signal(signal.SIGTERM, before)


@SIGNALS
def test_a_command_that_is_stopped_while_it_imports_ends_with_its_exit_code(tmp_path, number):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(0.3)\nexcept BaseException:\n    pass\n"  # swallows it, as native code does
        "def set_flush_denormal(on):\n    time.sleep(20)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mimicut", "inspect", "x.py:build", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
