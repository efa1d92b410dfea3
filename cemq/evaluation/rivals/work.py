"""What a pipeline computed, whatever skipped the rest: counted in its layers, not in anybody's own counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cemq.pipelines.opening import denoisers
from cemq.pipelines.outputs import first_tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Work:
    """Multiply-accumulates of the linear layers and convolutions of a pipeline's denoisers."""

    operations: float = 0.0


def _per_output(layer: nn.Module) -> float:
    """Multiply-accumulates of a layer for each number that it gives, 0 for what is no such layer."""
    if isinstance(layer, _CONVOLUTIONS):
        return layer.weight[0].numel()
    # of linear layers the quantized ones too, whosever they are
    return float(getattr(layer, "in_features", 0)) if hasattr(layer, "out_features") else 0.0


@contextmanager
def counted_work(pipe: DiffusionPipeline) -> Iterator[Work]:
    """Count what the denoisers compute within a ``with`` block.

    A block, a module or a step that is skipped runs none of its layers, so that caches of any make are counted alike.
    Products of attention have no layer and are not counted: they come and go with the layers around them.
    """
    work = Work()

    def note(layer: nn.Module, _: Any, output: Any, each: float) -> None:
        work.operations += each * first_tensor(output).numel()

    with ExitStack() as hooks:
        for _, denoiser in denoisers(pipe):
            for layer in denoiser.modules():
                if each := _per_output(layer):
                    handle = layer.register_forward_hook(lambda *call, each=each: note(*call, each=each))
                    hooks.callback(handle.remove)
        yield work
