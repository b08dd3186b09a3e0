"""Block plans made ready for the attention kernel, without waiting for the device."""

from __future__ import annotations

from functools import lru_cache

import torch

from hal_core.plugin_api import BlockPlan

from .chip import Chip, Launcher
from .kernels.plan import list_once

_POINTERS = ("index", "count", "out", "out_count")
#: Entries of a list taken at a time, and how many of those before them they are compared with at a time. Small: lists
#: are short as a rule, and then a row waits for memory and little else.
TILE = {"BLOCK": 32, "AGAINST": 64}


def listed_once(plan: BlockPlan, chip: Chip) -> BlockPlan:
    """The same plan with each row's blocks named once and side by side in memory: int32 of the given sizes, contiguous.

    A row that lists a block twice means it once, as `hal_core.expand_block_plan` has it.
    """
    indices, counts = plan.indices, plan.counts
    if indices.shape[3] <= 1 and counts.is_contiguous():
        return plan
    once = BlockPlan(
        plan.block_q,
        plan.block_k,
        torch.empty_like(indices, memory_format=torch.contiguous_format),
        torch.empty_like(counts, memory_format=torch.contiguous_format),
    )
    batch, heads, rows, most = indices.shape
    if indices.numel():
        _launcher(chip)(
            (rows, heads, batch),
            (indices, counts, once.indices, once.counts),
            [*indices.stride(), *counts.stride(), most],
        )
    return once


def list_once_signature() -> dict[str, str]:
    """Triton types of `list_once`'s run-time arguments."""
    return dict.fromkeys(list_once.arg_names, "i64") | dict.fromkeys(_POINTERS, "*i32") | {"most": "i32"}


@lru_cache(maxsize=64)
def _launcher(chip: Chip) -> Launcher:
    return chip.launcher(list_once, list_once_signature(), TILE, num_warps=4)
