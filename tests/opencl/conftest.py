"""An OpenCL device, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import hal_core as hal
from hal_core.registry import registry

if TYPE_CHECKING:
    from hal_opencl.session import OpenClSession


@pytest.fixture
def device() -> hal.Device:
    try:
        return registry.find("opencl:0")[0]
    except hal.DeviceUnavailableError as absent:
        pytest.skip(str(absent))


@pytest.fixture
def session(device: hal.Device) -> Iterator[OpenClSession]:
    """Open for one test alone."""
    with registry.backend_of(device).open(device) as opened:
        yield opened


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
