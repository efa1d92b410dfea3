"""Limits of memory under which the weights of a bundle and of its original do not lie on the device."""

from __future__ import annotations

from pathlib import Path

import cemq
from cemq.bundle.manifest import read_bundle
from cemq.bundle.original import find_original
from cemq.bundle.plan_memory import plan_original
from cemq.memory.placement import MAPPED


def needed_to_draw(bundle: Path, beside: int = 0) -> int:
    """The least with which a CPU can draw with both, bytes: full precision from the files that its weights are in.

    Args:
        beside: To be added, as long as that changes nothing about where weights lie.
    """
    manifest = read_bundle(bundle)
    whole = {"dtype": manifest.dtype, "device": "cpu", "call": manifest.call, "steps": manifest.num_inference_steps}

    def plans(vram):
        return plan_original(find_original(manifest), vram, **whole), cemq.plan_memory(bundle, vram, device="cpu")

    least = beside + max(
        min(each.device_bytes + plan.reserve_bytes for each in plan.estimates if not each.obstacle)
        for plan in plans("900GiB")
    )
    original, quantized = (plan.chosen.placement for plan in plans(least))
    assert original is MAPPED
    assert quantized.disk
    return least
