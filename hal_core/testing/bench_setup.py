"""What a backend may add to `hal bench`: its own kernels, the conditions of a run, and the device's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from ..device_info import Device
    from ..request import AttentionRequest

#: A benchmark column: called once for each timed run, without arguments.
Call = Callable[[], Any]


class Ceilings(NamedTuple):
    """The most that a device reaches.

    Attributes:
        operations: operations per second. bandwidth: bytes per second. source: where both figures come from.
    """

    operations: float
    bandwidth: float
    source: str


class BenchSetup(NamedTuple):
    """What a backend adds to `hal bench` on one device.

    Attributes:
        calls: (request, query, key, value) -> callables by column name: the device's own kernels, and other libraries'
            kernels that are installed.
        conditions: () -> facts that times depend on, such as clocks and power. Read after each length and kept with it.
        notes: () -> sentences below the table, such as which libraries are not installed.
        flush: called before each timed call, to empty a cache. None: nothing is called.
        ceilings: drawn in the roofline. None: no ceilings are drawn.
    """

    calls: Callable[[AttentionRequest, Tensor, Tensor, Tensor], Mapping[str, Call]]
    conditions: Callable[[], Mapping[str, Any]] = dict
    notes: Callable[[], Sequence[str]] = tuple
    flush: Call | None = None
    ceilings: Ceilings | None = None


@runtime_checkable
class Benchmarked(Protocol):
    """Optional protocol of a backend that adds columns, conditions and ceilings to `hal bench`."""

    def benchmark(self, device: Device) -> BenchSetup: ...
