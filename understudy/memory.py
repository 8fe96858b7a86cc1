"""What was freed goes back to the system: a library that keeps it would make the next peak as much higher."""

import ctypes
import functools
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Freed memory that may lie about before it is worth returning, which costs as much time as it takes to fill it with
# zeros when it is needed again. Source: measured, a fifth of that is a tenth slower (docs/LOG.md).
SLACK_BYTES = 2**28


def trim() -> None:
    """Return freed memory to the system, where the C library can (glibc's malloc_trim); elsewhere nothing happens.

    Freed blocks lie scattered in the arenas of every thread that ever allocated, and are kept there otherwise.
    """
    gc.collect()
    _return_freed()


class Slack:
    """Returns freed memory whenever SLACK_BYTES more of it than at first are still the process's."""

    def __init__(self) -> None:
        self._first = _freed()

    def trim(self) -> None:
        freed = _freed()
        if freed > self._first + SLACK_BYTES:
            _return_freed()
            self._first = max(self._first, _freed() - SLACK_BYTES // 2)  # what is scattered too finely stays


def _freed() -> int:
    """Bytes that the process has and the C library does not count as in use: freed ones, code and stacks; 0 where that
    cannot be told."""
    figures = _figures()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    if figures is None:
        return 0
    found = figures()
    return pages * os.sysconf("SC_PAGE_SIZE") - found.uordblks - found.hblkhd


def _return_freed() -> None:
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of that name. uordblks: bytes in use in arenas; hblkhd: in maps of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@functools.cache
def _figures() -> Callable[[], _Mallinfo2] | None:
    with suppress(OSError, AttributeError):  # another C library, or glibc before 2.33
        found = ctypes.CDLL("libc.so.6").mallinfo2
        found.restype = _Mallinfo2
        return found
    return None
