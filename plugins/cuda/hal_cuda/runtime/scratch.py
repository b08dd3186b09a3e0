"""Memory that launches on a stream leave to those after them: partial results, and counters of programs that wrote
theirs.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

STREAMS, PARTIAL, COUNTERS = 16, 1 << 18, 1024


class Scratch(NamedTuple):
    """What the launches of one stream use, one after the other.

    partial: float32 [PARTIAL], of any content. arrived: int32 [COUNTERS], 0 between launches.
    """

    partial: Tensor
    arrived: Tensor


class StreamScratch:
    """Scratch memory of one device, 16 MiB: a piece for each stream, because launches on two streams may run at once.

    A piece stays with its stream's handle for good; torch ends none of its streams.

    Args:
        device: torch device.
    """

    def __init__(self, device: Any) -> None:
        self._partial = torch.empty(STREAMS, PARTIAL, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
        if self._arrived.is_cuda:
            torch.cuda.current_stream(device).synchronize()  # other streams will not wait for the zeros
        self._pieces: dict[int, Scratch] = {}
        self._lock = threading.Lock()

    def on(self, stream: int) -> Scratch | None:
        """The piece of a stream's handle; None where `STREAMS` others have theirs."""
        piece = self._pieces.get(stream)
        if piece is None and len(self._pieces) < STREAMS:
            with self._lock:
                place = len(self._pieces)
                if stream not in self._pieces and place < STREAMS:
                    self._pieces[stream] = Scratch(self._partial[place], self._arrived[place])
                piece = self._pieces.get(stream)
        return piece


@lru_cache(maxsize=256)
def scratch_of(device: torch.device) -> StreamScratch:
    """The scratch memory of a device, taken at its first use, which must not lie in the capture of a graph."""
    return StreamScratch(device)
