"""The file of a sweep: `[defaults]` and `[[job]]` tables of options of `mimicut compress`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mimicut.cli.config_file import element_type, fault_of, line_of, option_types, read_toml

_DEFAULTS, _JOB = "defaults", "job"
_NAME = "name"  # of a job; no option of compress
_OWN = ("resume",)  # what a sweep decides itself
# compress takes several of each, and makes a result for each: in a sweep these are jobs.
_BUDGETS = ("keep", "latency", "latency_ms")


@dataclass(frozen=True)
class JobOptions:
    """What a file says of one job. where: its place in the file, for messages."""

    name: str
    options: dict[str, Any]
    where: str


def read_jobs(path: Path, compress: Any) -> tuple[list[JobOptions], list[str]]:
    """Read the jobs in a file, each value of a list as a job of its own where a run takes one value.

    Args:
        path: The TOML file.
        compress: The command whose options a job has.

    Returns:
        The jobs that have no fault so far, and all faults.

    Raises:
        InputError: The file cannot be read, or holds no jobs.
    """
    from mimicut.base.errors import InputError, unknown_option

    expected = "a TOML file with a table [[job]] for each job, and options of all of them in [defaults]"
    text, data = read_toml(path, "jobs", expected)
    tables, defaults = data.get(_JOB), data.get(_DEFAULTS, {})
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"reading the jobs {path}: found no [[job]]; expected {expected}")
    if not isinstance(defaults, dict):
        raise InputError(f"reading the jobs {path}: defaults is no table; expected {expected}")
    known = {name: kind for name, kind in option_types(compress).items() if name not in _OWN}
    faults = [
        f"line {line_of(text, key)}: {unknown_option(key, (_DEFAULTS, _JOB))}"
        for key in data
        if key not in (_DEFAULTS, _JOB)
    ]
    shared, wrong = _options(defaults, {name: kind for name, kind in known.items() if name != "out"})
    faults += [f"{_place(text, f'[{_DEFAULTS}]', 0, key)}: {fault}" for key, fault in wrong]
    jobs = []
    for number, table in enumerate(tables):
        own, wrong = _options(table, {**known, _NAME: str})
        options = {**shared, **own}
        wrong += [("", f"{name} is missing") for name in ("teacher", "images") if name not in options]
        faults += [f"{_place(text, f'[[{_JOB}]]', number, key)}: {fault}" for key, fault in wrong]
        if not wrong:
            where = _place(text, f"[[{_JOB}]]", number, "")
            jobs += [JobOptions(name, single, where) for name, single in _each(options, known)]
    return jobs, faults


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The words of `mimicut compress` for the options of one job.

    >>> arguments({"teacher": "demo:vgg7", "images": "photos", "keep": 0.5, "force": True, "pin": ["a", "b"]})
    ['--keep=0.5', '--force', '--pin=a', '--pin=b', '--', 'demo:vgg7', 'photos']
    """
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name not in ("teacher", "images"):
            words += [f"--{flag}={each}" for each in (value if isinstance(value, list) else [value])]
    return [*words, "--", str(options["teacher"]), str(options["images"])]


def _options(table: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The options in a table by the names of parameters, and (key, fault) of what cannot be used."""
    from mimicut.base.errors import unknown_option

    found: dict[str, Any] = {}
    faults = []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            faults.append((key, unknown_option(key, known)))
        elif name in found:
            faults.append((key, f"{name} is given twice, with _ and with -"))
        elif value == []:
            faults.append((key, f"{key} is an empty list"))
        else:
            several = isinstance(value, list) and name != _NAME
            wrong = [fault for each in (value if several else [value]) if (fault := fault_of(key, each, known[name]))]
            faults += [(key, fault) for fault in wrong]
            found[name] = value
    return found, faults


def _each(options: dict[str, Any], known: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, options) of each job that a table stands for: every combination of the values in its lists."""
    lists = {
        name: value if isinstance(value, list) else [value]
        for name, value in options.items()
        if name != _NAME and (name in _BUDGETS or element_type(known[name]) is None)
    }
    base = options.get(_NAME)
    varied = [name for name, values in lists.items() if len(values) > 1 and (base or name != "teacher")]
    for values in product(*lists.values()):
        single = dict(zip(lists, values, strict=True))
        more = "".join(f"-{name.replace('_', '-')}-{_plain(single[name])}" for name in varied)
        yield (
            f"{base or _plain(single['teacher'])}{more}",
            {name: single.get(name, value) for name, value in options.items() if name != _NAME},
        )


def _plain(value: Any) -> str:
    """A value as a part of a folder's name.

    >>> [_plain(value) for value in (0.5, "torchvision:resnet50", "photos/north/", "nets/a.py:small")]
    ['0.5', 'torchvision-resnet50', 'north', 'a.py-small']
    """
    text = f"{value:.12g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _place(text: str, header: str, number: int, key: str) -> str:
    """Where a key stands, or a table for the key "": the table is the one with that header and number, from 0."""
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if re.sub(r"\s|#.*", "", line) == header]
    which = f"job {number + 1}" if header == f"[[{_JOB}]]" else header
    if number >= len(at):  # written in another way, such as job = [{...}]
        return which
    return f"line {at[number] + (line_of(chr(10).join(lines[at[number] :]), key) if key else 1)}, {which}"
