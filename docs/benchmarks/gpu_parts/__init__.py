"""What `gpu.py` measures: a module for each part, with one function ``cases`` that lists what it tries, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a part runs.

    Args:
        tiny: Sizes that a CPU gets through in seconds; the figures then mean nothing.
        scratch: A folder that all parts share and that is gone afterwards.
    """

    device: torch.device
    tiny: bool
    scratch: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to try. What it yields is written down at once, so that a crash costs no more than what follows it.

    Args:
        labels: What every row of it begins with, and the row of its failure, too.
    """

    labels: dict[str, Any]
    measure: Callable[[], Rows]
