"""A disk that refuses is said to be full, in every format; nothing is left, and the process lives."""

import signal
import sys
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from attacks import in_child
from torch import nn

from mimicut.base.errors import StoreError
from mimicut.base.interrupts import raise_interrupts
from mimicut.runtime.export import export

resource = pytest.importorskip("resource")  # not on Windows
BYTES = 50_000


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 200))  # 116 kB


@contextmanager
def full():
    """No file of this process may be larger than BYTES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("checked", [True, False], ids=["checked first", "full while it is written"])
@pytest.mark.parametrize("kind", ["pt2", "onnx", "openvino", "int8"])
def test_a_full_disk_is_said_in_every_format(tmp_path, monkeypatch, kind, checked):
    given = torch.zeros(2, 3, 8, 8)
    options = {"formats": [kind], "calibrate": [given] if kind == "int8" else ()}
    disk = import_module("mimicut.base.disk")
    if not checked:  # the first time it is asked, the disk has room
        right, asked = disk.check_space, []

        def late(folder, size):
            asked.append(size)
            if len(asked) > 2:
                right(folder, size)

        monkeypatch.setattr(disk, "check_space", late)
    with full(), pytest.raises(StoreError, match=r"exporting to .*(File too large|No space)"):
        export(net(), given, tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_program_is_written_does_not_abort_the_process(tmp_path, monkeypatch, number):
    module = import_module("mimicut.runtime.export")
    program, write, heard = torch.export.export(net(), (torch.zeros(2, 3, 8, 8),)), module._ErrorsKept.write, []

    def interrupted(file, data):
        heard.append(number)
        if len(heard) == 3:  # when the writer has begun, and would end the process
            signal.raise_signal(number)
        return write(file, data)

    def work():
        raise_interrupts()
        monkeypatch.setattr(module._ErrorsKept, "write", interrupted)
        try:
            module._save_program(program, tmp_path / "model.pt2")
        except KeyboardInterrupt:
            sys.exit(130 if len(heard) > 3 else 1)

    assert in_child(work) == 130
