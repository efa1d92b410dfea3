"""Time of one forward, full precision against every scheme: ``python docs/benchmarks/speed.py``.

A 74 M DiT (12 heads x 64, 6 layers, 512 tokens) with random weights, bfloat16, as `cemq bench --arch dit-small` times
it: eager, compiled, in float32, and beside other backends. In a run the variants take turns, and there are five runs,
to see how far ratios repeat. Writes speed.md and speed.json beside itself; ``--only`` measures some kinds anew, and
what was measured on CPUs that can do other things (VNNI, AVX-512) stays. Some 15 minutes on 2 CPU cores of one's own.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cemq.bench import bench_architecture
from cemq.bench.machine import describe_machine, one_line
from cemq.quantize import installed

OTHERS = ("quanto:w8a8", "quanto:w4a8", "bitsandbytes:w8a8", "bitsandbytes:w4a16", "torchao:w8a8")
HERE = Path(__file__).with_suffix("")
KINDS = EAGER, COMPILED, FLOAT32, ALL = "Eager", "Compiled", "Eager, float32", "Eager, all backends"


def able(machine: dict[str, Any]) -> str:
    """What decides how fast integers are."""
    return ", ".join(machine["features"]) or "neither VNNI nor AVX-512"


def table(runs: list[dict[str, Any]]) -> str:
    """What the runs of one kind say, a row a variant."""
    lines = [
        "| variant | time / full precision's | ms | bytes | bytes / full precision's | error |",
        "|---|---|---|---|---|---|",
    ]
    for rows in zip(*(run["tables"][0]["rows"] for run in runs), strict=True):
        first, ratios = rows[0], [row["time_ratio"] for row in rows]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(rows) > 1 else ""
        milliseconds = np.median([row["median_ms"] for row in rows])
        lines.append(
            f"| {first['variant']} | {np.median(ratios):.2f}{spread} | {milliseconds:.1f} | "
            f"{first['weight_bytes'] / 1e6:.1f} MB | {first['bytes_ratio']:.3f} | {first['relative_l2']:.4f} |"
        )
    return "\n".join([*lines, *(f"\n{note}" for run in runs for note in run["notes"])])


def section(kinds: dict[str, list[dict[str, Any]]]) -> str:
    (first, *_), *_ = kinds.values()
    told = [(kind, kinds[kind]) for kind in KINDS if kind in kinds]
    tables = "\n\n".join(
        f"### {kind}: {len(runs)} run{'s' * (len(runs) > 1)} of {runs[0]['settings']['rounds']} rounds\n\n{table(runs)}"
        for kind, runs in told
    )
    machine = first["machine"]
    return f"## {able(machine)}\n\n{machine['date'][:10]}, {one_line(machine)}.\n\n{tables}"


def page(record: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    return f"""# Speed of one forward

Command: `python docs/benchmarks/speed.py`. In a run the variants took turns; milliseconds and ratios are of medians,
and of several runs there are the median, the least and the greatest. Full precision is bfloat16, and float32 where it
says so: a CPU without instructions for bfloat16 computes it several times slower than float32. The error is relative L2
of the output against a float32 model of the same random weights, rounded to nearest here. Integers are as fast as the
CPU's instructions for them are.

{(chr(10) * 2).join(map(section, record.values()))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="; ".join(KINDS))
    asked = parser.parse_args()
    others = [name for name in OTHERS if installed(name.partition(":")[0])]
    run = partial(bench_architecture, "dit-small", rounds=asked.rounds)
    stored = HERE.with_suffix(".json")
    record, here = json.loads(stored.read_text()) if stored.exists() else {}, able(describe_machine())
    variants = {
        EAGER: ({}, asked.runs),
        COMPILED: ({"compiled": True}, asked.runs),
        FLOAT32: ({"dtype": "float32"}, asked.runs),
        ALL: ({"schemes": ("w8a8", "w4a8", *others)}, 1),
    }
    for kind in asked.only:
        settings, runs = variants[kind]
        record.setdefault(here, {})[kind] = [run(**settings) for _ in range(runs)]
        stored.write_text(json.dumps(record, indent=1) + "\n")
        HERE.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
