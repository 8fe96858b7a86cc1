"""The one place where files that users keep are changed. A process may be killed between any two of these changes, and
a disk may refuse any of them: `observer` sees each one, so that tests try them all.

A test fails where other code of the packages that save changes files.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OVERHEAD = 2**16  # bytes of a file beside its tensors. Source: assumption.

observer: Callable[[str, str, Path], None] | None = None
"""Called with "before" or "after", the kind of change, and the path that it is made to."""


@contextmanager
def _change(kind: str, path: Path) -> Iterator[None]:
    if observer is not None:
        observer("before", kind, path)
    yield
    if observer is not None:
        observer("after", kind, path)


def make_folder(path: Path) -> None:
    """Make a folder; one that exists is an error. Missing parents are made, each as a change of its own."""
    if not path.parent.exists():
        with suppress(FileExistsError):  # of another process
            make_folder(path.parent)
    with _change("make folder", path):
        path.mkdir()


def write(path: Path, content: str | bytes) -> None:
    """Write a file, and wait until the disk has it."""
    data = content.encode() if isinstance(content, str) else content
    with _change("write", path):
        path.write_bytes(data)
    _sync(path)


def write_by(path: Path, writer: Callable[[Path], object], size: int = 0) -> None:
    """Let a library write the file `path`, and wait until the disk has it. Its mode follows the umask, whatever the
    library gives it.

    Args:
        path: The file.
        writer: Writes it.
        size: Bytes of its tensors; whether the disk takes them is checked first.

    Raises:
        OSError: The disk refuses, also where the library raises something else; other errors as they are.
    """
    needed = size + size // 10 + _OVERHEAD if size else 0
    check_space(path.parent, needed)
    with _change("make file", path):
        path.touch()
    mode = path.stat().st_mode
    try:
        with _change("write", path):
            writer(path)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        remove(path)
        check_space(path.parent, needed)
        raise
    if path.stat().st_mode != mode:
        with _change("set mode", path):
            path.chmod(mode)
    _sync(path)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, at once. A file of that name is replaced, and so is an empty folder by a
    folder."""
    if source.is_dir():
        _sync_folder(source)
    with _change("move", target):
        os.replace(source, target)
    _sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    if path.is_symlink() or path.exists():
        with _change("remove", path), suppress(FileNotFoundError):
            path.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there. Links are removed, and not followed."""
    if path.is_symlink() or not path.is_dir():
        return
    for inner in sorted(path.iterdir()):
        if inner.is_dir() and not inner.is_symlink():
            remove_folder(inner)
        else:
            remove(inner)
    with _change("remove folder", path), suppress(FileNotFoundError):
        path.rmdir()


def remove_empty_folder(path: Path) -> None:
    """Remove a folder, if it is there and nothing is in it."""
    if path.is_dir() and not path.is_symlink():
        with _change("remove folder", path), suppress(OSError):  # of another process, which put something there
            path.rmdir()


def check_space(folder: Path, size: int) -> None:
    """Check that the disk takes a file of `size` bytes, by asking for it; nothing is left. Where none can be asked for
    (macOS, Windows) its free space counts.

    Raises:
        OSError: It does not.
    """
    if not size:
        return
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for a file of {size:,} bytes")
        return
    path = folder / ".space"
    try:
        with _change("reserve", path), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a disk that reserves nothing
            raise OSError(error.errno, f"{error.strerror} for a file of {size:,} bytes") from error
    finally:
        remove(path)


def _sync(path: Path) -> None:
    with _change("sync", path), path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; not every system can."""
    with _change("sync folder", path), suppress(OSError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
