"""What a type checker finds wrong in the package, and how many public names have types:
``python tests/types_check.py``.

Fails where it finds anything under ``[tool.basedpyright]`` of pyproject.toml, and where the share of public names whose
types are known is below `LEAST`; says which names those are not.
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


def faults(report: dict[str, Any], root: Path = ROOT) -> tuple[str, bool]:
    """What is to be said of a report of ``basedpyright``, and whether it is good enough."""
    found = [each for each in report["generalDiagnostics"] if each["severity"] != "information"]
    said = [
        f"{Path(each['file']).relative_to(root)}:{each['range']['start']['line'] + 1}: {each['message']} "
        f"({each.get('rule', each['severity'])})"
        for each in found
    ]
    files = report["summary"]["filesAnalyzed"]
    return "\n".join([*said, f"{len(found)} type errors in {files} files"]), not found and files > 0


def judged(report: dict[str, Any], least: float = LEAST) -> tuple[str, bool]:
    """What is to be said of a report of ``basedpyright --verifytypes``, and whether it is good enough."""
    found = report["typeCompleteness"]
    share, counts = found["completenessScore"], found["exportedSymbolCounts"]
    if not sum(counts.values()):
        return "no public names found: is cemq/py.typed there?", False
    unknown = [each["name"] for each in found["symbols"] if each["isExported"] and not each["isTypeKnown"]]
    said = f"types of {counts['withKnownType']} of {sum(counts.values())} public names are known: {share:.1%}"
    return "\n".join([*(f"not wholly known: {name}" for name in unknown), said]), share >= least


def asked(*options: str) -> dict[str, Any]:
    """The report on the package in this repository, not on another that may be installed."""
    command = [Path(sys.executable).with_name("basedpyright"), "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"basedpyright gave no report: {done.stderr or done.stdout}") from None


def main() -> None:
    said, clean = faults(asked())
    print(said, flush=True)
    share, enough = judged(asked("--verifytypes", "cemq", "--ignoreexternal"))
    print(share)
    if not clean:
        raise SystemExit("there must be none")
    if not enough:
        raise SystemExit(f"at least {LEAST:.0%} must be")


if __name__ == "__main__":
    main()
