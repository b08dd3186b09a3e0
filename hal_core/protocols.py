"""The three protocols a plugin implements, two optional ones, and a ready session around one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from .capabilities import Capabilities, Refusal
from .device import Device, Estimate
from .errors import UnsupportedError
from .request import AttentionOutput, AttentionRequest, Grads, SequenceTables

if TYPE_CHECKING:
    from torch import Tensor

    from .memory import Buffer, MemoryStats
    from .tiling import BlockPlan, TilePlan

Autograd = Literal["native", "explicit", "none"]


class MemoryManager(Protocol):
    """A device's memory. Every method raises MemoryLimitError before it would pass the limit."""

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer: ...
    def free(self, buffer: Buffer) -> None: ...
    def to_backend(self, tensor: Tensor) -> Buffer: ...  # zero-copy where DLPack allows; copies are counted
    def to_torch(self, buffer: Buffer) -> Tensor: ...
    def stats(self) -> MemoryStats: ...
    def trim(self) -> int: ...  # bytes given back


class TilingStrategy(Protocol):
    """How a request is cut. Never computes attention."""

    needs_content: bool  # a dynamic sparse pattern reads query and key

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int: ...
    def split_into_tiles(self, tensor: Tensor, tile_size: int) -> list[Tensor]: ...
    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan | BlockPlan: ...


class Session(Protocol):
    """An open device. A context manager; `close()` may be called twice. Methods may be called from any thread.

    Lengths in a request may be the bound of a bucket: exact ones are read from the tensors.
    `plan` is the block plan, `tables` the tensors of a packed or paged call, `rng` is (seed, offset).
    Host tensors are ready on return; CUDA tensors are ordered by torch's current stream.

    A session may also have `bind(request)`, returning a callable (query, key, value, mask, plan, tables, rng) that
    gives the output tensor, or an AttentionOutput where request.lse is set: the core's fast path; `submit(prepared,
    mask)` returning an object with `result()`; `synchronize()`; and `closed`: a session that says so is opened anew
    when it is asked for.
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
        plan: BlockPlan | None = None,
        tables: SequenceTables | None = None,
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
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class AttentionBackend(Protocol):
    """One device family. Built without arguments by the core, from the target of its BackendSpec.

    `check` and `estimate` see lengths rounded up to a power of two, and the exact ones where a limit lies between: a
    refusal by length must hold for every longer length too.
    """

    def devices(self) -> Sequence[Device]: ...  # cheap, never raises for absent hardware
    def capabilities(self, device: Device) -> Capabilities: ...
    def check(
        self, request: AttentionRequest, device: Device
    ) -> Iterable[Refusal]: ...  # only what data cannot declare
    def estimate(self, request: AttentionRequest, device: Device) -> Estimate: ...
    def open(self, device: Device) -> Session: ...  # lazy, one per device, closed at exit


@runtime_checkable
class Absent(Protocol):
    """Optional, of a backend: why it found no device, in one sentence with the fix, for `hal doctor`."""

    def why_absent(self) -> str: ...


@runtime_checkable
class Calibrated(Protocol):
    """Optional, of a backend: measurements that its estimates then use."""

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]: ...


@runtime_checkable
class KernelProvider(Protocol):
    """Optional, of a backend: kernels beside attention. Their sessions have `kernel(name)` returning the callable."""

    def kernel_names(self, device: Device) -> frozenset[str]: ...


class SimpleSession:
    """A whole session around one function `fn(query, key, value, mask, request) -> (out, lse)`.

    `mask` is the call's mask; the function applies what its capabilities claim of causal, window and softcap from the
    request (`hal_core.dense_mask` builds the boolean mask of causal and window). lse may be None where "lse" is not
    claimed. With autograd="native" torch differentiates the function.
    """

    def __init__(
        self, fn: Callable[..., Any], *, autograd: Autograd = "none", memory: MemoryManager | None = None
    ) -> None:
        from .memory import PooledMemory
        from .tiling import DenseTiling

        self._fn, self._autograd = fn, autograd
        self.memory: MemoryManager = memory or PooledMemory()
        self.tiling: TilingStrategy = DenseTiling()

    def autograd(self, request: AttentionRequest) -> Autograd:
        return self._autograd

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        return {"tile_size": max(sequence_length, 1)}

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: BlockPlan | None = None,
        tables: SequenceTables | None = None,
    ) -> tuple[Any, ...]:
        return (query, key, value, request)

    def compute_attention(
        self,
        prepared: Any,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> AttentionOutput:
        prepared_query, key, value, request = prepared
        result, lse = self._fn(prepared_query if query is None else query, key, value, mask, request)
        return AttentionOutput(result if out is None else out.copy_(result), lse if request.lse else None)

    def compute_attention_backward(self, prepared: Any, *given: Any, **named: Any) -> Grads:
        raise UnsupportedError("this session has no explicit backward: ask for gradients where autograd is native")

    def close(self) -> None:
        self.memory.trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
