"""What the first blocks of a denoiser make of sample and timestep, without computing the rest."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from cemq.errors import ModelError
from cemq.runtime.cached.inner import block_stack
from cemq.runtime.policies import Probe

_EMBEDDINGS = ("temb", "timestep_proj", "timestep", "adaln_input", "time_emb")  # how blocks name that of the timestep


class _ReachedError(Exception):
    """Everything that was asked for is known."""

    def __init__(self, found: torch.Tensor) -> None:
        super().__init__()
        self.found = found


def modulated_input(denoiser: nn.Module, forward: Callable[[], Any]) -> torch.Tensor:
    """What the first normalization of the first block gives, where that takes the timestep's embedding too; else the
    embedding that the block is given, or its sample where it is given none. The denoiser is run up to there.

    Args:
        forward: Runs the denoiser.

    Raises:
        ModelError: It has no list of blocks.
    """
    block = block_stack(denoiser)[0]
    norm = getattr(block, "norm1", None)
    thread = threading.get_ident()  # another may run the same denoiser for another pipeline
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    given: dict[str, Any] = {}

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return
        given.update(zip(names, args, strict=False), **kwargs)
        if norm is None:
            raise _ReachedError(_unmodulated(given))

    def normalized(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        found = output[0] if isinstance(output, (tuple, list)) else output
        tensors = [each for each in (*args, *kwargs.values()) if torch.is_tensor(each)]
        raise _ReachedError(found.detach() if len(tensors) > 1 else _unmodulated(given))

    with ExitStack() as hooks:
        hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if norm is not None:
            hooks.callback(norm.register_forward_hook(normalized, with_kwargs=True).remove)
        try:
            forward()
        except _ReachedError as reached:
            return reached.found.clone()
    raise AssertionError(f"{type(denoiser).__name__} ran without its first block")


def _unmodulated(given: dict[str, Any]) -> torch.Tensor:
    tensors = {name: value for name, value in given.items() if torch.is_tensor(value) and value.is_floating_point()}
    named = next((tensors[name] for name in _EMBEDDINGS if name in tensors), None)
    return (next(iter(tensors.values())) if named is None else named).detach()


def probed(denoiser: nn.Module, forward: Callable[[], Any], blocks: int) -> Probe:
    """The hidden states of the sample before the first block and after so many; the denoiser is run up to there.

    They are the first tensor that a block takes, and of what it returns the tensor of that shape; of several the
    nearest, for blocks add to what they are given.

    Args:
        forward: Runs the denoiser.

    Raises:
        ModelError: It has no list of blocks, or not so many, or the blocks return none of that shape.
    """
    stack, name = block_stack(denoiser), type(denoiser).__name__
    if blocks > len(stack):
        raise ModelError(f"{name} has {len(stack)} blocks: probe no more than these, found {blocks}")
    thread = threading.get_ident()
    found: list[torch.Tensor] = []

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == thread and not found:
            found.append(_first_taken(block, args, kwargs).clone())

    def leave(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        given = _first_taken(block, args, kwargs)
        alike = [each for each in tree_flatten(output)[0] if torch.is_tensor(each) and each.shape == found[0].shape]
        if not alike:
            raise ModelError(f"block {blocks} of {name} returns nothing in the shape that the first one is given")
        if len(alike) > 1:
            alike.sort(key=lambda each: (each.float() - given.float()).norm().item())
        raise _ReachedError(alike[0].detach())

    with ExitStack() as hooks:
        hooks.callback(stack[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(stack[blocks - 1].register_forward_hook(leave, with_kwargs=True).remove)
        try:
            forward()
        except _ReachedError as reached:
            return Probe(found[0], reached.found.clone())
    raise AssertionError(f"{name} ran without its block {blocks}")


def _first_taken(block: nn.Module, args: Any, kwargs: Any) -> torch.Tensor:
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    ordered = [given[name] for name in (*names, *given) if name in given]
    return next(each for each in ordered if torch.is_tensor(each) and each.is_floating_point()).detach()
