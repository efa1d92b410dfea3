"""Clips of moving digits, drawn so that their captions are true.

The centre lines are those of ``digits.py``; stroke and direction of every clip are chosen first, and the digit then
goes straight through the middle at constant speed, or stands still where the caption names no direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cemq.builtin.training.digits import IMAGE_SIZE, WORDS, centre_lines

FRAMES = 13  # 4 k + 1, as Wan's autoencoder wants
STROKES = {"thin": (0.5, 0.6), "": (1.0, 1.15), "bold": (1.7, 1.9)}  # half-width of the line, pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "": (0, 0)}  # (x, y), y pointing down
STILL = 0.1  # share of the clips; those that move share the rest
HALF_HEIGHT = 7.8  # of a digit, pixels
HALF_WAY = (5.3, 5.9)  # from the middle to where a digit starts and ends, pixels
PEN_SOFTNESS = 0.8  # pixels: a softer one than in `digits.py` would fill the loops of these smaller digits
LEAST_WAY = 5.5  # pixels that the centre of mass has to go to count as moving, half of what is drawn; less is still


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Ink in levels 0 to 255, shape (n, 13, 32, 32), uint8, and what was drawn on each clip."""

    ink: torch.Tensor
    labels: np.ndarray
    strokes: np.ndarray  # index into STROKES
    directions: np.ndarray  # index into DIRECTIONS

    def __len__(self) -> int:
        return len(self.ink)

    def __getitem__(self, which: torch.Tensor) -> torch.Tensor:
        """White on black in [-1, 1], shape (len(which), 3, 13, 32, 32), as a Wan autoencoder takes them."""
        return (self.ink[which] / 127.5 - 1)[:, None].expand(-1, 3, -1, -1, -1)


def draw_clip(line: np.ndarray, half_width: float, direction: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One clip, shape (13, 32, 32), in [0, 1]; line as from `centre_lines`."""
    points = line * HALF_HEIGHT * rng.uniform(0.94, 1.04, size=2)
    points[:, 0] -= rng.uniform(-0.1, 0.1) * points[:, 1]
    middle = (IMAGE_SIZE - 1) / 2 + rng.uniform(-0.6, 0.6, size=2)
    way = np.linspace(-1, 1, FRAMES)[:, None] * rng.uniform(*HALF_WAY) * np.array(direction)
    axis = np.arange(IMAGE_SIZE, dtype=np.float32)
    frames = []
    for place in middle + way if any(direction) else [middle]:
        x, y = (points + place).T.astype(np.float32)
        squared = ((axis[:, None] - x) ** 2)[None, :, :] + ((axis[:, None] - y) ** 2)[:, None, :]
        frames.append(np.clip(half_width + 0.5 - np.sqrt(squared.min(-1)), 0.0, 1.0))
    return np.broadcast_to(np.stack(frames), (FRAMES, IMAGE_SIZE, IMAGE_SIZE))


def make_clips(count: int, seed: int) -> Clips:
    """Draw ``count`` clips with digit, stroke and direction chosen at random."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    lines, targets = centre_lines()
    which, strokes = rng.integers(len(lines), size=count), rng.integers(len(STROKES), size=count)
    moving = (1 - STILL) / (len(DIRECTIONS) - 1)
    shares = [moving if any(direction) else STILL for direction in DIRECTIONS.values()]
    directions = rng.choice(len(DIRECTIONS), size=count, p=shares)
    widths, ways = list(STROKES.values()), list(DIRECTIONS.values())
    ink = np.empty((count, FRAMES, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for number, (line, stroke, direction) in enumerate(zip(which, strokes, directions, strict=True)):
        drawn = draw_clip(lines[line], rng.uniform(*widths[stroke]), ways[direction], rng)
        soft = gaussian_filter(drawn.astype(np.float32), (0, PEN_SOFTNESS, PEN_SOFTNESS))
        ink[number] = (soft * 255).round()
    return Clips(ink=torch.from_numpy(ink), labels=targets[which], strokes=strokes, directions=directions)


def caption(label: int, stroke: int, direction: int) -> str:
    """A prompt that is true of the clip: "a bold seven moving left", "a seven"."""
    parts = ["a", list(STROKES)[stroke], WORDS[label]]
    if where := list(DIRECTIONS)[direction]:
        parts += ["moving", where]
    return " ".join(part for part in parts if part)


def words() -> list[str]:
    """Every word of the captions."""
    return ["a", "moving", *WORDS, *filter(None, STROKES), *filter(None, DIRECTIONS)]


def centres(ink: np.ndarray) -> np.ndarray:
    """The centre of mass of every frame, (n, frames, 2) as (x, y) in pixels; ink (n, frames, height, width)."""
    weight = np.maximum(ink.sum((2, 3)), 1e-6)
    x = (ink.sum(2) * np.arange(ink.shape[3])).sum(-1)
    y = (ink.sum(3) * np.arange(ink.shape[2])).sum(-1)
    return np.stack([x, y], -1) / weight[..., None]


def centred(ink: np.ndarray) -> np.ndarray:
    """Every frame moved by whole pixels, so that its centre of mass is in the middle; ink (n, frames, 32, 32)."""
    ways = np.rint((IMAGE_SIZE - 1) / 2 - centres(ink)).astype(int).reshape(-1, 2)
    frames = ink.reshape(-1, *ink.shape[2:])
    moved = [np.roll(frame, (down, right), (0, 1)) for frame, (right, down) in zip(frames, ways, strict=True)]
    return np.stack(moved).reshape(ink.shape)


def measured_directions(ink: np.ndarray) -> np.ndarray:
    """Index into DIRECTIONS of each clip, from where the centre of mass is in the first frame and in the last."""
    tracks = centres(ink)
    way = tracks[:, -1] - tracks[:, 0]
    towards = (way @ np.array(list(DIRECTIONS.values())).T).argmax(1)
    still = list(DIRECTIONS).index("")
    return np.where(np.abs(way).max(1) < LEAST_WAY, still, towards)
