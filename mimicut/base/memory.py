"""How much memory a run may use, how much it uses now, and how freed memory is returned.

There is one bound for the whole run: the largest resident memory of this process while it works. Stages that could use
more get a share of it. The shares depend on the bound alone and not on what happens to be free, so that the same bound
gives the same numbers.
"""

import ctypes
import functools
import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mimicut.base.errors import InputError

DEFAULT_BYTES = 4_000_000_000  # Where more than twice that is free. Source: assumption: a laptop beside a browser.
# Of the bound: decoded images that train, decoded images of each other kind (to choose by, to certify, labelled),
# passes of a stage (evidence, closed form, mimic), and one pass that only measures. Source: measured, with
# EfficientNet-Lite0 at 224 pixels (benchmarks/studies/compress_memory.py): torch and the networks take the rest.
TRAINING_IMAGES, OTHER_IMAGES, PASSES, MEASURING = 0.25, 0.05, 0.4, 0.1
# Freed memory that the process may keep before it is returned; returning it costs the time to fill it with zeros when
# it is needed again. Source: measured, two fifths of that are a tenth slower (docs/LOG.md).
SLACK_BYTES = 2**27
# glibc's options (malloc.h): from which size on the top is handed back, spare room at the top, the size from which a
# piece is mapped by itself, and how many such pieces there may be. _USUAL: the values that its own rule reaches once
# large pieces were freed; that rule ends with the first option that is set.
_TRIM, _PAD, _OWN_MAP, _MAPS = -1, -2, -3, -4
_KEEPING = ((_MAPS, 0), (_TRIM, 2**31 - 1), (_PAD, 2**26))
_USUAL = ((_MAPS, 65536), (_TRIM, 2**26), (_PAD, 2**17), (_OWN_MAP, 2**25))
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def bound(asked: int | None = None) -> int:
    """The bound in bytes: `asked`, or by default DEFAULT_BYTES or half of what is free, whichever is less.

    Raises:
        InputError: `asked` is no whole number above 0.
    """
    if asked is None:
        free = available()
        return DEFAULT_BYTES if free is None else max(1, min(DEFAULT_BYTES, free // 2))
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise InputError(f"bounding the memory: max_memory is {asked!r}, expected bytes, a whole number above 0")
    return asked


def parsed(text: str) -> int:
    """The bytes that "3G", "3000M", "2.5GB" or "3000000000" stand for, in powers of 1000.

    >>> parsed("2.5G")
    2500000000

    Raises:
        InputError: The text is anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper())
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise InputError(f"reading --max-memory: found {text!r}, expected a size such as 3G, 3000M or bytes")
    return size


def available() -> int | None:
    """Bytes that this process could still allocate, in the machine or in its container, whichever has less. None where
    the system does not report it."""
    found = [size for size in (_of_machine(), *_of_containers()) if size is not None]
    return max(0, min(found)) if found else None


def _of_machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # not Linux; macOS knows the second one alone
        with suppress(OSError, ValueError, AttributeError):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_containers() -> list[int]:
    found = []
    for limit, usage in _CGROUPS:
        with suppress(OSError, ValueError):  # "max" is no limit
            found.append(int(limit.read_text()) - int(usage.read_text()))
    return found


def resident() -> int | None:
    """Bytes of this process that are in memory; None where the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def trim() -> None:
    """Return freed memory to the system, where the C library can (glibc's malloc_trim).

    Otherwise freed blocks stay scattered in the arenas of every thread that ever allocated.
    """
    gc.collect()
    _return_freed()


@contextmanager
def own_garbage() -> Iterator[None]:
    """Leave out of the garbage collections inside what was there before: each stage asks for one (`trim`), and among
    the million objects of torch it takes longer than the stage of a small network. Source: measured, 0.22 s each.
    """
    ours = not gc.get_freeze_count()  # else the caller has chosen what is left out
    if ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


class Slack:
    """Returns freed memory whenever the process holds SLACK_BYTES more of it than at first."""

    def __init__(self) -> None:
        self._first = _freed()

    def trim(self) -> None:
        freed = _freed()
        if freed > self._first + SLACK_BYTES:
            _return_freed()
            self._first = max(self._first, _freed() - SLACK_BYTES // 2)  # what is scattered too finely stays


@contextmanager
def kept() -> Iterator[None]:
    """Make the C library keep freed memory for the next allocation inside, and return all of it at the end. By default
    it returns large pieces each time and requests new ones, which the system fills with zeros.

    For loops that allocate and free the same amounts again and again in this thread. It affects glibc alone, and
    nothing where the environment tunes its allocator. Source: measured, a step of EfficientNet-Lite0 and
    its student takes 0.82 of the processor time and no more memory (docs/LOG.md).
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    library = None if tuned or _figures() is None else ctypes.CDLL("libc.so.6")
    if library is None:
        yield
        return
    for option, value in _KEEPING:
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL:
            library.mallopt(option, value)
        trim()


def _freed() -> int:
    """Bytes of the process that the C library does not count as in use: freed ones, code and stacks; 0 where that is
    not known."""
    figures, own = _figures(), resident()
    if figures is None or own is None:
        return 0
    found = figures()
    return own - found.uordblks - found.hblkhd


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


def size_text(size: float) -> str:
    """A number of bytes for people.

    >>> size_text(2_500_000_000)
    '2.5 GB'
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"
