"""How the autoencoders of all built-in models are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan

from cemq.builtin.training.fit import Stage, Workshop, fit

BATCH = 64


class Pictures(Protocol):
    """Images or clips by their numbers: a tensor, or what draws one."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: torch.Tensor, /) -> torch.Tensor: ...


def as_float(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], of those or of levels 0 to 255."""
    return images / 127.5 - 1 if images.dtype == torch.uint8 else images


def train_autoencoder(
    workshop: Workshop,
    stage: Stage,
    vae: AutoencoderKL | AutoencoderKLWan,
    images: Pictures,
    *,
    batch: int = BATCH,
    kl_weight: float = 1e-3,
) -> None:
    """Encoder and decoder together, for the least squared error and latents near a normal distribution."""

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(images), (batch,), generator=generator)
        wanted = as_float(images[which]).to(workshop.device)
        posterior = vae.encode(wanted).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(workshop.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.mse_loss(decoded, wanted) + kl_weight * posterior.kl().sum() / posterior.mean.numel()

    fit(workshop, stage, [vae], loss)


def normalise(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Set the factor by which latents get a standard deviation of one; returns the latents times this."""
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents * vae.config.scaling_factor


@torch.no_grad()
def centre(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Take the mean of every channel out of the encoder's last layer, a 1 x 1 convolution, and put it into the
    decoder's first, which is another; returns the latents without it. White paper is far from zero otherwise."""
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean.to(vae.device)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean.to(vae.device)
    return latents - mean.view(-1, 1, 1)


def train_decoder(
    workshop: Workshop,
    stage: Stage,
    vae: AutoencoderKL | AutoencoderKLWan,
    latents: torch.Tensor,
    wanted: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch: int = BATCH,
) -> None:
    """Teach the decoder alone, from latents that are a little off, to draw what ``wanted`` gives for their numbers.

    Args:
        latents: As the decoder takes them, not normalised.
    """

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(latents), (batch,), generator=generator)
        noisy = latents[which] + 0.05 * torch.randn(latents[which].shape, generator=generator)
        drawn = vae.decode(noisy.to(workshop.device)).sample
        return F.mse_loss(drawn, as_float(wanted(which)).to(workshop.device))

    decoder = [vae.decoder, vae.post_quant_conv]
    for module in decoder:
        module.requires_grad_(True)
    fit(workshop, stage, decoder, loss)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents, not scaled, on the CPU."""
    parts = (as_float(part).to(vae.device) for part in images.split(256))
    return torch.cat([vae.encode(part).latent_dist.mean.cpu() for part in parts])
