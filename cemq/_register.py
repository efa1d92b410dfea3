"""Tell diffusers and transformers of cemq's quantizers once they are there, without importing them (or torch) here."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTERS = {  # what enters itself in a library's tables when it is imported
    "diffusers.quantizers.auto": "cemq.quantize.in_diffusers",
    "transformers.quantizers.auto": "cemq.quantize.in_transformers",
}


# diffusers imports every quantization library it finds, and these complain about what this machine lacks
_NOISY = (
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
    "torchao",
)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Drop log records up to warnings of the libraries that diffusers imports beside its quantizers."""

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    loggers = [logging.getLogger(name) for name in _NOISY]
    for logger in loggers:
        logger.addFilter(errors_only)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(errors_only)


class _ThenRegister(Loader):
    """Runs the module as its own loader would, then registers."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with _without_noise():
            self.loader.exec_module(module)
        importlib.import_module(_REGISTERS[module.__name__])


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTERS:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_loaded() -> None:
    """Register now with what is imported already, else when it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for target, registers in _REGISTERS.items():
        if target in sys.modules:
            importlib.import_module(registers)
