"""Where the weights of a bundle would lie on a device: read from its files, nothing is loaded."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import read_bundle
from cemq.bundle.original import Original
from cemq.errors import InputError, PlacementError, choose
from cemq.memory.footprint import ANY_FLOAT, DTYPES, Headers, read_footprint, read_headers
from cemq.memory.offload import free_host_memory
from cemq.memory.placement import (
    GIB,
    MAPPED,
    ON_DEVICE,
    PLACEMENTS,
    MemoryPlan,
    Placement,
    parse_bytes,
    plan_placement,
)
from cemq.pipelines.opening import pipeline_class
from cemq.runtime.policy_names import make_policy
from cemq.schedule import CacheSchedule, parse_budget

# What the device's libraries take: on CUDA context, workspaces and fragmentation, which is an assumption; on a CPU what
# oneDNN packs and keeps, about 30 MB beyond the sums in docs/benchmarks/placement.md.
RESERVE = {"cuda": GIB // 2, "cpu": 48 << 20}


def plan_memory(
    bundle: str | Path,
    vram: str | int,
    *,
    device: str = "cuda",
    budget: int | str | None = None,
    samples: int = 1,
    call: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    host_memory: str | int | None = None,
) -> MemoryPlan:
    """Where a bundle's weights would lie on a device with so much memory, and what every other placement would cost.

    Args:
        bundle: The bundle's folder. Nothing of it is loaded.
        vram: Device memory to stay within, such as ``"8GiB"`` or a number of bytes.
        device: ``cuda``, ``cpu``, ...; it need not be there.
        budget: Full-compute steps or a ratio; None takes the bundle's. Only they move weights.
        samples: Pictures drawn at once.
        call: Arguments of the pipeline such as height and width, over the bundle's.
        dtype: Of everything that is not quantized; None takes the bundle's.
        host_memory: That weights may rest in; None leaves it out of account.

    Raises:
        PlacementError: Nothing fits; says how much the least placement needs, and for what.
        BundleError: The bundle is incomplete or damaged.
        InputError: A size cannot be read, or an argument of the call that decides one is no number.
    """
    folder = Path(bundle)
    manifest = read_bundle(folder)
    limit = parse_bytes(vram)
    if samples < 1:
        raise InputError(f"samples={samples}: at least one sample is needed")
    full_steps = manifest.schedule.budget
    if budget is not None:
        full_steps = parse_budget(budget, manifest.schedule.num_steps)
    followed = [run.schedule for run in manifest.other_runs] if full_steps == manifest.schedule.budget else []
    kept = [_most_kept(manifest.schedule, full_steps), *(each.most_kept for each in followed)]
    if manifest.policy is not None:
        policy = make_policy(manifest.policy["name"], manifest.policy["settings"])
        kept = [policy.begin(manifest.schedule.num_steps).most_kept]
    asked = manifest.call | _read_call(manifest.pipeline_class, call or {})
    components = read_footprint(
        read_headers(folder, call=asked, samples=samples),
        dtype=dtype or manifest.dtype,
        stored_dtype=manifest.dtype,
        full_steps=full_steps,
        cache=manifest.cache,
        kept_steps=max(kept),
    )
    kind = choose("device", device.partition(":")[0], ("cuda", "cpu", "mps", "xpu", "npu"))
    return plan_placement(
        components,
        limit,
        device=kind,
        reserve_bytes=RESERVE.get(kind, 0),
        host_limit=None if host_memory is None else parse_bytes(host_memory),
        samples=samples,
    )


def plan_original(
    original: Original, vram: str | int, *, dtype: str, device: str, call: Mapping[str, Any], steps: int
) -> MemoryPlan:
    """Where the weights of a full-precision model lie while it draws one sample at a time within so much memory.

    Args:
        device: ``cuda``, ``cpu``, ...
        call: Arguments of the pipeline, as it wants them.

    Raises:
        PlacementError: Nothing fits, weights would be converted on their way from disk, or LoRAs are to be fused.
    """
    if original.loras:
        raise PlacementError(
            f"vram={vram}: fused LoRAs are in memory as a whole, and this bundle has some: leave vram out"
        )
    headers = read_headers(original.source.folder, call=call, variant=original.variant)
    plan = plan_placement(
        read_footprint(headers, dtype=dtype, stored_dtype=ANY_FLOAT, full_steps=steps),
        parse_bytes(vram),
        device=device,
        reserve_bytes=RESERVE.get(device, 0),
        host_limit=free_host_memory(),
        placements=placements_from_files(device),
    )
    refuse_conversion(headers, plan, dtype)
    return plan


def placements_from_files(device: str) -> tuple[Placement, ...]:
    """Those of weights that no bundle has laid out: a CPU computes on them where they lie in their files."""
    return (ON_DEVICE, MAPPED) if device == "cpu" else PLACEMENTS


def refuse_conversion(headers: Headers, plan: MemoryPlan, dtype: str) -> None:
    """Raises PlacementError where weights are to stay on disk, and lie there in another dtype than they run in."""
    if not plan.chosen.placement.disk:
        return
    names = {code: name for name, code in DTYPES.items()}
    bytes_of: Counter[str] = Counter()
    for tensor in chain.from_iterable(headers.tensors.values()):
        if tensor.dtype in names:
            bytes_of[names[tensor.dtype]] += tensor.bytes
    ((found, _),) = bytes_of.most_common(1)
    if found != dtype:
        raise PlacementError(
            f"vram: weights would stay on disk, where they are {found}, and dtype={dtype} converts all of them in "
            f"memory first: give --dtype {found}, or allow more memory"
        )


def _read_call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """Raises InputError for an argument that a pipeline class does not take, or not so."""
    from cemq.pipelines.batches import read_call

    kind = pipeline_class(name)
    for argument in call:
        choose(f"argument of {name}", argument, inspect.signature(kind.__call__).parameters)
    return read_call(kind, call)


def _most_kept(schedule: CacheSchedule, full_steps: int) -> int:
    """`CacheSchedule.most_kept` of another budget: as if its full-compute steps were spread evenly."""
    if full_steps == schedule.budget:
        return schedule.most_kept
    spread = tuple(number * schedule.num_steps // full_steps for number in range(full_steps))
    return max(
        CacheSchedule(num_steps=schedule.num_steps, full_steps=spread, predictor=predictor).most_kept
        for predictor in set(schedule.predictors)
    )
