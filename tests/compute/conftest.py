"""The devices that run compute programs."""

from __future__ import annotations

from pathlib import Path

import pytest

import hal_core as hal
from hal_core.registry import registry


@pytest.fixture(params=["vulkan:0", "opencl:0"])
def device(request: pytest.FixtureRequest) -> str:
    try:
        registry.find(request.param)
    except (hal.DeviceUnavailableError, hal.UnknownBackendError) as absent:
        pytest.skip(str(absent))
    return str(request.param)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HAL_CACHE of all tests that do not look at it."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def _shared_programs(request: pytest.FixtureRequest, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled once for all tests, except for those that ask for `own_cache`."""
    cache = pytest.importorskip("hal_compute.cache", exc_type=ImportError)
    if "own_cache" not in request.fixturenames:
        monkeypatch.setattr(cache, "cache_dir", lambda: programs)


@pytest.fixture
def own_cache() -> Path:
    """HAL_CACHE, empty."""
    return hal.cache_dir()
