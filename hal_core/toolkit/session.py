"""Sessions to build on: `SessionBase` for a device, `SimpleSession` around one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from ..errors import PluginError, UnsupportedError
from ..plans import BlockPlan, TilePlan
from ..protocols import Autograd, MemoryManager, TilingStrategy
from ..request import DTYPE_BYTES, AttentionOutput, AttentionRequest, Grads, SequenceMetadata, Tensor
from .memory import PooledMemory
from .tiling import DenseTiling


class SessionBase:
    """The parts of a session that every device has: memory, tiling, closing, and scratch buffers.

    A subclass adds `prepare_attention` and `compute_attention`, and what else it offers.
    """

    def __init__(self, memory: MemoryManager | None = None, tiling: TilingStrategy | None = None) -> None:
        self.memory: MemoryManager = memory or PooledMemory()
        self.tiling: TilingStrategy = tiling or DenseTiling()
        self.closed = False

    def autograd(self, request: AttentionRequest) -> Autograd:
        return "none"

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        """The tile size that the session's own tiling takes for this length."""
        return {"tile_size": self.tiling.compute_optimal_tile_size(sequence_length, 1 << 20, {})}

    def compute_attention_backward(self, prepared: Any, *given: Any, **named: Any) -> Grads:
        raise UnsupportedError("this session has no explicit backward: ask for gradients where autograd is native")

    @contextmanager
    def scratch(self, shape: Sequence[int], dtype: str) -> Iterator[Any]:
        """An uninitialised tensor from `memory`, given back on exit.

        The pool keeps it for reuse where nobody refers to it any more: `del` the variable at the end of the block.

        Raises:
            PluginError: the memory manager gave less than was asked for. MemoryLimitError: as `memory.allocate`.
        """
        buffer = self.memory.allocate(shape, dtype)
        try:
            yield checked_buffer(buffer, shape, dtype).tensor
        finally:
            self.memory.free(buffer)

    def close(self) -> None:
        self.closed = True
        self.memory.trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def checked_buffer(buffer: Any, shape: Sequence[int], dtype: str) -> Any:
    """The buffer, if it has the shape and dtype that were asked for. Raises PluginError with both sizes."""
    given = getattr(buffer, "tensor", None)
    if given is None or tuple(given.shape) != tuple(shape) or str(given.dtype) != f"torch.{dtype}":
        what = "nothing" if given is None else f"{list(given.shape)} of {given.dtype}, {given.nbytes:,} bytes"
        raise PluginError(
            f"the memory manager gave {what} where {list(shape)} of {dtype}, "
            f"{math.prod(shape) * DTYPE_BYTES[dtype]:,} bytes were asked for: mend its allocate()"
        )
    return buffer


class SimpleSession(SessionBase):
    """A whole session around one function `fn(query, key, value, mask, request) -> (out, lse)`.

    `mask` is the call's mask; the function applies what its capabilities claim of causal, window and softcap from the
    request (`hal_core.dense_mask` builds the boolean mask of causal and window). lse may be None where "lse" is not
    claimed. With autograd="native" torch differentiates the function.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        autograd: Autograd = "none",
        memory: MemoryManager | None = None,
        tiling: TilingStrategy | None = None,
    ) -> None:
        super().__init__(memory, tiling or DenseTiling(cut_by="torch"))
        self._fn, self._autograd = fn, autograd

    def autograd(self, request: AttentionRequest) -> Autograd:
        return self._autograd

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
