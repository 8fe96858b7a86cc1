"""`--config FILE.toml`: the options of a command in a file, which its flags override."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer


def read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """The options in a file, by the names of parameters.

    Args:
        path: A TOML file; its keys are the names of flags without the two hyphens, or of arguments.
        known: The names that the command knows, with underscores.

    Raises:
        InputError: The file cannot be read, or holds a key that the command does not know; the line is named.
    """
    from mimicut.base.errors import InputError, unknown_option

    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"reading the config {path}: {error}; expected a TOML file of options") from error
    options = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in known:
            line = _line_of(text, key)
            raise InputError(f"reading the config {path}, line {line}: {unknown_option(key, known)}")
        if isinstance(value, dict):
            raise InputError(
                f"reading the config {path}, line {_line_of(text, key)}: {key} is a table, expected a value"
            )
        options[name] = value
    return options


def _line_of(text: str, key: str) -> int:
    """The number of the line on which a key stands, from 1; 0 where it cannot be found."""
    pattern = re.compile(rf"""\s*\[*["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 0)


def _use(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        parameters = {parameter.name: parameter for parameter in context.command.params if parameter.name != "config"}
        options = read_config(path, set(parameters))
        several = {name for name, parameter in parameters.items() if getattr(parameter, "multiple", False)}
        context.default_map = {
            name: [value] if name in several and not isinstance(value, list) else value
            for name, value in options.items()
        }
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file that holds any of these options and arguments; flags override it. Every folder that compress "
        "makes has one that makes it again: run.toml",
        is_eager=True,
        callback=_use,
    ),
]
