"""Attention on torch tensors by the compiled kernels. What they do not take is refused by name; nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import STRUCT, Kernel, NativeRefusal, refuse, sizes_of
from .library import load, share_torchs_threads


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
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
        mask: bool, broadcastable to [batch, heads_q, len_q, len_k]; False hides a key.
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
    )
    # A bool is one byte; a broadcast dimension has stride 0.
    hidden = None if mask is None else mask.expand(batch, heads, len_q, key.shape[2])
    tensors = (query, key, value, hidden, out, lse)
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
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        0 if workspace is None else workspace.nbytes,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        *sizes,
    )


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
    if mask is not None and (mask.dtype != torch.bool or mask.device.type != "cpu"):
        raise NativeRefusal(f"a mask of dtype {mask.dtype} on {mask.device} is not taken: bool on the CPU is")
