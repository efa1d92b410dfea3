"""From the settings of a build to quantized components of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from cemq.errors import InputError, ReplayError, SchemeError, choose
from cemq.families import DENOISERS, EIGHT_BIT, full_precision_patterns
from cemq.pipelines.opening import denoisers
from cemq.quantize.allocate import choose_eight_bit
from cemq.quantize.calibrate import Observer, quantize_calibrated, weights_read_elsewhere
from cemq.quantize.calls import Call
from cemq.quantize.in_diffusers import CemqConfig, quantizable, quantize_in_place
from cemq.quantize.schemes import NO_SCHEME, SCHEMES, check_scheme

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from cemq.recipe import Recipe

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """What to quantize and how: the fields of `Recipe` that say so. A None takes the default that goes with the rest.

    Args:
        full_precision: Patterns of layers to keep; None: those of `families` for the denoiser's class.
        gptq: Fit weights to recorded inputs instead of rounding them to nearest; native backend.
        smoothed: Scale inputs per channel before they are quantized to 8 bits; native backend.
        low_rank: Rank of a bfloat16 correction beside every 4-bit weight; native backend.
        bits_budget: Average stored bits per weight in a 4-bit scheme, which layers of the last blocks take 8 bits for.
            None: a fifth of the weights; rounded to nearest: modulation and time embedding.
        components: Names of the pipeline's components; empty: the denoiser. Text encoders are quantized weight-only.
    """

    scheme: str
    backend: str = "native"
    full_precision: Sequence[str] | None = None
    gptq: bool = True
    smoothed: bool = False
    low_rank: int = 0
    bits_budget: float | None = None
    components: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def of(cls, recipe: Recipe) -> QuantizationSettings:
        """Those of a recipe."""
        shared = {name: getattr(recipe, name) for name in cls.__dataclass_fields__ if name in type(recipe).model_fields}
        return cls(**shared | {"gptq": recipe.rounding == "gptq", "components": tuple(recipe.components or ())})

    def check(self) -> None:
        """Raises SchemeError or InputError for what cannot go together, before any model is opened."""
        check_scheme(self.scheme, self.backend)
        for option, asked in (("low rank", self.low_rank), ("bits budget", self.bits_budget is not None)):
            if asked and not self._is_four_bit:
                found = f"{self.backend} {self.scheme}"
                raise InputError(f"{option}: only 4-bit schemes of the native backend take it, not {found}")
            if asked and not self.quantizes_denoiser:
                named = ", ".join(self.components)
                raise InputError(f"{option}: only the denoiser takes it, and the components are {named}: name it too")
        if len(set(self.components)) < len(self.components):
            raise InputError(f"components {', '.join(self.components)}: one is named twice")
        if self.components and self.scheme == NO_SCHEME:
            raise InputError("components to quantize are named, but the scheme is none: name a scheme")

    @property
    def quantizes_denoiser(self) -> bool:
        return any(self.quantizes(name) for name in DENOISERS)

    def quantizes(self, name: str) -> bool:
        """Whether a component is to be quantized."""
        return self.scheme != NO_SCHEME and name in (self.components or DENOISERS)

    def config(self, denoiser: nn.Module) -> CemqConfig:
        """The quantization config of the denoiser, with the layers at 8 bits that go with the rounding.

        Raises:
            InputError: The bits budget cannot be kept.
        """
        native = self.backend == "native"
        kept = full_precision_patterns(type(denoiser).__name__) if self.full_precision is None else self.full_precision
        config = CemqConfig(
            self.scheme,
            backend=self.backend,
            full_precision=kept,
            eight_bit=() if native and self.gptq else EIGHT_BIT,
            low_rank=self.low_rank,
            smoothed=native and self.smoothed and SCHEMES[self.scheme].activation_bits == 8,
        )
        if not self._is_four_bit or (self.bits_budget is None and not self.gptq):
            return config
        chosen = choose_eight_bit(denoiser, config, self.bits_budget, first=config.eight_bit)
        return config.with_eight_bit(chosen)

    @property
    def _is_four_bit(self) -> bool:
        """Whether it is a scheme of native 4-bit integers, some of which may be 8-bit ones."""
        asked = SCHEMES.get(self.scheme)
        return self.backend == "native" and asked is not None and asked.weight_bits == 4 and not asked.is_coded

    def is_fitted(self, denoiser: nn.Module) -> bool:
        """Whether the denoiser is quantized to what its layers are fed."""
        if not self.quantizes_denoiser:
            return False
        config = self.config(denoiser)
        if self.backend == "native":
            is_fitted = config.layer_class(SCHEMES[self.scheme]).is_fitted
            return is_fitted and (self.gptq or config.smoothed)
        return any(
            config.layer_class(scheme).needs_largest and scheme.activation_bits == 8
            for _, _, scheme in quantizable(denoiser, config)
        )

    def observer(self, denoiser: nn.Module, **options: Any) -> Observer:
        """What a denoiser that is fitted learns from runs of its pipeline; ``options`` are those of `Observer`."""
        return Observer(denoiser, self.config(denoiser), gptq=self.gptq, **options)

    def without_calls(self, reason: ReplayError) -> QuantizationSettings:
        """The same, rounded to nearest: for a denoiser whose calls cannot be replayed.

        Raises:
            ReplayError: The backend cannot do without; ``reason``, and what to do.
        """
        if self.backend != "native":
            raise ReplayError(f"{reason}, and {self.backend} is fitted to calls: take --backend native") from reason
        return replace(self, gptq=False, smoothed=False)

    def check_components(self, pipeline: str, models: Collection[str]) -> None:
        """Raises InputError for a component that is none of a pipeline's models, or that stays."""
        for name in self.components:
            choose(f"component of {pipeline}", name, models)
            if name not in DENOISERS and "text_encoder" not in name:
                raise InputError(f"component '{name}' stays in full precision: name the denoiser or text encoders")

    def check_pipeline(self, pipe: DiffusionPipeline) -> None:
        """Raises InputError for a component that the pipeline lacks or that stays, or a budget that cannot be kept."""
        models = [key for key, part in pipe.components.items() if isinstance(part, nn.Module)]
        self.check_components(type(pipe).__name__, models)
        for _, denoiser in denoisers(pipe) if self.quantizes_denoiser else ():
            self.config(denoiser)


def quantize_pipeline(
    pipe: DiffusionPipeline,
    settings: QuantizationSettings,
    calls: Mapping[str, Sequence[Call] | Observer],
    progress: Progress | None = None,
) -> None:
    """Quantize the components named in place.

    Args:
        calls: Of each denoiser that `QuantizationSettings.is_fitted`, by component name: recorded calls, or what has
            watched its runs.

    Raises:
        SchemeError: There is nothing to quantize in a component, or the backend cannot take one of its layers.
        InputError: The bits budget cannot be kept.
    """
    if settings.scheme == NO_SCHEME:
        return

    def report(stage: str) -> Callable[[float], None] | None:
        if progress is None:
            return None
        progress(stage, 0.0)
        return partial(progress, stage)

    for name in settings.components or [name for name in DENOISERS if getattr(pipe, name, None) is not None]:
        model = getattr(pipe, name)
        if name not in DENOISERS:
            from cemq.quantize.in_transformers import TextEncoderConfig, quantize_text_encoder

            quantize_text_encoder(model, TextEncoderConfig(f"w{SCHEMES[settings.scheme].weight_bits}a16"))
            continue
        config, known = settings.config(model), calls.get(name)
        if isinstance(known, Observer):
            known.install(model, report("quantization"))
            continue
        if not known:
            if settings.is_fitted(model):
                raise SchemeError(
                    f"{settings.backend} {settings.scheme} is fitted to recorded inputs, and none were recorded"
                )
            quantize_in_place(model, config)
            continue
        config = config.with_full_precision(weights_read_elsewhere(model, config, known[0]))
        if not settings.is_fitted(model):
            quantize_in_place(model, config)
            continue
        quantize_calibrated(model, config, known, gptq=settings.gptq, progress=report("quantization"))
