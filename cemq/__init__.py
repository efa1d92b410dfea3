"""cemq: diffusion transformers made small and fast without training, and honest about it."""

from __future__ import annotations

import importlib
from typing import Any

from cemq._register import register_when_loaded

__version__ = "0.1.0"

# Public names and where they live; loaded on first use (PEP 562), so that ``import cemq`` loads no torch.
_PUBLIC = {
    "BundleError": "cemq.errors",
    "CacheSchedule": "cemq.schedule",
    "CemqConfig": "cemq.quantize",
    "CemqError": "cemq.errors",
    "ErrorPrior": "cemq.prior.error_prior",
    "Evaluation": "cemq.evaluation.compare",
    "TextEncoderConfig": "cemq.quantize.in_transformers",
    "Plan": "cemq.schedule.plan",
    "apply_schedule": "cemq.bundle.apply",
    "attached": "cemq.runtime",
    "detach": "cemq.runtime",
    "evaluate": "cemq.evaluation.compare",
    "export": "cemq.bundle.schedule_file",
    "for_request": "cemq.runtime",
    "from_pretrained": "cemq.bundle.load",
    "generate": "cemq.bundle.generate",
    "launched": "cemq.parallel",
    "plan_memory": "cemq.bundle.plan_memory",
    "plan_schedule": "cemq.schedule",
    "profile": "cemq.prior.profile",
    "push_to_hub": "cemq.bundle.hub",
    "quantize_and_schedule": "cemq.build",
    "quantize_in_place": "cemq.quantize",
    "set_budget": "cemq.runtime",
    "quantize_text_encoder": "cemq.quantize.in_transformers",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cemq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register_when_loaded()
