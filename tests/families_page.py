"""Writes the table of docs/families.md: every family of pipelines against every promise, tried on tiny ones.

``python tests/families_page.py`` tries all of them, in about five minutes on one core; ``python
tests/families_page.py flux wan`` prints only these.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from support.checks import CHECKS, NotApplicableError, plain_run
from support.families import FAMILIES, STEPS, Family

from cemq.errors import CemqError
from cemq.pipelines.opening import denoisers

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- table, written by tests/families_page.py -->\n", "<!-- end of table -->\n"


def describe(family: Family) -> list[str]:
    """Pipeline, denoisers, calls a step and what it makes, as seen in a run."""
    pipe = family.pipeline()
    calls = []
    for _, denoiser in denoisers(pipe):
        denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    _, trajectory = plain_run(pipe, family)
    names = ", ".join(name for name, _ in denoisers(pipe))
    return [
        type(pipe).__name__,
        names,
        f"{len(calls) / trajectory.num_steps:g}",
        type(pipe.scheduler).__name__,
        family.kind,
    ]


def outcome(check: Any, family: Family) -> str:
    """``ok``, or why not, in words; never nothing."""
    try:
        return check(family) or "ok"
    except NotApplicableError as reason:
        return f"n-a: {reason}"
    except CemqError as reason:
        return f"refused: {reason}"
    except Exception as error:  # a failure belongs in the table, not in place of it
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def main(names: list[str]) -> None:
    """Try everything, then write the page, or print the rows of ``names``."""
    header = ["family", "pipeline", "denoiser", "calls a step", "sampler", "makes", *CHECKS]
    rows, failed = [], 0
    for name in names or FAMILIES:
        family, started = FAMILIES[name], time.perf_counter()
        cells = [outcome(check, family) for check in CHECKS.values()]
        failed += sum(cell.startswith("FAILED") for cell in cells)
        rows.append([name, *describe(family), *cells])
        print(f"{name}: {', '.join(cells)} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in (diffusers, transformers, torch))
    table = "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))
    if names:
        print(table, end="")
    else:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page[: page.index(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{before}{BEGIN}{table}\n{versions}, on a CPU, {STEPS} steps.\n{after}", encoding="utf-8")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    main(sys.argv[1:])
