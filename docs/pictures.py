"""Draws pictures/digits.png, which README and the index open with: ``python docs/pictures.py BUNDLE``.

Above, the first eight samples that `cemq evaluate` takes, in full precision and from the bundle; below, which of its
steps are computed. The bundle shown is that of ``cemq quantize-and-schedule builtin:sd3-digits --scheme w4a8 --budget
10 --effort quick --planning-samples 16 -o out/digits``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import cemq
from cemq.bundle.manifest import Manifest, read_bundle
from cemq.evaluation.pictures import sheet
from cemq.metrics import psnr_db
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, make_batches
from cemq.pipelines.opening import locate, open_pipeline
from cemq.pipelines.outputs import as_levels
from cemq.runtime.runner import Runner

PICTURE = Path(__file__).with_name("pictures") / "digits.png"
SAMPLES = 8


def draw_samples(folder: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the original and of the bundle, (n, height, width, 3) in [0, 1] each."""
    (batch,) = make_batches(
        manifest.held_out_conditions, samples=SAMPLES, first_seed=EVALUATION_SEED_OFFSET, batch_size=SAMPLES
    )
    pipes = (
        open_pipeline(locate(manifest.model).folder, dtype=manifest.dtype, device="cpu"),
        cemq.from_pretrained(folder, device="cpu"),
    )
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    original, scheduled = (
        Runner(pipe=pipe, steps=manifest.num_inference_steps, call=manifest.call).run_one(batch).images
        for pipe in pipes
    )
    return original, scheduled


def drawn(original: np.ndarray, scheduled: np.ndarray, manifest: Manifest) -> Image.Image:
    """Both rows with a line of text above each, and the schedule."""
    schedule = manifest.schedule
    share = manifest.model_bytes / manifest.reference_bytes
    decibels = psnr_db(as_levels(original), as_levels(scheduled)).mean()
    texts = (
        f"full precision, {schedule.num_steps} of {schedule.num_steps} steps computed",
        f"{manifest.scheme.upper()} ({share:.0%} of the bytes), {schedule.budget} of {schedule.num_steps} steps "
        f"computed: {decibels:.1f} dB to the above",
    )
    rows = [(values * 255).round().astype(np.uint8) for values in (original, scheduled)]
    return sheet(list(zip(texts, rows, strict=True)), schedule.strip())


def main(folder: Path) -> None:
    """Run both pipelines and write the picture."""
    manifest = read_bundle(folder)
    original, scheduled = draw_samples(folder, manifest)
    PICTURE.parent.mkdir(exist_ok=True)
    drawn(original, scheduled, manifest).save(PICTURE, optimize=True)
    print(PICTURE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name the bundle: python docs/pictures.py out/digits")
    main(Path(sys.argv[1]))
