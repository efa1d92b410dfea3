"""Calls of blocks and of their modules, answered one by one by a policy that has ``cache="inside"``.

Nothing is kept here. Every block of a denoiser and every attention and feed-forward module in them is hooked; on a call
about which the policy decided so, each asks it what to return. What that took is counted in modules: a module that is
run on a part of its tokens counts for that part, one that is not called or not run for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cemq.errors import ModelError
from cemq.pipelines.outputs import first_tensor
from cemq.runtime.cached.inner import Answers, Forward, InnerHooks, StrayError, block_stack
from cemq.runtime.cached.modules import find_parts
from cemq.runtime.policies import Inside, Place


def _places(denoiser: nn.Module) -> dict[nn.Module, Place]:
    """Raises ModelError as `find_parts` does."""
    stack = block_stack(denoiser)
    kinds = tuple(type(block).__name__ for block in stack)
    blocks = {block: Place(number, kinds) for number, block in enumerate(stack)}
    parts = find_parts(denoiser).items()
    return blocks | {module: Place(part.block, kinds, part.name, not part.kept) for module, part in parts}


@dataclass(eq=False)
class _Asking(Answers):
    """One call of the denoiser."""

    inside: Inside
    computed: float = 0.0  # modules

    def call(self, position: Place, args: Any, kwargs: Any, forward: Callable[..., Any]) -> Any:
        sizes: list[int] = []

        def run(first: torch.Tensor | None = None) -> Any:
            given = (args, kwargs) if first is None else _with_first(args, kwargs, first)
            output = forward(*given[0], **given[1])
            if position.module is not None:
                sizes.append(first_tensor(output).numel())
            return output

        answer = self.inside.answer(position, dict(enumerate(args)) | kwargs, run)
        if sizes:
            self.computed += sum(sizes) / first_tensor(answer).numel()
        return answer


@dataclass(eq=False)
class _Noting(Answers):
    """One call of the denoiser, which runs as it is."""

    outputs: list[Any] = field(default_factory=list)

    def call(self, position: Place, args: Any, kwargs: Any, forward: Callable[..., Any]) -> Any:
        output = forward(*args, **kwargs)
        if position.module is not None and not position.feeds:
            self.outputs.append(output)
        return output


def _with_first(args: Any, kwargs: Any, first: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call with another first tensor."""
    args, kwargs = list(args), dict(kwargs)
    place: Any = next(key for key, value in (*enumerate(args), *kwargs.items()) if torch.is_tensor(value))
    (kwargs if isinstance(place, str) else args)[place] = first
    return args, kwargs


class InsideCache:
    """What `ScheduleHook` has hooked where a policy answers blocks and modules itself.

    Raises:
        ModelError: The denoiser has no list of blocks, or a block has no module known by name.
    """

    def __init__(self, denoiser: nn.Module):
        self._denoiser, self._parts = denoiser, len(find_parts(denoiser))
        self.hooks: InnerHooks = InnerHooks(denoiser, _places)
        # what a policy keeps is its own business: of a full-compute step hardly more than this
        self.contents: str = f"outputs of {self._parts} modules of {len(block_stack(denoiser))} blocks, at most"

    def answered(self, forward: Forward, inside: Inside) -> tuple[Any, float]:
        """The denoiser's output, and the share of its modules that was computed for it.

        Raises:
            ModelError: It calls other blocks than the policy can answer for.
        """
        asking = _Asking(inside)
        strayed = ModelError(
            f"{type(self._denoiser).__name__} calls other blocks than on the step that its policy serves it from: "
            "take a policy with cache=output"
        )
        try:
            output = self.hooks.run(forward, asking)
        except StrayError:
            raise strayed from None
        if not inside.end():
            raise strayed
        return output, min(asking.computed / self._parts, 1.0)

    @torch.compiler.disable(recursive=False)
    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Any]:
        """The denoiser's output and, if it is asked what may be kept, what its modules return."""
        if not wanted:
            return forward(), None
        noting = _Noting()
        return self.hooks.run(forward, noting), noting.outputs

    def serve(self, forward: Forward, prediction: Any) -> Any:
        raise AssertionError("nothing is kept to be served from")

    def install(self) -> None:
        self.hooks.install()

    def remove(self) -> None:
        self.hooks.remove()
