"""What multiplies integers: every kernel that runs here against its reference, how one is chosen, and life without."""

import copy
import json
import warnings

import pytest
import torch
from support.comparing import relative
from support.processes import run_python
from torch import nn
from typer.testing import CliRunner

import cemq
from cemq.bench import examine
from cemq.bench.table import print_doctor
from cemq.cli import app
from cemq.errors import InputError
from cemq.quantize import SCHEMES, NativeLinear, integers
from cemq.quantize.coded import CodedLinear
from cemq.quantize.kernels import (
    KERNELS,
    Choices,
    LinearWeights,
    check_kernel,
    choices,
    integer_linear,
    register_kernel,
)
from cemq.quantize.kernels.choice import FILE, tolerance, wrong
from cemq.quantize.kernels.own import by_torch_ops, compile_obstacle
from cemq.quantize.layers import use_kernel

CPU = torch.device("cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def here(*names):
    """Kernels by name, each skipped where it cannot run on a CPU, with its own reason."""
    found = []
    for name in names:
        why = KERNELS[name].obstacle_on(CPU)
        found.append(pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"{name}: {why}")))
    return found


def make_weights(columns=128, outputs=48, bits=8, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator) / columns**0.5
    stored = NativeLinear.quantize(weight, SCHEMES[f"w{bits}a8"], None)
    return LinearWeights(
        weight=stored["weight"], group_scale=stored.get("group_scale"), weight_scale=stored["weight_scale"],
        weight_sum=stored["weight_sum"], columns=columns,
        bias=torch.randn(outputs, generator=generator).to(dtype) if bias else None,
    )  # fmt: skip


def make_values(rows=64, columns=128, dtype=torch.float32, seed=1):
    """Most of them on one side of zero, where symmetric tokens lose most."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) + 0.7).to(dtype)


def unrounded(values, weights):
    """The product with the weight that the integers stand for, of activations as they are, in float64."""
    exact = values.double() @ (weights.expanded().double() * weights.weight_scale.double()).t()
    return exact if weights.bias is None else exact + weights.bias.double()


def symmetric(values, weights):
    """The same with every row of activations rounded to -127..127 times its largest number / 127, in float64."""
    values = values.double()
    scale = values.abs().amax(1, keepdim=True) / 127
    return unrounded((values / scale).round() * scale, weights)


@pytest.fixture(autouse=True)
def _as_before(tmp_path_factory, monkeypatch):
    """No kernel and no choice of a test is left for the next one, nor for the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    before = dict(KERNELS)
    choices().reset()
    yield
    KERNELS.clear()
    KERNELS.update(before)
    choices().reset()


# --- every kernel that there is


@dtypes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(64, 128, 48), (33, 70, 5), (40, 64, 1), (300, 129, 31)])
@pytest.mark.parametrize("name", here("cpu", "torch"))
def test_kernels_of_our_own_give_the_reference_and_its_error_is_that_of_int8(name, rows, columns, outputs, bits, dtype):
    values, weights = make_values(rows, columns, dtype), make_weights(columns, outputs, bits, dtype, bias=rows != 33)
    found = KERNELS[name].run(values, weights, None, False)
    assert found.dtype == dtype
    assert torch.equal(found, by_torch_ops(values, weights, None, False))
    assert relative(found, unrounded(values, weights)) < 0.006 + torch.finfo(dtype).eps
    assert wrong(KERNELS[name], values, weights) == ""


@dtypes
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(64, 128, 48), (33, 70, 5), (40, 64, 1), (300, 129, 31)])
@pytest.mark.parametrize("name", here("comfy-kitchen", "torchao"))
def test_symmetric_kernels_are_as_near_as_symmetric_tokens_are(name, rows, columns, outputs, dtype):
    values, weights = make_values(rows, columns, dtype), make_weights(columns, outputs, 8, dtype, bias=rows != 33)
    kernel, exact = KERNELS[name], unrounded(values, weights)
    assert kernel.symmetric
    assert kernel.refuses_these(values, weights) == ""
    found = kernel.run(values, weights, None, False)
    assert found.dtype == dtype
    rounding = relative(symmetric(values, weights), exact)
    assert relative(found, exact) < 1.3 * rounding + torch.finfo(dtype).eps / 2
    assert wrong(kernel, values, weights) == ""
    assert kernel.refuses_these(values, make_weights(bits=4)) == "takes no 4-bit weights"
    assert "two input features" in kernel.refuses_these(make_values(columns=1), make_weights(columns=1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_int_mm_with_compiled_passes_gives_the_reference(bits, backend, fresh_compiler, monkeypatch):
    """Inductor takes half a minute; the other backend shows that the passes can be taken apart."""
    compile_ = {}

    def compiled(function):
        return compile_.setdefault(function, torch.compile(function, dynamic=True, fullgraph=True, backend=backend))

    monkeypatch.setattr("cemq.quantize.kernels.own.compiled", compiled)
    for rows, columns, outputs in ((64, 128, 48), (33, 192, 96)):
        for dtype in (torch.float32, torch.bfloat16):
            values, weights = make_values(rows, columns, dtype), make_weights(columns, outputs, bits, dtype)
            found = KERNELS["int-mm"].run(values, weights, None, False)
            assert relative(found, by_torch_ops(values, weights, None, False)) <= tolerance(dtype)
    smooth = torch.rand(192) + 0.5
    found, expected = (run(values, weights, smooth, True) for run in (KERNELS["int-mm"].run, by_torch_ops))
    assert relative(found, expected) <= tolerance(dtype)


def test_triton_gives_the_reference_in_its_interpreter():
    pytest.importorskip("triton")
    code = """
import torch
from cemq.quantize import SCHEMES, NativeLinear
from cemq.quantize.kernels import KERNELS, LinearWeights
from cemq.quantize.kernels.choice import wrong
for bits in (8, 4):
    for dtype in (torch.float32, torch.bfloat16):
        stored = NativeLinear.quantize(torch.randn(40, 70), SCHEMES[f"w{bits}a8"], None)
        stored.setdefault("group_scale", None)
        weights = LinearWeights(**stored, bias=torch.ones(40, dtype=dtype), columns=70)
        print(wrong(KERNELS["triton"], torch.randn(33, 70).to(dtype), weights) or "ok")
"""
    assert run_python(code, TRITON_INTERPRET="1").split() == ["ok"] * 4


def test_gemlite_gives_what_symmetric_tokens_do_in_the_interpreter():
    """gemlite asks for a CUDA device when it is imported, and rounds activations by a function of CUDA's library: both
    are replaced here, the product and its scales are its own."""
    if why := KERNELS["gemlite"].missing():
        pytest.skip(why)
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    class utils:
        get_device_properties = staticmethod(lambda index: {"max_shared_mem": 166912, "warpSize": 32})
    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)
    def get_benchmarker(self):
        return lambda call, quantiles=None, **options: (call(), [1.0] * 3)[1]

class Device:
    name, major, minor, multi_processor_count = "NVIDIA A100", 8, 0, 108

triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_capability = lambda *_: (8, 0)
torch.cuda.get_device_properties = lambda *_: Device
torch.cuda.empty_cache = lambda: None
import gemlite.core, gemlite.quant_utils
gemlite.core.scale_activations_per_token = gemlite.quant_utils.scale_activations_per_token_torch

from cemq.quantize import SCHEMES, NativeLinear
from cemq.quantize.kernels import KERNELS, LinearWeights
from cemq.quantize.kernels.choice import wrong
for rows, columns, outputs in ((64, 128, 96), (40, 64, 1)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = NativeLinear.quantize(torch.randn(outputs, columns), SCHEMES["w8a8"], None)
        weights = LinearWeights(group_scale=None, **stored, bias=torch.ones(outputs, dtype=dtype), columns=columns)
        print(wrong(KERNELS["gemlite"], torch.randn(rows, columns).to(dtype), weights) or "ok")
"""
    assert run_python(code, TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1").splitlines()[-6:] == ["ok"] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_on_a_gpu(name, bits):
    device = torch.device("cuda")
    if why := KERNELS[name].obstacle_on(device):
        pytest.skip(why)
    weights, values = make_weights(256, 96, bits, torch.bfloat16), make_values(64, 256, torch.bfloat16).to(device)
    parts = {name: getattr(weights, name) for name in ("weight", "group_scale", "weight_scale", "weight_sum", "bias")}
    parts = {name: None if part is None else part.to(device) for name, part in parts.items()}
    weights = LinearWeights(**parts, columns=256)
    if why := KERNELS[name].refuses_these(values, weights):
        pytest.skip(why)
    assert wrong(KERNELS[name], values, weights) == ""


@pytest.mark.parametrize(
    ("multiply", "why"),
    [
        (lambda values, weights: 1.02 * by_torch_ops(values, weights, None, False), r"off by 0\.02 of the reference"),
        (lambda values, weights: by_torch_ops(values, weights, None, False) * float("nan"), "off by nan"),
        (lambda values, weights: by_torch_ops(values, weights, None, False).double(), "gives torch.float64"),
        (lambda values, weights: by_torch_ops(values, weights, None, False)[:-1], r"gives torch.float32 \(63, 48\)"),
        (lambda values, weights: [][1], "IndexError: list index out of range"),
    ],
)
def test_a_kernel_that_gives_something_else_is_found_out(multiply, why):
    register_kernel("other", multiply)
    with pytest.raises(AssertionError, match=why):
        assert wrong(KERNELS["other"], make_values(), make_weights()) == ""


def test_symmetric_tokens_do_not_pass_for_the_reference_and_errors_of_a_tenth_of_theirs_are_found():
    def multiply(values, weights, slip=0.0):
        return ((1 + slip) * symmetric(values, weights)).to(values.dtype)

    register_kernel("symmetric", multiply)
    register_kernel("honest", multiply, symmetric=True)
    register_kernel("slips", lambda values, weights: multiply(values, weights, slip=0.01), symmetric=True)
    for dtype in (torch.float32, torch.float16):
        values, weights = make_values(dtype=dtype), make_weights(dtype=dtype)
        assert "of the reference" in wrong(KERNELS["symmetric"], values, weights)
        assert wrong(KERNELS["honest"], values, weights) == ""
        assert "of the product with activations as they are" in wrong(KERNELS["slips"], values, weights)


# --- choosing


class Clock:
    """Says of each kernel the milliseconds that it was told, by what was called last; counts what was timed."""

    def __init__(self, **milliseconds):
        self.milliseconds, self.called, self.timed = milliseconds, [], []

    def kernel(self, name, **options):
        def multiply(values, weights):
            self.called.append(name)
            return by_torch_ops(values, weights, None, False)

        register_kernel(name, multiply, bits=(8, 4), **options)

    def time(self, call, device):
        self.called.append("cpu")
        call()
        self.timed.append(self.called[-1])
        return self.milliseconds[self.called[-1]]


@pytest.fixture
def clock():
    clock = Clock(cpu=2.0, slow=3.0, quick=1.0)
    clock.kernel("slow")
    clock.kernel("quick")
    return clock


def test_the_fastest_is_taken_and_remembered_by_this_process_and_the_next(clock, tmp_path):
    first = Choices(tmp_path, clock.time)
    assert first.kernel("auto", make_values(64), make_weights()).name == "quick"
    assert clock.timed == ["cpu", "slow", "quick"]
    assert first.kernel("auto", make_values(50), make_weights()).name == "quick"  # 64 rows when rounded up
    assert Choices(tmp_path, clock.time).kernel("auto", make_values(33), make_weights()).name == "quick"
    assert len(clock.timed) == 3
    assert first.kernel("auto", make_values(65), make_weights()).name == "quick"
    assert first.kernel("auto", make_values(64), make_weights(bits=4)).name == "quick"
    assert len(clock.timed) == 9
    (made, *_) = first.made()
    assert str(made.shape) == "w8a8 float32 64x128x48"
    assert (made.asked, made.device, made.choice.failed) == ("auto", "cpu", {})
    assert made.choice.milliseconds == {"cpu": 2.0, "slow": 3.0, "quick": 1.0}
    assert {key: choice.kernel for key, choice in first.remembered(CPU).items()} == dict.fromkeys(
        ("auto w8a8 float32 64x128x48", "auto w8a8 float32 128x128x48", "auto w4a8 float32 64x128x48"), "quick"
    )


def test_alone_a_kernel_is_taken_without_a_trial(tmp_path):
    clock = Clock()
    chosen = Choices(tmp_path, clock.time)
    assert chosen.kernel("auto", make_values(), make_weights()).name == "cpu"
    assert not clock.timed
    assert not list(tmp_path.iterdir())
    (made,) = chosen.made()
    assert made.choice.milliseconds == {}


def test_other_versions_or_another_device_are_another_environment(clock, tmp_path, monkeypatch):
    Choices(tmp_path, clock.time).kernel("auto", make_values(), make_weights())
    monkeypatch.setattr("cemq.quantize.kernels.choice.package_version", lambda name: "99")
    Choices(tmp_path, clock.time).kernel("auto", make_values(), make_weights())
    assert len(clock.timed) == 6
    one, other = json.loads((tmp_path / FILE).read_text())
    assert one.startswith("cpu ")
    assert f"torch {torch.__version__}" in one
    assert "torch 99" in other


@pytest.mark.parametrize("content", ["", "nonsense", "[]", '{"cpu": {"auto": 3}}', '{"cpu": {"auto": {"who": "?"}}}'])
def test_a_file_that_makes_no_sense_is_written_anew(clock, tmp_path, content):
    (tmp_path / FILE).write_text(content)
    assert Choices(tmp_path, clock.time).kernel("auto", make_values(), make_weights()).name == "quick"
    (kept,) = json.loads((tmp_path / FILE).read_text()).values()
    assert list(kept) == ["auto w8a8 float32 64x128x48"]


def test_without_a_place_to_write_every_process_tries_anew(clock, tmp_path):
    (tmp_path / "file").write_text("")
    for count in (3, 6):
        assert Choices(tmp_path / "file", clock.time).kernel("auto", make_values(), make_weights()).name == "quick"
        assert len(clock.timed) == count


def test_the_file_lies_in_the_users_cache(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Choices(time_of=clock.time).kernel("auto", make_values(), make_weights())
    assert (tmp_path / "cemq" / FILE).is_file()


def test_what_is_remembered_and_gone_since_is_chosen_anew(clock, tmp_path):
    Choices(tmp_path, clock.time).kernel("auto", make_values(), make_weights())
    del KERNELS["quick"]
    assert Choices(tmp_path, clock.time).kernel("auto", make_values(), make_weights()).name == "cpu"


def test_one_that_fails_or_gives_something_else_is_left_out_with_a_reason(clock, tmp_path):
    register_kernel("broken", lambda values, weights: 1 / 0)
    register_kernel("wrong", lambda values, weights: torch.zeros_like(by_torch_ops(values, weights, None, False)))
    register_kernel("elsewhere", lambda values, weights: 1 / 0, obstacle=lambda device: "for CUDA devices alone")
    chosen = Choices(tmp_path, clock.time)
    assert chosen.kernel("auto", make_values(), make_weights()).name == "quick"
    failed = chosen.made()[0].choice.failed
    assert failed["broken"] == "ZeroDivisionError: division by zero"
    assert failed["wrong"].startswith("off by 1 of the reference")
    assert list(failed) == ["broken", "wrong"]
    assert list(next(iter(chosen.remembered(CPU).values())).failed) == ["broken", "wrong"]


@pytest.mark.parametrize("names", [("one",), ("one", "other")])
def test_where_all_fail_torch_ops_are_the_last_resort(names, tmp_path):
    for name in names:
        register_kernel(name, lambda values, weights: 1 / 0)
    del KERNELS["cpu"]
    assert Choices(tmp_path).kernel("auto", make_values(), make_weights()).name == "torch"


def test_symmetric_kernels_are_taken_where_the_fastest_is_asked_for(clock, tmp_path):
    clock.milliseconds["rough"] = 0.5
    clock.kernel("rough", symmetric=True)
    for name in [name for name in KERNELS if KERNELS[name].symmetric and name != "rough"]:
        del KERNELS[name]  # those of libraries that are installed here
    chosen = Choices(tmp_path, clock.time)
    assert chosen.kernel("auto", make_values(), make_weights()).name == "quick"
    assert chosen.kernel("fastest", make_values(), make_weights()).name == "rough"
    assert chosen.kernel("auto", make_values(), make_weights()).name == "quick"


def test_values_that_are_not_finite_decide_nothing(clock, tmp_path):
    chosen, values = Choices(tmp_path, clock.time), make_values()
    values[3] = float("nan")
    assert chosen.kernel("auto", values, make_weights()).name == "cpu"
    assert chosen.kernel("slow", values, make_weights()).name == "slow"
    assert not chosen.made()
    assert chosen.kernel("auto", make_values(), make_weights()).name == "quick"


@pytest.mark.parametrize(
    ("options", "multiply", "told"),
    [
        (
            {},
            lambda values, weights: 1 / 0,
            "kernel mine: ZeroDivisionError: division by zero; cpu computes such layers",
        ),
        ({"bits": (4,)}, by_torch_ops, "kernel mine takes no 8-bit weights; cpu computes such layers"),
        ({"refuses": lambda *_: "not on a Sunday"}, by_torch_ops, "kernel mine: not on a Sunday; cpu computes such"),
        ({"package": "no-such-package"}, by_torch_ops, "kernel mine: not installed: pip install no-such-package; cpu"),
    ],
)
def test_one_that_was_asked_for_and_cannot_is_told_of_once_and_another_computes(options, multiply, told, tmp_path):
    register_kernel("mine", multiply, **options)
    chosen = Choices(tmp_path)
    with pytest.warns(UserWarning, match=f"^cemq: {told}"):
        assert chosen.kernel("mine", make_values(), make_weights()).name == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen.kernel("mine", make_values(), make_weights()).name == "cpu"


def test_one_that_was_asked_for_is_tried_once_for_each_shape():
    calls = []

    def multiply(values, weights):
        calls.append(tuple(values.shape))
        return by_torch_ops(values, weights, None, False)

    register_kernel("mine", multiply)
    layer = NativeLinear.from_linear(nn.Linear(64, 48), SCHEMES["w8a8"])
    use_kernel([layer], "mine")
    for rows in (40, 40, 60, 70):
        layer(torch.randn(rows, 64))
    assert calls == [(40, 64)] * 3 + [(60, 64)] + [(70, 64)] * 2


# --- from outside


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("triton", {}, "give a name of its own"),
        ("fastest", {}, "give a name of its own"),
        ("Two Words", {}, "give a name of its own"),
        ("mine", {"bits": (16,)}, r"bits \(16,\) of weights: there are those of 8 and of 4"),
        ("mine", {"bits": ()}, "of weights"),
    ],
)
def test_what_is_no_kernel_is_refused(name, options, message):
    before = dict(KERNELS)
    with pytest.raises(InputError, match=message):
        register_kernel(name, by_torch_ops, **options)
    assert before == KERNELS


def test_a_kernel_of_ones_own_smooths_and_activates_as_cemqs_do():
    register_kernel("mine", lambda values, weights: by_torch_ops(values, weights, None, False), bits=(8, 4))
    for bits in (8, 4):
        weights, values, smooth = make_weights(bits=bits), make_values(), torch.rand(128) + 0.5
        operands = weights.weight, weights.group_scale, *weights.scales
        found = integer_linear(values, *operands, smooth, True, "mine")
        assert relative(found, by_torch_ops(values, weights, smooth, True)) < 1e-6


def test_names_are_checked():
    assert check_kernel("auto") == "auto"
    with pytest.raises(InputError, match=r"unknown kernel 'tritton': choose from auto, .*; did you mean 'triton'\?"):
        check_kernel("tritton")
    with pytest.raises(InputError, match="kernel 'triton' cannot be used on cpu: for CUDA devices alone"):
        check_kernel("triton", CPU)


# --- layers, bundles and commands


def test_layers_keep_their_kernel_when_they_are_copied_and_few_rows_need_none():
    calls = []

    def multiply(values, weights):
        calls.append(values.shape[0])
        return by_torch_ops(values, weights, None, False)

    register_kernel("mine", multiply)
    model = nn.Sequential(
        NativeLinear.from_linear(nn.Linear(64, 48), SCHEMES["w8a8"]),
        NativeLinear.from_linear(nn.Linear(48, 40), SCHEMES["w8a16"]),
        CodedLinear.from_linear(nn.Linear(40, 40), SCHEMES["w8a8-fp8"]),
    )
    assert use_kernel([model], "mine") == 1
    copied = copy.deepcopy(model)
    assert copied[0].kernel == "mine"
    copied(torch.randn(5, 64))
    assert not calls
    copied(torch.randn(40, 64))
    assert set(calls) == {40}
    assert use_kernel([copied], "auto") == 1
    assert "kernel" not in copied.state_dict()
    with pytest.raises(InputError, match="kernel 'mine': no layer here multiplies integers"):
        use_kernel([model[1:]], "mine")
    assert use_kernel([model[1:]], "auto") == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize(("scheme", "backend"), [("w8a8", "aot_eager"), ("w4a8", "aot_eager"), ("w8a8", "inductor")])
def test_a_compiled_layer_goes_by_its_kernel(scheme, backend, fresh_compiler):
    if backend == "inductor" and (why := compile_obstacle("cpu")):
        pytest.skip(why)
    calls = []

    def multiply(values, weights):
        calls.append(weights.bits)
        return by_torch_ops(values, weights, None, False)

    register_kernel("mine", multiply, bits=(8, 4))
    layer, values = NativeLinear.from_linear(nn.Linear(64, 48), SCHEMES[scheme]), torch.randn(40, 64)
    expected = layer(values)
    calls.clear()  # `auto` has tried it, too
    use_kernel([layer], "mine")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(values), expected)
    assert calls == [layer.scheme.weight_bits] * 2  # it is compared once, and then computes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "digits"
    done = CliRunner().invoke(app, [
        "quantize-and-schedule", "builtin:dit-digits", "--scheme", "w8a8", "--rounding", "nearest", "--steps", "4",
        "--budget", "3", "--effort", "instant", "--device", "cpu", "-o", str(folder),
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def test_a_bundle_is_loaded_with_a_kernel_and_does_not_keep_it(bundle, tmp_path):
    pipe = cemq.from_pretrained(bundle, device="cpu", kernel="torch")
    layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, NativeLinear)]
    assert {layer.kernel for layer in layers} == {"torch"}
    pipe.save_pretrained(tmp_path / "again")
    again = cemq.from_pretrained(tmp_path / "again", device="cpu")
    assert {layer.kernel for layer in again.transformer.modules() if isinstance(layer, NativeLinear)} == {"auto"}


def test_a_kernel_that_is_not_there_is_refused_before_anything_is_loaded(bundle):
    for name, message in {
        "nope": "unknown kernel 'nope'",
        "triton": "kernel 'triton' cannot be used on cpu: for CUDA devices alone",
    }.items():
        with pytest.raises(InputError, match=message):
            cemq.from_pretrained(bundle, device="cpu", kernel=name)


def test_commands_take_a_kernel(bundle, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)])

    picture = tmp_path / "seven.png"
    done = invoke("generate", bundle, "--label", "seven", "--device", "cpu", "--kernel", "torch", "-o", picture)
    assert done.exit_code == 0, done.output
    assert picture.stat().st_size > 100
    assert {made.asked for made in choices().made()} == {"torch"}
    done = invoke("bench", bundle, "--rounds", "1", "--device", "cpu", "--kernel", "torch", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["kernel"] == "torch"
    assert {row["kernel"] for row in found["kernels"]} == {"torch"}
    assert all(row["shape"].startswith("w8a8 float32 ") for row in found["kernels"])
    done = invoke("doctor", "--quick", "--kernel", "nope")
    assert done.exit_code == 1
    assert "cemq: unknown kernel 'nope'" in done.output


def test_a_kernel_that_is_missing_or_broken_costs_a_line_in_doctor(capsys):
    def falls(device):
        raise OSError("libmine.so: cannot open shared object file\nand more")

    register_kernel("absent", by_torch_ops, package="no-such-package")
    register_kernel("falls", by_torch_ops, obstacle=falls)
    register_kernel("raises", lambda values, weights: 1 / 0, bits=(8, 4))
    register_kernel("wrong", lambda values, weights: 2 * by_torch_ops(values, weights, None, False))
    found = examine(quick=True, probes={})
    states = {(row["kernel"], row["bits"]): row["state"] for row in found["kernels"] if row["device"] == "cpu"}
    assert states["cpu", 8] == states["cpu", 4] == states["torch", 8] == "ok"
    assert states["int-mm", 8] == "-"
    assert states["absent", None] == "not installed: pip install no-such-package"
    assert states["falls", None] == "OSError: libmine.so: cannot open shared object file"
    assert states["raises", 4] == "ZeroDivisionError: division by zero"
    assert states["wrong", 8].startswith("off by 1 of the reference")
    timed = [row["ms"] for row in found["kernels"] if row["state"] == "ok"]
    assert all(isinstance(each, float) for each in timed)
    assert json.loads(json.dumps(found)) == found
    print_doctor(found)
    shown = capsys.readouterr().out
    assert "kernel absent on cpu: not installed: pip install no-such-package" in shown
    assert "kernel raises int8 on cpu: ZeroDivisionError: division by zero" in shown


def test_doctor_shows_what_was_chosen(clock, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Choices(time_of=clock.time).kernel("auto", make_values(), make_weights())
    found = examine(quick=True, probes={}, kernel="slow")
    assert found["choices"]["cpu"] == {"auto w8a8 float32 64x128x48": "quick"}
    assert {row["error"] for row in found["rows"] if (row["backend"], row["scheme"]) == ("native", "w8a8")} != {None}
    assert {made.asked for made in choices().made()} == {"slow"}
    print_doctor(found)
    assert "chosen on cpu: quick for 1 shape" in capsys.readouterr().out


def test_tokens_that_are_rounded_symmetrically():
    values = torch.tensor([[-2.0, 1.0, 0.5], [0.0, 0.0, 0.0], [254.0, 3.0, -127.0]])
    tokens, scale, zero_point = integers.quantize_symmetric(values)
    assert tokens.tolist() == [[-127, 64, 32], [0, 0, 0], [127, 2, -64]]
    assert torch.allclose(scale[[0, 2]], torch.tensor([[2 / 127], [2.0]]))
    assert not zero_point.any()
