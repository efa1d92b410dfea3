import itertools
import logging

import numpy as np
import pytest
import torch
from support.checks import batch_of
from support.families import FAMILIES
from support.models import Block, Times
from support.pipelines import BATCH, CALL, FLUX_CALL, ONE, STEPS, run_dit
from support.schedules import EVERY, HALF, plan_of
from torch import nn
from typer.testing import CliRunner

import cemq
from cemq import cli
from cemq.errors import ModelError, PipelineError
from cemq.memory.placement import format_bytes
from cemq.pipelines.batches import Batch, run
from cemq.runtime import attach, attached, cache_checked, schedule_hook
from cemq.runtime.cached.modules import ModuleCache, Part, find_parts
from cemq.runtime.history import Weighted, summed
from cemq.schedule import CacheSchedule

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own names


# --- in the head


class Toy(nn.Module):
    def __init__(self, kind=Block, depth=1):
        super().__init__()
        self.blocks = nn.ModuleList([kind() for _ in range(depth)])

    def forward(self, x, gate=1.0):
        for block in self.blocks:
            x = block(x, gate)
        return x


def computed(model, *arguments):
    cache = ModuleCache(model)
    cache.install()
    output, outputs = cache.compute(lambda: model(*arguments), wanted=True, shapes=None)
    return cache, output, outputs


def test_what_is_kept_is_what_the_modules_return_before_the_gate():
    _, output, outputs = computed(Toy(), torch.ones(1), 10.0)
    given = (torch.Size([1]),)
    assert outputs == [(Part(0, "attn"), given, 2), (Part(0, "ff"), given, 3 * (1 + 10 * 2))]
    assert output == 21 + 10 * 63


def test_a_skipped_step_gates_and_adds_to_its_own_input_what_is_predicted():
    model = Toy()
    cache, _, outputs = computed(model, torch.ones(1), 10.0)
    assert cache.serve(lambda: model(torch.tensor([5.0]), 0.5), outputs) == 5 + 0.5 * 2 + 0.5 * 63
    assert [block.attn.calls + block.ff.calls for block in model.blocks] == [2]


def test_outside_of_a_cache_modules_run_and_removal_leaves_nothing():
    model = Toy()
    cache, *_ = computed(model, torch.ones(1))
    assert model(torch.ones(1)) == 12
    cache.remove()
    assert model(torch.ones(1)) == 12
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_kept_does_not_change_with_what_the_block_does_to_it():
    class InPlace(Block):
        def forward(self, x, gate):
            return self.ff(self.attn(x).add_(100))

    model = Toy(InPlace)
    cache, output, outputs = computed(model, torch.ones(1))
    assert outputs[0][2] == 2
    predicted = [(part, shapes, Weighted((value,), (1.0,))) for part, shapes, value in outputs]
    assert cache.serve(lambda: model(torch.ones(1)), predicted) == output
    assert outputs[0][2] == 2


class Joint(Block):
    """Attention and feed-forward side by side, joined by one projection, as in FLUX's single blocks."""

    def __init__(self):
        super().__init__()
        self.attn, self.proj_mlp, self.act_mlp, self.proj_out = Times(2), Times(3), Times(4), Times(5)

    def forward(self, x, gate):
        return x + gate * self.proj_out(self.attn(x) + self.act_mlp(self.proj_mlp(x)))


def test_of_modules_that_one_projection_joins_it_alone_is_kept():
    model = Toy(Joint)
    cache, output, outputs = computed(model, torch.ones(3), 2.0)
    assert torch.equal(output, torch.full((3,), 1 + 2 * 70.0))
    assert [part.name for part, *_ in outputs if part.kept] == ["proj_out"]
    assert torch.equal(cache.serve(lambda: model(torch.zeros(3), 0.5), outputs), torch.full((3,), 35.0))
    assert {module.calls for module in model.blocks[0].children() if isinstance(module, Times)} <= {0, 1}


class Tapped(Joint):
    def forward(self, x, gate):
        return super().forward(x, gate) + self.attn(x)


class Undecided(Block):
    passes = 0

    def forward(self, x, gate):
        self.passes += 1
        return self.ff(self.attn(x)) if self.passes == 1 else self.attn(x)


class Idle(Block):
    def forward(self, x, gate):
        return x


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.norm = Times(2), Times(3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Tapped, r"served on the very input .* another output \(relative error 0\.\d+\); use cache='output'"),
        (Undecided, "which of them it calls depends on what they return; use"),
        (Idle, "it calls none of them; use"),
        (
            Unknown,
            "Unknown has no attention or feed-forward module that cemq knows by name, so that none can be cached",
        ),
    ],
)
def test_a_model_whose_modules_cannot_be_cached_is_refused(kind, message):
    with pytest.raises(ModelError, match=message):
        computed(Toy(kind), torch.ones(2))


def test_other_modules_than_those_that_were_computed_are_not_served():
    one, two = Toy(), Toy(depth=2)
    cache, _, outputs = computed(two, torch.ones(1))
    assert cache.serve(lambda: one(torch.ones(1)), outputs) is None
    assert cache.serve(lambda: two.blocks[1](torch.ones(1), 1.0), outputs) is None
    assert cache.serve(lambda: two(two(torch.ones(1))), outputs) is None


def test_a_prediction_is_summed_leaf_by_leaf_in_the_newest_dtype():
    leaves = torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    found, words = summed([Weighted(leaves, (2.0, -1.0)), Weighted(("new", "old"), (2.0, -1.0))])
    assert (found, found.dtype, words) == (torch.tensor([5.0]), torch.bfloat16, "new")


# --- which modules

PARTS = {
    "dit": ["attn1", "ff"],
    "flux": ["attn", "ff", "ff_context", "proj_mlp", "act_mlp", "proj_out", "attn"],
    "hidream": ["attn1", "ff_i", "ff_t", "attn1", "ff_i"],
    "lumina2": ["attn", "feed_forward"],
    "qwenimage": ["attn", "img_mlp", "txt_mlp"],
    "sd3": ["attn", "ff", "ff_context", "attn", "ff"],
    "wan": ["attn1", "attn2", "ffn"],
    "z_image": ["attention", "feed_forward"],
}


@pytest.mark.parametrize("name", PARTS)
def test_modules_are_found_by_name(name):
    parts = find_parts(FAMILIES[name].pipeline().transformer).values()
    blocks = {}
    for part in parts:
        blocks.setdefault(part.block, []).append(part.name)
    assert [each for names in dict.fromkeys(map(tuple, blocks.values())) for each in names] == PARTS[name]


# --- on pipelines


class ByHand:
    """FORA (arXiv:2407.01425) on a DiT, written out: on other steps than every ``interval``-th, attention and
    feed-forward return what they returned last, before the gate."""

    def __init__(self, pipe, full_steps):
        self.full_steps, self.kept, self.step = full_steps, {}, 0
        for number, block in enumerate(pipe.transformer.transformer_blocks):
            for name in ("attn1", "ff"):
                module = getattr(block, name)
                module.forward = self.remembering((number, name), module.forward)

    def remembering(self, key, forward):
        def replacement(*args, **kwargs):
            if self.step in self.full_steps:
                self.kept[key] = forward(*args, **kwargs)
            return self.kept[key].clone()

        return replacement

    def next(self):
        self.step += 1


@pytest.mark.parametrize("interval", [2, 3, 6])
def test_reuse_is_fora_bit_for_bit(dit, interval):
    full_steps = tuple(range(0, STEPS, interval))
    schedule = CacheSchedule(num_steps=STEPS, full_steps=full_steps, predictor="reuse")
    with attached(dit, plan_of(dit, schedule, cache="modules")):
        found = run_dit(dit)
    plain, by_hand = run_dit(dit), ByHand(dit, full_steps)
    assert np.array_equal(run_dit(dit, on_step=by_hand.next), found)
    assert not np.array_equal(found, plain)


@pytest.mark.parametrize("predictor", ["taylor1", ("reuse", "damped", "taylor2")])
def test_every_module_is_served_as_the_schedule_says(dit, predictor):
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor=predictor)
    outputs = {name: [] for name in ("attn1", "ff")}
    with attached(dit, plan_of(dit, schedule, cache="modules")):
        run_dit(dit)  # checked once, not again
        for name, found in outputs.items():
            module = getattr(dit.transformer.transformer_blocks[1], name)
            module.register_forward_hook(lambda *args, found=found: found.append(args[-1].clone()))
        run_dit(dit)
    for found in outputs.values():
        assert len(found) == STEPS
        for step in (2, 3, 5):
            sources, weights = schedule.serving(step)
            expected = sum(weight * found[source] for source, weight in zip(sources, weights, strict=True))
            assert torch.allclose(found[step], expected, atol=1e-6)


def test_gates_and_modulation_are_those_of_the_skipped_step(dit):
    """With the modules' outputs held, the output still follows the timestep, whose embedding the gates come from."""
    block, outputs = dit.transformer.transformer_blocks[0], []
    block.register_forward_hook(lambda *args: outputs.append(args[-1] - args[1][0]))
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0,), predictor="reuse")
    with attached(dit, plan_of(dit, schedule, cache="modules")):
        run_dit(dit)
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(outputs[1:]))


def test_each_guidance_branch_has_its_own_outputs(flux):
    attention = flux.transformer.transformer_blocks[0].attn
    schedule, found, ends = CacheSchedule(num_steps=STEPS, full_steps=(0, 3), predictor="reuse"), [], [0]
    with attached(flux, schedule, cache="modules") as hook:
        attention.register_forward_hook(lambda *args: found.append([leaf.clone() for leaf in args[-1]]))
        run(flux, ONE, steps=STEPS, call=FLUX_CALL, on_step=lambda: ends.append(len(found)))
    assert (hook.full_evaluations, hook.skipped_evaluations) == (4, 8)
    assert ends[:3] == [0, 3, 5]  # computed, checked; computed; served twice
    for conditional, again, unconditional in zip(found[0], found[3], found[2], strict=True):  # image and text
        assert torch.equal(conditional, again)
        assert not torch.equal(conditional, unconditional)


def test_other_shapes_in_the_middle_of_a_run_are_computed_with_one_warning():
    family = FAMILIES["z_image"]
    pipe = family.pipeline()
    call = family.call | {"cfg_truncation": 0.5}
    batch, schedule = batch_of(family), CacheSchedule(num_steps=STEPS, full_steps=(0,), predictor="reuse")
    with (
        attached(pipe, schedule, cache="modules") as hook,
        pytest.warns(UserWarning, match="no earlier output of its shape") as warned,
    ):
        run(pipe, batch, steps=STEPS, call=call)
    assert len([each for each in warned if "cemq" in str(each.message)]) == 1
    assert hook.full_evaluations > 1
    assert hook.skipped_evaluations > 0


def test_a_unet_is_refused_at_once_and_left_as_it_was():
    pipe = FAMILIES["sd15"].pipeline()
    with pytest.raises(ModelError, match=r"DownBlock2D has no attention or feed-forward module .* use cache='output'"):
        attach(pipe, CacheSchedule(num_steps=7, full_steps=(0,)), cache="modules")
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


# --- memory


def held(pipe, schedule, batch=BATCH, call=CALL):
    """Bytes that are cached after each step of a run."""
    found = []
    with attached(pipe, schedule, cache="modules") as hook:
        run(pipe, batch, steps=schedule.num_steps, call=call, on_step=lambda: found.append(hook.cached_bytes))
    return found


def test_a_full_compute_step_takes_blocks_times_modules_times_tokens_times_width(dit):
    blocks = len(dit.transformer.transformer_blocks)
    step_bytes = blocks * 2 * 4 * 16 * 32 * 4  # two modules; two samples and their guidance, tokens, width; float32
    assert held(dit, HALF) == [step_bytes * count for count in (1, 2, 2, 1, 2, 0)]
    assert held(dit, EVERY) == [0] * STEPS


@pytest.mark.parametrize("name", ["dit", "flux", "flux_true_cfg", "sd3", "wan22"])
def test_the_bytes_that_are_said_are_those_that_are_held(name, caplog):
    family = FAMILIES[name]
    pipe = family.pipeline()
    schedule = CacheSchedule(num_steps=STEPS, full_steps=(0, 1, 4), predictor="taylor1")
    with cache_checked(pipe, "modules") as memory, pytest.raises(PipelineError, match="enough"):
        run(pipe, batch_of(family), steps=STEPS, call=family.call, on_step=_enough)
    with caplog.at_level(logging.INFO, logger="cemq.runtime"):
        found = held(pipe, schedule, batch_of(family), family.call)
    assert found[0] == memory.step_bytes
    assert max(found) == schedule.most_kept * memory.step_bytes == 2 * memory.step_bytes
    assert found[-1] == 0
    assert [record.message for record in caplog.records] == [
        f"the cache keeps {format_bytes(found[0])} of a full-compute step ({memory.contents}), at most 2 of them at "
        f"once: {format_bytes(max(found))}"
    ]


def _enough():
    raise RuntimeError("enough")


def test_twice_the_samples_take_twice_the_bytes(dit):
    one = Batch(conditions=BATCH.conditions[:1], seeds=BATCH.seeds[:1])
    assert held(dit, HALF) == [2 * count for count in held(dit, HALF, one)]


@pytest.mark.parametrize(
    ("full_steps", "predictor", "most"),
    [((0, 3), "reuse", 1), ((0, 1, 4), "taylor1", 2), ((0, 1, 3), "taylor2", 3), (range(6), "taylor2", 0)],
)
def test_a_schedule_knows_how_many_steps_it_keeps(full_steps, predictor, most):
    assert CacheSchedule(num_steps=6, full_steps=tuple(full_steps), predictor=predictor).most_kept == most


# --- bundles


def test_a_build_says_what_it_takes_before_long_work_and_the_bundle_keeps_the_cache(dit_folder, tmp_path):
    (tmp_path / "labels.txt").write_text("1\n2\n")
    arguments = [
        "quantize-and-schedule", str(dit_folder), "--cache", "modules", "--steps", "6", "--budget", "3", "--solver",
        "uniform", "--effort", "quick", "--samples", "2", "--planning-samples", "4", "--calib",
        str(tmp_path / "labels.txt"), "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    made = CliRunner().invoke(cli.app, arguments)
    assert made.exit_code == 0, made.output
    pipe = cemq.from_pretrained(tmp_path / "out", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    step_bytes = len(pipe.transformer.transformer_blocks) * 2 * 2 * 16 * 32 * 4  # of one sample and its guidance
    said = made.stderr.index(f"the cache keeps {format_bytes(step_bytes)} a sample (")
    assert said < made.stderr.index("planning, ")
    assert schedule_hook(pipe).plan.cache == "modules"
    run_dit(pipe, steps=6)
    assert (schedule_hook(pipe).full_evaluations, schedule_hook(pipe).skipped_evaluations) == (3, 3)
    assert "attention and feed-forward modules" in (tmp_path / "out" / "README.md").read_text()
    assert "attention and feed-forward modules" in cemq.export(tmp_path / "out", "cache-dit")
    assert "cache       modules" in CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "out")]).stdout


def test_a_unet_is_refused_before_any_work(tmp_path):
    family, stages = FAMILIES["sd15"], []
    family.pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(ModelError, match="DownBlock2D has no attention or feed-forward module"):
        cemq.quantize_and_schedule(
            str(tmp_path / "pipeline"), tmp_path / "out", calib=str(tmp_path / "prompts.txt"), cache="modules",
            steps=8, budget=4, samples=2, call=family.call, progress=lambda stage, share: stages.append(stage),
        )  # fmt: skip
    assert not stages
