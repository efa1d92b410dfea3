"""Digits drawn so that their captions are true.

scikit-learn's 1,797 handwritten digits (8 x 8 pixels, Alpaydin and Kaynak, UCI, CC BY 4.0) are reduced to their
centre lines; the slant of each is measured and removed. Every training image is then drawn from a centre line with a
stroke width and a slant that were chosen first, so "a bold seven, tilted left" describes it by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

IMAGE_SIZE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = {"thin": (0.9, 1.15), "regular": (1.6, 1.9), "bold": (2.6, 3.0)}  # half-width of the line, pixels
TILTS = {"left": (-0.55, -0.38), "upright": (-0.06, 0.06), "right": (0.38, 0.55)}  # x shift per unit of height
PLAIN = ((1.5, 2.0), (-0.1, 0.1))  # stroke and tilt where no caption names them
PEN_SOFTNESS = 1.3  # pixels
_SUPERSAMPLE = 8


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images in [-1, 1], shape (n, 3, 32, 32), float32, and what was drawn on each of them."""

    images: np.ndarray
    labels: np.ndarray
    strokes: np.ndarray  # index into STROKES
    tilts: np.ndarray  # index into TILTS


def _slant(points: np.ndarray) -> float:
    """Horizontal shift per unit of height of a point cloud, shape (n, 2) as (x, y), y pointing down."""
    x, y = (points - points.mean(0)).T
    return float(-(x * y).mean() / max((y * y).mean(), 1e-6))


def centre_lines() -> tuple[list[np.ndarray], np.ndarray]:
    """The upright centre line of every digit as points (n, 2) in [-1, 1], and the labels."""
    from scipy.ndimage import gaussian_filter, zoom
    from skimage.morphology import skeletonize
    from sklearn.datasets import load_digits

    data = load_digits()
    lines = []
    for image in data.images / 16.0:
        fine = gaussian_filter(zoom(np.pad(image, 1), _SUPERSAMPLE, order=3), 2.0)
        rows, columns = np.nonzero(skeletonize(fine > 0.45 * fine.max()))
        points = np.stack([columns, rows], 1).astype(np.float64)
        points = (points - points.mean(0)) / (4.0 * _SUPERSAMPLE)
        points[:, 0] += _slant(points) * points[:, 1]
        centre = (points.max(0) + points.min(0)) / 2
        lines.append((points - centre) / max(np.abs(points - centre).max(), 1e-6))
    return lines, data.target


def draw(line: np.ndarray, half_width: float, tilt: float, rng: np.random.Generator) -> np.ndarray:
    """One image, shape (32, 32), in [0, 1]; the line is anti-aliased over one pixel."""
    points = line * rng.uniform(0.92, 1.05, size=2)
    points[:, 0] -= tilt * points[:, 1]
    pixels = points * 9.5 + (IMAGE_SIZE - 1) / 2 + rng.uniform(-1.0, 1.0, size=2)
    axis = np.arange(IMAGE_SIZE)
    squared = (axis[None, :, None] - pixels[:, 0]) ** 2 + (axis[:, None, None] - pixels[:, 1]) ** 2
    return np.clip(half_width + 0.5 - np.sqrt(squared.min(-1)), 0.0, 1.0)


def make_digits(count: int, seed: int, *, plain: bool = False) -> Digits:
    """Draw ``count`` digits with stroke and tilt chosen at random; all alike in both if ``plain``.

    Without a caption, strokes and tilts that differ are modes which a sampler falls into by chance: the least error
    early in a run then draws another picture, and fidelity measures luck.
    """
    rng = np.random.default_rng(seed)
    lines, targets = centre_lines()
    which = rng.integers(len(lines), size=count)
    strokes, tilts = rng.integers(3, size=count), rng.integers(3, size=count)
    stroke_ranges, tilt_ranges = list(STROKES.values()), list(TILTS.values())
    if plain:
        stroke_ranges, tilt_ranges = ([common] * 3 for common in PLAIN)
    images = np.stack(
        [
            draw(lines[i], rng.uniform(*stroke_ranges[s]), rng.uniform(*tilt_ranges[t]), rng)
            for i, s, t in zip(which, strokes, tilts, strict=True)
        ]
    )
    images = np.repeat((images * 2 - 1).astype(np.float32)[:, None], 3, axis=1)
    return Digits(images=images, labels=targets[which], strokes=strokes, tilts=tilts)


def soften(images: torch.Tensor) -> torch.Tensor:
    """The same images, (n, 3, 32, 32), drawn with a soft pen: a Gaussian blur of 1.3 pixels."""
    from scipy.ndimage import gaussian_filter1d

    blurred = gaussian_filter1d(gaussian_filter1d(images.numpy(), PEN_SOFTNESS, axis=2), PEN_SOFTNESS, axis=3)
    return torch.from_numpy(blurred)


def caption(label: int, stroke: int, tilt: int, rng: np.random.Generator) -> str:
    """A prompt that is true of the image; each attribute is left out now and then, and nothing is said falsely."""
    stroke_word, tilt_word = list(STROKES)[stroke], list(TILTS)[tilt]
    digit = WORDS[label] if rng.random() < 0.8 else str(label)
    text = f"a {stroke_word} {digit}" if rng.random() < 0.85 else f"a {digit}"
    if rng.random() < 0.85:
        text += ", upright" if tilt_word == "upright" else f", tilted {tilt_word}"
    return text


def measured_half_width(image: np.ndarray) -> float:
    """Half the stroke width in pixels, from ink area over centre-line length; image (32, 32) in [0, 1]."""
    from skimage.morphology import skeletonize

    length = skeletonize(image > image.max() / 2).sum()
    return float(image.sum() / max(length, 1) / 2)


def measured_tilt(image: np.ndarray) -> float:
    """Slant from second moments of the ink; image (32, 32) in [0, 1]; the inverse of ``draw``'s tilt."""
    rows, columns = np.nonzero(image > image.max() / 2)
    if rows.size < 3:
        return 0.0
    return _slant(np.stack([columns, rows], 1).astype(np.float64))
