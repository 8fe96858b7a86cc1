"""The names of a network's classes, from a file or a list."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimicut.base.errors import InputError
from mimicut.base.paths import usable_path

_EXPECTED = 'expected a name a line, or JSON: ["cat", "dog"] or {"0": "cat", "1": "dog"}, also as its id2label or names'


def read_class_names(source: Sequence[str] | str | Path) -> tuple[str, ...]:
    """The name of each class, in the order of the network's outputs.

    Args:
        source: The names; or a text file with a name a line, or a JSON file: a list, or an object that maps numbers to
            names (itself, or its "id2label", as transformers writes it, or its "names").

    Raises:
        InputError: The file cannot be read, or does not name the classes 0, 1, ... once each.

    >>> read_class_names(["cat", "dog"])
    ('cat', 'dog')
    """
    if not isinstance(source, (str, Path)):
        return _in_order(list(source), "reading the class names")
    path = usable_path(source, "reading the class names")
    doing = f"reading the class names {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{doing}: {error}; {_EXPECTED}") from error
    if path.suffix.lower() != ".json":
        return _in_order(text.rstrip().split("\n"), doing)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{doing}: it is no JSON ({error}); {_EXPECTED}") from error
    if isinstance(found, dict):
        found = found.get("id2label") or found.get("names") or found
    return _in_order(found, doing)


def named_by_number(found: Mapping[Any, str]) -> tuple[str, ...]:
    """The names of the classes that a library maps from numbers, in order; empty where a number is missing.

    >>> named_by_number({"1": "dog", "0": "cat"}), named_by_number({1: "dog"})
    (('cat', 'dog'), ())
    """
    names = {str(number): name for number, name in found.items()}
    if set(names) != {str(number) for number in range(len(names))}:
        return ()
    return tuple(str(names[str(number)]) for number in range(len(names)))


def numbered(names: Sequence[str]) -> dict[str, str]:
    """Class number -> its name.

    >>> numbered(["cat", "dog"])
    {'0': 'cat', '1': 'dog'}
    """
    return {str(number): name for number, name in enumerate(names)}


def check_class_names(names: Sequence[str], classes: Sequence[int]) -> None:
    """Refuse names of another number than the network has classes.

    Args:
        names: The names.
        classes: How many classes each output has that names classes.

    Raises:
        InputError: They do not fit.
    """
    if not classes:
        raise InputError(
            f"reading the class names: found {len(names)}, but the network returns no classes; leave them out, or say "
            "what its output is with --output"
        )
    if len(names) not in classes:
        which = " or ".join(map(str, dict.fromkeys(classes)))
        raise InputError(
            f"reading the class names: found {len(names)} names, but the network has {which} classes; give one for "
            "each, in the order of its outputs"
        )


def _in_order(found: Any, doing: str) -> tuple[str, ...]:
    if isinstance(found, dict):
        names = named_by_number(found)
        if found and not names:
            raise InputError(f"{doing}: its numbers are not 0 to {len(found) - 1}, once each; {_EXPECTED}")
        found = list(names)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{doing}: found {type(found).__name__}, {_EXPECTED}")
    names = tuple(name.strip() for name in found)
    if not names or not all(names):
        which = f"no name for class {names.index('')}" if names else "none"
        raise InputError(f"{doing}: found {which}; {_EXPECTED}")
    return names
