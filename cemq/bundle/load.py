"""A bundle back to a native diffusers pipeline that skips steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import nn

from cemq.bundle.checksums import Verify
from cemq.bundle.dtypes import check_dtypes, tensor_dtypes
from cemq.bundle.hub import find_bundle
from cemq.bundle.manifest import PRIOR, Manifest, OtherRun, read_bundle, read_checksum
from cemq.bundle.plan_memory import plan_memory
from cemq.bundle.save import save_as_bundle
from cemq.errors import BundleError, CemqError, InputError, PlacementError, check_keywords, choose
from cemq.extensions import load_extensions
from cemq.files import absolute
from cemq.memory.offload import before_placing, disk_folder, free_host_memory, place
from cemq.memory.placement import MemoryPlan
from cemq.pipelines.opening import DTYPES, check_device, default_device, open_pipeline
from cemq.prior.error_prior import ErrorPrior
from cemq.quantize.kernels import check_kernel
from cemq.quantize.layers import use_kernel
from cemq.runtime.attach import attach
from cemq.runtime.policy_names import make_policy
from cemq.schedule import AUTO, SEARCH
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import Correction, make_correction

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Placing(TypedDict, total=False):
    """How much device memory a pipeline may take, and where weights go that it keeps on disk; each may be left out."""

    vram: str | int | None
    offload_folder: str | Path | None


class Loading(Placing, total=False):
    """How a bundle is loaded by what then runs it; each may be left out."""

    device: str | None
    verify: Verify | bool
    kernel: str


def from_pretrained(
    path: str | Path,
    *,
    device: str | None = None,
    torch_dtype: Any = None,
    budget: int | str | None = None,
    call: Mapping[str, Any] | None = None,
    revision: str | None = None,
    verify: Verify | bool = "once",
    kernel: str = "auto",
    **placing: Unpack[Placing],
) -> Any:
    """Load a bundle as its own diffusers pipeline class, quantized and scheduled.

    ``pipe.save_pretrained(folder)`` writes a bundle again.

    Args:
        path: The bundle's folder, or ``owner/name`` on the Hub.
        device: Where it runs; None takes CUDA where there is one.
        torch_dtype: Of everything that is not quantized, as a torch dtype or its name; None takes the bundle's.
        budget: Full-compute steps, or a ratio such as ``"3x"``: solve the schedule anew from the bundle's prior.
            None takes the schedule the bundle was built with. A run with another ``num_inference_steps`` gets a
            schedule of its own, of the same compute ratio: the one the bundle was built with for that step count, if
            there is one, else one planned from the prior.
        call: Arguments that the pipeline will be called with, such as height and width, over the bundle's; ``vram``
            allows for them.
        revision: Branch, tag or commit on the Hub.
        verify: Compare the checksums of all files first: ``always``, ``once`` on this machine and again for what has
            changed since, or ``never``. True and False stand for always and never.
        kernel: What multiplies the integers of W8A8 and W4A8: a kernel that ``cemq doctor`` shows, ``auto`` for the
            fastest of those that round as the bundle was measured, tried once for each shape and device, or ``fastest``
            of all. Layers that it does not take, or whose result it does not give, have what ``auto`` chooses.
        vram: Device memory to stay within, such as ``"8GiB"`` or a number of bytes: the cheapest placement that fits is
            applied, ``pipe.cemq_memory_plan`` says which. On a CPU it is the memory of weights and activations.
        offload_folder: For placements that keep weights on disk; None takes ``~/.cache/cemq/offload``.

    Raises:
        BundleError: The bundle is incomplete, damaged or of another format, or a tensor has not the dtype in which it
            was measured.
        InfeasibleBudgetError: The budget is out of range.
        PlacementError: No placement fits in ``vram``, and how much the least one needs; or it would keep weights on
            disk that ``torch_dtype`` converts in memory.
        HubError: There is no such folder, and nothing of that name can be fetched.
        InputError: Unknown dtype or device, ``vram`` is no size, ``verify`` none of these words, or there is no such
            kernel, here or at all, or no layer that it would be for.
    """
    check_keywords("from_pretrained", placing, Placing)
    load_extensions()
    folder = absolute(find_bundle(path, revision))  # the pipeline outlives a change of the working folder
    manifest = read_bundle(folder, verify=verify)
    plan = _read_plan(folder, manifest, budget)
    dtype = choose("dtype", str(torch_dtype or manifest.dtype).removeprefix("torch."), DTYPES)
    where = check_device(device or default_device())
    check_kernel(kernel, where)
    policy = make_policy(manifest.policy["name"], manifest.policy["settings"]) if manifest.policy else None
    memory = None
    if (vram := placing.get("vram")) is not None:
        free, steps = free_host_memory(), plan.schedule.budget
        memory = plan_memory(folder, vram, device=where.type, budget=steps, call=call, dtype=dtype, host_memory=free)
        if where.type == "cpu" and memory.chosen.placement.disk:
            _check_unconverted(vram, dtype, manifest)
    # not `open_placed`: dtypes are checked, and kernels chosen, before offloading hides the weights
    pipe = open_quantized(folder, manifest, dtype=dtype, **before_placing(memory, where))
    use_kernel((part for part in pipe.components.values() if isinstance(part, nn.Module)), kernel, where)
    if memory is not None:
        _place(pipe, memory, folder, where, placing.get("offload_folder"))
    attach(pipe, plan if policy is None else policy).is_measured = True
    save_as_bundle(pipe, folder, manifest, dtype=dtype)
    return pipe


def _check_unconverted(vram: str | int, dtype: str, manifest: Manifest) -> None:
    """Raises PlacementError where weights that are to stay on disk would be converted."""
    if dtype != manifest.dtype:
        raise PlacementError(
            f"vram={vram}: weights would lie on disk, but torch_dtype={dtype} converts all of them in memory "
            f"first: take the bundle's own {manifest.dtype}, or allow more memory"
        )


def open_quantized(
    folder: Path, manifest: Manifest, *, dtype: str, device: str, aligned: bool = True
) -> DiffusionPipeline:
    """The bundle's pipeline with its quantized weights, checked against the manifest.

    Raises:
        BundleError: It does not load, or a tensor has not the dtype in which it was measured.
        CemqError: It loads as another class.
    """
    try:
        pipe = open_pipeline(folder, dtype=dtype, device=device, aligned=aligned)
    except BundleError as error:
        raise BundleError(f"bundle '{folder}': {error}") from error
    if type(pipe).__name__ != manifest.pipeline_class:
        raise CemqError(f"bundle '{folder}' loaded as {type(pipe).__name__}, expected {manifest.pipeline_class}")
    if dtype == manifest.dtype:  # else it is what diffusers makes of it in another
        check_dtypes(pipe, folder, manifest)
    return pipe


def _read_plan(folder: Path, manifest: Manifest, budget: int | str | None) -> Plan:
    """The plan that the bundle was built with and those of other step counts, or one for the budget instead.

    Raises:
        InputError: A budget, of a bundle whose policy needs none.
        InfeasibleBudgetError: The budget is out of range.
    """
    prior = ErrorPrior.load(folder / PRIOR)
    asked = manifest.recipe or {}
    plan = Plan(
        schedule=manifest.schedule,
        sampler=manifest.sampler,
        prior=prior,
        correction=_correction(manifest, prior),
        view=manifest.view,
        cache=manifest.cache,
        solver=asked.get("solver", SEARCH),
        predictor=asked.get("predictor", AUTO),
    )
    plan = replace(plan, others=tuple(_other(plan, prior, run) for run in manifest.other_runs))
    if budget is None:
        return plan
    if manifest.policy is not None:
        raise InputError(f"budget={budget}: the policy {manifest.policy['name']} of this bundle decides: leave it out")
    return plan.with_budget(budget)


def _place(
    pipe: DiffusionPipeline, memory: MemoryPlan, folder: Path, device: torch.device, offload_folder: str | Path | None
) -> None:
    """Lay the weights where the plan says, and say so."""
    root = Path(offload_folder) if offload_folder is not None else None
    offload = disk_folder(read_checksum(folder), memory, tensor_dtypes(pipe), root)
    place(pipe, memory, device=device, offload_folder=offload)
    logging.getLogger("cemq").info("%s: %s", folder, memory.summary())


def _other(plan: Plan, prior: ErrorPrior, run: OtherRun) -> Plan:
    """The same at another step count."""
    there = prior.resampled(run.sampler)
    correction = _correction(run, there)
    return replace(plan, schedule=run.schedule, sampler=run.sampler, prior=there, correction=correction)


def _correction(run: Manifest | OtherRun, prior: ErrorPrior) -> Correction | None:
    return make_correction(run.correction, prior, run.schedule) if run.correction else None
