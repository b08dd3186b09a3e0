"""The protocols a plugin implements. Their docstrings list what is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from .buffers import Buffer, MemoryStats
from .capability import Capabilities, Refusal
from .device_info import Device, Estimate
from .plans import BlockPlan, TilePlan
from .request import AttentionOutput, AttentionRequest, Grads, SequenceMetadata, Tensor

Autograd = Literal["native", "explicit", "none"]
Progress = Callable[[str, float], None]


class MemoryManager(Protocol):
    """A device's memory. Every method raises MemoryLimitError before it would exceed the limit.

    Every buffer that a session allocates beside its results comes from here: workspaces, staging, prepared operands.
    """

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer: ...
    def free(self, buffer: Buffer) -> None: ...
    def to_backend(self, tensor: Tensor) -> Buffer: ...  # zero-copy where DLPack allows; copies are counted
    def to_torch(self, buffer: Buffer) -> Tensor: ...
    def stats(self) -> MemoryStats: ...
    def trim(self) -> int: ...  # bytes given back; resets the peak


class TilingStrategy(Protocol):
    """How a request is cut. Never computes attention.

    Attributes:
        name: with its parameters: strategies of one type and name give equal plans. A subclass sets its own.
        needs_content: a dynamic sparse pattern reads query and key.

    `limits` are bounds: the core fills "minimum" and "maximum" from `Capabilities.tile_sizes`, each where it has one.

    A strategy may also have `choices(request, limits)`: other strategies worth trying, the best guess first.
    """

    name: str
    needs_content: bool

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int: ...
    def split_into_tiles(
        self, tensor: Tensor, tile_size: int
    ) -> list[Tensor]: ...  # views, the last one may be shorter
    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan | BlockPlan: ...


class Session(AbstractContextManager["Session"], Protocol):
    """An open device. A context manager; `close()` may be called twice. Methods may be called from any thread.

    Lengths in the request of `bind` are upper bounds: exact ones are read from the tensors. `prepare_attention` gets
    the tensors' lengths, and bounds for a packed or paged call alone. `plan` is a block plan, or the tile plan of a
    tiling that the caller brought, for the prepared query; `tile_size` is a hint, which only direct callers of a
    session give, and which `plan` precedes; `tables` are the tensors of a packed or paged call. `mask` is 4-D and not
    expanded, bool or added in the query's dtype or float32; `query=` may have another length than the prepared one;
    `rng` is (seed, offset); `out=` is uninitialised, and filled and returned. Results lie on the query's torch device.
    Host tensors are ready on return; CUDA tensors are ordered by torch's current stream.

    A session may also have:
        bind(request): a callable (query, key, value, mask, plan, tables, rng) that gives the output tensor, or an
            AttentionOutput where request.lse is set: the core's fast path.
        cost(prepared): the `Estimate` of the call that was prepared; the meter calls it once after the call, in its
            thread, where it is there.
        timer(report): start timing a call without synchronising; returns a function that ends it. `report(seconds)` is
            called once the time is known. Without it calls are timed by the host's clock.
        kernel(name): a kernel beside attention. synchronize(): wait for the device.
        trace(request): what a simulated device does in a call, as Chrome trace JSON (a timeline).
        closed: True once closed; a closed session is opened anew when it is asked for.
    """

    memory: MemoryManager
    tiling: TilingStrategy

    def autograd(self, request: AttentionRequest) -> Autograd: ...
    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]: ...
    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: TilePlan | BlockPlan | None = None,
        tables: SequenceMetadata | None = None,
    ) -> Any: ...
    def compute_attention(
        self,
        prepared: Any,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput: ...
    def compute_attention_backward(
        self,
        prepared: Any,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads: ...
    def close(self) -> None: ...


class AttentionBackend(Protocol):
    """One device family. Built without arguments by the core, from the target of its BackendSpec.

    `check` and `estimate` see lengths rounded up to a power of two, and the exact ones where a limit lies between: a
    refusal by length must hold for every longer length too.

    A backend may also have:
        why_absent(): why it found no device, in one sentence with the fix, for `hal doctor`.
        calibrate(device, progress): measurements as a dict, which its estimates then use.
        warm_up(device, requests): work that compiles ahead what the requests will need, as (name, function without
            arguments), for `hal warm`, which runs it in several processes: functions are pickled, and return how many
            kernels there are.
        nonconformance(device): checks of the conformance kit that a device cannot pass, with the reason, as a dict.
            They fail all the same; the report adds the reason.
        kernel_names(device): names of kernels beside attention, a frozenset. Its sessions have `kernel(name)`, which
            returns the callable.
    """

    def devices(self) -> Sequence[Device]: ...  # cheap, never raises for absent hardware
    def capabilities(self, device: Device) -> Capabilities: ...
    def check(
        self, request: AttentionRequest, device: Device
    ) -> Iterable[Refusal]: ...  # only what data cannot declare
    def estimate(self, request: AttentionRequest, device: Device) -> Estimate: ...
    def open(self, device: Device) -> Session: ...  # lazy, one per device, closed at exit
