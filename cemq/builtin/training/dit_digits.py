"""``builtin:dit-digits``: a class-conditional DiT that draws digits."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from cemq.builtin.training.autoencoder import encode
from cemq.builtin.training.digits import WORDS, make_digits
from cemq.builtin.training.digits_parts import CHECK_SAMPLES, prepare, share_named, soften_decoder
from cemq.builtin.training.drawing import draw
from cemq.builtin.training.fit import Stage, Workshop, fit

BATCH = 128
NULL_CLASS = 1000  # hard-coded in DiTPipeline
DROP_CONDITION = 0.1  # for classifier-free guidance


def transformer() -> DiTTransformer2DModel:
    """2.8 M parameters, with 1000 classes, as the number of the null class wants."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )


def train_transformer(
    workshop: Workshop, stage: Stage, model: DiTTransformer2DModel, latents: torch.Tensor, labels: np.ndarray
) -> None:
    model.eval().requires_grad_(True)  # eval: in training mode diffusers would drop labels in each block apart
    noising, targets = scheduler(), torch.from_numpy(labels)

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator).to(workshop.device)
        timestep = torch.randint(1000, (BATCH,), generator=generator).to(workshop.device)
        dropped = torch.rand(BATCH, generator=generator) < DROP_CONDITION
        classes = torch.where(dropped, NULL_CLASS, targets[which]).to(workshop.device)
        clean = latents[which].to(workshop.device)
        with workshop.precision():
            noisy = noising.add_noise(clean, noise, timestep)
            predicted = model(noisy, timestep=timestep, class_labels=classes).sample
        return F.mse_loss(predicted.float(), noising.get_velocity(clean, noise, timestep))

    fit(workshop, stage, [model], loss)


def train(workshop: Workshop) -> DiTPipeline:
    """First on digits of every stroke and tilt, then on plain ones, which it will be asked for."""
    vae, latents, digits = prepare(workshop)
    torch.manual_seed(2)
    model = transformer()
    first = Stage(name="dit-digits", steps=int(2800 * workshop.scale), learning_rate=1.5e-3, seed=3)
    train_transformer(workshop, first, model, latents, digits.labels)
    plain = make_digits(8_000, seed=8, plain=True)
    of_plain = encode(vae, torch.from_numpy(plain.images)) * vae.config.scaling_factor
    second = Stage(name="dit-digits-plain", steps=int(1000 * workshop.scale), learning_rate=6e-4, seed=10)
    train_transformer(workshop, second, model, of_plain, plain.labels)
    soften_decoder(workshop, vae, latents, digits)
    pipe = DiTPipeline(transformer=model, vae=vae, scheduler=scheduler())
    pipe.register_to_config(id2label={str(number): word for number, word in enumerate(WORDS)})  # to be saved with it
    return pipe


def check(pipe: DiTPipeline, workshop: Workshop) -> dict[str, float]:
    """Share of samples on which a network sees the digit that was asked for."""
    labels = np.arange(CHECK_SAMPLES) % 10
    pixels = draw(pipe, {"class_labels": labels.tolist()}, steps=30, guidance_scale=2.0).mean(-1)
    return {"digit": share_named(pixels, labels)}
