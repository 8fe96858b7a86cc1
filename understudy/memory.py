"""What was freed goes back to the system: a library that keeps it would make the next stage's peak as much higher."""

import ctypes
import gc
from contextlib import suppress


def trim() -> None:
    """Return freed memory to the system, where the C library can (glibc's malloc_trim); elsewhere nothing happens.

    Freed blocks lie scattered in the arenas of every thread that ever allocated, and are kept there otherwise.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
