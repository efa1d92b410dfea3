"""Are the built-in models really trained? ``python -m cemq.builtin.training.check [NAME ...]``; without a name, all.

Each model's module says what is looked at, its card what share of the samples is required. ``--record`` writes what
was found into the card.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import torch

from cemq.builtin.registry import FOLDER, cards, record
from cemq.builtin.training.fit import Workshop
from cemq.pipelines.opening import open_pipeline


def module_of(name: str) -> ModuleType:
    """The module that trains and checks a built-in model."""
    return importlib.import_module(f"cemq.builtin.training.{name.replace('-', '_')}")


def check(name: str, folder: Path, workshop: Workshop) -> dict[str, float]:
    """Print and return the shares of samples on which each thing is what was asked for."""
    pipe = open_pipeline(folder, dtype="float32", device=str(workshop.device))
    pipe.set_progress_bar_config(disable=True)
    found = module_of(name).check(pipe, workshop)
    print(f"{name}: " + ", ".join(f"{what} {share:.1%}" for what, share in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(cards())}; default: all")
    parser.add_argument("--models", type=Path, default=FOLDER, help="where their folders lie; default: in the package")
    parser.add_argument("--work", type=Path, default=Path("out/trained/checkpoints"), help="for what is downloaded")
    parser.add_argument("--record", action="store_true", help="write the shares into the cards")
    options = parser.parse_args()
    workshop, failed = Workshop(folder=options.work, device=torch.device("cpu")), []
    for name in options.names or list(cards()):
        found = check(name, options.models / name, workshop)
        failed += [f"{name}: {what}" for what, least in cards()[name].required.items() if found[what] < least]
        if options.record:
            record(name, found)
    if failed:
        raise SystemExit(f"below what its card requires: {', '.join(failed)}")


if __name__ == "__main__":
    main()
