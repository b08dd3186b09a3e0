"""Data sets as sequences of (image, label), which torch's DataLoader takes as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .mnist import MIRRORS, load_mnist

__all__ = ["MNIST", "load_mnist"]


class MNIST:
    """MNIST, indexed.

    Args:
        split, normalize, flatten, limit, root, mirrors: as for `load_mnist`.

    Attributes:
        images: float32 or uint8, [n, 1, 28, 28] or [n, 784]. labels: int64 [n]. classes: the digits' names.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        split: str = "test",
        normalize: bool = True,
        flatten: bool = False,
        limit: int | None = None,
        *,
        root: str | Path | None = None,
        mirrors: Sequence[str] = MIRRORS,
    ) -> None:
        self.split = split
        self.images, self.labels = load_mnist(split, normalize, flatten, limit, root=root, mirrors=mirrors)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.generic], int]:
        return self.images[index], int(self.labels[index])
