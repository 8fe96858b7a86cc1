"""From result lines to figures that can be compared: means, paired differences with intervals, tuned options."""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from benchmarks.methods import METHODS
from benchmarks.protocol import TUNED, TUNING_SEEDS, said
from benchmarks.sweep import RESULTS, read_lines

SAME_MACS = 0.005  # how far two shares of the MACs may be apart and count as one. Source: assumption.


@dataclass(frozen=True, order=True)
class Condition:
    """What is the same for every method of one column."""

    teacher: str
    keep_width: float
    cut: str  # as `protocol.said` has it
    images: int
    steps: int


@dataclass(frozen=True)
class Entry:
    """One method with one choice of options under one condition; lists have one value a seed."""

    method: str
    options: dict[str, Any]
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    top1_teacher: float
    seconds: float  # the least of the seeds: what else the machine does only adds to it
    peak_memory_mib: float | None  # median
    macs: float
    params: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    @property
    def lost(self) -> float:
        return self.top1_teacher - self.mean


Table = dict[Condition, dict[str, list[Entry]]]


def table(lines: Iterable[dict[str, Any]]) -> Table:
    """condition -> method -> entries, the best mean first; entries with fewer seeds than others come last.

    A method whose steps mean nothing stands under every number of steps. Lines that ended in an error are left out.
    """
    groups: dict[tuple[Condition, str, str], dict[int, dict[str, Any]]] = {}  # by seed
    lines = [line for line in lines if "error" not in line]
    steps_of: dict[tuple, set[int]] = {}
    for line in lines:
        cell = line["cell"]
        if METHODS[cell["method"]].trains:
            steps_of.setdefault(_place(cell), set()).add(cell["steps"])
    for line in lines:
        cell = line["cell"]
        place = _place(cell)
        own = {cell["steps"]}
        for steps in own if METHODS[cell["method"]].trains else steps_of.get(place, own):
            key = Condition(*place, steps), cell["method"], json.dumps(cell["options"], sort_keys=True)
            groups.setdefault(key, {})[cell["seed"]] = line
    found: Table = {}
    for (condition, method, options), by_seed in sorted(groups.items(), key=lambda item: item[0][:1]):
        group = [by_seed[seed] for seed in sorted(by_seed)]
        memory = [line["peak_memory_mib"] for line in group if line["peak_memory_mib"] is not None]
        entry = Entry(
            method, json.loads(options),
            tuple(line["cell"]["seed"] for line in group), tuple(line["figures"]["top1"] for line in group),
            group[0]["figures"]["top1_teacher"], min(line["seconds"] for line in group),
            statistics.median(memory) if memory else None, group[0]["figures"]["macs"], group[0]["figures"]["params"],
        )  # fmt: skip
        found.setdefault(condition, {}).setdefault(method, []).append(entry)
    for methods in found.values():
        for entries in methods.values():
            entries.sort(key=lambda e: (-len(e.seeds), -e.mean))
    return found


def _place(cell: dict[str, Any]) -> tuple[str, float, str, int]:
    return cell["teacher"], cell["cut"]["keep_width"], said(cell["cut"]), cell["images"]


def other_cost(entry: Entry, mir: Entry) -> bool:
    """Whether a method that cuts by itself leaves another share of the MACs than the table's cut."""
    return abs(entry.macs - mir.macs) > SAME_MACS


def paired(a: Entry, b: Entry) -> tuple[float, float, float] | None:
    """Mean of a - b over the seeds that both have, with its 95 % interval (Student's t); None below two seeds."""
    there = dict(zip(b.seeds, b.top1, strict=True))
    differences = [x - there[seed] for seed, x in zip(a.seeds, a.top1, strict=True) if seed in there]
    if len(differences) < 2:
        return None
    mean, n = statistics.mean(differences), len(differences)
    half = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return mean, mean - half, mean + half


def floors(found: Table) -> list[dict[str, Any]]:
    """Where MiR at 50 images loses 4 to 8 points: its margins over the best BP and the best labelled KD, and
    over those with their published options (untuned)."""
    rows = []
    for condition, methods in found.items():
        mir = methods.get("mir", [None])[0]
        if condition.images != 50 or mir is None or not 4 <= mir.lost <= 8:
            continue
        there = {name: methods[name] for name in ("fine_tune", "distill_labels") if methods.get(name)}
        margins = {name: paired(mir, entries[0]) for name, entries in there.items()}
        untuned = {
            n: paired(mir, e) for n, entries in there.items() for e in entries if e.options == METHODS[n].published
        }
        whole = all(methods.get(name) and methods[name][0].seeds == mir.seeds for name in margins) and len(margins) == 2
        rows.append({"condition": condition, "lost": mir.lost, "margins": margins, "untuned": untuned, "whole": whole})
    return rows


def write_tuned(files: Sequence[Path] = ()) -> int:
    """tuned.json: for every method, teacher, cut and number of images the options with the best mean on the tuning
    seeds, where the whole grid was swept; by default of all results/*_tuning.jsonl. Words on stderr say where it was
    not, and where the best stands at the end of its grid. Returns 2, and writes nothing, when there is nothing."""
    tuned: dict[str, Any] = {}
    lines = [line for path in files or sorted(RESULTS.glob("*_tuning.jsonl")) for line in read_lines(path)]
    for condition, methods in table(line for line in lines if line["cell"]["seed"] in TUNING_SEEDS).items():
        for name, entries in methods.items():
            grid = METHODS[name].grid
            tried = [e for e in entries if e.options in grid and e.seeds == TUNING_SEEDS]
            where = f"{name} {condition.teacher} {condition.cut} images={condition.images} steps={condition.steps}"
            if len(tried) < len(grid):
                print(f"left out: {where}: {len(tried)} of {len(grid)} options were run", file=sys.stderr)
                continue
            best = max(tried, key=lambda e: e.mean)
            for key in at_the_end(best.options, grid):
                print(f"{where}: the best {key}, {best.options[key]}, is the last that was tried", file=sys.stderr)
            cuts = tuned.setdefault(name, {}).setdefault(condition.teacher, {})
            found = {"images": condition.images, "steps": condition.steps, "best": best.options}
            cuts.setdefault(condition.cut, []).append(found)
    if not tuned:
        print("error: no grid was swept: `sweep embedded_tuning` first", file=sys.stderr)
        return 2
    TUNED.write_text(json.dumps(tuned, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps({"written": TUNED.name, "methods": len(tuned)}))
    return 0


def at_the_end(options: dict[str, Any], grid: Sequence[dict[str, Any]]) -> list[str]:
    """The numbers among `options` beyond which their grid tried none, though it tried several."""
    found = []
    for key, value in options.items():
        tried = sorted({o[key] for o in grid if isinstance(o[key], float)})
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            found.append(key)
    return found
