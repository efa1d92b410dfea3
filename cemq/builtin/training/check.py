"""Are the built-in models really trained? ``python -m cemq.builtin.training.check [FOLDER ...]``.

A small convolutional network, trained on drawn digits of another seed, names the digit on generated samples. Stroke and
tilt are measured without any network, from ink area over centre-line length and from second moments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cemq.builtin.training.digits import STROKES, TILTS, WORDS, make_digits, measured_half_width, measured_tilt
from cemq.pipelines.opening import open_pipeline

STROKE_EDGES = (1.5, 2.65)  # half-widths between thin | regular | bold, pixels, as measured on drawn digits
TILT_EDGES = (-0.24, 0.24)
REQUIRED_SHARE = 0.85


def classifier(steps: int = 600) -> nn.Module:
    torch.manual_seed(11)
    digits = make_digits(8_000, seed=12)
    images, labels = torch.from_numpy(digits.images[:, :1]), torch.from_numpy(digits.labels)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(steps):
        which = torch.randint(len(images), (128,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(network(images[which]), labels[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def check(folder: Path, samples: int = 300) -> dict[str, float]:
    """Print and return the shares of samples on which digit, stroke and tilt are what was asked for."""
    pipe = open_pipeline(folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(13)
    labels = np.arange(samples) % 10
    strokes, tilts = rng.integers(3, size=samples), rng.integers(3, size=samples)
    generators = [torch.Generator().manual_seed(5_000_000 + i) for i in range(samples)]
    images = []
    for part in np.array_split(np.arange(samples), max(samples // 50, 1)):
        generator = [generators[i] for i in part]
        if hasattr(pipe, "tokenizer"):
            prompts = []
            for i in part:
                tilt = list(TILTS)[tilts[i]]
                position = "upright" if tilt == "upright" else f"tilted {tilt}"
                prompts.append(f"a {list(STROKES)[strokes[i]]} {WORDS[labels[i]]}, {position}")
            arguments = {"prompt": prompts, "guidance_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 16}
        else:
            arguments = {"class_labels": labels[part].tolist(), "guidance_scale": 2.0}
        images.append(pipe(**arguments, num_inference_steps=30, generator=generator, output_type="np").images)
    pixels = np.concatenate(images).mean(-1)

    network = classifier()
    with torch.no_grad():
        guesses = network(torch.from_numpy(pixels[:, None] * 2 - 1).float()).argmax(1).numpy()
    result = {"digit": float((guesses == labels).mean())}
    if hasattr(pipe, "tokenizer"):
        measured = np.digitize([measured_half_width(image) for image in pixels], STROKE_EDGES)
        result["stroke"] = float((measured == strokes).mean())
        result["tilt"] = float((np.digitize([measured_tilt(image) for image in pixels], TILT_EDGES) == tilts).mean())
    print(f"{folder.name}: " + ", ".join(f"{name} {share:.1%}" for name, share in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).parents[1]
    parser.add_argument("folders", nargs="*", type=Path, default=[root / "dit-digits", root / "sd3-digits"])
    failed = [folder.name for folder in parser.parse_args().folders if min(check(folder).values()) < REQUIRED_SHARE]
    if failed:
        raise SystemExit(f"below {REQUIRED_SHARE:.0%}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
