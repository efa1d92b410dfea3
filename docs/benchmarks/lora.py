"""A LoRA on quantized models, beside the layers and fused: ``python docs/benchmarks/lora.py``.

A LoRA is trained for each built-in model, to draw dark digits on white. Pictures are compared with those of the float
model that it is merged into. Writes lora.md and lora.json beside itself. Wants ``pip install 'cemq[lora,train]'``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import nn

from cemq.bench.machine import describe_machine, one_line
from cemq.builtin.training.digits import caption, make_digits
from cemq.builtin.training.models import PROMPT_TOKENS
from cemq.builtin.training.train import encode
from cemq.metrics import psnr_db
from cemq.pipelines.batches import (
    EVALUATION_SEED_OFFSET,
    check_conditions,
    make_batches,
    read_conditions,
    split_conditions,
)
from cemq.pipelines.lora import adapted_layers
from cemq.pipelines.opening import locate, open_pipeline
from cemq.quantize import CemqConfig, quantize_calibrated, record_calls
from cemq.quantize.lora import adaptable
from cemq.recipe import find_calibration, load_recipe
from cemq.runtime.runner import Runner

MODELS, SCHEMES = ("dit-digits", "sd3-digits"), ("w8a8", "w4a8")
STEPS, SAMPLES, RANK = 50, 8, 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
TRAINED = {"dit-digits": (150, 64), "sd3-digits": (60, 16)}  # steps, and samples in each
LEARNING_RATE = 4e-3


def trained(pipe: Any, model: str) -> dict[str, torch.Tensor]:
    """What a LoRA holds that was fitted to digits in dark on white."""
    transformer, words = copy.deepcopy(pipe.transformer), np.random.default_rng(0)
    digits = make_digits(2000, seed=5, plain=model == "dit-digits")
    latents = encode(pipe.vae, -torch.from_numpy(digits.images)) * pipe.vae.config.scaling_factor
    steps, samples = TRAINED[model]
    torch.manual_seed(0)
    transformer.requires_grad_(False)
    inject_adapter_in_model(lora_config(), transformer)
    parameters = [each for each in transformer.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def predicted_and_wanted() -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(len(latents), (samples,))
        clean, noise = latents[which], torch.randn(samples, *latents.shape[1:])
        if model == "dit-digits":
            timestep = torch.randint(1000, (samples,))
            noisy, classes = pipe.scheduler.add_noise(clean, noise, timestep), torch.from_numpy(digits.labels)[which]
            predicted = transformer(noisy, timestep=timestep, class_labels=classes).sample
            return predicted, pipe.scheduler.get_velocity(clean, noise, timestep)
        sigma = torch.sigmoid(torch.randn(samples) * 1.2 + 0.3).view(-1, 1, 1, 1)
        told = [caption(digits.labels[i], digits.strokes[i], digits.tilts[i], words) for i in which.tolist()]
        with torch.no_grad():
            embeds, _, pooled, _ = pipe.encode_prompt(
                told, None, None, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
            )
        noisy, timestep = (1 - sigma) * clean + sigma * noise, sigma.flatten() * 1000
        predicted = transformer(noisy, timestep=timestep, encoder_hidden_states=embeds, pooled_projections=pooled)
        return predicted.sample, noise - clean

    for step in range(steps):
        loss = F.mse_loss(*predicted_and_wanted())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"{model}: step {step}, loss {loss.item():.4f}", flush=True)
    return get_peft_model_state_dict(transformer, adapter_name="default")


def lora_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)


def put_beside(model: nn.Module, lora: dict[str, torch.Tensor]) -> None:
    with adaptable(model):
        inject_adapter_in_model(lora_config(), model)
        set_peft_model_state_dict(model, lora)
    model.requires_grad_(False)


def merge(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in adapted_layers(model):
            layer.merge()


def measure(model: str) -> list[dict[str, Any]]:
    recipe = load_recipe(model)
    pipe = open_pipeline(locate(f"builtin:{model}").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    lora = trained(pipe, model)
    conditions = check_conditions(pipe, read_conditions(find_calibration(recipe.calib)))
    calibrated, held_out = split_conditions(conditions, profiled=8, seed=0)
    calibration = make_batches(calibrated, samples=8, first_seed=0, batch_size=8)
    evaluation = make_batches(held_out, samples=SAMPLES, first_seed=EVALUATION_SEED_OFFSET, batch_size=8)
    runner = Runner(pipe=pipe, steps=STEPS, call=recipe.call)

    def pictures() -> np.ndarray:
        return np.concatenate([outcome.images for outcome in runner.run(evaluation)])

    def quantized(transformer: nn.Module, scheme: str) -> nn.Module:
        pipe.transformer = copy.deepcopy(transformer)
        with record_calls(pipe.transformer, every=5) as calls:
            runner.run(calibration)
        quantize_calibrated(pipe.transformer, CemqConfig(scheme), calls)
        return pipe.transformer

    plain, fused = pipe.transformer, copy.deepcopy(pipe.transformer)
    put_beside(fused, lora)
    merge(fused)
    for name, layer in list(fused.named_modules()):
        if layer in adapted_layers(fused):
            fused.set_submodule(name, layer.get_base_layer())
    without = pictures()
    pipe.transformer = fused
    expected = pictures()
    rows = []
    for scheme in SCHEMES:
        row: dict[str, Any] = {"model": model, "scheme": scheme, "moves": mean_db(without, expected)}
        transformer = quantized(plain, scheme)
        row["plain"] = mean_db(pictures(), without)
        put_beside(transformer, lora)
        row["beside"] = mean_db(pictures(), expected)
        merge(transformer)
        row["fused"] = mean_db(pictures(), expected)
        quantized(fused, scheme)
        row["built"] = mean_db(pictures(), expected)
        rows.append(row)
        print(row, flush=True)
    return rows


def mean_db(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean(psnr_db(found, expected)))


def page(rows: list[dict[str, Any]], machine: dict[str, Any], minutes: float) -> str:
    steps = " and ".join(str(TRAINED[model][0]) for model in dict.fromkeys(row["model"] for row in rows))
    lines = [
        "# LoRA on quantized models",
        "",
        f"`python docs/benchmarks/lora.py`, {minutes:.0f} minutes, {one_line(machine)}.",
        "",
        f"A LoRA of rank {RANK} for attention and feed-forward layers, fitted in {steps} steps to dark digits",
        "on white, so that it changes every picture.",
        f"{STEPS} steps, all computed, PSNR in dB, the mean of {SAMPLES} samples. Weights by GPTQ.",
        "",
        "The LoRA *beside* the layers is what `load_lora_weights` gives; *fused* is what `fuse_lora` makes of that,",
        "rounded to nearest; *built* was merged in float and then quantized, as `--lora` does. All three are compared",
        "with the float model that the LoRA is merged into, *without* with the float model as it was.",
        "",
        "| model | scheme | picture moved by the LoRA | without | beside | fused | built |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [f"{row[name]:.1f}" for name in ("moves", "plain", "beside", "fused", "built")]
        lines.append(f"| {row['model']} | {row['scheme'].upper()} | " + " | ".join(found) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="Others keep the rows they have.")
    models = parser.parse_args().models
    torch.set_num_threads(1)
    path = Path(__file__).with_suffix(".json")
    record = json.loads(path.read_text()) if path.is_file() else {"rows": [], "minutes": {}}
    for model in models:
        started = time.time()
        record["rows"] = [row for row in record["rows"] if row["model"] != model] + measure(model)
        record |= {"machine": describe_machine(), "minutes": record["minutes"] | {model: (time.time() - started) / 60}}
        path.write_text(json.dumps(record, indent=1) + "\n")
        rows = sorted(record["rows"], key=lambda row: MODELS.index(row["model"]))
        path.with_suffix(".md").write_text(page(rows, record["machine"], sum(record["minutes"].values())))


if __name__ == "__main__":
    main()
