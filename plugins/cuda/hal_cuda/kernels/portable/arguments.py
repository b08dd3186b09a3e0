"""What the portable kernels are given beside tensors: Triton types, strides, and what launches differ by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, SequenceMetadata

from ...memory import Borrowed
from ...tiling import power_of_two
from .attend import attend
from .schedule import MERGED

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.bool: "u8",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
STRIDES = 34  # q_b to count_h in the kernel's signature
#: Rows from which a program of `merge` joins several.
MANY_ROWS = 1024
#: What `attend` reads a cache as, by its dtype.
CACHES = {None: 0, "int8": 1, "int4": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}


def merged_at_once(dim_v: int, many: bool) -> tuple[int, int]:
    """(rows, parts of each) that a program of `merge` reads at once: all parts of one row, where there are few rows;
    of many, as many as fill 64 registers of a thread.
    """
    return (max(64 * 128 // (4 * power_of_two(dim_v)), 1), 4) if many else (1, MERGED)


NO_TABLES = SequenceMetadata()
POINTERS = (
    "q",
    "k",
    "v",
    "out",
    "lse",
    "part",
    "arrived",
    "mask",
    "cu_q",
    "cu_k",
    "page_table",
    "seqlens",
    "key_scale",
    "value_scale",
    "plan_index",
    "plan_count",
)
OTHERS = 9  # of the pointers: mask, tables, scales and plan
SEED = STRIDES + 3


def attend_signature(dtype: str, mask: str, key: str, value: str) -> dict[str, str]:
    """Triton types of `attend`'s run-time arguments."""
    types = dict.fromkeys(attend.arg_names, "i32")
    types |= dict.fromkeys(POINTERS, "*i32") | dict.fromkeys(("q", "out"), f"*{dtype}")
    types |= {"k": f"*{key}", "v": f"*{value}", "mask": f"*{mask}"}
    types |= dict.fromkeys(("lse", "part", "key_scale", "value_scale"), "*fp32")
    types |= dict.fromkeys(attend.arg_names[len(POINTERS) : len(POINTERS) + STRIDES], "i64")
    return types | dict.fromkeys(("scale", "softcap", "probability"), "fp32") | {"seed": "i64", "offset": "i32"}


def merge_signature(dtype: str) -> dict[str, str]:
    """Triton types of `merge`'s run-time arguments."""
    types = dict.fromkeys(("o_b", "o_h", "o_m"), "i64") | dict.fromkeys(("splits", "heads", "len_q", "count"), "i32")
    return types | {"part": "*fp32", "out": f"*{dtype}", "lse": "*fp32"}


def last_dim_contiguous(table: Tensor | None, borrow: Borrowed) -> Tensor | None:
    """A table whose last dimension is contiguous: itself, or a copy."""
    if table is None or table.stride(-1) == 1:
        return table
    return borrow(table.shape, table.dtype).copy_(table)


def extras_of(mask: Tensor | None, plan: BlockPlan | None, tables: SequenceMetadata | None) -> Any:
    """What else the arguments depend on."""
    table = tables.page_table if tables is not None else None
    scales = [] if tables is None else [scale for scale in tables[4:] if scale is not None]
    return (
        *((scale.shape, scale.stride()) for scale in scales),
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        None if plan is None else (plan.indices.shape, plan.counts.shape, plan.indices.stride(), plan.counts.stride()),
        None if table is None else (table.shape, table.stride(0)),
    )


def aligned(*tensors: Tensor) -> bool:
    """Whether loads of 16 bytes are possible: from 16-byte addresses, unit last strides, the others in steps of 8
    elements, of bytes 16.
    """
    steps = addresses = 0
    for tensor in tensors:
        batch, head, row, last = tensor.stride()
        if last != 1:
            return False
        step = batch | head | row
        steps |= step if tensor.itemsize > 1 else step >> 1 | step & 1  # in steps of 16 bytes
        addresses |= tensor.data_ptr()
    return not steps % 8 and not addresses % 16


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape lie in memory alike; a dimension of one element may have any stride."""
    return all(n == 1 or a == b for n, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def whole_tiles(request: AttentionRequest, len_k: int, keys: int) -> bool:
    """Whether no tile of keys is cut short, nor a plan's last block, whose tiles may lie behind the keys."""
    if request.packed or request.page_size is not None or request.used:
        return False
    block = keys if request.block_plan is None else request.block_plan[1]
    return not len_k % block and not block % keys


def lse_strides(out: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row of the log-sum-exp."""
    heads, length = out.shape[1:3]
    return heads * length, length, 1


def mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Strides as they are; 0 where the mask is broadcast."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def in_words(value: Tensor) -> Tensor:
    """The bytes of quantised values as words of two where they lie so, else as they are."""
    batch, head, row, last = value.stride()
    odd = (batch | head | row | value.shape[3] | value.data_ptr()) & 1
    narrow = value.dtype == torch.uint8 and value.shape[3] < 64  # four warps want 32 columns of each plane
    return value if odd or narrow or last != 1 else value.view(torch.int16)


def scale_strides(tables: SequenceMetadata | None) -> tuple[int, ...]:
    """Strides of a cache's scales: batch, head and channel of the keys', batch (or page), head and key of the values'.
    Broadcast dimensions have 0.
    """
    if tables is None or tables.key_scale is None:
        return (0,) * 6
    keys, values = (mask_strides(scale[(None,) * (4 - scale.dim())]) for scale in tables[4:])
    return keys[0], keys[1], keys[3], *values[:3]


def scaled_tokens(tables: SequenceMetadata | None) -> bool:
    """Whether every key's value has a scale of its own."""
    scale = None if tables is None else tables.value_scale
    return scale is not None and scale.dim() > 1 and scale.shape[-2] > 1


def plan_strides(plan: BlockPlan | None) -> tuple[int, ...]:
    if plan is None:
        return (0, 0, 0, 0, 0)
    i, c = plan.indices, plan.counts
    sizes = [0 if n == 1 else s for n, s in zip(i.shape[:2], i.stride()[:2], strict=True)]
    counts = [0 if n == 1 else s for n, s in zip(c.shape[:2], c.stride()[:2], strict=True)]
    return (*sizes, i.stride(2), *counts)
