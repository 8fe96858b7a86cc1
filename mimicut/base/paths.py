"""Paths that a user gave, before anything looks at them: some cannot even be asked for."""

import os
from pathlib import Path

from mimicut.base.errors import InputError, StoreError

# Appended to the name of a folder by files beside it: the longest, and what it has in front.
_BESIDE = (".", ".stopped.safetensors.00000000.saving")


def usable_path(path: str | Path, doing: str, error: type[InputError] = InputError) -> Path:
    """`path`, of which the system can say whether it is there.

    Args:
        path: A file or a folder that may or may not exist.
        doing: For the message: "reading images".
        error: The kind of error.

    Raises:
        InputError: A name in it is too long, it is a link that leads back to itself, or no path at all.

    >>> usable_path("a" * 300, "reading images")
    Traceback (most recent call last):
    ...
    mimicut.base.errors.InputError: reading images: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa'... cannot be a path (File name too \
long); name another one
    """
    if not str(path):
        raise error(f"{doing}: found an empty name; for the current folder give .")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as reason:
        short = repr(str(path)) if len(str(path)) < 200 else f"{str(path)[:28]!r}..."
        why = getattr(reason, "strerror", None) or str(reason)
        raise error(f"{doing}: {short} cannot be a path ({why}); name another one") from reason
    return Path(path)


def result_path(folder: str | Path, doing: str) -> Path:
    """The whole path of a result's folder, beside which files with longer names can stand.

    Raises:
        StoreError: As `usable_path`.
    """
    path = usable_path(folder, doing, StoreError).resolve()
    usable_path(path.parent / f"{_BESIDE[0]}{path.name}{_BESIDE[1]}", doing, StoreError)
    return path
