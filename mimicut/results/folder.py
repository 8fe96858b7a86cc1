"""A folder that is complete or not there: it is written beside its place and takes it by renaming."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from mimicut.base.disk import make_folder, move, remove_folder
from mimicut.base.errors import StoreError
from mimicut.base.interrupts import interrupts_held
from mimicut.base.paths import result_path
from mimicut.base.scratch import came_meanwhile, is_leftover, locked, reserved, scratch, turn_in
from mimicut.results.files import BESIDE, FILES, PAGES, PLAN, REPORT, RUN, STORED, WEIGHTS, read_json

Returned = TypeVar("Returned")
_TITLES = ("Student of ", "Understudy of ")  # of the pages; the second one until release 0.1


def check_writable(folder: str | Path, *, force: bool = False) -> Path:
    """Check that a result can be saved to `folder`; call it before long work. Nothing is left there.

    Args:
        folder: Where the result is to be saved.
        force: Whether an existing folder may be replaced. It must then be a result: its report, and nothing but the
            files of one.

    Returns:
        The resolved path.

    Raises:
        StoreError: It cannot be written or replaced; the message says why.
    """
    path = result_path(folder, "saving")
    try:
        finish_killed_save(path)
        if path.exists():
            _check_replaceable(path, force)
        parent = next(p for p in path.parents if p.exists())
        with scratch(parent, path.name):
            pass
    except OSError as error:
        raise StoreError(
            f"saving to {path}: cannot write in {path.parent} ({error.strerror}); name another folder"
        ) from error
    return path


@contextmanager
def one_run(*folders: str | Path | None, doing: str = "saving", what: str = "run") -> Iterator[None]:
    """Keep other runs away from folders, from the beginning of a run to its end (`base.scratch.reserved`).

    Args:
        folders: Where its results go; None: nowhere.
        doing, what: For the message: "saving", "run".

    Raises:
        StoreError: Another one is under way there.
    """
    with ExitStack() as ends:
        for folder in folders:
            if folder is None:
                continue
            try:
                ends.enter_context(reserved(result_path(folder, doing)))
            except BlockingIOError:
                raise StoreError(
                    f"{doing} to {folder}: another {what} that saves there is under way; wait for its end, stop it, or "
                    "name another folder"
                ) from None
        yield


def fill_folder(
    folder: str | Path, fill: Callable[[Path], Returned], force: bool, replaceable: Callable[[Path], bool] | None = None
) -> tuple[Path, Returned]:
    """Let `fill` write into a hidden sibling of `folder`, which then takes its place.

    On an exception in `fill` an old folder is whole and the sibling removed. If the process is killed between two
    renames, the old folder is a hidden sibling, which `existing_result` finds. Without `force` nothing is replaced,
    also not what another process saved while `fill`, or a run (`one_run`), was at work: the sibling then gets the first
    free name of `folder`-2, `folder`-3, ...

    Args:
        folder: Where to.
        fill: Writes the files.
        force: Whether an existing result is replaced.
        replaceable: Whether a result that is there is replaced also without force.

    Returns:
        The resolved path, and what `fill` returned.

    Raises:
        StoreError: The folder cannot be written or replaced.
    """
    path = Path(folder).resolve()
    if force or not came_meanwhile(path):  # else the work of a run would be lost
        path = check_writable(path, force=force or _is_replaceable(path, replaceable))
    try:
        if not path.parent.exists():
            make_folder(path.parent)
        with scratch(path.parent, path.name) as fresh:
            returned = fill(fresh)
            with interrupts_held():
                _take_place(fresh, path, force, replaceable)
    except OSError as error:
        raise StoreError(f"saving to {path}: {error}; nothing was changed there") from error
    return path, returned


def finish_killed_save(path: Path) -> None:
    """Put the old folder back that a killed save left, or remove it where the new one is in place.

    Raises:
        StoreError: It cannot be moved.
    """
    if previous_path(path).is_dir():
        with turn_in(path.parent):
            _finish_swap(path)


def existing_result(folder: str | Path) -> Path:
    """The folder of a result, or the hidden sibling that a killed save left.

    Raises:
        StoreError: A file of a result is missing.
    """
    path = result_path(folder, "reading")
    path = path if path.exists() or not previous_path(path).is_dir() else previous_path(path)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing == [PLAN, WEIGHTS]:
        raise StoreError(
            f"reading {path}: it holds a student that another tool pruned, as exported files, and no plan to build "
            "it from; its README.md says how to load them"
        )
    if missing:
        raise StoreError(f"reading {path}: found no {', '.join(missing)}; expected a folder that mimicut saved")
    return path


def previous_path(path: Path) -> Path:
    """Where the old folder is while a new one takes its place."""
    return path.parent / f".{path.name}.previous"


def is_own_page(path: Path) -> bool:
    """Whether mimicut made the page at `path`, or there is none."""
    try:
        text = path.read_text(encoding="utf-8")[:1000]
        return any(title in text for title in _TITLES)
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def _finish_swap(path: Path) -> None:
    previous = previous_path(path)
    if not previous.is_dir():
        return
    try:
        if not path.exists():
            move(previous, path)
        elif not [p for p in previous.iterdir() if p.name not in {*FILES, *BESIDE} and not is_leftover(p)]:
            remove_folder(previous)
    except OSError as error:
        raise StoreError(f"saving to {path}: {previous} of an earlier save is in the way ({error.strerror})") from error


def _check_replaceable(path: Path, force: bool) -> None:
    if not path.is_dir():
        raise StoreError(f"saving to {path}: it is a file; name a folder")
    if not force:
        raise StoreError(f"saving to {path}: it exists; name another folder, or replace it with force (--force)")
    try:
        with locked(path):  # which finishes what a killed export began
            foreign = _foreign_files(path)
    except BlockingIOError:
        raise StoreError(f"saving to {path}: an export into it is under way; wait for it") from None
    except OSError as error:
        raise StoreError(f"saving to {path}: {error}; nothing was changed there") from error
    if foreign:
        raise StoreError(
            f"saving to {path}: it is not a result of mimicut (found {', '.join(foreign[:3])}), so force does not "
            "replace it; name another folder, or remove it yourself"
        )
    if not os.access(path, os.W_OK):
        raise StoreError(f"saving to {path}: it is read-only; name another folder")


def _foreign_files(path: Path) -> list[str]:
    """The files of a folder that mimicut did not write; none for an empty folder."""
    found = {inner.name for inner in path.iterdir() if not is_leftover(inner)}
    if not found:
        return []
    try:
        report = read_json(path / REPORT)
    except StoreError:
        report = {}
    if not isinstance(report.get(STORED), dict):
        return [*sorted(found - {*FILES, *BESIDE}), f"no {REPORT} of a result"]
    exported = {str(each.get("file")) for each in report.get("exports", {}).values()}
    own = {REPORT, *exported, *(f"{name}.data" for name in exported)}
    own |= {PLAN, WEIGHTS} if "weights_sha256" in report[STORED] else set()
    own |= {RUN} if report[STORED].get("run") else set()
    own |= {"preprocessing.json"} if exported else set()
    own |= {"model.bin"} if "model.xml" in exported else set()
    own |= {name for name in PAGES if is_own_page(path / name)}
    return sorted(found - own)


def _is_replaceable(path: Path, replaceable: Callable[[Path], bool] | None) -> bool:
    return replaceable is not None and path.is_dir() and replaceable(path)


def _take_place(fresh: Path, path: Path, force: bool, replaceable: Callable[[Path], bool] | None) -> None:
    """Give `fresh` the name `path`, or another name where that is not possible.

    Raises:
        StoreError: It is not possible; the message states the other name.
    """
    try:
        with turn_in(path.parent):
            _finish_swap(path)
            if path.exists() and (force or _is_replaceable(path, replaceable)):
                _check_replaceable(path, True)
                _swap(fresh, path)
            else:
                move(fresh, path)  # which fails where there is something by now
    except (OSError, StoreError) as error:
        why = "another process saved there in the meantime" if path.exists() and isinstance(error, OSError) else error
        beside = _kept_beside(fresh, path)
        if beside is None:
            raise
        raise StoreError(
            f"saving to {path}: {why}; nothing was changed there, and this result is in {beside}"
        ) from error


def _kept_beside(fresh: Path, path: Path) -> Path | None:
    """Give `fresh` the first free name beside `path`; None if it cannot be moved."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(2, 100))
    for beside in (name for name in names if not name.exists()):
        with suppress(OSError):
            move(fresh, beside)
            return beside
    return None


def _swap(fresh: Path, path: Path) -> None:
    """Put `fresh` in the place of `path`; on an exception `path` is what it was."""
    previous = previous_path(path)
    try:
        move(path, previous)
        move(fresh, path)
    except BaseException:
        if previous.exists() and not path.exists():
            move(previous, path)
        raise
    with suppress(OSError):
        remove_folder(previous)
