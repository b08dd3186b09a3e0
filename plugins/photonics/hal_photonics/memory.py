"""The memory of a photonic device: the host's, where the simulated chip keeps what is programmed into it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hal_core.plugin_api import Buffer, MemoryManager, PooledMemory, checked_buffer


class PhotonicMemory(PooledMemory):
    """A pool of host memory for prepared operands.

    A chip with a driver of its own would hold them in its weight memory; the simulated one holds their codes here.
    """

    def __init__(self, device_id: str) -> None:
        super().__init__("cpu", name=device_id)


class HeldBuffers:
    """Buffers that live as long as this object.

    Args:
        memory: where they come from. forms: (shape, dtype) of each.

    Raises:
        MemoryLimitError: as `memory.allocate`. PluginError: the manager gave less than was asked for.
    """

    def __init__(self, memory: MemoryManager, *forms: tuple[Sequence[int], str]) -> None:
        self._memory, self._buffers = memory, list[Buffer]()
        for shape, dtype in forms:
            self._buffers.append(checked_buffer(memory.allocate(shape, dtype), shape, dtype))

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers' memory, for as long as this object lives."""
        return [buffer.tensor for buffer in self._buffers]

    def __del__(self) -> None:
        while self._buffers:
            self._memory.free(self._buffers.pop())
