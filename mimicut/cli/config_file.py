"""`--config FILE.toml`: the options of a command in a file, which its flags override."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_config(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options in a file, by the names of parameters.

    Args:
        path: A TOML file; its keys are the names of flags without the two hyphens, or of arguments.
        known: The parameters of the command, name -> type, such as `float | None` or `list[str] | None`.

    Raises:
        InputError: The file cannot be read, or holds a key that the command does not know or a value of another kind;
            the line is named.
    """
    from mimicut.base.errors import InputError, unknown_option

    text, data = read_toml(path, "config", "a TOML file of options")
    options: dict[str, Any] = {}
    for key, value in data.items():
        name, line = key.replace("-", "_"), line_of(text, key)
        fault = fault_of(key, value, known[name]) if name in known else unknown_option(key, known)
        if fault is not None:
            raise InputError(f"reading the config {path}, line {line}: {fault}")
        if name in options:
            raise InputError(f"reading the config {path}, line {line}: {name} is given twice, with _ and with -")
        several = element_type(known[name])
        options[name] = [value] if several is not None and not isinstance(value, list) else value
    return options


def read_toml(path: Path, what: str, expected: str) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file and what is in it; what and expected are for the message.

    Raises:
        InputError: The file cannot be read.
    """
    import tomllib

    from mimicut.base.errors import InputError

    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"reading the {what} {path}: {error}; expected {expected}") from error


def fault_of(key: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a value for a parameter of this type, or None."""
    several = element_type(kind)
    one = several or _without_none(kind)
    expected = _WORDS.get(one, "text")
    if isinstance(value, dict):
        return f"{key} is a table, expected {expected}"
    if isinstance(value, list) and several is None:
        return f"{key} is a list, expected {expected}"
    for each in value if isinstance(value, list) else [value]:
        if not _is_a(each, one):
            shown = str(each).lower() if isinstance(each, bool) else repr(each)
            return f"{key} is {shown}, expected {expected}"
    return None


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, int) if kind is int else isinstance(value, (str, int, float))


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return next(each for each in get_args(kind) if each is not type(None))


def element_type(kind: Any) -> Any:
    """The type of an element if a parameter takes a list, else None."""
    kind = _without_none(kind)
    return get_args(kind)[0] if get_origin(kind) is list else None


def line_of(text: str, key: str) -> int:
    """The line number of a key, from 1; 0 if not found."""
    pattern = re.compile(rf"""\s*\[*["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 0)


def _use(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = read_config(path, option_types(context.command))
    return path


def option_types(command: Any) -> dict[str, Any]:
    """Name -> type of each option and argument of a command that a file may hold."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    names = {parameter.name for parameter in command.params} - {"config"}
    return {name: kind for name, kind in hints.items() if name in names}


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file that holds any of these options and arguments; flags override it. Every result folder has one "
        "that makes it again: run.toml",
        is_eager=True,
        callback=_use,
    ),
]
