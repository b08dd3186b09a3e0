"""What a call costs: time on a device that was not calibrated, and memory."""

from __future__ import annotations

from hal_compute.cost import gradient_bytes, mask_bytes, part_bytes, pooled_bytes, workspace_bytes
from hal_compute.sizes import Sizes

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, MaskKind

from .paths import IMPORT_FROM, matrix_step
from .runtime._vk import Adapter
from .tiling import (
    STREAM_BYTES,
    RowCut,
    StreamCut,
    TileCut,
    VulkanTiling,
    foreign_cut,
    matrix_splits,
    row_splits,
    tile_splits,
)

_ALIGNMENT = 256


def assumed(adapter: Adapter) -> tuple[tuple[float, float], tuple[float, float]]:
    """(least, most) seconds of a call without work, and (least, most) multiply-accumulates per second."""
    fastest = 2e14 if matrix_step(adapter, "float16") else 2e13
    return (1e-4, 2e-2), (5e8, 2e10) if adapter.is_cpu else (1e11, fastest)


class CallMemory:
    """Memory of a call on a device. Tensors are taken for contiguous and aligned."""

    def __init__(self, request: AttentionRequest, adapter: Adapter, tiling: VulkanTiling) -> None:
        self.request, self._adapter = request, adapter
        self.sizes = Sizes.of(request, pack=request.tiling is None)
        planned = request.block_plan is not None
        foreign = request.tiling and foreign_cut(*request.tiling[1:])
        self.cut = foreign or tiling.cut(self.sizes, planned=planned)
        self._imports = adapter.is_cpu and adapter.limits["hostPointerAlignment"] > 0
        queries, keys = (
            request.batch * request.heads_q * request.len_q,
            request.batch * request.heads_kv * request.len_k,
        )
        size = DTYPE_BYTES[request.dtype]
        self.rows = queries
        # (bytes that are given, bytes that programs read) of query, key, value and output
        self.tensors = [
            (count * dim * size, count * self.sizes.dim * size)
            for count, dim in (
                (queries, request.dim_qk),
                (keys, request.dim_qk),
                (keys, request.dim_v),
                (queries, request.dim_v),
            )
        ]

    def _copied(self, tensors: list[tuple[int, int]]) -> list[int]:
        """Bytes of the copies of tensors that are not read or written in place."""
        lies = [self._imports and given == read >= IMPORT_FROM for given, read in tensors]
        return [read for (_, read), in_place in zip(tensors, lies, strict=True) if not in_place]

    def _tables(self) -> list[int]:
        """The mask as the programs read it."""
        request = self.request
        if request.mask is MaskKind.NONE:
            return []
        nbytes = request.mask_batch * request.mask_heads * request.len_q * request.len_k * 4
        return self._copied([(nbytes, nbytes)])

    def forward(self) -> list[int]:
        """Bytes of the regions of a forward pass, in order."""
        request, sizes, cut = self.request, self.sizes, self.cut
        query, key, value, out = self.tensors
        lse = self._copied([(self.rows * 4, self.rows * 4)]) if request.lse or request.grads else [self.rows * 4]
        regions = [*self._copied([out]), *lse, 256, *self._tables()]
        if isinstance(cut, StreamCut):
            packed = sizes.batch * sizes.heads_kv * cut.chunks * STREAM_BYTES
            operands = self._copied([query, (key[0], packed), (value[0], packed)])
            return [*regions, *operands, self.rows * sizes.dim * 4, self.rows * 8]
        regions += self._copied([query, key, value])
        if isinstance(cut, RowCut):
            _, splits = row_splits(cut, sizes)
            parts = splits * sizes.units * sizes.unit_rows
            return [*regions, parts * sizes.dim * 4, parts * 8]
        if isinstance(cut, TileCut):
            _, splits = tile_splits(cut, sizes, is_cpu=self._adapter.is_cpu)
        else:
            _, splits = matrix_splits(cut, sizes)
        return [*regions, *(part_bytes(sizes, splits) or [256])]

    def backward(self) -> list[int]:
        """Bytes of the regions of a backward pass, in order."""
        query, key, value, out = self.tensors
        rows = self.rows * 4, self.rows * 4
        copied = self._copied([query, key, value, out, out, rows]), self._copied([query, key, value])
        return [256, *self._tables(), *copied[0], self.rows * 4, 12 * self.rows, *copied[1]]

    def total(self) -> int:
        """The most bytes that a call allocates, results included."""
        request = self.request
        result = self.tensors[3][0] + (self.rows * 4 if request.lse or request.grads else 0)
        if not all((request.batch, request.heads_q, request.len_q, request.len_k)):
            return result
        mask = pooled_bytes(mask_bytes(request)) if mask_bytes(request) else 0
        result += mask
        if not request.grads:
            return result + workspace_bytes(_ALIGNMENT, self.forward())
        result += gradient_bytes(request)
        if len(self._copied(self.tensors)) == len(self.tensors):  # the recording of the forward pass is kept
            return result + workspace_bytes(_ALIGNMENT, self.forward() + self.backward())
        return result + workspace_bytes(_ALIGNMENT, self.forward(), self.backward())

    def largest_buffer(self) -> int:
        """Bytes of the largest buffer that a program reads or writes."""
        return max(*(read for _, read in self.tensors), *self.forward())
