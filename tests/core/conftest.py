"""Fake devices for the core's tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hal_core as hal

sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeBackend


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeBackend]]:
    """fake("alpha", time=1e-9, ...): registers a `FakeBackend`, and unregisters it after the test."""
    names: list[str] = []

    def register(name: str, **traits: Any) -> FakeBackend:
        backend = FakeBackend(name, **traits)
        hal.register(backend, name=name)
        names.append(name)
        return backend

    yield register
    for name in names:
        with contextlib.suppress(hal.UnknownBackendError):  # the test itself may have unregistered it
            hal.unregister(name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cpu() -> str:
    """The CPU plugin's device; tests of it are skipped where it is not installed."""
    try:
        return hal.session("cpu:0") and "cpu:0"
    except hal.HalError as error:
        pytest.skip(f"the CPU plugin is not installed here: {error}")
