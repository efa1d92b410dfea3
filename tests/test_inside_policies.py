"""Rules of papers that answer blocks and modules one by one, each against the rule worked out in plain wrappers."""

import dataclasses
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from support.checks import draw
from support.families import FAMILIES
from support.pipelines import BATCH, CALL, FLUX_CALL, ONE, make_dit, make_flux
from support.slow import others_slow

import cemq
from cemq.bundle.manifest import read_bundle
from cemq.errors import InputError, ModelError
from cemq.pipelines.batches import run
from cemq.runtime import attached, cache_checked
from cemq.runtime.cached.residual import route_of
from cemq.runtime.duca import DuCa, duca_steps, with_bonus
from cemq.runtime.h2cache import H2Cache, summarized
from cemq.runtime.policy_names import describe_policy
from cemq.schedule import CacheSchedule

STEPS = 10


@pytest.fixture(scope="module")
def deep_dit():
    return make_dit(layers=6)


@pytest.fixture(scope="module")
def deep_flux():
    pipe = make_flux()
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ).eval()  # fmt: skip
    return pipe


@pytest.fixture(params=["dit", "flux"])
def drawing(request):
    """A pipeline, how to draw with it, and how many calls a step takes."""
    pipe = request.getfixturevalue(f"deep_{request.param}")
    batch, call = (BATCH, CALL) if request.param == "dit" else (ONE, FLUX_CALL)
    return pipe, lambda: run(pipe, batch, steps=STEPS, call=call), 1 if request.param == "dit" else 2


@contextmanager
def wrapped(modules):
    """``wrapper(forward, *args, **kwargs)`` in place of each module's forward."""
    try:
        for module, wrapper in modules:
            forward = module.forward
            module.forward = lambda *args, wrapper=wrapper, forward=forward, **kwargs: wrapper(forward, *args, **kwargs)
        yield
    finally:
        for module, _ in modules:
            del module.forward


def blocks_of(pipe):
    model = pipe.transformer
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


# --- H2-Cache


def mean(values):
    return values.abs().mean().item()


def h2_by_hand(pipe, settings, calls, hits):
    """No more tokens than rows are to be left, so that nothing is averaged; the picture's alone in the first stage."""
    blocks = blocks_of(pipe)
    is_flux = calls == 2
    second = 3 if is_flux else 2  # a third of six
    thresholds = settings.threshold, settings.detail_threshold
    state, now, numbers = {}, {}, itertools.count()

    def given(args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (kwargs["encoder_hidden_states"], hidden) if is_flux else (hidden,)

    def wrapper_of(number):
        stage = int(number >= second)

        def wrapper(forward, *args, **kwargs):
            if number == 0:
                now.clear()
                now["stages"] = state.setdefault(next(numbers) % calls, ({}, {}))
                hits.append([])
            kept = now["stages"][stage]
            start = given(args, kwargs)
            if number in (0, second):
                output = forward(*args, **kwargs)
                end = output if is_flux else (output,)
                added = [after - before for before, after in zip(start, end, strict=True)]
                found = torch.cat(added, 1) if stage else added[-1]
                hit = "added" in kept and (
                    (stage == 1 and hits[-1][0])
                    or mean(found - kept["added"]) / mean(kept["added"]) < thresholds[stage]
                )
                hits[-1].append(hit)
                if not hit:
                    kept["added"], now["first"] = found, end
                return output
            is_last = number in (second - 1, len(blocks) - 1)
            if hits[-1][stage]:
                end = [each + more for each, more in zip(start, kept["rest"], strict=True)] if is_last else start
                return tuple(end) if is_flux else end[0]
            output = forward(*args, **kwargs)
            if is_last:
                end = output if is_flux else (output,)
                kept["rest"] = [after - before for before, after in zip(now["first"], end, strict=True)]
            return output

        return wrapper

    return [(block, wrapper_of(number)) for number, block in enumerate(blocks)]


@pytest.mark.parametrize(("threshold", "detail"), [(0.3, 0.2), (0.05, 0.3), (0.4, 0.01), (9.0, 9.0)])
def test_h2_cache_decides_and_serves_as_worked_out_by_hand(drawing, threshold, detail):
    pipe, draw_it, calls = drawing
    settings, hits = H2Cache(threshold=threshold, detail_threshold=detail), []
    with wrapped(h2_by_hand(pipe, settings, calls, hits)):
        picture = draw_it()
    with attached(pipe, settings) as hook:
        found = draw_it()
        steps, computed = hook.steps_run
    np.testing.assert_allclose(found, picture, atol=1e-4)
    assert len(hits) == STEPS * calls
    assert hits[:calls] == [[False, False]] * calls
    assert sum(map(sum, hits)) > 0
    assert steps == STEPS
    assert 0 < computed < STEPS
    if threshold == 9:  # all but the first block of each stage is served from the first step
        alone = computed - 1
        assert alone / (STEPS - 1) == pytest.approx(2 * 2 / 12 if calls == 1 else (4 + 3) / (3 * 4 + 4 * 3), abs=0.2)


def test_what_a_block_adds_is_averaged_over_squares_of_tokens_and_channels():
    torch.manual_seed(0)
    text, picture = torch.randn(1, 512, 4), torch.randn(1, 4096, 4)
    given = {"hidden_states": picture, "encoder_hidden_states": text}
    output = [text + 1, picture + torch.arange(4096.0)[None, :, None]]
    route = route_of("Block", given, (output[0], output[1]))
    structure = summarized(route, given, output, detail=False)
    assert structure.shape == (1, 2048, 2)
    assert structure[0, :3, 0].tolist() == pytest.approx([0.5, 2.5, 4.5], abs=1e-3)
    detail = summarized(route, given, output, detail=True)  # 4608 tokens, 12 rows each and no more channels than 4
    assert detail.shape == (1, 1152, 1)
    assert detail[0, :2, 0].tolist() == pytest.approx([1, 1], abs=1e-3)


# --- DuCa


def test_the_steps_of_duca_are_those_worked_out_by_hand():
    """20 steps, N = 3: 19 is full, then every round(3 / (1.4 - 0.04 t)), and from 7 down to 4 every other one."""
    kinds = dict(zip(range(19, -1, -1), duca_steps(20, 3), strict=True))
    full = [step for step, kind in kinds.items() if kind == "full"]
    # 19: 3/0.64 = 5, next multiple 15; 15: 3/0.8 = 4, next 12; 12: 3/0.92 = 3, next 9; 9: 3/1.04 = 3, next 6; 6: 2, 4;
    # 4: 2, 2; 2: 3/1.32 = 2, 0
    assert full == [19, 15, 12, 9, 6, 4, 2, 0]
    assert [kinds[step] for step in (18, 17, 16, 14, 13, 11, 10)] == [
        *("cautious", "aggressive", "cautious"), *("aggressive", "cautious"), *("aggressive", "cautious"),
    ]  # fmt: skip
    assert duca_steps(9, 4, varied=False) == (
        *("full", "cautious", "aggressive", "cautious", "full"), *("cautious", "aggressive", "cautious", "full"),
    )  # fmt: skip


def test_the_best_of_each_two_by_two_gets_a_bonus():
    scores = torch.tensor([[1.0, 2, 3, 4], [5, 6, 8, 7], [0, 1, 0, 0], [2, 0, 0, 9]])
    raised = scores.clone()
    raised[1, 1], raised[1, 2], raised[3, 0], raised[3, 3] = 6 * 1.8, 8 * 1.8, 2 * 1.8, 9 * 1.8
    torch.testing.assert_close(with_bonus(scores.flatten()), raised.flatten())
    assert torch.equal(with_bonus(torch.arange(6.0)), torch.arange(6.0))
    assert torch.equal(with_bonus(torch.arange(9.0)), torch.arange(9.0))


def duca_by_hand(pipe, settings, is_flux):
    """Every module's latest output is kept; of feed-forward a few tokens are put in it anew."""
    blocks, kinds = blocks_of(pipe), duca_steps(STEPS, settings.interval, varied=settings.fresh > 0)
    streams, now, numbers = {}, {}, itertools.count()
    calls = 2 if is_flux else 1

    def chosen(number, ages, step):
        tokens = len(ages)
        chance = np.random.default_rng([settings.seed, step, number]).random(tokens, dtype=np.float32)
        scores = torch.from_numpy(chance) + settings.age_weight * ages / settings.interval
        side = round(tokens**0.5)
        for row, column in itertools.product(range(0, side, 2), range(0, side, 2)):
            cell = [(row + i) * side + column + j for i in (0, 1) for j in (0, 1)]
            best = max(cell, key=lambda token: scores[token])
            scores[best] *= 1.8
        share = 2.5 * (3 - 4 * (STEPS - 1 - step) / STEPS) * (0.8 + 0.4 * number / (len(blocks) - 1)) * settings.fresh
        return scores.argsort(descending=True)[: int(min(max(share, 0), 1) * tokens)]

    def block_wrapper(number):
        def wrapper(forward, *args, **kwargs):
            if number == 0:
                step, branch = divmod(next(numbers), calls)
                now.update(step=step, kind=kinds[step], kept=streams.setdefault(branch, {}))
                if now["kind"] == "full":
                    now["kept"].clear()
            if now["kind"] == "aggressive":
                last = now["kept"]["last"]
                if number < len(blocks) - 1:  # what it is given is as good as anything in the right shapes
                    given = args[0] if args else kwargs["hidden_states"]
                    return (kwargs["encoder_hidden_states"], given) if is_flux else given
                return tuple(each.clone() for each in last) if is_flux else last[0].clone()
            output = forward(*args, **kwargs)
            if number == len(blocks) - 1:
                now["kept"]["last"] = [each.clone() for each in (output if is_flux else (output,))]
            return output

        return wrapper

    def module_wrapper(number, name):
        def wrapper(forward, *args, **kwargs):
            kept, key = now["kept"], (number, name)
            if now["kind"] == "full":
                kept[key] = forward(*args, **kwargs)
            elif name in ("ff", "ff_context"):
                (given,) = args
                ages = kept.setdefault((key, "ages"), torch.zeros(given.shape[1]))
                drawn = chosen(number, ages, now["step"])
                ages += 1
                ages[drawn] = 0
                if len(drawn):
                    kept[key] = kept[key].clone()
                    kept[key][:, drawn] = forward(given[:, drawn])
            return kept[key]

        return wrapper

    names = ("attn", "ff", "ff_context", "proj_out") if is_flux else ("attn1", "ff")
    return [(block, block_wrapper(number)) for number, block in enumerate(blocks)] + [
        (getattr(block, name), module_wrapper(number, name))
        for number, block in enumerate(blocks)
        for name in names
        if hasattr(block, name) and not (name == "attn" and hasattr(block, "proj_out"))
    ]


@pytest.mark.parametrize(("interval", "fresh", "seed"), [(3, 0.05, 0), (4, 0.2, 3), (5, 0.0, 0), (2, 0.4, 1)])
def test_duca_serves_as_worked_out_by_hand(drawing, interval, fresh, seed):
    pipe, draw_it, calls = drawing
    settings = DuCa(interval=interval, fresh=fresh, seed=seed)
    with wrapped(duca_by_hand(pipe, settings, calls == 2)):
        picture = draw_it()
    with attached(pipe, settings) as hook:
        found = draw_it()
        steps, computed = hook.steps_run
    np.testing.assert_allclose(found, picture, atol=1e-4)
    full = duca_steps(STEPS, interval, varied=fresh > 0).count("full")
    assert steps == STEPS
    assert full <= computed <= full + (STEPS - full) * (0.0 if fresh == 0 else 1.0)
    if fresh:
        with attached(pipe, dataclasses.replace(settings, seed=9)):
            assert not np.array_equal(draw_it(), found)  # so that equal pictures say something


# --- what they share


@pytest.mark.parametrize("policy", [H2Cache(threshold=0, detail_threshold=0), DuCa(interval=1, fresh=0)])
def test_what_serves_nothing_changes_nothing(drawing, policy):
    pipe, draw_it, _ = drawing
    plain = draw_it()
    with attached(pipe, policy) as hook:
        assert np.array_equal(draw_it(), plain)
        assert hook.steps_run == (STEPS, STEPS)
    assert np.array_equal(draw_it(), plain)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # of some models as they are made
@pytest.mark.parametrize("name", others_slow(FAMILIES, ("flux", "sd3", "pixart_sigma", "wan")))
def test_blocks_of_every_family_of_transformers_can_be_answered_for(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    plain = draw(pipe, family)
    try:
        with attached(pipe, H2Cache(threshold=0, detail_threshold=0)):
            assert np.array_equal(draw(pipe, family), plain)
    except ModelError as error:
        grows = "return other shapes than its first one"  # HiDream's last blocks hand on fewer tokens
        said = ("has no list of blocks", "no attention or feed-forward", *([grows] if name == "hidream" else []))
        assert any(each in str(error) for each in said)  # noqa: PT017
        return
    for policy in (H2Cache(threshold=1e9, detail_threshold=1e9), DuCa(interval=4)):
        with attached(pipe, policy) as hook:
            assert np.isfinite(draw(pipe, family)).all()
            assert hook.full_evaluations > 0
            assert hook.cached_bytes == 0
    assert np.array_equal(draw(pipe, family), plain)


@pytest.mark.parametrize("policy", [H2Cache(threshold=9, detail_threshold=9), DuCa(interval=4, fresh=0)])
@torch.no_grad()
def test_what_is_kept_of_other_shapes_is_not_served(deep_dit, policy):
    """A loop of one's own, in which a sample leaves after the third step."""
    model, scheduler, sizes = deep_dit.transformer, deep_dit.scheduler, (2, 2, 2, 1, 1, 1)

    def drawn():
        computed = []
        handle = model.transformer_blocks[3].attn1.to_q.register_forward_hook(lambda *_: computed.append(len(sizes)))
        scheduler.set_timesteps(len(sizes))
        sample, counts = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
        for size, timestep in zip(sizes, scheduler.timesteps, strict=True):
            sample = sample[:size]
            labels, times = torch.ones(size, dtype=torch.long), timestep.expand(size)
            output = model(sample, timestep=times, class_labels=labels).sample[:, :4]
            assert len(output) == size
            sample = scheduler.step(output, timestep, sample).prev_sample
            counts.append(len(computed))
        handle.remove()
        return counts

    with attached(deep_dit, policy):
        counts = drawn()
    assert counts[0] == 1
    assert counts[2] < 3
    assert counts[3] == counts[2] + 1


class Answering:
    """Answers every block and module by running it; ``whole`` is what it says at the end."""

    name, most_kept = "answering", 0

    def __init__(self, cache="inside", whole=True):
        self.cache, self.whole, self.asked = cache, whole, []

    def begin(self, num_steps):
        return self

    def decide(self, call):
        return self

    def keeps(self, call, *, served):
        return ()

    def answer(self, place, arguments, run):
        self.asked.append(place)
        return run()

    def end(self):
        return self.whole


def test_blocks_are_asked_before_their_modules_and_outputs_stay(deep_dit):
    plain = run(deep_dit, BATCH, steps=2, call=CALL)
    policy = Answering()
    with attached(deep_dit, policy) as hook:
        assert np.array_equal(run(deep_dit, BATCH, steps=2, call=CALL), plain)
        assert hook.steps_run == (2, 2)
    expected = [(number, module) for number in range(6) for module in (None, "attn1", "ff")] * 2
    assert [(place.block, place.module) for place in policy.asked] == expected
    assert policy.asked[0].stack == ("BasicTransformerBlock",) * 6


def test_a_denoiser_that_cannot_be_answered_for_ends_the_run(deep_dit):
    with attached(deep_dit, Answering(whole=False)), pytest.raises(ModelError, match="calls other blocks than on the"):
        run(deep_dit, BATCH, steps=2, call=CALL)


def test_who_answers_blocks_has_a_cache_of_its_own(deep_dit):
    with attached(deep_dit, Answering(cache="output")), pytest.raises(ModelError, match="cache=output: a policy that"):
        run(deep_dit, BATCH, steps=2, call=CALL)
    schedule = CacheSchedule(num_steps=4, full_steps=(0, 2))
    with pytest.raises(InputError, match="cache=inside: policies that"), attached(deep_dit, schedule, cache="inside"):
        pass
    with (
        pytest.raises(InputError, match="cache=output: it answers"),
        attached(deep_dit, DuCa(interval=2), cache="output"),
    ):
        pass


def test_a_bundle_keeps_it_and_counts_what_it_computes(tmp_path):
    make_dit().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "labels.txt").write_text("1\n2\n3\n4\n")
    cemq.quantize_and_schedule(
        str(tmp_path / "pipeline"), tmp_path / "bundle", scheme="w8a8", rounding="nearest", steps=8, samples=2,
        call=CALL, calib=str(tmp_path / "labels.txt"), device="cpu", policy="duca:interval=3",
    )  # fmt: skip
    manifest = read_bundle(tmp_path / "bundle")
    assert manifest.policy == describe_policy(DuCa(interval=3))
    assert manifest.cache == "inside"
    assert duca_steps(8, 3).count("full") <= manifest.full_steps < 8
    found = cemq.evaluate(tmp_path / "bundle", samples=2, device="cpu")
    assert found.full_steps < 8
    (denoiser,) = [each for each in cemq.plan_memory(tmp_path / "bundle", "4GiB").components if each.cached_bytes]
    assert denoiser.name == "transformer"


def test_what_a_policy_may_keep_is_known_before_hours_of_work():
    pipe, sizes = make_dit(), {}
    for kind in ("modules", "inside"):
        with cache_checked(pipe, kind) as memory:
            run(pipe, BATCH, steps=1, call=CALL)
        sizes[kind] = memory.step_bytes
    assert sizes["inside"] == sizes["modules"] > 0
    assert memory.contents == "outputs of 4 modules of 2 blocks, at most"
