"""Makes Triton interpret, before anything imports it, and draws."""

from __future__ import annotations

import interpreter
import pytest

interpreter.prepare()

import torch  # noqa: E402


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
