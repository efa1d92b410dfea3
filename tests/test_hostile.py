"""Everything a pipeline may do to a schedule, or be done to with one: the right picture, or one clear error."""

import copy
import dataclasses
import inspect
import io
import itertools
import pickle
import threading
import warnings
import weakref
from contextlib import contextmanager, nullcontext

import diffusers as D
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_first_block_cache, apply_layerwise_casting
from support.checks import abort, caches_outputs, counted_blocks, draw, every_step, few_steps, plain_run
from support.families import FAMILIES, FLUX_CALL, NEGATIVE, PROMPT, STEPS, autoencoder, family_with, picture
from support.slow import others_slow

from cemq.errors import InputError, ModelError, PipelineError
from cemq.pipelines.batches import Batch, check_drivable, run
from cemq.pipelines.noise_scheduler import fingerprint
from cemq.pipelines.opening import denoisers, open_pipeline
from cemq.pipelines.outputs import as_array
from cemq.pipelines.trajectory import record
from cemq.runtime import attach, attached
from cemq.runtime.runner import Runner
from cemq.schedule import CacheSchedule, plan_schedule

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:__array_wrap__ must accept context:DeprecationWarning",  # diffusers' KDPM2 and DEIS with NumPy 2
)


@contextmanager
def scheduled(pipe, family, schedule=few_steps, call=None):
    """A pipeline with a schedule for how the family runs now, and what it draws uncached and under it."""
    values, trajectory = plain_run(pipe, family)
    with attached(pipe, schedule(trajectory), trajectory.sampler) as hook:
        yield hook, values, draw(pipe, family)


def full_and_skipped(hook):
    return hook.full_evaluations, hook.skipped_evaluations


def single(pipe, prompt=PROMPT, seed=0, steps=STEPS, **call):
    """A plain call, as a user makes it."""
    generator = torch.Generator().manual_seed(seed)
    argument = {} if "prompt_embeds" in call else {"prompt": prompt}
    return as_array(
        pipe(**argument, num_inference_steps=steps, generator=generator, output_type="np", return_dict=False, **call)[0]
    )


FLUX = FAMILIES["flux"]


@pytest.fixture
def flux():
    return FLUX.pipeline()


def flux_of_its_own_scheduler(pipe, kind=D.FluxPipeline):
    """Another pipeline on the same models."""
    parts = {**pipe.components, "scheduler": D.FlowMatchEulerDiscreteScheduler(shift=2.0)}
    other = kind(**parts)
    other.set_progress_bar_config(disable=True)
    return other


# Samplers: several calls a step, several steps' memory, noise of their own.

SD_SAMPLERS = {
    "heun": (D.HeunDiscreteScheduler, {}, 2 * STEPS - 1),
    "kdpm2": (D.KDPM2DiscreteScheduler, {}, 2 * STEPS - 1),
    "kdpm2-ancestral": (D.KDPM2AncestralDiscreteScheduler, {}, 2 * STEPS - 1),
    "pndm": (D.PNDMScheduler, {"skip_prk_steps": True}, STEPS + 1),
    "pndm-runge-kutta": (D.PNDMScheduler, {"skip_prk_steps": False}, 15),
    "lms": (D.LMSDiscreteScheduler, {}, STEPS),
    "ipndm": (D.IPNDMScheduler, {}, STEPS),
    "deis": (D.DEISMultistepScheduler, {}, STEPS),
    "unipc": (D.UniPCMultistepScheduler, {}, STEPS),
    "dpm++": (D.DPMSolverMultistepScheduler, {}, STEPS),
    "dpm++-karras": (D.DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "solver_order": 3}, STEPS),
    "dpm++-sde": (D.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, STEPS),
    "dpm++-single": (D.DPMSolverSinglestepScheduler, {}, STEPS),
    "sa": (D.SASolverScheduler, {}, STEPS),
    "euler": (D.EulerDiscreteScheduler, {}, STEPS),
    "euler-ancestral": (D.EulerAncestralDiscreteScheduler, {}, STEPS),
    "ddim": (D.DDIMScheduler, {}, STEPS),
    "ddpm": (D.DDPMScheduler, {}, STEPS),
    "lcm": (D.LCMScheduler, {}, STEPS),
    "tcd": (D.TCDScheduler, {}, STEPS),
}
# One of every kind: more evaluations than steps, orders that rise, noise on the way, a single step
QUICK_SAMPLERS = ("heun", "pndm", "pndm-runge-kutta", "unipc", "dpm++", "dpm++-sde", "euler-ancestral", "ddim", "lcm")


def check_sampler(family, pipe, evaluations):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(copy|solver_order|lower_order|final_sigmas).*")
        plain, trajectory = plain_run(pipe, family)
        assert trajectory.num_steps == evaluations
        with attached(pipe, every_step(trajectory), trajectory.sampler):
            assert np.array_equal(draw(pipe, family), plain)
        schedule = few_steps(trajectory)
        with attached(pipe, schedule, trajectory.sampler) as hook:
            first = draw(pipe, family)
            assert full_and_skipped(hook) == (schedule.budget, evaluations - schedule.budget)
            abort(pipe, family, after=4)
            assert np.array_equal(draw(pipe, family), first)
        assert np.isfinite(first).all()
        assert np.array_equal(draw(pipe, family), plain)


@pytest.mark.parametrize("name", others_slow(SD_SAMPLERS, QUICK_SAMPLERS))
def test_any_sampler_keeps_its_count_of_steps(name):
    kind, settings, evaluations = SD_SAMPLERS[name]
    pipe = FAMILIES["sd15"].pipeline()
    pipe.scheduler = kind(num_train_timesteps=1000, **settings)
    check_sampler(FAMILIES["sd15"], pipe, evaluations)


@pytest.mark.parametrize(
    ("kind", "evaluations"),
    [(D.FlowMatchHeunDiscreteScheduler, 2 * STEPS - 1), (D.FlowMatchLCMScheduler, STEPS)],
    ids=["flow-heun", "flow-lcm"],
)
def test_any_flow_sampler_keeps_its_count_of_steps(kind, evaluations):
    pipe = FAMILIES["sd3"].pipeline()
    pipe.scheduler = kind(shift=3.0)
    check_sampler(FAMILIES["sd3"], pipe, evaluations)


@pytest.mark.parametrize("name", ["heun", "dpm++", "euler-ancestral", "ddpm", "pndm"])
def test_any_sampler_can_be_profiled_and_planned_for(name):
    kind, settings, evaluations = SD_SAMPLERS[name]
    family, batch = FAMILIES["sd15"], Batch(conditions=(PROMPT,), seeds=(1,))
    pipe = family.pipeline()
    pipe.scheduler = kind(num_train_timesteps=1000, **settings)
    runner = Runner(pipe=pipe, steps=STEPS, call=family.call)
    prior = runner.profile([batch], runner.record([batch]), scheme="none", dtype="float32")
    assert np.allclose(prior.qq, prior.vv, rtol=1e-4)  # forced along itself: the same model, the same noise
    schedule = plan_schedule(prior, 3)
    with attached(pipe, schedule, prior.metadata.sampler) as hook:
        draw(pipe, family)
    assert full_and_skipped(hook) == (3, evaluations - 3)


# Image to image: the run begins late.


@pytest.mark.parametrize("strength", [0.35, 0.5, 0.8, 1.0])
def test_image_to_image_is_scheduled_at_the_strength_it_was_planned_for(strength):
    family = family_with("flux_img2img", strength=strength)
    pipe = family.pipeline()
    _, trajectory = plain_run(pipe, family)
    steps = min(int(STEPS * strength), STEPS) + (strength not in (0.5, 1.0))
    assert trajectory.num_steps == len(trajectory.sampler.timesteps) == steps
    schedule = CacheSchedule(num_steps=steps, full_steps=(0, *range(2, steps)), predictor="reuse")
    with attached(pipe, schedule, trajectory.sampler) as hook:
        draw(pipe, family)
    assert full_and_skipped(hook) == (schedule.budget, steps - schedule.budget)


@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_image_to_image_at_another_strength_computes_in_full(strength):
    planned, other = family_with("flux_img2img", strength=0.7), family_with("flux_img2img", strength=strength)
    pipe = planned.pipeline()
    expected = draw(pipe, other)
    with scheduled(pipe, planned) as (hook, _, _):
        with pytest.warns(UserWarning, match=r"cemq: .*computing in full"):
            assert np.array_equal(draw(pipe, other), expected)
        assert hook.skipped_evaluations == 0


@pytest.mark.parametrize("strength", [0.35, 0.5, 0.8, 1.0])
def test_image_to_image_at_any_strength_follows_the_tail_of_a_schedule_for_any_sampler(strength):
    family = family_with("flux_img2img", strength=strength)
    pipe = family.pipeline()
    plain, trajectory = plain_run(pipe, family)
    start = STEPS - trajectory.num_steps
    with attached(pipe, CacheSchedule(num_steps=STEPS, full_steps=tuple(range(STEPS)))):
        assert np.array_equal(draw(pipe, family), plain)
    with attached(pipe, CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 5), predictor="reuse")) as hook:
        values = draw(pipe, family)
        full = len({start} | {step for step in (0, 2, 5) if step > start})
        assert full_and_skipped(hook) == (full, STEPS - start - full)
        assert np.array_equal(draw(pipe, family), values)


def test_text_to_image_under_a_schedule_for_image_to_image_computes_in_full():
    family = family_with("flux_img2img", strength=0.7)
    pipe = family.pipeline()
    other = D.FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = single(other, guidance_scale=3.5, **FLUX_CALL)
    with scheduled(pipe, family), pytest.warns(UserWarning, match="another place"):
        assert np.array_equal(single(other, guidance_scale=3.5, **FLUX_CALL), expected)


def test_stable_diffusion_image_to_image_with_pndm():
    pipe = D.StableDiffusionImg2ImgPipeline(**FAMILIES["sd15"].build().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    family = family_with("sd15", image=picture(32), strength=0.6)
    del family.call["height"], family.call["width"]
    plain, trajectory = plain_run(pipe, family)
    assert trajectory.num_steps < len(pipe.scheduler.timesteps)
    with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook:
        expected = draw(pipe, family)
    assert full_and_skipped(hook) == (2, trajectory.num_steps - 2)
    with attached(pipe, few_steps(trajectory)) as hook:  # as many steps, of any sampler
        assert np.array_equal(draw(pipe, family), expected)
    assert full_and_skipped(hook) == (2, trajectory.num_steps - 2)
    assert np.array_equal(draw(pipe, family), plain)


# Guidance: batched, apart with and without contexts, distilled, truncated, with layers skipped.


@pytest.mark.parametrize(
    ("name", "calls"), [("sd3", 1), ("flux_true_cfg", 2), ("chroma", 2), ("lumina2", 2), ("flux", 1), ("wan", 2)]
)
def test_every_branch_of_guidance_is_served_from_its_own_past(name, calls):
    family = FAMILIES[name]
    pipe = family.pipeline()
    _, plain = plain_run(pipe, family)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    with attached(pipe, schedule, plain.sampler) as hook, record(pipe) as cached:
        draw(pipe, family)
    assert full_and_skipped(hook) == (2 * calls, 4 * calls)
    assert torch.equal(cached.predictions[0], plain.predictions[0])
    for step in (1, 2, 4, 5):
        assert torch.equal(cached.predictions[step], cached.predictions[3 if step > 3 else 0])


@pytest.mark.parametrize(
    ("name", "call"), [("z_image", {"cfg_truncation": 0.3}), ("lumina2", {"cfg_trunc_ratio": 0.4})]
)
def test_guidance_that_ends_in_the_middle_of_a_run(name, call):
    family = family_with(name, **call)
    pipe = family.pipeline()
    plain, trajectory = plain_run(pipe, family)
    with attached(pipe, every_step(trajectory), trajectory.sampler):
        assert np.array_equal(draw(pipe, family), plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cemq: .*no earlier output of its shape")
        with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook:
            values = draw(pipe, family)
            assert values.shape == plain.shape
            assert hook.skipped_evaluations
            assert np.array_equal(draw(pipe, family), values)


@pytest.mark.parametrize("layers", [[0], [2], [0, 1]])
def test_skip_layer_guidance(layers):
    family = family_with("sd3", skip_guidance_layers=layers, skip_layer_guidance_stop=0.7)
    pipe = family.pipeline()
    pipe_call = Batch(conditions=(PROMPT,), seeds=(3,))

    def make():
        return as_array(run(pipe, pipe_call, steps=STEPS, call=family.call))

    with record(pipe) as trajectory:
        plain = make()
    with attached(pipe, every_step(trajectory), trajectory.sampler) as hook:
        assert np.array_equal(make(), plain)
        assert hook.full_evaluations > STEPS  # a further call on some steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cemq: .*no earlier output of its shape")
        with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook:
            values = make()
            assert hook.skipped_evaluations > 2
            assert np.array_equal(make(), values)


def test_guidance_turned_off_by_a_callback():
    family, off_at = FAMILIES["sd15"], 2
    pipe = family.pipeline()

    def turn_off(pipe, step, timestep, tensors):
        if step == off_at:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    call = {
        **family.call, "callback_on_step_end": turn_off,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }  # fmt: skip
    plain = single(pipe, **call)
    _, trajectory = plain_run(pipe, family)
    with attached(pipe, every_step(trajectory), trajectory.sampler):
        assert np.array_equal(single(pipe, **call), plain)
    with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook:
        with pytest.warns(UserWarning, match="no earlier output of its shape"):
            values = single(pipe, **call)
        assert values.shape == plain.shape
        assert hook.skipped_evaluations


# Shapes.


def test_batch_sizes_and_resolutions_change_between_runs(flux):
    calls = [
        {"prompt": PROMPT},
        {"prompt": [PROMPT, "a dance"]},
        {"prompt": PROMPT, "height": 24},
        {"prompt": PROMPT, "num_images_per_prompt": 3},
        {"prompt": PROMPT},
    ]
    _, trajectory = plain_run(flux, FLUX)
    flux.scheduler = D.FlowMatchEulerDiscreteScheduler(shift=3.0)  # whose timesteps do not hang on the resolution
    flux.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
    sampler = fingerprint(flux.scheduler)
    with attached(flux, few_steps(trajectory), sampler) as hook:
        values = [single(flux, **{**FLUX_CALL, **call}) for call in calls]
        assert full_and_skipped(hook) == (2, 4)
    assert [value.shape[:2] for value in values] == [(1, 16), (2, 16), (1, 24), (3, 16), (1, 16)]
    assert np.array_equal(values[0], values[4])
    assert np.allclose(values[0][0], values[1][0], atol=1e-4)
    assert not np.allclose(values[1][0], values[1][1], atol=1e-2)


def test_a_call_to_the_denoiser_after_the_run_is_computed(flux):
    calls = []
    handle = flux.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    draw(flux, FLUX)
    handle.remove()
    with scheduled(flux, FLUX):
        inputs = calls[0] | {"hidden_states": torch.ones_like(calls[0]["hidden_states"])}
        with counted_blocks(flux) as blocks, torch.no_grad():
            flux.transformer(**inputs)
        assert blocks


def test_one_more_call_in_a_step_does_not_shift_the_schedule(flux):
    def call_again(pipe, step, timestep, tensors):
        pipe.transformer(**seen[-1])
        return tensors

    seen = []
    flux.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with scheduled(flux, FLUX), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = single(flux, **FLUX.call)
        assert np.array_equal(single(flux, callback_on_step_end=call_again, **FLUX.call), expected)


# Callbacks, interrupts, exceptions.


def test_a_callback_that_changes_the_latents_sees_its_change_in_the_picture(flux):
    def shift(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + 0.1}

    with scheduled(flux, FLUX):
        plain = single(flux, **FLUX.call)
        first, second = (single(flux, callback_on_step_end=shift, **FLUX.call) for _ in range(2))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, plain)
        assert np.array_equal(single(flux, **FLUX.call), plain)


def test_an_interrupted_run_leaves_nothing_behind(flux):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 2
        return tensors

    with scheduled(flux, FLUX) as (hook, _, expected):
        single(flux, prompt="a dance", seed=7, callback_on_step_end=interrupt, **FLUX.call)
        assert sum(full_and_skipped(hook)) == 3
        assert np.array_equal(draw(flux, FLUX), expected)


@pytest.mark.parametrize("where", ["callback", "block", "scheduler.step", "set_timesteps", "decoder"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_run_after_an_exception_is_clean(flux, where, kind, monkeypatch):
    def fail(*args, **kwargs):
        raise kind("now")

    call = {"callback_on_step_end": fail} if where == "callback" else {}
    with scheduled(flux, FLUX) as (_, _, expected):
        with monkeypatch.context() as patch:
            if where == "block":
                patch.setattr(flux.transformer.transformer_blocks[1], "forward", fail)
            elif where == "decoder":
                patch.setattr(flux.vae, "decode", fail)
            elif where != "callback":
                name = where.split(".")[-1]
                patch.setattr(flux.scheduler, name, fail)
                if name == "set_timesteps":
                    patch.setattr("diffusers.pipelines.flux.pipeline_flux.retrieve_timesteps", fail)
            with pytest.raises(kind):
                single(flux, prompt="a dance", seed=9, **call, **FLUX.call)
        assert np.array_equal(draw(flux, FLUX), expected)


def test_an_error_inside_the_with_block_detaches(flux):
    plain, trajectory = plain_run(flux, FLUX)
    with pytest.raises(ZeroDivisionError), attached(flux, few_steps(trajectory), trajectory.sampler):
        raise ZeroDivisionError
    assert np.array_equal(draw(flux, FLUX), plain)
    assert not {"step", "set_timesteps"} & set(vars(flux.scheduler))


def test_an_output_changed_in_place_is_not_cached_so(flux):
    def spoil(module, args, output):
        output[0].add_(100.0)
        return (output[0] - 100.0,)

    with scheduled(flux, FLUX) as (_, _, expected):
        flux.transformer.register_forward_hook(spoil)
        assert np.allclose(draw(flux, FLUX), expected, atol=1e-3)


# Pipelines that share a denoiser, and threads.


def test_another_pipeline_on_the_same_denoiser_computes_in_full(flux):
    other = flux_of_its_own_scheduler(flux)
    expected_other = draw(other, FLUX)
    with scheduled(flux, FLUX) as (hook, _, expected):
        with pytest.warns(UserWarning, match="another pipeline uses the denoiser"):
            assert np.array_equal(draw(other, FLUX), expected_other)
        assert np.array_equal(draw(flux, FLUX), expected)
        assert hook.skipped_evaluations == 4


def test_another_pipeline_after_an_aborted_run_is_not_served_from_it(flux):
    other = flux_of_its_own_scheduler(flux)
    expected = draw(other, FLUX)
    with scheduled(flux, FLUX), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for after in (1, 2, 3, 4):
            abort(flux, FLUX, after)
            assert np.array_equal(draw(other, FLUX), expected)


def test_another_pipeline_in_a_callback_disturbs_nothing(flux):
    other = flux_of_its_own_scheduler(flux)
    expected_other = single(other, **FLUX.call)
    found = []

    def run_other(pipe, step, timestep, tensors):
        found.append(single(other, **FLUX.call))
        return tensors

    with scheduled(flux, FLUX), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = single(flux, **FLUX.call)
        assert np.array_equal(single(flux, callback_on_step_end=run_other, **FLUX.call), expected)
    assert len(found) == STEPS
    assert all(np.array_equal(one, expected_other) for one in found)


def test_a_pipeline_made_from_this_one_shares_its_schedule(flux):
    other = D.FluxPipeline.from_pipe(flux)
    other.set_progress_bar_config(disable=True)
    with scheduled(flux, FLUX) as (hook, _, expected):
        assert np.array_equal(draw(other, FLUX), expected)
        assert full_and_skipped(hook) == (2, 4)


def test_a_second_schedule_on_a_shared_denoiser_is_followed_beside_the_first(flux):
    other = flux_of_its_own_scheduler(flux)
    plain, trajectory = plain_run(other, FLUX)
    with scheduled(flux, FLUX) as (hook, _, expected):
        with attached(other, every_step(trajectory), trajectory.sampler) as second:
            assert np.array_equal(draw(other, FLUX), plain)
            assert np.array_equal(draw(flux, FLUX), expected)
            assert (full_and_skipped(hook), full_and_skipped(second)) == ((2, 4), (STEPS, 0))
        assert np.array_equal(draw(flux, FLUX), expected)
        assert not vars(other.scheduler).keys() & {"step", "set_timesteps"}


def test_a_second_schedule_on_half_of_the_denoisers_is_followed_beside_the_first():
    family = FAMILIES["wan22"]
    pipe, other = family.pipeline(), family.pipeline()
    _, trajectory = plain_run(pipe, family)
    other.transformer_2 = pipe.transformer_2
    with attached(pipe, few_steps(trajectory), trajectory.sampler):
        expected = draw(pipe, family)
        with attached(other, few_steps(trajectory), trajectory.sampler) as second:
            assert np.array_equal(draw(other, family), expected)
            assert full_and_skipped(second) == (4, 8)
            assert np.array_equal(draw(pipe, family), expected)
        assert "forward" not in vars(other.transformer)
        assert np.array_equal(draw(pipe, family), expected)
    assert "forward" not in vars(pipe.transformer_2)


def in_threads(*tasks):
    """Run tasks side by side; what each returned or raised."""
    found = [None] * len(tasks)

    def work(index, task):
        try:
            found[index] = task()
        except Exception as error:  # handed to the test
            found[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_pipelines_of_their_own_run_in_threads():
    pipes = [FLUX.pipeline(), FLUX.pipeline()]
    _, trajectory = plain_run(pipes[0], FLUX)
    for pipe in pipes:
        attach(pipe, few_steps(trajectory), trajectory.sampler)
    expected = [single(pipes[0], seed=seed, **FLUX.call) for seed in (1, 2)]
    found = in_threads(*(lambda p=p, s=s: single(p, seed=s, **FLUX.call) for p, s in zip(pipes, (1, 2), strict=True)))
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


def test_pipelines_that_share_a_denoiser_run_in_threads():
    family = FAMILIES["flux_true_cfg"]  # cache contexts of both, on one model
    pipe = family.pipeline()
    other = flux_of_its_own_scheduler(pipe)
    expected_other = single(other, **family.call)
    barrier, is_under_way = threading.Barrier(2, timeout=30), threading.Event()

    def in_step(*_):
        is_under_way.set()
        barrier.wait()
        return {}

    def after_the_first_has_its_prompts():  # tokenizers change their padding from call to call: one pipeline at a time
        assert is_under_way.wait(30)
        return single(other, callback_on_step_end=in_step, **family.call)

    with scheduled(pipe, family), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = single(pipe, **family.call)
        found = in_threads(
            lambda: single(pipe, callback_on_step_end=in_step, **family.call),
            after_the_first_has_its_prompts,
        )
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], expected_other)


def test_one_pipeline_in_two_threads_is_refused(flux):
    first_is_under_way, second_is_done = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, tensors):
        if step == 1:
            first_is_under_way.set()
            second_is_done.wait(30)
        return tensors

    def second():
        first_is_under_way.wait(30)
        try:
            return single(flux, **FLUX.call)
        finally:
            second_is_done.set()

    with scheduled(flux, FLUX):
        expected = single(flux, **FLUX.call)
        found = in_threads(lambda: single(flux, callback_on_step_end=wait, **FLUX.call), second)
        assert isinstance(found[0], ModelError)
        assert "two threads run this pipeline at once" in str(found[0])
        assert np.array_equal(found[1], expected)
        assert np.array_equal(single(flux, **FLUX.call), expected)


# LoRA.


def lora_weights(transformer, scale=1.0):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = copy.deepcopy(transformer)
    donor.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    torch.manual_seed(0)
    return {f"transformer.{k}": scale * torch.randn_like(v) for k, v in get_peft_model_state_dict(donor).items()}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("fused", [False, True], ids=["loaded", "fused"])
def test_lora_under_a_schedule(flux, order, fused):
    pytest.importorskip("peft")
    weights = lora_weights(flux.transformer)

    def load():
        flux.load_lora_weights(dict(weights))
        if fused:
            flux.fuse_lora()

    reference = FLUX.pipeline()
    reference.load_lora_weights(dict(weights))
    if fused:
        reference.fuse_lora()
    plain, trajectory = plain_run(reference, FLUX)
    with attached(reference, few_steps(trajectory), trajectory.sampler):
        expected = draw(reference, FLUX)
    assert not np.allclose(plain, draw(flux, FLUX))
    if order == "before":
        load()
    with attached(flux, few_steps(trajectory), trajectory.sampler) as hook:
        if order == "after":
            load()
        assert np.allclose(draw(flux, FLUX), expected, atol=1e-6)
        assert full_and_skipped(hook) == (2, 4)
    assert np.allclose(draw(flux, FLUX), plain, atol=1e-6)


def test_lora_fused_before_quantization():
    pytest.importorskip("peft")
    from support.checks import quantized

    def fused():
        pipe = FLUX.pipeline()
        pipe.load_lora_weights(lora_weights(pipe.transformer, 0.1))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return pipe

    family = type(FLUX)("flux", fused, FLUX.call)
    plain, _ = plain_run(family.pipeline(), family)
    pipe = quantized(family, "w8a8")
    assert np.abs(draw(pipe, family) - plain).mean() < 0.05
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_lora_that_is_not_fused_is_not_quantized():
    pytest.importorskip("peft")
    from cemq.quantize import CemqConfig, quantize_in_place

    pipe = FLUX.pipeline()
    pipe.load_lora_weights(lora_weights(pipe.transformer))
    with pytest.raises(ModelError, match=r"LoRA.*fuse_lora"):
        quantize_in_place(pipe.transformer, CemqConfig("w8a8"))


def test_an_untrained_adapter_on_a_quantized_denoiser_is_refused():
    pytest.importorskip("peft")
    from support.checks import quantized

    pipe = quantized(FLUX, "w8a8")
    modules = dict(pipe.transformer.named_modules())
    with pytest.raises(ModelError, match=r"^add_adapter\(\) works on float weights[^\n]*load_lora_weights\(\)$"):
        pipe.transformer.add_adapter(object())
    assert dict(pipe.transformer.named_modules()) == modules


def test_a_pipeline_with_an_adapter_is_not_saved_as_a_bundle(flux, tmp_path):
    from cemq.bundle.save import save_as_bundle
    from cemq.errors import BundleError

    pytest.importorskip("peft")
    flux.load_lora_weights(lora_weights(flux.transformer))
    save_as_bundle(flux, tmp_path / "origin", None, dtype="float32")
    with pytest.raises(BundleError, match=r"^transformer holds LoRA layers[^\n]*unload_lora_weights\(\) to save it$"):
        flux.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_a_run_on_weights_that_nobody_brings_is_refused(flux, offload):
    import accelerate

    _, trajectory = plain_run(flux, FLUX)
    layer = flux.transformer.transformer_blocks[0].attn.to_q
    if offload == "model":
        accelerate.cpu_offload_with_hook(flux.transformer, torch.device("cpu"))
    if offload == "sequential":
        accelerate.cpu_offload(flux.transformer, execution_device=torch.device("cpu"))
    with attached(flux, few_steps(trajectory), trajectory.sampler) as hook:
        draw(flux, FLUX)
        assert full_and_skipped(hook) == (2, 4)
        layer.lost = torch.nn.Parameter(torch.empty(3, device="meta"))
        if offload == "sequential":  # of a module that accelerate knows it would be brought
            flux.transformer.lost = torch.nn.Linear(3, 3, device="meta")
        with pytest.raises(ModelError, match=r"^\d parameters of FluxTransformer2DModel are on the meta device[^\n]*"):
            draw(flux, FLUX)
        del layer.lost
        if offload == "sequential":
            del flux.transformer.lost
        assert np.isfinite(draw(flux, FLUX)).all()


def test_projections_of_quantized_attention_are_not_fused():
    from support.checks import quantized

    pipe = quantized(FLUX, "w8a8")
    before = draw(pipe, FLUX)
    with pytest.raises(ModelError, match=r"^fuse_qkv_projections\(\) works on float weights[^\n]*fuse them before"):
        pipe.transformer.fuse_qkv_projections()
    assert np.array_equal(draw(pipe, FLUX), before)


# torch.compile, whole and regional, in either order.


def compile_wrapped(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_in_place(pipe):
    pipe.transformer.compile(backend="eager")


def compile_regions(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("compile_it", "order"),
    others_slow(
        itertools.product((compile_wrapped, compile_in_place, compile_regions), ("compile first", "schedule first")),
        [(compile_regions, "compile first")],
    ),
)
def test_compiled_denoisers_are_scheduled(flux, compile_it, order):
    torch._dynamo.reset()
    plain, trajectory = plain_run(flux, FLUX)
    with attached(flux, few_steps(trajectory), trajectory.sampler):
        expected = draw(flux, FLUX)
    if order == "compile first":
        compile_it(flux)
    torch._dynamo.utils.counters.clear()
    with attached(flux, few_steps(trajectory), trajectory.sampler) as hook:
        if order == "schedule first":
            compile_it(flux)
        for _ in range(2):
            assert np.allclose(draw(flux, FLUX), expected, atol=1e-5)
            assert full_and_skipped(hook) == (2, 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (4 if compile_it is compile_regions else 1)
    assert np.allclose(draw(flux, FLUX), plain, atol=1e-5)
    torch._dynamo.reset()


# Copies, pickles, folders.


@pytest.mark.parametrize("part", ["pipeline", "denoiser"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_scheduled_pipeline_is_neither_copied_nor_pickled(flux, part, how):
    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": pickle.dumps,
        "torch.save": lambda value: torch.save(value, io.BytesIO()),
    }
    with (
        scheduled(flux, FLUX) as (_, _, expected),
        pytest.raises(ModelError, match=r"schedule is attached.*detach\(\) it first"),
    ):
        try:
            ways[how](flux if part == "pipeline" else flux.transformer)
        finally:
            assert np.array_equal(draw(flux, FLUX), expected)


def test_a_copy_made_after_detaching_runs_its_own_weights(flux):
    with scheduled(flux, FLUX) as (_, plain, _):
        pass
    twin = copy.deepcopy(flux)
    with torch.no_grad():
        for parameter in flux.transformer.parameters():
            parameter.zero_()
    assert np.array_equal(draw(twin, FLUX), plain)


def test_a_scheduled_pipeline_saves_as_if_it_were_not(flux, tmp_path):
    names = set(flux.transformer.state_dict())
    with scheduled(flux, FLUX) as (_, plain, _):
        assert set(flux.transformer.state_dict()) == names
        flux.save_pretrained(tmp_path / "saved")
    loaded = D.FluxPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert np.allclose(draw(loaded, FLUX), plain, atol=1e-5)


# Other caches.

CACHES = {
    "first block": D.FirstBlockCacheConfig(threshold=0.1),
    "mag": D.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
    "taylorseer": D.TaylorSeerCacheConfig(),
    "pyramid": D.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_diffusers_cache_and_a_schedule_do_not_mix(flux, name):
    _, trajectory = plain_run(flux, FLUX)
    flux.transformer.enable_cache(CACHES[name])
    with pytest.raises(ModelError, match=r"a diffusers cache is enabled.*disable_cache"):
        attach(flux, few_steps(trajectory), trajectory.sampler)
    flux.transformer.disable_cache()
    with attached(flux, few_steps(trajectory), trajectory.sampler) as hook:
        expected = draw(flux, FLUX)
        flux.transformer.enable_cache(CACHES[name])
        with pytest.raises(ModelError, match=r"a diffusers cache is enabled.*disable_cache"):
            draw(flux, FLUX)
        flux.transformer.disable_cache()
        assert np.array_equal(draw(flux, FLUX), expected)
        assert full_and_skipped(hook) == (2, 4)


def test_a_cache_applied_past_the_model_is_seen_too(flux):
    _, trajectory = plain_run(flux, FLUX)
    apply_first_block_cache(flux.transformer, D.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ModelError, match="a diffusers cache is enabled"):
        attach(flux, few_steps(trajectory), trajectory.sampler)


def test_cache_dit_is_refused_by_name(flux):
    _, trajectory = plain_run(flux, FLUX)
    flux.transformer._is_cached = True  # as it marks what it changed
    with pytest.raises(ModelError, match=r"cache-dit is active.*disable_cache"):
        attach(flux, few_steps(trajectory), trajectory.sampler)


# Steps and samplers that are not what they were planned for.


def test_a_cache_context_that_names_another_step_is_believed():
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    context = pipe.transformer.cache_context
    with scheduled(pipe, family) as (hook, plain, _):
        pipe.transformer.cache_context = lambda name, **where: context(name, **where | {"step_index": 5})
        with pytest.warns(UserWarning, match="cemq: "):
            assert np.array_equal(draw(pipe, family), plain)
        assert hook.skipped_evaluations == 0


def test_a_cache_context_that_names_another_noise_level_is_believed():
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    context = pipe.transformer.cache_context
    with scheduled(pipe, family) as (hook, plain, _):
        pipe.transformer.cache_context = lambda name, **where: context(name, **where | {"sigma": 0.123})
        with pytest.warns(UserWarning, match="at another step than its sampler"):
            assert np.array_equal(draw(pipe, family), plain)
        assert hook.skipped_evaluations == 0


def test_a_context_without_step_or_noise_level_is_no_objection():
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    context = pipe.transformer.cache_context
    with scheduled(pipe, family) as (_, _, expected):
        pipe.transformer.cache_context = lambda name, **where: context(name)
        assert np.array_equal(draw(pipe, family), expected)


@pytest.mark.parametrize(
    "call",
    [
        {"sigmas": [1.0, 0.7, 0.5, 0.3, 0.2, 0.1]},
        {"sigmas": [1.0, 0.5, 0.25]},
        {"steps": 4},
        {"steps": 12},
        {"steps": 1},
    ],
    ids=["sigmas", "fewer sigmas", "fewer", "more", "one"],
)
def test_other_steps_compute_in_full_and_say_so(flux, call):
    expected = single(flux, **FLUX.call, **call)
    with scheduled(flux, FLUX) as (hook, _, scheduled_values):
        with pytest.warns(UserWarning, match=r"cemq: .*computing in full"):
            assert np.array_equal(single(flux, **FLUX.call, **call), expected)
        assert hook.skipped_evaluations == 0
        assert np.array_equal(draw(flux, FLUX), scheduled_values)


def test_a_setting_of_the_sampler_changed_in_place_computes_in_full():
    family = FAMILIES["sd3"]
    pipe = family.pipeline()
    with scheduled(pipe, family) as (hook, _, expected):
        pipe.scheduler.set_shift(1.5)
        with pytest.warns(UserWarning, match="computing in full"):
            draw(pipe, family)
        assert hook.skipped_evaluations == 0
        pipe.scheduler.set_shift(3.0)
        assert np.array_equal(draw(pipe, family), expected)


def test_a_denoiser_that_was_replaced_computes_in_full(flux):
    twin, old = FLUX.pipeline().transformer, flux.transformer
    with scheduled(flux, FLUX) as (_, plain, expected):
        flux.transformer = twin
        with pytest.warns(UserWarning, match="denoiser was replaced"):
            assert np.array_equal(draw(flux, FLUX), plain)
        flux.transformer = old
        assert np.array_equal(draw(flux, FLUX), expected)
        flux.transformer = twin
    assert not any("forward" in vars(denoiser) for denoiser in (old, twin))
    assert not vars(flux.scheduler).keys() & {"step", "set_timesteps"}


def test_a_scheduled_pipeline_is_freed_like_any_other():
    pipe = FLUX.pipeline()
    _, trajectory = plain_run(pipe, FLUX)
    attach(pipe, few_steps(trajectory), trajectory.sampler)
    draw(pipe, FLUX)
    gone = weakref.ref(pipe)
    del pipe
    assert gone() is None


def test_timesteps_set_twice_start_the_run_once(flux):
    def again(*args, **kwargs):
        flux.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 3), mu=1.0)
        return original(*args, **kwargs)

    with scheduled(flux, FLUX) as (hook, _, expected), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cemq: this run has 3 steps")
        original, flux.prepare_latents = flux.prepare_latents, again
        assert np.array_equal(draw(flux, FLUX), expected)
        assert full_and_skipped(hook) == (2, 4)


def test_a_deep_copy_of_the_sampler_does_not_move_the_schedule(flux):
    with scheduled(flux, FLUX) as (hook, _, expected):
        twin = copy.deepcopy(flux.scheduler)
        twin.set_timesteps(3, mu=1.0)
        assert hook.tracker.step_index == STEPS
        assert np.array_equal(draw(flux, FLUX), expected)


# Where and in what numbers the denoiser runs.


@pytest.mark.parametrize("name", ["sd15", "flux", "wan22"])
def test_half_precision(name):
    family = FAMILIES[name]
    pipe = family.pipeline().to(torch.bfloat16)
    plain, trajectory = plain_run(pipe, family)
    with attached(pipe, every_step(trajectory), trajectory.sampler):
        assert np.array_equal(draw(pipe, family), plain)
    with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook:
        values = draw(pipe, family)
        assert np.isfinite(values).all()
        assert np.array_equal(draw(pipe, family), values)
        assert hook.skipped_evaluations


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes_make_no_difference(flux, around):
    with scheduled(flux, FLUX) as (_, _, expected), around():
        assert np.array_equal(draw(flux, FLUX), expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast(flux):
    with torch.autocast("cpu", dtype=torch.bfloat16), scheduled(flux, FLUX) as (hook, _, values):
        assert np.array_equal(draw(flux, FLUX), values)
        assert hook.skipped_evaluations


@pytest.mark.parametrize("order", ["before", "after"])
def test_layerwise_casting(flux, order):
    def cast():
        apply_layerwise_casting(flux.transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    reference = FLUX.pipeline()
    apply_layerwise_casting(reference.transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain, trajectory = plain_run(reference, FLUX)
    with attached(reference, few_steps(trajectory), trajectory.sampler):
        expected = draw(reference, FLUX)
    if order == "before":
        cast()
    with attached(flux, few_steps(trajectory), trajectory.sampler):
        if order == "after":
            cast()
        assert np.array_equal(draw(flux, FLUX), expected)
    assert np.array_equal(draw(flux, FLUX), plain)


def test_two_denoisers_of_which_one_never_runs():
    family = family_with("wan22")
    pipe = family.pipeline()
    pipe.register_to_config(boundary_ratio=0.001)  # the second one's share of the noise levels
    plain, trajectory = plain_run(pipe, family)
    with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook:
        draw(pipe, family)
        assert full_and_skipped(hook) == (4, 8)
    assert np.array_equal(draw(pipe, family), plain)


def test_a_step_skipped_at_the_handover_runs_neither_denoiser():
    family = family_with("wan22", guidance_scale_2=5.0)
    pipe = family.pipeline()
    calls = {"transformer": 0, "transformer_2": 0}
    for name, denoiser in denoisers(pipe):
        denoiser.blocks[0].register_forward_pre_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    _, trajectory = plain_run(pipe, family)
    first = calls["transformer"] // 2
    assert 0 < first < STEPS
    calls.update(transformer=0, transformer_2=0)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, first + 1), predictor="reuse")
    with attached(pipe, schedule, trajectory.sampler), record(pipe) as cached:
        draw(pipe, family)
    assert calls == {"transformer": 2, "transformer_2": 2}
    assert torch.equal(cached.predictions[first], cached.predictions[0])  # served across the handover


# Pipelines that nobody listed.


class UnlistedPipeline(D.DiffusionPipeline):
    """A loop with nothing in it that cemq has heard of."""

    def __init__(self, transformer, scheduler, vae):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps=STEPS, generator=None, output_type="np", sharpness=1.0):
        labels = torch.as_tensor(class_labels)
        sample = torch.stack([torch.randn(4, 8, 8, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            # positional arguments, an output object, a call for nothing
            prediction = self.transformer(sample, timestep.expand(len(labels)), labels).sample
            self.transformer(sample, timestep.expand(len(labels)), labels, return_dict=False)
            sample = self.scheduler.step(sharpness * prediction[:, :4], timestep, sample, return_dict=False)[0]
        images = self.vae.decode(sample).sample.permute(0, 2, 3, 1).sigmoid().numpy()
        return D.ImagePipelineOutput(images=images)


def test_a_pipeline_that_nobody_listed_works():
    parts = FAMILIES["dit"].build().components
    pipe = UnlistedPipeline(parts["transformer"].eval(), D.DDIMScheduler(), autoencoder())
    family = type(FLUX)("unlisted", lambda: pipe, {"sharpness": 0.5}, (1, 2))
    check_drivable(pipe)
    plain, trajectory = plain_run(pipe, family)
    with attached(pipe, every_step(trajectory), trajectory.sampler):
        assert np.array_equal(draw(pipe, family), plain)
    with attached(pipe, few_steps(trajectory), trajectory.sampler) as hook, counted_blocks(pipe) as blocks:
        draw(pipe, family)
        assert full_and_skipped(hook) == (4, 8)
        in_four_calls = len(blocks)
    with counted_blocks(pipe) as blocks:
        draw(pipe, family)
    assert len(blocks) == 3 * in_four_calls
    assert np.array_equal(draw(pipe, family), plain)


UNLISTED = {  # from the parts of a family that is listed
    "StableDiffusionInpaintPipeline": ("sd15", {"image": picture(32), "mask_image": picture(32)}),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl", {"image": picture(32), "strength": 0.8}),
    "StableDiffusionXLInpaintPipeline": ("sdxl", {"image": picture(32), "mask_image": picture(32)}),
    "StableDiffusion3Img2ImgPipeline": ("sd3", {"image": picture(32), "height": 16, "width": 16, "strength": 0.8}),
    "StableDiffusion3PAGPipeline": ("sd3", {"pag_scale": 2.0}),
    "FluxInpaintPipeline": ("flux", {"image": picture(16), "mask_image": picture(16)}),
    "PixArtSigmaPAGPipeline": ("pixart_sigma", {"pag_scale": 2.0}),
    "HunyuanDiTPAGPipeline": ("hunyuan_dit", {"pag_scale": 2.0}),
    "SanaPAGPipeline": ("sana", {"pag_scale": 2.0}),
    "QwenImageImg2ImgPipeline": ("qwenimage", {"image": picture(32), "strength": 0.8}),
    "LTXImageToVideoPipeline": ("ltx", {"image": picture(32)}),
    "ChromaImg2ImgPipeline": ("chroma", {"image": picture(16), "strength": 0.8}),
    "HunyuanVideoPipeline": ("hunyuan_video", {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}),
}
QUICK_UNLISTED = (
    "StableDiffusionInpaintPipeline",
    "StableDiffusion3PAGPipeline",
    "ChromaImg2ImgPipeline",
    "LTXImageToVideoPipeline",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", others_slow(UNLISTED, QUICK_UNLISTED))
def test_classes_of_diffusers_that_nobody_listed_work(name):
    listed, more = UNLISTED[name]
    family = family_with(listed, **more)
    if name in ("LTXImageToVideoPipeline", "StableDiffusion3Img2ImgPipeline"):  # which want a picture a prompt
        family = dataclasses.replace(family, conditions=(PROMPT,))
    kind = getattr(D, name)
    known = inspect.signature(kind.__init__).parameters
    accepted = inspect.signature(kind.__call__).parameters
    parts = {key: part for key, part in family.pipeline().components.items() if key in known}
    parts |= {key: False for key in ("requires_safety_checker", "add_watermarker") if key in known}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    for key in list(family.call):
        if key not in accepted:
            del family.call[key]
    check_drivable(pipe)
    caches_outputs(pipe, family)
    for cache in ("residual", "modules"):
        with pytest.raises(ModelError, match="DownBlock2D") if hasattr(pipe, "unet") else nullcontext():
            caches_outputs(pipe, family, cache)


def test_too_few_pictures_for_a_batch_say_so():
    family = family_with("ltx", image=picture(32))
    pipe = D.LTXImageToVideoPipeline(**family.pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(PipelineError, match=r"fails on 2 samples of one picture .*set batch_size: 1"):
        draw(pipe, family)


def test_a_class_that_diffusers_does_not_have_is_named(tmp_path):
    FAMILIES["dit"].pipeline().save_pretrained(tmp_path / "dit")
    index = tmp_path / "dit" / "model_index.json"
    index.write_text(index.read_text().replace('"DiTPipeline"', '"MyPipeline"'))
    with pytest.raises(ModelError, match=r"the installed diffusers .* has no MyPipeline"):
        open_pipeline(tmp_path / "dit", dtype="float32", device="cpu")


class Incomplete(D.DiffusionPipeline):
    def __init__(self, **parts):
        super().__init__()
        self.register_modules(**parts)

    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="np"):
        return D.ImagePipelineOutput(images=None)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scheduler": D.DDIMScheduler()}, "Incomplete has no transformer or"),
        ({"transformer": torch.nn.Linear(2, 2)}, "no scheduler with set_timesteps"),
    ],
)
def test_a_pipeline_that_cannot_be_driven_says_why_beforehand(parts, message):
    with pytest.raises(ModelError, match=message):
        check_drivable(Incomplete(**parts))


def test_an_unconditional_pipeline_is_refused_beforehand():
    unet = D.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(InputError, match="DDPMPipeline takes neither prompts nor class labels"):
        check_drivable(D.DDPMPipeline(unet, D.DDPMScheduler()))


def test_a_picture_that_cannot_be_read_is_named():
    family = family_with("flux_img2img", image="/nowhere/cat.png")
    with pytest.raises(InputError, match=r"--call image=/nowhere/cat.png: no picture can be read there"):
        draw(family.pipeline(), family)


def test_one_negative_prompt_serves_any_number_of_samples():
    for name in ("sd15", "hunyuan_dit", "z_image", "stable_audio"):  # which want as many as prompts
        family = FAMILIES[name]
        assert family.call["negative_prompt"] == NEGATIVE
        assert len(draw(family.pipeline(), family)) == 2


def test_runs_leave_the_global_random_numbers_alone(flux):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(flux, FLUX)
    assert torch.equal(torch.rand(3), expected)
