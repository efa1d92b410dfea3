"""The schedule over diffusers' and accelerate's own offloading. Without an accelerator weights move from meta or from
disk to the CPU and back, or from the CPU to the CPU: which steps move them, and whether the right ones are there when a
layer runs, shows all the same. What needs a GPU: streams, pinned memory, peak device memory."""

import weakref

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading, group_offloading
from support.pipelines import STEPS, make_dit, make_flux, run_dit, run_flux
from support.schedules import EVERY, HALF
from support.slow import others_slow

from cemq.pipelines.noise_scheduler import fingerprint
from cemq.quantize import CemqConfig, quantize_in_place
from cemq.runtime import attach, attached, detach, schedule_hook

CPU = torch.device("cpu")


def sampler_of(pipe, run_pipe):
    """What the pipeline itself sets: Flux passes sigmas of its own."""
    run_pipe(pipe)
    return fingerprint(pipe.scheduler)


@pytest.fixture
def moves(monkeypatch):
    """(step index, what was moved) of every transfer of a denoiser's weights that diffusers or accelerate make."""
    found = []

    class Moves(list):
        pipe = None

        def note(self, what):
            self.append((schedule_hook(self.pipe()).tracker.step_index if self.pipe else None, what))

        def watch(self, pipe):
            self.clear()
            self.pipe = weakref.ref(pipe)
            self.denoiser = {id(module) for module in pipe.transformer.modules()}

    found = Moves()
    onload = group_offloading.ModuleGroup.onload_
    place = accelerate.hooks.AlignDevicesHook.pre_forward

    def onload_(self):
        if found.pipe and id(self.onload_leader) in found.denoiser:
            found.note(self.onload_leader)
        return onload(self)

    def pre_forward(self, module, *args, **kwargs):
        if found.pipe and id(module) in found.denoiser and self.offload:
            found.note(module)
        return place(self, module, *args, **kwargs)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload_)
    monkeypatch.setattr(accelerate.hooks.AlignDevicesHook, "pre_forward", pre_forward)
    return found


def group(pipe, level="block_level", **options):
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    apply_group_offloading(
        pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type=level, **blocks, **options
    )


OFFLOADS = {
    "blocks": lambda pipe, folder: group(pipe),
    "leaves": lambda pipe, folder: group(pipe, "leaf_level"),
    "blocks on disk": lambda pipe, folder: group(pipe, offload_to_disk_path=str(folder)),
    "leaves on disk": lambda pipe, folder: group(pipe, "leaf_level", offload_to_disk_path=str(folder)),
    # what enable_sequential_cpu_offload does to each component; that itself makes cpu:0 of cpu, which accelerate takes
    # for another device
    "sequential": lambda pipe, folder: accelerate.cpu_offload(pipe.transformer, CPU),
}


@pytest.mark.parametrize("scheme", others_slow(["none", "w8a8", "w4a8"], ["w4a8"]))
@pytest.mark.parametrize("first", ["schedule", "offload"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_skipped_step_moves_no_weight(offload, first, scheme, moves, tmp_path):
    pipe = make_flux()
    if scheme != "none":
        quantize_in_place(pipe.transformer, CemqConfig(scheme, eight_bit=()))
    sampler = sampler_of(pipe, run_flux)
    with attached(pipe, HALF, sampler):
        expected = run_flux(pipe)
    if first == "offload":
        OFFLOADS[offload](pipe, tmp_path)
        attach(pipe, HALF, sampler)
    else:
        attach(pipe, HALF, sampler)
        OFFLOADS[offload](pipe, tmp_path)
    for _ in range(2):
        moves.watch(pipe)
        found = run_flux(pipe)
        steps = [step for step, _ in moves]
        assert set(steps) == set(HALF.full_steps)
        assert len({steps.count(step) for step in HALF.full_steps}) == 1  # every full step moves the same
        hook = schedule_hook(pipe)
        assert (hook.full_evaluations, hook.skipped_evaluations) == (2 * HALF.budget, 2 * (STEPS - HALF.budget))
        assert np.allclose(found, expected, atol=1e-5)  # from disk, weights lie elsewhere in memory: other kernels


def test_transfers_grow_with_the_full_steps_alone(moves, tmp_path):
    counts = {}
    for schedule in (HALF, EVERY):
        pipe = make_flux()
        group(pipe)
        sampler = sampler_of(pipe, run_flux)
        with attached(pipe, schedule, sampler):
            moves.watch(pipe)
            run_flux(pipe)
            counts[schedule.budget] = len(moves)
    assert counts[HALF.budget] * EVERY.budget == counts[EVERY.budget] * HALF.budget


@pytest.mark.parametrize("first", ["schedule", "offload"])
def test_prefetching_stays_right_with_skipped_steps(first, moves):
    """The order in which groups are loaded is traced on the first forward, by a hook on the denoiser that then removes
    itself, and each group loads its successor. Here they load without a stream, one after the other."""
    pipe = make_flux()
    sampler = sampler_of(pipe, run_flux)
    with attached(pipe, HALF, sampler):
        expected = run_flux(pipe)

    def offload():
        group(pipe, "leaf_level")
        model = pipe.transformer
        config = group_offloading._get_top_level_group_offload_hook(model).config
        idle = group_offloading.ModuleGroup([], CPU, CPU, model, model, group_id="lazy_leafs")
        group_offloading._apply_lazy_group_offloading_hook(model, idle, config=config)

    for step in (offload, lambda: attach(pipe, HALF, sampler))[:: 1 if first == "offload" else -1]:
        step()
    for _ in range(2):
        moves.watch(pipe)
        found = run_flux(pipe)
        assert {step for step, _ in moves} == set(HALF.full_steps)
        assert schedule_hook(pipe).skipped_evaluations == 2 * (STEPS - HALF.budget)
        assert np.array_equal(found, expected)
    hooks = [group_offloading._get_top_level_group_offload_hook(block) for block in pipe.transformer.modules()]
    assert any(hook is not None and hook.next_group is not None for hook in hooks)  # or nothing was prefetched at all


@pytest.mark.parametrize("first", ["schedule", "offload"])
def test_model_offload_keeps_the_schedule_from_run_to_run(first):
    pipe = make_flux()
    sampler = sampler_of(pipe, run_flux)
    with attached(pipe, HALF, sampler):
        expected = run_flux(pipe)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
        attach(pipe, HALF, sampler)
    else:
        attach(pipe, HALF, sampler)
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):  # accelerate takes its hooks off and puts them on again after every run
        assert np.array_equal(run_flux(pipe), expected)
        assert schedule_hook(pipe).skipped_evaluations == 2 * (STEPS - HALF.budget)
    detach(pipe)
    full = run_flux(pipe)
    assert not np.array_equal(full, expected)
    assert np.array_equal(full, run_flux(make_flux()))
    assert hasattr(pipe.transformer, "_hf_hook")  # detaching the schedule leaves the offloading in place


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_sequential_offload_of_a_quantized_class_that_group_offloading_excludes(scheme, moves):
    pipe = make_dit()
    quantize_in_place(pipe.transformer, CemqConfig(scheme, eight_bit=()))
    sampler = sampler_of(pipe, run_dit)
    attach(pipe, HALF, sampler)
    expected = run_dit(pipe)
    accelerate.cpu_offload(pipe.transformer, CPU)
    assert all(tensor.is_meta for tensor in pipe.transformer.parameters())
    moves.watch(pipe)
    assert np.array_equal(run_dit(pipe), expected)
    assert {step for step, _ in moves} == set(HALF.full_steps)


def test_removing_offloading_leaves_the_schedule_and_removing_both_leaves_nothing():
    pipe = make_dit()
    sampler = sampler_of(pipe, run_dit)
    plain = run_dit(pipe)
    attach(pipe, HALF, sampler)
    expected = run_dit(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(run_dit(pipe), expected)
    pipe.remove_all_hooks()
    assert np.array_equal(run_dit(pipe), expected)
    detach(pipe)
    assert np.array_equal(run_dit(pipe), plain)
