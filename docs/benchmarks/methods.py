"""Every caching method beside plans, at equal compute, on the built-in models: ``python docs/benchmarks/methods.py``.

Calls `cemq.compare`, as ``cemq compare`` does, for each model and scheme, and writes methods.md, methods.png and
methods.json beside itself, and what each method gave into ``docs/methods.md``. ``--models`` and ``--schemes`` measure
some of it anew and keep the rest; ``--page`` only writes the pages. About 20 minutes of a CPU core for each model and
scheme (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

import cemq
from cemq.bench.machine import describe_machine, one_line
from cemq.evaluation.rivals.comparison import RATIOS
from cemq.evaluation.rivals.contest import FULL, Row
from cemq.evaluation.rivals.methods import METHODS
from cemq.evaluation.rivals.plot import draw

MODELS, SCHEMES = ("dit-digits", "sd3-digits", "emoji", "moving-digits"), ("none", "w8a8", "w4a8")
ALL_RATIOS = (*RATIOS, "7.1x")  # the last is 7 of 50 steps
HERE = Path(__file__).with_suffix("")
METHODS_PAGE = HERE.parent.parent / "methods.md"
BEGIN, END = "<!-- figures: written by python docs/benchmarks/methods.py --page -->", "<!-- end of figures -->"
TOLD = 3.3  # the compute ratio of the table over all models


def measure(model: str, scheme: str, samples: int, names: list[str] | None) -> list[dict[str, Any]]:
    started = time.time()

    def say(stage: str, share: float) -> None:
        print(f"{model} {scheme}: {stage} {share:.0%} after {(time.time() - started) / 60:.1f} minutes", flush=True)

    asked = {"schemes": [scheme], "ratios": ALL_RATIOS, "methods": names}
    found = cemq.compare(f"builtin:{model}", samples=samples, device="cpu", progress=say, **asked)
    return [{"model": model} | row for row in found.to_dict()["rows"]]


def row_of(row: dict[str, Any]) -> Row:
    return Row(**{key: value for key, value in row.items() if key != "model"})


def table(rows: list[dict[str, Any]], model: str, scheme: str) -> list[str]:
    """A method a line, the best at the middle ratio first; beside each mean the fifth percentile and the worst, and of
    videos what the differences between frames have."""
    own = [row for row in rows if (row["model"], row["scheme"]) == (model, scheme)]
    full = next(row for row in own if row["method"] == FULL)
    targets = sorted({row["target"] for row in own} - {1.0})
    told = "p5, worst, frame differences" if full.get("change_psnr_db") else "p5, worst"
    lines = [
        f"### {model}, {scheme}",
        "",
        f"Every step computed: {full['psnr_db']:.1f} dB.",
        "",
        "| method | " + " | ".join(f"{target:g}x: compute, dB ({told})" for target in targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]

    def found(name: str, target: float) -> dict[str, Any] | None:
        return next((row for row in own if (row["method"], row["target"]) == (name, target)), None)

    def level(name: str) -> float:
        row = found(name, targets[len(targets) // 2])
        return row["psnr_db"] if row and row["status"] == "ok" else -1.0

    for name in sorted({row["method"] for row in own} - {FULL}, key=lambda name: (-level(name), name)):
        cells = []
        for target in targets:
            row = found(name, target)
            if row is None or row["status"] != "ok":
                cells.append("fails" if row else "-")
                continue
            beside = (row[key] for key in ("p5_db", "worst_db", "change_psnr_db") if row.get(key) is not None)
            figures = ", ".join(f"{each:.1f}" for each in beside)
            cell = f"{row['compute_ratio']:.2f}x, {row['psnr_db']:.1f} ({figures})"
            cells.append(cell if row_of(row).is_near else f"*{cell}*")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """For every cell, what the plan has over the best of the others that are nearest to the same compute."""
    gains = []
    lines = ["| model | scheme | compute | cemq | best other | method | difference |", "|---|---|---|---|---|---|---|"]
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        for row in rows:
            if (row["model"], row["scheme"], row["method"]) != (model, scheme, "cemq"):
                continue
            others = [
                other
                for other in rows
                if (other["model"], other["scheme"], other["target"]) == (model, scheme, row["target"])
                and other["status"] == "ok"
                and row_of(other).is_near
                and not other["method"].startswith("cemq")
            ]
            if not others:
                continue
            best = max(others, key=lambda other: other["psnr_db"])
            gains.append(gain := row["psnr_db"] - best["psnr_db"])
            lines.append(
                f"| {model} | {scheme} | {row['compute_ratio']:.2f}x | {row['psnr_db']:.1f} | {best['psnr_db']:.1f} at "
                f"{best['compute_ratio']:.2f}x | {best['method']} | {gain:+.1f} |"
            )
    if not gains:
        return ["No plan was measured beside others."]
    ahead = sum(gain > 0 for gain in gains)
    span = f"{min(gains):+.1f} to {max(gains):+.1f} dB"
    said = f"The plan is first in {ahead} of {len(gains)} cells; the differences are {span}."
    return [said, "", *lines]


def summary(rows: list[dict[str, Any]]) -> str:
    """A method a line: what it is above the plan at `TOLD` times less compute, mean over models and the range."""
    at = [row for row in rows if row["target"] == TOLD and row["status"] == "ok"]
    plans = {(row["model"], row["scheme"]): row["psnr_db"] for row in at if row["method"] == "cemq"}
    apart: dict[str, dict[str, list[float]]] = {}
    for row in at:
        if row_of(row).is_near and not row["method"].startswith("cemq"):
            found = apart.setdefault(row["method"], {scheme: [] for scheme in SCHEMES})
            found[row["scheme"]].append(row["psnr_db"] - plans[row["model"], row["scheme"]])

    def cell(gains: list[float]) -> str:
        if not gains:
            return "-"
        span = f" ({min(gains):+.1f} to {max(gains):+.1f}, {len(gains)} models)" if len(gains) > 1 else ""
        return f"{np.mean(gains):+.1f}{span}"

    names = sorted(apart, key=lambda name: (-np.mean(apart[name]["none"] or [-99.0]), name))
    lines = ["| method | full precision | W8A8 | W4A8 |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {' | '.join(map(cell, apart[name].values()))} |" for name in names)])


def counted(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many methods were run, by kind of model: each row of full compute is of one."""
    schemes = {"full precision": ("none",), "quantized models": ("w8a8", "w4a8")}
    found = {
        kind: {row["method"] for row in rows if row["scheme"] in names} - {FULL} for kind, names in schemes.items()
    }
    return {kind: len(methods) for kind, methods in found.items() if methods}


def page(record: dict[str, Any]) -> str:
    rows, samples = record["rows"], record["samples"]
    failed = {
        (row["method"], row["model"]): row["status"] for row in rows if row["status"] != "ok" and row["target"] > 1
    }
    told = ", ".join(f"{count} methods on {kind}" for kind, count in counted(rows).items())
    lines = [
        "# Every method at equal compute",
        "",
        f"{record['machine']['date'][:10]}, {one_line(record['machine'])}.",
        "Command: `python docs/benchmarks/methods.py`, which is `cemq compare builtin:MODEL --schemes SCHEME --samples "
        f"{samples}`, for every",
        f"model and scheme: {told}. {samples} samples with seeds from 1000000 on that nothing was",
        "fitted to or planned on, 50 steps.",
        "PSNR to full precision at 50 of 50 steps, same seeds: mean, fifth percentile, worst. Compute is counted in",
        "multiply-accumulates of the denoiser's layers, for all alike. Thresholds and intervals were set on other",
        "samples; what computes over 5 % more than the column asks for, because it cannot compute less or no setting",
        "comes nearer, is in italics. What is in no table was not measured (`--methods` and `--schemes` choose).",
        "What each method is: [published methods](../methods.md).",
        "",
        "![PSNR over compute ratio](methods.png)",
        "",
        "## The plan against the best of all others",
        "",
        "The best other is chosen with hindsight on the samples that are told, out of all that are nearest to the same",
        "compute ratio.",
        "",
        *verdict(rows),
        "",
        "## All of them",
        "",
    ]
    for model, scheme in itertools.product(MODELS, SCHEMES):
        if any((row["model"], row["scheme"]) == (model, scheme) for row in rows):
            lines += table(rows, model, scheme)
    if failed:
        lines += ["## What failed", ""]
        lines += [f"* {name} on {model}: {status}" for (name, model), status in failed.items()]
        lines.append("")
    return "\n".join(lines)


def write(record: dict[str, Any]) -> None:
    order = [*itertools.product(MODELS, SCHEMES)]
    record["rows"].sort(key=lambda row: order.index((row["model"], row["scheme"])))
    HERE.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(page(record))
    figures = re.compile(rf"(?<={re.escape(BEGIN)}\n).*?(?={END})", re.DOTALL)
    METHODS_PAGE.write_text(figures.sub(f"\n{summary(record['rows'])}\n\n", METHODS_PAGE.read_text()))
    drawn = tuple(
        Row(
            **{key: value for key, value in row.items() if key != "model"}
            | {"scheme": f"{row['model']}, {row['scheme']}"}
        )
        for row in record["rows"]
    )
    draw(drawn, HERE.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], help="Others keep the rows they have.")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    path = HERE.with_suffix(".json")
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    for model, scheme in itertools.product(asked.models, asked.schemes) if not asked.page else ():
        rows = measure(model, scheme, asked.samples, asked.methods)
        anew = {(row["model"], row["scheme"], row["method"]) for row in rows}
        kept = [row for row in record["rows"] if (row["model"], row["scheme"], row["method"]) not in anew]
        record |= {"rows": kept + rows, "samples": asked.samples, "machine": describe_machine()}
        path.write_text(json.dumps(record, indent=1) + "\n")
    write(record)


if __name__ == "__main__":
    main()
