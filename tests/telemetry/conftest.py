"""Telemetry that is switched off after each test, and the core's fake devices and installed plugins."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

import hal_telemetry
import torch
from hal_telemetry.recorder import recorder

import hal_core as hal
from hal_core.registry import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from fakes import FakeBackend
from installed import Site


@pytest.fixture(autouse=True)
def _switched_off() -> Iterator[None]:
    """Nothing is recorded before a test, and nothing after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recorder.reset()
    yield
    hal_telemetry.disable()
    torch.set_num_threads(threads)


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
        with contextlib.suppress(hal.UnknownBackendError):
            hal.unregister(name)


@pytest.fixture
def qkv(seed: int) -> list[torch.Tensor]:
    """Query, key and value of a small call."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, 1, 2, 8, 16, generator=generator).unbind(0))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Plugins installed in a folder, and processes that find them and the installed `telemetry`."""
    found = Site(tmp_path)
    found.plugins.append("telemetry")
    return found


@pytest.fixture
def policy() -> Iterator[Any]:
    """The process's access policy, put back after the test."""
    before = registry.access
    yield registry
    registry.access = before
    registry.changed()
