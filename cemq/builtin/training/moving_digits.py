"""``builtin:moving-digits``: a Wan that draws clips of digits which move as the prompt says."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from cemq.builtin.training import models
from cemq.builtin.training.autoencoder import train_autoencoder, train_decoder
from cemq.builtin.training.drawing import draw
from cemq.builtin.training.fit import Stage, Workshop, fit
from cemq.builtin.training.judge import named, train_judge
from cemq.builtin.training.moving_clips import (
    DIRECTIONS,
    FRAMES,
    STROKES,
    Clips,
    caption,
    centred,
    make_clips,
    measured_directions,
    words,
)
from cemq.recipe import load_recipe

CLIPS = 6_000
CHANNELS = 8  # of latents
DROP_CAPTION = 0.1  # for classifier-free guidance
# Text positions of a batch: its share of the batches, and how many clips it has. A plain call of Wan pads to 512, and
# all of them take part in its attention.
TEXT_POSITIONS = {16: (0.97, 32), 512: (0.03, 12)}
SHIFT = 3.0  # of the noise scheduler
VAE_STEPS, STEPS, DECODER_STEPS = 1000, 3000, 900
CHECK_SAMPLES, CHECK_STEPS = 200, 28


def vae() -> AutoencoderKLWan:
    """13 frames of 32 x 32 to 4 of 8 x 8 latents, 8 channels; 0.65 M parameters."""
    return AutoencoderKLWan(
        base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_spatial=4,
    )


def transformer() -> WanTransformer3DModel:
    """2.4 M parameters; 64 tokens for a clip of 13 frames."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=models.TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=480,
        num_layers=6,
        rope_max_seq_len=64,
    )


def umt5(vocabulary_size: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocabulary_size, **models.SMALL_T5)
    return UMT5EncoderModel(config)


def pipeline(autoencoder: AutoencoderKLWan) -> WanPipeline:
    """Everything but the autoencoder untrained."""
    torch.manual_seed(41)
    tokenizer = models.t5_tokenizer(words())
    scheduler = UniPCMultistepScheduler(  # as the published Wan pipelines have
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=umt5(len(tokenizer)), vae=autoencoder, transformer=transformer(),
        scheduler=scheduler,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode(autoencoder: AutoencoderKLWan, clips: Clips) -> torch.Tensor:
    """Latents, not normalised, on the CPU."""
    parts = (clips[part].to(autoencoder.device) for part in torch.arange(len(clips)).split(64))
    return torch.cat([autoencoder.encode(part).latent_dist.mean.cpu() for part in parts])


def normalise(autoencoder: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Set the mean and the deviation of each channel, by which WanPipeline takes latents back; returns them without."""
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    autoencoder.register_to_config(
        latents_mean=[round(each, 4) for each in mean.tolist()],
        latents_std=[round(each, 4) for each in deviation.tolist()],
    )
    mean, deviation = (
        torch.tensor(each).view(-1, 1, 1, 1)
        for each in (autoencoder.config.latents_mean, autoencoder.config.latents_std)
    )
    return (latents - mean) / deviation


def train_transformer(workshop: Workshop, stage: Stage, pipe: WanPipeline, clips: Clips, latents: torch.Tensor) -> None:
    """Flow matching; the text encoder learns along."""
    captions = [caption(*what) for what in zip(clips.labels, clips.strokes, clips.directions, strict=True)]
    parts: list[nn.Module] = [pipe.transformer, pipe.text_encoder]
    for part in parts:
        part.requires_grad_(True)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        positions = int(rng.choice(list(TEXT_POSITIONS), p=[share for share, _ in TEXT_POSITIONS.values()]))
        _, batch = TEXT_POSITIONS[positions]
        which = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[which].to(workshop.device)
        noise = torch.randn(clean.shape, generator=generator).to(workshop.device)
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2 + 0.5).to(workshop.device)
        prompts = ["" if rng.random() < DROP_CAPTION else captions[i] for i in which.tolist()]
        with workshop.precision():
            embeds, _ = pipe.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=positions, device=workshop.device
            )
            part = sigma.view(-1, 1, 1, 1, 1)
            predicted = pipe.transformer(
                (1 - part) * clean + part * noise, timestep=sigma * 1000, encoder_hidden_states=embeds
            ).sample
        return F.mse_loss(predicted.float(), noise - clean)

    fit(workshop, stage, parts, loss)


def train(workshop: Workshop) -> WanPipeline:
    clips = make_clips(CLIPS, seed=42)
    torch.manual_seed(43)
    autoencoder = vae()
    stage = Stage(name="moving-digits-vae", steps=int(VAE_STEPS * workshop.scale), learning_rate=2e-3, seed=44)
    train_autoencoder(workshop, stage, autoencoder, clips, batch=4, kl_weight=1e-4)
    latents = encode(autoencoder, clips)
    pipe = pipeline(autoencoder)
    stage = Stage(name="moving-digits", steps=int(STEPS * workshop.scale), learning_rate=1.5e-3, seed=45, decay=0.997)
    train_transformer(workshop, stage, pipe, clips, normalise(autoencoder, latents))
    stage = Stage(name="moving-digits-decoder", steps=int(DECODER_STEPS * workshop.scale), learning_rate=1e-3, seed=46)
    train_decoder(workshop, stage, autoencoder, latents, clips.__getitem__, batch=4)
    return pipe


def train_moving_judge() -> nn.Module:
    """Names digit and stroke on a frame, as one number; learns from clips that nothing else is trained on.

    Where the digit is says nothing of which it is: frames are centred for it.
    """
    clips = make_clips(3_000, seed=51)
    ink = torch.from_numpy(centred(clips.ink.numpy()))
    both = torch.from_numpy(clips.labels * len(STROKES) + clips.strokes)

    def frames(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(len(clips), (count,), generator=generator)
        moments = torch.randint(FRAMES, (count,), generator=generator)
        return ink[which, moments][:, None] / 127.5 - 1, both[which]

    return train_judge(frames, channels=1, size=32, classes=10 * len(STROKES), steps=600)


def shares(judge: nn.Module, videos: np.ndarray, what: list[tuple[int, int, int]]) -> dict[str, float]:
    """On how many clips, (n, 13, 32, 32, 3) in [0, 1], there is what was asked for: (digit, stroke, direction).

    Digit and stroke are seen by a network, frame by frame, each centred: what most frames show counts, and
    ``throughout`` is the share of clips every frame of which shows the digit. The direction is measured without one.
    """
    ink, (labels, strokes, directions) = videos.mean(-1), (np.array(each) for each in zip(*what, strict=True))
    frames = torch.from_numpy(centred(ink)).reshape(-1, 1, *ink.shape[2:]).float() * 2 - 1
    digits, widths = np.divmod(named(judge, frames).numpy().reshape(ink.shape[:2]), len(STROKES))
    right = digits == labels[:, None]
    return {
        "digit": float((right.mean(1) > 0.5).mean()),
        "throughout": float(right.all(1).mean()),
        "stroke": float(((widths == strokes[:, None]).mean(1) > 0.5).mean()),
        "direction": float((measured_directions(ink) == directions).mean()),
    }


def check(pipe: WanPipeline, workshop: Workshop) -> dict[str, float]:
    """Shares of clips of unseen seeds, called as its recipe does, on which digit, stroke and direction are what was
    asked for; a fifth of them name no direction."""
    rng = np.random.default_rng(52)
    labels = np.arange(CHECK_SAMPLES) % 10
    drawn = (rng.integers(len(each), size=CHECK_SAMPLES) for each in (STROKES, DIRECTIONS))
    what = list(zip(labels.tolist(), *(each.tolist() for each in drawn), strict=True))
    videos = draw(
        pipe, {"prompt": [caption(*each) for each in what]}, steps=CHECK_STEPS, **load_recipe("moving-digits").call
    )
    return shares(train_moving_judge(), videos, what)
