"""Rules of papers that decide while a picture is drawn, each against the rule worked out in plain wrappers."""

import dataclasses
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.pipelines import BATCH, CALL, FLUX_CALL, ONE, make_flux

from cemq.errors import InputError, ModelError
from cemq.pipelines.batches import run
from cemq.runtime import attached, schedule_hook
from cemq.runtime.dicache import DiCache
from cemq.runtime.easycache import EasyCache
from cemq.runtime.magcache import MagCache, fitted_magnitudes
from cemq.runtime.policies import Serving
from cemq.runtime.policy_names import describe_policy, make_policy
from cemq.runtime.precisecache import PreciseCache, low_frequencies, reduced
from cemq.runtime.runner import Runner
from cemq.runtime.sencache import SenCache, fitted_sensitivities

STEPS = 10
MAGNITUDES = (1.0, 1.3, 1.2, 1.1, 1.05, 0.96, 1.04, 0.98, 0.9, 0.8)
TABLES = {"timesteps": (1000.0, 700.0, 300.0), "to_sample": (0.2, 0.5, 0.9), "to_timestep": (1e-4, 2e-4, 0.0)}
FLUX_TABLES = {"timesteps": (1.0, 0.6), "to_sample": (0.1, 0.4), "to_timestep": (0.05, 0.2)}
NOTHING_SKIPPED = (
    MagCache(threshold=0, magnitudes=(1.0,)), EasyCache(threshold=0, warm_up=1), DiCache(threshold=0, retention=0),
    SenCache(threshold=0, timesteps=(1.0,), to_sample=(0.0,), to_timestep=(0.0,)), PreciseCache(threshold=0),
)  # fmt: skip


@pytest.fixture(scope="module")
def flux():
    return make_flux()


@pytest.fixture(params=["dit", "flux"])
def drawing(request):
    """A pipeline, how to draw with it, and how many calls a step takes: FLUX's branches of guidance are two."""
    pipe = request.getfixturevalue(request.param)
    batch, call = (BATCH, CALL) if request.param == "dit" else (ONE, FLUX_CALL)
    return pipe, lambda: run(pipe, batch, steps=STEPS, call=call), 1 if request.param == "dit" else 2


@contextmanager
def by_hand(pipe, answer):
    """Every call of the denoiser is ``answer(number of the call, sample, timestep, evaluate)``; so are its calls."""
    model, numbers = pipe.transformer, itertools.count()
    forward = model.forward

    def wrapped(hidden_states, timestep=None, return_dict=True, **kwargs):
        def evaluate(sample=hidden_states, timestep=timestep):
            return forward(hidden_states=sample, timestep=timestep, return_dict=False, **kwargs)[0]

        output = answer(next(numbers), hidden_states, timestep, evaluate)
        return (output,) if not return_dict else type("Output", (), {"sample": output})()

    model.forward = wrapped
    try:
        yield
    finally:
        del model.forward


def steps_computed(pipe, draw, policy):
    """By stream, in their order; and what is drawn."""
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Watched:
        name = "watched"
        cache: str = policy.cache

        def begin(self, num_steps):
            decider = policy.begin(num_steps)
            keeps = decider.keeps

            def watched(call, *, served):
                seen.setdefault(call.stream, [])
                if not served:
                    seen[call.stream].append(call.step)
                return keeps(call, served=served)

            decider.keeps = watched
            return decider

    with attached(pipe, Watched()):
        found = draw()
    return list(seen.values()), found


def mean(values):
    return values.abs().mean().item()


# --- MagCache


def magcache_steps(settings):
    """In pure arithmetic: no sample takes part."""
    computed, ratio, error, skipped = [], 1.0, 0.0, 0
    for step in range(STEPS):
        if computed and step >= int(settings.retention * STEPS + 0.5):
            ratio *= settings.magnitudes[step]
            error, skipped = error + abs(1 - ratio), skipped + 1
            if error < settings.threshold and skipped <= settings.most_skipped:
                continue
        computed.append(step)
        ratio, error, skipped = 1.0, 0.0, 0
    return computed


@pytest.mark.parametrize(
    ("threshold", "most_skipped", "retention"), [(0.1, 3, 0.2), (0.3, 2, 0.0), (0.24, 5, 0.35), (9.0, 4, 0.1)]
)
def test_magcache_decides_by_its_table_alone(drawing, threshold, most_skipped, retention):
    pipe, draw, calls = drawing
    settings = MagCache(
        threshold=threshold, magnitudes=MAGNITUDES, most_skipped=most_skipped, retention=retention, cache="output"
    )
    expected, kept = magcache_steps(settings), {}

    def answer(number, sample, timestep, evaluate):
        step, branch = divmod(number, calls)
        if step in expected:
            kept[branch] = evaluate()
        return kept[branch]

    with by_hand(pipe, answer):
        picture = draw()
    found, drawn = steps_computed(pipe, draw, settings)
    assert found == [expected] * calls
    assert 1 < len(expected) < STEPS
    assert np.array_equal(drawn, picture)


def test_magcache_takes_the_nearest_entries_at_another_step_count(dit):
    settings = MagCache(threshold=0.5, magnitudes=(1.0, 2.0, 1.1, 0.8), retention=0, most_skipped=9)
    found, _ = steps_computed(dit, lambda: run(dit, BATCH, steps=7, call=CALL), settings)
    table = (1.0, 1.0, 2.0, 2.0, 2.0, 1.1, 0.8)  # of 0, 0.5, 1, 1.5, 2, 2.5 and 3, the halves to the even one
    table = (table[0], table[1], table[2], 1.1, 1.1, 1.1, table[6])
    longer = dataclasses.replace(settings, magnitudes=table)
    assert steps_computed(dit, lambda: run(dit, BATCH, steps=7, call=CALL), longer)[0] == found
    assert found == [[0, 2, 5]]


def test_fitted_magnitudes_are_the_ratios_of_residuals(flux):
    """The residual of the tokens of the picture, of each call; the mean over branches of guidance."""
    runner = Runner(pipe=flux, steps=5, call=FLUX_CALL)
    found, norms = fitted_magnitudes(runner, [ONE]), []
    model = flux.transformer
    hooks = [
        model.transformer_blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: norms.append(kwargs["hidden_states"].clone()), with_kwargs=True
        ),
        model.single_transformer_blocks[-1].register_forward_hook(
            lambda _, args, output: norms.append((output[1] - norms.pop()).norm(dim=-1))
        ),
    ]
    try:
        runner.run_one(ONE)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(norms) == 10
    ratios = [(now / before).mean().item() for before, now in zip(norms, norms[2:], strict=False)]
    expected = [1.0, *np.array(ratios).reshape(4, 2).mean(1)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found)) == 5
    assert min(found) > 0


# --- EasyCache


def easycache_by_hand(settings, calls, computed):
    """The branch that is called first decides for the others; outputs may have more channels than samples."""
    state = {"sum": 0.0, "rate": None, "latest": None, "skips": False}
    kept = {}

    def answer(number, sample, timestep, evaluate):
        step, branch = divmod(number, calls)
        axis = 2 if sample.dim() == 3 else 1
        channels = sample.shape[axis]
        if branch == 0:
            state["skips"] = False
            if settings.warm_up <= step < STEPS - 1 and state["rate"] is not None:
                own = kept[0][1].narrow(axis, 0, channels)
                state["sum"] += state["rate"] * mean(sample - state["latest"]) / mean(own)
                state["skips"] = state["sum"] < settings.threshold
            state["latest"] = sample
        if state["skips"]:
            before, output = kept[branch]
            output = output.clone()
            output.narrow(axis, 0, channels).add_(sample - before)
            return output
        output = evaluate()
        if branch == 0:
            state["sum"] = 0.0
            computed.append(step)
            if 0 in kept:
                change = (output - kept[0][1]).narrow(axis, 0, channels)
                state["rate"] = mean(change) / mean(sample - kept[0][0])
        kept[branch] = sample, output
        return output

    return answer


@pytest.mark.parametrize(("threshold", "warm_up"), [(0.2, 2), (0.6, 3), (1e9, 5)])
def test_easycache_decides_and_serves_as_worked_out_by_hand(drawing, threshold, warm_up):
    pipe, draw, calls = drawing
    settings, expected = EasyCache(threshold=threshold, warm_up=warm_up), []
    with by_hand(pipe, easycache_by_hand(settings, calls, expected)):
        picture = draw()
    found, drawn = steps_computed(pipe, draw, settings)
    assert found == [expected] * calls
    assert warm_up + 1 <= len(expected) < STEPS
    if threshold == 1e9:
        assert expected == [*range(warm_up), STEPS - 1]
    np.testing.assert_allclose(drawn, picture, atol=1e-5)
    with attached(pipe, EasyCache(threshold=1e9, warm_up=2)):
        assert not np.allclose(draw(), picture, atol=1e-4)  # so that equal pictures say something


def test_easycache_reuses_the_output_and_nothing_else(dit):
    with pytest.raises(InputError, match="easycache: cache=residual: it reuses the output"):
        EasyCache(threshold=1, cache="residual")
    with (
        pytest.raises(InputError, match="easycache: cache=modules"),
        attached(dit, EasyCache(threshold=1), cache="modules"),
    ):
        pass


# --- DiCache


def dicache_by_hand(pipe, settings, calls, computed):
    """Blocks run on every step, what they add is put in place of where they are served; two passes, one to look."""
    model, streams = pipe.transformer, {}
    is_flux = hasattr(model, "single_transformer_blocks")
    first = model.transformer_blocks[0]
    last = model.single_transformer_blocks[-1] if is_flux else model.transformer_blocks[-1]
    probe = ([*model.transformer_blocks, *model.single_transformer_blocks] if is_flux else model.transformer_blocks)[
        settings.blocks - 1
    ]
    seen = {}

    def taken(_, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["text"] = kwargs.get("encoder_hidden_states")

    def probed(_, args, output):
        seen["y"] = output[1] if is_flux else output

    def ended(_, args, output):
        end = output if is_flux else (output,)
        start = (seen["text"], seen["x"]) if is_flux else (seen["x"],)
        if seen.get("serve") is None:
            seen["residual"] = [b - a for a, b in zip(start, end, strict=True)]
            return output
        served = tuple(a + r for a, r in zip(start, seen["serve"], strict=True))
        return served if is_flux else served[0]

    def answer(number, sample, timestep, evaluate):
        step, branch = divmod(number, calls)
        stream = streams.setdefault(branch, {"y": None, "sum": 0.0, "kept": []})
        seen["serve"] = None
        output = evaluate()
        y, p = seen["y"], seen["y"] - seen["x"]
        before, stream["y"] = stream["y"], y
        if int(settings.retention * STEPS) < step < STEPS - 1:
            stream["sum"] += mean(y - before) / mean(before)
            if stream["sum"] < settings.threshold:
                (p_a, r_a), *older = stream["kept"][::-1][:2]
                seen["serve"] = r_a
                for p_b, r_b in older:
                    gamma = min(max(mean(p - p_b) / mean(p_a - p_b), 1), settings.most_aligned)
                    seen["serve"] = [b + gamma * (a - b) for a, b in zip(r_a, r_b, strict=True)]
                return evaluate()
        stream["sum"] = 0.0
        stream["kept"].append((p, seen["residual"]))
        computed.setdefault(branch, []).append(step)
        return output

    hooks = [
        first.register_forward_pre_hook(taken, with_kwargs=True), probe.register_forward_hook(probed),
        last.register_forward_hook(ended),
    ]  # fmt: skip
    return answer, hooks


@pytest.mark.parametrize(
    ("threshold", "blocks", "retention", "most"),
    [(0.3, 1, 0.2, 1.5), (0.5, 1, 0.0, 2.0), (0.4, 2, 0.1, 1.0), (9, 1, 0.3, 4)],
)
def test_dicache_decides_and_serves_as_worked_out_by_hand(drawing, threshold, blocks, retention, most):
    pipe, draw, calls = drawing
    settings, expected = DiCache(threshold=threshold, blocks=blocks, retention=retention, most_aligned=most), {}
    answer, hooks = dicache_by_hand(pipe, settings, calls, expected)
    try:
        with by_hand(pipe, answer):
            picture = draw()
    finally:
        for hook in hooks:
            hook.remove()
    found, drawn = steps_computed(pipe, draw, settings)
    assert found == list(expected.values())
    assert all(2 <= len(steps) < STEPS for steps in found)
    np.testing.assert_allclose(drawn, picture, atol=1e-4)


def test_dicache_probes_no_more_blocks_than_there_are(dit):
    with attached(dit, DiCache(threshold=1, blocks=3)), pytest.raises(ModelError, match="has 2 blocks: probe no more"):
        run(dit, BATCH, steps=4, call=CALL)


# --- PreciseCache


def low_part(values, radius):
    """The same frequencies, by what is left of the values where all others are taken out."""
    height, width = values.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(values), dim=(-2, -1))
    for row, column in itertools.product(range(height), range(width)):
        if (row - height // 2) ** 2 + (column - width // 2) ** 2 > (radius * min(height, width)) ** 2:
            spectrum[..., row, column] = 0
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 10, 15), (1, 2, 3, 4, 4)])
@pytest.mark.parametrize("radius", [0.2, 0.0, 1.0])
def test_low_frequencies_are_as_large_as_the_picture_of_them(shape, radius):
    torch.manual_seed(0)
    one, other = torch.randn(shape), torch.randn(shape)
    found = (low_frequencies(one, radius) - low_frequencies(other, radius)).norm().item()
    assert found == pytest.approx(low_part(one - other, radius).norm().item(), rel=1e-4)
    if radius == 1:
        assert found == pytest.approx((one - other).norm().item(), rel=1e-4)


def test_every_fourth_row_and_column_and_every_other_frame_is_tried():
    image, video = torch.arange(2 * 64.0).reshape(1, 2, 8, 8), torch.arange(3 * 64.0).reshape(1, 1, 3, 8, 8)
    assert reduced(image, 4, 2)[0, 1].tolist() == [[64, 68], [96, 100]]
    assert reduced(video, 4, 2)[0, 0, :, 0, 0].tolist() == [0, 128]
    for sample in (torch.zeros(1, 16, 4), torch.zeros(1, 4, 3, 8)):
        with pytest.raises(ModelError, match="cannot be reduced by 4: it takes a denoiser that is given pictures"):
            reduced(sample, 4, 2)


def precisecache_by_hand(settings, computed):
    state = {"low": None, "largest": 0.0, "sum": 0.0, "kept": None}

    def answer(number, sample, timestep, evaluate):
        tried = evaluate(sample=sample[:, :, :: settings.shrink, :: settings.shrink])[:, : sample.shape[1]]
        low = low_part(tried, settings.radius)
        before, state["low"] = state["low"], low
        if before is not None:
            change = (low - before).norm().item()
            state["largest"] = max(state["largest"], change)
            state["sum"] += change
            if state["sum"] <= settings.threshold * state["largest"]:
                return state["kept"]
        state["sum"], state["kept"] = 0.0, evaluate()
        computed.append(number)
        return state["kept"]

    return answer


@pytest.mark.parametrize(("threshold", "shrink", "radius"), [(0.7, 4, 0.2), (1.5, 2, 0.3), (1.2, 2, 0.0)])
def test_precisecache_decides_as_worked_out_by_hand(dit, threshold, shrink, radius):
    settings, expected = PreciseCache(threshold=threshold, shrink=shrink, radius=radius), []
    with by_hand(dit, precisecache_by_hand(settings, expected)):
        picture = run(dit, BATCH, steps=STEPS, call=CALL)
    found, drawn = steps_computed(dit, lambda: run(dit, BATCH, steps=STEPS, call=CALL), settings)
    assert found == [expected]
    assert 1 < len(expected) < STEPS
    assert np.array_equal(drawn, picture)


def test_precisecache_takes_no_tokens(flux):
    with attached(flux, PreciseCache(threshold=1)), pytest.raises(ModelError, match="not tokens, and large enough"):
        run(flux, ONE, steps=2, call=FLUX_CALL)


# --- SenCache


def sencache_by_hand(settings, calls, computed):
    state, kept = {"skips": False, "skipped": 0}, {}

    def answer(number, sample, timestep, evaluate):
        step, branch = divmod(number, calls)
        if branch == 0:
            now, state["skips"] = timestep.max().item(), False
            if 0 < step < STEPS - 1 and state["skipped"] < settings.most_skipped:
                reference, then = state["reference"]
                nearest = min(range(len(settings.timesteps)), key=lambda each: abs(settings.timesteps[each] - then))
                change = settings.to_sample[nearest] * (sample - reference).norm().item() + settings.to_timestep[
                    nearest
                ] * abs(now - then) * np.sqrt(sample.numel())
                threshold = min(settings.threshold, settings.early_threshold) if step < 2 else settings.threshold
                state["skips"] = change < threshold * np.sqrt(sample.numel())
            state["skipped"] = state["skipped"] + 1 if state["skips"] else 0
            if not state["skips"]:
                state["reference"] = sample, now
                computed.append(step)
        if not state["skips"]:
            kept[branch] = evaluate()
        return kept[branch]

    return answer


@pytest.mark.parametrize(("threshold", "early", "most"), [(0.1, 0.01, 3), (0.2, 0.3, 2), (9.0, 9.0, 3), (9.0, 0.0, 20)])
def test_sencache_decides_as_worked_out_by_hand(drawing, threshold, early, most):
    pipe, draw, calls = drawing
    tables = TABLES if calls == 1 else FLUX_TABLES
    settings = SenCache(threshold=threshold, early_threshold=early, most_skipped=most, cache="output", **tables)
    expected = []
    with by_hand(pipe, sencache_by_hand(settings, calls, expected)):
        picture = draw()
    found, drawn = steps_computed(pipe, draw, settings)
    assert found == [expected] * calls
    assert 2 <= len(expected) < STEPS
    assert np.array_equal(drawn, picture)


def test_fitted_sensitivities_are_secants_along_the_run(drawing):
    pipe, _, calls = drawing
    batch, call = (BATCH, CALL) if calls == 1 else (ONE, FLUX_CALL)
    runner = Runner(pipe=pipe, steps=5, call=call)
    fitted, rows, before = fitted_sensitivities(runner, [batch]), [], []

    def answer(number, sample, timestep, evaluate):
        output, axis = evaluate(), 2 if sample.dim() == 3 else 1
        if number % calls == 0:
            if before:
                old_sample, old_timestep, old_output, again = before.pop()
                by_sample, by_timestep = again(sample=sample) - old_output, again(timestep=timestep) - old_output
                rms = [each.narrow(axis, 0, sample.shape[axis]).square().mean().sqrt().item()
                       for each in (by_sample, by_timestep)]  # fmt: skip
                moved = (sample - old_sample).square().mean().sqrt().item()
                then, now = old_timestep.max().item(), timestep.max().item()
                rows.append((then, rms[0] / moved, rms[1] / abs(now - then)))
            before.append((sample, timestep, output, evaluate))
        return output

    with by_hand(pipe, answer):
        runner.run_one(batch)
    assert len(rows) == 4
    for found, expected in zip(fitted, zip(*rows, strict=True), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
        assert min(found) > 0
    settings = SenCache(threshold=0.1, **fitted._asdict())
    assert make_policy(**describe_policy(settings)) == settings


# --- all of them


def test_a_threshold_of_nothing_computes_everything(drawing):
    pipe, draw, calls = drawing
    plain = draw()
    for policy in NOTHING_SKIPPED[: -1 if calls == 2 else None]:  # FLUX is given tokens, which PreciseCache refuses
        with attached(pipe, policy) as hook:
            assert np.array_equal(draw(), plain)
            assert (hook.full_evaluations, hook.skipped_evaluations) == (STEPS * calls, 0)


def test_nothing_is_held_once_a_run_is_over(dit):
    for policy in NOTHING_SKIPPED:
        with attached(dit, dataclasses.replace(policy, threshold=1)) as hook:
            run(dit, BATCH, steps=4, call=CALL)
            fresh = policy.begin(4)
            assert [key for key, value in vars(schedule_hook(dit).run.decider).items()
                    if isinstance(value, dict) and value != vars(fresh)[key]] == []  # fmt: skip
            assert hook.cached_bytes == 0


@dataclasses.dataclass(frozen=True)
class Asking:
    """Computes everything and keeps what it is given."""

    name = "asking"
    most_kept = 1
    cache: str = "output"
    calls: list = dataclasses.field(default_factory=list)

    def begin(self, num_steps):
        return self

    def decide(self, call):
        pass

    def keeps(self, call, *, served):
        return (call.step,) if call.step != 1 else ()

    def computed(self, call, value):
        answers = call.evaluate(), call.evaluate(sample=call.sample + 1), call.evaluate(timestep=call.timestep + 500)
        self.calls.append((call.step, call.sample, value, [each[0] for each in answers], call.probe(1)))


def test_a_rule_is_told_what_is_kept_and_may_ask_the_denoiser(dit):
    asking = Asking()
    with attached(dit, asking):
        run(dit, BATCH, steps=3, call=CALL)
    assert [step for step, *_ in asking.calls] == [0, 2]
    for _, sample, value, (same, moved, timed), probe in asking.calls:
        assert sample.shape == (4, 4, 8, 8)
        assert torch.equal(value[0], same)
        assert not torch.allclose(same, moved)
        assert not torch.allclose(same, timed)
        assert probe.before.shape == probe.after.shape == (4, 16, 32)
        assert not torch.equal(probe.before, probe.after)


def test_what_is_added_is_added_to_the_first_tensor(dit):
    class Raised(Asking):
        def decide(self, call):
            return Serving((0,), (1.0,), added=torch.ones(4, 8, 8, 8)) if call.step else None

        def keeps(self, call, *, served):
            return (0,)

        def computed(self, call, value):
            self.calls.append(value[0].clone())

    outputs, raised = [], Raised()
    with attached(dit, raised):
        handle = dit.transformer.register_forward_hook(lambda *call: outputs.append(call[-1][0].clone()))
        run(dit, BATCH, steps=3, call=CALL)
        handle.remove()
    assert len(raised.calls) == 1
    assert [torch.equal(each, raised.calls[0] + added) for each, added in zip(outputs, (0, 1, 1), strict=True)] == [
        True
    ] * 3
