"""Results to tables, for people."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from cemq.bench.doctor import NOT_TRIED, OK
from cemq.bench.machine import one_line, threads_text
from cemq.quantize.kernels import KERNELS

_PIPE_WIDTH = 120


def print_benchmark(result: dict[str, Any]) -> None:
    """The tables of a benchmark on stdout."""
    console = _console()
    console.print(one_line(result["machine"]), soft_wrap=True)
    for found in result["tables"]:
        console.print(f"\n{found['title']}", soft_wrap=True)
        first, *others = found["rows"]
        optional = [
            (title, key, form)
            for title, key, form in (("error", "relative_l2", ".4f"), ("peak MB", "peak_bytes", "MB"))
            if any(row[key] is not None for row in found["rows"])
        ]
        columns = [
            ("ms", "median_ms", ".2f"), ("min", "min_ms", ".2f"), ("time", "time_ratio", ".3f"),
            ("MB", "weight_bytes", "MB"), ("size", "bytes_ratio", ".3f"), *optional,
        ]  # fmt: skip
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("variant")
        for title, _, _ in columns:
            table.add_column(title, justify="right")
        for row in (first, *others):
            table.add_row(row["variant"], *(_shown(row[key], form) for _, key, form in columns))
        console.print(table)
        if others:
            console.print(f"time and size: as a share of {first['variant']}", soft_wrap=True)
    if chosen := [made["kernel"] for made in result["kernels"]]:
        console.print(f"kernels: {counted(chosen)}", soft_wrap=True)
    _print_notes(console, result["notes"])


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:,.1f}" if form == "MB" else format(value, form)


def print_doctor(result: dict[str, Any]) -> None:
    """Machine, matrix and the reasons of whatever is not ok, on stdout."""
    console = _console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(result["machine"]):
        facts.add_row(name, value)
    for what, names in result["known"].items():
        facts.add_row(what, ", ".join(names))
    for name, state in result["extensions"].items():
        facts.add_row("extension", f"{name}: {state}")
    console.print(facts)
    console.print()
    probes = next((list(row["probes"]) for row in result["rows"] if row["probes"]), [])
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("backend", "scheme", "on", "error", *probes):
        table.add_column(title, overflow="fold")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        name = " ".join(filter(None, (row["backend"], row["scheme"], row["device"])))
        for probe, cell in (*row["probes"].items(), *([("", row["reason"])] if row["reason"] else [])):
            if cell not in (OK, NOT_TRIED):
                reasons.setdefault((probe, cell), []).append(name)
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        cells = (cell if cell in (OK, NOT_TRIED) else "no" for cell in row["probes"].values())
        table.add_row(row["backend"], row["scheme"], row["device"], error, *cells)
    console.print(table)
    for (probe, reason), names in reasons.items():
        console.print(": ".join(filter(None, (", ".join(names), probe, reason))), soft_wrap=True)
    _print_kernels(console, result)
    _print_notes(console, result["notes"])


def _print_kernels(console: Console, result: dict[str, Any]) -> None:
    """What multiplies integers here, why others do not, and what was chosen for the shapes that were met."""
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("kernel", "on", "weights", "tokens", "ms"):
        table.add_column(title, justify="right" if title == "ms" else "left")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result["kernels"]:
        if row["state"] not in (OK, NOT_TRIED):
            named = row["kernel"] if row["bits"] is None else f"{row['kernel']} int{row['bits']}"
            reasons.setdefault((named, row["state"]), []).append(row["device"])
            continue
        tokens = "symmetric" if KERNELS[row["kernel"]].symmetric else "asymmetric"
        table.add_row(row["kernel"], row["device"], f"int{row['bits']}", tokens, _shown(row["ms"], ".3f"))
    console.print(table)
    for (name, reason), devices in reasons.items():
        console.print(f"kernel {name} on {', '.join(devices)}: {reason}", soft_wrap=True)
    for device, chosen in result["choices"].items():
        if chosen:
            console.print(f"chosen on {device}: {counted(chosen.values())}", soft_wrap=True)


def counted(kernels: Iterable[str]) -> str:
    """How many shapes each kernel computes, such as ``triton for 12 shapes``."""
    found = Counter(kernels).most_common()
    return ", ".join(f"{name} for {count} shape{'s'[: count != 1]}" for name, count in found)


def _print_notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)


def _console() -> Console:
    """Of the terminal's width; in a pipe, wide enough for every table."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def _facts(machine: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "system", machine["system"]
    yield "CPU", f"{machine['cpu']}, {machine['cores']} cores, {threads_text(machine)}"
    yield "features", ", ".join(machine["features"]) or "none that speed up int8 or bfloat16"
    yield "int8 product", machine["int8_product"]
    yield "C kernels", machine["c_kernels"]
    yield "torch.compile", machine["compile_on_cpu"]
    for device in machine["cuda"]:
        yield "CUDA", f"{device['name']}, capability {device['capability']}, {device['bytes'] / 1e9:.1f} GB"
    if not machine["cuda"]:
        yield "CUDA", "none"
    yield "libraries", ", ".join(f"{name} {found}" for name, found in machine["libraries"].items())
