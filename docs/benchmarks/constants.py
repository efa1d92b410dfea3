"""The constants of plans and weights, tried again on every built-in model: ``python docs/benchmarks/constants.py``.

A constant is chosen on dit-digits and sd3-digits and confirmed on the others, or is said not to be. Each is changed by
itself, the rest as they are shipped, and what it gives is told as the difference in PSNR to full precision, on samples
that no build has seen. Of the planner: W8A8 as the default effort quantizes and profiles it, planned on the prior alone
for 15, 10 and 7 of 50 steps. Of the weights: W4A8 with every step computed.

Writes constants.md and constants.json beside itself; ``--models`` measures some of them anew and keeps the rest. About
ten minutes of a CPU core for each model (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from efforts import Evaluation
from quantization import Bench, native

from cemq.bench.machine import describe_machine, one_line
from cemq.build import references, stages
from cemq.build.settings import resolve
from cemq.build.work import Work
from cemq.predict.correctors import WORTH_CORRECTING
from cemq.prior.error_prior import RESPONSE, ErrorPrior
from cemq.quantize import gptq
from cemq.runtime import attached
from cemq.schedule import AUTO, CacheSchedule, plan_schedule, suited_corrector
from cemq.schedule.plan import Plan
from cemq.schedule.solvers import GAMMA
from cemq.search.explore import planned

CHOSEN_ON, CONFIRMED_ON = ("dit-digits", "sd3-digits"), ("emoji", "moving-digits")
MODELS, BUDGETS, SAMPLES = (*CHOSEN_ON, *CONFIRMED_ON), (15, 10, 7), 16
HERE = Path(__file__).with_suffix("")
SHIPPED = "as shipped"


@dataclass(frozen=True)
class Variant:
    """One constant changed: its name as the page tells it, the value, and how to plan with it."""

    constant: str
    value: str
    plan: Callable[[ErrorPrior, int], CacheSchedule]


def plans_of(prior: ErrorPrior, budget: int, corrector: str | None = None) -> list[CacheSchedule]:
    """What a prior says with nothing run: the plan of effort ``instant``, which is the first that ``normal`` runs, and
    what local search on the predicted error makes of it; None: the corrector that such plans have."""
    corrector = corrector or suited_corrector(prior, budget, corrector="quadratic")
    return list(planned(prior, budget, predictor=AUTO, corrector=corrector, view="combined"))


def shipped(prior: ErrorPrior, budget: int) -> CacheSchedule:
    return plans_of(prior, budget)[0]


def searched(prior: ErrorPrior, budget: int) -> CacheSchedule:
    return plans_of(prior, budget)[1]


def with_corrector(name: str) -> Callable[[ErrorPrior, int], CacheSchedule]:
    return lambda prior, budget: plans_of(prior, budget, name)[0]


def with_prior(change: Callable[[ErrorPrior], dict[str, Any]]) -> Callable[[ErrorPrior, int], CacheSchedule]:
    return lambda prior, budget: shipped(replace(prior, **change(prior)), budget)


def with_power(power: float) -> Callable[[ErrorPrior, int], CacheSchedule]:
    def sensitivity(prior: ErrorPrior) -> dict[str, Any]:
        sizes = prior.step_sizes / prior.step_sizes.max()
        return {"sensitivity": np.maximum(sizes, 1e-3) ** -power}

    return with_prior(sensitivity)


def with_response(across: float) -> Callable[[ErrorPrior, int], CacheSchedule]:
    return with_prior(lambda _: {"response": np.array([0.0, across])})


def with_coherence(steps: float) -> Callable[[ErrorPrior, int], CacheSchedule]:
    return with_prior(lambda _: {"coherence": steps})


def with_gamma(gamma: float) -> Callable[[ErrorPrior, int], CacheSchedule]:
    def solved(prior: ErrorPrior, budget: int) -> CacheSchedule:
        corrector = suited_corrector(prior, budget, corrector="quadratic")
        return plan_schedule(prior, budget, predictor="taylor1", corrector=corrector, gamma=gamma)

    return solved


POWER, ACROSS, COHERENCE = "sensitivity: power of the step size, -3/4", "response across, 2", "coherence, infinite"
CORRECTOR, EXPONENT = f"corrector: quadratic where it pays {WORTH_CORRECTING} dB", f"gamma, {GAMMA:g}"
LOCAL = "the dynamic program's schedule"
VARIANTS = (
    Variant(SHIPPED, "", shipped),
    Variant(POWER, "0", with_power(0.0)),
    Variant(POWER, "-1/2", with_power(0.5)),
    Variant(POWER, "-1", with_power(1.0)),
    Variant(ACROSS, "1", with_response(RESPONSE[1] / 2)),
    Variant(ACROSS, "4", with_response(RESPONSE[1] * 2)),
    Variant(COHERENCE, "32 steps", with_coherence(32.0)),
    Variant(COHERENCE, "8 steps", with_coherence(8.0)),
    Variant(CORRECTOR, "none", with_corrector("none")),
    Variant(CORRECTOR, "linear", with_corrector("linear")),
    Variant(CORRECTOR, "quadratic always", with_corrector("quadratic")),
    Variant(EXPONENT, "1", with_gamma(1.0)),
    Variant(EXPONENT, "4", with_gamma(4.0)),
    Variant(LOCAL, "local search from there", searched),
)


def plans(model: str) -> Iterator[dict[str, Any]]:
    """Of each variant and budget, PSNR of every sample; a schedule that two of them come to is run once."""
    evaluation = Evaluation(model, SAMPLES)
    settings = resolve(
        f"builtin:{model}", None, "cpu", {"scheme": "w8a8", "effort": "normal", "dtype": "float32", "also_steps": []}
    )
    with tempfile.TemporaryDirectory() as scratch:
        full = references.FullPrecision(settings, None, Work(Path(scratch), keeps=False))
        samples = references.draw_samples(full.runner, settings)
        originals, fitted = references.run_originals(full, full.describe(), samples)
        quantized = stages.quantize(full.runner, settings.quantization, fitted.calls)
    prior = stages.profile(quantized, samples, originals, settings)
    assert prior.metadata is not None
    known: dict[str, list[float]] = {}
    for budget in BUDGETS:
        for variant in VARIANTS:
            schedule = variant.plan(prior, budget)
            if (key := json.dumps(schedule.to_dict() | {"solver": ""})) not in known:
                with attached(quantized.pipe, Plan(schedule=schedule, sampler=prior.metadata.sampler)):
                    known[key] = evaluation.psnr(quantized.pipe)
            yield {"constant": variant.constant, "value": variant.value, "budget": budget, "psnr_db": known[key]}


DAMPING, CALLS = f"GPTQ: damping, {gptq.DAMPING}", "GPTQ: recorded calls, all"


def weights(model: str) -> Iterator[dict[str, Any]]:
    bench = Bench(model, SAMPLES)
    calls, row = bench.calls(0), native("w4a8", "", "default")
    variants = (
        (SHIPPED, "", gptq.DAMPING, calls),
        (DAMPING, "0.001", 0.001, calls),
        (DAMPING, "0.1", 0.1, calls),
        (CALLS, "every second", gptq.DAMPING, calls[::2]),
        (CALLS, "every fourth", gptq.DAMPING, calls[::4]),
    )
    for constant, value, damping, some in variants:
        with patch.object(gptq, "DAMPING", damping):
            found = bench.measure(row, 0, some)
        yield {"constant": constant, "value": value, "budget": 50, "psnr_db": [found["psnr_db"]]}


def page(record: dict[str, Any]) -> str:
    rows, machine = record["rows"], record["machine"]
    measured = [model for model in MODELS if any(row["model"] == model for row in rows)]

    def found(model: str, constant: str, value: str, budget: int) -> np.ndarray:
        wanted = model, constant, value, budget
        (own,) = (r for r in rows if (r["model"], r["constant"], r["value"], r["budget"]) == wanted)
        return np.array(own["psnr_db"])

    def table(budgets: tuple[int, ...]) -> list[str]:
        named = [f"{model}, {budget}" for model in measured for budget in budgets]
        lines = ["| constant, as shipped | changed to | " + " | ".join(named) + " |", "|---" * (2 + len(named)) + "|"]
        names = dict.fromkeys((row["constant"], row["value"]) for row in rows if row["budget"] in budgets)
        for constant, value in names:
            cells = []
            for model in measured:
                for budget in budgets:
                    own, default = found(model, constant, value, budget), found(model, SHIPPED, "", budget)
                    apart = own - default
                    error = f" ± {apart.std(ddof=1) / np.sqrt(len(apart)):.1f}" if len(apart) > 1 else ""
                    cells.append(f"{own.mean():.1f}" if constant == SHIPPED else f"{apart.mean():+.1f}{error}")
            lines.append(f"| {constant} | {value} | {' | '.join(cells)} |")
        return lines

    lines = [
        "# The constants, and what they give elsewhere",
        "",
        f"{machine['date'][:10]}, {one_line(machine)}. Command: `python docs/benchmarks/constants.py`.",
        "",
        f"Constants are chosen on {' and '.join(CHOSEN_ON)} and confirmed on the other built-in models, which no",
        f"constant was looked for on. PSNR in dB to full precision at 50 of 50 steps, {SAMPLES} samples that no build",
        "has seen; a row changes one constant and tells the mean difference to what is shipped ± its standard error.",
        "",
        "## The planner",
        "",
        "W8A8, quantized and profiled as the default effort does, planned on the prior alone, nothing run: 15, 10",
        "and 7 of 50 steps in full.",
        "",
        *table(BUDGETS),
        "",
        "## Four-bit weights",
        "",
        "W4A8, every step computed, fitted to one set of samples. Differences below about half a dB are noise.",
        "",
        *table((50,)),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    stored = HERE.with_suffix(".json")
    record = json.loads(stored.read_text()) if stored.is_file() else {"rows": []}
    for model in parser.parse_args().models:
        record["rows"] = [row for row in record["rows"] if row["model"] != model]
        for measure in (plans, weights):
            for row in measure(model):
                record["rows"].append({"model": model} | row)
                told = f"{np.mean(row['psnr_db']):.2f} dB"
                print(model, row["budget"], row["constant"], row["value"], told, flush=True)
    record["machine"] = describe_machine()
    stored.write_text(json.dumps(record, indent=1) + "\n")
    HERE.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
