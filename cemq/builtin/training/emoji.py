"""``builtin:emoji``: a FLUX that draws emoji of 64 x 64 pixels in colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from cemq.builtin.training import models
from cemq.builtin.training.autoencoder import as_float, centre, encode, normalise, train_autoencoder
from cemq.builtin.training.drawing import draw
from cemq.builtin.training.emoji_pictures import (
    EMOJI,
    IMAGE_SIZE,
    SIDES,
    SIZES,
    Drawn,
    Studio,
    fetch,
    measured_box,
    measured_colour,
)
from cemq.builtin.training.fit import Stage, Workshop, fit
from cemq.builtin.training.judge import named, train_judge
from cemq.recipe import load_recipe

PICTURES = 14_000
CHANNELS = 8  # of latents
DROP_CAPTION = 0.08  # so that guidance by a second call (true_cfg_scale) works too
# Text positions of a batch, and the share of batches that have them: a plain call of FLUX pads to 512, and all of them
# take part in its attention. Batches are smaller where there are more, for the same time.
TEXT_POSITIONS = {12: 0.9, 16: 0.03, 64: 0.035, 512: 0.035}
TOKENS_OF_BATCH = 3000
SHIFT = 2.0  # of the noise scheduler
CHECK_SAMPLES, CHECK_STEPS = 200, 28
SIZE_EDGES, SIDE_EDGES = (41.0, 56.0), (28.0, 36.0)  # pixels: small | neither | large, left | neither | right
VAE_STEPS, HALF_STEPS, WHOLE_STEPS = 2400, 1800, 2800


def vae() -> AutoencoderKL:
    """64 x 64 RGB to 16 x 16 latents of 8 channels."""
    return models.vae(IMAGE_SIZE, (16, 32, 64), CHANNELS)


def transformer() -> FluxTransformer2DModel:
    """3.8 M parameters; 64 tokens for a picture of 64 x 64 pixels."""
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,  # 2 x 2 latents are one token
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=models.TEXT_WIDTH,
        pooled_projection_dim=models.TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def t5(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(vocab_size=vocabulary_size, feed_forward_proj="gated-gelu", **models.SMALL_T5)
    return T5EncoderModel(config)


def pipeline(autoencoder: AutoencoderKL, words: list[str]) -> FluxPipeline:
    """Everything but the autoencoder untrained."""
    torch.manual_seed(21)
    tokenizer, tokenizer_2 = models.tokenizer(words), models.t5_tokenizer(words)
    pipe = FluxPipeline(
        transformer=transformer(), vae=autoencoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=models.pooling_text_encoder(len(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=t5(len(tokenizer_2)), tokenizer_2=tokenizer_2,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, h, w) as tokens (n, h / 2 * w / 2, 4 c), as FluxPipeline packs them."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Album:
    """What the transformer learns from: pictures as tokens (n, h * w, 4 c), and what is on them."""

    tokens: torch.Tensor
    places: torch.Tensor  # of the tokens: (h * w, 3), as FluxTransformer2DModel takes them
    what: list[Drawn]
    studio: Studio

    @classmethod
    def of(cls, latents: torch.Tensor, what: list[Drawn], studio: Studio) -> Album:
        rows, columns = (torch.arange(side // 2, dtype=torch.float32) for side in latents.shape[2:])
        places = torch.cartesian_prod(torch.zeros(1, dtype=torch.float32), rows, columns)
        return cls(tokens=packed(latents), places=places, what=what, studio=studio)


def train_transformer(workshop: Workshop, stage: Stage, pipe: FluxPipeline, album: Album, share: float) -> None:
    """Flow matching on captions that are made anew each time; the text encoders learn along.

    Args:
        share: Of a picture's tokens that a batch is shown. They know their places, so that the model learns about as
            much from half of them, in little more than half the time; in the end it has to see all.
    """
    shown = round(album.tokens.shape[1] * share)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(True)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        positions = int(rng.choice(list(TEXT_POSITIONS), p=list(TEXT_POSITIONS.values())))
        batch = TOKENS_OF_BATCH // (positions + shown)
        which = torch.randint(len(album.tokens), (batch,), generator=generator)
        tokens = torch.randperm(album.tokens.shape[1], generator=generator)[:shown]
        clean = album.tokens[which][:, tokens].to(workshop.device)
        noise = torch.randn(clean.shape, generator=generator).to(workshop.device)
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2 + 0.3).to(workshop.device)
        prompts = [
            "" if rng.random() < DROP_CAPTION else album.studio.caption(album.what[i], rng) for i in which.tolist()
        ]
        with workshop.precision():
            embeds, pooled, text_places = pipe.encode_prompt(
                prompts, None, device=workshop.device, max_sequence_length=positions
            )
            part = sigma.view(-1, 1, 1)
            predicted = pipe.transformer(
                (1 - part) * clean + part * noise,
                timestep=sigma,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                txt_ids=text_places,
                img_ids=album.places[tokens].to(workshop.device),
            ).sample
        return F.mse_loss(predicted.float(), noise - clean)

    fit(workshop, stage, [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2], loss)


def prepare(workshop: Workshop) -> tuple[Studio, list[Drawn], AutoencoderKL, torch.Tensor]:
    """The autoencoder, and what it is trained on, with its pictures' normalised latents."""
    studio = Studio(fetch(workshop.folder / "noto"))
    what = studio.choose(PICTURES, seed=23)
    images = torch.from_numpy(studio.pictures(what, seed=24))
    torch.manual_seed(25)
    autoencoder = vae()
    stage = Stage(name="emoji-vae", steps=int(VAE_STEPS * workshop.scale), learning_rate=2e-3, seed=26)
    train_autoencoder(workshop, stage, autoencoder, images, batch=8, kl_weight=3e-5)
    return studio, what, autoencoder, normalise(autoencoder, centre(autoencoder, encode(autoencoder, images)))


def train(workshop: Workshop) -> FluxPipeline:
    studio, what, autoencoder, latents = prepare(workshop)
    pipe, album = pipeline(autoencoder, studio.words()), Album.of(latents, what, studio)
    half, whole = int(HALF_STEPS * workshop.scale), int(WHOLE_STEPS * workshop.scale)
    first = Stage(name="emoji-half", steps=half, learning_rate=2e-3, seed=22, last_rate=0.4, decay=0.99)
    train_transformer(workshop, first, pipe, album, 0.5)
    second = Stage(name="emoji-whole", steps=whole, learning_rate=1.2e-3, seed=27, decay=0.995)
    train_transformer(workshop, second, pipe, album, 1.0)
    return pipe


def train_emoji_judge(studio: Studio) -> nn.Module:
    """Names an emoji, whatever its colour; learns from pictures that nothing else is trained on."""
    what = studio.choose(6_000, seed=31)
    images = torch.from_numpy(studio.pictures(what, seed=32))
    labels = torch.tensor([each.emoji for each in what])

    def pictures(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(len(images), (count,), generator=generator)
        return as_float(images[which]), labels[which]

    return train_judge(pictures, channels=3, size=IMAGE_SIZE, classes=len(EMOJI), steps=500)


def shares(judge: nn.Module, pictures: np.ndarray, what: list[Drawn]) -> dict[str, float]:
    """On how many pictures, (n, 64, 64, 3) in [0, 1], there is what was asked for. Only the emoji is seen by a network;
    colour counts where one was asked for."""
    guesses = named(judge, torch.from_numpy(pictures.transpose(0, 3, 1, 2) * 2 - 1).float()).tolist()
    boxes = np.array([measured_box(picture) for picture in pictures])
    sizes = np.digitize(boxes[:, 0], SIZE_EDGES) == [list(SIZES).index(each.size) for each in what]
    sides = np.digitize(boxes[:, 1], SIDE_EDGES) == [1 + SIDES[each.side] for each in what]
    coloured = [measured_colour(p) == w.colour for p, w in zip(pictures, what, strict=True) if w.colour]
    emoji = [guess == each.emoji for guess, each in zip(guesses, what, strict=True)]
    return {
        name: float(np.mean(hits))
        for name, hits in zip(("emoji", "colour", "size", "side"), (emoji, coloured, sizes, sides), strict=True)
    }


def check(pipe: FluxPipeline, workshop: Workshop) -> dict[str, float]:
    """Shares of samples of unseen seeds, called as its recipe does, on which emoji, colour, size and side are what was
    asked for."""
    studio = Studio(fetch(workshop.folder / "noto"))
    what, rng = studio.choose(CHECK_SAMPLES, seed=33), np.random.default_rng(34)
    call = load_recipe("emoji").call
    conditions = {
        "prompt": [studio.describe(each, rng) for each in what],
        "negative_prompt": [call["negative_prompt"]] * CHECK_SAMPLES,
    }
    rest = {name: value for name, value in call.items() if name not in conditions}
    return shares(train_emoji_judge(studio), draw(pipe, conditions, steps=CHECK_STEPS, **rest), what)
