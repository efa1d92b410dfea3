"""Benchmarks: what is timed, what it is timed on, and what the machine is said to do."""

import copy
import dataclasses
import json
import math
from functools import partial

import psutil
import pytest
import torch
from support.quantized import PAIRS
from typer.testing import CliRunner

from cemq import cli
from cemq.bench import ARCHITECTURES, Architecture, bench_architecture, bench_bundle, doctor, examine, forward
from cemq.bench.answers import predict, relative_error
from cemq.bench.doctor import LARGEST_ERROR, OK, PROBES, Subject
from cemq.bench.forward import FULL_PRECISION
from cemq.bench.machine import describe_machine, one_line
from cemq.bench.measure import Timing, busy_note, make_rows, measure
from cemq.bench.random_models import (
    empty_model,
    parse_scheme,
    planned_bytes,
    quantization_config,
    random_model,
    tensor_bytes,
)
from cemq.bench.table import print_benchmark, print_doctor
from cemq.errors import CemqError, InputError
from cemq.quantize import quantize_in_place
from cemq.quantize.schemes import installed

TINY = doctor.TINY
SMALL_CONFIGS = {  # the architectures with a layer or two, and few tokens
    "dit-xl-2": {"num_layers": 1, "num_attention_heads": 2, "sample_size": 8},
    "pixart-sigma": {
        "num_layers": 1, "num_attention_heads": 2, "sample_size": 8, "cross_attention_dim": 144, "caption_channels": 64,
    },
    "sd3-medium": {
        "num_layers": 2, "num_attention_heads": 2, "sample_size": 8, "joint_attention_dim": 64,
        "caption_projection_dim": 128, "pooled_projection_dim": 64, "pos_embed_max_size": 16,
    },
    "flux-dev": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "wan-1.3b": {"num_layers": 1, "num_attention_heads": 2, "text_dim": 64, "ffn_dim": 128},
    "sd3.5-medium": {
        "num_layers": 5, "num_attention_heads": 2, "sample_size": 8, "joint_attention_dim": 64,
        "caption_projection_dim": 128, "pooled_projection_dim": 64, "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
    },
    "qwen-image": {"num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 64},
}  # fmt: skip
SMALL_SIZES = {"text_tokens": 8, "height": 4, "width": 4, "frames": 2}


def small(name):
    full = ARCHITECTURES[name]
    config = {**full.config, **SMALL_CONFIGS[name]}
    return dataclasses.replace(full, config=config, sizes={key: SMALL_SIZES[key] for key in full.sizes})


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


# --- timing


class Clock:
    """Stands still but for the seconds that the variants say they take."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def __call__(self):
        return self.now

    def variant(self, name, *seconds):
        def call():
            self.now += seconds[self.called.count(name) % len(seconds)]
            self.called.append(name)

        return call


def test_variants_take_turns_and_another_begins_each_round():
    clock, shares = Clock(), []
    variants = {name: clock.variant(name, 1.0) for name in "abc"}
    found = measure(variants, rounds=3, warm_up=1, clock=clock, progress=shares.append)
    assert [clock.called[start : start + 3] for start in range(0, 12, 3)] == [
        ["c", "a", "b"], ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"],
    ]  # fmt: skip
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert {name: timing.seconds for name, timing in found.items()} == dict.fromkeys("abc", (1.0, 1.0, 1.0))
    assert found["a"].working_bytes is None


def test_warm_up_does_not_count_and_ratios_are_of_medians():
    clock = Clock()
    variants = {
        "full": clock.variant("full", 100.0, 2.0, 2.0, 8.0),
        "quick": clock.variant("quick", 50.0, 1.0, 3.0, 1.0),
    }
    timings = measure(variants, rounds=3, warm_up=1, clock=clock)
    full, quick = make_rows(timings, {"full": 200, "quick": 50}, {"quick": 0.01})
    assert (full["median_ms"], full["time_ratio"], full["bytes_ratio"], full["relative_l2"]) == (2000, 1, 1, None)
    assert (quick["median_ms"], quick["min_ms"], quick["time_ratio"], quick["bytes_ratio"]) == (1000, 1000, 0.5, 0.25)
    assert (quick["relative_l2"], quick["peak_bytes"]) == (0.01, None)


def test_a_busy_machine_is_noted():
    assert busy_note({"a": Timing(seconds=(1.0, 1.2, 1.4)), "b": Timing(seconds=(2.0,))}) == []
    (note,) = busy_note({"a": Timing(seconds=(1.0, 1.2)), "b": Timing(seconds=(1.0, 3.0, 3.5))})
    assert "up to 3.0 times the fastest round" in note


def test_peak_memory_is_that_of_a_variant_alone():
    (row,) = make_rows({"a": Timing(seconds=(1.0,), working_bytes=30)}, {"a": 12}, {})
    assert row["peak_bytes"] == 42


# --- architectures and random models


@pytest.mark.parametrize(
    ("name", "millions"),  # DiT has a table of classes and a time embedding in every block, published as one
    [
        ("dit-small", 74.3), ("dit-xl-2", 749.8), ("pixart-sigma", 610.9), ("sd3-medium", 2028.3),
        ("flux-dev", 11901.4), ("wan-1.3b", 1419.0), ("sd3.5-medium", 2243.2), ("wan-14b", 14288.5),
        ("qwen-image", 20430.4),
    ],
)  # fmt: skip
def test_architectures_have_the_published_size(name, millions):
    architecture = ARCHITECTURES[name]
    if "pos_embed_max_size" in architecture.config:  # a table without parameters: 2 GB while it is made
        architecture = dataclasses.replace(architecture, config={**architecture.config, "pos_embed_max_size": 8})
    model = empty_model(architecture)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_every_class_runs_on_its_inputs(name):
    architecture = small(name)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = architecture.inputs(1, dtype=dtype, device="cpu")
        again = architecture.inputs(1, dtype=dtype, device="cpu")
        assert torch.equal(inputs["hidden_states"], again["hidden_states"])
        for pair in (None, ("native", "w8a8")):
            config = pair and quantization_config(empty_model(architecture), *pair)
            model = random_model(architecture, dtype=dtype, device="cpu", config=config)
            assert tensor_bytes(model) == planned_bytes(empty_model(architecture), dtype, config)
            output = predict(model, inputs)
            assert output.dtype == dtype
            assert output.isfinite().all()
            assert 0.01 < output.float().std() < 100


@pytest.mark.parametrize("scheme", [None, "w8a8"])
@pytest.mark.parametrize(
    ("name", "alike"),  # of SD3.5's blocks the first attend to the picture alone besides, the last drops the text
    [("sd3.5-medium", [0, 0, 2, 2, 4]), ("qwen-image", [0, 0, 0])],
)
def test_shared_blocks_compute_what_as_many_equal_ones_do(name, alike, scheme):
    architecture = small(name)
    config = scheme and quantization_config(empty_model(architecture), "native", scheme)
    make = partial(random_model, architecture, dtype=torch.float32, device="cpu", config=config)
    plain, shared = make(), make(shared_blocks=True)
    blocks = list(shared.transformer_blocks)
    assert [blocks.index(block) for block in blocks] == alike
    assert tensor_bytes(plain) > sum({id(p): p.numel() * p.element_size() for p in shared.parameters()}.values())
    inputs = architecture.inputs(1, dtype=torch.float32, device="cpu")
    assert not torch.equal(predict(plain, inputs), predict(shared, inputs))
    for index, first in enumerate(alike):
        plain.transformer_blocks[index] = copy.deepcopy(plain.transformer_blocks[first])
    assert torch.equal(predict(plain, inputs), predict(shared, inputs))


@pytest.mark.parametrize(("backend", "scheme"), PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_direct_quantization_is_that_of_the_float_model(backend, scheme):
    dtype = torch.bfloat16
    config = quantization_config(empty_model(TINY), backend, scheme)
    direct = random_model(TINY, dtype=dtype, device="cpu", config=config)
    if backend != "quanto":  # which must be calibrated: its float model is the same by the way it is made
        whole = random_model(TINY, dtype=dtype, device="cpu")
        quantize_in_place(whole, config)
        expected, found = whole.state_dict(), direct.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(tensor.is_meta for tensor in (*direct.parameters(), *direct.buffers()))
    assert tensor_bytes(direct) == planned_bytes(empty_model(TINY), dtype, config)
    assert direct.config.quantization_config.scheme == scheme


def test_the_float32_reference_has_the_weights_of_the_other_variants():
    exact = random_model(TINY, dtype=torch.float32, device="cpu", weights_rounded_to=torch.bfloat16)
    rounded = random_model(TINY, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(a, b.float()) for a, b in zip(exact.parameters(), rounded.parameters(), strict=True))


def test_scheme_names():
    assert parse_scheme("w4a8") == ("native", "w4a8")
    if installed("quanto"):
        assert parse_scheme("quanto:w8a8") == ("quanto", "w8a8")
    with pytest.raises(CemqError, match="is full precision"):
        parse_scheme("none")


# --- forwards


def test_bench_of_an_architecture(capsys):
    stages = []
    result = bench_architecture(
        TINY, schemes=["w8a8", "w4a8"], rounds=2, device="cpu", progress=lambda stage, _: stages.append(stage)
    )
    assert list(dict.fromkeys(stages)) == ["float32 reference", "building", "timing"]
    assert result["settings"]["inputs"]["hidden_states"] == [2, 4, 16, 16]
    full, w8a8, w4a8 = result["tables"][0]["rows"]
    assert [row["variant"] for row in (full, w8a8, w4a8)] == [FULL_PRECISION, "w8a8", "w4a8"]
    assert full["weight_bytes"] > w8a8["weight_bytes"] > w4a8["weight_bytes"]
    assert 0 < full["relative_l2"] < w8a8["relative_l2"] < w4a8["relative_l2"] < 0.2
    assert json.loads(json.dumps(result)) == result
    print_benchmark(result)
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert "w4a8" in shown
    assert one_line(describe_machine()) in shown


def test_full_precision_can_be_left_out():
    result = bench_architecture(TINY, schemes=["w8a8"], dtype="float32", rounds=1, device="cpu", full_precision=False)
    (row,) = result["tables"][0]["rows"]
    assert (row["variant"], row["time_ratio"]) == ("w8a8", 1.0)
    assert 0 < row["relative_l2"] < 0.02


def test_without_memory_for_float32_outputs_are_compared_with_full_precision(monkeypatch):
    small_enough = planned_bytes(empty_model(TINY), torch.float32) / forward.USABLE - 1
    found = psutil.virtual_memory()
    monkeypatch.setattr("psutil.virtual_memory", lambda: found._replace(available=small_enough))
    result = bench_architecture(TINY, schemes=["w4a8"], rounds=1, device="cpu")
    full, w4a8 = result["tables"][0]["rows"]
    assert full["relative_l2"] == 0.0 < w4a8["relative_l2"]
    assert "does not fit in memory: outputs are compared with the bfloat16 output" in result["notes"][0]


@pytest.mark.parametrize(
    ("gigabytes", "message"),
    [
        (21.0, r"leave out full precision \(10.0 GB, --no-full-precision\)"),
        (16.0, r"leave out quanto:w8a8 \(15.0 GB\)"),
        (9.0, r"leave out quanto:w8a8 \(15.0 GB\) and full precision \(10.0 GB, --no-full-precision\)"),
        (1.0, "not even w4a8 fits"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(gigabytes, message):
    sizes = {FULL_PRECISION: 10 * 10**9, "w4a8": 3 * 10**9, "quanto:w8a8": 5 * 10**9}
    if gigabytes > 20:
        sizes, passing = {FULL_PRECISION: 10 * 10**9, "w8a8": 6 * 10**9, "w8a16": 6 * 10**9}, {}
    else:
        passing = {"quanto:w8a8": 10 * 10**9}
    with pytest.raises(InputError, match=message):
        forward.check_fit("flux", sizes, passing, gigabytes * 1e9, "cpu")
    forward.check_fit("flux", sizes, passing, 28e9, "cpu")


@pytest.mark.filterwarnings("ignore")
def test_a_variant_that_does_not_run_is_one_line(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr("cemq.quantize.layers.NativeLinear.multiply", broken)
    with pytest.raises(CemqError, match=r"^w8a8 does not run here: no such kernel; cemq doctor shows what does$"):
        bench_architecture(TINY, schemes=["w8a8"], rounds=1, device="cpu")


def test_the_command_times_a_real_size(tmp_path):
    file = tmp_path / "result.json"
    done = invoke(
        "bench", "--arch", "dit-small", "--schemes", "w8a8", "--rounds", "1", "--batch", "1", "--device", "cpu",
        "--dtype", "float32", "-o", file,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text())
    full, w8a8 = written["tables"][0]["rows"]
    assert math.isclose(full["weight_bytes"] / 1e6, 298, abs_tol=1)
    assert w8a8["bytes_ratio"] < 0.35
    assert written["settings"]["parameters"] == 74_329_376
    assert "w8a8" in done.stdout


# --- bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "digits"
    fast = (
        "--steps", "6", "--budget", "3", "--samples", "1", "--planning-samples", "2", "--device", "cpu", "--solver",
        "uniform", "--effort", "quick", "--rectify", "none",
    )  # fmt: skip
    done = invoke("quantize-and-schedule", "builtin:dit-digits", "--scheme", "w8a8", *fast, "-o", output)
    assert done.exit_code == 0, done.output
    return output


def test_bench_of_a_bundle(bundle):
    done = invoke("bench", bundle, "--rounds", "1", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    one_forward, run = (table["rows"] for table in result["tables"])
    assert [row["variant"] for row in one_forward] == [FULL_PRECISION, "w8a8"]
    assert [row["variant"] for row in run] == [FULL_PRECISION, "w8a8", "w8a8, 3 of 6 steps in full"]
    assert one_forward[0]["relative_l2"] == 0.0 < one_forward[1]["relative_l2"] < 0.05
    assert all(row["median_ms"] > one_forward[0]["median_ms"] for row in run)
    assert run[1]["weight_bytes"] == run[2]["weight_bytes"] < run[0]["weight_bytes"]
    assert not [note for note in result["notes"] if "busy" not in note]


def test_without_the_original_the_bundle_is_timed_alone(bundle, monkeypatch, capsys):
    def gone(name, **_):
        from cemq.errors import ModelError

        raise ModelError(f"no such model '{name}'")

    monkeypatch.setattr("cemq.bundle.original.locate", gone)
    result = bench_bundle(bundle, rounds=1, device="cpu")
    assert [len(table["rows"]) for table in result["tables"]] == [1, 2]
    note = "the bundle alone is timed, its original is not at hand: no such model 'builtin:dit-digits'"
    assert result["notes"][0] == note
    print_benchmark(result)
    assert note in capsys.readouterr().out


# --- the doctor


def test_native_schemes_do_everything_on_the_cpu(capsys):
    stages = []
    result = examine(quick=True, progress=lambda stage, share: stages.append((stage, share)))
    assert stages[-1] == ("trying", 1.0)
    native = [row for row in result["rows"] if (row["backend"], row["device"]) == ("native", "cpu")]
    assert [row["scheme"] for row in native] == ["w8a8", "w4a8", "w8a16", "w4a16", "w8a8-fp8"]
    for row in native:
        assert row["error"] < 0.1
        assert row["probes"] == dict.fromkeys(("runs", "reload", "copy", "offload", "group", "sequential"), "ok"), row[
            "scheme"
        ]
    assert json.loads(json.dumps(result)) == result
    print_doctor(result)
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert "note: torch.compile was left out" in shown


@pytest.mark.filterwarnings("ignore")
def test_native_w8a8_compiles():
    if doctor.compile_obstacle("cpu"):
        pytest.skip(doctor.compile_obstacle("cpu"))
    inputs = TINY.inputs(TINY.batch, dtype=torch.float32, device="cpu")
    original = random_model(TINY, dtype=torch.float32, device="cpu")
    config = quantization_config(original, "native", "w8a8")
    model = random_model(TINY, dtype=torch.float32, device="cpu", config=config, batch=TINY.batch)
    output = predict(model, inputs)
    assert relative_error(predict(original, inputs), output) < LARGEST_ERROR
    subject = Subject(model=model, inputs=inputs, output=output, device=output.device)
    assert PROBES["compile"](subject) == OK


def test_the_doctor_reports_what_fails_and_what_is_missing(monkeypatch, capsys):
    def broken(subject):
        raise ValueError("not today\nor ever")

    def other(subject):
        model = copy.deepcopy(subject.model)
        model.proj_out_2.bias.data += 1.0
        return subject.same(model)

    monkeypatch.setattr(doctor, "installed", lambda backend: backend == "native")
    result = examine(probes={"broken": broken, "other": other})
    missing = {row["backend"]: row["reason"] for row in result["rows"] if row["reason"]}
    assert missing["torchao"] == "not installed: pip install 'cemq[torchao]'"
    tried = next(row for row in result["rows"] if row["scheme"] == "w8a8")
    assert tried["probes"]["broken"] == "ValueError: not today"
    assert tried["probes"]["other"].startswith("another output: relative difference")
    print_doctor(result)
    assert "w8a8-fp8 cpu: broken: ValueError: not today" in capsys.readouterr().out


def test_the_doctor_goes_on_after_a_scheme_that_does_not_run(monkeypatch):
    monkeypatch.setattr("cemq.quantize.layers.NativeLinear.multiply", lambda self, values: 1 / 0)
    monkeypatch.setattr(doctor, "installed", lambda backend: backend == "native")
    result = examine(quick=True)
    *tried, fp8 = [row for row in result["rows"] if row["backend"] == "native"]
    assert {row["probes"]["runs"] for row in tried} == {"ZeroDivisionError: division by zero"}
    assert {row["probes"]["reload"] for row in tried} == {"-"}
    assert set(fp8["probes"].values()) == {"ok"}  # whose layers are of another class


def test_the_doctor_command_prints_json(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda backend: False)
    done = invoke("doctor", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {row["reason"][:13] for row in found["rows"]} == {"not installed"}
    assert {"cpu", "cores", "threads", "features", "int8_units", "c_kernels"} <= set(found["machine"])


# --- wrong requests


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("unknown architecture 'dit-smal': choose from dit-small", ["--arch", "dit-smal"]),
        ("unknown scheme 'w8a9'", ["--schemes", "w8a8,w8a9"]),
        ("unknown backend 'gguf'", ["--schemes", "gguf:w8a8"]),
        ("does not offer w8a16", ["--schemes", "bitsandbytes:w8a16"]),
        ("scheme 'none' is full precision", ["--schemes", "none"]),
        ("nothing to time", ["--schemes", ",", "--no-full-precision"]),
        ("unknown dtype 'int3'", ["--dtype", "int3"]),
        ("device 'tpu' cannot be used here", ["--device", "tpu"]),
        ("the folder 'nowhere' does not exist", ["-o", "nowhere/a.json"]),
        ("do not go with a bundle", ["some", "--schemes", "w8a8"]),
        ("'some' is not a cemq bundle: no such folder", ["some"]),
    ],
)
def test_a_wrong_request_is_one_line(message, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("bench", *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("cemq: ")
    assert message in line


def test_compile_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "nope")
    with pytest.raises(InputError, match=r"no C\+\+ compiler: nope is not on the PATH"):
        bench_architecture(TINY, device="cpu", compiled=True)


def test_architecture_is_plain_data():
    assert all(isinstance(found, Architecture) and found.name == name for name, found in ARCHITECTURES.items())
    json.dumps([dataclasses.asdict(found) for found in ARCHITECTURES.values()])
