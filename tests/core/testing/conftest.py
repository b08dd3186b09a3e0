"""One thread: these tensors are tiny, and other processes may keep the cores busy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hal_core as hal
from hal_core.testing.faulty_backends import DenseBackend

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def honest() -> Iterator[DenseBackend]:
    """The honest device, registered as "honest"."""
    backend = DenseBackend()
    hal.register(backend)
    yield backend
    hal.unregister("honest")
