"""What was freed goes back to the system: a library that keeps it would make the next peak as much higher."""

import ctypes
import functools
import gc
from collections.abc import Callable
from contextlib import suppress

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
    """Returns freed memory whenever there is more of it by SLACK_BYTES than when this was done last."""

    def __init__(self) -> None:
        self._least = 0

    def trim(self) -> None:
        found = _figures()
        if found is None:
            return
        freed = found().fordblks  # what was returned counts too, until it is used again
        self._least = min(self._least, freed)
        if freed > self._least + SLACK_BYTES:
            _return_freed()
            self._least = freed


def _return_freed() -> None:
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """glibc's struct of that name. fordblks: bytes that are free and kept."""

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
