"""An OpenCL device, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
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
