"""CUDA's side of a card that Vulkan drives too: memory that both see, and the order of their work. Needs
cuda-bindings.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import DeviceUnavailableError, UnsupportedError

from ._vk import Gpu, Memory, Timeline
from .sharing import SharedCard

_DEDICATED = 1  # CUDA_EXTERNAL_MEMORY_DEDICATED


class _Stream(NamedTuple):
    """A CUDA stream's own timeline, which it raises when Vulkan may go on: seen by Vulkan, seen by CUDA."""

    timeline: Timeline
    semaphore: Any
    signal: Any  # CUDA_EXTERNAL_SEMAPHORE_SIGNAL_PARAMS


class CudaCard(SharedCard):
    """The CUDA device of the same card. Vulkan waits for torch's current stream and the stream for Vulkan, not the
    host.
    """

    kind = "cuda"

    def __init__(self, gpu: Gpu, index: int) -> None:
        """Raises DeviceUnavailableError where torch or CUDA cannot use the card."""
        super().__init__(gpu)
        from cuda.bindings import driver

        self._cuda, self._index, self.place = driver, index, f"cuda:{index}"
        if not torch.cuda.is_available():
            raise DeviceUnavailableError(
                f"{gpu.name} cannot share memory: torch has no CUDA here; install a CUDA build"
            )
        torch.zeros(1, device=self.place)  # CUDA's context
        uuid = bytes(self._called("cuDeviceGetUuid", index).bytes).hex()
        if uuid != gpu.adapter.uuid[32:]:
            raise DeviceUnavailableError(
                f"{gpu.name} is not {self.place}: set CUDA_DEVICE_ORDER=PCI_BUS_ID, and try again"
            )
        # What gives a block's memory back, at the latest with its last tensor.
        self._external: dict[Any, Callable[[], Any]] = {}
        self._streams: dict[int, _Stream] = {}
        self._last: Any = None
        self._known, self._several = threading.local(), torch.cuda.device_count() > 1
        self._done = self._semaphore(gpu.export_timeline())
        self._wait = driver.CUDA_EXTERNAL_SEMAPHORE_WAIT_PARAMS()
        self._context = self._called("cuDevicePrimaryCtxRetain", index)  # torch's own

    def _called(self, name: str, *arguments: Any) -> Any:
        """A function of CUDA's driver. Raises DeviceUnavailableError."""
        code, *found = getattr(self._cuda, name)(*arguments)
        if int(code):
            raise DeviceUnavailableError(
                f"{self._gpu.name} and {self.place} failed in {name} ({code.name}): reopen both"
            )
        return found[0] if found else None

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The card's context in this thread, which may never have used CUDA."""
        self._called("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._called("cuCtxPopCurrent")

    def _give_back(self, *freeing: tuple[str, Any]) -> None:
        """Call functions that free something. What CUDA refuses, as it does after a failure, is left to it."""
        with suppress(DeviceUnavailableError), self._current():
            for name, argument in freeing:
                with suppress(DeviceUnavailableError):
                    self._called(name, argument)

    def _semaphore(self, descriptor: int) -> Any:
        asked = self._cuda.CUDA_EXTERNAL_SEMAPHORE_HANDLE_DESC()
        kinds = self._cuda.CUexternalSemaphoreHandleType
        asked.type = kinds.CU_EXTERNAL_SEMAPHORE_HANDLE_TYPE_TIMELINE_SEMAPHORE_FD
        asked.handle.fd = descriptor
        return self._imported("cuImportExternalSemaphore", asked, descriptor)

    def _imported(self, name: str, asked: Any, descriptor: int) -> Any:
        """What CUDA makes of a file descriptor, which is CUDA's from then on."""
        try:
            return self._called(name, asked)
        except DeviceUnavailableError:
            os.close(descriptor)
            raise

    def _import(self, block: Memory) -> Tensor:
        cuda = self._cuda
        asked, all_of_it = cuda.CUDA_EXTERNAL_MEMORY_HANDLE_DESC(), cuda.CUDA_EXTERNAL_MEMORY_BUFFER_DESC()
        asked.type = cuda.CUexternalMemoryHandleType.CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD
        descriptor = asked.handle.fd = self._gpu.export(block)
        asked.size, asked.flags = block.nbytes, _DEDICATED
        all_of_it.offset, all_of_it.size = 0, block.nbytes
        with self._current():
            external = self._imported("cuImportExternalMemory", asked, descriptor)
            try:
                address = int(self._called("cuExternalMemoryGetMappedBuffer", external, all_of_it))
            except DeviceUnavailableError:
                self._give_back(("cuDestroyExternalMemory", external))
                raise
        whole = Addressed(address, block.nbytes)
        freeing = ("cuMemFree", address), ("cuDestroyExternalMemory", external)
        ending = self._external[block.memory] = weakref.finalize(whole, self._give_back, *freeing)
        ending.atexit = False
        return torch.as_tensor(whole, device=self.place)

    def _alias(self, bytes_there: Tensor, ended: Callable[[], None]) -> Tensor:
        addressed = Addressed(bytes_there.data_ptr(), bytes_there.numel(), bytes_there)
        weakref.finalize(addressed, ended).atexit = False
        return torch.as_tensor(addressed, device=self.place)

    def _drop(self, block: Memory) -> None:
        self._external.pop(block.memory)()

    def enter(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"{self._gpu.name} cannot be captured in a CUDA graph: call it outside of the capture"
            )
        stream = torch.cuda.current_stream(self._index)
        if not hasattr(self._known, "thread"):
            stream.query()  # gives a thread without a context this one: CUDA's driver asks for it
            self._known.thread = True
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream

    def run(self, commands: Any, what: str, timeout: float) -> None:
        if self._several:
            with torch.cuda.device(self._index):
                self._run(commands)
        else:
            self._run(commands)

    def _run(self, commands: Any) -> None:
        raw, cuda = self._last.cuda_stream, self._cuda
        stream = self._streams.get(raw)
        if stream is None:
            timeline = self._gpu.foreign_timeline()
            semaphore = self._semaphore(self._gpu.export_timeline(timeline))
            stream = self._streams[raw] = _Stream(timeline, semaphore, cuda.CUDA_EXTERNAL_SEMAPHORE_SIGNAL_PARAMS())
        value = stream.signal.params.fence.value + 1
        stream.signal.params.fence.value = value
        self._called("cuSignalExternalSemaphoresAsync", [stream.semaphore], [stream.signal], 1, raw)
        self._wait.params.fence.value = self._gpu.submit(commands, stream.timeline, value)
        self._called("cuWaitExternalSemaphoresAsync", [self._done], [self._wait], 1, raw)

    def settle(self, timeout: float) -> bool:
        done = threading.Event()

        def wait() -> None:
            with suppress(RuntimeError):  # a context that failed runs nothing any more; torch tells whoever uses it
                torch.cuda.synchronize(self._index)
            done.set()

        threading.Thread(target=wait, daemon=True).start()  # CUDA's own wait has no time-out
        return done.wait(timeout)

    def close(self) -> None:
        semaphores = [*(stream.semaphore for stream in self._streams.values()), self._done]
        self._give_back(*(("cuDestroyExternalSemaphore", semaphore) for semaphore in semaphores))
        self._streams.clear()
        self._seen.clear()  # what is lent goes with its last tensor, whoever still holds this card
        self._give_back(("cuDevicePrimaryCtxRelease", self._index))


class Addressed:
    """Device memory by its address, for torch.as_tensor; the tensor keeps this object, and this object its `owner`."""

    def __init__(self, address: int, nbytes: int, owner: Tensor | None = None) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
