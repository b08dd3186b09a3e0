"""Every Vulkan device is held to what it claims; every case in `make test-all`, one of each claim in `make test`."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import pytest

import hal_core as hal
from hal_core.testing import ConformanceSuite, check_backend

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)


class TestVulkan(ConformanceSuite):
    backend = "vulkan:0"
    quick = True


@pytest.mark.slow
class TestVulkanInFull(ConformanceSuite):
    backend = "vulkan:0"


class OnCuda(backend_module.VulkanBackend):  # type: ignore[name-defined, misc]
    """The first Vulkan device, its tensors on the CUDA device that is the same card."""

    def __init__(self, device: hal.Device) -> None:
        self._real = device
        self._shown = attrs.evolve(device, id="vulkan_on_cuda:0", reads=device.reads[::-1])

    def devices(self) -> list[hal.Device]:
        return [self._shown]

    def capabilities(self, device: hal.Device) -> hal.Capabilities:
        return super().capabilities(self._real)  # type: ignore[no-any-return]

    def check(self, request: hal.AttentionRequest, device: hal.Device) -> Iterable[hal.Refusal]:
        return super().check(request, self._real)  # type: ignore[no-any-return]

    def assumed(self, device: hal.Device) -> tuple[tuple[float, float], tuple[float, float]]:
        return super().assumed(self._real)  # type: ignore[no-any-return]

    def open(self, device: hal.Device) -> hal.Session:
        return super().open(self._real)  # type: ignore[no-any-return]


def test_the_contract_holds_for_tensors_on_cuda() -> None:
    found = next((d for d in hal.devices() if d.family == "vulkan" and len(d.reads) > 1), None)
    if found is None:
        pytest.skip("no Vulkan device here shares its memory with CUDA")
    report = check_backend(OnCuda(found), quick=True)
    assert report.passed, str(report)
