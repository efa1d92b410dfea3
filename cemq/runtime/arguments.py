"""Where the sample and the timestep are among the arguments of a call of a denoiser."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from cemq.families import TIMESTEP_ARGUMENTS


class DenoiserArguments:
    """Of one denoiser. The sample is its first argument, the timestep is told by name."""

    def __init__(self, denoiser: nn.Module) -> None:
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._places: dict[str, tuple[int, str]] = {"sample": (0, names[0])} if names else {}
        for name in TIMESTEP_ARGUMENTS:
            if name in names:
                self._places.setdefault("timestep", (names.index(name), name))

    def sample(self, args: Any, kwargs: Any) -> torch.Tensor:
        """A tensor; lists of them, one a picture, are put together."""
        found = self._given("sample", args, kwargs)
        if isinstance(found, (list, tuple)):
            first, *others = found
            return torch.cat([each.reshape(-1) for each in found]) if others else first
        return found

    def timestep(self, args: Any, kwargs: Any) -> Any:
        """As it is given; None where it cannot be told."""
        return self._given("timestep", args, kwargs)

    def replaced(self, args: Any, kwargs: Any, **others: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another ``sample`` or ``timestep``."""
        args, kwargs = list(args), dict(kwargs)
        for what, value in others.items():
            position, name = self._places[what]
            if what == "sample" and isinstance(self._given(what, args, kwargs), (list, tuple)):
                value = self._split(value, self._given(what, args, kwargs))
            if position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs

    def _given(self, what: str, args: Any, kwargs: Any) -> Any:
        if what not in self._places:
            return None
        position, name = self._places[what]
        return args[position] if position < len(args) else kwargs.get(name)

    def _split(self, value: torch.Tensor, like: Any) -> list[torch.Tensor]:
        parts = value.reshape(-1).split([each.numel() for each in like])
        return [part.view_as(each) for part, each in zip(parts, like, strict=True)]
