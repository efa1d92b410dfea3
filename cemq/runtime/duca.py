"""DuCa (arXiv:2412.18911): between computed steps, the feed-forward layers of a few tokens, or nothing at all.

After a computed step, steps are in turn

* cautious: attention is served from its latest outputs, and so is feed-forward but for a share of the tokens, for which
  it is computed anew and kept. Tokens are drawn by chance; those that were not drawn for long, and one of every two by
  two, are more likely to be.
* aggressive: no block runs; what the last one returned goes to the final layers.

As in the release for DiT with random scores, which the paper finds as good as scores of attention. With steps ``t``
counted down to 0, an interval of ``N`` steps is ``round(N / (1.4 - 0.8 t / T))``, but 2 from ``0.2 T`` to ``0.4 T``; a
step is computed where the interval since the latest computed one divides ``t``, so that the last one is. Drawn is the
share ``2.5 (3 - 4 t / T) (0.8 + 0.4 l) fresh``, for blocks at depth ``l`` from 0 to 1, of the tokens by the score

    random in [0, 1]  +  age_weight * steps since the token was computed / N,    times 1.8 for the best of each 2 by 2

Changed: whether a step is computed is settled once for all of its blocks, where the release asks anew in every block,
and its first block has already changed the interval; all samples and branches of guidance draw the same tokens; the
bonus is given where the tokens are as many as a square of even side has. Left out: tokens of blocks that join attention
and feed-forward in one projection (FLUX's single ones), which are served whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils._pytree import tree_map

from cemq.errors import InputError
from cemq.families import FEED_FORWARD, matches
from cemq.runtime.history import copied
from cemq.runtime.policies import (
    Inside,
    Place,
    StepCall,
    refuse_fewer,
    refuse_negative,
    refuse_no_share,
    register_policy,
)

Kind = Literal["full", "cautious", "aggressive"]
_BONUS = 0.8  # of its score, to the best token of each two by two


@register_policy
@dataclass(frozen=True, kw_only=True)
class DuCa:
    """Settings of DuCa.

    Args:
        interval: Steps from one computed one to the next, before they are stretched early and shortened late.
        fresh: Share of the tokens that feed-forward is computed for on cautious steps, before it is varied by step and
            depth; 0 computes none, and leaves the interval as it is.
        age_weight: Of the time since a token was computed.
        seed: Of the random scores.
        cache: No other will do.

    Raises:
        InputError: An interval below 1, a share outside of 0 to 1, a negative weight, or another cache.
    """

    name: ClassVar[str] = "duca"
    interval: int
    fresh: float = 0.05
    age_weight: float = 0.25
    seed: int = 0
    cache: str = "inside"

    def __post_init__(self) -> None:
        refuse_fewer(self, at_least=1, interval=self.interval)
        refuse_no_share(self, "fresh")
        refuse_negative(self, "age_weight")
        refuse_fewer(self, at_least=0, seed=self.seed)
        if self.cache != "inside":
            raise InputError(f"duca: cache={self.cache}: it answers blocks itself, take cache=inside")

    def begin(self, num_steps: int) -> _Alternating:
        return _Alternating(self, num_steps)


def duca_steps(num_steps: int, interval: int, *, varied: bool = True) -> tuple[Kind, ...]:
    """What every step is; the noisiest comes first.

    >>> duca_steps(12, 3)[-5:]
    ('cautious', 'full', 'full', 'cautious', 'full')
    """
    found: list[Kind] = []
    current = interval
    for step in range(num_steps - 1, -1, -1):
        since = step % current
        if since and step < num_steps - 1:
            found.append("cautious" if since % 2 else "aggressive")
            continue
        found.append("full")
        if varied:
            # in single precision, as released: where it lies between two whole numbers, rounding decides
            current = max(int(np.round(np.float32(interval) / np.float32(1.4 - 0.8 * step / num_steps))), 1)
            if int(num_steps * 0.2) <= step < int(num_steps * 0.4):
                current = 2
    return tuple(found)


@dataclass
class _Stream:
    shapes: Any = None
    kept: dict[Place, Any] = field(default_factory=dict)  # what modules returned
    ages: dict[Place, torch.Tensor] = field(default_factory=dict)  # of tokens, in cautious steps
    blank: list[Any] = field(default_factory=list)  # zeros in the shapes of what blocks returned, in order of calls
    last: Any = None  # what the last of them returned


class _Alternating:
    """DuCa in one run."""

    most_kept = 1

    def __init__(self, settings: DuCa, num_steps: int) -> None:
        self._settings = settings
        self._kinds = duca_steps(num_steps, settings.interval, varied=settings.fresh > 0)
        self._streams: defaultdict[Hashable, _Stream] = defaultdict(_Stream)

    def decide(self, call: StepCall) -> Inside:
        stream, kind = self._streams[call.stream], self._kinds[call.step]
        if stream.shapes != call.shapes:  # nothing that is kept fits
            kind = "full"
        if kind == "full":
            stream = self._streams[call.stream] = _Stream(shapes=call.shapes)
        return _Call(self._settings, stream, kind, call.step, call.num_steps)

    def keeps(self, call: StepCall, *, served: bool) -> Collection[int]:
        return ()


class _Call:
    """One call of the denoiser."""

    def __init__(self, settings: DuCa, stream: _Stream, kind: Kind, step: int, num_steps: int) -> None:
        self._settings, self._stream, self._kind = settings, stream, kind
        self._step, self._num_steps = step, num_steps
        self._blocks = 0  # that were called

    def answer(self, place: Place, arguments: Mapping[int | str, Any], run: Callable[..., Any]) -> Any:
        if place.module is None:
            return self._block(run)
        kept = self._stream.kept.get(place)
        if self._kind == "full" or kept is None:
            output = run()
            self._stream.kept[place] = tree_map(_blank if place.feeds else copied, output)
            return output
        if not place.feeds and matches(place.module, FEED_FORWARD):
            self._renew(place, arguments, kept, run)
        return kept if place.feeds else tree_map(copied, kept)

    def end(self) -> bool:
        return self._blocks == len(self._stream.blank)

    def _block(self, run: Callable[..., Any]) -> Any:
        number, blank = self._blocks, self._stream.blank
        self._blocks += 1
        if self._kind == "aggressive" and number < len(blank):
            return tree_map(copied, self._stream.last) if number == len(blank) - 1 else blank[number]
        output = run()
        if self._kind == "full":
            blank.append(tree_map(_blank, output))
        if number == len(blank) - 1:
            self._stream.last = tree_map(copied, output)
        return output

    def _renew(self, place: Place, arguments: Mapping[int | str, Any], kept: Any, run: Callable[..., Any]) -> None:
        """Compute some of a module's tokens anew, in what is kept of it."""
        given = next((value for value in arguments.values() if torch.is_tensor(value)), None)
        if given is None or given.dim() != 3 or not torch.is_tensor(kept) or kept.shape[:2] != given.shape[:2]:
            return
        tokens = given.shape[1]
        ages = self._stream.ages.setdefault(place, torch.zeros(tokens, dtype=torch.float32, device="cpu"))
        drawn = self._scores(ages, place.block).argsort(descending=True)[: int(self._share(place) * tokens)]
        ages += 1
        ages[drawn] = 0
        if len(drawn):
            chosen = drawn.to(given.device)
            kept.index_copy_(1, chosen, run(given.index_select(1, chosen)).to(kept.dtype))

    def _share(self, place: Place) -> float:
        """Of the tokens, at this step and depth."""
        remaining = (self._num_steps - 1 - self._step) / self._num_steps
        depth = place.block / max(len(place.stack) - 1, 1)
        return min(max(2.5 * (3 - 4 * remaining) * (0.8 + 0.4 * depth) * self._settings.fresh, 0.0), 1.0)

    def _scores(self, ages: torch.Tensor, block: int) -> torch.Tensor:
        chance = np.random.default_rng([self._settings.seed, self._step, block]).random(len(ages), dtype=np.float32)
        return with_bonus(torch.from_numpy(chance) + self._settings.age_weight * ages / self._settings.interval)


def with_bonus(scores: torch.Tensor) -> torch.Tensor:
    """Scores of tokens, row by row, with 1.8 times its own for the best of each two by two.

    They stay as they are where they are not as many as a square of even side has.
    """
    side = math.isqrt(len(scores))
    if side % 2 or side * side != len(scores):
        return scores
    half = side // 2
    cells = scores.view(half, 2, half, 2).transpose(1, 2).reshape(half, half, 4)
    best = cells.argmax(-1, keepdim=True)
    raised = cells.scatter(-1, best, cells.gather(-1, best) * (1 + _BONUS))
    return raised.view(half, half, 2, 2).transpose(1, 2).reshape(-1)


def _blank(leaf: Any) -> Any:
    """Zeros in the shape of a tensor, which take no memory."""
    return leaf.new_zeros(()).expand(leaf.shape) if torch.is_tensor(leaf) else leaf
