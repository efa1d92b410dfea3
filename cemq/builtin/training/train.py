"""Train built-in models: ``python -m cemq.builtin.training.train [NAME ...] -o FOLDER``; without a name, all of them.

Trains on CUDA where there is one. Ended at any time, it goes on where it was when the same command is given again: its
checkpoints lie in ``FOLDER/checkpoints``. Needs the ``train`` extra, and ends with the check of ``check.py``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from cemq.builtin.registry import cards
from cemq.builtin.training.check import check, module_of
from cemq.builtin.training.fit import Workshop
from cemq.bundle.manifest import forget_paths
from cemq.pipelines.opening import default_device


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """fp16 safetensors: half the bytes; the loaded fp32 weights are exactly these."""
    copy.deepcopy(pipe).to("cpu", torch.float16).save_pretrained(folder)
    forget_paths(folder)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(cards())}; default: all")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/trained"))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the training steps, to try things out")
    options = parser.parse_args()
    unknown = set(options.names) - cards().keys()
    if unknown:
        parser.error(f"no built-in model {', '.join(sorted(unknown))}: there are {', '.join(cards())}")
    workshop = Workshop(
        folder=options.output / "checkpoints", device=torch.device(default_device()), scale=options.scale
    )
    names = options.names or list(cards())
    for name in names:
        save(module_of(name).train(workshop), options.output / name)
    for name in names:
        check(name, options.output / name, workshop)


if __name__ == "__main__":
    main()
