"""What `hal bench cuda:0` adds to the table, with and without the optional peers; no GPU is needed."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hal-cuda[dev]'")

from hal_cuda import benchmark
from hal_cuda.benchmark import CudaBench
from hal_cuda.cost import Rates
from hal_cuda.discovery import Chip
from hal_cuda.runtime import nvml
from hal_cuda.session import CudaSession

import hal_core as hal
from hal_core import AttentionRequest, Causal, Device, Fidelity

DEVICE = Device(
    id="cuda:0",
    family="cuda",
    vendor="NVIDIA",
    model="NVIDIA H200",
    fidelity=Fidelity.HARDWARE,
    reads=("cuda:0",),
    driver="NVIDIA 580.0",
)
CHIP = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
REQUEST = AttentionRequest(
    batch=1, heads_q=2, heads_kv=2, len_q=64, len_k=64, dim_qk=64, dim_v=64, dtype="bfloat16", device="cuda:0"
)


class FakeGpu(NamedTuple):
    watts: float = 571.4
    broken: bool = False

    def clock(self, domain: str) -> int:
        if self.broken:
            raise nvml.NvmlError("the GPU is lost")
        return {"sm": 1980, "memory": 3201}[domain]

    def power(self) -> float:
        return self.watts


class FakePeers:
    """Peers that record what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.versions, self.notes = {"FA2": "torch 2.11"}, ["FlashInfer is not installed"]

    def dense(self, *given: Any, causal: bool) -> dict[str, Any]:
        self.asked.append(causal)
        return {"FA2": lambda: 0}


def bench_of(gpu: FakeGpu | None = FakeGpu()) -> tuple[CudaBench, FakePeers]:  # noqa: B008
    fake: Any = FakePeers()
    return CudaBench(DEVICE, CHIP, Rates.assumed((9, 0), 132, None), gpu, fake), fake  # type: ignore[arg-type]


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that would be bound: nothing is compiled or launched."""
    bound: list[str] = []

    def record(device: Device, chip: Chip, rates: Rates, path: str, request: AttentionRequest) -> Any:
        bound.append(path)
        return lambda *given: path

    monkeypatch.setattr(benchmark, "on_path", record)
    return bound


def test_own_kernels_are_columns_beside_the_peers(paths: list[str]) -> None:
    under, fake = bench_of()
    given = [torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)] * 3
    calls = under.calls(replace(REQUEST, causal=Causal.TOP_LEFT), *given)
    assert list(calls) == ["own Hopper", "own Triton", "FA2"]
    assert calls["own Hopper"]() == "hopper"
    assert calls["own Triton"]() == "portable"
    assert fake.asked == [True]


def test_peers_are_left_out_where_they_compute_something_else(paths: list[str]) -> None:
    under, fake = bench_of()
    given = [torch.zeros(1, 2, 64, 64)] * 3
    assert list(under.calls(replace(REQUEST, dtype="float32"), *given)) == ["own Triton"]
    assert "FA2" not in under.calls(replace(REQUEST, causal=Causal.BOTTOM_RIGHT), *given)
    assert fake.asked == []


def test_clocks_power_and_absent_peers_are_told() -> None:
    under, _ = bench_of()
    assert under.conditions() == {"SM MHz": 1980, "memory MHz": 3201, "W": 571, "driver": "NVIDIA 580.0"}
    assert bench_of(FakeGpu(broken=True))[0].conditions() == {}
    assert bench_of(None)[0].conditions() == {}
    assert any("FlashInfer is not installed" in note for note in under.notes())
    assert any("FA2 torch 2.11" in note for note in under.notes())


def test_each_absent_library_is_one_sentence_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in benchmark.LIBRARIES:
        monkeypatch.setitem(sys.modules, library.module.partition(".")[0], None)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    notes = benchmark.Peers().notes
    assert [note.rpartition("pip install ")[2] for note in notes] == [
        library.distribution for library in benchmark.LIBRARIES
    ]
    assert all("is not installed (timed for" in note for note in notes)


def test_a_library_that_fails_to_import_is_named_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> ModuleType:
        if name == "flashinfer":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return ModuleType(name)

    monkeypatch.setattr(benchmark, "find_spec", lambda name: True)
    monkeypatch.setattr(benchmark.importlib, "import_module", load)
    found = benchmark.Peers()
    assert found.notes == [
        "FlashInfer is installed and fails to import: OSError: libcudart.so.12: cannot open shared object file"
    ]
    assert "FlashAttention-4" in found.versions
    assert "FlashInfer" not in found.versions


def test_a_peer_that_refuses_a_call_has_no_column_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise RuntimeError("no kernel\nfor this shape")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = benchmark.Peers()
    found.notes.clear()
    assert list(found._running([1, 2], {"good": lambda: 0, "bad": refuses})) == ["good"]
    assert found.notes == ["bad does not run [1, 2]: RuntimeError: no kernel"]


def test_the_backend_offers_its_bench_to_the_core() -> None:
    from hal_cuda.backend import CudaBackend

    from hal_core.testing.bench_setup import Benchmarked

    assert isinstance(CudaBackend(), Benchmarked)
    assert not isinstance(hal.PooledMemory("cpu"), Benchmarked)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_session_of_one_measurement_is_given_back_and_one_in_use_learns_of_a_fork() -> None:
    def opened() -> CudaSession:
        return CudaSession(DEVICE, CHIP, lambda: Rates.assumed((9, 0), 132, None))

    gone, held = weakref.ref(opened()), opened()
    gc.collect()
    assert gone() is None
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, held._lost.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        assert "was opened before this process was forked" in told.read()
    assert not held._lost
