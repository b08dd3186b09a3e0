"""Memory of a Vulkan device that torch sees through another interface of the same card, and the order of both's
work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ._vk import Bound, Gpu, Memory


class _Seen(NamedTuple):
    block: Memory
    bytes: Tensor
    first: int  # address, as the other interface sees it
    last: int


class SharedCard(ABC):
    """Blocks of exported memory as torch tensors, imported when they are first looked at. The session holds its lock.

    Attributes:
        kind: torch's device type of the tensors; place: the device itself, "cuda:0".
    """

    kind: str
    place: str

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._seen: dict[Any, _Seen] = {}
        self._alignment = gpu.adapter.limits["minStorageBufferOffsetAlignment"]

    def view(self, bound: Bound) -> Tensor:
        """A range as uint8 [size]."""
        block = bound.block
        seen = self._seen.get(block.memory)
        if seen is None:
            whole = self._import(block)
            first = whole.data_ptr()
            seen = self._seen[block.memory] = _Seen(block, whole, first, first + block.nbytes)
        return seen.bytes[bound.offset : bound.offset + bound.size]

    def lend(self, bound: Bound, ended: Callable[[], None]) -> Tensor:
        """A range as uint8 [size] of a storage of its own; `ended` is called, in any thread, when its last tensor is
        gone.
        """
        return self._alias(self.view(bound), ended)

    def bound_of(self, tensor: Tensor) -> Bound | None:
        """Where a contiguous tensor lies in this memory; None where it lies elsewhere, or not as shaders can read
        it.
        """
        first = tensor.data_ptr()
        for seen in self._seen.values():
            if seen.first <= first < seen.last:
                offset, nbytes = first - seen.first, tensor.numel() * tensor.element_size()
                if offset % self._alignment or not tensor.is_contiguous():
                    return None
                return Bound(seen.block, offset, -(-nbytes // 4) * 4)
        return None

    def address(self, tensor: Tensor) -> int:
        """Of a tensor that is read where it lies; 0 for others."""
        return tensor.data_ptr() if self.bound_of(tensor) is not None else 0

    def forget(self, block: Memory) -> None:
        """The block is about to be freed, and nobody has a tensor of it any more."""
        if self._seen.pop(block.memory, None) is not None:
            self._drop(block)

    @abstractmethod
    def _import(self, block: Memory) -> Tensor:
        """All of an exported block as uint8 on `place`."""

    @abstractmethod
    def _alias(self, bytes_there: Tensor, ended: Callable[[], None]) -> Tensor:
        """See `lend`: the same bytes in a storage of their own."""

    @abstractmethod
    def _drop(self, block: Memory) -> None:
        """Undo `_import`."""

    @abstractmethod
    def enter(self) -> None:
        """Order what torch does from now on behind what earlier calls have under way."""

    @abstractmethod
    def run(self, commands: Any, what: str, timeout: float) -> None:
        """Run recorded commands behind torch's work so far, and torch's work from now on behind them."""

    @abstractmethod
    def settle(self, timeout: float) -> bool:
        """Wait until torch's own work on the card is done; whether it is, within `timeout` seconds."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back, once all work on the card is done."""
