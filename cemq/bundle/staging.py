"""A bundle is written beside its place, by one process at a time, and takes the place when it is whole.

Beside ``NAME`` lies ``.NAME.building`` for as long as somebody writes, or waits to go on: the lock of who is at work,
which the system lets go of however a process ends, and what is being written. A bundle is whole or absent.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cemq.bundle.manifest import MANIFEST
from cemq.errors import BundleError, first_line
from cemq.files import absolute, flush, give_usual_permissions

_LOCK, _PARTIAL, _REPLACED, _TAKING = "lock", "partial", "replaced", "taking"
_HERE, _EXCHANGE = -100, 2  # of Linux: AT_FDCWD and RENAME_EXCHANGE


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a bundle is to be, and the folder beside it to make it in; both are one process's while it is `claimed`."""

    target: Path
    folder: Path

    def take(self, whole: Path) -> None:
        """Put a folder that lies in ``folder`` in the place, for what is there, and clear away all work for it."""
        give_usual_permissions(whole)
        flush(whole)  # a name may reach the disk before what it names, and the old bundle is about to go
        note = self.folder / _TAKING
        note.write_text(str(whole.stat().st_ino))
        try:
            self._rename(whole)
        except BaseException:
            if not self._was_taken():
                note.unlink()
            raise
        self.clear()

    def _rename(self, whole: Path) -> None:
        if not self.target.exists():
            whole.rename(self.target)
        elif not exchange(whole, self.target):
            replaced = self.folder / _REPLACED
            self.target.rename(replaced)
            try:
                whole.rename(self.target)
            except BaseException:
                replaced.rename(self.target)
                raise

    def clear(self) -> None:
        """Remove whatever work there is for this place, but for the lock; the note of what took the place last."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _TAKING):
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def recover(self) -> None:
        """Bring in order what a process that was killed has left, and remove what nobody goes on with."""
        if self._was_taken():
            self.clear()
        (self.folder / _TAKING).unlink(missing_ok=True)
        replaced = [self.folder / _REPLACED, *self._left("replaced")]
        for folder in filter(Path.exists, replaced):
            if os.path.lexists(self.target):
                shutil.rmtree(folder)
            else:  # killed between the two renames
                folder.rename(self.target)
        for folder in (self.folder / _PARTIAL, *self._left("partial")):
            shutil.rmtree(folder, ignore_errors=True)

    def _was_taken(self) -> bool:
        """Whether what was about to take the place did so, and only clearing away was left."""
        try:
            return int((self.folder / _TAKING).read_text()) == self.target.stat().st_ino
        except (OSError, ValueError):
            return False

    def _left(self, what: str) -> Iterator[Path]:
        """What an earlier cemq has left, which knew no lock and named its folders by its process or by chance."""
        start = f".{self.target.name}.{what}-"
        for path in sorted(self.target.parent.iterdir()):
            owner = path.name.removeprefix(start)
            lives = owner.isdecimal() and psutil.pid_exists(int(owner))
            if path.name.startswith(start) and path.is_dir() and not lives:
                yield path


@contextmanager
def claimed(output: Path, *, overwrite: bool = False) -> Iterator[Place]:
    """The place of a bundle, for this process alone until the block ends; what is left in its folder then stays.

    Enter it before long work: it finds out at once whether the output can be written. A symbolic link is followed, and
    an empty folder taken. What a process that was killed has left is brought in order first.

    Raises:
        BundleError: The output exists (and is neither empty nor a bundle to overwrite), cannot be written, or is being
            written by another process.
    """
    from safetensors import SafetensorError  # of a full disk; it is no OSError

    made: list[Path] = []
    try:
        target = Path(os.path.realpath(absolute(output)))
        place = Place(target=target, folder=target.parent / f".{target.name}.building")
        if not place.folder.exists():
            _check_free(target, output, overwrite)
        made = [folder for folder in place.folder.parents if not folder.exists()]
        with _locked(place.folder, output):
            place.recover()
            _check_free(target, output, overwrite)
            yield place
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BundleError(f"output '{output}' cannot be written: {reason}") from error
    finally:
        for folder in made:  # for nothing but the bundle; what holds it by now stays
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def staging(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``output`` that becomes ``output`` if the block ends well, and vanishes if it does not.

    Raises:
        BundleError: As of `claimed`.
    """
    with claimed(output, overwrite=overwrite) as place:
        partial = place.folder / _PARTIAL
        partial.mkdir()
        try:
            yield partial
            place.take(partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Make a folder and hold its lock; a folder that holds nothing else in the end is removed.

    Raises:
        BundleError: Another process holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BundleError(
            f"output '{output}' is being written by another process: wait for it, or choose another name"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # the share may be gone
            if {path.name for path in folder.iterdir()} <= {_LOCK}:
                shutil.rmtree(folder)
        lock.release()


def exchange(one: Path, other: Path) -> bool:
    """Have two folders swap their names at once, so that neither is ever missing; whether the system could."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _check_free(target: Path, named: Path, overwrite: bool) -> None:
    """Raises BundleError unless a bundle may take this place."""
    if not os.path.lexists(target):
        return
    bundle = os.path.isfile(target / MANIFEST)
    if not bundle and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"output '{named}' exists already and is not a cemq bundle: choose another name")
    if bundle and not overwrite:
        raise BundleError(f"output '{named}' exists already: choose another name, or pass --overwrite")
    if target.is_mount() or target in (Path.cwd(), *Path.cwd().parents):
        raise BundleError(f"output '{named}' cannot be replaced as a whole: name a new folder in it or beside it")
