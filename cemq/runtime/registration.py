"""Putting the hook on a denoiser and taking it off again, whatever else replaces forwards there."""

from __future__ import annotations

from typing import Any

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from cemq.errors import ModelError

HOOK = "cemq_schedule"

# How the hooks of diffusers' own step caches are named, and the mark that cache-dit leaves on what it changes.
_CACHE_HOOKS = ("fbc_", "mag_cache", "sea_cache", "taylorseer", "pyramid_attention", "faster_cache", "text_kv_cache")
_CACHE_DIT_MARK = "_is_cached"


def install(denoiser: nn.Module, hook: ModelHook) -> None:
    """Have ``hook`` called in place of the denoiser's forward until `uninstall`.

    Raises:
        ModelError: A cemq schedule is attached already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    if registry.get_hook(HOOK) is not None:
        raise ModelError("a cemq schedule is attached to this pipeline already: detach it first")
    registry.register_hook(hook, HOOK)
    hook.installed = denoiser.forward


def uninstall(denoiser: nn.Module) -> ModelHook | None:
    """Take the hook off and return it; what was put around it later, or in its place, stays as it is."""
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    hook = registry.get_hook(HOOK)
    if hook is None:
        return None
    outer, inner = denoiser.forward, hook.fn_ref.original_forward
    registry.remove_hook(HOOK, recurse=False)
    if denoiser.__dict__.get("_old_forward") is hook.installed:  # accelerate came later, and calls what it keeps there
        denoiser._old_forward = inner
        denoiser.forward = outer
    elif _is_lost(denoiser, hook, outer):
        denoiser.forward = outer
    elif inner == type(denoiser).forward.__get__(denoiser) and denoiser.forward == inner:
        denoiser.__dict__.pop("forward", None)  # as it was: the class's own
    return hook


def reinstall_if_lost(denoiser: nn.Module, hook: ModelHook) -> None:
    """accelerate, on the way out of every offloaded run, puts back the forward that it found before the hook came."""
    if _is_lost(denoiser, hook, denoiser.forward):
        uninstall(denoiser)
        install(denoiser, hook)


def _is_lost(denoiser: nn.Module, hook: ModelHook, outer: Any) -> bool:
    if outer is hook.installed or denoiser.__dict__.get("_old_forward") is hook.installed:
        return False
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    later = HOOK in registry._hook_order and registry._hook_order[-1] != HOOK  # hooks of diffusers that wrap this one
    return not later


def refuse_other_caches(pipe: Any, denoiser: nn.Module) -> None:
    """Raises ModelError if something else skips work in this denoiser: two caches would feed on each other."""
    if getattr(pipe, _CACHE_DIT_MARK, False) or getattr(denoiser, _CACHE_DIT_MARK, False):
        raise ModelError("cache-dit is active on this pipeline: call cache_dit.disable_cache(pipe) first")
    active = getattr(denoiser, "is_cache_enabled", False) or any(
        name.startswith(_CACHE_HOOKS)
        for module in denoiser.modules()
        if "_diffusers_hook" in module.__dict__
        for name in module._diffusers_hook.hooks
    )
    if active:
        raise ModelError("a diffusers cache is enabled on this denoiser: call its disable_cache() first")
