"""Models whose outputs are known by hand, and one small enough to be quantized in no time."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from cemq.quantize.calls import Call


class Times(nn.Module):
    """Multiplies by ``factor``, and counts how often."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, x):
        self.calls += 1
        return x * self.factor


class Block(nn.Module):
    """A gate of the step itself on attention (times 2) and feed-forward (times 3), each added to its input."""

    def __init__(self):
        super().__init__()
        self.attn, self.ff = Times(2), Times(3)

    def forward(self, x, gate):
        x = x + gate * self.attn(x)
        return x + gate * self.ff(x)


class Toy(ModelMixin, ConfigMixin):
    """Two layers fed alike, one after them, one that nothing reaches; ``calls`` counts."""

    @register_to_config
    def __init__(self, width: int = 100):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(width, 128), nn.Linear(width, 128)
        self.after, self.unused = nn.Linear(128, 64), nn.Linear(width, 64)
        self.calls = 0

    def forward(self, values, *, text=None, extras=()):
        self.calls += 1
        for extra in (text, *extras):
            if extra is not None:
                values = values + extra
        return {"sample": self.after(torch.relu(self.left(values) * self.right(values)))}


def toy_calls(count: int = 5, rows: int = 50, width: int = 100) -> list[Call]:
    """Calls of `Toy`, with inputs of little rank and some noise."""
    torch.manual_seed(1)
    mixing = torch.randn(width // 8, width)
    return [Call((torch.randn(rows, width // 8) @ mixing + 0.1 * torch.randn(rows, width),), {}) for _ in range(count)]
