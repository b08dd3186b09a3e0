"""The device that these tests run on, and a session of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hal_core as hal
from hal_core.registry import registry

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def device() -> hal.Device:
    try:
        return registry.find("vulkan:0")[0]
    except (hal.DeviceUnavailableError, hal.UnknownBackendError) as absent:
        pytest.skip(str(absent))


@pytest.fixture
def session(device: hal.Device) -> Iterator[Any]:
    with registry.backend_of(device).open(device) as opened:
        yield opened


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HAL_CACHE of all tests that do not look at it."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def _shared_programs(request: pytest.FixtureRequest, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are compiled once for all tests, except for those that ask for `own_cache`."""
    cache = pytest.importorskip("hal_compute.cache", exc_type=ImportError)
    if "own_cache" not in request.fixturenames:
        monkeypatch.setattr(cache, "cache_dir", lambda: programs)


@pytest.fixture
def own_cache() -> Path:
    """HAL_CACHE, empty."""
    return hal.cache_dir()
