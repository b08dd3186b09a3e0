"""Makes Triton interpret, before anything imports it, and draws."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest

interpreter.prepare()

import torch  # noqa: E402


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are divided among programs wherever there are two tiles, though so few would not pay."""
    from hal_cuda.tiling import CudaTiling, Splits

    def splits(self: CudaTiling, request: Any, tiles: Any, len_q: int, len_k: int, batch: int) -> Splits:
        steps = -(-len_k // tiles.keys)
        each = -(-steps // min(steps, 16))
        return Splits(-(-steps // each), each * tiles.keys)

    monkeypatch.setattr(CudaTiling, "splits", splits)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
