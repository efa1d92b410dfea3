"""planning.md, drawn from planning.json: a function for each table."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from cemq.bench.machine import one_line
from cemq.prior.error_prior import VIEWS
from cemq.search.explore import PUBLISHED

MODELS = ("dit-digits", "sd3-digits")
SCHEMES = ("w8a8", "w4a8")
CACHES = ("output", "residual", "modules")
BUDGETS = (25, 15, 10, 7)
SAMPLES = 64  # on 16, chance alone moves the mean by 1 dB
RANKED = 48  # on fewer, two halves of them do not agree on the ranking themselves

Record = dict[str, Any]


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}"


def interval(values: list[float], sign: str = "") -> str:
    """Mean and the half width of its 95 % confidence interval over seeds (normal approximation)."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):{sign}.1f} ± {half:.1f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    """The same of what ours has over theirs, sample by sample."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], sign="+")


def rows_of(record: Record, part: str) -> list[tuple[str, str, Any]]:
    return [
        (model, scheme, record[f"{model}-{scheme}"][part])
        for model in MODELS
        for scheme in SCHEMES
        if part in record.get(f"{model}-{scheme}", {})
    ]


def cells_of(record: Record, model: str, scheme: str, plan: str) -> dict[int, list[float]]:
    """PSNR of every sample for each budget of a plan."""
    cells = record[f"{model}-{scheme}"]["cells"]
    return {row["budget"]: row["psnr_db"] for row in cells if row["plan"] == plan}


def table(head: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return "Not measured with these plans yet."
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows])


def ranking_table(record: Record) -> str:
    first, *others = [f"{kind}, {view}" for kind in ("fitted", "unweighted", "cem") for view in VIEWS]
    rows = [
        [model, scheme, predictor]
        + [f"{values[first]:.3f}", f"{found['by_means'][predictor]:.3f}"]
        + [f"{values[cost]:.2f}" for cost in others]
        for model, scheme, found in rows_of(record, "ranking")
        for predictor, values in found["spearman"].items()
    ]
    return table(["model", "scheme", "predictor", first, "by plain means", *others], rows)


def cells_table(record: Record) -> str:
    published = [f"{solver}, {name}" for name in ("taylor1", "taylor2") for solver in PUBLISHED]
    corrected = [f"{solver}, taylor1, quadratic" for solver in PUBLISHED]
    rows = []
    for model, scheme, found in rows_of(record, "cells"):
        full = next(row["psnr_db"] for row in found if row["plan"] == "full compute")
        for budget in BUDGETS:
            row = {each["plan"]: each for each in found if each["budget"] == budget}
            psnr = {plan: each["psnr_db"] for plan, each in row.items()}
            best, best_of_both = (
                max((psnr[plan] for plan in plans), key=statistics.mean)
                for plans in (published[: len(PUBLISHED)], published)
            )
            own, default = row["default"], psnr["default"]
            rows.append(
                [model, scheme, mean(full), budget]
                + [mean(psnr[plan]) for plan in (*published, *corrected, "default, taylor1")]
                + [interval(default), own["correction"] or "none", own["full_steps"]]
                + [difference(psnr["default, taylor1"], best)]
                + [difference(default, best), difference(default, best_of_both)]
            )
    head = ["model", "scheme", "50 of 50", "budget", *published]
    head += [f"{solver}, taylor1, corrected later" for solver in PUBLISHED]
    head += ["default, taylor1", "default", "correction", "full steps"]
    return table([*head, "default, taylor1, over taylor1", "default over taylor1", "default over both"], rows)


def tails_section(record: Record) -> str:
    plans = (*(f"{solver}, taylor1" for solver in PUBLISHED), "default, taylor1", "default")
    rows, ahead = [], np.zeros(2, dtype=int)
    for model, scheme, _ in rows_of(record, "cells"):
        full = tail(cells_of(record, model, scheme, "full compute")[50])
        found = {plan: cells_of(record, model, scheme, plan) for plan in plans}
        for budget in BUDGETS:
            tails = {plan: tail(found[plan][budget]) for plan in plans}
            ahead += np.array(tails["default"]) > np.max([tails[plan] for plan in plans[: len(PUBLISHED)]], axis=0)
            told = [f"{low:.1f} / {worst:.1f}" for low, worst in (full, *tails.values())]
            rows.append([model, scheme, told[0], budget, *told[1:]])
    return f"""### The samples that lose most

The fifth percentile of the same samples, and the worst. Some stand where a little decides what is drawn; it is mostly
the same ones under every plan, and under full compute in 4 bits, and how far they end up from full precision there is
chance. The fifth percentile of `default` is above that of both uniform and CEM in {ahead[0]} of {len(rows)} cells, the
worst in {ahead[1]}; a third of them would be chance.

{table(["model", "scheme", "50 of 50", "budget", *plans], rows)}
"""


def tail(values: list[float]) -> tuple[float, float]:
    """The fifth percentile, and the worst."""
    return float(np.percentile(values, 5)), min(values)


def ceiling_section(record: Record) -> str:
    """Empty where it was not measured."""
    rows = []
    for model, scheme, found in rows_of(record, "ceiling"):
        own = cells_of(record, model, scheme, "default, taylor1")
        for row in found:
            ours, highest = own[row["budget"]], row["psnr_db"]
            ran = [f"{row['minutes']:.1f}", row["climbs"], row["runs"]]
            rows.append([model, scheme, row["budget"], *ran, mean(highest), mean(ours), difference(ours, highest)])
    if not rows:
        return ""
    head = ["model", "scheme", "budget", "minutes", "climbs", "runs", "ceiling", "default, taylor1", "difference"]
    return f"""## How far from the ceiling

A blind local search in closed loop, one full-compute step moved at a time and kept where 10 samples say so, from even
spacing, from CEM's schedule, then again and again from the best so far with three steps moved at random, until the
minutes of one core are over.

{table(head, rows)}

"""


def caches_section(record: Record) -> str:
    """Empty where they were not measured."""
    rows = [
        [model, scheme, budget]
        + [
            " / ".join(
                mean(row["psnr_db"])
                for cache in CACHES
                for row in found
                if (row["budget"], row["predictor"], row["cache"]) == (budget, predictor, cache)
            )
            for predictor in ("taylor1", "reuse")
        ]
        for model, scheme, found in rows_of(record, "caches")
        for budget in BUDGETS
    ]
    if not rows:
        return ""
    return f"""## Output, residual or modules

Uniform schedules, PSNR in dB served from the [output / the blocks' residual / their modules](../caching.md).

{table(["model", "scheme", "budget", "taylor1", "reuse"], rows)}

"""


def ablation_table(record: Record) -> str:
    views = ("cache", "self", "combined")
    rows = [
        [model, scheme, budget]
        + [
            interval(next(row["psnr_db"] for row in found if (row["view"], row["budget"]) == (view, budget)))
            for view in views
        ]
        for model, scheme, found in rows_of(record, "ablation")
        for budget in BUDGETS[:3]
    ]
    return table(["model", "scheme", "budget", *views], rows)


def auto_table(record: Record) -> str:
    rows = [
        [model, scheme, found["budget"]]
        + [f"{found['ratio']:.3f}"]
        + [f"{found[name]:.1f}" for name in ("psnr_db", "full_psnr_db")]
        + [f"{found['generations']:.1f}"]
        for model, scheme, found in rows_of(record, "auto")
    ]
    head = ["model", "scheme", "budget found", "ratio", "dB", "dB at 50 of 50"]
    return table([*head, "generations"], rows)


def steps_table(record: Record) -> str:
    rows = []
    for model, scheme, counts in rows_of(record, "steps"):
        for row in counts:
            followed = row.get("planned", row["carried_over"])  # it is planned for one of these step counts only
            known = mean(row["planned"]) if "planned" in row else "-"
            found = mean(row["carried_over"]), known, mean(row["alone"]), difference(followed, row["alone"])
            rows.append([model, scheme, row["steps"], row["budget"], *found])
    return table(["model", "scheme", "steps", "budget", "carried over", "planned", "alone", "to alone"], rows)


def quanto_table(record: Record) -> str:
    rows = []
    for model, scheme, found in rows_of(record, "quanto"):
        own = cells_of(record, model, scheme, "default")
        rows.append(
            [model, scheme, interval(found), mean(own[10])] + [difference(own[budget], found) for budget in BUDGETS]
        )
    head = ["model", "scheme", "quanto, 50 of 50", "default, 10 of 50", *(f"{budget} of 50" for budget in BUDGETS)]
    return table(head, rows)


def solver_table(solver: dict[str, float]) -> str:
    rows = [
        [said, *(f"{solver.get(name, math.nan):.{digits}f}" for name in (f"solve_{n}_ms", f"costs_and_solve_{n}_ms"))]
        for said, n, digits in (
            ("every budget of 50 steps", 50, 1),
            ("every budget to 200 of 1000 steps", 1000, 0),
        )
    ]
    return table(["", "dynamic program, ms", "with its cost table, ms"], rows)


def page(record: Record) -> str:
    fitted_to = sum(found["fitted_to"] for _, _, found in rows_of(record, "ranking"))
    spent = [row["generations"] for _, _, rows in rows_of(record, "cells") for row in rows if row["plan"] == "default"]
    solver = record.get("solver", {})
    return f"""# What plans are worth

{record["machine"]["date"][:10]}, {one_line(record["machine"])}.
Command: `python docs/benchmarks/planning.py`. Both built-in models, 50 steps, {SAMPLES} samples with seeds from
1000000 on that no plan has seen; PSNR in dB to full precision at 50 of 50 with the same seeds. Bundles are built for
15 of 50 steps by the default effort, and planned again (`cemq replan`) for everything else: by that effort too, which
takes {min(spent, default=0):.0f} to {max(spent, default=0):.0f} full generations of one sample a cell. What other
efforts give is in [efforts](efforts.md).

## Which cost ranks schedules

Spearman's correlation of predicted cost and error found in closed loop over 60 schedules with 15 full-compute steps,
half of them random, half near uniform, {fitted_to or "none"} of them run when the bundle was built, on {RANKED}
evaluation samples. `fitted` is the cost that plans are made with, whose weights the default effort takes from the step
sizes and `thorough` fits to runs; `unweighted` is the same with step sizes as the only weights; `cem` is CEM's
published cost, which knows of no corrector, so that these schedules have none. What
sets a schedule apart is averaged over the middle two thirds of the samples, as where plans are compared; `by plain
means` is the first column without that.

{ranking_table(record)}

## Default plan against uniform and CEM

`default, taylor1` has that one predictor, no corrector and no correction, as `uniform` and `cem` have it; `corrected
later` are those two with the corrector `quadratic`; `default` has it where skipping costs enough, and chooses the
predictor of each segment and a correction besides. CEM's rule has no schedule of 7: its relaxed variant stands in.
Margins are over the better of uniform and CEM: of `default, taylor1` with that predictor, of `default` with that
predictor, and with the better of both. Nothing has been run on the samples that a cell is planned on but for that cell.
"full steps" is what the default plan spends: it may leave part of the budget.

{cells_table(record)}

{tails_section(record)}
{ceiling_section(record)}{caches_section(record)}## Planned on which prior

Schedules of the dynamic program (taylor1, no search, no correction), planned on the full-precision prior (`cache`), the
quantized model's own (`self`) and the combined one, each fitted to 20 runs on 16 samples, as effort `thorough` fits it;
all run on the quantized model. Mean and 95 % confidence interval over {SAMPLES} seeds.

{ablation_table(record)}

## `--budget auto`

Tolerance 0.15: error (relative L2 of the final latent, the middle two thirds of the samples) over that of the same
quantized model at full compute.

{auto_table(record)}

## Other step counts

A bundle made at 50 steps with 15 of them full, run at another step count. `carried over`: its prior and schedule are,
and are planned on without running anything. `planned`: where the bundle was planned for that step count besides
(`--also-steps`, by default 20 for 50), which is what it follows there; its prior is carried over all the same. `alone`
is the bundle planned again for that step count and nothing else; the last column compares what the bundle follows with
it.

{steps_table(record)}

## Against quanto at full compute

quanto's layers of the same scheme (`--backend quanto`) with 50 of 50 steps computed, beside the default plans above:
PSNR to full precision on the same samples, and what the default plan of each budget has over quanto.

{quanto_table(record)}

## Solver

{solver_table(solver)}

Another budget or step count at load, local search from every start and all (synthetic prior, 3 of 10 steps in full):
{solver.get("at_load_50_ms", math.nan):.0f} ms for 50 steps, {solver.get("at_load_100_ms", math.nan):.0f} ms for 100.
"""
