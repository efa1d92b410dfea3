"""cemq: diffusion transformers made small and fast without training, and honest about it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cemq._register import register_when_loaded

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from cemq.build import quantize_and_schedule
    from cemq.build.replan import replan
    from cemq.bundle.apply import apply_schedule
    from cemq.bundle.generate import generate
    from cemq.bundle.hub import push_to_hub
    from cemq.bundle.load import from_pretrained
    from cemq.bundle.plan_memory import plan_memory
    from cemq.bundle.schedule_file import export
    from cemq.errors import BundleError, CemqError
    from cemq.evaluation.compare import Evaluation, evaluate
    from cemq.evaluation.page import report
    from cemq.evaluation.rivals.comparison import Comparison, compare
    from cemq.evaluation.scores import register_metric
    from cemq.parallel import launched
    from cemq.predict.predictors import register_predictor
    from cemq.prior.error_prior import ErrorPrior
    from cemq.quantize import CemqConfig, Format, quantize_in_place, register_format
    from cemq.quantize.in_transformers import TextEncoderConfig, quantize_text_encoder
    from cemq.quantize.kernels.registry import register_kernel
    from cemq.runtime import apply_policy, attached, detach, for_request, set_budget
    from cemq.runtime.dicache import DiCache
    from cemq.runtime.duca import DuCa
    from cemq.runtime.easycache import EasyCache
    from cemq.runtime.h2cache import H2Cache
    from cemq.runtime.magcache import MagCache
    from cemq.runtime.policies import register_policy
    from cemq.runtime.precisecache import PreciseCache
    from cemq.runtime.runner import Runner
    from cemq.runtime.sencache import SenCache
    from cemq.runtime.teacache import TeaCache
    from cemq.schedule import CacheSchedule, plan_schedule
    from cemq.schedule.plan import Plan

__version__ = "0.1.0"

# Public names and where they live; loaded on first use (PEP 562), so that ``import cemq`` loads no torch.
_PUBLIC = {
    "BundleError": "cemq.errors",
    "CacheSchedule": "cemq.schedule",
    "CemqConfig": "cemq.quantize",
    "CemqError": "cemq.errors",
    "DiCache": "cemq.runtime.dicache",
    "DuCa": "cemq.runtime.duca",
    "EasyCache": "cemq.runtime.easycache",
    "H2Cache": "cemq.runtime.h2cache",
    "ErrorPrior": "cemq.prior.error_prior",
    "Comparison": "cemq.evaluation.rivals.comparison",
    "Evaluation": "cemq.evaluation.compare",
    "TextEncoderConfig": "cemq.quantize.in_transformers",
    "Format": "cemq.quantize",
    "MagCache": "cemq.runtime.magcache",
    "PreciseCache": "cemq.runtime.precisecache",
    "Plan": "cemq.schedule.plan",
    "Runner": "cemq.runtime.runner",
    "SenCache": "cemq.runtime.sencache",
    "TeaCache": "cemq.runtime.teacache",
    "apply_policy": "cemq.runtime",
    "apply_schedule": "cemq.bundle.apply",
    "attached": "cemq.runtime",
    "compare": "cemq.evaluation.rivals.comparison",
    "detach": "cemq.runtime",
    "evaluate": "cemq.evaluation.compare",
    "export": "cemq.bundle.schedule_file",
    "for_request": "cemq.runtime",
    "from_pretrained": "cemq.bundle.load",
    "generate": "cemq.bundle.generate",
    "launched": "cemq.parallel",
    "plan_memory": "cemq.bundle.plan_memory",
    "plan_schedule": "cemq.schedule",
    "push_to_hub": "cemq.bundle.hub",
    "quantize_and_schedule": "cemq.build",
    "quantize_in_place": "cemq.quantize",
    "replan": "cemq.build.replan",
    "report": "cemq.evaluation.page",
    "set_budget": "cemq.runtime",
    "register_format": "cemq.quantize",
    "register_kernel": "cemq.quantize.kernels.registry",
    "register_metric": "cemq.evaluation.scores",
    "register_policy": "cemq.runtime.policies",
    "register_predictor": "cemq.predict.predictors",
    "quantize_text_encoder": "cemq.quantize.in_transformers",
}
__all__ = [  # written out, for type checkers
    "__version__", "BundleError", "CacheSchedule", "CemqConfig", "CemqError", "Comparison", "DiCache", "DuCa",
    "EasyCache", "ErrorPrior", "Evaluation", "Format", "H2Cache", "MagCache", "Plan", "PreciseCache", "Runner",
    "SenCache", "TeaCache", "TextEncoderConfig", "apply_policy", "apply_schedule", "attached", "compare", "detach",
    "evaluate", "export", "for_request", "from_pretrained", "generate", "launched", "plan_memory", "plan_schedule",
    "push_to_hub", "quantize_and_schedule", "quantize_in_place", "quantize_text_encoder", "register_format",
    "register_kernel", "register_metric", "register_policy", "register_predictor", "replan", "report", "set_budget",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cemq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_when_loaded()
