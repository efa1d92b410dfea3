"""What works on the machine at hand: every backend and scheme, tried on a tiny model rather than looked up."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from diffusers.hooks import apply_group_offloading

from cemq.bench.answers import predict, relative_error
from cemq.bench.architectures import Architecture, Inputs
from cemq.bench.machine import compile_obstacle, describe_machine
from cemq.bench.measure import of_stage
from cemq.bench.random_models import quantization_config, random_model
from cemq.errors import first_line
from cemq.extensions import load_extensions
from cemq.pipelines.batches import Progress
from cemq.pipelines.opening import default_dtype
from cemq.predict.predictors import PREDICTORS
from cemq.quantize import BACKENDS, SCHEMES, CemqConfig, NativeLinear, installed
from cemq.quantize.kernels import AUTO, KERNELS, LinearWeights, check_kernel, choices
from cemq.quantize.kernels.choice import milliseconds, wrong
from cemq.quantize.kernels.registry import Kernel
from cemq.quantize.layers import use_kernel
from cemq.runtime.policy_names import known_policies

OK, NOT_TRIED = "ok", "-"
LARGEST_ERROR = 0.3  # fp4 weights of random models come to half of it
_COMPILED_ERROR = 0.02  # compiled code rounds in other places
_ROWS = 128  # integer products begin below it
_WIDTH = 256  # of the layer that kernels are tried on

# widths that every backend takes, and tokens enough for the integer products
TINY = Architecture(
    name="tiny",
    model_class="DiTTransformer2DModel",
    config={
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 10,
    },
    batch=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A quantized model to try, its inputs and what it answered when it was new; and what multiplies its integers."""

    model: Any
    inputs: Inputs
    output: torch.Tensor
    device: torch.device
    kernel: str = AUTO

    def same(self, model: Any, tolerance: float = 0.0) -> str:
        """`OK` if ``model`` answers as this one did, bit for bit unless there is a tolerance."""
        output = predict(model, self.inputs)
        if torch.equal(output, self.output):
            return OK
        error = relative_error(self.output, output)
        return OK if error <= tolerance else f"another output: relative difference {error:.2g}"


def _save_reload(subject: Subject) -> str:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        again = type(subject.model).from_pretrained(folder, torch_dtype=subject.output.dtype).to(subject.device)
        use_kernel([again], subject.kernel)
        return subject.same(again.eval())


def _deepcopy(subject: Subject) -> str:
    return subject.same(copy.deepcopy(subject.model))


def _model_offload(subject: Subject) -> str:
    model, hook = accelerate.cpu_offload_with_hook(copy.deepcopy(subject.model), subject.device)
    found = subject.same(model)
    hook.offload()
    return found if found != OK else subject.same(model)  # and once more, from the CPU


def _group_offload(subject: Subject) -> str:
    model = copy.deepcopy(subject.model)
    # not model.enable_group_offload: DiT's class forbids it, for a reason that is not its layers'
    apply_group_offloading(model, onload_device=subject.device, offload_type="leaf_level")
    return subject.same(model)


def _sequential_offload(subject: Subject) -> str:
    return subject.same(accelerate.cpu_offload(copy.deepcopy(subject.model), execution_device=subject.device))


def _compile(subject: Subject) -> str:
    """The whole model as one graph; code only for its feed-forward, because code for all of it takes ten seconds."""
    if obstacle := compile_obstacle(subject.device.type):
        return f"not tried: {obstacle}"
    torch.compiler.reset()
    model = copy.deepcopy(subject.model)
    found = subject.same(torch.compile(model, fullgraph=True, backend="aot_eager"), _COMPILED_ERROR)
    if found != OK:
        return found
    layers = model.transformer_blocks[0].ff
    values = torch.randn(1, _ROWS, model.inner_dim, dtype=torch.float32, device="cpu").to(subject.output)
    with torch.no_grad():
        error = relative_error(layers(values), torch.compile(layers, fullgraph=True)(values))
    return OK if error <= _COMPILED_ERROR else f"another output: relative difference {error:.2g}"


Probe = Callable[[Subject], str]
PROBES: dict[str, Probe] = {
    "reload": _save_reload,
    "copy": _deepcopy,
    "offload": _model_offload,
    "group": _group_offload,
    "sequential": _sequential_offload,
    "compile": _compile,
}


def examine(
    *,
    quick: bool = False,
    probes: Mapping[str, Probe] = PROBES,
    kernel: str = AUTO,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try everything on every device.

    Args:
        quick: Leave torch.compile out, which takes most of the time.
        probes: What is tried of each quantized model, by name; each says `OK` or why not.
        kernel: What the native layers multiply integers with.

    Returns:
        Plain data: machine, notes, what is known by name, the extensions that were loaded, a row for each backend,
        scheme and device, and one for each kernel, device and bits of weights. A row's ``probes``, and a kernel's
        ``state``, say ``ok``, why not, or ``-`` for what was not tried; a backend that is not installed has one row,
        with a ``reason``. ``choices`` are the kernels that are remembered for shapes, by device.

    Raises:
        InputError: There is no such kernel.
    """
    check_kernel(kernel)
    extensions = load_extensions()
    probes = {name: probe for name, probe in probes.items() if not (quick and name == "compile")}
    devices = _devices()
    pairs = [(backend, scheme) for backend in BACKENDS if installed(backend) for scheme in BACKENDS[backend].layers]
    rows = [
        {
            "backend": backend,
            "scheme": "",
            "device": "",
            "error": None,
            "probes": {},
            "reason": f"not installed: pip install 'cemq[{BACKENDS[backend].extra}]'",
        }
        for backend in BACKENDS
        if not installed(backend)
    ]
    tried, total, told = 0, len(devices) * len(pairs), of_stage(progress, "trying")
    with _silence():
        for device in devices:
            dtype = getattr(torch, default_dtype(device.type))
            inputs = TINY.inputs(TINY.batch, dtype=dtype, device=device)
            original = random_model(TINY, dtype=dtype, device=device)
            exact = predict(original, inputs)
            for backend, scheme in pairs:
                row = {"backend": backend, "scheme": scheme, "device": str(device), "reason": ""}
                rows.append(row | _try(probes, original, exact, inputs, backend, scheme, kernel))
                tried += 1
                told(tried / total)
        torch.compiler.reset()
        kernels = [row for device in devices for row in _try_kernels(device, quick)]
    notes = [
        "reload, copy and the offloads must give the same output to the bit; offload: of the whole model, group: layer "
        "by layer by diffusers, sequential: by accelerate; compile: without a break in the graph"
    ]
    if not any(device.type == "cuda" for device in devices):
        notes.append("without a CUDA device, offloading only shows that the calls work here, not that memory is saved")
    notes.append("kernels with symmetric tokens round activations in another way: they are used where asked for")
    if quick:
        notes.append("torch.compile was left out")
    known = {"predictors": list(PREDICTORS), "policies": list(known_policies()), "schemes": list(SCHEMES)}
    return {
        "machine": describe_machine(), "notes": notes, "rows": rows, "known": known, "extensions": extensions,
        "kernels": kernels, "choices": _remembered(devices),
    }  # fmt: skip


def _try(
    probes: Mapping[str, Probe],
    original: Any,
    exact: torch.Tensor,
    inputs: Inputs,
    backend: str,
    scheme: str,
    kernel: str,
) -> dict[str, Any]:
    """Error and probes of one pair on one device."""
    cells, device, error = {"runs": OK} | dict.fromkeys(probes, NOT_TRIED), exact.device, None
    integer = BACKENDS[backend].layers[scheme].endswith(NativeLinear.__name__) and SCHEMES[scheme].activation_bits == 8
    multiplied = kernel if integer else AUTO

    def make() -> str:
        nonlocal error, subject
        config: CemqConfig = quantization_config(original, backend, scheme)
        model = random_model(TINY, dtype=exact.dtype, device=device, config=config, batch=TINY.batch)
        if multiplied == kernel:
            use_kernel([model], kernel, device)
        output = predict(model, inputs)
        error = relative_error(exact, output)
        if not error <= LARGEST_ERROR:
            return f"relative error {error:.2g} to full precision"
        subject = Subject(model=model, inputs=inputs, output=output, device=device, kernel=multiplied)
        return OK

    subject = None
    cells["runs"] = _caught(make)
    if subject is not None:
        for name, probe in probes.items():
            cells[name] = _caught(lambda probe=probe, subject=subject: probe(subject))
    return {"error": error if error == error else None, "probes": cells}


def _try_kernels(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """What every kernel makes of one layer of 8 and one of 4 bits: milliseconds, and `OK` or why not."""
    dtype = getattr(torch, default_dtype(device.type))
    generator = torch.Generator("cpu").manual_seed(0)
    values, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(device)
        for size in ((_ROWS, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH,))
    )
    layers = {bits: _layer(weight, bias.to(dtype), bits) for bits in (8, 4)}
    for kernel in KERNELS.values():
        if why := kernel.obstacle_on(device):
            yield {"kernel": kernel.name, "device": str(device), "bits": None, "state": why, "ms": None}
            continue
        for bits in kernel.bits:
            state = NOT_TRIED
            if not kernel.compiles or (device.type != "cpu" and not quick):
                state = wrong(kernel, values.to(dtype), layers[bits]) or OK
            timed = _milliseconds(kernel, values.to(dtype), layers[bits]) if state == OK else None
            yield {"kernel": kernel.name, "device": str(device), "bits": bits, "state": state, "ms": timed}


def _layer(weight: torch.Tensor, bias: torch.Tensor, bits: int) -> LinearWeights:
    """What a native layer stores for a float weight (out, in)."""
    scheme = SCHEMES[f"w{bits}a8"]
    stored = NativeLinear.quantize(weight, scheme, None)
    scales = {name: stored[name] for name in ("weight", "weight_scale", "weight_sum")}
    return LinearWeights(group_scale=stored.get("group_scale"), bias=bias, columns=weight.shape[1], **scales)


def _milliseconds(kernel: Kernel, values: torch.Tensor, layer: LinearWeights) -> float:
    return milliseconds(lambda: kernel.run(values, layer, None, False), values.device)


def _remembered(devices: Sequence[torch.device]) -> dict[str, dict[str, str]]:
    """The kernels that were chosen for shapes, by device and what was asked for."""
    return {
        str(device): {asked: choice.kernel for asked, choice in choices().remembered(device).items()}
        for device in devices
    }


def _caught(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:  # a report on whatever libraries raise
        return f"{type(error).__name__}: {first_line(error)}"


def _devices() -> list[torch.device]:
    """The CPU, and of CUDA devices that are alike the first."""
    alike = {torch.cuda.get_device_name(index): index for index in reversed(range(torch.cuda.device_count()))}
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in sorted(alike.values()))]


@contextmanager
def _silence() -> Iterator[None]:
    """Warnings and log lines of the libraries would drown the report."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
