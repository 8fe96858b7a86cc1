"""Volumes and clips in `inspect` and `plan` (Project-MONAI/MONAI#5125, pytorch/pytorch#84692)."""

import numpy as np
import pytest
from command_line import call

NET = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    body = nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3)), {
        "input_size": (1, 4, 4), "mean": (0.5,), "std": (0.5,)}
"""


@pytest.fixture
def volumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net3.py").write_text(NET)
    np.save("volumes.npy", np.random.default_rng(0).normal(size=(8, 1, 5, 4, 4)).astype("float32"))


def macs(slices):
    return slices * 16 * 27 * (8 + 48) + 18


def test_inspect_counts_as_many_slices_as_are_asked_for(volumes, capsys):
    code, found, err = call(capsys, "inspect", "net3.py:build", "--input-size", "1x5x4x4")
    assert (code, found["macs"]) == (0, macs(5))
    code, found, err = call(capsys, "inspect", "net3.py:build")
    assert (code, found["macs"]) == (0, macs(16))
    assert "traced with 16 slices or frames; --input-size CxDxHxW sets how many" in err


def test_plan_takes_volumes(volumes, capsys):
    code, found, _ = call(capsys, "plan", "net3.py:build", "--keep", "0.6", "--images", "volumes.npy")
    assert (code, found["macs_teacher"]) == (0, macs(5))
    code, found, _ = call(capsys, "plan", "net3.py:build", "--keep", "0.6", "--input-size", "1x2x4x4")
    assert (code, found["macs_teacher"]) == (0, macs(2))
