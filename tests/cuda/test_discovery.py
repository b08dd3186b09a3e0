"""GPUs are found without CUDA, and what is missing is said in a sentence."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hal_cuda import discovery
from hal_cuda.backend import CudaBackend
from hal_cuda.runtime import nvml

import hal_core as hal


class FakeGpu(NamedTuple):
    name: str
    uuid: str
    capability: tuple[int, int] = (9, 0)
    memory: int = 1 << 37


H100, H200, OLD = (
    FakeGpu("NVIDIA H100", "GPU-aa11"),
    FakeGpu("NVIDIA H200", "GPU-ab22"),
    FakeGpu("V100", "GPU-cc33", (7, 0)),
)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        (None, [H100, H200, OLD]),
        ("", []),
        ("1,0", [H200, H100]),
        ("GPU-ab", [H200]),
        ("GPU-a", []),  # two GPUs begin so
        ("0,9,1", [H100]),  # an entry that names none ends the list
        ("0,0", [H100]),
        ("-1", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(setting: str | None, wanted: list[Any]) -> None:
    assert discovery.visible([H100, H200, OLD], setting) == wanted  # type: ignore[list-item]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an H200 and an old GPU, and a torch that has CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvml, "count", lambda: 2)
    monkeypatch.setattr(nvml, "Gpu", lambda place: (H200, OLD)[place])
    monkeypatch.setattr(nvml, "driver_version", lambda: "580.1")
    monkeypatch.setattr(nvml, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(discovery, "_torch_lacks_cuda", lambda: "")
    return monkeypatch


def test_devices_are_described_from_the_driver(driver: pytest.MonkeyPatch) -> None:
    (device,) = CudaBackend().devices()
    assert (device.id, device.model, device.memory, device.reads) == ("cuda:0", "NVIDIA H200", 1 << 37, ("cuda:0",))
    assert device.fidelity == "hardware"
    assert "V100 has compute capability 7.0 and 8.0 is needed" in discovery.find().reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("cuda_version", lambda: (11, 4)), "supports CUDA 11.4 and 12.0 is needed: upgrade the driver"),
        (("count", lambda: 0), "no NVIDIA GPU is visible"),
        (("Gpu", lambda place: OLD), "compute capability 7.0"),
    ],
)
def test_absence_has_a_reason(driver: pytest.MonkeyPatch, change: tuple[str, Any], reason: str) -> None:
    driver.setattr(nvml, *change)
    backend = CudaBackend()
    assert not backend.devices()
    assert reason in backend.why_absent()


def test_a_torch_without_cuda_is_named(driver: pytest.MonkeyPatch) -> None:
    driver.undo()
    driver.setattr(nvml, "count", lambda: 1)
    driver.setattr(nvml, "Gpu", lambda place: H200)
    driver.setattr(nvml, "driver_version", lambda: "580.1")
    driver.setattr(nvml, "cuda_version", lambda: (13, 0))
    import torch

    driver.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in discovery.find().reason


def test_without_a_driver_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_library", None)
    monkeypatch.setattr(nvml, "_NAMES", ("libdoes-not-exist.so",))
    assert "install the NVIDIA driver" in discovery.find().reason


def test_hidden_gpus_are_named(driver: pytest.MonkeyPatch) -> None:
    driver.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides them" in discovery.find().reason


def test_capabilities_refuse_what_no_kernel_does() -> None:
    request = hal.AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=8, len_k=8, dim_qk=300, dim_v=300, dtype="bfloat16", device="cuda:0"
    )
    (refusal,) = CudaBackend().capabilities(None).refusals(request)  # type: ignore[arg-type]
    assert refusal.code == "head_dim"
