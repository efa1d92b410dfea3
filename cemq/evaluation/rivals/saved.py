"""What `cemq compare --json` printed, read again and held against the bundle that it is to be shown beside."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import Manifest
from cemq.errors import InputError, first_line
from cemq.evaluation.rivals.comparison import Comparison, name_of_original, name_of_scheme
from cemq.evaluation.rivals.contest import Row
from cemq.files import absolute

_MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # what reading other JSON raises


def read_comparison(path: str | Path, manifest: Manifest) -> Comparison:
    """The comparison in a file, with the rows that are of a bundle's scheme alone.

    Raises:
        InputError: It cannot be read, is none, or is of another model, step count or scheme than the bundle.
    """
    try:
        content = json.loads(absolute(path).read_text(encoding="utf-8"))
        found = Comparison(**content | {"rows": tuple(_row(each) for each in content["rows"])})
    except OSError as error:
        raise InputError(f"comparison '{path}' cannot be read: {error.strerror}") from None
    except _MALFORMED as error:
        raise InputError(f"comparison '{path}' is not what cemq compare --json prints: {first_line(error)}") from None
    scheme = name_of_scheme(manifest.scheme, manifest.backend)
    for what, theirs, ours in (
        ("model", found.original, name_of_original(manifest)),
        ("step count", found.num_steps, manifest.schedule.num_steps),
    ):
        if theirs != ours:
            raise InputError(f"comparison '{path}' is of {what} {theirs}, this bundle of {ours}: compare on the bundle")
    kept = [row for row in found.rows if row.scheme == scheme]
    if not kept:
        others = ", ".join(sorted({row.scheme for row in found.rows})) or "none"
        raise InputError(f"comparison '{path}' is of scheme {others}, this bundle of {scheme}: compare on the bundle")
    return replace(found, rows=tuple(kept))


def _row(fields: dict[str, Any]) -> Row:
    """Raises TypeError or ValueError for what is none."""
    row = Row(**fields)
    if not all(isinstance(text, str) for text in (row.method, row.source, row.scheme, row.status)):
        raise TypeError("a row whose names are no texts")
    if row.status != "ok":
        return row
    compute, wall, *levels = row.figures
    if not all(math.isfinite(ratio) and ratio > 0 for ratio in (row.target, compute, wall)):
        raise ValueError(f"ratios of {row.method} that are no positive numbers")
    if len(levels) != 3 or not all(map(math.isfinite, levels)):
        raise ValueError(f"levels of {row.method} that are no numbers")
    return row
