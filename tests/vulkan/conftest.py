"""The device that these tests run on, and a session of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import hal_core as hal
from hal_core.registry import registry


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
