"""Attention on torch tensors by the compiled kernels. What they do not take is refused by name; nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Kernel, MaskKind, NativeRefusal, refuse, sizes_of
from .library import BACKWARD, STRUCT, load, share_torchs_threads


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    blocks: Tensor | None = None,
    block_size: tuple[int, int] = (0, 0),
    scale: float | None = None,
    band: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
    kernel: Kernel = Kernel.AUTO,
) -> Tensor:
    """softmax(scale query key^T) value, forward only.

    Args:
        query: [batch, heads_q, len_q, dim_qk], float32, bfloat16 or float16, last stride 1.
        key, value: [batch, heads_kv, len_k, dim_qk or dim_v], the query's dtype; query head h reads key head
            h // (heads_q // heads_kv). Head sizes are multiples of 8 up to 512.
        mask: broadcastable to [batch, heads_q, len_q, len_k], any strides. bool: False hides a key. float32 or the
            query's dtype: added to the scaled and softcapped scores; -inf hides a key.
        blocks: a block plan, bool, broadcastable to [batch, heads_q, query blocks, key blocks]; False: no query of the
            block reads a key of the other, and keys that no row of a tile reads cost nothing. Prefill kernel alone.
        block_size: queries and keys in a block of the plan.
        scale: above 0; None: 1 / sqrt(dim_qk).
        band: (low, high): row i reads keys i + low to i + high; None for no bound.
        softcap: c in c * tanh(score / c), applied after scale.
        out: written and returned, [batch, heads_q, len_q, dim_v], last stride 1; None: a new tensor.
        lse: written, natural log-sum-exp of the scores, float32 [batch, heads_q, len_q], contiguous.
        workspace: contiguous, of at least `workspace_bytes`, aligned to 64 bytes; None: allocated.
        threads: at most so many; None: as many as torch uses.
        isa: one of `instruction_sets()`; None: the fastest. kernel: see `Kernel`.

    Returns:
        The output in the query's dtype; a row that reads no key gives 0 and a log-sum-exp of -inf. NaN in a query row
        stays in that row; NaN in keys or values reaches rows of their own batch entry and key head alone.

    Raises:
        NativeRefusal: the kernels do not take the call, or are not there.
    """
    library = load().library
    if library is None:
        raise NativeRefusal(load().why)
    share_torchs_threads()
    _check(query, key, value, mask, out, lse)
    if blocks is not None:
        blocks = _planned(blocks, block_size, query, key)
    if out is None:
        out = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype)
    batch, heads, len_q, dim = query.shape
    sizes = sizes_of(
        (batch, heads, key.shape[1], len_q, key.shape[2], dim, value.shape[3]),
        str(query.dtype).removeprefix("torch."),
        torch.get_num_threads() if threads is None else threads,
        scale=max(dim, 1) ** -0.5 if scale is None else scale,
        band=band,
        softcap=softcap,
        isa=isa,
        kernel=kernel,
        mask_kind=_kind(mask),
    )
    # A bool is one byte; a broadcast dimension has stride 0.
    hidden = None if mask is None else mask.expand(batch, heads, len_q, key.shape[2])
    tensors = (query, key, value, hidden, blocks, out, lse)
    sizes = (*block_size, *sizes)
    given = _packed(*tensors, workspace, sizes)
    if workspace is None:
        needed = library.hal_cpu_native_workspace(given)
        if needed < 0:
            refuse(-needed)
        workspace = torch.empty(max(needed, 1), dtype=torch.uint8)
        given = _packed(*tensors, workspace, sizes)
    status = library.hal_cpu_native_attention(given)
    if status:
        refuse(status)
    return out


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    mask: Tensor | None = None,
    *,
    grad_lse: Tensor | None = None,
    blocks: Tensor | None = None,
    block_size: tuple[int, int] = (0, 0),
    scale: float | None = None,
    band: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    workspace: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of an `attention` call from its output and log-sum-exp.

    Sums are made in float32, in an order that the number of threads does not change: equal calls give equal bits.

    Args:
        query, key, value, mask, blocks, block_size, scale, band, softcap, workspace, threads, isa: as in `attention`;
            lengths above 0, and no plan that differs between heads that share a key head.
        out, lse: what `attention` gave. Additive numbers far below 0 make a log-sum-exp in which float32 keeps little
            of a row's scores: below -256 the gradients of such a row are good to 3e-5.
        grad_out: gradient of the output, of its shape and dtype, last stride 1.
        grad_lse: gradient of the log-sum-exp, float32 [batch, heads_q, len_q], contiguous; None for none.

    Returns:
        The gradients of query, key and value, contiguous, in the query's dtype.

    Raises:
        NativeRefusal: the kernels do not take the call, or are not there.

    Source: Dao 2023 (FlashAttention-2), algorithm 2.
    """
    library = load().library
    if library is None:
        raise NativeRefusal(load().why)
    share_torchs_threads()
    with torch.no_grad():
        _check(query, key, value, mask, out, lse)
        _check(query, key, value, None, grad_out, grad_lse)
    if blocks is not None:
        blocks = _planned(blocks, block_size, query, key)
    batch, heads, len_q, dim = query.shape
    sizes = sizes_of(
        (batch, heads, key.shape[1], len_q, key.shape[2], dim, value.shape[3]),
        str(query.dtype).removeprefix("torch."),
        torch.get_num_threads() if threads is None else threads,
        scale=max(dim, 1) ** -0.5 if scale is None else scale,
        band=band,
        softcap=softcap,
        isa=isa,
        mask_kind=_kind(mask),
    )
    hidden = None if mask is None else mask.expand(batch, heads, len_q, key.shape[2])
    grads = tuple(torch.empty(tensor.shape, dtype=query.dtype) for tensor in (query, key, value))
    tensors, sizes = (query, key, value, hidden, blocks, out, lse), (*block_size, *sizes)
    after = BACKWARD.pack(
        grad_out.data_ptr(),
        0 if grad_lse is None else grad_lse.data_ptr(),
        *(grad.data_ptr() for grad in grads),
        *(stride for tensor in (grad_out, *grads) for stride in tensor.stride()[:3]),
    )
    if workspace is None:
        needed = library.hal_cpu_native_backward_workspace(_packed(*tensors, None, sizes) + after)
        if needed < 0:
            refuse(-needed)
        workspace = torch.empty(max(needed, 1), dtype=torch.uint8)
    status = library.hal_cpu_native_attention_backward(_packed(*tensors, workspace, sizes) + after)
    if status:
        refuse(status)
    return grads[0], grads[1], grads[2]


def read(memory: Tensor, threads: int | None = None) -> None:
    """Read a contiguous tensor once with prefetch on all threads: what decoding is measured against."""
    library = load().library
    if library is None:
        raise NativeRefusal(load().why)
    share_torchs_threads()
    library.hal_cpu_native_read(memory.data_ptr(), memory.nbytes, threads or torch.get_num_threads())


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    blocks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor | None,
    sizes: tuple[Any, ...],
) -> bytes:
    """The call as the bytes of its C struct."""
    return STRUCT.pack(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if blocks is None else blocks.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        0 if workspace is None else workspace.nbytes,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        *((0, 0, 0, 0) if blocks is None else blocks.stride()),
        *sizes,
    )


def _planned(blocks: Tensor, block_size: tuple[int, int], query: Tensor, key: Tensor) -> Tensor:
    """A block plan with the query's batch entries and heads, those that it has in common with stride 0."""
    if blocks.dtype != torch.bool or blocks.device.type != "cpu" or blocks.dim() != 4 or min(block_size) < 1:
        raise NativeRefusal(
            f"blocks of dtype {blocks.dtype} on {blocks.device}, {blocks.dim()} dimensions and {block_size} tokens are "
            "not taken: bool [batch, heads, query blocks, key blocks] on the CPU is"
        )
    lengths, (batch, heads, rows, columns) = (query.shape[2], key.shape[2]), blocks.shape
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[1]):
        raise NativeRefusal(f"blocks of {list(blocks.shape)} do not fit a query of {list(query.shape)}")
    if rows * block_size[0] < lengths[0] or columns * block_size[1] < lengths[1]:
        raise NativeRefusal(f"blocks of {list(blocks.shape)}, {block_size} tokens each, do not cover {lengths}")
    wide = blocks.expand(query.shape[0], query.shape[1], rows, columns)
    return wide if heads > 1 else wide[:, :1].as_strided(wide.shape, (wide.stride(0), 0, *wide.stride()[2:]))


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise NativeRefusal(f"{name} lies on {tensor.device}: tensors of the CPU are taken")
        if tensor.dim() != 4:
            raise NativeRefusal(f"{name} has {tensor.dim()} dimensions: [batch, heads, length, dim] is taken")
        if tensor.dtype != query.dtype:
            raise NativeRefusal(f"{name} has dtype {tensor.dtype}: the query's, {query.dtype}, is taken")
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise NativeRefusal(f"{name} has stride {tensor.stride(3)} in its last dimension: 1 is taken")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NativeRefusal(f"{name} requires a gradient: the kernels have no backward pass")
    batch, heads, len_q, dim = query.shape
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3] or key.shape[3] != dim:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (query, key, value))
        raise NativeRefusal(f"query, key and value of {shapes} do not fit together")
    if out is not None and out.shape != (batch, heads, len_q, value.shape[3]):
        raise NativeRefusal(f"out has shape {list(out.shape)}: {[batch, heads, len_q, value.shape[3]]} is taken")
    if lse is not None and (
        lse.dtype != torch.float32
        or lse.shape != query.shape[:3]
        or not lse.is_contiguous()
        or lse.device.type != "cpu"
    ):
        raise NativeRefusal(f"lse is not contiguous float32 of shape {[batch, heads, len_q]} on the CPU")
    if mask is not None and (mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device.type != "cpu"):
        taken = "bool, float32 or the query's dtype on the CPU is"
        raise NativeRefusal(f"a mask of dtype {mask.dtype} on {mask.device} is not taken: {taken}")
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise NativeRefusal("the mask requires a gradient: the kernels have none for it")


def _kind(mask: Tensor | None) -> MaskKind:
    if mask is None or mask.dtype == torch.bool:
        return MaskKind.BYTES
    return MaskKind.FLOAT32 if mask.dtype == torch.float32 else MaskKind.OF_DTYPE
