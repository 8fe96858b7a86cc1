"""The command line called in this process, and code of a teacher as users write it."""

import json
import sys
import unittest.mock

import pytest

from mimicut.cli.app import main

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()
        )
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, classes)
    def forward(self, x):
        return self.fc(self.pool(self.body(x)).flatten(1))
def build():
    torch.manual_seed(0)
    return Net(), {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "views": "pad_crop"}
class Label(Net):
    def forward(self, x):
        return super().forward(x).argmax(1)
def label():
    return Label()
class Features(Net):
    def forward(self, x):
        return {"small": self.body(x), "large": self.body[:3](x)}
def features():
    return Features(), {"input_size": (3, 16, 16)}
def meta():
    return Net().to("meta")
"""


def call(capsys, *arguments):
    """(exit code, JSON of the last line of stdout or None, stderr)"""
    with (
        unittest.mock.patch.object(sys, "argv", ["mimicut", *map(str, arguments)]),
        pytest.raises(SystemExit) as end,
    ):
        main()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) <= 1
    return end.value.code, json.loads(lines[-1]) if lines else None, err
