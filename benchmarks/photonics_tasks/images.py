"""A residual network on small images, trained here: scikit-learn's handwritten digits (8 x 8), or CIFAR-10's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions around a residual; batch norms are digital."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norms[0](self.first(x)))
        out = self.norms[1](self.second(out))
        return functional.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResidualNetwork(nn.Module):
    """Three stages of `depth` blocks, a mean over the image, a linear classifier."""

    def __init__(self, channels: int = 1, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        sizes = [(width, width, 1)] * depth + [(width, 2 * width, 2)] + [(2 * width, 2 * width, 1)] * (depth - 1)
        sizes += [(2 * width, 4 * width, 2)] + [(4 * width, 4 * width, 1)] * (depth - 1)
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.classifier(out.mean((2, 3)))


def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and labels, test inputs and labels: a fifth of the 1,797 digits is the test.

    Images are [n, 1, 8, 8] within -0.5 to 0.5.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, rest = order[: len(order) // 5], order[len(order) // 5 :]
    return images[rest], labels[rest], images[test], labels[test]


def cifar(folder: Path, most: int = 5000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of CIFAR-10's binary files (data_batch_1.bin and test_batch.bin): the first images of each.

    Images are [n, 3, 32, 32] within -0.5 to 0.5.
    """
    found = []
    for name, count in (("data_batch_1.bin", most), ("test_batch.bin", most // 5)):
        rows = np.fromfile(folder / name, np.uint8).reshape(-1, 3073)[:count]
        images = torch.from_numpy(rows[:, 1:].astype(np.float32)).view(-1, 3, 32, 32) / 255 - 0.5
        found += [images, torch.from_numpy(rows[:, 0].astype(np.int64))]
    return found[0], found[1], found[2], found[3]
