"""Numbers to tables."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import EVIDENCE, PRIOR, held_out_text, lora_text, policy_text, quality_text, read_bundle
from cemq.metrics import psnr_of
from cemq.prior.error_prior import ErrorPrior


def describe(bundle: Path) -> dict[str, Any]:
    """Everything `cemq inspect` shows, as plain data; checksums that were verified before are not again.

    Raises:
        BundleError: The bundle is incomplete or damaged.
    """
    manifest = read_bundle(bundle, verify="once")
    prior = ErrorPrior.load(bundle / PRIOR)
    schedule = manifest.schedule
    return {
        "model": manifest.model,
        "revision": manifest.revision,
        "lora": [dataclasses.asdict(each) for each in manifest.lora],
        "pipeline_class": manifest.pipeline_class,
        "scheme": manifest.scheme,
        "backend": manifest.backend,
        "dtype": manifest.dtype,
        "model_bytes": manifest.model_bytes,
        "reference_bytes": manifest.reference_bytes,
        "schedule": schedule.to_dict() | {"strip": schedule.strip(), "compute_ratio": schedule.compute_ratio},
        "sampler": dataclasses.asdict(manifest.sampler),
        "prior": {
            "view": manifest.view,
            "samples": prior.metadata and prior.metadata.samples,
            "quantization_floor": prior.quantization_floor.tolist(),
            "predicted_error": prior.step_errors(schedule.served, "combined").tolist(),
            "step_sizes": prior.step_sizes.tolist(),
            "sensitivity": prior.sensitivity.tolist(),
            "coherence": prior.coherence,
            "response": prior.response.tolist(),
        },
        "correction": manifest.correction,
        "policy": manifest.policy,
        "other_runs": [
            {
                "num_inference_steps": run.num_inference_steps,
                "schedule": run.schedule.to_dict() | {"strip": run.schedule.strip()},
                "correction": run.correction,
            }
            for run in manifest.other_runs
        ],
        "cache": manifest.cache,
        "planning": json.loads((bundle / EVIDENCE).read_text(encoding="utf-8")),
        "fidelity": manifest.fidelity,
        "generations": manifest.generations,
        "call": manifest.call,
        "libraries": manifest.libraries,
    }


def sparkline(values: list[float]) -> str:
    """One character for each value, as high as it lies between the least and the greatest."""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇"[round(6 * (value - low) / ((high - low) or 1))] for value in values)


def print_description(description: dict[str, Any]) -> None:
    """The same for people, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    schedule, fidelity = description["schedule"], description["fidelity"]
    facts = Table.grid(padding=(0, 2))
    for name, value in {
        "model": description["model"] + (f" @ {description['revision']}" if description["revision"] else ""),
        "fused LoRA": lora_text(description["lora"]),
        "pipeline": f"{description['pipeline_class']}, {description['dtype']}",
        "scheme": f"{description['scheme']} ({description['backend']})",
        "denoiser": f"{description['model_bytes']:,} bytes, full precision {description['reference_bytes']:,}",
        "sampler": f"{description['sampler']['scheduler']}, {schedule['num_steps']} steps",
        "schedule": f"{len(schedule['full_steps'])} full-compute steps"
        + (f", one branch of guidance on {len(only)} of them" if (only := schedule.get("branch_steps")) else "")
        + f", compute ratio "
        f"{schedule['compute_ratio']:.2f}{_counted(schedule, fidelity)}, {schedule['solver']} on the "
        f"{description['prior']['view']} prior, "
        f"{', '.join([names] if isinstance(names := schedule['predictor'], str) else dict.fromkeys(names))}",
        "corrector": schedule.get("corrector", "none"),
        "correction": description["correction"] or "none",
        "policy": policy_text(description["policy"]),
        "cache": description["cache"],
        "fidelity": f"PSNR {quality_text(fidelity)}, SSIM {fidelity['ssim']:.4f}, relative L2 "
        f"{fidelity['relative_l2']:.4f} on {held_out_text(fidelity['samples'])} at build time"
        if fidelity
        else "not measured: effort instant runs nothing to see",
    }.items():
        facts.add_row(name, value)
    console.print(facts)
    console.print(f"\n{schedule['strip']}", soft_wrap=True)
    for run in description["other_runs"]:
        console.print(f"{run['schedule']['strip']}   with {run['num_inference_steps']} steps", soft_wrap=True)
    if "curve" in description["planning"]:  # a policy plans nothing
        _print_curve(console, description["planning"]["curve"])
    table = Table("step", "timestep", "full", "quantization floor", "predicted error", box=None, padding=(0, 2))
    prior = description["prior"]
    for step, timestep in enumerate(description["sampler"]["timesteps"][: schedule["num_steps"]]):
        table.add_row(
            str(step),
            f"{timestep:.4g}",
            schedule["strip"][step].strip("·"),
            f"{prior['quantization_floor'][step]:.4f}",
            f"{prior['predicted_error'][step]:.4f}",
        )
    console.print(table)


def _counted(schedule: dict[str, Any], fidelity: dict[str, Any] | None) -> str:
    """What was counted at build time, where that is not what is planned."""
    planned = schedule["num_steps"] / schedule["compute_ratio"]
    counted = fidelity.get("full_steps", planned) if fidelity else planned  # bundles of before do not say
    return "" if math.isclose(counted, planned) else f" ({counted:g} steps were computed at build time)"


def _print_curve(console: Any, points: list[dict[str, Any]]) -> None:
    """What every budget is expected to give, and what those that were run gave."""
    from rich.table import Table

    expected = [psnr_of(point["predicted_error"]) for point in points]
    low, high = points[0]["budget"], points[-1]["budget"]
    console.print("\nPSNR to full precision over full-compute steps, predicted:")
    console.print(f"{low} {sparkline(expected)} {high}   {min(expected):.1f} to {max(expected):.1f} dB", soft_wrap=True)
    table = Table("budget", "compute ratio", "predicted dB", "measured dB", box=None, padding=(0, 2))
    for point, value in zip(points, expected, strict=True):
        if point["measured_psnr_db"] is not None:
            ratio, measured = high / point["budget"], point["measured_psnr_db"]
            table.add_row(str(point["budget"]), f"{ratio:.2f}", f"{value:.1f}", f"{measured:.1f}")
    console.print(table)
    console.print()
