"""Seconds of loading a bundle: ``python docs/benchmarks/loading.py``.

Builds a DiT pipeline of about 700 MB in bfloat16 with random weights and a W8A8 bundle of it, then loads both in turn,
in one process: the bundle with each word of ``verify=``, the full-precision folder by diffusers alone; and, to compare
with, the bundle's bytes are read. First with all files in the page cache, then with none of them there. Writes
loading.md and loading.json beside itself. About 5 minutes on 2 CPU cores; --quick tries everything on a small model and
writes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 7
MB = 1e6
LAYERS, LAYERS_QUICK = 14, 1
READ, DIFFUSERS = "read the bundle's bytes", "diffusers, full precision"


def build(source: Path, bundle: Path, layers: int) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    import cemq

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
    DiTPipeline(transformer.bfloat16(), vae.bfloat16(), DDIMScheduler()).save_pretrained(source)
    cemq.quantize_and_schedule(
        str(source), bundle, scheme="w8a8", rounding="nearest", steps=2, budget=2, samples=1, planning_samples=1,
        solver="uniform", rectify="none", also_steps=[], dtype="bfloat16", device="cpu",
    )  # fmt: skip
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

    found: dict[str, Callable[[], object]] = {
        READ: lambda: read(bundle),
        DIFFUSERS: lambda: DiTPipeline.from_pretrained(source, dtype=torch.bfloat16),
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
        from_disk = {name: cold(source if name == DIFFUSERS else bundle, load) for name, load in warm.items()}
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
Command: `python docs/benchmarks/loading.py`. A DiT pipeline of {sizes["model"] / MB:.0f} MB (bfloat16, random weights) and a W8A8
bundle of it, {sizes["bundle"] / MB:.0f} MB, loaded onto the CPU in one process, taking turns; medians of {content["rounds"]} rounds.
{min(content["load"]):.1f} to {max(content["load"]):.1f} processes wanted the {machine["cores"]} cores, this one counted; if they were more than the cores,
ratios hold roughly, seconds do not.

`in the page cache`: all files have been read before. `on the disk`: they are dropped from there first.

| files | | median, s | to diffusers | to reading |
|---|---|---|---|---|
{chr(10).join(lines)}

`always` reads every file for its SHA-256 and again to load it; `once` finds a stamp of an earlier load and compares what the
system says of each file ([what is kept](../bundle-format.md#cemqjson)); `never` compares sizes alone. `diffusers` loads the
full-precision folder, which has more bytes, and verifies nothing.
"""  # noqa: E501
    )


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
