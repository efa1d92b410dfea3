"""One block and one full denoiser step at the shapes of large models: bfloat16, W8A8 and W4A8, eager and compiled;
fp8 of the two that gain most.

Weights are random. Blocks of one shape are one and the same block: a step costs what it would cost with weights of its
own for each, and building the model, moving it and compiling it cost a few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from cemq.bench.answers import predict, relative_error
from cemq.bench.architectures import ARCHITECTURES, Architecture, Inputs
from cemq.bench.random_models import empty_model, quantization_config, random_model, share_blocks
from gpu_parts import Case, Rows, Setting
from gpu_parts.timing import clocks, elapsed, milliseconds

MODELS = ("flux-dev", "wan-14b", "qwen-image", "sd3.5-medium", "wan-1.3b")
SCHEMES = ("bfloat16", "w8a8", "w4a8")
WITH_FP8 = ("flux-dev", "wan-14b")  # where linear layers take most
TINY = {
    "flux-dev": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
    "wan-1.3b": {"num_layers": 2, "num_attention_heads": 1, "text_dim": 64, "ffn_dim": 128},
    "qwen-image": {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 64},
    "sd3.5-medium": {
        "num_layers": 4, "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 128,
        "pooled_projection_dim": 64, "pos_embed_max_size": 16, "sample_size": 8, "dual_attention_layers": (0, 1),
    },
}  # fmt: skip


def cases(setting: Setting) -> list[Case]:
    """First every model as it is, then every one compiled: if time runs out, each has been seen.

    Of toys only the smallest is compiled.
    """
    models = {False: tuple(TINY), True: ("wan-1.3b",)} if setting.tiny else dict.fromkeys((False, True), MODELS)
    return [
        Case(
            labels={"model": name, "scheme": scheme, "compiled": compiled},
            measure=partial(_model, setting, name, scheme, compiled),
        )
        for compiled, names in models.items()
        for name in names
        for scheme in (*SCHEMES, *(["w8a8-fp8"] if name in WITH_FP8 else []))
    ]


def architecture(name: str, tiny: bool) -> Architecture:
    full = ARCHITECTURES[name]
    if not tiny:
        return full
    sizes = {key: 4 if key in ("height", "width", "frames") else 8 for key in full.sizes}
    return replace(full, config={**full.config, **TINY[name]}, sizes=sizes)


def _model(setting: Setting, name: str, scheme: str, compiled: bool) -> Rows:
    shape = architecture(name, setting.tiny)
    inputs = shape.inputs(shape.batch, dtype=torch.bfloat16, device=setting.device)
    made: list[Any] = []
    built = elapsed(lambda: made.append(_build(setting, shape, scheme)), setting)
    (model,) = made
    blocks, calls = dict(_first_blocks(model)), {}
    first = elapsed(lambda: calls.update(_calls(model, blocks, inputs)), setting)
    if compiled:
        for block in blocks.values():
            block.compile(dynamic=False)
        first = elapsed(partial(predict, model, inputs), setting)
    yield {"what": "first step", "seconds": first, "build_seconds": built}
    for kind, call in calls.items():
        yield {"what": "block", "block": kind} | milliseconds(call, setting)
    row = milliseconds(partial(predict, model, inputs), setting, rounds=5, warm_up=2) | clocks(setting)
    output = predict(model, inputs)
    exact = setting.scratch / f"{name}.safetensors"
    if scheme == "bfloat16":
        save_file({"output": output.contiguous()}, exact)
        row |= _operations(model, inputs)
    row["relative_l2"] = relative_error(load_file(exact, device=str(setting.device))["output"], output)
    if setting.cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    yield {"what": "step", "finite": bool(output.isfinite().all())} | row


def _build(setting: Setting, shape: Architecture, scheme: str) -> Any:
    config = None if scheme == "bfloat16" else quantization_config(_empty(shape), "native", scheme)
    return random_model(shape, dtype=torch.bfloat16, device=setting.device, config=config, shared_blocks=True)


def _empty(shape: Architecture) -> Any:
    model = empty_model(shape)
    share_blocks(model)
    return model


def _first_blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """Every block that is not one seen before, by class and, where a class has several, by number."""
    seen: list[Any] = []
    for child in model.children():
        for block in child if isinstance(child, torch.nn.ModuleList) and len(child) > 1 else ():
            if not any(block is other for other in seen):
                alike = sum(type(block) is type(other) for other in seen)
                seen.append(block)
                yield type(block).__name__ + (f" {alike + 1}" if alike else ""), block


def _calls(model: Any, blocks: dict[str, Any], inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Run a step; each block's first call in it, to be made again."""
    found: dict[str, Callable[[], Any]] = {}

    def keep(kind: str, module: Any, arguments: tuple, keywords: dict) -> None:
        found.setdefault(kind, partial(module, *arguments, **keywords))

    hooks = [block.register_forward_pre_hook(partial(keep, kind), with_kwargs=True) for kind, block in blocks.items()]
    predict(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def _operations(model: Any, inputs: Inputs) -> dict[str, int]:
    """Multiplications and additions of a step: of linear layers, and of attention."""
    with FlopCounterMode(display=False) as counted:
        predict(model, inputs)
    found = {str(name): count for name, count in counted.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in found.items() if "attention" in name)
    return {"linear_flops": sum(found.values()) - attention, "attention_flops": attention}
