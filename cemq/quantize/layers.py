"""Quantized linear layers: plain integer tensors, whatever library multiplies them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import nn

from cemq.errors import InputError, ModelError
from cemq.quantize.gptq import gptq_int4, gptq_int8, low_rank, smoothing
from cemq.quantize.integers import GROUP_SIZE, quantize_channels, quantize_int4, round_to_scales
from cemq.quantize.kernels import AUTO, FEW_ROWS, check_kernel, integer_linear, integer_weight, weight_only_linear
from cemq.quantize.schemes import Scheme
from cemq.reclaim import give_back

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far rounding moves a weight that is changed and stored in integers again, in squared norms.

    Args:
        error: Of what is stored less what it was to be.
        change: Of what it was to be less what was stored before.
    """

    error: float = 0.0
    change: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(error=self.error + other.error, change=self.change + other.change)

    @property
    def share(self) -> float:
        """How far it moves the weight beside how far that was to move."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What calibration knows of a layer's inputs ``x``.

    Args:
        largest: The largest ``|x|`` of each recorded call, in order.
        channel_largest: (in,) the largest ``|x|`` of each channel over all calls.
        hessian: (in, in) float32, the sum of ``x x^T``; None where it was not asked for.
    """

    largest: tuple[float, ...]
    channel_largest: torch.Tensor
    hessian: torch.Tensor | None = None


class IntegerWeight(nn.Parameter):
    """The integers of a quantized layer, a plain tensor but for one thing: asked for its dtype, it answers with the one
    that its layer computes in.

    Models cast what they hand to a layer to ``layer.weight.dtype`` or to that of a module's first parameter, and would
    cut timesteps down to whole numbers. On the meta device it answers with its own: there loaders and offloaders ask,
    who have to bring just that.

    ``integers`` is the plain tensor over the same memory. It is kept, not made when asked for: torch.compile believes
    what the weight says of itself, and wants one object for each tensor that it is given.
    """

    computes_in: ClassVar[torch.dtype]
    stored_as: ClassVar[torch.dtype]
    integers: torch.Tensor

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> IntegerWeight:
        # accelerate, after a forward that did not end, brings what it keeps in the dtype that it was answered
        integers = data.data.to(cls.stored_as)
        weight = super().__new__(cls, integers, requires_grad)
        weight.integers = integers
        return weight

    @property
    def data(self) -> torch.Tensor:
        return self.integers

    @data.setter
    def data(self, tensor: torch.Tensor) -> None:  # how offloaders and casts put other memory in
        nn.Parameter.data.__set__(self, tensor)  # pyright: ignore[reportAttributeAccessIssue]  # it is a descriptor
        self.integers = tensor.data

    @property
    def dtype(self) -> torch.dtype:
        return self.stored_as if self.is_meta else self.computes_in

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@functools.cache
def _integer_weight(
    computes_in: torch.dtype, stored_as: torch.dtype, packed_from: torch.Size | None
) -> type[IntegerWeight]:
    """A class for each pair of dtypes: what copies a parameter keeps its class and nothing else.

    Args:
        packed_from: The shape (out, in) of what is stored in another one.
    """
    told = {"computes_in": computes_in, "stored_as": stored_as}
    if packed_from is None:
        return type("IntegerWeight", (IntegerWeight,), told)
    # Flux pipelines compare a LoRA's shapes with the weights', and this is how diffusers is told the shape of what a
    # packed one stands for: it goes by the name of a class, and knows the layers of two libraries.
    return type("GGUFParameter", (IntegerWeight,), told | {"quant_shape": packed_from})


class QuantizedLinear(nn.Module):
    """A linear layer whose stored tensors are plain ones, so that any loader, offloader or copy can handle them.

    Subclasses say which tensors they store (`layout`), how a float weight turns into them (`quantize`) and how they are
    multiplied (`multiply`). Tensors of the layout keep their dtype whatever the model is cast to. The first parameter
    is the bias, if there is one: who asks for the dtype of that finds the one that is computed in.
    """

    is_fitted: ClassVar[bool] = False  # `quantize` makes use of a Hessian
    needs_largest: ClassVar[bool] = False  # static activation scales: cannot be made without statistics
    rounds_anew: ClassVar[bool] = False  # `add_to_weight` works
    weight: IntegerWeight
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.scheme: Scheme = scheme
        self._compute_dtype = dtype
        self.register_parameter(
            "bias", _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )
        for name, (shape, kind) in self.layout(in_features, out_features, scheme).items():
            setattr(self, name, _frozen(torch.empty(shape, dtype=kind, device=device)))

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        """Shape and dtype of every stored tensor but the bias; one of them is called ``weight``."""
        raise NotImplementedError

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        """The tensors of `layout` for a float weight (out, in)."""
        raise NotImplementedError

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        """(rows, in) to (rows, out)."""
        raise NotImplementedError

    def product(self, values: torch.Tensor) -> torch.Tensor:
        """As `multiply`, without the activation function where the layer applies one."""
        return self.multiply(values)

    def activated(self, output: torch.Tensor) -> torch.Tensor:
        """What `multiply` makes of what `product` gives."""
        return output

    def add_to_weight(self, change: torch.Tensor) -> Rounding:
        """Add floats (out, in) to what the integers stand for, and round that to integers again, in place.

        Raises:
            ModelError: Layers of this class cannot.
        """
        raise ModelError(f"the integers of {type(self).__name__} cannot be changed: quantize the changed model")

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of `layout` as they are, in their own dtypes."""
        names = self.layout(self.in_features, self.out_features, self.scheme)
        return {name: self.integers if name == "weight" else getattr(self, name).data for name in names}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write other values into `stored`: in place, for offloading keeps hold of the tensors."""
        for name, tensor in self.stored().items():
            tensor.copy_(tensors[name])

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype that the layer was made for or last cast to; what it is fed may be of another one."""
        return self._compute_dtype if self.bias is None else self.bias.dtype

    @property
    def integers(self) -> torch.Tensor:
        """The stored weight in its own dtype."""
        return self.weight.integers

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's, but what is stored for the weight becomes an `IntegerWeight`."""
        if name == "weight" and param is not None and not param.data.is_floating_point():
            shape = torch.Size((self.out_features, self.in_features))
            kind = _integer_weight(self.dtype, param.data.dtype, None if param.shape == shape else shape)
            if type(param) is not kind:
                marks, param = vars(param), kind(param)
                vars(param).update(marks | vars(param))  # transformers' loader marks what it has loaded
        super().register_parameter(name, param)

    def answer_in_compute_dtype(self) -> None:
        """Have the weight answer anew, after something else has put parameters in or cast the bias."""
        self.register_parameter("weight", self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # copied into integers of the same shape, float weights would become whole numbers without a word
        for name, (_, kind) in self.layout(self.in_features, self.out_features, self.scheme).items():
            given = state_dict.get(prefix + name)
            if given is not None and given.data.dtype != kind:
                found, wanted = (str(dtype).removeprefix("torch.") for dtype in (given.data.dtype, kind))
                raise ModelError(
                    f"tensor '{prefix}{name}' is {found}, and the quantized layer it is loaded into holds {wanted}: "
                    "load float weights into the full-precision model and quantize that"
                )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.answer_in_compute_dtype()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: Scheme, statistics: InputStatistics | None = None
    ) -> QuantizedLinear:
        """Quantize the weight of ``linear``; the bias is kept."""
        layer = cls._like(linear, scheme)
        layer.set_weight(linear.weight, statistics)
        if linear.bias is not None:
            layer.bias = _frozen(linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_stored(cls, linear: nn.Linear, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
        """The layer that ``linear`` was quantized to, from what its ``state_dict`` held."""
        layer = cls._like(linear, scheme)
        for name, tensor in tensors.items():
            setattr(layer, name, _frozen(tensor.to(linear.weight.device)))
        layer.answer_in_compute_dtype()
        return layer.train(linear.training)

    @classmethod
    def _like(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """A layer of the same sizes that holds nothing yet."""
        return cls(
            linear.in_features,
            linear.out_features,
            scheme=scheme,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor, statistics: InputStatistics | None = None) -> None:
        """Quantize a float weight (out, in)."""
        for name, tensor in self.quantize(weight, self.scheme, statistics).items():
            setattr(self, name, _frozen(tensor.contiguous()))
        give_back(weight)

    def forward(self, input: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """What the linear layer gives for an input (..., in): (..., out).

        Args:
            beside: (..., out) floats that are added to the product, before the activation function if there is one.
        """
        if not input.is_floating_point():
            raise ModelError(
                f"a quantized layer is fed {str(input.dtype).removeprefix('torch.')}, not floats: the model has cast "
                "its input to the dtype of stored integers; name that layer under full_precision in a recipe"
            )
        rows = input.reshape(-1, self.in_features)
        if beside is None:
            output = self.multiply(rows)
        else:
            product = self.product(rows)
            output = self.activated((product + beside.reshape(product.shape)).to(product.dtype))
        return output.reshape(*input.shape[:-1], self.out_features)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        exact = {
            name: getattr(self, name).detach()  # the parameter itself is cast in place
            for name, (_, kind) in self.layout(self.in_features, self.out_features, self.scheme).items()
            if kind.is_floating_point
        }
        self._compute_dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(lambda tensor: fn(tensor.data if isinstance(tensor, IntegerWeight) else tensor), recurse)
        self.answer_in_compute_dtype()
        for name, tensor in exact.items():
            if getattr(self, name).dtype != tensor.dtype:  # a cast of the model: move the scale, do not round it
                setattr(self, name, _frozen(tensor.to(getattr(self, name).device)))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme.name}, bias={self.bias is not None}"


class NativeLinear(QuantizedLinear):
    """cemq's own layer: from 32 rows on, int8 activations quantized per token and an integer product.

    ``weight`` is int8 (out, in), or uint8 (out, padded_in / 2) with ``group_scale`` int8 (out, groups);
    ``weight_scale`` is float32 (out, 1); ``weight_sum`` is int32 (out, 1), the row sums of the integer weight, which
    the activations' zero points are multiplied with. With fewer rows (time embedding, adaLN) there is nothing to gain
    from an integer product and the input is precious: then, and in schemes with 16-bit activations, only the weight is
    quantized.

    A smoothed layer multiplies its input by ``smooth`` (in,), and its weight has been divided by it (SmoothQuant,
    2211.10438). One with a low-rank correction adds ``(x @ down^T) @ up^T`` in bfloat16 (as in SVDQuant, 2411.05007).
    One with ``gelu`` gives the tanh form of it (`fuse_gelu`). ``kernel`` says what multiplies integers (`use_kernel`).
    """

    is_fitted = True
    rounds_anew = True
    gelu = False
    kernel: str = AUTO
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def layout(cls, in_features: int, out_features: int, scheme: Scheme) -> Layout:
        tensors: Layout = {"weight": ((out_features, in_features), torch.int8)}
        if scheme.weight_bits == 4:
            groups = -(-in_features // GROUP_SIZE)
            tensors["weight"] = ((out_features, groups * GROUP_SIZE // 2), torch.uint8)
            tensors["group_scale"] = ((out_features, groups), torch.int8)
        tensors["weight_scale"] = ((out_features, 1), torch.float32)
        tensors["weight_sum"] = ((out_features, 1), torch.int32)
        if scheme.smoothed:
            tensors["smooth"] = ((in_features,), torch.float32)
        if rank := min(scheme.low_rank, in_features, out_features):
            tensors["up"], tensors["down"] = (
                ((out_features, rank), torch.bfloat16),
                ((rank, in_features), torch.bfloat16),
            )
        return tensors

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, scheme: Scheme, statistics: InputStatistics | None
    ) -> dict[str, torch.Tensor]:
        tensors, weight = {}, weight.float()
        hessian = None if statistics is None else statistics.hessian
        if scheme.smoothed:
            smooth = smoothing(weight, None if statistics is None else statistics.channel_largest)
            weight = weight / smooth
            hessian = None if hessian is None else hessian * torch.outer(smooth, smooth)
            tensors["smooth"] = smooth
        if rank := min(scheme.low_rank, *weight.shape):
            up, down = low_rank(weight, hessian, rank)
            weight = weight - up.float() @ down.float()
            tensors |= {"up": up, "down": down}
        if scheme.weight_bits == 8:
            quantized = quantize_channels(weight) if hessian is None else gptq_int8(weight, hessian)
            tensors["weight"], tensors["weight_scale"] = quantized
        else:
            quantized = quantize_int4(weight, GROUP_SIZE) if hessian is None else gptq_int4(weight, hessian, GROUP_SIZE)
            tensors["weight"], tensors["group_scale"], tensors["weight_scale"] = quantized
        integers = integer_weight(tensors["weight"], tensors.get("group_scale"), weight.shape[1])
        return tensors | {"weight_sum": integers.sum(1, keepdim=True, dtype=torch.int32)}

    def integer_weight(self) -> torch.Tensor:
        """The int8 weight (out, in) that takes part in the product."""
        return integer_weight(self.integers, getattr(self, "group_scale", None), self.in_features)

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        if self.gelu and not self.scheme.low_rank and self._in_integers(values):
            return self._product(values, gelu=True)  # applied before the result is rounded
        return self.activated(self.product(values))

    def product(self, values: torch.Tensor) -> torch.Tensor:
        return self._product(values, gelu=False)

    def activated(self, output: torch.Tensor) -> torch.Tensor:
        return F.gelu(output, approximate="tanh") if self.gelu else output

    def _in_integers(self, values: torch.Tensor) -> bool:
        return self.scheme.activation_bits == 8 and values.shape[0] >= FEW_ROWS

    def _product(self, values: torch.Tensor, gelu: bool) -> torch.Tensor:
        group_scale, smooth = getattr(self, "group_scale", None), getattr(self, "smooth", None)
        if self._in_integers(values):
            weights = self.integers, group_scale, self.weight_scale, self.weight_sum
            output = integer_linear(values, *weights, self.bias, smooth, gelu, self.kernel)
        else:
            output = weight_only_linear(values, self.integers, group_scale, self.weight_scale, self.bias, smooth)
        if self.scheme.low_rank:
            scaled = values if smooth is None else values * smooth
            output = output + F.linear(F.linear(scaled.to(self.down.dtype), self.down), self.up).to(output.dtype)
        return output

    @torch.no_grad()
    def add_to_weight(self, change: torch.Tensor) -> Rounding:
        """Smoothing and low-rank correction stay. Each output channel keeps its scales, or gets new ones where those
        move its weights less: those that are not changed stay as they are."""
        group_scale, smooth = getattr(self, "group_scale", None), getattr(self, "smooth", None)
        change = change.float() if smooth is None else change.float() / smooth
        wanted = self.weight_scale * self.integer_weight().float() + change
        kept = self.stored() | {"weight": round_to_scales(wanted, self.weight_scale, group_scale)}
        made = self.quantize(wanted, replace(self.scheme, smoothed=False, low_rank=0), None)
        errors = []
        for tensors in (kept, made):
            integers = integer_weight(tensors["weight"], tensors.get("group_scale"), self.in_features)
            errors.append((tensors["weight_scale"] * integers.float() - wanted).square_().sum(1, keepdim=True))
            tensors["weight_sum"] = integers.sum(1, keepdim=True, dtype=torch.int32)
        stays = errors[0] <= errors[1]
        self.restore(kept | {name: torch.where(stays, kept[name], tensor) for name, tensor in made.items()})
        return Rounding(error=float(torch.minimum(*errors).sum()), change=float(change.square().sum()))


class FusedGELU(nn.Module):
    """In the place of diffusers' GELU: its projection applies the activation itself, before anything is rounded."""

    def __init__(self, proj: NativeLinear):
        super().__init__()
        self.proj = proj
        proj.gelu = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.proj(hidden_states)


def fuse_gelu(model: nn.Module) -> None:
    """Have the projections of feed-forward layers apply their GELU, where they are native layers and it is the tanh
    form: over bfloat16, torch takes a tenth of a forward for it. Names of tensors stay as they were."""
    for name, module in list(model.named_modules()):
        if type(module) is GELU and module.approximate == "tanh" and type(module.proj) is NativeLinear:
            model.set_submodule(name, FusedGELU(module.proj).train(module.training))


def use_kernel(modules: Iterable[nn.Module], kernel: str, device: torch.device | None = None) -> int:
    """Have the integer products of native layers computed by one kernel, or by a choice (`cemq.quantize.kernels`).

    Layers that a kernel does not take are computed as before. It is not saved with a model: another machine has others.

    Args:
        kernel: A kernel's name, ``auto`` or ``fastest``.
        device: Where the layers run; refuses a kernel that cannot run there.

    Returns:
        The number of layers.

    Raises:
        InputError: No such kernel, it cannot run on the device, or no layer multiplies integers.
    """
    check_kernel(kernel, device)
    layers = [
        layer
        for module in modules
        for layer in module.modules()
        if isinstance(layer, NativeLinear) and layer.scheme.activation_bits == 8
    ]
    if kernel != AUTO and not layers:
        raise InputError(f"kernel '{kernel}': no layer here multiplies integers by cemq's own kernels: leave it out")
    for layer in layers:
        layer.kernel = kernel
    return len(layers)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
