import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from support.pipelines import BATCH, CALL, FLUX_CALL, STEPS

from cemq.errors import PriorMismatchError
from cemq.pipelines.batches import Batch, make_batches, run
from cemq.pipelines.noise_scheduler import fingerprint, intercepted, next_sample
from cemq.pipelines.trajectory import force, record, run_end
from cemq.quantize import CemqConfig, quantize_in_place
from cemq.runtime.runner import Runner


def test_recording_leaves_the_run_as_it_was(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    with record(dit, measure_steps=True) as trajectory:
        recorded = run(dit, BATCH, steps=STEPS, call=CALL)
    assert np.array_equal(plain, recorded)
    assert trajectory.num_steps == STEPS
    assert trajectory.predictions[0].shape[1] == 4  # learned sigma is gone before scheduler.step
    assert "step" not in dit.scheduler.__dict__


def test_recording_a_stochastic_sampler_draws_the_same_noise(dit):
    dit.scheduler = DDPMScheduler()
    torch.manual_seed(1)
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    torch.manual_seed(1)
    with record(dit, measure_steps=True):
        recorded = run(dit, BATCH, steps=STEPS, call=CALL)
    assert np.array_equal(plain, recorded)


def test_step_sizes_of_flow_matching_are_the_sigma_differences(flux):
    batch = Batch(conditions=("a bold seven",), seeds=(1,))
    with record(flux, measure_steps=True) as trajectory:
        run(flux, batch, steps=STEPS, call=FLUX_CALL)
    sigmas = flux.scheduler.sigmas.numpy()
    assert trajectory.step_sizes == pytest.approx(np.abs(np.diff(sigmas)), rel=1e-3)


def test_every_scheduler_step_counts_even_with_two_evaluations_a_step(dit):
    dit.scheduler = HeunDiscreteScheduler()
    with record(dit) as trajectory:
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert trajectory.num_steps == 2 * STEPS - 1 == len(fingerprint(dit.scheduler).timesteps)


def test_a_forced_run_sees_exactly_the_reference_samples(dit):
    with record(dit) as reference:
        run(dit, BATCH, steps=STEPS, call=CALL)
    seen = []
    hook = dit.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    quantize_in_place(dit.transformer, CemqConfig("w4a8"))
    with force(dit, reference) as forced:
        run(dit, BATCH, steps=STEPS, call=CALL)
    hook.remove()
    for entered, sample in zip(seen[1:], reference.samples, strict=False):
        assert torch.equal(entered[: len(entered) // 2], sample[: len(sample) // 2])
    assert not torch.equal(forced.predictions[3], reference.predictions[3])


def test_forcing_the_same_model_gives_the_same_predictions(dit_multistep):
    with record(dit_multistep) as reference:
        run(dit_multistep, BATCH, steps=STEPS, call=CALL)
    with force(dit_multistep, reference) as forced:
        run(dit_multistep, BATCH, steps=STEPS, call=CALL)
    assert all(torch.equal(a, b) for a, b in zip(forced.predictions, reference.predictions, strict=True))


def changed_in_place(scheduler, returned):
    """A pipeline that puts a part of every sample back, and spoils the model output, once the step is done."""

    def step(original, call):
        result = original(*call.args, **call.kwargs)
        returned.append((call.get("model_output").clone(), next_sample(result).clone()))
        call.get("model_output").zero_()
        next_sample(result)[..., :2, :] = 0.0
        return result

    return intercepted(scheduler, "step", step)


def test_recordings_stay_as_they_were_when_the_pipeline_changes_tensors_in_place(dit):
    returned, forced_returned = [], []
    with record(dit) as reference, run_end(dit) as end, changed_in_place(dit.scheduler, returned):
        run(dit, BATCH, steps=STEPS, call=CALL)
    with force(dit, reference) as forced, changed_in_place(dit.scheduler, forced_returned):
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert torch.equal(end.sample, returned[-1][1])
    for step in range(STEPS):
        assert torch.equal(reference.predictions[step], returned[step][0])
        assert torch.equal(reference.samples[step], returned[step][1])
        assert torch.equal(forced.predictions[step], forced_returned[step][0])


class InPlaceScheduler(DDIMScheduler):
    def step(self, model_output, timestep, sample, return_dict=True):
        result = super().step(model_output, timestep, sample, return_dict=return_dict)
        sample.zero_()
        model_output.zero_()
        return result


def test_measuring_step_sizes_leaves_a_run_alone_whose_sampler_works_in_place(dit):
    plain = run(dit, BATCH, steps=STEPS, call=CALL)
    dit.scheduler = InPlaceScheduler.from_config(dit.scheduler.config)
    with record(dit, measure_steps=True) as trajectory:
        assert np.array_equal(run(dit, BATCH, steps=STEPS, call=CALL), plain)
    assert all(prediction.any() for prediction in trajectory.predictions)


def test_a_run_leaves_the_arguments_of_its_call_as_they_are():
    class Pipeline:
        def __call__(self, prompt, num_inference_steps, generator, output_type, options):
            return {"images": options["names"].pop()}

    call = {"options": {"names": ["first"]}}
    for _ in range(2):
        assert run(Pipeline(), Batch(conditions=("x",), seeds=(1,)), steps=1, call=call) == "first"
    assert call == {"options": {"names": ["first"]}}


def test_forcing_a_longer_run_is_refused(dit):
    with record(dit) as reference:
        run(dit, BATCH, steps=3, call=CALL)
    with force(dit, reference), pytest.raises(PriorMismatchError, match="more steps than the 3"):
        run(dit, BATCH, steps=4, call=CALL)


def test_the_end_of_a_run_is_what_was_recorded_last(dit):
    with record(dit) as trajectory, run_end(dit) as end:
        run(dit, BATCH, steps=STEPS, call=CALL)
    assert torch.equal(end.sample, trajectory.samples[-1])
    assert end.sampler == trajectory.sampler


def test_an_interception_is_undone_after_an_exception(dit):
    with pytest.raises(ZeroDivisionError), record(dit):
        raise ZeroDivisionError
    assert "step" not in dit.scheduler.__dict__


def test_interceptions_nest_and_a_deep_copy_is_left_alone():
    import copy

    calls = []
    scheduler = FlowMatchEulerDiscreteScheduler()

    def around(name):
        def step(original, call):
            calls.append(name)
            return original(*call.args, **call.kwargs)

        return step

    with intercepted(scheduler, "step", around("outer")), intercepted(scheduler, "step", around("inner")):
        scheduler.set_timesteps(4)
        scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.ones(1))
        assert calls == ["inner", "outer"]
        twin = copy.deepcopy(scheduler)
        twin.step(torch.ones(1), twin.timesteps[1], torch.ones(1))
        assert calls == ["inner", "outer"]
        assert (scheduler.step_index, twin.step_index) == (1, 2)


def profiled(pipe, scheme):
    batches = make_batches((1, 2, 3), samples=3, first_seed=0, batch_size=2)
    runs = []
    original = type(pipe).__call__
    counting = type("Counting", (type(pipe),), {"__call__": lambda *a, **k: (runs.append(1), original(*a, **k))[1]})
    counting.__call__.__signature__ = __import__("inspect").signature(original)
    pipe.__class__ = counting
    runner = Runner(pipe=pipe, steps=STEPS, call=CALL)
    references = runner.record(batches)
    if scheme != "none":
        quantize_in_place(pipe.transformer, CemqConfig(scheme))
    prior = runner.profile(batches, references, scheme=scheme, dtype="float32")
    return prior, references, batches, len(runs)


def test_two_runs_a_batch_profile_every_interval(dit):
    prior, _, batches, runs = profiled(dit, "w8a8")
    assert runs == 2 * len(batches)
    errors = prior.reuse_errors("combined")
    assert np.isfinite(errors[np.triu_indices(STEPS)]).all()  # every (cache interval, step) with a step to reuse
    assert prior.metadata.samples == 3
    assert prior.metadata.seeds == (0, 1, 2)


def test_without_quantization_the_three_views_are_equal(dit):
    prior, *_ = profiled(dit, "none")
    for name in ("cache", "self"):
        assert np.array_equal(prior.reuse_errors("combined"), prior.reuse_errors(name), equal_nan=True)
    assert np.allclose(prior.quantization_floor, 0, atol=1e-7)


def test_the_age_zero_row_is_the_measured_quantization_error(dit):
    prior, references, batches, _ = profiled(dit, "w4a8")
    squared, energy = np.zeros(STEPS), np.zeros(STEPS)
    for reference, batch in zip(references, batches, strict=True):
        with force(dit, reference) as forced:
            run(dit, batch, steps=STEPS, call=CALL)
        for step, (q, v) in enumerate(zip(forced.predictions, reference.predictions, strict=True)):
            share = len(batch.seeds) / v.numel()
            squared[step] += share * (q.double() - v.double()).square().sum().item()
            energy[step] += share * v.double().square().sum().item()
    assert prior.quantization_floor == pytest.approx(np.sqrt(squared / energy), rel=1e-6)
    assert (prior.quantization_floor > 1e-3).all()
    combined, cache = prior.reuse_errors("combined"), prior.reuse_errors("cache")
    assert (combined[1, 1:] != cache[1, 1:]).all()


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_channel_statistics_are_those_of_the_predictions(request, kind):
    pipe = request.getfixturevalue(kind)
    conditions, call = ((1, 2), CALL) if kind == "dit" else (("a bold seven", "a two"), FLUX_CALL)
    batches = make_batches(conditions, samples=3, first_seed=0, batch_size=2)
    runner = Runner(pipe=pipe, steps=3, call=call)
    references = runner.record(batches)
    prior = runner.profile(batches, references, scheme="none", dtype="float32")
    predictions = [torch.cat([each.predictions[step] for each in references]).double() for step in range(3)]
    axis = 1 if kind == "dit" else 2  # packed latents have their channels last
    channels = np.stack([tensor.movedim(axis, 0).flatten(1).numpy() for tensor in predictions])
    assert prior.channel_means == pytest.approx(np.stack([channels.mean(2)] * 2), abs=1e-6)
    grams = np.einsum("icp,jcp->cij", channels, channels) / channels.shape[2]
    assert prior.channel_grams == pytest.approx(np.stack([grams] * 2), abs=1e-6)


def test_token_cosines_are_means_over_samples_of_cosines_of_token_means(dit):
    prior, references, batches, _ = profiled(dit, "w4a8")
    forced = []
    for reference, batch in zip(references, batches, strict=True):
        with force(dit, reference) as trajectory:
            run(dit, batch, steps=STEPS, call=CALL)
        forced.append(trajectory)
    q, v = (torch.cat([torch.stack(t.predictions).mean((3, 4)) for t in runs], 1) for runs in (forced, references))
    for view, (left, right) in enumerate([(v, v), (q, q), (q, v)]):
        expected = torch.cosine_similarity(left[:, None], right[None], dim=3).mean(2)
        assert prior.token_cosines[view] == pytest.approx(expected.numpy(), abs=1e-5)
