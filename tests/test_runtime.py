import warnings

import numpy as np
import pytest
import torch
from conftest import FLUX_CALL
from diffusers import DDIMScheduler, HookRegistry, PNDMScheduler

from cemq.errors import ModelError
from cemq.runtime import attach, attached, detach, schedule_hook
from cemq.runtime.hook import HOOK
from cemq.sampler import fingerprint
from cemq.sampling import Batch, run
from cemq.schedule import CacheSchedule
from cemq.trajectory import record

BATCH = Batch(conditions=(1, 2), seeds=(5, 6))
CALL = {"guidance_scale": 2.0}
STEPS = 6
EVERY = CacheSchedule(num_steps=STEPS, full_steps=tuple(range(STEPS)))
HALF = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="taylor1")


def sampler_of(pipe, steps=STEPS):
    pipe.scheduler.set_timesteps(steps)
    return fingerprint(pipe.scheduler)


def count_blocks(model):
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_full_schedule_equals_the_plain_pipeline_bit_for_bit(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, EVERY, sampler_of(dit)):
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)


def test_a_skipped_step_runs_no_block(dit):
    calls = count_blocks(dit.transformer)
    with attached(dit, HALF, sampler_of(dit)) as hook:
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert len(calls) == HALF.budget == hook.full_evaluations
    assert hook.skipped_evaluations == STEPS - HALF.budget


def test_two_runs_with_the_same_seed_are_identical(dit):
    with attached(dit, HALF, sampler_of(dit)):
        first, second = (run(dit, BATCH, steps=STEPS, call=CALL) for _ in range(2))
    assert np.array_equal(first, second)


def test_removal_restores_the_pipeline_bit_for_bit(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with attached(dit, HALF, sampler_of(dit)):
        assert not np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
    assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
    assert not {"step", "set_timesteps"} & set(dit.scheduler.__dict__)
    with pytest.raises(ModelError, match="no cemq schedule"):
        schedule_hook(dit)


def test_a_run_after_an_aborted_run_is_clean(dit):
    with attached(dit, HALF, sampler_of(dit)):
        expected = run(dit, BATCH, steps=STEPS, call=CALL)
        steps = []

        def stop():
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(dit, Batch(conditions=(7, 8), seeds=(1, 2)), steps=STEPS, call=CALL, on_step=stop)
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), expected)


@pytest.mark.parametrize("predictor", ["reuse", "taylor1"])
def test_skipped_steps_are_served_as_the_schedule_says(dit, predictor):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor=predictor)
    with attached(dit, schedule, sampler_of(dit)), record(dit) as trajectory:
        run(dit, BATCH, steps=STEPS, call=CALL)
    p = trajectory.predictions
    for step in (2, 3, 5):
        expected = sum(weight * p[source] for source, weight in zip(*schedule.serving(step), strict=True))
        assert torch.allclose(p[step], expected, atol=1e-5)


def test_each_guidance_branch_has_its_own_history(flux):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    batch, calls = Batch(conditions=("a bold seven",), seeds=(3,)), count_blocks(flux.transformer)
    with record(flux) as plain:
        run(flux, batch, steps=STEPS, call=FLUX_CALL)
    calls.clear()
    with attached(flux, schedule, plain.sampler) as hook, record(flux) as cached:
        run(flux, batch, steps=STEPS, call=FLUX_CALL)
    assert len(calls) == 2 * schedule.budget == hook.full_evaluations
    assert torch.equal(cached.predictions[0], plain.predictions[0])
    assert torch.equal(cached.predictions[1], cached.predictions[0])  # so neither branch served the other
    assert torch.equal(cached.predictions[5], cached.predictions[3])


def test_repeated_timesteps_do_not_shift_the_schedule(dit):
    dit.scheduler = PNDMScheduler(skip_prk_steps=True)  # one step more than asked for, one timestep twice
    expected = sampler_of(dit)
    schedule = CacheSchedule(num_steps=STEPS + 1, full_steps=(0, 2, 4))
    with attached(dit, schedule, expected) as hook:
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert (hook.full_evaluations, hook.skipped_evaluations) == (3, STEPS - 2)


def test_another_step_count_computes_in_full_and_warns_once(dit):
    plain = run(dit, BATCH, steps=4, call=CALL)
    with attached(dit, HALF, sampler_of(dit)):
        with pytest.warns(UserWarning, match="this run has 4 steps, the schedule was planned for 6") as caught:
            assert np.array_equal(run(dit, BATCH, steps=4, call=CALL), plain)
            run(dit, BATCH, steps=4, call=CALL)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(dit, BATCH, steps=STEPS, call=CALL)


def test_another_sampler_setting_computes_in_full(dit):
    expected = sampler_of(dit)
    dit.scheduler = DDIMScheduler(beta_end=0.03)
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with (
        attached(dit, HALF, expected),
        pytest.warns(UserWarning, match="settings or timesteps are not those"),
    ):
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)


def test_a_scheduler_swapped_after_attaching_computes_in_full(dit):
    with attached(dit, HALF, sampler_of(dit)) as hook:
        dit.scheduler = DDIMScheduler.from_config(dit.scheduler.config)
        with pytest.warns(UserWarning, match="scheduler was replaced"):
            run(dit, BATCH, steps=STEPS, call=CALL)
        assert hook.full_evaluations == STEPS
        assert not hook.run.histories


def test_a_run_that_starts_in_the_middle_computes_in_full(dit):
    with attached(dit, HALF, sampler_of(dit)) as hook:
        dit.scheduler.set_timesteps(STEPS)
        latents = torch.zeros(1, 4, 8, 8)
        with pytest.warns(UserWarning, match="takes its timesteps from another place"):
            for timestep in dit.scheduler.timesteps[2:]:  # image to image with strength 2/3
                with torch.no_grad():
                    output = dit.transformer(
                        latents, timestep=timestep[None], class_labels=torch.tensor([1]), return_dict=False
                    )[0]
                latents = dit.scheduler.step(output[:, :4], timestep, latents).prev_sample
        assert hook.skipped_evaluations == 0


def test_a_batch_that_changes_within_a_run_is_not_served_from_the_wrong_shape(dit):
    with attached(dit, HALF, sampler_of(dit)):
        dit.scheduler.set_timesteps(STEPS)
        with pytest.warns(UserWarning, match="no earlier output of its shape"), torch.no_grad():
            for index, timestep in enumerate(dit.scheduler.timesteps):
                rows = 2 if index < 2 else 1
                output = dit.transformer(
                    torch.zeros(rows, 4, 8, 8), timestep=timestep[None], class_labels=torch.tensor([1] * rows)
                ).sample
                assert output.shape[0] == rows
                dit.scheduler.step(output[:, :4], timestep, torch.zeros(rows, 4, 8, 8))


def test_attaching_twice_is_refused_and_detaching_twice_is_not(dit):
    attach(dit, HALF, sampler_of(dit))
    with pytest.raises(ModelError, match="already"):
        attach(dit, HALF, sampler_of(dit))
    detach(dit)
    detach(dit)
    assert HookRegistry.check_if_exists_or_initialize(dit.transformer).get_hook(HOOK) is None


def test_an_active_diffusers_cache_is_refused(flux):
    from diffusers import FirstBlockCacheConfig

    flux.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ModelError, match="disable_cache"):
        attach(flux, HALF, fingerprint(DDIMScheduler()))
