"""Whether the files of a bundle are what was written: their sizes, and their content once per machine.

A checksum takes reading the whole file, so a stamp in the user's cache folder remembers what the system said of each
file (size, times, inode, device) when its checksum was right. Only what it says something else of is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cemq.errors import InputError, choose
from cemq.files import cache_folder, sha256, written_whole

Verify = Literal["always", "once", "never"]
VERIFY: tuple[Verify, ...] = get_args(Verify)
Mark = list[int]  # size, mtime_ns, ctime_ns, inode, device: nobody sets ctime_ns back
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system (FAT's): two changes within one tick look alike
_MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what reading damaged JSON raises


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What cemq.json says of one file."""

    bytes: int
    sha256: str


def check_verify(verify: str | bool) -> Verify:
    """When to compare checksums; True and False, of before, stand for always and never.

    Raises:
        InputError: It is none of these.
    """
    named: dict[str | bool, str] = {True: "always", False: "never"}
    return choose("verify", named.get(verify, str(verify)), VERIFY)


def find_faults(
    folder: Path, files: Mapping[str, Listed], checksum: str, *, verify: Verify
) -> Iterator[tuple[str, str]]:
    """Name each file that is not as it is listed, with what is wrong and what to do; contents are compared last.

    Args:
        checksum: Of the manifest that lists them.
        verify: Compare the content of all (``always``), of those that no stamp vouches for (``once``), or of none.
    """
    whole = {}
    for name, listed in files.items():
        file = folder / name
        if not file.is_file():
            yield name, "is missing; write the bundle again"
        elif (size := file.stat().st_size) != listed.bytes:
            yield name, f"has {size} bytes instead of {listed.bytes}; copy or write the bundle again"
        else:
            whole[name] = listed.sha256
    if verify == "never":
        return
    known = _read_stamp(folder, checksum) if verify == "once" else {}
    marks = {}
    for name, digest in whole.items():
        try:
            mark, now = _mark(folder / name), time.time_ns()  # of before it is read: it may change meanwhile
            if known.get(name) == mark:
                marks[name] = mark
            elif sha256(folder / name) != digest:
                yield name, "was edited or damaged; copy or write the bundle again"
            elif max(mark[1:3]) + _SETTLED_NS < now:
                marks[name] = mark
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"
    if marks != known:
        _write_stamp(folder, checksum, marks)


def _mark(file: Path) -> Mark:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _stamp(folder: Path) -> Path:
    """Where the stamp of a folder lies: one, whatever bundles follow each other there."""
    key = hashlib.sha256(os.path.realpath(folder).encode(errors="surrogateescape")).hexdigest()[:24]
    return cache_folder() / "verified" / f"{key}.json"


def _read_stamp(folder: Path, checksum: str) -> dict[str, Mark]:
    """What the files of this bundle were when they were verified; nothing where no stamp can be read."""
    try:
        content = json.loads(_stamp(folder).read_text(encoding="utf-8"))
        return dict(content["files"]) if content["checksum"] == checksum else {}
    except (OSError, *_MALFORMED):
        return {}


def _write_stamp(folder: Path, checksum: str, marks: Mapping[str, Mark]) -> None:
    """Without one, where it cannot be written, the next load verifies again."""
    content = {"folder": os.path.realpath(folder), "checksum": checksum, "files": marks}
    with suppress(OSError, InputError):
        path = _stamp(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
