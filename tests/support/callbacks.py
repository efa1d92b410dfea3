"""What ``callback_on_step_end`` may do to a run of Stable Diffusion 3: each is given the pipeline and `GIVEN`."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from cemq.pipelines.noise_scheduler import intercepted, next_sample
from cemq.runtime import attached
from cemq.schedule import CacheSchedule
from support.families import PROMPT, STEPS

GIVEN = ("latents", "prompt_embeds", "pooled_prompt_embeds")
# what cemq says where the shapes change on a skipped step
WARNED = "cemq: a call to the denoiser on a skipped step has no earlier output of its shape"
Tensors = dict[str, torch.Tensor]


def enlarge(pipe: Any, given: Tensors) -> Tensors:
    return {"latents": torch.nn.functional.interpolate(given["latents"], scale_factor=2)}


def keep_one(pipe: Any, given: Tensors) -> Tensors:
    """The first sample; prompts are those of both branches of guidance."""
    samples = len(given["latents"])
    return {"latents": given["latents"][:1]} | {name: given[name][::samples] for name in GIVEN[1:]}


def end_guidance(pipe: Any, given: Tensors) -> Tensors:
    """Prompts of the conditional branch alone, from here on."""
    if not pipe.do_classifier_free_guidance:
        return {}
    pipe._guidance_scale = 1.0  # as diffusers' own guide to callbacks does
    return {name: given[name].chunk(2)[1] for name in GIVEN[1:]}


def drawn(pipe: Any, schedule: CacheSchedule | None = None, *, cache: str = "output", at=(), change=None):
    """A run of two samples, with ``change`` made at the end of the steps ``at``.

    The final latents, the samples and predictions that went into `step`, and how many steps were computed.
    """
    taken = []

    def watch(original, call):
        result = original(*call.args, **call.kwargs)
        taken.append((call.get("sample").clone(), call.get("model_output").clone(), next_sample(result).clone()))
        return result

    def callback(pipe, step, timestep, given):
        return change(pipe, given) if step in at else {}

    def run():
        with intercepted(pipe.scheduler, "step", watch):
            return pipe(
                [PROMPT, "a seven"], negative_prompt=["", ""], generator=torch.Generator().manual_seed(3),
                guidance_scale=3.0, num_inference_steps=STEPS, max_sequence_length=32, height=8, width=8,
                output_type="latent", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=GIVEN,
            ).images  # fmt: skip

    if schedule is None:
        return run(), taken, STEPS
    with attached(pipe, schedule, cache=cache) as hook, warnings.catch_warnings():
        warnings.filterwarnings("ignore", WARNED)
        return run(), taken, hook.full_evaluations
