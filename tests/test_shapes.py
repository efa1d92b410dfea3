"""Runs whose latents are enlarged, thinned out or replaced on the way, and models whose outputs change shape."""

import types
import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.callbacks import WARNED, drawn, end_guidance, enlarge, keep_one
from support.families import FAMILIES
from support.models import Block
from support.pipelines import FLUX_CALL, ONE, STEPS, make_flux
from torch import nn

from cemq.runtime import attached
from cemq.runtime.corrector import Corrector
from cemq.runtime.history import History, summed
from cemq.schedule import CacheSchedule

SEEN_TWICE = np.tril(np.ones((STEPS, STEPS)))  # every prediction moves the sample by itself, once and for all
SUMS = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 5), predictor="reuse", corrector="linear")
CACHES = ("output", "residual", "modules")


@pytest.fixture(scope="module")
def sd3():
    return FAMILIES["sd3"].pipeline()


# --- what is owed, in the head


def owed(predictions, *, change=None, as_planned=(True,) * STEPS, schedule=SUMS):
    """What a `Corrector` adds at each step to these predictions; ``change`` makes what a step is handed of what the
    step before returned."""
    corrector, sample, added = (
        Corrector(schedule, schedule.correcting(SEEN_TWICE)),
        torch.zeros_like(predictions[0]),
        [],
    )
    for step, prediction in enumerate(predictions):
        handed = change(step, sample) if change else sample
        corrected = corrector.apply(prediction, step, handed, as_planned=as_planned[step])
        added.append(corrected - prediction)
        sample = handed + corrected if handed.shape == corrected.shape else corrected.clone()
        corrector.returned(sample, step)
    return added


def served(*outputs, rows=2):
    """Predictions of ``SUMS`` where its full-compute steps give these outputs."""
    values = [outputs[0], outputs[0], outputs[1], outputs[1], outputs[1], outputs[2]]
    return [torch.full((rows, 3), value) for value in values]


def test_a_debt_is_paid_to_the_sample_that_the_skipped_steps_moved():
    first, second = owed(served(1.0, 3.0, 6.0))[2::3]
    assert torch.equal(first, torch.full((2, 3), 1.0))  # interpolated 2, served 1
    assert torch.equal(second, torch.full((2, 3), 1.0 + 2.0))  # 4 and 5, served 3 twice


def test_positions_that_were_replaced_are_owed_nothing_by_the_steps_before():
    def replace(step, sample):
        sample = sample.clone()
        if step == 4:  # between the skipped steps 3 and 4
            sample[1, 2] = -9.0
        return sample

    first, second = owed(served(1.0, 3.0, 6.0), change=replace)[2::3]
    assert (first == 1).all()
    assert second.tolist() == [[3.0] * 3, [0.0] * 3]  # one channel is another, so the position is


def test_a_channel_that_is_alike_by_chance_is_not_corrected_by_itself():
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2), predictor="reuse", corrector="linear")
    predictions = [torch.full((1, 4, 2, 2), float(step // 2)) for step in range(STEPS)]

    def replace(step, sample):
        return torch.cat([sample[:, :3], sample[:, 3:] + 1], 1) if step == 2 else sample

    assert not owed(predictions, change=replace, schedule=schedule)[2].any()
    assert (owed(predictions, schedule=schedule)[2] == 0.5).all()


def test_a_sample_that_is_changed_in_place_is_another():
    def blank(step, sample):
        if step == 4:
            sample[0] = -7.0
        return sample

    second = owed(served(1.0, 3.0, 6.0), change=blank)[5]
    assert second.tolist() == [[0] * 3, [3] * 3]


def test_what_is_replaced_where_nothing_is_owed_costs_nothing():
    found = owed(served(1.0, 3.0, 6.0), change=lambda step, sample: sample + 5.0 if step in (0, 1, 3) else sample)
    assert (found[2] == 1).all()
    assert (found[5] == 3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [True, False])
def test_a_sample_that_is_cast_between_steps_is_the_same(dtype, back):
    predictions = [torch.randn(2, 3, generator=torch.Generator().manual_seed(step)) for step in range(STEPS)]
    predictions[1], predictions[3], predictions[4] = predictions[0], predictions[2], predictions[2]
    rounded = owed(predictions, change=lambda _, sample: sample.to(dtype).float() if back else sample.to(dtype))
    expected = owed(predictions)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(rounded, expected, strict=True))
    assert rounded[5].any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("at", range(1, STEPS))
def test_predictions_of_another_shape_are_owed_nothing_by_those_before(at, rows):
    predictions = served(1.0, 3.0, 6.0)[:at] + served(1.0, 3.0, 6.0, rows=rows)[at:]
    found = owed(predictions, change=lambda step, sample: torch.zeros(rows, 3) if step == at else sample)
    assert [each.shape for each in found] == [each.shape for each in predictions]
    assert (found[5] == (3 if at < 3 else 0)).all()  # the last segment began with step 2
    assert (found[2] == (1 if at > 2 else 0)).all()


@pytest.mark.parametrize("late", [1, 3, 4])
def test_a_skipped_step_that_was_computed_after_all_owes_nothing(late):
    as_planned = [step != late for step in range(STEPS)]
    found = owed(served(1.0, 3.0, 6.0), as_planned=as_planned)
    assert (found[2] == (0 if late == 1 else 1)).all()
    assert (found[5] == (3 if late == 1 else 0)).all()


@pytest.mark.parametrize(("rows", "expected"), [(2, [[1.0] * 6, [0.0] * 6]), (4, [[0.0] * 6] * 4)])
def test_a_prediction_of_other_channels_than_its_sample_is_paid_by_position_and_of_other_rows_all_or_nothing(
    rows, expected
):
    for replaced in (False, True):
        corrector, sample = Corrector(SUMS, SUMS.correcting(SEEN_TWICE)), torch.zeros(2, 3)
        for step, value in enumerate((1.0, 1.0, 3.0)):
            sample = sample + torch.tensor([[0.0], [1.0]]) if step == 2 and replaced else sample
            prediction = torch.full((rows, 6), value)  # learned variances double the channels
            added = corrector.apply(prediction, step, sample) - prediction
            corrector.returned(sample := sample.clone(), step)
        assert added.tolist() == (expected if replaced else [[1.0] * 6] * rows)


def test_inference_mode_counts_no_versions_and_changes_are_seen_all_the_same():
    with torch.inference_mode():
        test_a_sample_that_is_changed_in_place_is_another()
        test_a_debt_is_paid_to_the_sample_that_the_skipped_steps_moved()


# --- what is kept, in the head


def test_a_longer_first_output_is_forgotten_with_the_first_of_another_shape():
    history = History()
    for step, rows in ((0, 3), (1, 1), (2, 1)):
        history.keep(step, (torch.full((rows, 2), float(step)),))
    assert list(history.kept) == [1, 2]
    assert summed(history.serve((2, 1), (2.0, -1.0)))[0].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(
    "other",
    [(torch.ones(2),), (torch.ones(2), torch.ones(1)), (torch.ones(2), torch.ones(3), None), [torch.ones(2)] * 2],
)
def test_trees_that_differ_are_not_summed(other):
    history = History()
    history.keep(0, (torch.ones(2), torch.ones(3)))
    history.keep(1, other)
    assert list(history.kept) == [1]


class Prefixed(nn.Module):
    """Runs its blocks over a prompt and the picture, and returns both; once the prompt is in its cache, the picture
    alone, called with tensors of the same shapes."""

    def __init__(self, prompt=3):
        super().__init__()
        self.blocks, self.prompt, self.prefix = nn.ModuleList([Block(), Block()]), prompt, None

    def forward(self, sample, timestep, kv_cache_mode):
        tokens = sample * timestep
        if kv_cache_mode == "extract":
            tokens = torch.cat([torch.ones_like(sample)[:, : self.prompt], tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, 0.1)
        return (tokens,)


class Loop(types.SimpleNamespace):
    """Stands in for a pipeline."""


def prefixed_run(schedule=None, cache="output", picture=4):
    """The outputs of every step, cut to the picture, and how many were computed."""
    pipe = Loop(transformer=Prefixed(), scheduler=FlowMatchEulerDiscreteScheduler())
    torch.manual_seed(0)
    sample, outputs = torch.randn(1, picture, 2), []

    def loop():
        nonlocal sample
        pipe.scheduler.set_timesteps(STEPS)
        for index, timestep in enumerate(pipe.scheduler.timesteps):
            mode = "extract" if index == 0 else "cached"
            output = pipe.transformer(sample, timestep / 1000, mode)[0][:, -picture:]
            outputs.append(output)
            sample = pipe.scheduler.step(output, timestep, sample).prev_sample

    if schedule is None:
        loop()
        return outputs, STEPS
    with attached(pipe, schedule, cache=cache) as hook, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "cemq: a call to the denoiser on a skipped|cemq: a skipped step calls other")
        loop()
    return outputs, hook.full_evaluations


@pytest.mark.parametrize("predictor", ["reuse", "taylor1", "taylor2"])
@pytest.mark.parametrize("picture", [1, 4])  # a single token would be broadcast over all
@pytest.mark.parametrize("cache", CACHES)
def test_a_model_whose_first_output_is_longer_is_served_from_outputs_of_one_length(cache, picture, predictor):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 3), predictor=predictor)
    plain, _ = prefixed_run(picture=picture)
    found, computed = prefixed_run(schedule, cache, picture)
    assert [each.shape for each in found] == [each.shape for each in plain]
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    looked_back_to_the_first = {"reuse": 0, "taylor1": 1, "taylor2": 3}[predictor]
    assert computed == len(schedule.full_steps) + looked_back_to_the_first
    if looked_back_to_the_first:
        assert torch.equal(found[2], plain[2])


@pytest.mark.parametrize("cache", ["residual", "modules"])
def test_a_step_that_calls_its_blocks_with_other_shapes_than_its_source_is_computed(cache):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse")
    plain, _ = prefixed_run()
    found, computed = prefixed_run(schedule, cache)
    assert computed == 4
    assert all(torch.equal(one, other) for one, other in zip(found[:4], plain[:4], strict=True))


# --- pipelines

CHANGES = {"enlarge": enlarge, "keep one": keep_one, "without guidance": end_guidance}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("predictor", ["reuse", "taylor2"])
@pytest.mark.parametrize("change", CHANGES)
def test_latents_of_another_shape_are_computed_until_there_is_something_to_serve_them_from(
    sd3, change, predictor, cache
):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 3), predictor=predictor)
    found, taken, computed = drawn(sd3, schedule, cache=cache, at=[1], change=CHANGES[change])
    plain, expected, _ = drawn(sd3, at=[1], change=CHANGES[change])
    assert found.shape == plain.shape
    assert all(torch.equal(taken[step][1], expected[step][1]) for step in range(4))  # 2 is computed, 3 is full
    assert computed == (4 if predictor == "reuse" else STEPS)
    assert torch.isfinite(found).all()
    assert torch.equal(found, plain) == (predictor == "taylor2")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", range(STEPS - 1))
def test_with_a_corrector_only_what_was_served_to_this_sample_is_made_up_for(sd3, at, change):
    """Flow matching's Euler steps are lengths times outputs, so what was added to an output can be told."""
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 2, 5), predictor="reuse", corrector="linear")
    found, taken, _ = drawn(sd3, schedule, at=[at], change=CHANGES[change])
    lengths = -np.diff(sd3.scheduler.sigmas.numpy())
    added = [
        ((before - after) / length - output).abs().max().item()
        for (before, output, after), length in zip(taken, lengths.tolist(), strict=True)
    ]
    rounding = 1e-4
    assert torch.isfinite(found).all()
    assert all(added[step] < rounding for step in (0, 1, 3, 4))
    # else skipped steps were computed, or what they owe is owed to another sample; without guidance it is the same
    moved = at + (change == "without guidance")
    assert (added[2] > 10 * rounding) == (moved >= 2)
    assert (added[5] > 10 * rounding) == (at < 2 or moved == 5)


def test_replaced_latents_are_owed_nothing(sd3):
    def other(pipe, given):
        return {"latents": given["latents"].roll(1, 0)}

    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse", corrector="linear")
    _, taken, _ = drawn(sd3, schedule, at=[2], change=other)
    before, output, after = taken[3]
    length = float(sd3.scheduler.sigmas[3] - sd3.scheduler.sigmas[4])
    assert torch.allclose(before - after, length * output, atol=1e-5)
    _, taken, _ = drawn(
        sd3, schedule, at=[2], change=lambda pipe, given: {"latents": given["latents"].bfloat16().float()}
    )
    before, output, after = taken[3]
    assert not torch.allclose(before - after, length * output, atol=1e-2)


def test_where_a_callback_blends_in_an_original_the_rest_is_corrected_as_ever(sd3):
    """As inpainting does after every step."""
    mask = (torch.arange(8) < 4).float()
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse", corrector="linear")

    def blend(pipe, given):
        return {"latents": mask * given["latents"] + (1 - mask) * 7.0}

    _, taken, _ = drawn(sd3, schedule, at=range(STEPS), change=blend)
    before, output, after = taken[3]
    added = (before - after) / float(sd3.scheduler.sigmas[3] - sd3.scheduler.sigmas[4]) - output
    assert added[..., :4].abs().min() > 1e-4
    assert added[..., 4:].abs().max() < 1e-4


def test_a_branch_whose_latents_double_is_computed_until_it_can_be_served():
    """FLUX with true guidance calls its denoiser for each branch, and of the second the difference is kept."""
    pipe = make_flux()
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 2, 4), predictor="taylor1", branch_steps=(2,))

    def double(pipe, step, timestep, given):
        return {"latents": given["latents"].repeat(2, 1, 1)} if step == 2 else {}

    with attached(pipe, schedule) as hook, pytest.warns(UserWarning, match=WARNED):
        found = pipe(
            list(ONE.conditions), num_inference_steps=STEPS, output_type="latent", callback_on_step_end=double,
            generator=torch.Generator().manual_seed(3), **FLUX_CALL,
        ).images  # fmt: skip
    assert found.shape[0] == 2
    assert torch.equal(found[0], found[1])
    assert (hook.full_evaluations, hook.skipped_evaluations) == (11, 1)  # the second branch of step 2
