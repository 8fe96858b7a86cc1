"""Which channel widths are fast on a runtime: measured, and kept in a small table of this machine."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.disk import make_folder, write
from mimicut.base.guard import seeded
from mimicut.base.scratch import replace_file
from mimicut.runtime.latency import Setting, measure

_COSTLY = 0.02  # share of time: what takes more is a cost of rounding up. Assumption; a step costs 15 to 18 %, measured
_LADDER_SECONDS = 5.0  # about 100 rounds
_SHORT = (0, 1, 2, 4, 8, 16)  # channels below a multiple of 32: the best widths that finer divisors allow


@dataclass(frozen=True)
class DivisorTable:
    """The times of one network at several widths on a runtime.

    Attributes:
        times: Channels by which every width is below a multiple of 32 -> milliseconds of one forward pass.
        noise: The difference of a second copy of the widest network, as a share of the first.
    """

    times: Mapping[int, float]
    noise: float

    @property
    def divisor(self) -> int:
        """As `divisor_of`."""
        return divisor_of(self.times, self.noise)


def divisor_of(times: Mapping[int, float], noise: float) -> int:
    """The largest of 1, 2, 4, 8, 16, 32 to which rounding widths up costs no time, 2 % and the noise aside.

    Each doubling is compared with the best width that the divisor before allows: 8 with a width 4 below it. Divisors
    larger than the first that costs time are not tried.

    Args:
        times: As in `DivisorTable`.
        noise: As in `DivisorTable`.

    >>> divisor_of({0: 1.0, 1: 1.0, 2: 1.0, 4: 1.0, 8: 0.7, 16: 0.5}, noise=0.0)
    8
    """
    divisor = 1
    while divisor < 32 and times[0] <= times[divisor] * (1 + _COSTLY + noise):
        divisor *= 2
    return divisor


def width_divisor(setting: Setting, *, refresh: bool = False) -> int:
    """The number of which widths should be multiples, because widths between them are no faster.

    Raises:
        InputError, UnsupportedModel, LawBroken: As `prepare`.
    """
    return divisors(setting, refresh=refresh).divisor


def divisors(setting: Setting, *, refresh: bool = False) -> DivisorTable:
    """Measure with one image (10 to 20 s; for "compile" the first time a minute), or read an earlier measurement.

    The networks are convolutions, 1x1 and 3x3 on 28 and 14 pixels, of widths up to 64, 96 and 128; depthwise and
    grouped ones and the linear layers of transformers may have other steps. The table is divisors.json in the folder
    MIMICUT_CACHE (~/.cache/mimicut), by runtime, threads, precision, version and processor.

    Args:
        setting: The runtime and its threads; the batch is always 1.
        refresh: Whether to measure anew.

    Raises:
        InputError, UnsupportedModel, LawBroken: As `prepare`.
    """
    setting = replace(setting, batch=1)
    path = _cache()
    key = " | ".join(str(v) for name, v in setting.to_json().items() if name != "batch")
    found = None if refresh or path is None else _table(_read(path).get(key))
    if found is None:
        with seeded(0):
            networks = {str(short): _ladder(short) for short in _SHORT}
            networks["twin"], example = _ladder(0), torch.randn(1, 32, 28, 28)
        measured = measure(networks, example, setting, seconds=_LADDER_SECONDS)
        full = measured["0"]
        times = {short: full.ms_median * measured[str(short)].over(full)[0] for short in _SHORT}
        found = DivisorTable(times, abs(measured["twin"].over(full)[0] - 1))
        if path is not None:
            _write(path, {**_read(path), key: {"divisor": found.divisor, **vars(found)}})
    return found


def _cache() -> Path | None:
    """The file; None where it has no place: without MIMICUT_CACHE and HOME, for a user without a name."""
    try:
        return Path(os.environ.get("MIMICUT_CACHE") or "~/.cache/mimicut").expanduser() / "divisors.json"
    except RuntimeError:
        return None


def _ladder(short: int) -> nn.Module:
    """A network of convolutions; every width is `short` channels below a multiple of 32."""
    a, b, c = (width - short for width in (64, 96, 128))
    return nn.Sequential(
        *(nn.Conv2d(32, a, 1), nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 1), nn.Conv2d(b, b, 3, padding=1)),
        *(nn.Conv2d(b, c, 1, 2), nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(c, 20),
    )


def _table(entry: Any) -> DivisorTable | None:
    """The table in an entry of the file; None where it is damaged."""
    try:
        found = DivisorTable({int(k): float(ms) for k, ms in entry["times"].items()}, float(entry["noise"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    sound = set(found.times) == set(_SHORT) and all(0 < ms < math.inf for ms in found.times.values())
    return found if sound and 0 <= found.noise < math.inf else None


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _write(path: Path, table: Mapping[str, Any]) -> None:
    """Write the file whole; if the folder cannot be written, the next call measures anew."""
    with suppress(OSError):
        if not path.parent.exists():
            make_folder(path.parent)
        replace_file(path, lambda fresh: write(fresh, json.dumps(table, indent=1) + "\n"))
