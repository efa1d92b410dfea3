"""The outputs of attention and feed-forward modules as cached tensors, as they are before the block gates them.

On a full-compute step that others are served from, what each of these modules returns is kept. On a skipped step each
returns the prediction, and everything around them is computed: embeddings, norms, modulation, gates, residual additions
and final layers. With ``reuse`` this is FORA (arXiv:2407.01425, section 3), with ``taylor1`` and ``taylor2`` TaylorSeer
(arXiv:2503.06923, section 3.2), over divided differences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from cemq.errors import ModelError
from cemq.families import JOINT, JOINT_INPUTS, cached_modules
from cemq.runtime.cached.inner import Arguments, Forward, InnerCache, StrayError, block_stack
from cemq.runtime.history import Weighted, copied, summed


class Part(NamedTuple):
    """A module of a block. What is not kept feeds one that is, and returns zeros on skipped steps."""

    block: int
    name: str
    kept: bool = True


@dataclass(frozen=True, eq=False)
class _Zeros:
    """Zeros in the shape of an output that is not kept; they take no memory, and stay out of sums."""

    values: torch.Tensor

    @classmethod
    def shaped_as(cls, leaf: Any) -> Any:
        return cls(leaf.new_zeros(()).expand(leaf.shape)) if torch.is_tensor(leaf) else leaf


@dataclass(eq=False)
class _Pass:
    """One pass through the denoiser: its modules run and their outputs are noted, or they return these."""

    computes: bool
    outputs: list[tuple[Part, Any, Any]] = field(default_factory=list)  # with shapes of arguments, in order of calls
    served: int = 0

    def note(self, position: Part, module: nn.Module, arguments: Arguments, output: Any) -> None:
        kept = tree_map(copied if position.kept else _Zeros.shaped_as, output)
        self.outputs.append((position, _shapes(arguments), kept))

    def serve(self, position: Part, arguments: Arguments) -> Any:
        if self.served == len(self.outputs):
            raise StrayError
        part, shapes, output = summed(self.outputs[self.served])
        if part != position or shapes != _shapes(arguments):
            raise StrayError
        self.served += 1
        return tree_map(lambda leaf: leaf.values if isinstance(leaf, _Zeros) else leaf, output)


def _shapes(arguments: Arguments) -> tuple[torch.Size, ...]:
    return tuple(value.shape for value in arguments.values() if torch.is_tensor(value))


def find_parts(denoiser: nn.Module) -> dict[nn.Module, Part]:
    """The attention and feed-forward modules of all blocks, by the names in `cemq.families`.

    Raises:
        ModelError: The denoiser has no list of blocks, or a block has no such module.
    """
    found: dict[nn.Module, Part] = {}
    for number, block in enumerate(block_stack(denoiser)):
        names = _parts_of(block)
        if not names:
            raise ModelError(
                f"{type(block).__name__} has no attention or feed-forward module that cemq knows by name, so that "
                "none can be cached; use cache='output'"
            )
        found |= {module: Part(number, name, kept) for name, (module, kept) in names.items()}
    return found


def _parts_of(block: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    children = dict(block.named_children())
    if len(children) == 1:  # HiDream wraps its blocks
        return _parts_of(*children.values())
    kept = cached_modules(children)
    fed = JOINT_INPUTS if kept == JOINT[1:] else ()
    return {name: (child, name in kept) for name, child in children.items() if name in (*kept, *fed)}


class ModuleCache(InnerCache):
    """What `ScheduleHook` keeps and serves where modules are cached; hooks every one of them in one denoiser.

    Raises:
        ModelError: As `find_parts`.
    """

    cached: str = "modules"
    strayed: str = "which of them it calls depends on what they return"

    def __init__(self, denoiser: nn.Module):
        super().__init__(denoiser, find_parts)
        kept = [part for part in find_parts(denoiser).values() if part.kept]
        names = ", ".join(dict.fromkeys(part.name for part in kept))
        self.contents: str = f"{len(kept)} outputs of {len({part.block for part in kept})} blocks ({names})"

    @torch.compiler.disable(recursive=False)
    def compute(self, forward: Forward, *, wanted: bool, shapes: Any) -> tuple[Any, Any]:
        """The denoiser's output and, if they are wanted, those of its modules.

        Raises:
            ModelError: The denoiser's output is not given back where its modules return what they just have.
        """
        if not wanted:
            return forward(), None
        recorded = _Pass(computes=True)
        output = self.hooks.run(forward, recorded)
        if not recorded.outputs:
            self._refuse("it calls none of them")
        if shapes not in self._checked:
            again = self.serve(forward, self._as_prediction(recorded))
            self._check(output, again)
            self._checked.add(shapes)
        return output, recorded.outputs

    @torch.compiler.disable(recursive=False)
    def serve(self, forward: Forward, outputs: list[tuple[Part, Any, Any]]) -> Any:
        """The denoiser's output where its modules return these; None if others are called now."""
        current = _Pass(computes=False, outputs=outputs)
        try:
            output = self.hooks.run(forward, current)
        except StrayError:
            return None
        return output if current.served == len(outputs) else None

    @torch.compiler.disable()
    def _as_prediction(self, recorded: _Pass) -> Any:
        return tree_map(lambda leaf: Weighted((leaf,), (1.0,)), recorded.outputs)
