"""The share of the package's public names whose types a type checker knows: ``python tests/type_completeness.py``.

Fails below `LEAST`, and says which names those are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEAST = 0.95


def judged(report: dict[str, Any], least: float = LEAST) -> tuple[str, bool]:
    """What is to be said of a report of ``basedpyright --verifytypes``, and whether it is good enough."""
    found = report["typeCompleteness"]
    share, counts = found["completenessScore"], found["exportedSymbolCounts"]
    if not sum(counts.values()):
        return "no public names found: is cemq/py.typed there?", False
    unknown = [each["name"] for each in found["symbols"] if each["isExported"] and not each["isTypeKnown"]]
    said = f"types of {counts['withKnownType']} of {sum(counts.values())} public names are known: {share:.1%}"
    return "\n".join([*(f"not wholly known: {name}" for name in unknown), said]), share >= least


def main() -> None:
    """Ask about the package in this repository, not another that may be installed."""
    command = [Path(sys.executable).with_name("basedpyright"), "--verifytypes", "cemq", "--ignoreexternal"]
    done = subprocess.run(
        [*command, "--outputjson", "--pythonpath", sys.executable],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"basedpyright gave no report: {done.stderr or done.stdout}") from None
    said, enough = judged(report)
    print(said)
    if not enough:
        raise SystemExit(f"at least {LEAST:.0%} must be")


if __name__ == "__main__":
    main()
