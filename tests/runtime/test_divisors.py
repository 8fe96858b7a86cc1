import itertools
import json
import math
from importlib import import_module

import pytest
from timing import TORCH, latency, random_states
from torch import nn

from mimicut.runtime.divisors import DivisorTable, divisor_of, divisors, width_divisor
from mimicut.runtime.latency import Setting
from mimicut.runtime.machine import machine, runtime_version

module = import_module("mimicut.runtime.divisors")


def steps(divisor):
    return {short: float(math.ceil((64 - short) / divisor) * divisor) for short in (0, 1, 2, 4, 8, 16)}


def test_the_divisor_is_where_rounding_up_begins_to_cost():
    for divisor in (2, 4, 8, 16, 32):
        assert divisor_of(steps(divisor), 0) == divisor
    assert divisor_of({short: ms**2 for short, ms in steps(1).items()}, 0) == 1
    slow_where_odd = {0: 1.0, 1: 1.3, 2: 1.2, 4: 1.0, 8: 0.85, 16: 0.7}
    assert divisor_of(slow_where_odd, 0) == 8
    assert divisor_of({**slow_where_odd, 16: 1.0}, 0) == 8
    assert divisor_of({**steps(4), 2: 64 / 1.019}, 0) == 4
    assert divisor_of({**steps(4), 2: 64 / 1.021}, 0) == 2
    assert divisor_of({**steps(4), 2: 64 / 1.021}, 0.002) == 4
    assert DivisorTable(steps(16), 0).divisor == 16


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Counts what is measured instead of measuring it; the cache is a folder that is not there yet."""
    settings = []

    def instead(networks, example, setting, *, seconds):
        settings.append(setting)
        times = {**{str(short): ms for short, ms in steps(8).items()}, "twin": 63.0}
        return {name: latency(times[name], times[name]) for name in networks}

    monkeypatch.setattr(module, "measure", instead)
    monkeypatch.setenv("MIMICUT_CACHE", str(tmp_path / "cache"))
    return settings


def test_divisors_are_measured_once(measured, tmp_path):
    setting = Setting("torch", 1, 7)
    assert width_divisor(setting) == 8
    assert measured == [Setting("torch", 1, 1)]
    table = divisors(setting)
    assert len(measured) == 1
    assert table == DivisorTable(steps(8), 1 / 64)
    for n, other in enumerate((Setting("torch", 2, 1), Setting("compile", 1, 1)), 2):
        assert width_divisor(other) == width_divisor(other) == 8
        assert len(measured) == n
    width_divisor(setting, refresh=True)
    assert len(measured) == 4
    path = tmp_path / "cache" / "divisors.json"
    entries = json.loads(path.read_text())
    assert [p.name for p in path.parent.iterdir()] == ["divisors.json"]
    assert len(entries) == 3
    assert all(machine() in key and runtime_version("torch") in key for key in entries)
    assert {entry["divisor"] for entry in entries.values()} == {8}


@pytest.mark.parametrize(
    "entry",
    ["", [], {"times": 3}, {"times": {"0": 1.0}, "noise": 0.0}, {"noise": 0.0},
     {"times": {**steps(8), 4: -1.0}, "noise": 0.0}, {"times": {**steps(8), 4: math.nan}, "noise": 0.0},
     {"times": steps(8), "noise": math.inf}, {"times": {**steps(8), "x": 1.0}, "noise": 0.0}],
)  # fmt: skip
def test_an_entry_that_is_none_is_measured_anew(entry, measured, tmp_path):
    width_divisor(TORCH)
    path = tmp_path / "cache" / "divisors.json"
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: entry, "another": 1}))
    assert width_divisor(TORCH) == width_divisor(TORCH) == 8
    assert len(measured) == 2
    assert json.loads(path.read_text())["another"] == 1


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
def test_an_unreadable_table_is_replaced(content, measured, tmp_path):
    path = tmp_path / "cache" / "divisors.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert width_divisor(TORCH) == width_divisor(TORCH) == 8
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_is_no_error(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIMICUT_CACHE", str(tmp_path / "file"))
    assert width_divisor(TORCH) == width_divisor(TORCH) == 8
    assert len(measured) == 2


def test_without_a_home_nothing_is_kept(measured, monkeypatch):
    """A container may run as a user that has no name."""
    for name in ("MIMICUT_CACHE", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nameless(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nameless)
    assert width_divisor(TORCH) == width_divisor(TORCH, refresh=True) == 8
    assert len(measured) == 2


def test_the_networks_that_divisors_are_measured_on(monkeypatch, tmp_path):
    widths = {m.out_channels for m in module._ladder(3) if isinstance(m, nn.Conv2d)}
    assert widths == {61, 93, 125}
    monkeypatch.setenv("MIMICUT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_LADDER_SECONDS", 0.0)
    states = random_states()
    table = divisors(Setting("torch", 1, 1))
    assert random_states() == states
    assert list(table.times) == [0, 1, 2, 4, 8, 16]
    assert all(0 < ms < math.inf for ms in table.times.values())
    assert table.noise >= 0
    assert table.divisor in itertools.accumulate([1, 2, 2, 2, 2, 2], lambda a, b: a * b)
