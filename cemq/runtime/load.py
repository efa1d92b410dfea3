"""A bundle back to a native diffusers pipeline that skips steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cemq.bundle import PRIOR, read_bundle
from cemq.errors import BundleError, CemqError
from cemq.models import default_device, open_pipeline
from cemq.prior import ErrorPrior
from cemq.runtime.hook import attach
from cemq.schedule import plan_schedule


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
            None takes the schedule the bundle was built with.
        verify: Compare the checksums of all files first.

    Raises:
        BundleError: The bundle is incomplete, damaged or of another format.
        InfeasibleBudgetError: The budget is out of range.
    """
    folder = Path(path)
    manifest = read_bundle(folder, verify=verify)
    schedule = manifest.schedule
    if budget is not None:
        prior = ErrorPrior.load(folder / PRIOR)
        schedule = plan_schedule(
            prior, budget, solver=schedule.solver, predictor=schedule.predictor, view=manifest.view
        )
    dtype = str(torch_dtype).removeprefix("torch.") if torch_dtype is not None else manifest.dtype
    try:
        pipe = open_pipeline(folder, dtype=dtype, device=device or default_device())
    except BundleError as error:
        raise BundleError(f"bundle '{folder}': {error}") from error
    if type(pipe).__name__ != manifest.pipeline_class:
        raise CemqError(f"bundle '{folder}' loaded as {type(pipe).__name__}, expected {manifest.pipeline_class}")
    attach(pipe, schedule, manifest.sampler)
    return pipe
