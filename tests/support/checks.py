"""What must hold for a family of pipelines, one function a column of docs/families.md; the tests run the same ones.

Each takes a family and raises AssertionError (or whatever broke) if it does not hold, or NotApplicableError; it returns
None, or what to say in place of "ok".
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

import cemq
from cemq.bundle.generate import generate_sample
from cemq.bundle.manifest import PICTURE
from cemq.errors import PipelineError
from cemq.evaluation.compare import measure_fidelity
from cemq.pipelines.batches import Batch, make_batches, run
from cemq.pipelines.opening import denoisers, open_pipeline
from cemq.pipelines.outputs import as_array, rate_of
from cemq.pipelines.trajectory import Trajectory, force, record
from cemq.quantize import QuantizationSettings, quantize_pipeline, record_calls
from cemq.runtime import attached, detach, schedule_hook
from cemq.runtime.cached.inner import block_stack
from cemq.runtime.cached.modules import find_parts
from cemq.runtime.registration import HOOK
from cemq.runtime.runner import Runner
from cemq.schedule import CacheSchedule
from support.families import STEPS, Family, small_hidream

CPU = torch.device("cpu")


class NotApplicableError(Exception):
    """There is nothing to check, and why."""


def batch_of(family: Family) -> Batch:
    return Batch(conditions=family.conditions, seeds=(3, 4)[: len(family.conditions)])


def draw(pipe: Any, family: Family, **options: Any) -> np.ndarray:
    """Both samples of the family's batch; latents would not show what the autoencoder makes of them."""
    return as_array(run(pipe, batch_of(family), steps=STEPS, call=family.call, **options))


def plain_run(pipe: Any, family: Family) -> tuple[np.ndarray, Trajectory]:
    with record(pipe) as trajectory:
        values = draw(pipe, family)
    return values, trajectory


def every_step(plain: Trajectory) -> CacheSchedule:
    return CacheSchedule(num_steps=plain.num_steps, full_steps=tuple(range(plain.num_steps)))


def few_steps(plain: Trajectory) -> CacheSchedule:
    return CacheSchedule(num_steps=plain.num_steps, full_steps=(0, 2), predictor="taylor1")


def quantized(family: Family, scheme: str) -> Any:
    """The family's pipeline with its denoisers quantized to a recorded run."""
    pipe = family.pipeline()
    calls = {}
    for name, denoiser in denoisers(pipe):
        with record_calls(denoiser, every=1) as calls[name]:
            draw(pipe, family)
    quantize_pipeline(pipe, QuantizationSettings(scheme=scheme), calls)
    return pipe


@contextmanager
def counted_blocks(pipe: Any) -> Iterator[list[int]]:
    """Grows by one for each call of a block (a member of any list of modules) of the denoisers."""
    calls: list[int] = []
    lists = [m for _, denoiser in denoisers(pipe) for m in denoiser.modules() if isinstance(m, nn.ModuleList)]
    blocks = [block for each in lists for block in each]
    assert blocks
    handles = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counted_forwards(pipe: Any, find: Callable[[nn.Module], Iterable[nn.Module]] = block_stack) -> Iterator[list[int]]:
    """Grows by one whenever a module that ``find`` finds in a denoiser runs; served ones are called all the same.

    To be entered before a schedule is attached.
    """
    calls: list[int] = []
    found = {module for _, denoiser in denoisers(pipe) for module in find(denoiser)}

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module in found:  # ControlNets and refiners have others of the same class
                calls.append(1)
            return forward(module, *args, **kwargs)

        return run_module

    with ExitStack() as patches:
        for kind in set(map(type, found)):
            patches.enter_context(patch.object(kind, "forward", counting(kind.forward)))
        yield calls


COUNTED = {
    "output": counted_blocks,
    "residual": counted_forwards,
    "modules": functools.partial(counted_forwards, find=find_parts),
}


def errors_found(pipe: Any) -> list[float]:
    """How far off each denoiser was when its cache was tried out: computed, then served on the same input."""
    hooks = [HookRegistry.check_if_exists_or_initialize(denoiser).get_hook(HOOK) for _, denoiser in denoisers(pipe)]
    return [hook.cache.error for hook in hooks if hook.cache.error is not None]


def caches_outputs(pipe: Any, family: Family, cache: str = "output", tolerance: float | None = None) -> None:
    """The five promises of a cache, on a pipeline quantized or not; with ``tolerance``, of what `errors_found` says."""
    plain, trajectory = plain_run(pipe, family)
    assert np.isfinite(plain).all()
    with attached(pipe, every_step(trajectory), trajectory.sampler, cache=cache) as hook:
        assert np.array_equal(draw(pipe, family), plain), "the full budget changes the output"
        evaluations = hook.full_evaluations
    schedule = few_steps(trajectory)
    with COUNTED[cache](pipe) as blocks:
        draw(pipe, family)
        in_full = len(blocks)
        blocks.clear()
        with attached(pipe, schedule, trajectory.sampler, cache=cache) as hook:
            skipping = draw(pipe, family)
            assert len(blocks) * schedule.num_steps == in_full * schedule.budget, "a skipped step runs blocks"
            assert hook.full_evaluations * schedule.num_steps == evaluations * schedule.budget
            assert hook.full_evaluations + hook.skipped_evaluations == evaluations
            assert not np.array_equal(skipping, plain)
            assert np.array_equal(draw(pipe, family), skipping), "two runs differ"
            abort(pipe, family)
            assert np.array_equal(draw(pipe, family), skipping), "a run after an aborted one differs"
            if tolerance is not None:
                errors = errors_found(pipe)
                assert errors, "it was never tried out"
                assert max(errors) <= tolerance, f"served on its own input it is off by {max(errors):.2g}"
    assert np.array_equal(draw(pipe, family), plain), "removal does not restore the pipeline"
    assert not any("forward" in vars(module) for _, denoiser in denoisers(pipe) for module in denoiser.modules())


def abort(pipe: Any, family: Family, after: int = 3) -> None:
    """A run of other samples that ends in an exception after some steps."""
    steps = itertools.count(1)

    def stop() -> None:
        if next(steps) == after:
            raise KeyboardInterrupt

    other = Batch(conditions=family.conditions[::-1], seeds=(8, 9)[: len(family.conditions)])
    try:
        run(pipe, other, steps=STEPS, call=family.call, on_step=stop)
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not aborted")


def output_cache(family: Family) -> None:
    caches_outputs(family.pipeline(), family)


def residual_cache(family: Family) -> None:
    """The same five; and computed, then served on the same input agrees to what rounding leaves."""
    caches_outputs(family.pipeline(), family, "residual", tolerance=1e-5)


def module_cache(family: Family) -> None:
    """The same five; and computed, then served on the same input agrees bit for bit."""
    caches_outputs(family.pipeline(), family, "modules", tolerance=0.0)


def w8a8(family: Family) -> None:
    _quantizes(family, "w8a8", tolerance=0.25)


def w4a8(family: Family) -> None:
    _quantizes(family, "w4a8", tolerance=0.6)


def _quantizes(family: Family, scheme: str, tolerance: float) -> None:
    """Quantized, still near the original at every step along its path, and as cacheable as before."""
    reference = plain_run(family.pipeline(), family)[1]
    pipe = quantized(family, scheme)
    with force(pipe, reference) as forced:
        draw(pipe, family)
    for found, expected in zip(forced.predictions, reference.predictions, strict=True):
        error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
        assert error < tolerance, f"relative error {error:.3f} of a prediction"
    caches_outputs(pipe, family)


def bundle(family: Family) -> None:
    """The whole path: build, load, the same numbers from the loaded as from the built one, generate, save, evaluate."""
    with tempfile.TemporaryDirectory() as name, small_hidream():
        folder = Path(name)
        family.pipeline().save_pretrained(folder / "pipeline")
        (folder / "conditions.txt").write_text("\n".join(map(str, family.conditions)), encoding="utf-8")
        manifest = cemq.quantize_and_schedule(
            str(folder / "pipeline"), folder / "bundle", scheme="w8a8", steps=STEPS, samples=2, batch_size=2, budget=3,
            solver="segment", effort="quick", planning_samples=2, check_samples=4,
            calib=str(folder / "conditions.txt"), call=family.call,
        )  # fmt: skip
        pipe, original = cemq.from_pretrained(folder / "bundle"), open_pipeline(
            folder / "pipeline", dtype="float32", device="cpu"
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        original.set_progress_bar_config(disable=True)
        assert (folder / "bundle" / PICTURE).is_file() == (family.kind != "audio")
        first = manifest.profiled_seeds[-4]  # of the check
        batches = make_batches(manifest.held_out_conditions, samples=4, first_seed=first, batch_size=2)
        outcomes = [Runner(pipe=p, steps=STEPS, call=family.call).run(batches) for p in (original, pipe)]
        assert schedule_hook(pipe).skipped_evaluations, "the loaded bundle skips nothing"
        found = dataclasses.asdict(measure_fidelity(*outcomes, batches=batches))
        scores, kept = found.pop("scores"), dict(manifest.fidelity)
        assert found == pytest.approx({key: kept[key] for key in found}, rel=1e-6, abs=1e-9), "fidelity changed"
        for name, told in kept.pop("scores").items():
            for key, value in told.items():
                assert scores[name][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6))
        assert found.keys() == kept.keys()
        sample = generate_sample(folder / "bundle", family.conditions[0], seed=5)
        assert (sample.kind, sample.rate) == (family.kind, rate_of(pipe, family.call))
        path = folder / {"image": "sample.png", "video": "sample.gif", "audio": "sample.wav"}[family.kind]
        sample.save(path)
        assert path.stat().st_size > 40
        result = cemq.evaluate(folder / "bundle", samples=2, picture=folder / "side-by-side.png")
        assert (folder / "side-by-side.png").stat().st_size > 40
        assert result.full_steps == 3
        assert result.compute_ratio == manifest.schedule.compute_ratio


def offload(family: Family) -> str | None:
    """Group offload and accelerate's sequential and model offload change no bit, before or after the schedule."""
    pipe = quantized(family, "w8a8")
    _, trajectory = plain_run(pipe, family)
    schedule = few_steps(trajectory)
    with attached(pipe, schedule, trajectory.sampler):
        expected = draw(pipe, family)
    left_out: list[str] = []
    for put_on, take_off in OFFLOADS:
        if not _takes(family, put_on):
            left_out.append(put_on.__name__.replace("_", " "))
            continue
        for offload_first in (True, False):
            if offload_first:
                put_on(pipe)
            with attached(pipe, schedule, trajectory.sampler) as hook:
                if not offload_first:
                    put_on(pipe)
                for _ in range(2):
                    assert np.array_equal(draw(pipe, family), expected), f"{put_on.__name__} changes the output"
                    assert hook.skipped_evaluations, f"{put_on.__name__} loses the schedule"
                    if put_on is model_offload:  # as every run of a pipeline with model offload ends
                        take_off(pipe)
                        put_on(pipe)
            take_off(pipe)
            if put_on is group_offload:
                break  # there is no way to take it off again
    return f"ok; {', '.join(left_out)}: not even without cemq" if left_out else None


def _takes(family: Family, put_on: Callable[[Any], None]) -> bool:
    """Whether the plain pipeline takes it; HunyuanDiT reads weights past their layers, so that no layer brings them."""
    pipe = family.pipeline()
    put_on(pipe)
    try:
        draw(pipe, family)
    except PipelineError as error:
        if "device meta" not in str(error):
            raise
        return False
    return True


def sequential_offload(pipe: Any) -> None:
    for _, denoiser in denoisers(pipe):
        accelerate.cpu_offload(denoiser, execution_device=CPU, offload_buffers=True)


def model_offload(pipe: Any) -> None:
    for _, denoiser in denoisers(pipe):
        accelerate.cpu_offload_with_hook(denoiser, execution_device=CPU)


def group_offload(pipe: Any) -> None:
    for _, denoiser in denoisers(pipe):
        apply_group_offloading(denoiser, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def remove_accelerate(pipe: Any) -> None:
    for _, denoiser in denoisers(pipe):
        accelerate.hooks.remove_hook_from_module(denoiser, recurse=True)


OFFLOADS = [(model_offload, remove_accelerate), (sequential_offload, remove_accelerate), (group_offload, detach)]


def compiled(family: Family) -> None:
    """`torch.compile` of the whole denoiser, after the schedule is attached; see the tests for the other orders."""
    pipe = quantized(family, "w8a8")
    _, trajectory = plain_run(pipe, family)
    schedule = few_steps(trajectory)
    torch._dynamo.reset()
    with attached(pipe, schedule, trajectory.sampler) as hook:
        expected = draw(pipe, family)
        for name, denoiser in denoisers(pipe):
            setattr(pipe, name, torch.compile(denoiser, backend="eager"))
        for _ in range(2):
            assert np.allclose(draw(pipe, family), expected, atol=1e-4), "compiled output differs"
        assert hook.skipped_evaluations
    torch._dynamo.reset()


CHECKS: dict[str, Callable[[Family], str | None]] = {
    "output cache": output_cache,
    "residual cache": residual_cache,
    "module cache": module_cache,
    "W8A8": w8a8,
    "W4A8": w4a8,
    "bundle": bundle,
    "offload": offload,
    "compile": compiled,
}
