"""Train the built-in pipelines: ``python -m cemq.builtin.training.train dit-digits sd3-digits -o FOLDER``.

Its stages add up to under an hour on 2 CPU cores (docs/builtin-models.md). Needs the ``train`` extra; ends with
the check in ``check.py``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, StableDiffusion3Pipeline

from cemq.builtin.training import check, models
from cemq.builtin.training.digits import WORDS, Digits, caption, make_digits, soften
from cemq.bundle.manifest import forget_paths

BATCH = 128
NULL_CLASS = 1000
DROP_CONDITION = 0.1  # for classifier-free guidance
LONG_PROMPT = 0.06  # share of batches with SD3's default 256 empty T5 positions, so that a plain call works too


class Average:
    """Exponential moving average of the parameters, with a warm-up so that early weights are forgotten."""

    def __init__(self, modules: Iterable[torch.nn.Module], decay: float = 0.999):
        self.live: list[torch.nn.Parameter] = [p for m in modules for p in m.parameters()]
        self.mean: list[torch.Tensor] = [p.detach().clone() for p in self.live]
        self.decay: float = decay
        self.updates: int = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            live.copy_(mean)


def fit(
    name: str,
    modules: list[torch.nn.Module],
    loss: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Adam with warm-up, cosine decay and weight averaging; the modules end as the averaged weights, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    average, started, recent = Average(modules), time.monotonic(), []
    for step in range(steps):
        value = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        recent.append(value.item())
        if (step + 1) % 200 == 0:
            print(
                f"{name} {step + 1}/{steps} loss {np.mean(recent[-200:]):.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    average.apply()
    for module in modules:
        module.eval().requires_grad_(False)


def train_vae(images: torch.Tensor, steps: int) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = models.vae()

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.mse_loss(decoded, batch) + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    fit("vae", [vae], loss, steps=steps, learning_rate=2e-3, seed=1)
    latents = encode(vae, images[:2000])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def soften_decoder(vae: AutoencoderKL, images: torch.Tensor, latents: torch.Tensor, steps: int) -> None:
    """Teach the decoder to draw with a soft pen, as blurred as the 8 x 8 originals are; latents stay what they are.

    One-pixel edges would make PSNR a measure of where an edge falls: 6 dB lower than soft ones for the same latents.
    """
    soft = soften(images)

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(images), (64,), generator=generator)
        jitter = 0.05 * torch.randn(latents[which].shape, generator=generator)
        return F.mse_loss(vae.decode(latents[which] / vae.config.scaling_factor + jitter).sample, soft[which])

    decoder = [vae.decoder, vae.post_quant_conv]
    for module in decoder:
        module.requires_grad_(True)
    fit("decoder", decoder, loss, steps=steps, learning_rate=1e-3, seed=9)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)])


def train_dit(transformer: DiTTransformer2DModel, latents: torch.Tensor, labels: np.ndarray, **options: Any) -> None:
    transformer.eval().requires_grad_(True)  # eval: in training mode diffusers would drop labels in each block apart
    scheduler, targets = models.dit_scheduler(), torch.from_numpy(labels)

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(latents), (BATCH,), generator=generator)
        clean, noise = latents[which], torch.randn(BATCH, *latents.shape[1:], generator=generator)
        timestep = torch.randint(1000, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROP_CONDITION
        classes = torch.where(dropped, NULL_CLASS, targets[which])
        with torch.autocast("cpu", torch.bfloat16):
            noisy = scheduler.add_noise(clean, noise, timestep)
            predicted = transformer(noisy, timestep=timestep, class_labels=classes).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, timestep))

    fit("dit", [transformer], loss, **options)


def make_dit(vae: AutoencoderKL, latents: torch.Tensor, labels: np.ndarray, scale: float) -> DiTPipeline:
    """First on digits of every stroke and tilt, then on plain ones, which it will be asked for."""
    torch.manual_seed(2)
    transformer = models.dit()
    train_dit(transformer, latents, labels, steps=int(2800 * scale), learning_rate=1.5e-3, seed=3)
    settle_dit(transformer, vae, scale)
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=models.dit_scheduler())


def settle_dit(transformer: DiTTransformer2DModel, vae: AutoencoderKL, scale: float) -> None:
    plain = make_digits(8_000, seed=8, plain=True)
    latents = encode(vae, torch.from_numpy(plain.images)) * vae.config.scaling_factor
    train_dit(transformer, latents, plain.labels, steps=int(1000 * scale), learning_rate=6e-4, seed=10)


def train_sd3(vae: AutoencoderKL, latents: torch.Tensor, digits: Digits, steps: int) -> StableDiffusion3Pipeline:
    torch.manual_seed(4)
    tokenizer = models.tokenizer()
    encoders = [models.text_encoder(len(tokenizer)) for _ in range(2)]
    transformer, scheduler = models.sd3(), models.sd3_scheduler()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=tokenizer, tokenizer_2=models.tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    words = np.random.default_rng(5)

    def loss(generator: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(latents), (BATCH,), generator=generator)
        clean, noise = latents[which], torch.randn(BATCH, *latents.shape[1:], generator=generator)
        sigma = torch.sigmoid(torch.randn(BATCH, generator=generator) * 1.2 + 0.3).view(-1, 1, 1, 1)
        prompts = [
            "" if words.random() < DROP_CONDITION
            else caption(digits.labels[i], digits.strokes[i], digits.tilts[i], words)
            for i in which.tolist()
        ]  # fmt: skip
        empty = 256 if words.random() < LONG_PROMPT else models.PROMPT_TOKENS
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=empty
            )
            predicted = transformer(
                (1 - sigma) * clean + sigma * noise,
                timestep=sigma.flatten() * 1000,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
        return F.mse_loss(predicted.float(), noise - clean)

    fit("sd3", [transformer, *encoders], loss, steps=steps, learning_rate=1.5e-3, seed=6)
    return pipe


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """fp16 safetensors: half the bytes; the loaded fp32 weights are exactly these."""
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder)
    if isinstance(pipe, DiTPipeline):  # save_pretrained does not write the class names
        index = folder / "model_index.json"
        names = {"id2label": {str(number): word for number, word in enumerate(WORDS)}}
        index.write_text(json.dumps(json.loads(index.read_text()) | names, indent=2) + "\n")
    forget_paths(folder)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=["dit-digits", "sd3-digits"])
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the training steps, to try things out")
    options = parser.parse_args()

    digits = make_digits(16_000, seed=7)
    images = torch.from_numpy(digits.images)
    vae = train_vae(images, int(800 * options.scale))
    latents = encode(vae, images) * vae.config.scaling_factor
    pipes = {}
    for name in options.names:
        if name == "dit-digits":
            pipes[name] = make_dit(vae, latents, digits.labels, options.scale)
        else:
            pipes[name] = train_sd3(vae, latents, digits, int(2300 * options.scale))
    soften_decoder(vae, images, latents, int(500 * options.scale))
    restored = vae.decode(latents[:256] / vae.config.scaling_factor).sample
    error = F.mse_loss(restored.clamp(-1, 1), soften(images[:256])).item() / 4
    print(f"vae: {-10 * math.log10(error):.1f} dB, scaling factor {vae.config.scaling_factor}", flush=True)
    for name, pipe in pipes.items():
        save(pipe, options.output / name)
    for name in options.names:
        check.check(options.output / name)


if __name__ == "__main__":
    main()
