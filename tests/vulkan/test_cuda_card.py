"""CUDA's side of a shared card against a driver that keeps account: what needs a context, what fails, what is given
back.
"""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hal_core as hal

cuda = pytest.importorskip("hal_vulkan.runtime.cuda", exc_type=ImportError)

NEEDS_CONTEXT = {"cuMemFree", "cuDestroyExternalMemory", "cuImportExternalMemory", "cuExternalMemoryGetMappedBuffer"}


class Code(int):
    """CUresult."""

    name = "CUDA_ERROR_INVALID_CONTEXT"


class Driver:
    """Keeps each thread's stack of contexts, refuses what needs one without one, and fails in the functions named."""

    CUexternalMemoryHandleType = SimpleNamespace(CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD=1)

    def __init__(self, *failing: str) -> None:
        self.done: list[tuple[str, Any]] = []
        self._failing, self._stack = failing, threading.local()

    def CUDA_EXTERNAL_MEMORY_HANDLE_DESC(self) -> Any:  # noqa: N802 - CUDA's name
        return SimpleNamespace(handle=SimpleNamespace())

    def CUDA_EXTERNAL_MEMORY_BUFFER_DESC(self) -> Any:  # noqa: N802 - CUDA's name
        return SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> tuple[Any, ...]:
            stack = self._stack.__dict__.setdefault("held", [])
            if name in self._failing or (name in NEEDS_CONTEXT and not stack):
                return (Code(201),)
            if name == "cuCtxPushCurrent":
                stack.append(given[0])
            elif name == "cuCtxPopCurrent":
                stack.pop()
            else:
                self.done.append((name, given[0]))
            return (Code(0), "4096")

        return call


def card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card as it is after it was opened: two blocks imported, two streams used."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    made = object.__new__(cuda.CudaCard)
    vars(made).update(
        _gpu=SimpleNamespace(name="vulkan:0", export=lambda block: os.open(os.devnull, os.O_RDONLY)),
        _cuda=driver,
        _index=0,
        place="cuda:0",
        _context="primary",
        _external={},
        _seen={},
        _done="done",
        _streams={n: SimpleNamespace(semaphore=f"stream {n}") for n in range(2)},
    )
    for address, name in enumerate("ab", 1):
        freeing = ("cuMemFree", address), ("cuDestroyExternalMemory", f"external {name}")
        made._external[name] = partial(made._give_back, *freeing)
    return made


def test_a_thread_that_never_used_cuda_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    shared = card(driver, monkeypatch)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(shared._drop, SimpleNamespace(memory="a")).result()
    assert driver.done == [("cuMemFree", 1), ("cuDestroyExternalMemory", "external a")]


def test_memory_that_cannot_be_unmapped_is_let_go_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("cuMemFree")
    shared = card(driver, monkeypatch)
    shared._drop(SimpleNamespace(memory="b"))
    assert driver.done == [("cuDestroyExternalMemory", "external b")]


def test_memory_that_cannot_be_mapped_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("cuExternalMemoryGetMappedBuffer")
    shared = card(driver, monkeypatch)
    with pytest.raises(hal.DeviceUnavailableError, match=r"failed in cuExternalMemoryGetMappedBuffer .*: reopen both"):
        shared._import(SimpleNamespace(memory="c", nbytes=64))
    assert [name for name, _ in driver.done] == ["cuImportExternalMemory", "cuDestroyExternalMemory"]
    assert "c" not in shared._external


class Bytes:
    """A tensor over what owns its memory."""

    def __init__(self, owner: Any, first: int = 4096, size: int = 64) -> None:
        self._owner, self._first, self._size = owner, first, size

    def data_ptr(self) -> int:
        return self._first

    def numel(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> Bytes:
        return Bytes(self, self._first + part.start, part.stop - part.start)


def test_memory_that_is_lent_when_its_card_closes_goes_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    shared = card(driver, monkeypatch)
    monkeypatch.setattr(torch, "as_tensor", lambda owner, device: Bytes(owner))
    lent = shared.lend(SimpleNamespace(block=SimpleNamespace(memory="c", nbytes=64), offset=16, size=32), lambda: None)
    shared.close()
    gc.collect()
    assert lent.data_ptr() == 4096
    assert "cuMemFree" not in [name for name, _ in driver.done]
    del lent
    gc.collect()
    assert driver.done[-2:] == [("cuMemFree", 4096), ("cuDestroyExternalMemory", "4096")]


def test_closing_gives_everything_back_that_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Driver):
        def __getattr__(self, name: str) -> Any:
            usual = super().__getattr__(name)
            return lambda *given: (Code(201),) if given == ("stream 0",) else usual(*given)

    driver = Refusing()
    card(driver, monkeypatch).close()
    left = [("cuDestroyExternalSemaphore", "stream 1"), ("cuDestroyExternalSemaphore", "done")]
    assert driver.done == [*left, ("cuDevicePrimaryCtxRelease", 0)]


def test_a_card_whose_context_failed_closes_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = card(Driver("cuCtxPushCurrent"), monkeypatch)

    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert shared.settle(30.0)
    shared.close()
    assert not shared._streams


def test_torchs_work_is_waited_for_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, ends = card(Driver(), monkeypatch), threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: ends.wait(60.0))
    assert not shared.settle(0.01)
    ends.set()
    assert shared.settle(30.0)
