"""Which cases of a test every run tries; the others wait for ``--slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases as parameters of a test, a tuple for several; those that are not in ``quick`` are marked slow."""
    cases = list(cases)
    missing = [case for case in quick if case not in cases]
    assert not missing, f"no such cases: {missing}"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in quick else (pytest.mark.slow,) for case in cases]
    return [pytest.param(*each, marks=mark) for each, mark in zip(values, marks, strict=True)]
