import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

kernels = pytest.importorskip("cemq.quantize.kernels.triton_cuda")

GROUP_SIZE = 64
# Triton decides when it is imported whether it interprets, and here something else has imported it long ago
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BLOCKS = {8: kernels.w8_kernel.configs, 4: kernels.w4_kernel.configs}

needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
on_each_device = pytest.mark.parametrize(
    "device", ["cpu" if INTERPRETED else pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
few = settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking would take long
sizes = st.tuples(st.sampled_from([1, 17, 33]), st.sampled_from([5, 70]), st.sampled_from([1, 63, 130, 256]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 999)


@pytest.mark.skipif(INTERPRETED, reason="this is it")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def some_values(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows on one side of zero and on both, large and small ones, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(m, k, generator=generator) + torch.randn(m, 1, generator=generator) * 2
    values *= 10.0 ** torch.randint(-3, 2, (m, 1), generator=generator)
    values[m // 2] = 0
    return values.to(dtype)


def some_int4(
    n: int, k: int, seed: int, group_size: int = GROUP_SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed weights, their group scales, and the int8 weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    scale = torch.randint(1, 19, (n, groups, 1), generator=generator)
    least = torch.where(scale < 16, -8, -7)  # larger ones are of bundles of before, and have no -8
    values = torch.randint(-8, 8, (n, groups, group_size), generator=generator).maximum(least)
    values.flatten(1)[:, k:] = 0
    scale = torch.where(scale < 16, scale * (torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1), scale)
    low, high = (values + 8).chunk(2, -1)
    packed = (low | high << 4).flatten(1).to(torch.uint8)
    return packed, scale.squeeze(-1).to(torch.int8), (values * scale).flatten(1)[:, :k].to(torch.int8)


def some_int8(*shape: int, low: int, seed: int) -> torch.Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def expected_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = values.float()
    low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) * (1 / 255)).clamp_min(1e-12)
    inverse = 1 / scale
    zero = (-128 - low * inverse).round()
    tokens = ((values * inverse).round() + zero).clamp(-128, 127)
    return tokens.to(torch.int8), scale, zero.to(torch.int32)


def assert_close(output: torch.Tensor, values: torch.Tensor, weight, weight_scale, bias) -> None:
    """Against float64: some roundings in float32 and one to the dtype of the output (the interpreter truncates)."""
    tokens, scale, zero = expected_tokens(values)
    product = ((tokens.long() - zero) @ weight.long().t()).double() * scale * weight_scale.t()
    offset = torch.zeros(len(weight)) if bias is None else bias
    expected = product + offset
    spacing = torch.finfo(output.dtype).eps * expected.abs().clamp_min(torch.finfo(output.dtype).smallest_normal)
    slack = 2**-22 * (product.abs() + offset.abs()) + spacing
    assert output.dtype == values.dtype
    assert ((output.cpu().double() - expected).abs() <= slack).all()


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """One block shape: tuning compiles seven for each kind of layer, minutes for all that is drawn here."""
    for kernel in (kernels.w8_kernel, kernels.w4_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[-1:])


@on_each_device
@few
@given(sizes, dtypes, seeds)
def test_tokens_are_equal_bit_for_bit(device, size, dtype, seed):
    values = some_values(size[0], size[2], dtype, seed)
    for ours, expected in zip(kernels.quantize_tokens(values.to(device)), expected_tokens(values), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours.cpu(), expected)


@on_each_device
def test_tokens_of_rows_longer_than_a_block(device):
    values = some_values(3, 5000, torch.float32, 0)
    for ours, expected in zip(kernels.quantize_tokens(values.to(device)), expected_tokens(values), strict=True):
        assert torch.equal(ours.cpu(), expected)


@on_each_device
@few
@given(sizes, seeds)
def test_w8_accumulators_are_exact(device, size, seed):
    m, n, k = size
    tokens, weight = some_int8(m, k, low=-128, seed=seed), some_int8(n, k, low=-127, seed=seed + 1)
    tokens[0], weight[0] = -128, 127
    unread = torch.empty(0, device=device)
    product = kernels.multiply_w8(
        (tokens.to(device), unread, unread), weight.to(device), unread, unread, None, torch.int32
    )
    assert torch.equal(product.cpu().long(), tokens.long() @ weight.long().t())


@on_each_device
@few
@given(sizes, seeds, st.sampled_from([32, 64, 128]))
def test_w4_accumulators_are_exact(device, size, seed, group_size):
    m, n, k = size
    tokens = some_int8(m, k, low=-128, seed=seed)
    packed, group_scale, weight = some_int4(n, k, seed + 1, group_size)
    unread = torch.empty(0, device=device)
    product = kernels.multiply_w4(
        (tokens.to(device), unread, unread), packed.to(device), group_scale.to(device), unread, unread, None,
        group_size, torch.int32,
    )  # fmt: skip
    assert torch.equal(product.cpu().long(), tokens.long() @ weight.long().t())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("number", range(len(BLOCKS[8])))
@pytest.mark.parametrize("bits", [8, 4])
def test_every_block_shape_is_exact(bits, number, monkeypatch):
    m, n, k = 300, 400, 1000
    kernel = (kernels.w8_kernel, kernels.w4_kernel)[bits == 4]
    monkeypatch.setattr(kernel, "configs", BLOCKS[bits][number : number + 1])
    tokens, unread = some_int8(m, k, low=-128, seed=0), torch.empty(0, device="cuda")
    quantized = tokens.cuda(), unread, unread
    if bits == 8:
        weight = some_int8(n, k, low=-127, seed=1)
        product = kernels.multiply_w8(quantized, weight.cuda(), unread, unread, None, torch.int32)
    else:
        packed, group_scale, weight = some_int4(n, k, 1)
        operands = packed.cuda(), group_scale.cuda(), unread, unread, None, GROUP_SIZE
        product = kernels.multiply_w4(quantized, *operands, torch.int32)
    assert torch.equal(product.cpu().long(), tokens.long() @ weight.long().t())


@on_each_device
@pytest.mark.parametrize(("least", "factors"), [(-8, range(-15, 16)), (-7, range(16, 19))])  # the latter: of before
def test_every_int4_weight_is_exact(device, least, factors):
    """Each value, in each column of a group, times each group scale that goes with it."""
    levels = 8 - least
    values = (torch.arange(levels).view(levels, 1) + torch.arange(GROUP_SIZE)) % levels + least
    low, high = (values + 8).chunk(2, -1)
    packed = (low | high << 4).to(torch.uint8).repeat_interleave(len(factors), 0).to(device)
    group_scale = torch.tensor(factors, dtype=torch.int8).repeat(levels).view(-1, 1)
    tokens = torch.eye(GROUP_SIZE, dtype=torch.int8, device=device)
    unread = torch.empty(0, device=device)
    product = kernels.multiply_w4(
        (tokens, unread, unread), packed, group_scale.to(device), unread, unread, None, GROUP_SIZE, torch.int32
    )
    assert torch.equal(product.cpu().t(), values.repeat_interleave(len(factors), 0).int() * group_scale)


@on_each_device
@few
@given(sizes, dtypes, seeds, st.booleans())
def test_w8_output(device, size, dtype, seed, with_bias):
    m, n, k = size
    values, weight = some_values(m, k, dtype, seed), some_int8(n, k, low=-127, seed=seed)
    weight_scale = some_values(n, 1, torch.float32, seed).abs() / 10_000
    bias = some_values(n, 1, dtype, seed).flatten() if with_bias else None
    operands = weight, weight_scale, weight.sum(1, keepdim=True, dtype=torch.int32), bias
    output = kernels.linear_w8a8(values.to(device), *(None if part is None else part.to(device) for part in operands))
    assert_close(output, values, weight, weight_scale, bias)


@on_each_device
@few
@given(sizes, dtypes, seeds, st.booleans())
def test_w4_output(device, size, dtype, seed, with_bias):
    m, n, k = size
    values = some_values(m, k, dtype, seed)
    packed, group_scale, weight = some_int4(n, k, seed)
    weight_scale = some_values(n, 1, torch.float32, seed).abs() / 10_000
    bias = some_values(n, 1, dtype, seed).flatten() if with_bias else None
    operands = packed, group_scale, weight_scale, weight.sum(1, keepdim=True, dtype=torch.int32), bias
    operands = (None if part is None else part.to(device) for part in operands)
    output = kernels.linear_w4a8(values.to(device), *operands, GROUP_SIZE)
    assert_close(output, values, weight, weight_scale, bias)


@on_each_device
def test_rows_need_not_be_contiguous(device):
    values = some_values(20, 17, torch.float32, 0).to(device).t()
    weight, weight_scale = some_int8(5, 20, low=-127, seed=0).to(device), torch.ones(5, 1, device=device)
    operands = weight, weight_scale, weight.sum(1, keepdim=True, dtype=torch.int32), None
    assert torch.equal(kernels.linear_w8a8(values, *operands), kernels.linear_w8a8(values.contiguous(), *operands))


@on_each_device
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so(device, bad):
    values = torch.ones(3, 8, device=device)
    values[1, 2] = bad
    weight, column = torch.ones(5, 8, dtype=torch.int8, device=device), torch.ones(5, 1, device=device)
    output = kernels.linear_w8a8(values, weight, column, 8 * column.int(), None)
    assert output.isfinite().all(1).tolist() == [True, False, True]


@on_each_device
def test_operators_can_be_traced(device):
    values = some_values(17, 70, torch.float32, 0).to(device)
    packed, group_scale, weight = (part.to(device) for part in some_int4(5, 70, 0))
    column = torch.ones(5, 1, device=device)
    arguments = {
        kernels.quantize_tokens: (values,),
        kernels.linear_w8a8: (values, weight, column, column.int(), column.flatten()),
        kernels.linear_w4a8: (values, packed, group_scale, column, column.int(), None, GROUP_SIZE),
    }
    for operator, inputs in arguments.items():
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(operator, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), operator(*inputs), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize(("capability", "product"), [(80, "mma.sync.aligned.m16n8k32"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("name", ["w8_kernel", "w4_kernel"])
def test_compiles_to_int8_tensor_cores(name, capability, product, monkeypatch, tmp_path):
    """The compiler needs no GPU, and checks more than the interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, config = getattr(kernels, name), BLOCKS[4 if name == "w4_kernel" else 8][0]
    constants = config.kwargs | ({"WORDS": GROUP_SIZE // 8} if name == "w4_kernel" else {})
    pointers = {
        "tokens": "*i8", "weight": "*i8", "words": "*i32", "group_scale": "*i8", "scale": "*fp32",
        "weight_scale": "*fp32", "zero_point": "*i32", "weight_sum": "*i32", "bias": "*bf16", "output": "*bf16",
    }  # fmt: skip
    names = kernel.fn.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in {*pointers, "n", "k"}}
    source = ASTSource(
        kernel.fn, signature, {(names.index(name),): value for name, value in constants.items()}, aligned
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    assembly = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert product in assembly
    assert "s32.s8.s8" in assembly
    assert "cp.async.cg.shared.global" in assembly


@pytest.mark.gpu
@needs_gpu
def test_more_elements_than_an_int32_can_count():
    rows, columns = 2**16 + 3, 2**15 + 8
    weight = some_int8(columns, 64, low=-127, seed=0).cuda()
    operands = weight, torch.ones(columns, 1).cuda(), weight.sum(1, keepdim=True, dtype=torch.int32), None
    values = torch.randn(rows, 64, dtype=torch.bfloat16, device="cuda")
    output = kernels.linear_w8a8(values, *operands)
    assert torch.equal(output[-3:], kernels.linear_w8a8(values[-3:], *operands))
