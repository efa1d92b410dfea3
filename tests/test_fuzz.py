"""Random sequences of what people do with a pipeline that a schedule is attached to.

Whatever was done before: a run that skips nothing gives the plain pipeline's latents bit for bit, any other finite ones
of the same shape, a denoiser called by itself computes, and a clean run is what the first under its schedule was.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.callbacks import GIVEN, end_guidance, enlarge, keep_one
from support.families import SD3_TRANSFORMER, flow_euler, flux_autoencoder, seeded

from cemq.pipelines.noise_scheduler import fingerprint
from cemq.predict.correctors import CORRECTORS, NO_CORRECTOR
from cemq.prior.error_prior import ErrorPrior, PriorMetadata
from cemq.runtime import attached, schedule_hook, set_budget
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan

STEPS, OTHER = 5, 4


class AbortError(Exception):
    pass


# --- what is done


def enlarge_once(pipe, given):
    return enlarge(pipe, given) if given["latents"].shape[-1] == 4 else {}


def replace(pipe, given):
    generator = torch.Generator().manual_seed(7)
    return {"latents": torch.randn(given["latents"].shape, generator=generator)}


def change_in_place(pipe, given):
    given["latents"][:1] += 1.0
    return {}


def round_off(pipe, given):
    return {"latents": given["latents"].bfloat16().float()}


def interrupt(pipe, given):
    pipe._interrupt = True
    return {}


def abort(pipe, given):
    raise AbortError


ACTIONS = (enlarge_once, keep_one, replace, change_in_place, round_off, end_guidance, interrupt, abort)


@dataclass(frozen=True)
class Draw:
    """A run of the pipeline; ``actions`` are done at the end of steps. ``swapped``: by another scheduler object."""

    seed: int
    steps: int = STEPS
    guidance: float = 3.0
    skip_layer: bool = False  # calls the denoiser once more on some steps
    actions: tuple[tuple[int, int], ...] = ()  # of `ACTIONS`, by step
    swapped: bool = False

    def __call__(self, pipe):
        def callback(pipe, step, timestep, given):
            return ACTIONS[actions[step]](pipe, given) if step in actions else {}

        actions, before = dict(self.actions), pipe.scheduler
        if self.swapped:
            pipe.scheduler = type(before).from_config(before.config)
        try:
            return pipe(
                **prompts(), num_inference_steps=self.steps, guidance_scale=self.guidance, height=4, width=4,
                skip_guidance_layers=[0] if self.skip_layer else None, skip_layer_guidance_stop=0.7,
                output_type="latent", generator=torch.Generator().manual_seed(self.seed),
                callback_on_step_end=callback, callback_on_step_end_tensor_inputs=list(GIVEN),
            ).images  # fmt: skip
        finally:
            pipe.scheduler = before


@dataclass(frozen=True)
class OwnLoop:
    """The scheduler and the denoiser in a loop of one's own, which may stop early."""

    rows: int
    until: int = STEPS

    def __call__(self, pipe):
        sample = torch.randn(self.rows, 4, 4, 4, generator=torch.Generator().manual_seed(3))
        pipe.scheduler.set_timesteps(STEPS)
        for timestep in pipe.scheduler.timesteps[: self.until]:
            sample = pipe.scheduler.step(called(pipe, sample, timestep), timestep, sample).prev_sample
        return sample


@dataclass(frozen=True)
class Direct:
    """The denoiser called by itself."""

    rows: int

    def __call__(self, pipe):
        sample = torch.randn(self.rows, 4, 4, 4, generator=torch.Generator().manual_seed(4))
        return called(pipe, sample, torch.tensor(500.0))


@dataclass(frozen=True)
class Budget:
    full_steps: int


CLEAN, ALONE = Draw(seed=1), Direct(rows=2)


def prompts(rows=2):
    generator = torch.Generator().manual_seed(0)
    sizes = {"prompt_embeds": (rows, 6, 32), "pooled_prompt_embeds": (rows, 64)}
    return {
        prefix + name: torch.randn(size, generator=generator)
        for prefix in ("", "negative_")
        for name, size in sizes.items()
    }


@torch.no_grad()
def called(pipe, sample, timestep):
    given = prompts(len(sample))
    return pipe.transformer(
        hidden_states=sample, timestep=timestep.expand(len(sample)), encoder_hidden_states=given["prompt_embeds"],
        pooled_projections=given["pooled_prompt_embeds"], return_dict=False,
    )[0]  # fmt: skip


# --- the pipelines


def make_pipe():
    pipe = StableDiffusion3Pipeline(
        transformer=seeded(SD3Transformer2DModel, **SD3_TRANSFORMER | {"num_layers": 2}), vae=flux_autoencoder(4),
        scheduler=flow_euler(shift=3.0), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes():
    """The pipeline that schedules are attached to, and what a plain one of the same weights makes of a `Draw`."""
    plain = make_pipe()
    return make_pipe(), functools.cache(lambda done: done(plain).clone())


def plan_of(schedule, cache):
    """With a prior to plan other budgets and step counts from."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(flow_euler(shift=3.0).config)
    scheduler.set_timesteps(STEPS)
    v = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 16)), axis=0)
    q = v + 0.1 * np.random.default_rng(1).normal(size=v.shape)
    metadata = PriorMetadata(
        sampler=fingerprint(scheduler), scheme="none", dtype="float32", call={}, samples=1, seeds=(0,), conditions=(1,)
    )
    prior = ErrorPrior(qq=q @ q.T, qv=q @ v.T, vv=v @ v.T, step_sizes=np.ones(STEPS), metadata=metadata)
    return Plan(schedule=schedule, sampler=metadata.sampler, prior=prior, cache=cache)


# --- the sequences


# Lists of fixed length and flat choices: nested collections come out small mostly, and twenty sequences are few.
FULL_STEPS = [(0, *more) for size in (1, 2, 3) for more in itertools.combinations(range(1, STEPS), size)]
SERVED = [
    *(("output", corrector) for corrector in (NO_CORRECTOR, NO_CORRECTOR, *CORRECTORS, *CORRECTORS)),
    *((cache, NO_CORRECTOR) for cache in ("residual", "modules")),
]
PREDICTORS = ["reuse", "taylor1", "taylor1", "taylor2", "goc"]


@st.composite
def draws(draw):
    done = draw(st.lists(st.integers(0, len(ACTIONS) - 1), min_size=2, max_size=2))
    steps = draw(st.lists(st.integers(0, STEPS - 2), min_size=2, max_size=2))
    return Draw(
        seed=draw(st.integers(1, 3)),
        steps=draw(st.sampled_from([STEPS, STEPS, STEPS, OTHER])),
        guidance=draw(st.sampled_from([3.0, 3.0, 1.0])),
        skip_layer=draw(st.booleans()),
        actions=tuple(zip(steps, done, strict=True)),
        swapped=draw(st.integers(0, 9)) == 9,
    )


OPERATIONS = st.one_of(
    st.builds(Direct, rows=st.integers(1, 2)),  # the simplest
    draws(),
    draws(),
    draws(),
    st.builds(OwnLoop, rows=st.integers(1, 2), until=st.integers(1, STEPS)),
    st.builds(Budget, st.integers(2, STEPS)),
)


def check(pipes, full_steps, predictor, served, operations):
    (pipe, plain), (cache, corrector) = pipes, served
    schedule = CacheSchedule(num_steps=STEPS, full_steps=full_steps, predictor=predictor, corrector=corrector)
    clean = {}  # the first clean run under each schedule

    def check_clean(hook):
        found = CLEAN(pipe)
        assert torch.equal(found, clean.setdefault(hook.schedule, found))
        assert torch.isfinite(found).all()
        assert hook.skipped_evaluations or torch.equal(found, plain(CLEAN))
        assert not hook.cached_bytes

    with attached(pipe, plan_of(schedule, cache)) as hook, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cemq: ")
        check_clean(hook)
        for operation in operations:
            if isinstance(operation, Budget):
                set_budget(pipe, operation.full_steps)
                hook = schedule_hook(pipe)
                check_clean(hook)
            elif isinstance(operation, Direct):
                assert torch.equal(operation(pipe), plain(operation))
            elif not check_run(pipe, hook, operation, plain):
                if isinstance(operation, Draw):  # after a loop it would be the loop's next step
                    assert torch.equal(ALONE(pipe), plain(ALONE))
                check_clean(hook)
        check_clean(hook)
    assert torch.equal(CLEAN(pipe), plain(CLEAN))


def check_run(pipe, hook, operation, plain):
    """Whether it came to its end; it is not begun where the plain pipeline cannot do it."""
    try:
        expected = plain(operation)
    except AbortError:
        with pytest.raises(AbortError):
            operation(pipe)
        return False
    except RuntimeError:  # SD3 guides by a lacking layer with the prompts that it was given first
        return True
    found = operation(pipe)
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    if getattr(operation, "swapped", False) or not hook.skipped_evaluations:
        assert torch.equal(found, expected)
    stopped = ACTIONS.index(interrupt) in dict(getattr(operation, "actions", ())).values()
    return not stopped and getattr(operation, "until", STEPS) == STEPS


SEQUENCES = {
    "full_steps": st.sampled_from(FULL_STEPS),
    "predictor": st.sampled_from(PREDICTORS),
    "served": st.sampled_from(SERVED),
    "operations": st.lists(OPERATIONS, min_size=4, max_size=4),
}
HOW = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("number", range(20))
def test_nothing_that_is_done_with_a_pipeline_is_left_in_it(pipes, number):
    @seed(number)  # one each: of twenty in a row most are small changes of a few
    @settings(max_examples=2, **HOW)  # the first is the simplest there is
    @given(**SEQUENCES)
    def run(**sequence):
        check(pipes, **sequence)

    run()


@pytest.mark.slow
@settings(max_examples=300, **HOW)
@given(**SEQUENCES)
def test_nothing_that_is_done_with_a_pipeline_is_left_in_it_in_300_sequences(pipes, **sequence):
    check(pipes, **sequence)
