"""The memory of a call, from its request: what its programs read and write beside the tensors that are given.

Nothing here imports torch: estimates are made before a tensor arrives.
"""

from __future__ import annotations

from collections.abc import Sequence

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, MaskKind

from .sizes import Sizes, padded_dim

#: Bytes of a pool's block where the device is a CPU: a call takes about what it needs.
HOST_BLOCK = 1 << 16
PAGE = 4096


def result_bytes(request: AttentionRequest) -> int:
    """Bytes of the output and of the log-sum-exp."""
    rows = request.batch * request.heads_q * request.len_q
    return rows * (request.dim_v * DTYPE_BYTES[request.dtype] + 4)


def gradient_bytes(request: AttentionRequest) -> int:
    """Bytes of the gradients of query, key and value."""
    queries, keys = request.batch * request.heads_q * request.len_q, request.batch * request.heads_kv * request.len_k
    return (queries * request.dim_qk + keys * (request.dim_qk + request.dim_v)) * DTYPE_BYTES[request.dtype]


def mask_bytes(request: AttentionRequest) -> int:
    """Bytes of the mask as float32 numbers, where it is converted to them; a float32 mask is read as it is."""
    if request.mask is MaskKind.NONE or (request.mask is MaskKind.ADDITIVE and request.dtype == "float32"):
        return 0
    return request.mask_batch * request.mask_heads * request.len_q * request.len_k * 4


def padded_operands(request: AttentionRequest, *, backward: bool = False) -> list[int]:
    """Bytes of copies of the operands whose head size is not the programs': query, key, value, output.

    `backward`: also of the gradients.
    """
    dim, size = padded_dim(request), DTYPE_BYTES[request.dtype]
    queries = request.batch * request.heads_q * request.len_q * dim * size
    keys = request.batch * request.heads_kv * request.len_k * dim * size
    dims = [(request.dim_qk, queries), (request.dim_qk, keys), (request.dim_v, keys), (request.dim_v, queries)]
    if backward:
        dims += [(request.dim_v, queries), (request.dim_qk, queries), (request.dim_qk, keys), (request.dim_v, keys)]
    return [nbytes for given, nbytes in dims if given != dim]


def part_bytes(sizes: Sizes, splits: int) -> list[int]:
    """Bytes of the parts that splits of the keys leave: normalised outputs, and a maximum and a sum per row."""
    rows = sizes.units * sizes.unit_rows
    return [splits * rows * sizes.dim * 4, splits * rows * 8] if splits > 1 else []


def block_bytes(nbytes: int) -> int:
    """Bytes of the buffer for a block: whole pages, and room to start at one."""
    return -(-nbytes // PAGE) * PAGE + PAGE


def pooled_bytes(nbytes: int) -> int:
    """Bytes that `PooledMemory` takes from torch's allocator for a buffer."""
    size = max(512, 1 << max(nbytes - 1, 0).bit_length())
    if size > 1 << 16:
        step = max(size >> 4, 1 << 14) if size <= 1 << 23 else 1 << 20
        size = -(-nbytes // step) * step
    return size


def workspace_bytes(alignment: int, *calls: Sequence[int]) -> int:
    """Bytes that a CPU's pool takes from torch's allocator.

    Args:
        alignment: of its regions.
        calls: bytes of the regions of each call, in turn; a call reuses the blocks of earlier ones.
    """
    blocks: list[int] = []
    for regions in calls:
        left = list(blocks)
        for nbytes in regions:
            size = max(-(-nbytes // alignment), 1) * alignment
            place = next((n for n, rest in enumerate(left) if rest >= size), None)
            if place is None:
                blocks.append(max(size, HOST_BLOCK))
                left.append(blocks[-1])
                place = len(left) - 1
            left[place] -= size
    return sum(pooled_bytes(block_bytes(block)) for block in blocks)
