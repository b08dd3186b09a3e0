"""Devices and draws that the tests of hal_geometric share."""

from __future__ import annotations

from pathlib import Path

import pytest

import hal_core as hal
from hal_core.registry import registry

#: Devices that run attention from which values are compared.
DEVICES = ("cpu:0", "opencl:0", "vulkan:0", "kpu:0")


def present(name: str) -> str:
    try:
        registry.find(name)
    except (hal.DeviceUnavailableError, hal.UnknownBackendError) as absent:
        pytest.skip(str(absent))
    return name


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return present(request.param)


@pytest.fixture(params=DEVICES[:3])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """A device that provides the flows and the Euler characteristic."""
    return present(request.param)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HAL_CACHE of all tests of this folder."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def _shared_programs(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled once for all tests of this folder, and for them alone."""
    cache = pytest.importorskip("hal_compute.cache", exc_type=ImportError)
    monkeypatch.setattr(cache, "cache_dir", lambda: programs)
