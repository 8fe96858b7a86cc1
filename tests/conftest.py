import gc
import os
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import torch
from command_line import NET
from PIL import Image


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What was there before a test is left out of its garbage collections: `memory.trim` asks for one after every
    stage, and among torch's million objects each takes longer than the stage of a tiny net."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else what is freed at the end of the process is reported as leaked


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tests run side by side, one on each core; more threads would only wait for each other. So do their processes."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _functions_of_onnx_read_once():
    """torch parses the source of each of ONNX's functions anew for every file that it writes: half a second."""
    with suppress(ImportError, AttributeError):
        from torch.onnx._internal._lazy_import import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    for i in range(10):
        folder = tmp_path / "photos" / "abcd"[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20 + i, 24, 3), np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "broken.jpg").write_text("no picture")
    return tmp_path
