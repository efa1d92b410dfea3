"""A bundle held against its checksums, all of it, whatever was verified before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import find_all_faults, read_listing
from cemq.errors import BundleError


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the files of a bundle come to, and what is wrong with those that are not as they were written, by name."""

    bundle: str
    files: int
    bytes: int
    faults: dict[str, str]

    def check(self) -> None:
        """Raises BundleError unless every file is as it was written."""
        if self.faults:
            raise BundleError(
                f"bundle '{self.bundle}': files damaged, missing or not its own: {len(self.faults)}, "
                f"of {self.files} listed"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"bundle": self.bundle, "files": self.files, "bytes": self.bytes, "faults": self.faults}


def verify(bundle: str | Path) -> Verification:
    """Read every file of a bundle and compare it with what cemq.json says of it.

    Raises:
        BundleError: There is no bundle, or its cemq.json itself is damaged.
    """
    folder = Path(bundle)
    listing = read_listing(folder)
    return Verification(
        bundle=str(bundle),
        files=len(listing.files),
        bytes=sum(listed.bytes for listed in listing.files.values()),
        faults=dict(find_all_faults(folder, listing, verify="always")),
    )
