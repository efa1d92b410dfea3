"""The page of a record of gpu.py, drawn from the record alone, a function for each part.

``python docs/benchmarks/gpu_page.py RECORD.json`` draws it anew, beside the record.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cemq.memory.placement import GIB

Row = Mapping[str, Any]

# Dense rates by the vendors' data sheets, in 10^12 a second for bfloat16 and int8, and bytes a second of the memory;
# the first name that a device's name contains. float32 sums, which GeForce cards halve.
ROOFS = {
    "H200": (989, 1979, 4.8e12),
    "H100 PCIe": (756, 1513, 2.0e12),
    "H100": (989, 1979, 3.35e12),
    "A100": (312, 624, 2.04e12),
    "L40S": (362, 733, 0.864e12),
    "L4": (121, 242, 0.3e12),
    "RTX 4090": (165, 661, 1.01e12),
    "RTX 3090": (71, 284, 0.936e12),
}


def roofs(record: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """(bfloat16, int8, memory) of the device, in operations and bytes a second."""
    machine = described(record)
    device = machine["cuda"][0]["name"] if machine and machine["cuda"] else ""
    found = next((rates for name, rates in ROOFS.items() if name in device), None)
    return None if found is None else (1e12 * found[0], 1e12 * found[1], found[2])


def described(record: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((row["machine"] for row in rows_of(record, "machine") if "machine" in row), None)


def rows_of(record: Mapping[str, Any], part: str) -> list[Row]:
    return record["parts"].get(part, {}).get("rows", [])


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def draw(record: Mapping[str, Any]) -> str:
    machine = described(record)
    parts = [
        "# On a GPU",
        "`python docs/benchmarks/gpu.py"
        + (" --tiny`: toys, tried on whatever was there; **the figures mean nothing**." if record["tiny"] else "`.")
        + (f" {machine['date'][:10]}, {machine['line']}, Triton {machine['libraries'].get('triton', 'none')}."
           if machine else ""),
        "All weights are random. A part that was stopped or a case that failed says so.",
    ]  # fmt: skip
    for name, section in SECTIONS.items():
        part = record["parts"].get(name)
        if part is None:
            continue
        parts.append(f"## {name.capitalize()}")
        notes = [f"{part['date'][:16].replace('T', ' ')} UTC, {part.get('seconds', 0):.0f} s."]
        if "failed" in part:
            notes.append(f"**Failed: {part['failed']}**")
        if "stopped" in part:
            stopped = part["stopped"]
            notes.append(f"**Stopped after its {stopped['after_seconds']} s, at {described_by(stopped['at'])}.**")
        parts.append(" ".join(notes))
        parts.append(section(record, [row for row in part["rows"] if "failed" not in row]))
        if failed := [row for row in part["rows"] if "failed" in row]:
            parts.append(table(["failed", "why"], ((described_by(row), row["failed"]) for row in failed)))
    return "\n\n".join(filter(None, parts)) + "\n"


def described_by(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items() if key != "failed")


def machine_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    found, lines = roofs(record), []
    by_sheet = dict(zip(("bfloat16 product", "int8 product", "copy on the device"), found or (), strict=False))
    for row in rows:
        rate = row.get("bytes_per_second") or 1e12 * row.get("tera_per_second", 0)
        if rate:
            sheet = by_sheet.get(row["what"])
            lines.append((row["what"], rate / 1e12, sheet and sheet / 1e12, sheet and rate / sheet, row.get("sm_mhz")))
    return table(["", "10^12 a second", "data sheet", "share", "MHz"], lines)


def correctness_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    checks = [row for row in rows if "right" in row]
    wrong = [row for row in checks if not row["right"]]
    kinds: dict[str, list[Row]] = {}
    for row in checks:
        kinds.setdefault(row["what"], []).append(row)
    lines = []
    for what, found in kinds.items():
        worst = max((row["worst"] for row in found if "worst" in row), default=None)
        lines.append((what, len(found), sum(row["right"] for row in found), worst))
    summary = table(["what", "checked", "right", "worst"], lines)
    skipped = sum("skipped" in row for row in rows)
    ending = next((f"pytest: {row['ending']}." for row in rows if "ending" in row), "")
    said = f"{ending} {skipped} tests were skipped." if skipped else ending
    why = [(described_by({k: v for k, v in row.items() if k not in ("right", "why")}), row.get("why")) for row in wrong]
    return "\n\n".join(filter(None, [summary, said, table(["wrong", "why"], why) if wrong else ""]))


def steps_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    """Ratios are to compiled bfloat16, or to eager where that is missing."""
    found, rates = {}, roofs(record)
    for row in rows:
        key = row["model"], row["scheme"], row["compiled"]
        found.setdefault(key, {})[row["what"] if row["what"] != "block" else row["block"]] = row
    blocks, steps = [], []
    for (model, scheme, compiled), parts in found.items():
        how = "compiled" if compiled else "eager"
        first = parts.get("first step", {}).get("seconds")
        for what, row in parts.items():
            if what == "first step":
                continue
            exact = [found.get((model, "bfloat16", way), {}) for way in (True, False)]
            base = next((each[what]["ms"] for each in exact if what in each), None)
            line = [model, scheme, how, row["ms"], base and row["ms"] / base]
            if what != "step":
                blocks.append([*line[:1], what, *line[1:]])
                continue
            counted = exact[1].get("step", {})
            share = None
            if rates and "linear_flops" in counted:
                linear = counted["linear_flops"] / (rates[0] if scheme == "bfloat16" else rates[1])
                share = 1e3 * (linear + counted["attention_flops"] / rates[0]) / row["ms"]
            steps.append([*line, share, row["relative_l2"], gib(row.get("peak_bytes")), first, row.get("sm_mhz")])
    return "\n\n".join([
        "`time` is against compiled bfloat16 (eager, where that is missing); `roof` the time that the data sheet's "
        "rates would allow, as a share of the time taken: linear layers in int8 (bfloat16 for bfloat16), attention in "
        "bfloat16; `first` the seconds of the first step, in which kernels are compiled and tuned.",
        table(["model", "scheme", "", "step, ms", "time", "roof", "error", "peak, GiB", "first, s", "MHz"], steps),
        table(["model", "block", "scheme", "", "ms", "time"], blocks),
    ])  # fmt: skip


def linears_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    rates, found = roofs(record), {}
    for row in rows:
        found.setdefault((row["layer"], row["kernel"]), {}).update(row)
    lines = []
    for (layer, kernel), row in sorted(found.items()):
        base = found.get((layer, "bfloat16"), {})
        alone = row.get("graph_ms") or row["ms"]
        operations = 2 * row["rows"] * row["in"] * row["out"]
        moved = 2 * row["rows"] * (row["in"] + row["out"]) + row["in"] * row["out"] * (0.5 if "w4" in kernel else 1)
        share = memory = None
        if rates and "tokens" not in kernel:
            share = 1e3 * operations / rates[0 if kernel == "bfloat16" else 1] / alone
            memory = 1e3 * moved / rates[2] / alone
        shape = f"{row['rows']} x {row['in']} x {row['out']}"
        name = f"{kernel}: {row['chosen']}" if "chosen" in row else kernel
        lines.append((
            f"{layer}, {shape}", name, row["ms"], row.get("graph_ms"),
            alone / (base.get("graph_ms") or base["ms"]) if "ms" in base else None, share, memory, row["relative_l2"],
        ))  # fmt: skip
    return "\n\n".join([
        "`graph` is what the device takes without the host; `time` is that against bfloat16; `int8 roof` and `memory "
        "roof` are what the data sheet would allow, as shares of it.",
        table(["layer", "kernel", "ms", "graph, ms", "time", "int8 roof", "memory roof", "error"], lines),
    ])  # fmt: skip


def skipping_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    runs = [row for row in rows if "loop_seconds" in row]
    lines, every = [], next((row for row in runs if row["full_steps"] == row["steps"]), None)
    for row in runs:
        ideal = every and (row["full_steps"] - 1) / (row["steps"] - 1)  # the loop is timed from the end of the first
        ratio = every and row["loop_seconds"] / every["loop_seconds"]
        lines.append((
            f"{row['full_steps']} of {row['steps']}", row["loop_seconds"], ratio, ideal, ideal and ideal / ratio,
            row["full_step_seconds"], row.get("skipped_step_seconds"), row.get("skipped_step_host_microseconds"),
        ))  # fmt: skip
    head = ["full steps", "loop, s", "ratio", "ideal", "ideal/ratio", "full step, s", "skipped step, s", "host, us"]
    return table(head, lines)


def vram_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["limit"], {}).update(row)
    lines = (
        (
            gib(limit), row["placement"], gib(row["planned_bytes"]), gib(row.get("peak_bytes")),
            gib(row.get("peak_reserved_bytes")), row["loading_seconds"], row.get("full_step_seconds"),
            row.get("skipped_step_seconds"), gib(row.get("moved_bytes")), row.get("moved_on_skipped_bytes"),
            row.get("picture"),
        )
        for limit, row in sorted(found.items())
    )  # fmt: skip
    head = ["GiB", "placement", "planned", "peak", "reserved", "loading, s", "full step, s", "skipped step, s",
            "moved, GiB", "moved on skipped, bytes", "picture"]  # fmt: skip
    return table(head, lines)


def rounding_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    lines = ((r["block"], r["scheme"], r["how"], r["layers"], r["parameters"] / 1e6, r["seconds"], r["hessian_seconds"])
             for r in rows)  # fmt: skip
    return table(["block", "scheme", "how", "layers", "million weights", "seconds", "Hessians, s"], lines)


def building_section(record: Mapping[str, Any], rows: list[Row]) -> str:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["device"], {}).update(row)
    lines = ((device, row["seconds"], f"{len(row['full_steps'])} of {row['steps']}", row.get("psnr_db"))
             for device, row in found.items())  # fmt: skip
    return table(["device", "build, s", "full steps", "PSNR, dB"], lines)


SECTIONS: dict[str, Callable[[Mapping[str, Any], list[Row]], str]] = {
    "machine": machine_section,
    "correctness": correctness_section,
    "steps": steps_section,
    "linears": linears_section,
    "skipping": skipping_section,
    "vram": vram_section,
    "rounding": rounding_section,
    "building": building_section,
}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".md").write_text(draw(json.loads(path.read_text())))
