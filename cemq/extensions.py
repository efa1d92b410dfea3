"""What others add to cemq, without a change of it: predictors, policies, metrics, number formats, kernels.

A package names a module under the entry point group ``cemq.extensions``; importing that module registers what is in it.
"""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import entry_points

from cemq.errors import first_line

GROUP = "cemq.extensions"


@functools.cache
def load_extensions() -> dict[str, str]:
    """Import every installed extension, once; by name "ok", or why it could not be, which is warned of too."""
    found = {}
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever a module of somebody else's raises
            found[entry.name] = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"cemq: extension {entry.name} cannot be loaded: {found[entry.name]}", stacklevel=2)
        else:
            found[entry.name] = "ok"
    return found
