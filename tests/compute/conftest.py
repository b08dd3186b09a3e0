"""The devices that run compute programs."""

from __future__ import annotations

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
