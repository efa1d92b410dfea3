"""How much arithmetic a run is, by the shapes of a folder's weights: nothing is loaded, and nothing run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from cemq.families import DENOISERS, OF_TEXT, matches
from cemq.memory.footprint import FEW_ROWS, Headers, Picture, Tensor, widths

_LEVEL = re.compile(r"\bup_blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Multiplications and additions, and the calls of layers that they are spread over."""

    operations: float = 0.0
    layers: float = 0.0

    def __add__(self, other: Arithmetic) -> Arithmetic:
        return Arithmetic(operations=self.operations + other.operations, layers=self.layers + other.layers)

    def __mul__(self, factor: float) -> Arithmetic:
        return Arithmetic(operations=self.operations * factor, layers=self.layers * factor)


@dataclass(frozen=True, kw_only=True)
class RunArithmetic:
    """What one sample takes, all branches of guidance together.

    Args:
        step: The denoiser, once.
        around: What a run does once: text encoders and autoencoder.
        inputs: Rows of the denoiser's batch.
        tokens: Of each of them, text and picture.
        width: Of a token between blocks.
        widest: The most features that a token has inside a block.
    """

    step: Arithmetic
    around: Arithmetic
    inputs: int
    tokens: int
    width: int
    widest: int


def run_arithmetic(headers: Headers) -> RunArithmetic:
    """The work of one sample, where ``headers`` are those of a call that draws several at once or one.

    Linear layers are counted exactly, but for how many tokens of text each sees; attention as if all of it were from
    each token to each other; convolutions by the size of the picture at their level. Of a UNet it is a guess.
    """
    picture, name = headers.picture, next(name for name in DENOISERS if name in headers.tensors)
    inputs, rows = picture.samples * picture.branches, headers.rows(name)
    width, widest = widths(headers.tensors[name])
    denoisers = [each for each in DENOISERS if each in headers.tensors]  # of several each step runs one
    steps = sum((_denoiser(headers, each) for each in denoisers), Arithmetic())
    around = Arithmetic()
    for each, tensors in headers.tensors.items():
        if headers.role(each) == "vae":
            around += _decoder(tensors, picture)
        elif headers.role(each) == "other":
            around += _linear(tensors, headers.rows(each), headers.rows(each), inputs)
    return RunArithmetic(
        step=steps * (1 / len(denoisers) / picture.samples), around=around * (1 / picture.samples),
        inputs=inputs, tokens=max(1, rows // inputs), width=width, widest=widest,
    )  # fmt: skip


def _denoiser(headers: Headers, name: str) -> Arithmetic:
    tensors, picture, rows = headers.tensors[name], headers.picture, headers.rows(name)
    inputs = picture.samples * picture.branches
    if name == "unet":
        pixels = rows - inputs * picture.text_tokens
        return _convolutions(tensors, pixels) * 2 + _linear(tensors, pixels // 4, pixels // 4, inputs)
    queries = [tensor for tensor in tensors if re.search(r"\.(to_q|to_qkv|qkv)\.weight$", tensor.name)]
    attention = sum(4 * (rows / inputs) * rows * min(tensor.shape) for tensor in queries)
    return _linear(tensors, rows, inputs * picture.text_tokens, inputs) + Arithmetic(operations=attention)


def _linear(tensors: tuple[Tensor, ...], rows: int, text_rows: int, inputs: int) -> Arithmetic:
    """Of all linear layers; in blocks that have layers for the text, the others see the picture alone."""
    names = {tensor.name.removesuffix(".weight"): tensor for tensor in _weights(tensors, dimensions=2)}
    of_text = {name for name in names if matches(name, OF_TEXT) and not matches(name, FEW_ROWS)}
    parted, total = {_block(name) for name in of_text}, Arithmetic()
    for name, tensor in names.items():
        if matches(name, FEW_ROWS):
            seen = inputs
        elif name in of_text:
            seen = text_rows
        else:
            seen = rows - text_rows if _block(name) in parted else rows
        total += Arithmetic(operations=2 * prod(tensor.shape) * seen, layers=1)
    return total


def _block(name: str) -> str:
    """The block that a layer is in, of a list at the top; else the layer itself."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else name


def _decoder(tensors: tuple[Tensor, ...], picture: Picture) -> Arithmetic:
    """Of an autoencoder, from latents to pixels; frames as if all of them were there at every level."""
    decoder = tuple(tensor for tensor in tensors if tensor.name.startswith("decoder."))
    pixels = picture.samples * picture.frames * picture.height * picture.width
    return _convolutions(decoder, pixels)


def _convolutions(tensors: tuple[Tensor, ...], pixels: int) -> Arithmetic:
    """Of a decoder's levels, each of twice the side of the one before; the last one has so many pixels."""
    levels = [int(found[1]) for tensor in tensors if (found := _LEVEL.search(tensor.name))]
    deepest, total = max(levels, default=0), Arithmetic()
    for tensor in (each for dimensions in (4, 5) for each in _weights(tensors, dimensions)):
        found = _LEVEL.search(tensor.name)
        level = int(found[1]) if found else deepest if tensor.name.rpartition(".")[0].endswith("conv_out") else 0
        total += Arithmetic(operations=2 * prod(tensor.shape) * pixels / 4 ** (deepest - level), layers=1)
    return total


def _weights(tensors: tuple[Tensor, ...], dimensions: int) -> Iterator[Tensor]:
    return (each for each in tensors if len(each.shape) == dimensions and each.name.endswith(".weight"))
