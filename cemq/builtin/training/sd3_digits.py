"""``builtin:sd3-digits``: a text-to-image SD3 that draws digits."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from cemq.builtin.training import models
from cemq.builtin.training.digits import STROKES, TILTS, WORDS, caption, measured_half_width, measured_tilt
from cemq.builtin.training.digits_parts import CHECK_SAMPLES, prepare, share_named, soften_decoder
from cemq.builtin.training.drawing import draw
from cemq.builtin.training.fit import Stage, Workshop, fit

BATCH = 128
DROP_CONDITION = 0.1  # for classifier-free guidance
LONG_PROMPT = 0.06  # share of batches with SD3's default 256 empty T5 positions, so that a plain call works too
STROKE_EDGES = (1.5, 2.65)  # half-widths between thin | regular | bold, pixels, as measured on drawn digits
TILT_EDGES = (-0.24, 0.24)


def transformer() -> SD3Transformer2DModel:
    """3.0 M parameters."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * models.TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * models.TEXT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def train(workshop: Workshop) -> StableDiffusion3Pipeline:
    """The text encoders learn along."""
    vae, latents, digits = prepare(workshop)
    torch.manual_seed(4)
    tokenizer = models.tokenizer()
    encoders = [models.text_encoder(len(tokenizer)) for _ in range(2)]
    model = transformer()
    pipe = StableDiffusion3Pipeline(
        transformer=model, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), text_encoder=encoders[0],
        text_encoder_2=encoders[1], tokenizer=tokenizer, tokenizer_2=models.tokenizer(), text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip

    def loss(generator: torch.Generator) -> torch.Tensor:
        words = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        which = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator).to(workshop.device)
        sigma = torch.sigmoid(torch.randn(BATCH, generator=generator) * 1.2 + 0.3).view(-1, 1, 1, 1)
        clean, sigma = latents[which].to(workshop.device), sigma.to(workshop.device)
        prompts = [
            "" if words.random() < DROP_CONDITION
            else caption(digits.labels[i], digits.strokes[i], digits.tilts[i], words)
            for i in which.tolist()
        ]  # fmt: skip
        empty = 256 if words.random() < LONG_PROMPT else models.PROMPT_TOKENS
        with workshop.precision():
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, device=workshop.device, do_classifier_free_guidance=False,
                max_sequence_length=empty,
            )  # fmt: skip
            predicted = model(
                (1 - sigma) * clean + sigma * noise,
                timestep=sigma.flatten() * 1000,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
        return F.mse_loss(predicted.float(), noise - clean)

    stage = Stage(name="sd3-digits", steps=int(2300 * workshop.scale), learning_rate=1.5e-3, seed=6)
    fit(workshop, stage, [model, *encoders], loss)
    soften_decoder(workshop, vae, latents, digits)
    return pipe


def check(pipe: StableDiffusion3Pipeline, workshop: Workshop) -> dict[str, float]:
    """Shares of samples on which digit, stroke and tilt are what was asked for; the last two measured without a
    network, from ink area over centre-line length and from second moments."""
    rng = np.random.default_rng(13)
    labels = np.arange(CHECK_SAMPLES) % 10
    strokes, tilts = rng.integers(3, size=CHECK_SAMPLES), rng.integers(3, size=CHECK_SAMPLES)
    prompts = []
    for label, stroke, number in zip(labels, strokes, tilts, strict=True):
        tilt = list(TILTS)[number]
        position = "upright" if tilt == "upright" else f"tilted {tilt}"
        prompts.append(f"a {list(STROKES)[stroke]} {WORDS[label]}, {position}")
    call = {"guidance_scale": 3.0, "height": 32, "width": 32, "max_sequence_length": 16}
    pixels = draw(pipe, {"prompt": prompts}, steps=30, **call).mean(-1)
    measured = np.digitize([measured_half_width(image) for image in pixels], STROKE_EDGES)
    leaning = np.digitize([measured_tilt(image) for image in pixels], TILT_EDGES)
    return {
        "digit": share_named(pixels, labels),
        "stroke": float((measured == strokes).mean()),
        "tilt": float((leaning == tilts).mean()),
    }
