"""What a run is: who began it, what belongs to it, when it is over; and other people's code around it."""

import copy
import gc
import threading
import warnings
import weakref

import accelerate
import diffusers as D
import numpy as np
import pytest
import torch
from diffusers import HookRegistry
from diffusers.hooks import ModelHook, apply_group_offloading
from support.pipelines import BATCH, CALL, FLUX_CALL, ONE, STEPS, make_dit, make_flux, run_dit
from support.priors import profiled
from support.schedules import EVERY, HALF, plan_of

import cemq
from cemq.errors import ModelError
from cemq.pipelines.batches import Batch, run
from cemq.pipelines.noise_scheduler import fingerprint, intercepted
from cemq.pipelines.trajectory import force, record
from cemq.runtime import attach, attached, detach, for_request, schedule_hook, set_budget
from cemq.runtime.registration import HOOK
from cemq.runtime.runner import Runner
from cemq.schedule import CacheSchedule

CORRECTED = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), corrector="linear")


def draw_flux(pipe, **options):
    return run(pipe, ONE, steps=STEPS, call={**FLUX_CALL, "true_cfg_scale": 1.0, **options})


def counts(hook):
    return hook.full_evaluations, hook.skipped_evaluations


def abort(pipe, after):
    """A run of other samples that raises after some steps, in ``pipe.__call__``."""
    steps = []

    def stop():
        steps.append(1)
        if len(steps) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, Batch(conditions=(7, 8), seeds=(1, 2)), steps=STEPS, call=CALL, on_step=stop)


def unclipped():
    """What can be corrected later."""
    return D.DDIMScheduler(clip_sample=False)


def noise(seed=0):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predict(pipe, sample, timestep):
    return pipe.transformer(sample, timestep=torch.as_tensor(timestep)[None], class_labels=torch.tensor([3])).sample


def plain_loop(pipe, steps=STEPS):
    """What a loop of one's own draws without any schedule, on a twin."""
    twin = make_dit(type(pipe.scheduler).from_config(pipe.scheduler.config))
    return own_loop(twin, twin.scheduler, steps)


def own_loop(pipe, scheduler, steps=STEPS, fail_after=None):
    scheduler.set_timesteps(steps)
    sample = noise()
    for index, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(predict(pipe, sample, timestep)[:, :4], timestep, sample).prev_sample
        if index + 1 == fail_after:
            raise ZeroDivisionError
    return sample


# An exception in the middle, then a call from elsewhere.


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_call_of_the_denoiser_after_an_aborted_run_is_computed(dit, after):
    expected = predict(dit, noise(), 999)
    with attached(dit, HALF) as hook:
        abort(dit, after)
        assert hook.cached_bytes == 0  # with the run goes what it kept
        assert torch.equal(predict(dit, noise(), 999), expected)


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_call_while_the_aborted_runs_traceback_is_kept_is_computed_and_says_so(dit, after):
    expected = predict(dit, noise(), 999)
    with attached(dit, HALF) as hook:
        try:
            with intercepted(dit.scheduler, "step", failing(after)):
                run_dit(dit)
        except KeyboardInterrupt:
            with pytest.warns(UserWarning, match="called from elsewhere than where its run began"):
                assert torch.equal(predict(dit, noise(), 999), expected)
        assert hook.cached_bytes == 0


def failing(after):
    left = [after]

    def step(original, call):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return original(*call.args, **call.kwargs)

    return step


@pytest.mark.parametrize("schedule", [HALF, CORRECTED], ids=["served", "corrected"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_loop_that_sets_no_timesteps_after_an_aborted_run_is_computed(dit, after, schedule):
    def going_on(pipe):
        sample = noise()
        for timestep in pipe.scheduler.timesteps[after:]:
            sample = pipe.scheduler.step(predict(pipe, sample, timestep)[:, :4], timestep, sample).prev_sample
        return sample

    dit.scheduler, twin = unclipped(), make_dit(unclipped())
    twin.scheduler.set_timesteps(STEPS)
    expected = going_on(twin)
    with attached(dit, schedule):
        abort(dit, after)
        assert torch.equal(going_on(dit), expected)
        first = run_dit(dit)
        abort(dit, after)
        assert np.array_equal(run_dit(dit), first)


def test_a_loop_of_ones_own_is_served(dit):
    plain = plain_loop(dit)
    with attached(dit, EVERY):
        assert torch.equal(own_loop(dit, dit.scheduler), plain)
    with attached(dit, HALF) as hook:
        first = own_loop(dit, dit.scheduler)
        assert counts(hook) == (3, 3)
        assert not torch.equal(first, plain)
        with pytest.raises(ZeroDivisionError):
            own_loop(dit, dit.scheduler, fail_after=3)
        assert hook.cached_bytes == 0
        assert torch.equal(own_loop(dit, dit.scheduler), first)


def test_a_loop_whose_timesteps_are_set_and_whose_denoiser_is_called_in_helpers_is_served(dit):
    @torch.no_grad()
    def prepare(pipe):
        pipe.scheduler.set_timesteps(STEPS)
        return pipe.scheduler.timesteps

    def loop(pipe):
        sample = noise()
        for timestep in prepare(pipe):
            sample = pipe.scheduler.step(predict(pipe, sample, timestep)[:, :4], timestep, sample).prev_sample
        return sample

    with attached(dit, HALF) as hook:
        expected = own_loop(dit, dit.scheduler)
        assert torch.equal(loop(dit), expected)
        assert counts(hook) == (3, 3)


def test_the_next_call_of_an_aborted_loops_own_function_is_computed(dit):
    """It lies where the aborted one lay in memory, and runs the same code."""

    def loop(set_timesteps, fail_after=None):
        if set_timesteps:
            dit.scheduler.set_timesteps(STEPS)
        sample = noise()
        for index, timestep in enumerate(dit.scheduler.timesteps[:4]):
            sample = sample - predict(dit, sample, timestep)[:, :4]
            if set_timesteps:
                dit.scheduler.step(sample, timestep, sample)
            if index == fail_after:
                raise ZeroDivisionError
        return sample

    dit.scheduler.set_timesteps(STEPS)
    expected = loop(set_timesteps=False)
    with attached(dit, HALF):
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                loop(set_timesteps=True, fail_after=2)
            assert torch.equal(loop(set_timesteps=False), expected)


def test_a_call_from_another_line_of_a_loop_neither_shifts_the_schedule_nor_is_served(dit):
    def loop(looks):
        dit.scheduler.set_timesteps(STEPS)
        sample, seen = noise(), []
        for timestep in dit.scheduler.timesteps:
            if looks:
                seen.append(predict(dit, noise(7), timestep))
            sample = dit.scheduler.step(predict(dit, sample, timestep)[:, :4], timestep, sample).prev_sample
        return sample, seen

    dit.scheduler.set_timesteps(STEPS)
    looked = [predict(dit, noise(7), timestep) for timestep in dit.scheduler.timesteps]
    with attached(dit, HALF):
        expected, _ = loop(looks=False)
        found, seen = loop(looks=True)
        assert torch.equal(seen[0], looked[0])
        assert torch.allclose(seen[1], looked[1])
        assert torch.allclose(seen[3], seen[1] + 2 * (seen[1] - seen[0]), atol=1e-5)  # from its own past
        assert torch.equal(found, expected)


def test_after_an_exception_in_a_notebook_cell_the_next_cells_are_computed(dit):
    cells = [
        "scheduler.set_timesteps(6)\nfor i, t in enumerate(scheduler.timesteps):\n"
        "    scheduler.step(predict(pipe, x, t)[:, :4], t, x)\n    assert i < 2",
        "found = predict(pipe, x, 999)",
    ]
    space = {"pipe": dit, "scheduler": dit.scheduler, "x": noise(), "predict": predict}
    names = set(space)
    expected = predict(dit, noise(), 999)
    with attached(dit, HALF) as hook:
        with pytest.raises(AssertionError):
            exec(compile(cells[0], "cell 1", "exec"), space)
        assert counts(hook) == (2, 1)
        assert hook.cached_bytes == 0
        exec(compile(cells[1], "cell 2", "exec"), space)
    assert torch.equal(space["found"], expected)
    assert set(space) == names | {"found", "i", "t", "__builtins__"}  # nothing is put among the user's names


def test_a_call_from_another_thread_is_computed_and_disturbs_nothing(dit):
    expected_call = predict(dit, noise(), 999)
    found = []

    def look():
        thread = threading.Thread(target=lambda: found.append(predict(dit, noise(), 999)))
        thread.start()
        thread.join(30)

    with attached(dit, HALF) as hook, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cemq: the denoiser is called from elsewhere")
        expected = run_dit(dit)
        assert np.array_equal(run_dit(dit, on_step=look), expected)
        assert counts(hook) == (3, 3)
    assert len(found) == STEPS
    assert all(torch.equal(each, expected_call) for each in found)


def test_two_runs_that_take_turns_in_one_function_are_computed_and_say_so(dit):
    other = for_request_like(dit)
    expected = plain_loop(dit)
    with attached(dit, HALF), attached(other, HALF):
        runs = [(pipe.scheduler, [noise()]) for pipe in (dit, other)]
        for scheduler, _ in runs:
            scheduler.set_timesteps(STEPS)
        with pytest.warns(UserWarning, match="several runs of one denoiser take turns in one function"):
            for timestep in dit.scheduler.timesteps:
                for scheduler, samples in runs:
                    output = predict(dit, samples[-1], timestep)[:, :4]
                    samples.append(scheduler.step(output, timestep, samples[-1]).prev_sample)
    assert all(torch.equal(samples[-1], expected) for _, samples in runs)


# Pipelines for requests.


def for_request_like(pipe):
    """Another pipeline on the same models with a scheduler of its own, as anybody may make one."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return other


def taking_turns(*draws):
    """Run each in a thread of its own, step by step in turn; what each returned or raised."""
    barrier, found = threading.Barrier(len(draws), timeout=60), [None] * len(draws)

    def work(index, task):
        try:
            found[index] = task(barrier.wait)
        except Exception as error:  # handed to the test
            barrier.abort()
            found[index] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(draws)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return found


@pytest.mark.parametrize("cache", ["output", "residual", "modules"])
def test_requests_in_threads_that_take_turns_each_have_their_own_history(dit, cache):
    batches = [Batch(conditions=(label,), seeds=(seed,)) for label, seed in ((1, 5), (7, 8), (3, 2))]
    with attached(dit, HALF, cache=cache):
        expected = [run(dit, batch, steps=STEPS, call=CALL) for batch in batches]
        requests = [for_request(dit) for _ in batches]
        draws = [
            lambda turn, pipe=pipe, batch=batch: run(pipe, batch, steps=STEPS, call=CALL, on_step=turn)
            for pipe, batch in zip(requests, batches, strict=True)
        ]
        for _ in range(2):
            found = taking_turns(*draws)
            for one, alone in zip(found, expected, strict=True):
                assert np.allclose(one, alone, atol=1e-5), one
            assert [counts(schedule_hook(pipe)) for pipe in requests] == [(3, 3)] * 3


def test_a_request_shares_the_models_and_nothing_of_the_run():
    dit = make_dit(unclipped())
    with attached(dit, CORRECTED) as hook:
        expected = run_dit(dit)
        pipe = cemq.for_request(dit)
        assert type(pipe) is type(dit)
        assert pipe.transformer is dit.transformer
        assert pipe.scheduler is not dit.scheduler
        hook.run.begin(CORRECTED)
        assert np.array_equal(run_dit(pipe), expected)
        assert (counts(schedule_hook(pipe)), counts(hook)) == ((3, 3), (0, 0))
        assert schedule_hook(pipe) is not hook
        assert schedule_hook(dit) is hook


def test_a_request_goes_on_when_the_schedule_of_its_origin_is_changed_or_detached(dit):
    attach(dit, HALF)
    expected = run_dit(dit)
    pipe = for_request(dit)
    detach(dit)
    with pytest.raises(ModelError, match="no cemq schedule is attached"):
        schedule_hook(dit)
    assert np.array_equal(run_dit(pipe), expected)
    with pytest.warns(UserWarning, match=r"another pipeline uses the denoiser.*cemq.for_request\(pipe\)"):
        run_dit(dit)
    detach(pipe)
    assert "forward" not in vars(dit.transformer)


def test_what_an_aborted_request_kept_goes_at_once_and_the_rest_with_it(dit):
    with attached(dit, HALF) as base:
        pipe = for_request(dit)
        hook = schedule_hook(pipe)
        abort(pipe, after=3)
        assert hook.cached_bytes == 0
        gone = weakref.ref(pipe), weakref.ref(hook)
        del pipe, hook
        assert gone[0]() is None
        gc.collect()
        assert gone[1]() is None
        run_dit(dit)
        assert counts(base) == (3, 3)


def test_there_is_no_request_of_a_pipeline_without_a_schedule(dit):
    with pytest.raises(ModelError, match="no cemq schedule is attached to this pipeline"):
        for_request(dit)


def test_pipelines_that_servers_make_of_one_can_be_given_a_schedule_of_their_own(dit):
    shallow = copy.copy(dit)
    shallow.scheduler = type(dit.scheduler).from_config(dit.scheduler.config)
    for other in (shallow, for_request_like(dit)):
        plain = run_dit(other)
        with attached(dit, HALF):
            expected = run_dit(dit)
            with attached(other, EVERY):
                assert np.array_equal(run_dit(other), plain)
                assert np.array_equal(run_dit(dit), expected)
            with attached(other, HALF):
                assert np.array_equal(run_dit(other), expected)
        assert "forward" not in vars(dit.transformer)


def test_attaching_to_a_pipeline_that_shares_more_than_it_may_says_what(dit):
    same_scheduler = type(dit)(**dit.components)
    with attached(dit, HALF) as hook:
        with pytest.raises(ModelError, match=r"another pipeline with this one's scheduler, so that both follow it"):
            attach(same_scheduler, HALF)
        with pytest.raises(ModelError, match=r"follows a schedule with cache='output': take that too"):
            attach(for_request_like(dit), HALF, cache="modules")
        assert schedule_hook(same_scheduler) is hook
        assert counts(hook) == (0, 0)


def test_budgets_are_those_of_each_pipeline(dit):
    with attached(dit, plan_of(dit, prior=profiled(dit))):
        pipe = for_request(dit)
        set_budget(pipe, 2)
        assert (schedule_hook(pipe).plan.schedule.budget, schedule_hook(dit).plan.schedule.budget) == (2, 3)
        run_dit(pipe)
        assert counts(schedule_hook(pipe)) == (2, 4)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_followed_scheduler_steps_by_itself(dit, copied):
    with attached(dit, HALF) as hook:
        dit.scheduler.set_timesteps(STEPS)
        twin = copied(dit.scheduler)
        twin.set_timesteps(4)
        assert (len(dit.scheduler.timesteps), len(twin.timesteps)) == (STEPS, 4)
        twin.step(noise(), twin.timesteps[0], noise())
        assert hook.tracker.step_index == 0
        assert not vars(twin).keys() & {"step", "set_timesteps", "__getstate__"}
    assert not vars(dit.scheduler).keys() & {"step", "set_timesteps", "__getstate__"}


# Pipelines that do not step the scheduler that is followed.


class Forcing(D.DiTPipeline):
    """Diffusion forcing: every frame (here, sample) has a scheduler of its own, a copy."""

    @torch.no_grad()
    def __call__(self, class_labels, num_inference_steps, generator, output_type="np", steps_copies=True, **_):
        sample = torch.cat([noise(seed) for seed in range(len(class_labels))])
        self.scheduler.set_timesteps(num_inference_steps)
        copies = [copy.deepcopy(self.scheduler) for _ in class_labels]
        labels = torch.tensor(class_labels)
        for timestep in self.scheduler.timesteps:
            output = self.transformer(sample, timestep=timestep.expand(len(labels)), class_labels=labels).sample[:, :4]
            if steps_copies:
                rows = zip(copies, output, sample, strict=True)
                sample = torch.stack([one.step(row, timestep, old).prev_sample for one, row, old in rows])
            else:
                sample = sample - 0.1 * output
        return D.ImagePipelineOutput(images=sample.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("steps_copies", [True, False], ids=["copies", "none"])
def test_a_pipeline_that_steps_copies_or_nothing_is_computed_says_so_and_keeps_little(dit, steps_copies):
    pipe = Forcing(dit.transformer, dit.vae, dit.scheduler)
    kept = []

    def drawn():
        return run(pipe, BATCH, steps=STEPS, call={"steps_copies": steps_copies})

    plain = drawn()
    with pytest.raises(ModelError, match=r"Forcing never calls step\(\) of its scheduler"):
        Runner(pipe=pipe, steps=STEPS, call={"steps_copies": steps_copies}).record([BATCH])
    with attached(pipe, HALF) as hook:
        dit.transformer.register_forward_hook(lambda *_: kept.append(len(hook.run.histories)))
        with pytest.warns(UserWarning, match="the pipeline steps copies of it, or none") as caught:
            assert np.array_equal(drawn(), plain)
        assert len([each for each in caught if "cemq: " in str(each.message)]) == 1
        assert np.array_equal(drawn(), plain)
        assert counts(hook) == (STEPS, 0)
    assert max(kept) == 1
    assert not any(kept[1:STEPS])


def test_a_pipeline_that_sets_the_timesteps_of_a_copy_only_is_computed_and_says_so(dit):
    class Copying(D.DiTPipeline):
        @torch.no_grad()
        def __call__(self, class_labels, num_inference_steps, generator, output_type="np", **_):
            return D.ImagePipelineOutput(images=own_loop(self, copy.deepcopy(self.scheduler)))

    pipe = Copying(dit.transformer, dit.vae, dit.scheduler)
    expected = run(pipe, BATCH, steps=STEPS, call={})
    with attached(pipe, HALF), pytest.warns(UserWarning, match="without having set the timesteps of its scheduler"):
        assert torch.equal(run(pipe, BATCH, steps=STEPS, call={}), expected)


# Schedules for any sampler, where a run begins late.


@torch.no_grad()
def late_loop(pipe, steps, start, outputs=None):
    """Image to image, as DDIM's pipelines do it."""
    pipe.scheduler.set_timesteps(steps)
    sample = noise()
    for timestep in pipe.scheduler.timesteps[start:]:
        output = predict(pipe, sample, timestep)[:, :4]
        if outputs is not None:
            outputs.append(output)
        sample = pipe.scheduler.step(output, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("cache", ["output", "residual"])
@pytest.mark.parametrize(("start", "full"), [(0, 4), (1, 3), (2, 3), (4, 2), (5, 2), (7, 1)])
def test_a_run_that_begins_late_follows_the_tail_of_a_schedule_for_any_sampler(start, full, cache):
    pipe = make_dit(unclipped())
    schedule = CacheSchedule(num_steps=8, full_steps=(0, 1, 3, 6), predictor="reuse")
    plain = late_loop(pipe, 8, start)
    with attached(pipe, CacheSchedule(num_steps=8, full_steps=tuple(range(8)))):
        assert torch.equal(late_loop(pipe, 8, start), plain)
    with attached(pipe, schedule, cache=cache) as hook:
        outputs = []
        first = late_loop(pipe, 8, start, outputs)
        assert counts(hook) == (full, 8 - start - full)
        assert hook.schedule.num_steps == 8 - start
        assert torch.equal(late_loop(pipe, 8, start), first)
        assert not hook.run.histories or hook.cached_bytes == 0
        if cache == "output":
            newest = 0
            for step in range(8 - start):
                newest = step if step + start in schedule.full_steps else newest
                assert torch.equal(outputs[step], outputs[newest])
        late_loop(pipe, 8, 0)
        assert counts(hook) == (4, 4)


def test_a_run_that_begins_late_is_corrected_like_one_of_its_own_length():
    pipe = make_dit(unclipped())
    whole = CacheSchedule(
        num_steps=8, full_steps=(0, 2, 5), corrector="linear", predictor=("reuse", "taylor1", "reuse")
    )
    pipe.scheduler.set_timesteps(8)
    tail = fingerprint(pipe.scheduler).__class__(
        scheduler="DDIMScheduler",
        config=fingerprint(pipe.scheduler).config,
        timesteps=fingerprint(pipe.scheduler).timesteps[3:],
    )
    own = CacheSchedule(num_steps=5, full_steps=(0, 2), corrector="linear", predictor=("taylor1", "reuse"))
    with attached(pipe, own, tail):
        expected = late_loop(pipe, 8, 3)
    with attached(pipe, whole) as hook:
        assert torch.equal(late_loop(pipe, 8, 3), expected)
        assert counts(hook) == (2, 3)


def test_a_run_that_begins_late_and_has_as_many_steps_as_the_schedule_follows_it(dit):
    with attached(dit, HALF) as hook:
        late_loop(dit, 9, 3)
        assert counts(hook) == (3, 3)
    plain = late_loop(dit, 9, 2)
    with attached(dit, HALF) as hook:
        with pytest.warns(UserWarning, match="this run has 7 steps, the schedule was planned for 6"):
            assert torch.equal(late_loop(dit, 9, 2), plain)
        assert hook.skipped_evaluations == 0


# Other people's schedulers and wrappers.


class Starred(D.DDIMScheduler):
    def set_timesteps(self, *args, **options):
        return super().set_timesteps(*args, **options)

    def step(self, *args, **options):
        return super().step(*args, **options)


class Renamed(D.DDIMScheduler):
    def set_timesteps(self, steps, *more, **options):
        return super().set_timesteps(steps, *more, **options)

    def step(self, noise, *rest, **options):
        return super().step(noise, *rest, **options)


def by_position(scheduler):
    """A wrapper on one scheduler object that reads its arguments by position, as it may where they are given so."""
    original = scheduler.step

    def step(*args, **kwargs):
        assert args[0].shape == args[2].shape
        assert args[1].numel() == 1
        return original(*args, **kwargs)

    scheduler.step = step
    return scheduler


SCHEDULERS = {
    "*args": Starred,
    "other names": Renamed,
    "wrapper by position": lambda **settings: by_position(D.DDIMScheduler(**settings)),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_get_what_they_are_given_as_it_is_given(make):
    pipe, reference = make_dit(make(clip_sample=False)), make_dit(unclipped())
    plain = run_dit(reference)
    with record(reference, measure_steps=True) as expected:
        run_dit(reference)
    with record(pipe, measure_steps=True) as found:
        assert np.array_equal(run_dit(pipe, on_step=lambda: None), plain)
    assert found.step_sizes == expected.step_sizes
    assert all(torch.equal(a, b) for a, b in zip(found.predictions, expected.predictions, strict=True))
    with force(pipe, expected) as forced:
        run_dit(pipe)
    assert all(torch.equal(a, b) for a, b in zip(forced.predictions, expected.predictions, strict=True))
    with attached(reference, CORRECTED, fingerprint(reference.scheduler)):
        corrected = run_dit(reference)
    with attached(pipe, CORRECTED) as hook:
        assert np.allclose(run_dit(pipe), corrected, atol=1e-6)
        assert counts(hook) == (3, 3)
    assert np.array_equal(run_dit(pipe), plain)


def test_a_wrapper_that_is_put_on_a_followed_scheduler_outlives_the_schedule(dit):
    plain, calls = run_dit(dit), []

    def put_on(scheduler):
        original = scheduler.step

        def step(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

        scheduler.step = step
        return original

    attach(dit, HALF)
    expected = run_dit(dit)
    before = put_on(dit.scheduler)
    assert np.array_equal(run_dit(dit), expected)
    detach(dit)
    assert np.array_equal(run_dit(dit), plain)
    assert len(calls) == 2 * STEPS
    with attached(dit, HALF):
        assert np.array_equal(run_dit(dit), expected)
    dit.scheduler.step = before  # as whoever put it on takes it off
    assert np.array_equal(run_dit(dit), plain)
    assert len(calls) == 3 * STEPS
    with attached(dit, HALF):
        assert np.array_equal(run_dit(dit), expected)
    assert np.array_equal(run_dit(dit), plain)


def test_a_budget_that_is_set_while_others_watch_the_scheduler_leaves_them_watching(dit):
    attach(dit, plan_of(dit, prior=profiled(dit)))
    with record(dit) as trajectory:
        set_budget(dit, 2)
        run_dit(dit)
        assert trajectory.num_steps == STEPS
    run_dit(dit)
    assert counts(schedule_hook(dit)) == (2, 4)
    detach(dit)
    assert not vars(dit.scheduler).keys() & {"step", "set_timesteps", "__getstate__"}


class Watcher(ModelHook):
    """A hook of somebody's own that replaces the forward, as some of diffusers' caches do."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


class Registered:
    """`Watcher` in diffusers' registry."""

    def put_on(self, pipe):
        self.watcher = Watcher()
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(self.watcher, "somebody")

    def take_off(self, pipe):
        pipe.transformer._diffusers_hook.remove_hook("somebody")

    def check(self, computed):
        assert self.watcher.calls == computed
        self.watcher.calls = 0


class Replaced:
    """A forward that is replaced by hand, and put back by hand."""

    def put_on(self, pipe):
        self.calls, self.before = 0, pipe.transformer.forward
        pipe.transformer.forward = self.forward

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.before(*args, **kwargs)

    def take_off(self, pipe):
        pipe.transformer.forward = self.before

    def check(self, computed):
        assert self.calls == computed
        self.calls = 0


class Offloaded:
    """Accelerate's hook."""

    def put_on(self, pipe):
        accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))

    def take_off(self, pipe):
        accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)

    def check(self, computed):
        pass


class Grouped:
    """Diffusers' group offloading, which nothing takes off."""

    def put_on(self, pipe):
        cpu = torch.device("cpu")
        apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")

    def take_off(self, pipe):
        pass

    def check(self, computed):
        pass


class Stepping:
    """A wrapper on the scheduler's step."""

    def put_on(self, pipe):
        self.calls, self.before = 0, vars(pipe.scheduler).get("step")
        original = pipe.scheduler.step

        def step(*args, **kwargs):
            self.calls += 1
            return original(*args, **kwargs)

        pipe.scheduler.step = step

    def take_off(self, pipe):
        if self.before is None:
            del pipe.scheduler.step
        else:
            pipe.scheduler.step = self.before

    def check(self, computed):
        assert self.calls == STEPS
        self.calls = 0


OTHERS = [Registered, Replaced, Offloaded, Grouped, Stepping]
# + puts on, - takes off; S the schedule, A and B others; = runs
ORDERS = ["+S +A = -S = -A =", "+S +A -S = -A +S = -S =", "+A +S = -S -A =", "+S = +A -S +S = = -A = -S ="]
ORDERS_OF_TWO = ["+S +A +B = -S = -B -A =", "+S +A = +B -S = -B = -A =", "+A +S +B = -S = +S = -B -S ="]
CASES = [(order, first, None) for first in OTHERS for order in ORDERS] + [
    (order, first, second)
    for first, second in [
        (Registered, Offloaded),
        (Offloaded, Registered),
        (Replaced, Registered),
        (Grouped, Registered),
    ]
    for order in ORDERS_OF_TWO
]


@pytest.fixture(scope="module")
def drawn():
    """Without a schedule, and with."""
    pipe = make_flux()
    plain = draw_flux(pipe)
    with attached(pipe, HALF):
        return plain, draw_flux(pipe)


@pytest.mark.parametrize(("order", "first", "second"), CASES)
def test_hooks_and_wrappers_are_put_on_and_taken_off_in_any_order(order, first, second, drawn):
    pipe, others, on = make_flux(), {"A": first(), "B": second and second()}, set()
    for action in order.split():
        sign, name = action[0], action[1:]
        if name == "S":
            attach(pipe, HALF) if sign == "+" else detach(pipe)
        elif name:
            (others[name].put_on if sign == "+" else others[name].take_off)(pipe)
        if name:
            (on.add if sign == "+" else on.discard)(name)
            continue
        assert np.array_equal(draw_flux(pipe), drawn["S" in on]), order
        for each in on - {"S"}:
            others[each].check(HALF.budget if "S" in on else STEPS)
    assert HookRegistry.check_if_exists_or_initialize(pipe.transformer).get_hook(HOOK) is None
