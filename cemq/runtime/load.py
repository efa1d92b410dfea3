"""A bundle back to a native diffusers pipeline that skips steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cemq.bundle import PRIOR, read_bundle
from cemq.correction import make_correction
from cemq.errors import BundleError, CemqError
from cemq.models import default_device, open_pipeline
from cemq.prior import ErrorPrior
from cemq.runtime.hook import attach
from cemq.runtime.plan import Plan


def from_pretrained(
    path: str | Path,
    *,
    device: str | None = None,
    torch_dtype: Any = None,
    budget: int | str | None = None,
    verify: bool = True,
) -> Any:
    """Load a bundle as its own diffusers pipeline class, quantized and scheduled.

    Args:
        path: The bundle's folder.
        device: Where it runs; None takes CUDA where there is one.
        torch_dtype: Of everything that is not quantized, as a torch dtype or its name; None takes the bundle's.
        budget: Full-compute steps, or a ratio such as ``"3x"``: solve the schedule anew from the bundle's prior.
            None takes the schedule the bundle was built with. A run with another ``num_inference_steps`` gets a
            schedule of its own, of the same compute ratio.
        verify: Compare the checksums of all files first.

    Raises:
        BundleError: The bundle is incomplete, damaged or of another format.
        InfeasibleBudgetError: The budget is out of range.
    """
    folder = Path(path)
    manifest = read_bundle(folder, verify=verify)
    prior, schedule = ErrorPrior.load(folder / PRIOR), manifest.schedule
    correction = manifest.correction and make_correction(manifest.correction, prior, schedule)
    plan = Plan(schedule=schedule, sampler=manifest.sampler, prior=prior, correction=correction, view=manifest.view)
    if budget is not None:
        plan = plan.with_budget(budget)
    dtype = str(torch_dtype).removeprefix("torch.") if torch_dtype is not None else manifest.dtype
    try:
        pipe = open_pipeline(folder, dtype=dtype, device=device or default_device())
    except BundleError as error:
        raise BundleError(f"bundle '{folder}': {error}") from error
    if type(pipe).__name__ != manifest.pipeline_class:
        raise CemqError(f"bundle '{folder}' loaded as {type(pipe).__name__}, expected {manifest.pipeline_class}")
    attach(pipe, plan)
    return pipe
