"""Files that are whole or not there at all, and paths that mean the same after a change of the working folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cemq.errors import InputError, first_line


def absolute(path: str | Path) -> Path:
    """The path from the root, ``~`` written out; a home folder that nobody has is taken for a name."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def cache_folder() -> Path:
    """``cemq`` in the user's cache folder, which XDG_CACHE_HOME names; it need not be there yet.

    Raises:
        OSError: The user has no home.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(f"{first_line(error)} Set XDG_CACHE_HOME") from None
    return absolute(cache) / "cemq"


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file's content another name, or a copy of it where there can be none: on another file system, on one
    without hard links, for a file of somebody else. The copy shares its blocks where the file system does that.

    A symbolic link is followed, as the Hub's cache has them: what it leads to may be gone tomorrow.

    Raises:
        OSError: It cannot be copied either.
    """
    held = os.path.realpath(source)
    with suppress(OSError):
        os.link(held, target)
        return
    if hasattr(os, "copy_file_range"):
        with suppress(OSError), open(held, "rb") as read, target.open("wb") as written:
            while os.copy_file_range(read.fileno(), written.fileno(), 1 << 30):
                pass
            if os.fstat(written.fileno()).st_size == os.path.getsize(held):
                return
    shutil.copyfile(held, target)


def give_usual_permissions(folder: Path) -> None:
    """Let whoever may read a folder read all that is in it: safetensors makes its files for the user alone.

    The folder was made by ``mkdir``, so its own permissions are what the umask leaves. None are taken away.
    """
    allowed = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = mode | (allowed if path.is_dir() else allowed & 0o666)
        if mode != wanted:  # where a file system has one mode for all files, it cannot be set either
            path.chmod(wanted)


def flush(path: Path) -> None:
    """Have a file, or a folder with all that is in it, on the disk itself, where it outlives a power cut.

    Raises:
        OSError: It did not get there: the disk is full, or the share is gone.
    """
    for file in filter(Path.is_file, (path, *path.rglob("*"))):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def check_writable(path: str | Path, what: str = "output") -> None:
    """Raises InputError unless a file can be written there; nothing that is there already changes."""
    target = Path(os.path.realpath(absolute(path)))
    if os.path.isdir(target):
        raise InputError(f"{what} '{path}' is a folder: name a file in it")
    if not os.path.isdir(target.parent):
        raise InputError(f"{what} '{path}': the folder '{Path(path).parent}' does not exist")
    if os.path.lexists(target) and not target.is_file():
        return  # a device or a pipe: opening it may already do something
    partial = _partial(target)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise InputError(f"{what} '{path}' cannot be written: {error.strerror}") from None


@contextmanager
def written_whole(path: str | Path, what: str = "output") -> Iterator[Path]:
    """A file to write that becomes ``path`` if the block ends well, and vanishes if it does not.

    It ends in the same suffix. A symbolic link is followed; a device or a pipe is written as it is.

    Raises:
        InputError: The file cannot be written, or not in this format.
    """
    target = Path(os.path.realpath(absolute(path)))
    partial = target if os.path.lexists(target) and not target.is_file() else _partial(target)
    try:
        yield partial
        if partial != target:
            partial.replace(target)
    except (OSError, ValueError) as error:  # Pillow has ValueError for what a format cannot hold
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{what} '{path}' cannot be written: {reason}") from error
    finally:
        if partial != target:
            with suppress(OSError):
                partial.unlink()


@contextmanager
def kept_whole(path: Path) -> Iterator[Path]:
    """As `written_whole`, for a file of cemq's own, which outlives a power cut; errors are those of whoever writes.

    Raises:
        OSError: The file cannot be put in its place.
    """
    partial = _partial(path)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.stem}.partial-{os.getpid()}{target.suffix}")
