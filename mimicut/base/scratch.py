"""Hidden folders in which results are made before they take their place, and what a killed process leaves of them.

A scratch folder has a name that says what it is for, and a lock on it says that its process lives: the next one that
works on the same thing removes those without. Files that replace others in a folder are first gathered in one of them,
which is then marked as complete by renaming it: whoever comes next finishes the moves.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from mimicut.base.disk import make_folder, move, remove, remove_empty_folder, remove_folder, write
from mimicut.base.interrupts import interrupts_held

Returned = TypeVar("Returned")
_INSIDE = "export"  # what scratch folders inside a folder are for
_MOMENT_SECONDS, _AGAIN_SECONDS = 2.0, 0.01
_COMPLETE, _NAMES = f".{_INSIDE}.complete", ".names"
_FOLDERS = re.compile(rf"\.{_INSIDE}\.([0-9a-f]{{8}}\.saving|complete)")
_NAMES_BYTES = 2**16  # Source: assumption, far above what our own files need.
_FILES = re.compile(r"\.(report\.json|report\.html|README\.md)\.[0-9a-f]{8}\.saving")  # of an earlier release
# What runs that are under way in this thread save to -> whether something was there when they began.
_reserved: ContextVar[dict[Path, bool] | None] = ContextVar("_reserved", default=None)


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A new hidden folder inside `folder` in which `name` is made; it is removed at the end, if it is still there.

    Those that killed processes left there for the same name are removed first.

    Raises:
        OSError: It cannot be made.
    """
    clear(folder, name)
    path, opened = None, None
    try:
        with interrupts_held():
            path, opened = _made(folder, name)
        yield path
    finally:
        with interrupts_held():
            if path is not None:
                with suppress(OSError):
                    remove_folder(path)
            if opened is not None:
                os.close(opened)


def clear(folder: Path, name: str) -> None:
    """Remove what killed processes left in `folder` for `name`; what cannot be removed stays."""
    ours = re.compile(rf"\.{re.escape(name)}\.(stopped\.safetensors\.)?[0-9a-f]{{8}}\.(saving|probe)")
    _clear(folder, lambda path: ours.fullmatch(path.name) is not None)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder inside a result is what a killed process of mimicut left, by its name."""
    return (_FOLDERS if path.is_dir() else _FILES).fullmatch(path.name) is not None


@contextmanager
def locked(folder: Path) -> Iterator[frozenset[str]]:
    """Keep other processes from changing files in `folder`. Not on Windows, nor on disks without locks.

    What killed processes left is removed, and a replacement of files that one of them had begun is finished. One that
    only looks at the folder holds it for moments, which are waited for.

    Yields:
        The names of the files that a killed process was replacing.

    Raises:
        BlockingIOError: Another process is at it.
        OSError: The disk refuses.
    """
    opened = _lock(folder, seconds=_MOMENT_SECONDS)
    try:
        finished = _finish(folder)
        _clear(folder, is_leftover)
        yield finished
    finally:
        if opened is not None:
            os.close(opened)


@contextmanager
def turn_in(folder: Path) -> Iterator[None]:
    """Wait until no other process gives names in `folder` to results; for moments only."""
    opened = _lock(folder, seconds=None)
    try:
        yield
    finally:
        if opened is not None:
            os.close(opened)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Keep `path` for the result of one run, from its beginning to its end; a run inside a run has it already.

    A locked file beside it says so. Its lock ends with the process, however that ends, so that one which a killed
    process left keeps nobody away; it is removed at the end, with folders above it that were made for it and are
    empty. Where there are no locks, or no file can be made, nothing is kept.

    Args:
        path: A whole path (resolved); whether something is there does not matter.

    Raises:
        BlockingIOError: Another run has it, and still had it after a moment.
    """
    mine = _reserved.get() or {}
    if path in mine or not path.name:  # "/" is no place for a result
        yield
        return
    file, opened, missing = path.with_name(f".{path.name}.running"), None, list[Path]()
    with suppress(OSError):
        missing = [folder for folder in path.parents if not folder.exists()]
    before = _reserved.set({**mine, path: os.path.lexists(path)})
    try:
        with interrupts_held():
            opened = _opened(file)
        yield
    finally:
        _reserved.reset(before)
        with interrupts_held():
            if opened is not None:
                with suppress(OSError):
                    remove(file)  # while it is locked: who waits for it sees that it is another one by now
                os.close(opened)
            for folder in missing:
                remove_empty_folder(folder)


def came_meanwhile(path: Path) -> bool:
    """Whether something is at `path` that was not there when a run in this thread reserved it."""
    return not (_reserved.get() or {}).get(path, True) and os.path.lexists(path)


def _opened(file: Path) -> int | None:
    """Make a file, if it is not there, and lock it; None where that is not possible.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    until, made = time.monotonic() + _MOMENT_SECONDS, False
    while True:
        try:
            if not file.parent.exists():
                with suppress(FileExistsError):  # of another process
                    make_folder(file.parent)
            if not file.exists():
                made = True
                write(file, "")
            opened = _lock(file, seconds=_MOMENT_SECONDS, how=os.O_RDWR)  # NFS locks only what can be written
        except BlockingIOError:
            raise
        except FileNotFoundError:  # another run ended, and removed it
            if time.monotonic() > until:
                return None
            time.sleep(_AGAIN_SECONDS)
            continue
        except OSError:
            return None
        if opened is None and made:
            with suppress(OSError):
                remove(file)
        return opened


def replace_files(folder: Path, fill: Callable[[Path], Returned]) -> Returned:
    """Let `fill` write files into a hidden folder, which then replace those of the same names in `folder`.

    The caller has locked the folder. After an exception in `fill`, or if the process is killed there, all is as it was;
    if it is killed later, `locked` finishes it. Folders that `fill` leaves are not moved, and an empty file stands for
    one that is removed.

    Returns:
        What `fill` returned.

    Raises:
        OSError: The disk refuses.
    """
    with scratch(folder, _INSIDE) as fresh:
        returned = fill(fresh)
        names = [path.name for path in fresh.iterdir() if path.is_file()]
        write(fresh / _NAMES, "\n".join(names))
        with interrupts_held():
            move(fresh, folder / _COMPLETE)
            _finish(folder)
    return returned


def replace_file(path: Path, writer: Callable[[Path], None]) -> None:
    """Let `writer` write the file that then takes the place of `path`, which is the old or the new one at any time.

    Raises:
        OSError: The disk refuses; the old file is then whole.
    """
    with scratch(path.parent, path.name) as fresh:
        writer(fresh / path.name)
        move(fresh / path.name, path)


def _finish(folder: Path) -> frozenset[str]:
    """Move the files of a complete replacement, data before what refers to it and reports last; return their names."""
    complete = folder / _COMPLETE
    if not os.path.lexists(complete):
        return frozenset()
    names = _checked_names(complete)
    for name in sorted(names, key=lambda n: (n == "report.json", not n.endswith((".data", ".bin")), n)):
        file = complete / name
        if file.exists() and file.stat().st_size:
            move(file, folder / name)
        elif file.exists():
            remove(folder / name)
            remove(file)
    done = folder / f".{_INSIDE}.{secrets.token_hex(4)}.saving"
    move(complete, done)
    remove_folder(done)
    return frozenset(names)


def _checked_names(complete: Path) -> list[str]:
    """What a complete replacement replaces. The folder may come from elsewhere: nothing may reach beyond it.

    Raises:
        OSError: It is a link, or names something else than files of its own.
    """
    listed = complete / _NAMES
    if complete.is_symlink() or not _is_plain(listed) or listed.stat().st_size > _NAMES_BYTES:
        raise OSError(f"{complete} is none that mimicut left: remove it")
    names = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    for name in names:
        file = complete / name
        if Path(name).name != name or name in ("", "..") or (os.path.lexists(file) and not _is_plain(file)):
            raise OSError(f"{complete} is none that mimicut left, as it names {name!r}: remove it")
    return names


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _made(folder: Path, name: str) -> tuple[Path, int | None]:
    """A new scratch folder and its lock."""
    while True:
        path = folder / f".{name}.{secrets.token_hex(4)}.saving"
        make_folder(path)
        try:
            opened = _lock(path)
        except (BlockingIOError, FileNotFoundError):  # another process took it for one that was left
            continue
        return path, opened


def _clear(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    with suppress(OSError):
        for path in [p for p in folder.iterdir() if is_ours(p) and not p.is_symlink()]:
            with suppress(OSError):
                if not path.is_dir():
                    remove(path)
                    continue
                opened = _lock(path)
                if opened is not None:  # else nobody knows whether its process lives
                    try:
                        remove_folder(path)
                    finally:
                        os.close(opened)


def _lock(folder: Path, *, seconds: float | None = 0.0, how: int = os.O_RDONLY) -> int | None:
    """An open file that holds the lock of a folder until it is closed; None where there are no locks.

    Args:
        folder: The folder, or a file.
        seconds: How long another one that holds it is waited for; None for as long as it takes.
        how: It is opened so.

    Raises:
        BlockingIOError: Another holds it.
        FileNotFoundError: There is no such folder.
    """
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            import fcntl

            opened = os.open(folder, how)
        except (ImportError, PermissionError):
            return None
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if until is None else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(opened), os.stat(folder)):
                return opened
        except BlockingIOError:
            os.close(opened)
            if until is not None and time.monotonic() < until:
                time.sleep(_AGAIN_SECONDS)
                continue
            raise
        except FileNotFoundError:
            os.close(opened)
            raise
        except OSError:
            os.close(opened)
            return None
        os.close(opened)  # another one has its name by now
