"""What both digits models share: their pictures, their autoencoder, and who judges them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from cemq.builtin.training import models
from cemq.builtin.training.autoencoder import encode, normalise, train_autoencoder, train_decoder
from cemq.builtin.training.digits import Digits, make_digits, soften
from cemq.builtin.training.fit import Stage, Workshop
from cemq.builtin.training.judge import named, train_judge

CHECK_SAMPLES = 300


def prepare(workshop: Workshop) -> tuple[AutoencoderKL, torch.Tensor, Digits]:
    """The autoencoder, and the digits to train on with their normalised latents."""
    digits = make_digits(16_000, seed=7)
    images = torch.from_numpy(digits.images)
    torch.manual_seed(0)
    vae = models.vae()
    stage = Stage(name="digits-vae", steps=int(800 * workshop.scale), learning_rate=2e-3, seed=1)
    train_autoencoder(workshop, stage, vae, images)
    return vae, normalise(vae, encode(vae, images)), digits


def soften_decoder(workshop: Workshop, vae: AutoencoderKL, latents: torch.Tensor, digits: Digits) -> None:
    """Teach the decoder to draw with a soft pen, as blurred as the 8 x 8 originals are; latents stay what they are.

    One-pixel edges would make PSNR a measure of where an edge falls: 6 dB lower than soft ones for the same latents.
    """
    soft = soften(torch.from_numpy(digits.images))
    stage = Stage(name="digits-decoder", steps=int(500 * workshop.scale), learning_rate=1e-3, seed=9)
    train_decoder(workshop, stage, vae, latents / vae.config.scaling_factor, soft.__getitem__)


@functools.cache
def judge() -> nn.Module:
    digits = make_digits(8_000, seed=12)
    images, labels = torch.from_numpy(digits.images[:, :1]), torch.from_numpy(digits.labels)

    def pictures(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(len(images), (count,), generator=generator)
        return images[which], labels[which]

    return train_judge(pictures, channels=1, size=32, classes=10, steps=600)


def share_named(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures, (n, 32, 32) in [0, 1], on which the judge sees the digit that was asked for."""
    return float((named(judge(), torch.from_numpy(pixels[:, None] * 2 - 1).float()).numpy() == labels).mean())
