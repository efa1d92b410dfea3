"""Seconds to round one FLUX block of each kind, and to fit it by GPTQ."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from cemq.bench.random_models import empty_model, quantization_config
from cemq.quantize.in_diffusers import quantizable
from cemq.quantize.layers import InputStatistics
from gpu_parts import Case, Rows, Setting
from gpu_parts.steps import architecture
from gpu_parts.timing import elapsed

TOKENS = 4608


def cases(setting: Setting) -> list[Case]:
    return [
        Case(labels={"scheme": scheme, "how": how}, measure=partial(_block, setting, scheme, how))
        for scheme in ("w8a8", "w4a8")
        for how in ("nearest", "gptq")
    ]


def _block(setting: Setting, scheme: str, how: str) -> Rows:
    model = empty_model(architecture("flux-dev", setting.tiny))
    config = quantization_config(model, "native", scheme)
    first = {f"{name}.0": getattr(model, name)[0] for name in ("transformer_blocks", "single_transformer_blocks")}
    generator = torch.Generator(setting.device).manual_seed(0)
    tokens = 64 if setting.tiny else TOKENS
    for name, block in first.items():
        taken = hessians = layers = parameters = 0
        for layer, linear, kind in quantizable(model, config):
            if not layer.startswith(name + ".") or kind.activation_bits != 8:
                continue
            weight = torch.randn(linear.weight.shape, generator=generator, device=setting.device).bfloat16()
            float_layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            float_layer.weight = nn.Parameter(weight, requires_grad=False)
            statistics = None
            if how == "gptq":
                values = torch.randn(tokens, linear.in_features, generator=generator, device=setting.device)
                found: list[torch.Tensor] = []
                hessians += elapsed(lambda: found.append(values.t() @ values), setting)  # noqa: B023
                largest = values.abs().amax(0)
                statistics = InputStatistics(largest=(float(largest.max()),), channel_largest=largest, hessian=found[0])
            make = partial(config.layer_class(kind).from_linear, float_layer, kind, statistics)
            taken += elapsed(make, setting)
            layers, parameters = layers + 1, parameters + weight.numel()
        yield {
            "block": type(block).__name__, "layers": layers, "parameters": parameters, "seconds": taken,
            "hessian_seconds": hessians if how == "gptq" else None,
        }  # fmt: skip
