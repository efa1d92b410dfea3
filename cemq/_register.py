"""Tell diffusers about cemq's quantizer as soon as diffusers is there, without importing it (or torch) here."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TARGET = "diffusers.quantizers.auto"
_REGISTERS = "cemq.quantize.native"  # enters itself in diffusers' tables when imported


class _ThenRegister(Loader):
    """Runs the module as its own loader would, then registers."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(_REGISTERS)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_diffusers_loads() -> None:
    """Register now if diffusers' quantizers are imported already, else when they are."""
    if _TARGET in sys.modules:
        importlib.import_module(_REGISTERS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
