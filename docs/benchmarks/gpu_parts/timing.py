"""Seconds of a call on the device, and what the device's clock was."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_parts import Setting


def milliseconds(call: Callable[[], Any], setting: Setting, *, rounds: int = 9, warm_up: int = 3) -> dict[str, float]:
    """Median and least of some calls, each between two events of the device (on a CPU by its clock)."""
    rounds, warm_up = (2, 1) if setting.tiny else (rounds, warm_up)
    for _ in range(warm_up):
        call()
    if not setting.cuda:
        taken = [1e3 * elapsed(call, setting) for _ in range(rounds)]
        return {"ms": statistics.median(taken), "min_ms": min(taken)}
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    taken = [start.elapsed_time(end) for start, end in events]
    return {"ms": statistics.median(taken), "min_ms": min(taken)}


def graph_milliseconds(call: Callable[[], Any], setting: Setting, *, rounds: int = 9) -> float | None:
    """Median of replays of the call as a CUDA graph: what the device needs, without the host; None on a CPU."""
    if not setting.cuda:
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay, setting, rounds=rounds)["ms"]


def elapsed(call: Callable[[], Any], setting: Setting) -> float:
    """Seconds of one call, the device's work included."""
    setting.synchronize()
    started = time.perf_counter()
    call()
    setting.synchronize()
    return time.perf_counter() - started


def clocks(setting: Setting) -> dict[str, Any]:
    """MHz of the processors and of the memory, watts and degrees, at this moment; nothing where it cannot be asked."""
    names = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
    if not setting.cuda:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        return dict(zip(names, map(float, found[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
