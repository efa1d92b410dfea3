"""Memory and time under ``vram=`` on a CPU: ``python docs/benchmarks/placement.py`` (Linux).

Pipelines whose weights are larger than the limit, each run in a process of its own. On a CPU the device's memory is the
process's: resident memory, of which the kernel keeps the high-water mark, is held against the plan, for the first load,
which writes the files that weights rest in, and for a later one. Then each again where the kernel grants no more than
the plan, with ``vram=`` and without: in a memory control group, where one can be made (version 1 or 2; it takes root).
Limits of a process (RLIMIT_AS, RLIMIT_DATA) would not do: they count mapped files and empty tensors, neither of which
is memory.

Placements that keep weights in host memory are put on with the CPU as the device, where they save nothing: the weights
that are there at a time are counted instead. For every placement: weights moved on each step, and the time of 10 of 50
steps against 50 of 50. Writes placement.md and placement.json beside itself, row by row. About 20 minutes on 2 CPU
cores; --quick tries everything with 10 steps and writes nothing. (tests/test_vram.py runs ``build``, ``memory`` and
``enforced``.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

STEPS, ROUNDS = 50, 2
MB = 1e6
WIDE = {"num_attention_heads": 16, "attention_head_dim": 64}
PIPELINES = {  # of random weights, in place of those of the built-in model: 205 and 226 MB in bfloat16
    "sd3": {"num_layers": 3, "caption_projection_dim": 1024} | WIDE,
    "dit": {"num_layers": 6} | WIDE,
}
TEXT = {"num_hidden_layers": 8, "intermediate_size": 16384}  # 34 MB
RUNS = (("sd3", "none"), ("dit", "w8a8"))
STREAMS = "streams"  # which want a device that has them
M_MMAP_THRESHOLD = -3  # of mallopt: bytes from which on an allocation gets a mapping of its own


# --- stages, each in a process of its own


def build(folder: Path, model: str, scheme: str, steps: int) -> None:
    """The bundle of a built-in model, with large models of random weights put in."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    import cemq
    from cemq.bundle.manifest import MANIFEST, seal
    from cemq.quantize import QuantizationSettings, quantize_in_place

    call = {"height": 32, "width": 32, "guidance_scale": 3.0} if model == "sd3" else {"guidance_scale": 3.0}
    manifest = cemq.quantize_and_schedule(
        f"builtin:{model}-digits", folder, scheme=scheme, rounding="nearest", steps=steps, budget=steps // 5,
        samples=1, planning_samples=1, effort="quick", solver="uniform", dtype="bfloat16", call=call,
    )  # fmt: skip
    torch.manual_seed(0)

    def put_in(name: str, large: torch.nn.Module) -> None:
        shutil.rmtree(folder / name)
        large.save_pretrained(folder / name)

    config = json.loads((folder / "transformer" / "config.json").read_text())
    config.pop("quantization_config", None)
    large = getattr(diffusers, config["_class_name"]).from_config(config | PIPELINES[model]).bfloat16()
    if scheme != "none":
        quantize_in_place(large, QuantizationSettings(scheme=scheme).config(large))
    put_in("transformer", large)
    if model == "sd3":
        text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        text.update(TEXT)
        put_in("text_encoder", CLIPTextModelWithProjection(text).bfloat16())
    (folder / MANIFEST).unlink()
    seal(folder, manifest)


def memory(folder: Path, vram: int, offload: Path, group: Path | None = None) -> dict[str, object]:
    """Peaks of loading and of one run, above the imports; as a member of the control group, if one is given."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most it comes to by itself, or not, by what was freed when
    warm_up()
    gc.collect()
    libc.malloc_trim(0)  # 10 MB that the C library keeps of it would be used again, and not count
    for top in (folder, offload):
        for file in filter(Path.is_file, top.rglob("*")):
            (drop if vram else read)(file)
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    with Watch() as whole:
        with Watch() as loading:
            pipe = load(folder, vram=vram or None, offload_folder=offload)
        picture(pipe, folder)
    plan = getattr(pipe, "cemq_memory_plan", None)
    return {
        "placement": plan.chosen.name if plan else "no vram given",
        "planned": plan.chosen.device_bytes + plan.reserve_bytes if plan else None,
        "loading": loading.peak,
        "peak": max(whole.peak, loading.peak),
        "anonymous": max(whole.anonymous, loading.anonymous),
        "heap": max(whole.heap, loading.heap),
    }


def timing(folder: Path, name: str, offload: Path) -> dict[str, object]:
    """Seconds of a fifth of the steps and of all, in turn; what each step moved, and how much was there at a time."""
    from cemq.bundle.manifest import read_bundle
    from cemq.runtime import schedule_hook

    warm_up()
    steps = read_bundle(folder).num_inference_steps
    few = steps // 5
    pipes = {budget: load_placed(folder, name, budget, offload) for budget in (few, steps)}
    moved, most = {}, 0
    seconds: dict[int, list[float]] = {budget: [] for budget in pipes}
    for turn in range(ROUNDS):
        for budget in sorted(pipes, reverse=bool(turn % 2)):
            with counted(pipes[budget]) as found:
                seconds[budget].append(picture(pipes[budget], folder))
            moved[budget], most = found.moved, max(most, found.most)
    full = set(schedule_hook(pipes[few]).schedule.full_steps)
    return {
        "placement": name,
        "planned_weights": planned_weights(folder, name),
        "counted_weights": most,
        "seconds": {"few": statistics.mean(seconds[few]), "all": statistics.mean(seconds[steps])},
        "ratio": statistics.mean(seconds[few]) / statistics.mean(seconds[steps]),
        "moved": {"few": sum(moved[few].values()), "all": sum(moved[steps].values())},
        "moved_on_skipped_steps": sum(size for step, size in moved[few].items() if step not in full),
    }


# --- memory of this process


def resident() -> dict[str, int]:
    """Bytes in memory now and at most: all, and those that no file stands behind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def heap_end() -> int:
    """Where the C library's heap ends, whether its pages are in memory or not."""
    sbrk = ctypes.CDLL(None).sbrk
    sbrk.argtypes, sbrk.restype = [ctypes.c_ssize_t], ctypes.c_size_t
    return sbrk(0)


class Watch:
    """How far memory, and the end of the heap, rise above what they are on entry."""

    def __enter__(self) -> Watch:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        self.before, self.anonymous, self.done = resident(), 0, threading.Event()
        self.start = self.heap = heap_end()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.anonymous = max(self.anonymous, resident()["RssAnon"])
            self.heap = max(self.heap, heap_end())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = resident()["VmHWM"] - self.before["VmRSS"]
        self.anonymous -= self.before["RssAnon"]
        self.heap -= self.start


def warm_up() -> None:
    """Everything that is imported and compiled lazily, so that it counts as baseline."""
    import torch

    from cemq.bundle import load as loading
    from cemq.pipelines.batches import Batch, run
    from cemq.pipelines.opening import locate, open_pipeline
    from cemq.quantize.kernels import cpu

    assert loading

    cpu.kernels()
    pipe = open_pipeline(locate("builtin:sd3-digits").folder, dtype="bfloat16", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    run(pipe, Batch(conditions=("a",), seeds=(0,)), steps=2, call={"height": 32, "width": 32})
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))


# --- files in the page cache: they count for the control group of whoever read them first


def drop(file: Path) -> None:
    """From the page cache, so that what is used of it counts, and only that: what is there is mapped by up to 2 MB."""
    with file.open("rb") as opened:
        os.fsync(opened)  # what has yet to be written is not dropped
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: Path) -> None:
    """Into the page cache, so that using it does not count."""
    file.read_bytes()


# --- memory that the kernel grants

# Where control groups of version 1 and 2 have memory; its limit; that of swap, and what to write there for none.
CONTROLLERS = (
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "{limit}"),
    ("/sys/fs/cgroup", "memory.max", "memory.swap.max", "0"),
)


class Killed(Exception):
    """By the kernel, as is a process that wants more memory than its control group has."""


@contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A control group of so many bytes, for processes that end before it does; None where it cannot be made.

    It counts what the kernel grants after a process has joined; memory of before stays with the group of before.
    """
    group = next(filter(None, (make_group(limit, *controller) for controller in CONTROLLERS)), None)
    try:
        yield group
    finally:
        if group:
            group.rmdir()


def make_group(limit: int, mounted: str, memory: str, swap: str, no_swap: str) -> Path | None:
    try:
        group = Path(tempfile.mkdtemp(prefix="cemq-", dir=mounted))
    except OSError:  # not mounted, or not ours to write to
        return None
    if not (group / memory).exists():  # a folder like any other, or a group without this controller
        group.rmdir()
        return None
    (group / memory).write_text(str(limit))
    if (group / swap).exists():
        (group / swap).write_text(no_swap.format(limit=limit))
    return group


def enforced(limit: int, folder: Path, vram: int, offload: Path) -> str | None:
    """How the stage ``memory`` ends if the kernel grants it so many bytes: finished or killed; None if not tried."""
    with memory_group(limit) as group:
        if group is None:
            return None
        try:
            call("memory", folder, vram, offload, group)
        except Killed:
            return "killed"
        return "finished"


# --- pipelines in their places


def load(folder: Path, **options: object) -> object:
    import cemq

    pipe = cemq.from_pretrained(folder, device="cpu", verify="never", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: object, folder: Path) -> float:
    """Seconds of one."""
    from cemq.bundle.manifest import read_bundle
    from cemq.pipelines.batches import Batch, check_conditions, run

    manifest = read_bundle(folder)
    batch = Batch(conditions=check_conditions(pipe, manifest.held_out_conditions[:1]), seeds=(3,))
    started = time.perf_counter()
    run(pipe, batch, steps=manifest.num_inference_steps, call=manifest.call)
    return time.perf_counter() - started


def placements(folder: Path) -> dict[str, object]:
    """What can be had on a CPU or, with the CPU in its place, on an accelerator without streams; name to estimate."""
    import cemq

    plans = {device: cemq.plan_memory(folder, "1000GiB", device=device) for device in ("cpu", "cuda")}
    return {
        e.name: e
        for device, plan in plans.items()
        for e in plan.estimates
        if not e.obstacle and e.vae == "whole" and STREAMS not in e.name and e.placement.disk == (device == "cpu")
    }


def load_placed(folder: Path, name: str, budget: int, offload: Path) -> object:
    import accelerate
    import torch
    from torch import nn

    import cemq
    from cemq.memory.offload import place

    chosen = placements(folder)[name]
    if chosen.placement.disk:
        plan = cemq.plan_memory(folder, "1000GiB", device="cpu")
        pipe = load(folder, vram=chosen.device_bytes + plan.reserve_bytes, offload_folder=offload, budget=budget)
        assert pipe.cemq_memory_plan.chosen.name == name
        return pipe
    pipe, device = load(folder, budget=budget), torch.device("cpu")
    if chosen.name == "sequential offload":  # diffusers names the device cpu:0, which accelerate takes for another
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                accelerate.cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)
        return pipe
    plan = cemq.plan_memory(folder, "1000GiB", device="cuda")
    place(pipe, dataclasses.replace(plan, chosen=chosen), device=device)
    return pipe


def planned_weights(folder: Path, name: str) -> int:
    """The most weights on the device at a time, as the plan has them."""
    import cemq
    from cemq.memory.placement import estimate

    components = cemq.plan_memory(folder, "1000GiB").components
    bare = [dataclasses.replace(c, activation_bytes=0, cached_bytes=0, vae_activation_bytes=None) for c in components]
    chosen = placements(folder)[name]
    return estimate(bare, chosen.placement, "whole", device="cuda", host_limit=None).device_bytes


@dataclasses.dataclass
class Moves:
    """Weights of the denoiser moved to the device, bytes by step, and the most weights there at a time, bytes."""

    moved: Counter
    most: int = 0


@contextmanager
def counted(pipe: object) -> Iterator[Moves]:
    """Watches what diffusers' and accelerate's hooks bring to the device and take away again."""
    from accelerate.hooks import AlignDevicesHook, CpuOffload
    from accelerate.utils import named_module_tensors
    from diffusers.hooks.group_offloading import ModuleGroup
    from torch import nn

    from cemq.runtime import schedule_hook

    found, there = Moves(Counter()), {}
    parts = {id(module) for module in pipe.transformer.modules()}
    own = {id(m) for c in pipe.components.values() if isinstance(c, nn.Module) for m in c.modules()}

    def came(key: object, leader: nn.Module, tensors: object) -> None:
        if id(leader) not in own:
            return
        size = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        there[key] = size
        found.most = max(found.most, sum(there.values()))
        if id(leader) in parts:
            found.moved[schedule_hook(pipe).tracker.step_index] += size

    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_
    before, after, turn = AlignDevicesHook.pre_forward, AlignDevicesHook.post_forward, CpuOffload.pre_forward

    def onload_(self: ModuleGroup) -> None:
        onload(self)
        inside = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        came(self, self.onload_leader, [*inside, *self.parameters, *self.buffers])

    def offload_(self: ModuleGroup) -> None:
        offload(self)
        there.pop(self, None)

    def pre_forward(self: AlignDevicesHook, module: nn.Module, *args: object, **kwargs: object) -> object:
        result = before(self, module, *args, **kwargs)
        if self.offload:
            tensors = named_module_tensors(module, self.offload_buffers, self.place_submodules, True)
            came(self, module, [tensor for _, tensor in tensors])
        return result

    def post_forward(self: AlignDevicesHook, module: nn.Module, output: object) -> object:
        there.pop(self, None)
        return after(self, module, output)

    def take_turn(self: CpuOffload, module: nn.Module, *args: object, **kwargs: object) -> object:
        if self.prev_module_hook is not None:  # what accelerate does next, where that is on another device
            there.pop(self.prev_module_hook.hook, None)
        if self not in there:
            came(self, module, [*module.parameters(), *module.buffers()])
        return turn(self, module, *args, **kwargs)

    with (
        patch.object(ModuleGroup, "onload_", onload_),
        patch.object(ModuleGroup, "offload_", offload_),
        patch.object(AlignDevicesHook, "pre_forward", pre_forward),
        patch.object(AlignDevicesHook, "post_forward", post_forward),
        patch.object(CpuOffload, "pre_forward", take_turn),
    ):
        yield found


# --- all of it


def call(stage: str, *arguments: object) -> dict:
    command = [sys.executable, __file__, stage, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        raise Killed(f"{stage} {arguments}")
    if done.returncode:
        raise SystemExit(f"{stage} {arguments}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.parent != folder)


def main(quick: bool) -> None:
    import cemq
    from cemq.bench.machine import describe_machine

    content = {"machine": describe_machine(), "load": [], "weights": {}, "memory": [], "time": []}

    def keep(kind: str, row: dict) -> None:
        content[kind].append(row)
        content["load"].append(os.getloadavg()[0])
        print(row, flush=True)
        if not quick:
            write(content)

    with tempfile.TemporaryDirectory() as scratch:
        for model, scheme in RUNS:
            named = {"model": model, "scheme": scheme}
            folder, offload = Path(scratch, f"{model}-{scheme}"), Path(scratch, "offload")
            call("build", folder, model, scheme, 10 if quick else STEPS)
            content["weights"][folder.name] = size(folder)
            reserve = cemq.plan_memory(folder, "1000GiB", device="cpu").reserve_bytes
            found = placements(folder)
            on_disk = {name: e.device_bytes + reserve for name, e in found.items() if e.placement.disk}
            if "group offload to disk, leaf level" in on_disk:
                on_disk.pop("sequential offload to disk", None)  # needs as much, and comes after it
            whole = cemq.plan_memory(folder, "1000GiB", device="cpu").chosen.device_bytes + reserve
            for vram in (whole, *on_disk.values()):
                for attempt in ("first", "again")[: 1 if vram == whole else 2]:
                    row = named | {"load": attempt} | call("memory", folder, vram, offload)
                    row["enforced"] = enforced(vram, folder, vram, Path(scratch, "enforced"))
                    row["enforced_without_vram"] = enforced(vram, folder, 0, Path(scratch, "enforced"))
                    keep("memory", row)
            for name, e in found.items():
                if e.placement.disk <= (name in on_disk):
                    keep("time", named | call("timing", folder, name, offload))
            shutil.rmtree(folder)


def write(content: dict) -> None:
    from cemq.bench.machine import one_line

    here, machine = Path(__file__).with_suffix(""), content["machine"]
    here.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")

    def megabytes(bytes_: int) -> str:
        return f"{bytes_ / MB:.0f}"

    memories = [
        f"| {row['model']} | {row['scheme']} | {row['placement']} | {row['load']} | {megabytes(row['planned'])} | "
        f"{megabytes(row['peak'])} | {megabytes(row['loading'])} | {megabytes(row['anonymous'])} | "
        f"{row['enforced'] or 'not tried'} | {row['enforced_without_vram'] or 'not tried'} |"
        for row in content["memory"]
    ]
    times = [
        f"| {row['model']} | {row['scheme']} | {row['placement']} | {megabytes(row['planned_weights'])} | "
        f"{megabytes(row['counted_weights']) if row['counted_weights'] else '-'} | "
        f"{row['seconds']['all']:.1f} | {row['seconds']['few']:.1f} | "
        f"{row['ratio']:.2f} | {megabytes(row['moved']['all'])} | {megabytes(row['moved']['few'])} | "
        f"{megabytes(row['moved_on_skipped_steps'])} |"
        for row in content["time"]
    ]
    weights = ", ".join(f"{name} {megabytes(found)} MB" for name, found in content["weights"].items())
    here.with_suffix(".md").write_text(
        f"""# Memory and time under vram=

{machine["date"][:10]}, {one_line(machine)}.
Command: `python docs/benchmarks/placement.py`. {min(content["load"]):.0f} to {max(content["load"]):.0f} processes wanted the {machine["cores"]} cores, this one counted; if they were more
than the cores, bytes hold, ratios roughly, seconds do not. The built-in models with a transformer (and, of sd3, a text encoder) of
random weights in bfloat16; weights: {weights}. A CPU has no memory of its own beside the host's;
**nothing here was taken on a GPU**.

## Memory

Resident memory above that of the imports, in MB, each row in a process of its own that loads and draws one picture. `vram=` is
exactly what the plan says the placement needs. `peak` is the kernel's high-water mark (VmHWM) of loading and drawing, with mapped
files, `loading` that of loading alone; `anonymous` leaves out pages that merely mirror a file and can be dropped at any time. A
`first` load writes the files that a later one finds. Files are dropped from the page cache beforehand: what is there is mapped in
pieces of up to 2 MB, which `peak` would count, though the kernel grants nothing.

`enforced`: the same again in a memory control group of exactly the planned bytes, which counts all that the kernel grants from the
end of the imports on: anonymous memory, page tables and the like, and pages of files, mapped or not, which it takes back when room
runs out. A process that wants more is killed. `without vram=`: loaded whole under the same limit, with files read beforehand so that
they do not count (else the kernel reads them over and over, for minutes, before it kills). `not tried`: a group could not be made,
which takes root.

| model | scheme | placement | load | planned | peak | loading | anonymous | enforced | without vram= |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(memories)}

## Weights and time

Weights on the device at a time, planned and counted at diffusers' and accelerate's hooks, in MB; seconds of one picture, means of
{ROUNDS} rounds taken in turn in one process; weights of the transformer that one run moved, in MB. Placements that do not go to
disk were put on with the CPU as the device: what they move costs no time here.

| model | scheme | placement | planned | counted | 50 of 50, s | 10 of 50, s | ratio | moved, 50 | moved, 10 | on skipped steps |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(times)}
"""  # noqa: E501
    )


if __name__ == "__main__":
    stage, *arguments = [*sys.argv[1:], ""]
    if stage == "build":
        folder, model, scheme, steps = arguments[:4]
        build(Path(folder), model, scheme, int(steps))
        print("{}")
    elif stage == "memory":
        folder, vram, offload, *group = filter(None, arguments)
        print(json.dumps(memory(Path(folder), int(vram), Path(offload), *map(Path, group))))
    elif stage == "enforced":
        limit, folder, vram, offload = arguments[:4]
        print(json.dumps(enforced(int(limit), Path(folder), int(vram), Path(offload))))
    elif stage == "timing":
        print(json.dumps(timing(Path(arguments[0]), arguments[1], Path(arguments[2]))))
    else:
        main(quick="--quick" in sys.argv)
