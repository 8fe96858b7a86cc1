"""Ctrl-C, and SIGTERM of containers and schedulers, which ends a command in the same way. No heavy imports here."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

_AGAIN_SECONDS, _WAIT_SECONDS = 0.05, 30.0  # Source: assumption; the longest import that was seen took 20 s.
_STORAGE = os.path.join("torch", "storage.py")
_held_back: list[float] = []  # when an interrupt came, or was tried again, that could not be raised


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler that raises KeyboardInterrupt, but not where that would be swallowed or end the process: while
    a module is imported, and in Python code that torch's own calls: of an operator, and of a storage, which torch reads
    item by item where weights are loaded. It then tries again in a moment, and after half a minute, as in a module that
    never ends, raises all the same.

    Raises:
        KeyboardInterrupt: It can be raised here.
    """
    if hasattr(signal, "setitimer") and _is_unsafe(frame):
        _held_back.append(time.monotonic())
        if _held_back[-1] - _held_back[0] < _WAIT_SECONDS:
            _try_again()
            return
    _held_back.clear()
    raise KeyboardInterrupt


def raise_interrupts() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt; for a process that is ours. One that is raised in a callback or
    destructor, where Python only prints it, is raised again."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    sys.unraisablehook = partial(_raise_swallowed, sys.unraisablehook)


def ignore_interrupts() -> None:
    """Let Ctrl-C and SIGTERM do nothing any more: the process is at its end, and its exit code is known."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and SIGTERM back inside, until the function that is yielded is called, which raises it. A second one
    is raised at once; one that waits at the end is raised there, in place of an error too, which might be handled.

    It works only where they would raise KeyboardInterrupt: in the main thread, without a handler of the caller's.
    """
    waiting: list[int] = []

    def hold(number: int, frame: Any) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            raise KeyboardInterrupt

    def release() -> None:
        if waiting:
            waiting.clear()
            raise KeyboardInterrupt

    before = _handlers() if threading.current_thread() is threading.main_thread() else {}
    for number in before:
        signal.signal(number, hold)
    try:
        yield release
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        release()


@contextmanager
def interrupts_counted() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM only be counted inside: each is appended to the list that is yielded.

    For a wait for other processes, which are asked to stop in their turn. It works in the main thread alone.
    """
    heard: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    for number in before:
        signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
    """The signals that raise KeyboardInterrupt here, with their handlers."""
    names = ("SIGINT", "SIGTERM", "SIGALRM")  # the last one where an interrupt waits for an import
    found = {int(number): signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    return {number: handler for number, handler in found.items() if handler in (signal.default_int_handler, interrupt)}


def _try_again() -> None:
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)


def _raise_swallowed(before: Callable[[Any], Any], swallowed: Any) -> None:
    """`sys.unraisablehook`: an interrupt is tried again, anything else is for the hook before."""
    main = threading.current_thread() is threading.main_thread()
    if main and hasattr(signal, "setitimer") and issubclass(swallowed.exc_type, KeyboardInterrupt):
        _try_again()
    else:
        before(swallowed)


def _is_unsafe(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "__torch_dispatch__":
            return True
        if code.co_filename.endswith(_STORAGE):
            return True
        frame = frame.f_back
    return False
