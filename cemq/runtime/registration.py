"""Putting a hook on a denoiser, or on a block, and taking it off again, whatever else replaces forwards there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from cemq.errors import ModelError

HOOK = "cemq_schedule"
_CUSHION = "cemq_schedule_cushion"

# How the hooks of diffusers' own step caches are named, and the mark that cache-dit leaves on the models it changes
# (and on the class of their pipeline, which says nothing of the others of that class).
_CACHE_HOOKS = ("fbc_", "mag_cache", "sea_cache", "taylorseer", "pyramid_attention", "faster_cache", "text_kv_cache")
_CACHE_DIT_MARK = "_is_cached"


class Uncopied:
    """A hook that refuses to be copied or pickled with its module: the copy would run the original's weights."""

    def __deepcopy__(self, memo: Any) -> None:
        raise ModelError("a cemq schedule is attached, and a copy would run the original's weights: detach() it first")

    def __reduce_ex__(self, protocol: Any) -> None:
        raise ModelError("a cemq schedule is attached and cannot be pickled: detach() it first, or load its bundle")


class _Reference(Protocol):
    """What diffusers notes down for a hook that has a ``new_forward``, once it is registered."""

    forward: Callable[..., Any]
    original_forward: Callable[..., Any]


class OutermostHook(Uncopied, ModelHook):
    """A hook that `install` puts above all else on a module, for its ``new_forward`` to be called."""

    fn_ref: _Reference

    def __init__(self) -> None:
        super().__init__()
        self.installed: Any = None  # the module's forward once this hook is in it


class _Cushion(ModelHook):
    """Lies right below the schedule and does nothing.

    A hook that removes itself while it runs (diffusers' tracing of the order in which groups are loaded) makes its
    registry overwrite what the hook above calls; a hook with a ``new_forward``, such as the schedule, would be cut off.
    """


def install(module: nn.Module, hook: OutermostHook) -> None:
    """Have ``hook`` called in place of a module's forward, above everything that wraps it now, until `uninstall`.

    Raises:
        ModelError: A cemq schedule is attached already.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(HOOK) is not None:
        raise ModelError("a cemq schedule is attached to this pipeline already: detach it first")
    registry.register_hook(_Cushion(), _CUSHION)
    registry.register_hook(hook, HOOK)
    hook.installed = module.forward


def installed_hook(module: nn.Module) -> OutermostHook | None:
    """The one that `install` has put on a module."""
    hook = HookRegistry.check_if_exists_or_initialize(module).get_hook(HOOK)
    return hook if isinstance(hook, OutermostHook) else None


def uninstall(module: nn.Module) -> OutermostHook | None:
    """Take the hook off and return it; what was put around it later, or in its place, stays and works as before.

    Diffusers' own removal would cut off what lies above: it overwrites what that calls, be it the hook's forward, what
    that one calls in turn, or something of another kind in between.
    """
    registry, hook = HookRegistry.check_if_exists_or_initialize(module), installed_hook(module)
    if hook is None:
        return None
    forward, references = module.forward, [each.fn_ref for each in registry.hooks.values()]
    linked = [(each, each.forward) for each in references]
    below: Any = registry.hooks[_CUSHION].fn_ref.forward
    for name in (HOOK, _CUSHION):
        registry.remove_hook(name, recurse=False)
    for each, called in linked:
        each.forward = below if called is hook.installed else called
        if each.original_forward is hook.installed:
            each.original_forward = below
    if module.__dict__.get("_old_forward") is hook.installed:  # of accelerate's hooks, which call what they keep there
        module.__dict__["_old_forward"] = below
    hook.fn_ref.forward = below  # for whatever wraps it without saying where it keeps what it wraps
    module.forward = below if forward is hook.installed else forward
    if module.forward == type(module).forward.__get__(module):
        module.__dict__.pop("forward", None)  # as it was: the class's own
    return hook


def keep_outermost(module: nn.Module, hook: OutermostHook) -> None:
    """Put the hook back on top if something was wrapped around it, or if it was lost.

    Whatever lies above it moves weights on skipped steps: diffusers' group offloading, applied later, and accelerate's
    hooks, which come off and on again after every run.
    """
    if module.__dict__.get("forward") is not hook.installed:
        uninstall(module)
        install(module, hook)


def refuse_other_caches(denoiser: nn.Module) -> None:
    """Raises ModelError if something else skips work in this denoiser: two caches would feed on each other."""
    if getattr(denoiser, _CACHE_DIT_MARK, False):
        raise ModelError("cache-dit is active on this pipeline: call cache_dit.disable_cache(pipe) first")
    active = getattr(denoiser, "is_cache_enabled", False) or any(
        name.startswith(_CACHE_HOOKS)
        for module in denoiser.modules()
        if "_diffusers_hook" in module.__dict__
        for name in module.__dict__["_diffusers_hook"].hooks
    )
    if active:
        raise ModelError("a diffusers cache is enabled on this denoiser: call its disable_cache() first")
