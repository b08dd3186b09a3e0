"""How many bytes a call allocates at its peak, kernel by kernel. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, MaskKind, pooled_size

from ..paths import doubles, path_of, reads_in_place, sees_less, widens
from ..tiling import BlockSizes, CpuTiling, DecodeSizes, TileSizes
from .workspace import BackwardParts, BlockParts, DecodeParts, TiledParts


def peak_memory(request: AttentionRequest, threads: int, multiplies_bfloat16: bool) -> int:
    """Bytes that a call allocates at its peak: results and what the kernel holds beside them; inputs not.

    Args:
        request: lengths exact. With gradients: forward and backward together, their results included.
        threads: that torch uses. multiplies_bfloat16: see `Machine`.
    """
    if not request.packed and request.page_size is None:
        return _dense(request, threads, multiplies_bfloat16)
    # One sequence after the other in the same scratch memory, the longest first; each is written to its place in the
    # results or copied there.
    results = _results(request)
    one = replace(request, packed=False, batch=1)
    alone = _dense(one, threads, multiplies_bfloat16)
    return results + alone - (0 if path_of(one) in ("native", "packed", "fused") else _results(one))


def _results(request: AttentionRequest) -> int:
    """Bytes of output, log-sum-exp and gradients."""
    size, wide = DTYPE_BYTES[request.dtype], _wide(request)
    rows, keys = request.batch * request.heads_q * request.len_q, request.batch * request.heads_kv * request.len_k
    sizes = {
        "q": rows * request.dim_qk * size,
        "k": keys * request.dim_qk * size,
        "v": keys * request.dim_v * size,
        "mask": _mask_elements(request) * size,
    }
    grads = sum(sizes[name] for name in request.grads)
    with_lse = request.lse or (bool(request.grads) and path_of(request) not in ("native", "packed"))
    return rows * request.dim_v * size + rows * wide * with_lse + grads


def _mask_elements(request: AttentionRequest) -> int:
    return request.mask_batch * request.mask_heads * request.len_q * request.len_k


def _dense(request: AttentionRequest, threads: int, multiplies_bfloat16: bool) -> int:
    path = path_of(request)
    if path in ("compiled", "streamed"):
        return _results(request) + _compiled(request, threads)
    if path == "decode":
        return _results(request) + _decode(request, multiplies_bfloat16)
    if path == "blocks":
        return _results(request) + _blocks(request, threads)
    if path == "tiled":
        return _results(request) + _tiled(request, threads)
    return _torch(request, path, threads)


def _compiled(request: AttentionRequest, threads: int) -> int:
    from hal_cpu_native.call import Kernel, workspace_bytes

    sizes = (request.batch, request.heads_q, request.heads_kv, request.len_q, request.len_k)
    dims = (request.dim_qk, request.dim_v)
    if request.block_plan is None:
        needed = workspace_bytes((*sizes, *dims), request.dtype, threads)
        total = pooled_size(needed) if needed else 0
        if request.grads:  # the forward pass's block stays in the pool; a broadcast gradient is copied
            rows = request.batch * request.heads_q * request.len_q
            needed = workspace_bytes((*sizes, *dims), request.dtype, threads, backward=True)
            copied = rows * request.dim_v * DTYPE_BYTES[request.dtype]
            total += sum(pooled_size(part) for part in (needed, copied) if part)
        return total
    # A plan may have a pattern of its own for every batch entry and head: which, only the plan itself says.
    each = (request.batch, request.heads_q, request.heads_q, request.len_q, request.len_k)
    needed = max(
        workspace_bytes((*shapes, *dims), request.dtype, threads, kernel=Kernel.PREFILL) for shapes in (sizes, each)
    )
    block_q, block_k, most = request.block_plan
    lists = request.batch * request.heads_q * -(-request.len_q // block_q)
    table = (lists * most * 8, lists * most, lists * (-(-request.len_k // block_k) + 1))
    return sum(pooled_size(part) for part in (needed, *table) if part)


def _tiled(request: AttentionRequest, threads: int) -> int:
    if request.tiling is not None and 0 not in request.tiling[1:]:
        plan = CpuTiling(*request.tiling[1:]).plan(request, {})
    else:
        plan = CpuTiling().plan(request, {})
    sizes, wide = TileSizes.of(request, plan, threads), _wide(request)
    forward = sum(TiledParts.of(request, sizes))
    if not request.grads:
        return pooled_size(forward * wide)
    # The forward pass's block stays in the pool while the backward takes a larger one.
    total = pooled_size(forward * wide) + pooled_size((forward + sum(BackwardParts.of(request, sizes))) * wide)
    if "mask" in request.grads and DTYPE_BYTES[request.dtype] != wide:  # summed in float32
        total += pooled_size(_mask_elements(request) * wide)
    return total


def _blocks(request: AttentionRequest, threads: int) -> int:
    sizes, wide = BlockSizes.of(request, threads), _wide(request)
    forward = pooled_size(sum(BlockParts.of(request, sizes)) * wide)
    if not request.grads:
        return forward
    return forward + pooled_size(sum(BlockParts.of(request, sizes, backward=True)) * wide)


def _decode(request: AttentionRequest, multiplies_bfloat16: bool) -> int:
    direct, paged = reads_in_place(request), request.page_size is not None
    sizes = DecodeSizes.choose(request, direct=direct, one_batch=paged)
    narrow = (
        request.dtype == "bfloat16"
        and multiplies_bfloat16
        and request.cache_dtype is None
        and not paged
        and request.last_dim_contiguous
    )
    return pooled_size(sum(DecodeParts.of(request, sizes, direct=direct, narrow=narrow)) * _wide(request))


def _torch(request: AttentionRequest, path: str, threads: int) -> int:
    """Of torch's kernel: results, converted operands, a converted mask, and its own buffers for each thread."""
    size, wide = DTYPE_BYTES[request.dtype], _wide(request)
    widened = widens(request) and path != "fused"
    used = 4 if widened else size
    packed = path == "packed"
    group = request.heads_q // max(request.heads_kv, 1)
    dim = max(request.dim_qk, request.dim_v)
    heads, len_q = request.heads_q, request.len_q
    if packed:
        heads, len_q = request.heads_kv, 2 if doubles(request) else group * len_q
    rows = request.batch * heads * len_q
    keys = request.batch * request.heads_kv * request.len_k
    copied = widened or not request.last_dim_contiguous
    operands = 0
    for count, width in ((rows, request.dim_qk), (keys, request.dim_qk), (keys, request.dim_v)):
        if copied or width != dim:
            operands += pooled_size(count * dim * used)
    if packed and request.len_q > 1 and not copied and request.dim_qk == dim:
        operands += pooled_size(rows * dim * used)
    total = operands + rows * dim * used + rows * (8 if request.dtype == "float64" else 4)  # output, log-sum-exp
    if request.mask is not MaskKind.NONE:
        pairs = _mask_elements(request)
        if packed and group * request.len_q > 1 and not doubles(request):
            repeated = pairs * (1 if request.mask_heads > 1 else group)
            total += pooled_size(repeated * (1 if request.mask is MaskKind.BOOLEAN else used))
            pairs = repeated
        if request.mask is MaskKind.BOOLEAN:
            total += pairs * used  # torch makes an additive mask of it
        elif widened:
            total += pooled_size(pairs * used)
    if _is_split(request):  # torch's kernel is called twice
        total += rows * dim * used + rows * wide
    beside = _kernel_buffers(len_q, request.len_k, dim, used, threads)
    if widened:  # afterwards: the converted output, and again when torch's is cut to size
        results = rows * request.dim_v * size
        beside = max(beside, pooled_size(results) + results)
    if path == "fused" and request.grads:
        beside = max(beside, (rows + keys) * 2 * dim * used)
    return total + beside


def _is_split(request: AttentionRequest) -> bool:
    """Whether the fused path computes the keys that every row reads apart from the others."""
    _, upper = request.band(request.len_q, request.len_k)
    return path_of(request) == "fused" and sees_less(request) and upper is not None and 0 < upper < request.len_k - 1


def _kernel_buffers(len_q: int, len_k: int, dim: int, size: int, threads: int) -> int:
    """Scores, maxima, sums and output of one block for each thread, in bytes.

    Source: PyTorch, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.
    """
    rows = min(256 if len_q >= 768 else 64 if len_q >= 192 else 32, len_q)
    columns = min(512, len_k)
    elements = rows * columns + 2 * rows + rows * dim
    return threads * (elements * max(size, 4) + (rows * columns * size if size < 4 else 0))


def _wide(request: AttentionRequest) -> int:
    return 8 if request.dtype == "float64" else 4
