"""The recordings of an open device: a call of a known shape runs its recording again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count

from hal_core.plugin_api import AttentionRequest, Device

from ._vk import Adapter, Memory
from .command_buffer import Given, VulkanCommandBuffer
from .open_device import OpenDevice

#: At most, recordings that are kept with their memory, and the bytes of all of them; on a card this share of its memory
#: where that is more.
KEPT, KEPT_BYTES, KEPT_PART = 128, 256 << 20, 64
#: Fragmentation of the device's memory from which recordings are dropped.
FRAGMENTED = 0.25

_numbers = count()


@lru_cache(maxsize=4096)
def number(request: AttentionRequest) -> int:
    """A number for a request in keys: hashing the request itself takes longer than finding a recording."""
    return next(_numbers)


class Recorder(OpenDevice):
    """An open device that keeps the recordings of its calls."""

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self._kept: OrderedDict[Hashable, VulkanCommandBuffer] = OrderedDict()
        self._left: list[VulkanCommandBuffer] = []  # given up while they ran
        self.kept_bytes = 0  # memory of the kept recordings
        self.last_steps: dict[str, Hashable] = {}  # key of the last call of each kernel that takes floats
        super().__init__(device, adapter, limit)

    def key(self, kind: str, number: int, given: Given) -> Hashable:
        """What a recording depends on besides the device.

        Args:
            number: see `number`. given: query, key, value, mask and the rest, of which the shapes count, and the
                addresses of those that are read where they lie.
        """
        shapes = tuple([None if t is None else t.shape for t in given])
        mask = None if given[3] is None else (given[3].stride(), given[3].dtype)
        card = self.card_of(given)
        addresses = None if card is None else tuple([None if t is None else card.address(t) for t in given])
        return kind, number, shapes, mask, addresses

    def find(self, key: Hashable | None) -> VulkanCommandBuffer | None:
        """The recording of a key, ready to run. Raises DeviceUnavailableError while the device hangs."""
        self.check_alive()
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    @contextmanager
    def call(self, what: str, given: Given = (), key: Hashable = None) -> Iterator[VulkanCommandBuffer]:
        """Record and run a call, see `VulkanCommandBuffer`. It is kept under `key` if it can be, else released.

        Kept recordings are dropped, the least recently used first, where they are too many, too large or too scattered.
        """
        self.check_alive()
        commands = VulkanCommandBuffer(self, what, given)
        keep = False
        try:
            yield commands
            keep = key is not None and commands.fixed and commands.nbytes <= self._room // 4
        finally:
            if keep:
                commands.free_scratch()
                self._kept[key], commands.kept = commands, True
                self.kept_bytes += commands.nbytes
            else:
                self._release(commands)
            self._evict(KEPT, self._room, FRAGMENTED)

    @property
    def _room(self) -> int:
        return KEPT_BYTES if self.mapped else max(KEPT_BYTES, self.pool.limit // KEPT_PART)

    def _evict(self, most: int, most_bytes: int, most_fragmented: float = 1.0) -> None:
        # A device that hangs is waited for once: what is kept for it stays until it is closed.
        while (
            self._kept
            and not self._stuck
            and (len(self._kept) > most or self.kept_bytes > most_bytes or self.pool.fragmentation > most_fragmented)
        ):
            self._drop(next(iter(self._kept)))

    def forget(self) -> bool:
        had_some = bool(self._kept)
        self._evict(0, 0)
        return had_some

    def _drop(self, key: Hashable) -> None:
        commands = self._kept.pop(key)
        self.kept_bytes -= commands.nbytes
        self._release(commands)

    def _drop_users(self, block: Memory) -> None:
        for key in [key for key, commands in self._kept.items() if commands.uses(block)]:
            self._drop(key)

    def _release(self, commands: VulkanCommandBuffer) -> None:
        if self._stuck:  # waited for already
            self._left.append(commands)
        elif not commands.release():
            self._left.append(commands)
            self.give_up(commands.what)

    def _release_left(self) -> None:
        left, self._left = self._left, []
        for commands in left:
            self._release(commands)
