"""Seconds of loading a bundle: ``python docs/benchmarks/loading.py``.

Puts a transformer of random weights, some 700 MB in bfloat16, into the built-in DiT and, quantized to W8A8, into a
bundle of it. Then both are loaded in turn, in one process: the bundle with each word of ``verify=``, the full-precision
folder by diffusers alone; and, to compare with, the bundle's bytes are read. First with all files in the page cache,
then with none of them there. Writes loading.md and loading.json beside itself. About 5 minutes on 2 CPU cores; --quick
tries everything on a small model and writes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 7
MB = 1e6
WIDE = {"num_attention_heads": 16, "attention_head_dim": 72}
LAYERS, LAYERS_QUICK = 14, 1
READ, DIFFUSERS = "read the bundle's bytes", "diffusers, full precision"
COPIED = f"{DIFFUSERS}, weights copied"


def build(source: Path, bundle: Path, layers: int) -> None:
    """The built-in model and a bundle of it, both with a large transformer of the same random weights put in."""
    import torch
    from diffusers import DiTPipeline, DiTTransformer2DModel

    import cemq
    from cemq.bundle.manifest import MANIFEST, seal
    from cemq.pipelines.opening import locate
    from cemq.quantize import QuantizationSettings, quantize_in_place

    manifest = cemq.quantize_and_schedule(
        "builtin:dit-digits", bundle, scheme="w8a8", rounding="nearest", steps=4, budget=2, samples=1,
        planning_samples=1, solver="uniform", rectify="none", also_steps=[], dtype="bfloat16", device="cpu",
    )  # fmt: skip
    pipe = DiTPipeline.from_pretrained(locate("builtin:dit-digits").folder, dtype=torch.bfloat16)
    torch.manual_seed(0)
    large = DiTTransformer2DModel.from_config(pipe.transformer.config, num_layers=layers, **WIDE).bfloat16()
    pipe.transformer = large
    pipe.save_pretrained(source)
    quantize_in_place(large, QuantizationSettings(scheme="w8a8").config(large))
    shutil.rmtree(bundle / "transformer")
    large.save_pretrained(bundle / "transformer")
    (bundle / MANIFEST).unlink()
    seal(bundle, manifest)
    time.sleep(3)  # what was written less than two seconds ago is verified again


def files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


def read(folder: Path) -> None:
    """Every byte, into a buffer that is used again."""
    buffer = bytearray(1 << 22)
    for file in files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def drop(folder: Path) -> None:
    """Take what has been written of it from the page cache: the disk has to be read again."""
    for file in files(folder):
        with file.open("rb") as opened:
            os.fsync(opened)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def variants(source: Path, bundle: Path) -> dict[str, Callable[[], object]]:
    import torch
    from diffusers import DiTPipeline

    import cemq

    def load() -> DiTPipeline:
        return DiTPipeline.from_pretrained(source, dtype=torch.bfloat16)

    found: dict[str, Callable[[], object]] = {
        READ: lambda: read(bundle),
        DIFFUSERS: load,
        COPIED: lambda: [weight.clone() for weight in load().transformer.parameters()],
    }
    for verify in ("always", "once", "never"):
        name = f"cemq, verify={verify}"
        found[name] = lambda verify=verify: cemq.from_pretrained(bundle, device="cpu", verify=verify)
    return found


def cold(folder: Path, load: Callable[[], object]) -> Callable[[], object]:
    """``load`` from the disk; dropping the pages takes milliseconds, which count."""

    def loaded() -> object:
        drop(folder)
        return load()

    return loaded


def main(quick: bool) -> None:
    import diffusers

    from cemq.bench.machine import describe_machine
    from cemq.bench.measure import measure

    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # for stamps, which go with the bundle
        source, bundle = Path(scratch, "model"), Path(scratch, "bundle")
        build(source, bundle, LAYERS_QUICK if quick else LAYERS)
        warm = variants(source, bundle)
        from_disk = {name: cold(source if name in (DIFFUSERS, COPIED) else bundle, load) for name, load in warm.items()}
        content = {
            "machine": describe_machine(),
            "bytes": {"model": size(source), "bundle": size(bundle)},
            "rounds": ROUNDS,
            "load": [os.getloadavg()[0]],
            "seconds": {},
        }
        for kind, each in (("in the page cache", warm), ("on the disk", from_disk)):
            timings = measure(each, rounds=2 if quick else ROUNDS, warm_up=1)
            content["seconds"][kind] = {name: timing.seconds for name, timing in timings.items()}
            content["load"].append(os.getloadavg()[0])
            print(kind, {name: round(timing.median, 2) for name, timing in timings.items()}, flush=True)
        assert list(Path(scratch, "cemq", "verified").iterdir()), "nothing was remembered, so once was always"
    if not quick:
        write(content)


def write(content: dict) -> None:
    import statistics

    from cemq.bench.machine import one_line

    here, machine, sizes = Path(__file__).with_suffix(""), content["machine"], content["bytes"]
    here.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    lines = []
    for kind, seconds in content["seconds"].items():
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        lines += [
            f"| {kind} | {name} | {found:.2f} | {found / medians[DIFFUSERS]:.2f} | {found / medians[READ]:.1f} |"
            for name, found in medians.items()
        ]
    here.with_suffix(".md").write_text(
        f"""# Seconds of loading

{machine["date"][:10]}, {one_line(machine)}.
Command: `python docs/benchmarks/loading.py`. The built-in DiT with a transformer of random weights, {sizes["model"] / MB:.0f} MB in
bfloat16, and a W8A8 bundle of the same, {sizes["bundle"] / MB:.0f} MB, loaded onto the CPU in one process, taking turns; medians of {content["rounds"]} rounds.
{min(content["load"]):.1f} to {max(content["load"]):.1f} processes wanted the {machine["cores"]} cores, this one counted; if they were more than the cores, ratios
hold roughly, seconds do not.

`in the page cache`: all files have been read before. `on the disk`: they are dropped from there first.

| files | loaded by | median, s | to diffusers | to reading |
|---|---|---|---|---|
{chr(10).join(lines)}

`always` reads every file for its SHA-256 and again to load it; `once` finds a stamp of an earlier load and compares what the
system says of each file ([what is kept](../bundle-format.md#cemqjson)); `never` compares sizes alone. From the disk, what was read
for its SHA-256 is at hand for the load that follows. `diffusers` loads the full-precision folder, which has more bytes, and verifies
nothing. It maps the files and leaves weights there, for the first run to read; cemq copies those that do not begin at a multiple of 64
bytes, as other kernels would run on them where they lie. `weights copied` does that to all of the former.
"""  # noqa: E501
    )


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
