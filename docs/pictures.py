"""Draws pictures/digits.png, which README and the index open with: ``python docs/pictures.py BUNDLE``.

Above, the first eight samples that `cemq evaluate` takes, in full precision and from the bundle; below, which of its
steps are computed. The bundle shown is that of ``cemq quantize-and-schedule builtin:sd3-digits --scheme w4a8 --budget
10 --effort quick --planning-samples 16 -o out/digits``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import cemq
from cemq.bundle.manifest import Manifest, read_bundle
from cemq.metrics import psnr_db
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, make_batches
from cemq.pipelines.opening import locate, open_pipeline
from cemq.pipelines.outputs import as_levels
from cemq.runtime.runner import Runner

PICTURE = Path(__file__).with_name("pictures") / "digits.png"
SAMPLES, ZOOM, GAP, LINE, MARGIN = 8, 3, 6, 34, 16
PAPER, INK, FULL, SKIPPED = "#ffffff", "#333333", "#4051b5", "#dfe2f2"


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


def in_a_row(pictures: np.ndarray) -> Image.Image:
    """Pictures side by side, enlarged without smoothing."""
    large = pictures.repeat(ZOOM, 1).repeat(ZOOM, 2)
    apart = np.pad(large, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=1.0)
    return Image.fromarray((np.concatenate(list(apart), axis=1)[:, :-GAP] * 255).round().astype(np.uint8))


def sheet(original: np.ndarray, scheduled: np.ndarray, manifest: Manifest) -> Image.Image:
    """Both rows with a line of text above each, and the schedule."""
    schedule = manifest.schedule
    share = manifest.model_bytes / manifest.reference_bytes
    decibels = psnr_db(as_levels(original), as_levels(scheduled)).mean()
    rows = [in_a_row(original), in_a_row(scheduled)]
    width, height = rows[0].size
    page = Image.new("RGB", (width + 2 * MARGIN, 2 * height + 4 * LINE + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    texts = (
        f"full precision, {schedule.num_steps} of {schedule.num_steps} steps computed",
        f"{manifest.scheme.upper()} ({share:.0%} of the bytes), {schedule.budget} of {schedule.num_steps} steps "
        f"computed: {decibels:.1f} dB to the above",
        "from noise to picture: dark steps are computed, light ones predicted",
    )
    top = 0
    for text, row in zip(texts, (*rows, None), strict=True):
        pen.text((MARGIN, top + LINE - 8), text, fill=INK, font=font, anchor="ls")
        if row:
            page.paste(row, (MARGIN, top + LINE))
            top += LINE + height
    edges = MARGIN + np.linspace(0, width + 2, schedule.num_steps + 1).round().astype(int)
    for step, (left, right) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        box = (left, top + LINE, right - 3, top + 2 * LINE)
        pen.rectangle(box, fill=FULL if step in schedule.full_steps else SKIPPED)
    return page


def main(folder: Path) -> None:
    """Run both pipelines and write the picture."""
    manifest = read_bundle(folder)
    original, scheduled = draw_samples(folder, manifest)
    PICTURE.parent.mkdir(exist_ok=True)
    sheet(original, scheduled, manifest).save(PICTURE, optimize=True)
    print(PICTURE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name the bundle: python docs/pictures.py out/digits")
    main(Path(sys.argv[1]))
