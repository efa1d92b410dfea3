"""Bundles whose manifest says something else, with a checksum that fits: written so, not damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import MANIFEST


def resealed(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A bundle whose manifest went through ``edit``; its checksum is made as docs/bundle-format.md says."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["checksum"]
    edit(content)
    sealed = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(sealed.encode("ascii")).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder
