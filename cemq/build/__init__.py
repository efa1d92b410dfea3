"""The whole build: record, quantize, profile, plan in closed loop, check, write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from cemq.build import references, stages
from cemq.build.remaining import telling_what_is_left
from cemq.build.settings import BuildSettings, resolve, resolve_recipe
from cemq.build.work import Work, building
from cemq.bundle.manifest import MANIFEST, Manifest
from cemq.errors import InputError
from cemq.files import absolute
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import Progress


def quantize_and_schedule(
    model: str | None = None,
    output: str | Path = "bundle",
    *,
    recipe: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    **settings: Any,
) -> Manifest:
    """Quantize a pipeline, plan its schedule for its own quantization noise, and write the bundle.

    What is finished is kept beside the output until a bundle is written there: the same build goes on from it, whatever
    ended this one, and gives the same bundle.

    Args:
        model: ``builtin:NAME``, a pipeline folder or a Hub id; None takes the recipe's.
        output: The bundle's folder.
        recipe: Name of a shipped recipe or a YAML file; None takes the one shipped for this model, if any.
        device: Where to run; None takes CUDA where there is one.
        overwrite: Replace a bundle of that name once the new one is whole.
        fresh: Begin anew, and remove what unfinished builds have kept for this output.
        progress: Called with the stage's name and the share of it done.
        processes: Those that `cemq.parallel.launched` gives, to run a share of the samples each. The main one writes
            the bundle, which is there when this returns in any of them.
        **settings: Fields of `Recipe`, which win over the recipe's: scheme, steps, budget, solver, predictor, view,
            calib, samples, seed, call, ...

    Raises:
        CemqError: Anything asked for cannot be done; no bundle is written.
    """
    asked = resolve(model, recipe, device, settings)
    with building(Path(output), asked, overwrite=overwrite, fresh=fresh, processes=processes) as work:
        return _build(asked, work, telling_what_is_left(asked, progress) if processes.is_main else progress)


def _build(asked: BuildSettings, work: Work, progress: Progress | None) -> Manifest:
    """Every stage in its turn; what was kept of one is not run again."""
    full = references.FullPrecision(asked, progress, work)
    opened = work.keep("opened", full.describe)
    samples = work.keep("samples", lambda: references.draw_samples(full.runner, asked))
    work.say_what_is_kept(runs=references.count_references(samples, opened, asked))
    originals, fitted = references.run_originals(full, opened, samples)
    folder, checksums = work.keep_folder(references.PIPELINE, partial(stages.write_quantized, full, opened, fitted))
    del fitted  # it may be gigabytes
    work.forget(references.FITTED)
    runner = stages.open_quantized(folder, opened, full)
    prior = work.keep("prior", lambda: stages.profile(runner, samples, originals, asked))
    plans = work.keep("plans", lambda: stages.choose_plans(runner, prior, samples, originals, asked, work.journal))
    checked = work.keep("check", lambda: stages.check(runner, plans, samples, originals, asked))
    manifest = stages.describe(runner, asked, samples, originals, plans, checked)
    if work.processes.is_main:
        stages.write_bundle(folder, plans, manifest, checked, checksums)
    work.finish(folder)
    return manifest


@contextmanager
def bundle_of(
    name: str | Path,
    *,
    check: Callable[[int | None], None],
    scheme: str | None = None,
    recipe: str | None = None,
    device: str | None = None,
    vram: str | int | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Iterator[Path]:
    """The folder itself where it is a bundle's; for a model's name one made of it, for as long as the block lasts.

    Args:
        check: Called with a model's step count, None where its recipe says none, before anything long.
        vram: To build within, as of `quantize_and_schedule`.

    Raises:
        InputError: A scheme or a recipe for a bundle, or what ``check`` raises.
        CemqError: What `quantize_and_schedule` raises.
    """
    if os.path.isfile(absolute(name) / MANIFEST):
        if scheme or recipe:
            raise InputError(f"'{name}' is a bundle already: leave scheme and recipe out, or give the model")
        yield absolute(name)
        return
    check(resolve_recipe(str(name), recipe, {}).steps)
    with tempfile.TemporaryDirectory(prefix="cemq-") if processes.is_main else nullcontext() as mine:
        folder = Path(processes.gather([mine or ""])[0]) / "bundle"
        asked = resolve(str(name), recipe, device, {"scheme": scheme, "also_steps": [], "vram": vram})
        with building(folder, asked, keeps=False, processes=processes) as work:
            _build(asked, work, progress)
        yield folder
        processes.wait()  # until all have read it
