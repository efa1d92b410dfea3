"""H2-Cache (arXiv:2510.27171): blocks that make the structure and blocks that make the detail, each with a threshold.

Blocks are parted into two stages. The first block of each stage always runs, and ``r`` is what it adds to what it is
given. With ``r'`` for that of the latest call that computed the stage, ``|.|`` for means of absolute values and ``P``
for averages over squares of neighbouring tokens and channels, the rest of the stage is served as long as

    |P r - P r'| / |P r'|  <  the threshold of the stage

from what the rest of it has added then. Where the first stage is served the second one is too, whatever ``r`` is there.
The squares are as large as it takes to leave 2048 rows of tokens in the first stage and 384 in the second. ``r`` is
that of the picture's tokens in the first, of all tokens in the second. No step is computed but the first.

As released for FLUX, whose stages are its 19 blocks of two streams and its 38 of one. Where all blocks are of one class
neither paper nor release says where they part: the first third is taken, which is FLUX's share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn.functional import avg_pool2d
from torch.utils._pytree import tree_flatten, tree_unflatten

from cemq.errors import InputError, ModelError
from cemq.runtime.cached.inner import StrayError
from cemq.runtime.cached.residual import Route, added, difference, route_of
from cemq.runtime.history import copied
from cemq.runtime.policies import Inside, Place, StepCall, refuse_fewer, refuse_negative, register_policy

_ROWS = (2048, 384)  # that are left of each stage's tokens, at least


@register_policy
@dataclass(frozen=True, kw_only=True)
class H2Cache:
    """Settings of H2-Cache.

    Args:
        threshold: Relative change of what the first block adds, from which on the first stage is computed; 0 computes
            it on every step. As released 0.15.
        detail_threshold: Likewise of the second stage.
        structure_blocks: How many blocks the first stage has; 0 takes those of the first block's class, or a third of
            all where there is no other class.
        cache: No other will do.

    Raises:
        InputError: A negative threshold or number of blocks, or another cache.
    """

    name: ClassVar[str] = "h2-cache"
    threshold: float
    detail_threshold: float = 0.22
    structure_blocks: int = 0
    cache: str = "inside"

    def __post_init__(self) -> None:
        refuse_negative(self, "threshold", "detail_threshold")
        refuse_fewer(self, at_least=0, structure_blocks=self.structure_blocks)
        if self.cache != "inside":
            raise InputError(f"h2-cache: cache={self.cache}: it answers blocks itself, take cache=inside")

    def begin(self, num_steps: int) -> _Staged:
        return _Staged(self)


@dataclass
class _Stage:
    summary: torch.Tensor | None = None  # of what its first block added when it was computed
    residual: list[Any] = field(default_factory=list)  # what the others added then, flattened
    last: int = 0  # which of all calls of blocks was the last of it


@dataclass
class _Stream:
    shapes: Any = None
    stages: tuple[_Stage, _Stage] = field(default_factory=lambda: (_Stage(), _Stage()))
    routes: dict[Place, Route] = field(default_factory=dict)


class _Staged:
    """H2-Cache in one run, for each stream of calls by itself."""

    most_kept = 1  # of two stages, a residual each

    def __init__(self, settings: H2Cache) -> None:
        self._settings = settings
        self._streams: defaultdict[Hashable, _Stream] = defaultdict(_Stream)

    def decide(self, call: StepCall) -> Inside:
        if self._streams[call.stream].shapes != call.shapes:  # nothing that is kept fits
            self._streams[call.stream] = _Stream(shapes=call.shapes)
        return _Call(self._settings, self._streams[call.stream])

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        return ()


class _Call:
    """One call of the denoiser."""

    def __init__(self, settings: H2Cache, stream: _Stream) -> None:
        self._settings, self._stream = settings, stream
        self._blocks = 0  # that were called
        self._number = 0  # of the stage
        self._served = False  # whether the stage is
        self._is_open = False  # whether what it is served is still to be added
        self._first: list[Any] = []  # what its first block returned, flattened
        self._latest: list[Any] = []

    def answer(self, place: Place, arguments: Mapping[int | str, Any], run: Callable[..., Any]) -> Any:
        if place.module is not None:
            return run()
        number = self._blocks
        self._blocks += 1
        if number in (0, second_stage(place.stack, self._settings.structure_blocks)):
            return self._begin(number, place, arguments, run)
        if not self._served:
            return self._noted(place, arguments, run())
        stage, route = self._stream.stages[self._number], self._stream.routes.get(place)
        if route is None:
            raise StrayError
        leaves = route.handed_on(arguments)
        if number == stage.last:
            leaves, self._is_open = added(leaves, stage.residual), False
        return tree_unflatten(leaves, route.structure)

    def end(self) -> bool:
        self._close(self._blocks - 1)
        return not self._is_open

    def _begin(self, number: int, place: Place, arguments: Mapping[int | str, Any], run: Callable[..., Any]) -> Any:
        """The first block of a stage, which says whether the others are served."""
        before_is_served = number > 0 and self._served
        if number > 0:
            if self._is_open:
                raise StrayError
            self._close(number - 1)
            self._number = 1
        stage = self._stream.stages[self._number]
        output = self._noted(place, arguments, run())
        self._first = self._latest
        summary = summarized(self._stream.routes[place], arguments, self._first, detail=self._number == 1)
        self._served = stage.summary is not None and (before_is_served or self._is_alike(stage.summary, summary))
        if not self._served:
            stage.summary = summary
        self._is_open = self._served and stage.last > number
        return output

    def _is_alike(self, before: torch.Tensor, now: torch.Tensor) -> bool:
        threshold = (self._settings.threshold, self._settings.detail_threshold)[self._number]
        return ((before - now).abs().mean() / before.abs().mean().clamp_min(1e-20)).item() < threshold

    def _noted(self, place: Place, arguments: Mapping[int | str, Any], output: Any) -> Any:
        if place not in self._stream.routes:
            self._stream.routes[place] = route_of(place.stack[place.block], arguments, output)
        self._latest = [copied(leaf) for leaf in tree_flatten(output)[0]]
        return output

    def _close(self, last: int) -> None:
        """A stage has ended with this call of a block."""
        if self._served:
            return
        if not _continues(self._first, self._latest):
            raise ModelError(
                f"h2-cache: blocks of stage {self._number + 1} return other shapes than its first one, so none can be "
                "served: set structure_blocks to where shapes change, or take another policy"
            )
        found = difference(self._latest, self._first)
        stage = self._stream.stages[self._number]
        stage.residual, stage.last = [_rounded(*pair) for pair in zip(found, self._latest, strict=True)], last


def second_stage(stack: Sequence[str], structure_blocks: int = 0) -> int:
    """Which block the second stage begins with.

    >>> second_stage(["double"] * 19 + ["single"] * 38), second_stage(["one"] * 12), second_stage(["one"] * 12, 5)
    (19, 4, 5)
    """
    another = next((number for number, kind in enumerate(stack) if kind != stack[0]), max(len(stack) // 3, 1))
    return structure_blocks or another


def summarized(route: Route, arguments: Mapping[int | str, Any], output: list[Any], *, detail: bool) -> torch.Tensor:
    """What a block has added, averaged over squares of tokens and channels.

    Args:
        output: What it returned, flattened.
        detail: Of all that it hands on, in its order; else of its first argument alone, which is the sample's.
    """
    first = next(key for key in arguments if key in route.sources)
    changes = [
        leaf.float() - arguments[source].float()
        for source, leaf in zip(route.sources, output, strict=True)
        if source is not None and (detail or source == first)
    ]
    rows = torch.cat([change.reshape(change.shape[0], -1, change.shape[-1]) for change in changes], dim=1)
    side = min(max(rows.shape[1] // _ROWS[detail], 1), rows.shape[2])
    return avg_pool2d(rows[:, None], side, side)[:, 0]


def _continues(first: list[Any], last: list[Any]) -> bool:
    """Whether every tensor that a stage's last block returns has one of its shape in what its first one did."""
    if len(first) != len(last):
        return False
    pairs = zip(first, last, strict=True)
    return all(torch.is_tensor(one) and one.shape == end.shape for one, end in pairs if torch.is_tensor(end))


def _rounded(change: Any, like: Any) -> Any:
    return change.to(like.dtype) if torch.is_tensor(change) else change
