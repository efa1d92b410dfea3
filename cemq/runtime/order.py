"""Keeping the schedule outermost on a denoiser, whatever offloading is put on it, before or after or between runs.

Offloading wraps ``forward`` too: diffusers' group offloading by the same `HookRegistry`, accelerate by an attribute
of its own, anew after every run. Whatever lies outside the schedule moves weights on steps that are skipped.
"""

from __future__ import annotations

from typing import Any

from diffusers.hooks.hooks import HookRegistry, ModelHook

HOOK = "cemq_schedule"
_CUSHION = "cemq_schedule_cushion"


class _Cushion(ModelHook):
    """Lies right below the schedule and does nothing.

    A hook that removes itself while it runs (diffusers' tracing of the order in which groups are loaded) makes its
    registry overwrite what the hook above calls; a hook with a ``new_forward``, such as the schedule, would be cut off.
    """

    outermost: Any = None  # the forward that the model had once the schedule was on it


def put_on(model: Any, hook: ModelHook) -> None:
    """Register ``hook`` above everything that wraps the model's forward now."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    cushion = _Cushion()
    registry.register_hook(cushion, _CUSHION)
    registry.register_hook(hook, HOOK)
    cushion.outermost = model.forward


def take_off(model: Any) -> None:
    """Undo `put_on` and leave what was wrapped around the model since then in place."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    cushion = registry.get_hook(_CUSHION)
    if cushion is None:
        return
    found = model.forward
    below_accelerate = model.__dict__.get("_old_forward") is cushion.outermost
    for name in (HOOK, _CUSHION):
        registry.remove_hook(name, recurse=False)  # sets model.forward to what lay below, if this was the last hook
    if below_accelerate:
        model._old_forward = model.forward
    if found is not cushion.outermost:
        model.forward = found


def keep_outermost(model: Any) -> None:
    """Put the schedule back on top if something was wrapped around it, or was taken away from under it together
    with it; does nothing to a model that has none."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    cushion, hook = registry.get_hook(_CUSHION), registry.get_hook(HOOK)
    if cushion is not None and model.__dict__.get("forward") is not cushion.outermost:
        take_off(model)
        put_on(model, hook)
