"""What runs take, counted where it is spent: in the blocks of `make_dit`, which skipped steps do not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention import BasicTransformerBlock

BLOCKS, BRANCHES = 2, 2  # both branches of guidance are rows of one call


@contextmanager
def counted(steps: int) -> Iterator[Callable[[], float]]:
    """Full generations of one sample."""
    with counted_rows() as rows:
        yield lambda: rows() / (BLOCKS * BRANCHES * steps)


@contextmanager
def counted_rows() -> Iterator[Callable[[], int]]:
    """Rows that every block of every transformer is called with."""
    rows = []

    def note(module, args):
        if isinstance(module, BasicTransformerBlock):
            rows.append(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield lambda: sum(rows)
    finally:
        handle.remove()
