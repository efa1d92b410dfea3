import copy
import itertools
import json
import shutil
import threading
import warnings

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, HookRegistry
from diffusers.hooks import apply_group_offloading
from support.bundles import resealed
from support.checks import caches_outputs, counted_forwards, draw, few_steps, plain_run, quantized
from support.families import FAMILIES, family_with
from support.pipelines import BATCH, CALL, FLUX_CALL, ONE, STEPS, make_dit, make_flux, run_dit
from support.schedules import EVERY, HALF, plan_of, sampler_of
from support.slow import others_slow
from torch import nn
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.bundle.manifest import read_bundle
from cemq.errors import InputError, ModelError
from cemq.pipelines.batches import run
from cemq.runtime import attach, attached, cache_checked, detach, schedule_hook
from cemq.runtime.cached.inner import block_stack
from cemq.runtime.cached.modules import find_parts
from cemq.runtime.cached.residual import ResidualCache
from cemq.runtime.registration import HOOK
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own names
CPU = torch.device("cpu")
# --- in the head


class Double(nn.Module):
    def forward(self, hidden_states):
        return 2 * hidden_states


class Toy(nn.Module):
    """Adds 1, doubles twice with ``control`` added between, and adds 10."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Double(), Double()])

    def forward(self, sample, control=0.0):
        hidden_states = sample + 1
        for block in self.blocks:
            hidden_states = block(hidden_states)
            hidden_states = hidden_states + control
        return hidden_states + 10


def hooked(model):
    cache = ResidualCache(model, {})
    cache.install()
    return cache


def computed(model, *arguments, cache=None):
    return (cache or hooked(model)).compute(lambda: model(*arguments), wanted=True, shapes=None)


def test_the_residual_is_what_the_blocks_add_to_what_they_are_given():
    model, ones = Toy(), torch.ones(1)
    output, (calls, (residual,)) = computed(model, ones)
    assert output == (1 + 1) * 4 + 10
    assert (calls, residual) == (2, 8 - 2)


def test_a_skipped_step_adds_the_residual_to_its_own_input_and_runs_the_rest():
    model = Toy()
    cache = hooked(model)
    _, residual = computed(model, torch.ones(1), cache=cache)
    assert cache.serve(lambda: model(torch.tensor([5.0])), residual) == 5 + 1 + 6 + 10


def test_what_is_added_between_blocks_counts_once():
    model, ones = Toy(), torch.ones(1)
    cache = hooked(model)
    output, residual = computed(model, ones, 3.0, cache=cache)
    assert output == ((1 + 1) * 2 + 3) * 2 + 3 + 10
    assert residual[1] == [14 - 2 - 3]  # the second 3 is added after the last block
    assert cache.serve(lambda: model(ones, 3.0), residual) == output
    assert cache.serve(lambda: model(ones, 4.0), residual) == 2 + 4 + 9 + 4 + 10  # that of the step itself


def test_outside_of_a_cache_blocks_run_and_removal_leaves_nothing():
    model = Toy()
    cache = hooked(model)
    assert model(torch.ones(1)) == 18
    cache.remove()
    assert not any("forward" in vars(module) for module in model.modules())


class Tapped(Toy):
    def forward(self, sample):
        first = self.blocks[0](sample)
        return self.blocks[1](first) + first


class Narrowing(Toy):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 1)])

    def forward(self, sample):
        return self.blocks[0](sample)


class Idle(Toy):
    def forward(self, sample):
        return sample


class Undecided(Toy):
    def forward(self, sample):
        sample = self.blocks[0](sample)
        return self.blocks[1](sample) if (sample > 1).all() else sample


class Without(nn.Module):
    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList([Double()])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Tapped, r"Tapped's blocks cannot be cached: served on the very input .* \(relative error 0\.\d+\); use"),
        (
            Narrowing,
            "Linear returns a shape that it is not given, so that no residual can be cached; use cache='output'",
        ),
        (Idle, "it calls none of its blocks"),
        (Undecided, "which blocks it calls depends on what they return"),
        (Without, "Without has no list of blocks to cache anything of; use cache='output'"),
    ],
)
def test_a_model_whose_blocks_have_no_such_residual_is_refused(kind, message):
    with pytest.raises(ModelError, match=message):
        computed(kind(), torch.ones(2))


def test_a_text_and_an_image_stream_of_one_shape_are_told_apart():
    class Joint(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states):
            return encoder_hidden_states + 1, hidden_states * 1.5

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Joint(), Joint()])

        def forward(self, image, text):
            for block in self.blocks:
                text, image = block(image, encoder_hidden_states=text)
            return image

    model = Model()
    cache = hooked(model)
    _, (_, (text, image)) = computed(model, torch.tensor([100.0]), torch.tensor([10.0]), cache=cache)
    assert (text, image) == (2, 125)


# --- on pipelines

STACKS = {  # the main ones of every family, as their classes name them
    "flux": ["transformer_blocks", "single_transformer_blocks"],
    "latte": ["transformer_blocks", "temporal_transformer_blocks"],
    "z_image": ["layers"],
    "lumina2": ["layers"],
    "hidream": ["double_stream_blocks", "single_stream_blocks"],
    "auraflow": ["joint_transformer_blocks", "single_transformer_blocks"],
    "hunyuan_dit": ["blocks"],
    "hunyuan_video": ["transformer_blocks", "single_transformer_blocks"],
    "stable_audio": ["transformer_blocks"],
    "wan": ["blocks"],
}


@pytest.mark.parametrize("name", STACKS)
def test_the_main_stacks_are_found_and_refiners_and_projections_are_not(name):
    denoiser = FAMILIES[name].pipeline().transformer
    assert block_stack(denoiser) == [block for stack in STACKS[name] for block in getattr(denoiser, stack)]


def ends_of_the_stack(denoiser):
    """What the first block is given and the last one returns, call by call; the image's part."""
    blocks, given, returned = block_stack(denoiser), [], []
    blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args or tuple(kwargs.values()))[0].clone()), with_kwargs=True
    )
    blocks[-1].register_forward_hook(
        lambda *args: returned.append((args[-1] if torch.is_tensor(args[-1]) else args[-1][1]).clone())
    )
    return given, returned


@pytest.mark.parametrize("predictor", ["reuse", "taylor1", ("reuse", "damped", "taylor2")])
def test_skipped_steps_are_served_as_the_schedule_says(dit, predictor):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor=predictor)
    given, returned = ends_of_the_stack(dit.transformer)
    passes = []
    with attached(dit, plan_of(dit, schedule, cache="residual")):
        run(dit, BATCH, steps=STEPS, call=CALL, on_step=lambda: passes.append(len(given)))
    starts = [0, *passes[:-1]]  # the first pass of every step: with its blocks, or served
    residuals = {step: returned[start] - given[start] for step, start in enumerate(starts)}
    for step in (2, 3, 5):
        expected = sum(weight * residuals[source] for source, weight in zip(*schedule.serving(step), strict=True))
        assert torch.allclose(residuals[step], expected, atol=1e-5)
        assert not torch.equal(given[starts[step]], given[starts[1]])


def test_each_guidance_branch_has_its_own_residual(flux):
    given, returned = ends_of_the_stack(flux.transformer)
    schedule, starts = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse"), [0]
    with attached(flux, schedule, cache="residual") as hook:
        run(flux, ONE, steps=STEPS, call=FLUX_CALL, on_step=lambda: starts.append(len(given)))
    assert (hook.full_evaluations, hook.skipped_evaluations) == (4, 8)
    assert starts[:3] == [0, 5, 7]  # computed, without its blocks, checked; computed, without its blocks; served twice
    residuals = [after - before for before, after in zip(given, returned, strict=True)]
    conditional, unconditional = residuals[0], residuals[3]
    assert torch.allclose(residuals[5], conditional, atol=1e-6)
    assert torch.allclose(residuals[6], unconditional, atol=1e-6)
    assert not torch.allclose(conditional, unconditional, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "passes"),
    [
        (EVERY, STEPS),
        (HALF, STEPS + 3 + 1),  # one more where a residual is taken, and one to check the first
        (CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="reuse"), STEPS + 2 + 1),  # step 0 serves none
    ],
)
def test_what_is_around_the_blocks_runs_again_only_where_a_residual_is_taken(dit, schedule, passes):
    calls = []
    dit.transformer.pos_embed.register_forward_pre_hook(lambda *_: calls.append(1))
    with attached(dit, plan_of(dit, schedule, cache="residual")):
        run_dit(dit)
        assert len(calls) == passes
        calls.clear()
        run_dit(dit)
        assert len(calls) == passes - (schedule is not EVERY)  # checked before


def test_only_residuals_that_are_still_needed_are_kept(dit):
    kept = []
    with attached(dit, plan_of(dit, cache="residual")) as hook:
        run_dit(dit, on_step=lambda: kept.extend(dict(each.kept) for each in hook.run.histories.values()))
    assert [list(each) for each in kept] == [[0], [0, 1], [0, 1], [1], [1, 4], []]
    assert max(map(len, kept)) == HALF.most_kept
    calls, residual = kept[4][4]
    assert calls == len(dit.transformer.transformer_blocks)
    assert residual.shape == (4, 16, 32)  # two samples and their guidance, tokens, width
    assert residual.dtype == torch.float32


def flux_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "controlnet_block_samples": [torch.randn(1, 16, 32, generator=generator)],
        "controlnet_single_block_samples": [torch.randn(1, 16, 32, generator=generator)],
    }


def test_a_flux_with_controlnet_residuals_is_served_exactly(flux):
    flux.scheduler.set_timesteps(2, mu=1.0)
    outputs = []
    with attached(flux, CacheSchedule(num_steps=2, full_steps=(0,), predictor="reuse"), cache="residual") as hook:
        flux.scheduler.set_timesteps(2, mu=1.0)
        for timestep in flux.scheduler.timesteps:
            with torch.no_grad():
                arguments = flux_inputs(0) | {"timestep": torch.tensor([0.5])}  # the very same ones, twice
                outputs.append(flux.transformer(**arguments).sample)
            flux.scheduler.step(torch.zeros(1, 16, 4), timestep, torch.zeros(1, 16, 4))
        assert (hook.full_evaluations, hook.skipped_evaluations) == (1, 1)
    with torch.no_grad():
        without = {name: value for name, value in arguments.items() if not name.startswith("controlnet")}
        plain, uncontrolled = flux.transformer(**arguments).sample, flux.transformer(**without).sample
    assert torch.equal(outputs[0], plain)
    assert torch.allclose(outputs[1], plain, atol=1e-6)
    assert not torch.allclose(uncontrolled, plain, atol=1e-2)


@pytest.mark.parametrize("name", ["auraflow", "flux_controlnet", "latte"])
@pytest.mark.parametrize("wrong", [0.0, 0.8])
def test_the_check_notices_a_wrong_residual(name, wrong, monkeypatch):
    """Of all families with random weights, AuraFlow's blocks add least to its output: a hundredth."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    _, trajectory = plain_run(pipe, family)
    serve = ResidualCache.serve

    def scaled(self, forward, residual):
        calls, leaves = residual
        return serve(self, forward, (calls, [wrong * leaf if torch.is_tensor(leaf) else leaf for leaf in leaves]))

    monkeypatch.setattr(ResidualCache, "serve", scaled)
    with (
        attached(pipe, few_steps(trajectory), trajectory.sampler, cache="residual"),
        pytest.raises(ModelError, match="it gives another output"),
    ):
        draw(pipe, family)


def test_a_skipped_step_that_calls_other_blocks_is_computed():
    transformer = FAMILIES["sd3"].pipeline().transformer
    pipe = FAMILIES["sd3"].pipeline()
    pipe.transformer = transformer
    latents = torch.randn(1, 4, 8, 8)
    arguments = {
        "hidden_states": latents, "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([500.0]), "return_dict": False,
    }  # fmt: skip
    schedule = CacheSchedule(num_steps=2, full_steps=(0,))
    with attached(pipe, schedule, cache="residual") as hook, torch.no_grad():
        pipe.scheduler.set_timesteps(2)
        with pytest.warns(UserWarning, match="calls other blocks than the step it is served from; computing in full"):
            for layers, timestep in zip((None, [1]), pipe.scheduler.timesteps, strict=True):
                found = transformer(**arguments, skip_layers=layers)[0]
                pipe.scheduler.step(latents, timestep, latents)
        assert (hook.full_evaluations, hook.skipped_evaluations) == (2, 0)
    with torch.no_grad():
        assert torch.equal(found, transformer(**arguments, skip_layers=[1])[0])


@pytest.mark.parametrize("layers", [[0], [2]])
def test_skip_layer_guidance_has_a_residual_of_the_blocks_it_calls(layers):
    family = family_with("sd3", skip_guidance_layers=layers, skip_layer_guidance_stop=0.7)
    pipe = family.pipeline()
    _, trajectory = plain_run(pipe, family)
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="reuse")
    with attached(pipe, schedule, trajectory.sampler, cache="residual") as hook:
        found = draw(pipe, family)
        assert hook.skipped_evaluations == 3 + 2  # the further call is one of steps 1 to 4
        assert np.array_equal(draw(pipe, family), found)


# --- both caches inside of a denoiser


FOUND = {"residual": block_stack, "modules": find_parts}  # what does not run on a skipped step
both = pytest.mark.parametrize("cache", FOUND)


@both
@pytest.mark.parametrize("scheme", others_slow(["w8a8", "w4a8"], ["w4a8"]))
@pytest.mark.parametrize("name", others_slow(["dit", "flux", "wan22", "hunyuan_dit"], ["flux", "wan22"]))
def test_quantized_pipelines_keep_every_promise(name, scheme, cache):
    caches_outputs(quantized(FAMILIES[name], scheme), FAMILIES[name], cache)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_check(dit, dtype, cache):
    plain = run_dit(dit.to(dtype))
    with attached(dit, plan_of(dit, cache=cache)) as hook:
        found = run_dit(dit)
    assert hook.skipped_evaluations == 3
    assert not np.array_equal(found, plain)
    assert np.abs(found - plain).mean() < np.abs(plain).mean()


# --- what else may be done with the blocks


def sequential(pipe):
    accelerate.cpu_offload(pipe.transformer, CPU)


def groups(pipe):
    apply_group_offloading(
        pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def leaves(pipe):
    apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("first", ["schedule", "offload"])
@pytest.mark.parametrize(
    ("cache", "offload"),
    [
        *itertools.product(["residual"], [sequential, groups, leaves, model_offload]),
        *itertools.product(["modules"], [sequential, leaves, model_offload]),  # a group is a whole block and more
    ],
)
def test_offload_changes_nothing_and_a_skipped_step_moves_no_weight_of_what_is_served(
    cache, offload, first, monkeypatch
):
    from diffusers.hooks import group_offloading

    pipe = make_flux()
    expected_from = make_flux()
    with attached(expected_from, SCHEDULE, cache=cache):
        expected = run(expected_from, ONE, steps=STEPS, call=FLUX_CALL)
    moved = []
    insides = {id(module) for found in FOUND[cache](pipe.transformer) for module in found.modules()}
    onload, place = group_offloading.ModuleGroup.onload_, accelerate.hooks.AlignDevicesHook.pre_forward

    def note(module):
        hook = schedule_hook(pipe)
        if id(module) in insides and hook.tracker.step_index is not None:
            moved.append(hook.tracker.step_index)

    def onload_(self):
        note(self.onload_leader)
        return onload(self)

    def pre_forward(self, module, *args, **kwargs):
        if self.offload:
            note(module)
        return place(self, module, *args, **kwargs)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload_)
    monkeypatch.setattr(accelerate.hooks.AlignDevicesHook, "pre_forward", pre_forward)
    for do in (lambda: attach(pipe, SCHEDULE, cache=cache), lambda: offload(pipe))[:: 1 if first == "schedule" else -1]:
        do()
    for _ in range(2):
        moved.clear()
        assert np.array_equal(run(pipe, ONE, steps=STEPS, call=FLUX_CALL), expected)
        assert set(moved) == (set() if offload is model_offload else set(SCHEDULE.full_steps))


SCHEDULE = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="taylor1")


@pytest.mark.parametrize(
    ("first", "regional"),
    others_slow(
        itertools.product(("schedule", "compile", "a compiled run"), (True, False)),
        [("a compiled run", True)],
    ),
)
@both
def test_compiled_blocks_are_skipped_all_the_same(dit, cache, first, regional):
    plan = plan_of(dit, cache=cache)
    dit.transformer._repeated_blocks = ["BasicTransformerBlock"]
    with attached(dit, plan):
        expected = run_dit(dit)

    def compiled():
        if regional:
            dit.transformer.compile_repeated_blocks(backend="eager")
        else:
            dit.transformer = torch.compile(dit.transformer, backend="eager")
        if first == "a compiled run":
            run_dit(dit)

    torch._dynamo.reset()
    for do in (lambda: attach(dit, plan), compiled)[:: 1 if first == "schedule" else -1]:
        do()
    for _ in range(2):
        assert np.allclose(run_dit(dit), expected, atol=1e-4)
        assert schedule_hook(dit).skipped_evaluations == 3
    torch._dynamo.reset()


@both
def test_a_block_that_is_replaced_is_skipped_from_the_next_run_on(dit, cache):
    old = dit.transformer.transformer_blocks[1]
    with counted_forwards(dit, FOUND[cache]) as calls, attached(dit, plan_of(dit, cache=cache)):
        expected = run_dit(dit)
        dit.transformer.transformer_blocks[1] = make_dit().transformer.transformer_blocks[1]
        each = len(calls) // 2
        calls.clear()
        assert np.array_equal(run_dit(dit), expected)
        assert len(calls) == each  # of the first block, the new one is not counted
        assert "forward" not in vars(old)


@both
def test_another_pipeline_on_the_same_denoiser_runs_every_block(dit, cache):
    other = DiTPipeline(transformer=dit.transformer, vae=dit.vae, scheduler=copy.deepcopy(dit.scheduler))
    other.set_progress_bar_config(disable=True)
    plain = run_dit(dit)
    with attached(dit, plan_of(dit, cache=cache)):
        found = run_dit(dit)
        with pytest.warns(UserWarning, match="another pipeline uses the denoiser"):
            assert np.array_equal(run_dit(other), plain)
        assert np.array_equal(run_dit(dit), found)


@pytest.mark.filterwarnings("ignore:cemq. another pipeline")
@both
def test_another_thread_runs_every_block_while_this_one_is_served(dit, cache):
    other = DiTPipeline(transformer=dit.transformer, vae=dit.vae, scheduler=copy.deepcopy(dit.scheduler))
    other.set_progress_bar_config(disable=True)
    plain, found = run_dit(dit), []

    def meanwhile(*_):
        current = HookRegistry.check_if_exists_or_initialize(dit.transformer).get_hook(HOOK).cache.hooks.current
        if current is not None and not current.computes and not found:
            thread = threading.Thread(target=lambda: found.append(run_dit(other)))
            thread.start()
            thread.join()

    with attached(dit, plan_of(dit, cache=cache)):
        dit.transformer.pos_embed.register_forward_pre_hook(meanwhile)
        first, second = run_dit(dit), run_dit(dit)
    assert np.array_equal(found[0], plain)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)


@both
def test_inference_mode_changes_nothing(dit, cache):
    with attached(dit, plan_of(dit, cache=cache)):
        expected = run_dit(dit)
        with torch.inference_mode():
            assert np.array_equal(run_dit(dit), expected)


@both
def test_a_block_with_a_schedule_is_not_copied(dit, cache):
    with attached(dit, plan_of(dit, cache=cache)), pytest.raises(ModelError, match="detach"):
        copy.deepcopy(dit.transformer.transformer_blocks[0])


def test_a_refused_pipeline_is_left_as_it_was():
    pipe = FAMILIES["sd15"].pipeline()
    before = draw(pipe, FAMILIES["sd15"])
    schedule = CacheSchedule(num_steps=7, full_steps=(0,))
    with attached(pipe, schedule, cache="residual"), pytest.raises(ModelError, match="DownBlock2D returns a shape"):
        draw(pipe, FAMILIES["sd15"])
    assert np.array_equal(draw(pipe, FAMILIES["sd15"]), before)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    pipe.unet = nn.Sequential()
    with pytest.raises(ModelError, match="Sequential has no list of blocks"):
        attach(pipe, schedule, cache="residual")


def test_no_other_cache_is_known(dit):
    with pytest.raises(InputError, match="unknown cache 'residuals': choose from output, residual, modules; did"):
        attach(dit, HALF, cache="residuals")
    with pytest.raises(InputError, match="unknown cache"):
        Plan(schedule=HALF, sampler=None, cache="hidden")


@both
def test_whether_it_can_be_cached_is_found_out_without_a_schedule(dit, cache):
    plain = run_dit(dit)
    with cache_checked(dit, cache):
        assert np.array_equal(run_dit(dit), plain)
    assert not any("forward" in vars(module) for module in dit.transformer.modules())
    unet = FAMILIES["sd15"].pipeline()
    with pytest.raises(ModelError, match="use cache='output'"), cache_checked(unet, cache):
        draw(unet, FAMILIES["sd15"])


# --- bundles

SETTINGS = {
    "scheme": "w8a8", "steps": 8, "budget": 4, "samples": 2, "call": CALL, "planning_samples": 2, "effort": "quick",
    "solver": "uniform",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("residual")
    make_dit().save_pretrained(root / "pipeline")
    (root / "labels.txt").write_text("1\n2\n")
    manifest = cemq.quantize_and_schedule(
        str(root / "pipeline"), root / "bundle", calib=str(root / "labels.txt"), cache="residual", **SETTINGS
    )
    assert manifest.cache == "residual"
    return root / "bundle"


def load(folder, **options):
    pipe = cemq.from_pretrained(folder, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_bundle_runs_with_the_cache_it_was_planned_with(bundle):
    pipe = load(bundle)
    assert schedule_hook(pipe).plan.cache == "residual"
    found, hook = run_dit(pipe, steps=8), schedule_hook(pipe)
    assert (hook.full_evaluations, hook.skipped_evaluations) == (4, 4)
    plan = hook.plan
    detach(pipe)
    with attached(pipe, plan, cache="output"):
        assert not np.array_equal(run_dit(pipe, steps=8), found)
    assert "the residual of all blocks" in (bundle / "README.md").read_text()
    evaluation = cemq.evaluate(bundle, samples=2, device="cpu")
    assert evaluation.full_steps == 4


def test_budgets_and_step_counts_keep_the_cache(bundle):
    pipe = load(bundle, budget=2)
    assert schedule_hook(pipe).plan.cache == "residual"
    cemq.set_budget(pipe, 3)
    assert schedule_hook(pipe).plan.cache == "residual"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_dit(pipe, steps=5)
    assert schedule_hook(pipe).skipped_evaluations > 0


def test_an_export_names_the_cache_and_is_followed(bundle, tmp_path):
    (tmp_path / "a.json").write_text(cemq.export(bundle))
    pipe = make_dit()
    hook = cemq.apply_schedule(pipe, tmp_path / "a.json")
    assert hook.plan.cache == "residual"
    detach(pipe)
    assert cemq.apply_schedule(pipe, bundle, cache="output").plan.cache == "output"
    assert "cemq the residual of all blocks" in cemq.export(bundle, "cache-dit")
    content = json.loads((tmp_path / "a.json").read_text())
    del content["cache"]  # a file of before
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert cemq.apply_schedule(make_dit(), tmp_path / "a.json").plan.cache == "output"


def test_a_bundle_of_before_caches_the_output(bundle, tmp_path):
    old = resealed(shutil.copytree(bundle, tmp_path / "old"), lambda manifest: manifest.pop("cache"))
    assert read_bundle(old).cache == "output"
    assert schedule_hook(load(old)).plan.cache == "output"


def test_a_pipeline_without_such_a_residual_is_refused_before_any_work(tmp_path):
    family, stages = FAMILIES["sd15"], []
    family.pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ModelError, match="DownBlock2D returns a shape"):
        cemq.quantize_and_schedule(
            str(tmp_path / "pipeline"), tmp_path / "out", calib=str(tmp_path / "prompts.txt"), cache="residual",
            progress=lambda stage, share: stages.append(stage), **SETTINGS | {"call": family.call},
        )  # fmt: skip
    assert not stages
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_a_cache_and_shows_it(bundle, dit_folder, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    (tmp_path / "labels.txt").write_text("1\n2\n")
    made = invoke(
        "quantize-and-schedule", dit_folder, "--cache", "residual", "--steps", "6", "--budget", "3", "--solver",
        "uniform", "--effort", "quick", "--samples", "2", "--planning-samples", "4", "--calib",
        tmp_path / "labels.txt", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["cache"] == "residual"
    assert "cache       residual" in invoke("inspect", bundle).stdout
    assert json.loads(invoke("inspect", bundle, "--json").stdout)["cache"] == "residual"
    refused = invoke("quantize-and-schedule", dit_folder, "--cache", "residuals", "-o", tmp_path / "none")
    assert refused.exit_code == 1
    assert refused.stderr.strip().startswith("cemq: settings: cache='residuals' is wrong: ")


def test_a_misspelt_cache_in_a_recipe_is_refused():
    with pytest.raises(InputError, match="is wrong: input should be 'output', 'residual' or 'modules'"):
        cemq.quantize_and_schedule("builtin:dit-digits", "nowhere", cache="residuals")


def test_the_sampler_may_be_named_with_a_bare_schedule(dit):
    with attached(dit, HALF, sampler_of(dit), cache="residual") as hook:
        run_dit(dit)
        assert hook.skipped_evaluations == 3
