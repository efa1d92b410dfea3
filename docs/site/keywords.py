"""For griffe, which reads the signatures: keywords that a function takes as a TypedDict are shown one by one."""

from __future__ import annotations

from typing import Any

import griffe


class Keywords(griffe.Extension):
    """``**placing: Unpack[Placing]`` becomes the keywords of ``Placing``, as the function's Args describe them."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in (pkg, *_modules(pkg)):
            for function in module.functions.values():
                if not function.is_alias:
                    _spell_out(function)


def _modules(module: griffe.Module) -> list[griffe.Module]:
    inner = [each for each in module.modules.values() if not each.is_alias]
    return [*inner, *(each for one in inner for each in _modules(one))]


def _spell_out(function: griffe.Function) -> None:
    for parameter in list(function.parameters):
        annotation = parameter.annotation
        if parameter.kind is griffe.ParameterKind.var_keyword and str(annotation).startswith("Unpack["):
            taken = function.modules_collection[annotation.slice.canonical_path]
            del function.parameters[parameter.name]
            for name, each in taken.all_members.items():
                function.parameters[name] = griffe.Parameter(
                    name, annotation=each.annotation, kind=griffe.ParameterKind.keyword_only, default="..."
                )
