"""Every Vulkan device is held to what it claims; every case in `make test-all`, one of each claim in `make test`."""

from __future__ import annotations

import pytest

from hal_core.testing import ConformanceSuite


class TestVulkan(ConformanceSuite):
    backend = "vulkan:0"
    quick = True


@pytest.mark.slow
class TestVulkanInFull(ConformanceSuite):
    backend = "vulkan:0"
