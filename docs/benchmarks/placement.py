"""Memory and time under ``vram=`` on a CPU: ``python docs/benchmarks/placement.py`` (Linux).

Builds pipelines whose weights are larger than the limit and runs them in processes of their own. On a CPU the device's
memory is the process's, and weights that leave it go to disk: what is measured is resident memory from /proc against
the plan, weights moved on each step, and the time of 10 of 50 steps against 50 of 50. Writes placement.md and
placement.json beside itself. About 10 minutes on 2 CPU cores; --quick tries it on a small model and writes nothing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SCHEMES = ("none", "w8a8")
STEPS, BUDGET, ROUNDS = 50, 10, 2
MB = 1e6
CALL = {"height": 32, "width": 32, "guidance_scale": 3.0}


def build(folder: Path, layers: int) -> None:
    """builtin:sd3-digits with a large transformer of random weights in place of its own."""
    import torch
    from diffusers import SD3Transformer2DModel

    from cemq.models import locate, open_pipeline

    torch.manual_seed(0)
    pipe = open_pipeline(locate("builtin:sd3-digits").folder, dtype="bfloat16", device="cpu")
    config = dict(pipe.transformer.config) | {
        "num_layers": layers, "attention_head_dim": 64, "num_attention_heads": 16, "caption_projection_dim": 1024,
    }  # fmt: skip
    pipe.transformer = SD3Transformer2DModel.from_config(config).bfloat16()
    pipe.save_pretrained(folder)


def bundle(source: Path, target: Path, scheme: str) -> None:
    import cemq

    cemq.quantize_and_schedule(
        str(source), target, scheme=scheme, rounding="nearest", steps=STEPS, budget=BUDGET, samples=1, solver="uniform",
        dtype="bfloat16", call=CALL,
    )  # fmt: skip


def resident() -> dict[str, int]:
    """Bytes in memory now and at most: all, and those that no file stands behind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


class Watch:
    """How far memory rises above what it is on entry."""

    def __enter__(self) -> Watch:
        import gc

        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        self.before, self.anonymous, self.done = resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.anonymous = max(self.anonymous, resident()["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = resident()["VmHWM"] - self.before["VmRSS"]
        self.anonymous -= self.before["RssAnon"]


def warm_up() -> None:
    """Everything that is imported and compiled lazily, so that it counts as baseline."""
    import torch

    from cemq.models import locate, open_pipeline
    from cemq.quantize.kernels import cpu
    from cemq.runtime import load as loading
    from cemq.sampling import Batch, run

    assert loading

    cpu.kernels()
    pipe = open_pipeline(locate("builtin:sd3-digits").folder, dtype="bfloat16", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    run(pipe, Batch(conditions=("a",), seeds=(0,)), steps=2, call=CALL)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))


def picture(pipe: object) -> float:
    from cemq.sampling import Batch, run

    started = time.perf_counter()
    run(pipe, Batch(conditions=("a bold seven",), seeds=(3,)), steps=STEPS, call=CALL)
    return time.perf_counter() - started


def load(folder: Path, vram: int | None, budget: int | None = None, offload: Path | None = None) -> object:
    import cemq

    pipe = cemq.from_pretrained(folder, device="cpu", vram=vram, budget=budget, offload_folder=offload, verify=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def memory(folder: Path, vram: int, offload: Path) -> dict[str, object]:
    """Peaks of loading and of one run, above the imports."""
    warm_up()
    with Watch() as whole:
        with Watch() as loading:
            pipe = load(folder, vram or None, offload=offload)
        picture(pipe)
    plan = getattr(pipe, "cemq_memory_plan", None)
    return {
        "placement": plan.chosen.name if plan else "no vram given",
        "planned": plan.chosen.device_bytes + plan.reserve_bytes if plan else None,
        "loading": loading.peak,
        "loading_anonymous": loading.anonymous,
        "peak": whole.peak,
        "anonymous": max(whole.anonymous, loading.anonymous),
    }


def timing(folder: Path, vram: int, offload: Path) -> dict[str, object]:
    """Seconds of 10 of 50 and 50 of 50 steps, in turn; and what each step moved."""
    from diffusers.hooks import group_offloading

    from cemq.runtime import schedule_hook

    warm_up()
    pipes = {budget: load(folder, vram or None, budget=budget, offload=offload) for budget in (BUDGET, STEPS)}
    moved: dict[int, dict[int, int]] = {budget: {} for budget in pipes}
    watched: list[int] = []
    onload = group_offloading.ModuleGroup.onload_
    parts = {budget: {id(m) for m in pipe.transformer.modules()} for budget, pipe in pipes.items()}

    def counted(self: object) -> object:
        result = onload(self)
        for budget in watched:
            if id(self.onload_leader) in parts[budget]:
                step = schedule_hook(pipes[budget]).tracker.step_index
                size = sum(t.numel() * t.element_size() for t in self.key_to_tensor.values())
                moved[budget][step] = moved[budget].get(step, 0) + size
        return result

    group_offloading.ModuleGroup.onload_ = counted
    seconds: dict[int, list[float]] = {budget: [] for budget in pipes}
    for turn in range(ROUNDS + 1):
        for budget in sorted(pipes, reverse=bool(turn % 2)):
            watched[:] = [budget] if turn == 0 else []
            taken = picture(pipes[budget])
            if turn:
                seconds[budget].append(taken)
    full = set(schedule_hook(pipes[BUDGET]).schedule.full_steps)
    plan = getattr(pipes[BUDGET], "cemq_memory_plan", None)
    return {
        "placement": plan.chosen.name if plan else "no vram given",
        "seconds": {str(budget): statistics.mean(taken) for budget, taken in seconds.items()},
        "ratio": statistics.mean(seconds[BUDGET]) / statistics.mean(seconds[STEPS]),
        "moved_10_of_50": sum(moved[BUDGET].values()),
        "moved_50_of_50": sum(moved[STEPS].values()),
        "moved_on_skipped_steps": sum(size for step, size in moved[BUDGET].items() if step not in full),
    }


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.parent != folder)


def call(stage: str, *arguments: object) -> dict:
    command = [sys.executable, __file__, stage, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(quick: bool) -> None:
    import cemq
    from cemq.bench.machine import describe_machine, one_line

    memories, timings, sizes = [], [], {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        call("build", root / "model", 2 if quick else 4)
        for scheme in SCHEMES:
            folder = root / scheme
            call("bundle", root / "model", folder, scheme)
            sizes[scheme] = size(folder)
            plan = cemq.plan_memory(folder, "1000GiB", device="cpu")
            wanted = {
                e.name: e.device_bytes + plan.reserve_bytes
                for e in plan.estimates
                if e.placement.disk and e.placement.hooks == "groups"
            }
            for vram in (0, *wanted.values()):
                offload = root / f"offload-{scheme}-{vram}"
                for attempt in ("first", "again")[: 2 if vram else 1]:
                    row = {"scheme": scheme, "vram": vram, "load": attempt, **call("memory", folder, vram, offload)}
                    memories.append(row)
                    print(row, flush=True)
                row = {"scheme": scheme, "vram": vram, **call("timing", folder, vram, offload)}
                timings.append(row)
                print(row, flush=True)
    if quick:
        return
    machine = describe_machine()
    here = Path(__file__).with_suffix("")
    content = {"machine": machine, "weights": sizes, "memory": memories, "time": timings}
    here.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")

    def megabytes(bytes_: int | None) -> str:
        return "-" if bytes_ is None else f"{bytes_ / MB:.0f}"

    shown = [
        f"| {row['scheme']} | {row['placement']} | {row['load']} | {megabytes(row['planned'])} | "
        f"{megabytes(row['peak'])} | {megabytes(row['anonymous'])} | {megabytes(row['loading'])} |"
        for row in memories
    ]
    timed = [
        f"| {row['scheme']} | {row['placement']} | {row['seconds'][str(STEPS)]:.1f} | "
        f"{row['seconds'][str(BUDGET)]:.1f} | {row['ratio']:.3f} | {megabytes(row['moved_50_of_50'])} | "
        f"{megabytes(row['moved_10_of_50'])} | {megabytes(row['moved_on_skipped_steps'])} |"
        for row in timings
    ]
    weights = ", ".join(f"{scheme} {megabytes(found)} MB" for scheme, found in sizes.items())
    here.with_suffix(".md").write_text(
        f"""# Memory and time under vram=

{machine["date"][:10]}, {one_line(machine)}.
Command: `python docs/benchmarks/placement.py`. `builtin:sd3-digits` with an SD3 transformer of random weights in
bfloat16; weights: {weights}. A CPU has no memory of its own beside the host's, so weights rest on disk; **nothing
here was taken on a GPU**.

Resident memory above that of the imports, in MB, each row in a process of its own that loads and draws one picture.
`vram=` is what the plan says the placement needs. `peak` counts mapped files, `anonymous` leaves out pages that
merely mirror
a file and can be dropped at any time. A `first` load writes the files that a later one finds: it reads the whole bundle
through a mapping.

| scheme | placement | load | planned | peak | anonymous | peak of loading |
|---|---|---|---|---|---|---|
{chr(10).join(shown)}

Seconds of one picture, means of {ROUNDS} rounds taken in turn in one process; transformer weights moved, MB.

| scheme | placement | 50 of 50 | {BUDGET} of 50 | ratio | moved, 50 | moved, {BUDGET} | on skipped steps |
|---|---|---|---|---|---|---|---|
{chr(10).join(timed)}
"""
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["build"]:
        build(Path(sys.argv[2]), int(sys.argv[3]))
        print("{}")
    elif sys.argv[1:2] == ["bundle"]:
        bundle(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        print("{}")
    elif sys.argv[1:2] in (["memory"], ["timing"]):
        stage = {"memory": memory, "timing": timing}[sys.argv[1]]
        print(json.dumps(stage(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main(quick="--quick" in sys.argv)
