"""Caches of diffusers and of cache-dit, through their own public functions."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from cemq.errors import PlacementError
from cemq.evaluation.rivals.methods import MOST_SKIPPED, Bench, Interval, Knob, Threshold, add_method
from cemq.pipelines.batches import Batch
from cemq.pipelines.noise_scheduler import intercepted
from cemq.pipelines.opening import denoisers
from cemq.runtime.arguments import DenoiserArguments
from cemq.runtime.cached.modules import find_parts

_CONTEXT = "cemq"  # of calls that a pipeline gives none
_REPLACED = {"forward", "_is_patched"}  # attributes of modules
_OF_BRANCHES = (  # arguments of denoisers with a row for each sample and branch of guidance
    *("hidden_states", "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask"),
    *("class_labels", "pooled_projections"),
)


# --- diffusers


@contextmanager
def hooked(bench: Bench, enable: Callable[[Any], None]) -> Iterator[None]:
    """Hooks of diffusers on every denoiser; calls that the pipeline makes in no cache context get one."""
    from diffusers.hooks.hooks import HookRegistry

    pipe = bench.runner.pipe
    models, handles = [model for _, model in denoisers(pipe)], []

    def begin(original: Any, call: Any) -> Any:
        for model in models:  # not every pipeline does that where a run ends
            HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
        return original(*call.args, **call.kwargs)

    before = {model: _hook_names(model) for model in models}
    try:
        for model in models:
            enable(model)
            HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
            handles.append(model.register_forward_pre_hook(_give_context))
            note = partial(_note_timestep, bench, DenoiserArguments(model))
            handles.append(model.register_forward_pre_hook(note, with_kwargs=True))
        with intercepted(pipe.scheduler, "set_timesteps", begin):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for model in models:
            registry = HookRegistry.check_if_exists_or_initialize(model)
            for name in _hook_names(model) - before[model]:
                registry.remove_hook(name, recurse=True)
            registry.invalidate_child_registries_cache()


def _registries(model: Any) -> list[Any]:
    return [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]


def _hook_names(model: Any) -> set[str]:
    return {name for registry in _registries(model) for name in registry.hooks}


def _give_context(model: Any, _: Any) -> None:
    from diffusers.hooks.hooks import CacheContext, StateManager, _set_cache_context

    for registry in _registries(model):
        for hook in registry.hooks.values():
            managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
            if any(manager._context is None for manager in managers):
                _set_cache_context(model, CacheContext(_CONTEXT))
                return


def _note_timestep(bench: Bench, arguments: DenoiserArguments, _: Any, args: Any, kwargs: Any) -> None:
    """Not every pipeline has the property that diffusers' documentation takes a run's timestep from."""
    found = arguments.timestep(args, kwargs)
    if found is not None:
        bench.timestep = float(found.flatten()[0] if hasattr(found, "flatten") else found)


def _add_hooked(name: str, source: str, knob: Knob, enable: Callable[[Bench, Any, float], None]) -> None:
    @add_method(name, f"{source}, diffusers", knob, package="diffusers")
    def _(bench: Bench, setting: float) -> Any:
        return hooked(bench, lambda model: enable(bench, model, setting))


def _first_block(bench: Bench, model: Any, threshold: float) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))


def _magnitudes(bench: Bench) -> list[float]:
    """What diffusers' own calibration run says, which it does not return but prints."""
    import contextlib
    import io

    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    config = MagCacheConfig(calibrate=True, num_inference_steps=bench.num_steps)
    said = io.StringIO()
    with hooked(bench, lambda model: apply_mag_cache(model, config)), contextlib.redirect_stdout(said):
        bench.runner.run_one(bench.batches[0])
    found = re.findall(r"\[([-+0-9.e,\s]+)\]", said.getvalue())
    return [float(each) for each in found[0].split(",")] if found else []


def _mag_cache(bench: Bench, model: Any, threshold: float) -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    ratios = bench.fitted("diffusers-magcache", lambda: _magnitudes(bench))
    config = MagCacheConfig(
        threshold=threshold, max_skip_steps=MOST_SKIPPED, num_inference_steps=bench.num_steps, mag_ratios=ratios
    )
    apply_mag_cache(model, config)


def _parts(model: Any) -> list[str]:
    """Attention and feed-forward modules by the names that diffusers knows them by."""
    parts = set(find_parts(model))
    return [name for name, module in model.named_modules() if module in parts]


def _taylorseer(bench: Bench, model: Any, interval: float) -> None:
    import torch
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(
        cache_interval=int(interval), taylor_factors_dtype=torch.float32,
        cache_identifiers=[re.escape(name) for name in _parts(model)],
    )  # fmt: skip
    apply_taylorseer_cache(model, config)


def _broadcast(bench: Bench, model: Any, interval: float) -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=int(interval),
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks", "layers"),
        current_timestep_callback=lambda: int(bench.timestep),
    )
    apply_pyramid_attention_broadcast(model, config)


def _is_batched(bench: Bench) -> bool:
    """Whether the branches of guidance are one call of the denoiser, of twice the samples."""

    def look() -> bool:
        ((_, model), *_), sizes = denoisers(bench.runner.pipe), []
        arguments = DenoiserArguments(model)

        def note(_: Any, args: Any, kwargs: Any) -> None:
            sizes.append(len(arguments.sample(args, kwargs)))

        first = bench.batches[0]
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            bench.runner.run_one(Batch(conditions=first.conditions[:1], seeds=first.seeds[:1]))
        finally:
            handle.remove()
        return max(sizes) == 2

    return bench.fitted("batched guidance", look)


def _swapped(value: Any) -> Any:
    """The halves of a batch, the second first; anything else as it is."""
    import torch

    return value.roll(len(value) // 2, 0) if torch.is_tensor(value) and value.dim() and len(value) > 1 else value


@contextmanager
def _unconditional_first(pipe: Any) -> Iterator[None]:
    """FasterCache takes the first half of a batch for the unconditional one; of class labels that is the second."""
    from torch.utils._pytree import tree_map

    handles = []
    for _, model in denoisers(pipe):
        if "class_labels" in inspect.signature(type(model).forward).parameters:
            handles += [
                model.register_forward_pre_hook(lambda _, *given: tree_map(_swapped, given), with_kwargs=True),
                model.register_forward_hook(lambda _, args, output: tree_map(_swapped, output)),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@add_method(
    "diffusers-fastercache", "FasterCache, arXiv:2410.19355, diffusers", Interval(low=2, high=50), package="diffusers"
)
@contextmanager
def _faster_cache(bench: Bench, interval: float) -> Iterator[None]:
    """Attention every so many steps and the unconditional branch every 2.5 times as many, 2 and 5 as released."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # which warns of itself
    settings: dict[str, Any] = {
        "spatial_attention_block_skip_range": int(interval),
        "unconditional_batch_skip_range": round(2.5 * interval),
        "attention_weight_callback": lambda _: 0.5,
        "tensor_format": "BCHW",
        "is_guidance_distilled": not _is_batched(bench),
        "current_timestep_callback": lambda: int(bench.timestep),
        "_unconditional_conditional_input_kwargs_identifiers": _OF_BRANCHES,
    }
    with (
        _unconditional_first(bench.runner.pipe),
        hooked(bench, lambda model: apply_faster_cache(model, FasterCacheConfig(**settings))),
    ):
        yield


_add_hooked("diffusers-firstblockcache", "First Block Cache", Threshold(low=1e-4, high=2.0), _first_block)
_add_hooked("diffusers-magcache", "MagCache, arXiv:2506.09045", Threshold(low=1e-5, high=50.0), _mag_cache)
_add_hooked("diffusers-taylorseer", "TaylorSeer, arXiv:2503.06923", Interval(low=2, high=16), _taylorseer)
_add_hooked("diffusers-pab", "Pyramid Attention Broadcast, arXiv:2408.12588", Interval(low=2, high=50), _broadcast)


# --- cache-dit


@contextmanager
def _cache_dit(bench: Bench, calibrator: Any, **settings: Any) -> Iterator[None]:
    """Raises PlacementError for a pipeline whose weights come and go."""
    import cache_dit

    plan = getattr(bench.runner.pipe, "cemq_memory_plan", None)
    if plan is not None and plan.chosen.placement.hooks:
        # it puts forwards of its own in the place of those that load weights, and moves blocks itself: layers then run
        # on whatever lies in that memory, after it is disabled too (1.5)
        raise PlacementError(f"cache-dit runs past {plan.chosen.name}, which loads weights: allow more memory")
    for handler in logging.getLogger("CACHE_DIT").handlers:  # which all of its loggers share
        handler.setLevel(logging.ERROR)
    config = cache_dit.DBCacheConfig(num_inference_steps=bench.num_steps, Bn_compute_blocks=0, **settings)
    pipe = bench.runner.pipe
    with _put_back(pipe):
        try:
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            yield
        finally:
            cache_dit.disable_cache(pipe)


@contextmanager
def _put_back(pipe: Any) -> Iterator[None]:
    """What cache-dit (1.5) leaves in denoisers: forwards of its own, and blocks in another order than they are run in.

    Policies that look into a denoiser, such as TeaCache, take the first of its blocks for what is computed first.
    """
    modules = [module for _, model in denoisers(pipe) for module in model.modules()]
    before = [(vars(module), dict(vars(module))) for module in modules]
    children = [(module._modules, dict(module._modules)) for module in modules]
    try:
        yield
    finally:
        for own, attributes in before:
            for name in _REPLACED & own.keys():
                del own[name]
            own.update({name: attributes[name] for name in _REPLACED & attributes.keys()})
        for held, ordered in children:
            held.clear()
            held.update(ordered)


def _db_cache(name: str, source: str, calibrator: Callable[[], Any] | None) -> None:
    @add_method(name, f"{source}, cache-dit", Threshold(low=1e-4, high=5.0), package="cache_dit")
    def _(bench: Bench, threshold: float) -> Any:
        made = calibrator() if calibrator else None
        return _cache_dit(bench, made, Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=threshold)


# Of the text stream too by default, which fails where the last block does not return that
def _taylor_calibrator() -> Any:
    import cache_dit

    return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1, enable_encoder_calibrator=False)


def _dmd_calibrator() -> Any:
    from cache_dit.caching.cache_contexts.calibrators import DMDCalibratorConfig

    return DMDCalibratorConfig(enable_encoder_calibrator=False)


def _foca_calibrator() -> Any:
    from cache_dit.caching.cache_contexts.calibrators import FoCaCalibratorConfig

    return FoCaCalibratorConfig(enable_encoder_calibrator=False)


_db_cache("cache-dit-dbcache", "DBCache", None)
_db_cache("cache-dit-taylorseer", "DBCache with TaylorSeer", _taylor_calibrator)
_db_cache("cache-dit-dmd", "DBCache with DMD", _dmd_calibrator)
_db_cache("cache-dit-foca", "DBCache with FoCa", _foca_calibrator)


def _static_mask(name: str, source: str, calibrator: Callable[[], Any] | None) -> None:
    @add_method(name, f"{source}, cache-dit", Interval(low=1, high=16), package="cache_dit")
    def _(bench: Bench, interval: float) -> Any:
        import cache_dit

        gaps = -(-(bench.num_steps - 4) // (int(interval) + 1))
        mask = cache_dit.steps_mask(
            compute_bins=[4, *[1] * gaps], cache_bins=[int(interval)] * gaps, total_steps=bench.num_steps
        )
        made = calibrator() if calibrator else None
        return _cache_dit(
            bench, made, Fn_compute_blocks=1, max_warmup_steps=0, steps_computation_mask=mask,
            steps_computation_policy="static",
        )  # fmt: skip


_static_mask("cache-dit-mask", "static step mask", None)
_static_mask("cache-dit-mask-taylorseer", "static step mask with TaylorSeer", _taylor_calibrator)
