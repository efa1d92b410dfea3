"""A small convolutional network that names what is on a picture: trained apart from the models that it judges."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

BATCH = 128


def train_judge(
    pictures: Callable[[torch.Generator, int], tuple[torch.Tensor, torch.Tensor]],
    *,
    channels: int,
    size: int,
    classes: int,
    steps: int,
) -> nn.Module:
    """Train for ``steps`` batches of pictures (n, channels, size, size) in [-1, 1] and their numbers."""
    torch.manual_seed(11)
    widths, layers = (channels, 16, 32, 64, 128), []
    for before, after in itertools.pairwise(widths):
        if size < 8:  # as far down as 4 x 4
            break
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
        size //= 2
    flat = size * size * layers[-2].out_channels
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(flat, classes))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(steps):
        images, labels = pictures(torch.Generator().manual_seed(step), BATCH)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def named(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The number that the network gives each picture."""
    return torch.cat([network(part).argmax(1) for part in images.split(BATCH)])
