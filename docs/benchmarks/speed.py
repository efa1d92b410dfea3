"""Time of one forward, full precision against every scheme: ``python docs/benchmarks/speed.py``.

A 74 M DiT (12 heads x 64, 6 layers, 512 tokens) with random weights, bfloat16, as `cemq bench --arch dit-small` times
it: eager, then compiled. Writes speed.md and speed.json beside itself. About 4 minutes on 2 CPU cores of one's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cemq.bench import bench_architecture
from cemq.bench.machine import one_line
from cemq.quantize import installed

OTHERS = ("quanto:w8a8", "quanto:w4a8", "bitsandbytes:w8a8", "bitsandbytes:w4a16", "torchao:w8a8")


def table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = ["" if value is None else value if isinstance(value, str) else f"{value:.4g}" for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    others = [name for name in OTHERS if installed(name.partition(":")[0])]
    runs = {
        "Eager, native": bench_architecture("dit-small", rounds=rounds),
        "Compiled, native": bench_architecture("dit-small", rounds=rounds, compiled=True),
        "Eager, all backends": bench_architecture("dit-small", schemes=("w8a8", "w4a8", *others), rounds=rounds),
    }
    here = Path(__file__).with_suffix("")
    here.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    machine = runs["Eager, native"]["machine"]
    parts = [
        f"## {title}\n\n" + "\n\n".join(table(part["rows"]) for part in run["tables"]) + notes(run)
        for title, run in runs.items()
    ]
    here.with_suffix(".md").write_text(
        f"""# Speed of one forward

{machine["date"][:10]}, {one_line(machine)}; {", ".join(machine["features"])}.
Command: `python docs/benchmarks/speed.py`. Every table is one run in which the variants took turns; medians of {rounds}
rounds, in milliseconds. `time_ratio` and `bytes_ratio` are against full precision (bfloat16) of the same table; the
error is relative L2 of the output against a float32 model of the same random weights, rounded to nearest here.

"""
        + "\n\n".join(parts)
        + "\n"
    )


def notes(run: dict[str, Any]) -> str:
    return "".join(f"\n\n{note}" for note in run["notes"])


if __name__ == "__main__":
    main()
