"""Freed memory goes back to the system, and nothing breaks where the C library cannot do it."""

import ctypes
from pathlib import Path

import pytest

from understudy import memory


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def scattered(count=3000, size=60_000):
    """Blocks too small for maps of their own; every second one is freed."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[::2]:
        libc.free(block)
    return lambda: [libc.free(block) for block in blocks[1::2]]


@pytest.mark.skipif(memory._figures() is None, reason="glibc alone tells how much is free")
def test_what_was_freed_is_returned(monkeypatch):
    monkeypatch.setattr(memory, "SLACK_BYTES", 2**26)
    slack = memory.Slack()
    finish = scattered()
    held = resident()
    slack.trim()
    assert resident() < held - 2**26
    finish()
    finish = scattered()
    held = resident()
    memory.trim()
    assert resident() < held - 2**26
    finish()


def test_little_is_left_alone(monkeypatch):
    returned = []
    monkeypatch.setattr(memory, "_return_freed", lambda: returned.append(1))
    freed = iter([0, memory.SLACK_BYTES - 1, memory.SLACK_BYTES + 1, 0, memory.SLACK_BYTES + 1])
    monkeypatch.setattr(memory, "_freed", lambda: next(freed))
    slack = memory.Slack()
    slack.trim()
    assert not returned
    slack.trim()
    assert returned == [1]


def test_another_c_library_is_no_error(monkeypatch):
    def none(name):
        raise OSError(name)

    memory._figures.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    try:
        memory.trim()
        memory.Slack().trim()
    finally:
        memory._figures.cache_clear()
