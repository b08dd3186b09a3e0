"""Sums of two tensors in CUDA C++."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..extra.checks import aligned, check_tensors, chip_of, refuse, shapes
from . import module


def vector_add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, elementwise, laid out in memory as `a` is where its elements fill their memory.

    Args:
        a, b: CUDA tensors of one shape and dtype, float32, float16 or bfloat16. Tensors that lie in memory otherwise
            than each other, or with gaps, are copied.

    Raises:
        ContractError: other shapes, dtypes or devices. DeviceUnavailableError: CuPy or NVRTC is missing.
    """
    check_tensors("vector_add", False, [a, b])
    refuse("vector_add", (a.shape != b.shape, f"{shapes(a, b)}: make the shapes equal"))
    out = torch.empty_like(a)
    if not out.numel():
        return out
    a, b = (t if t.stride() == out.stride() else torch.empty_like(out).copy_(t) for t in (a, b))
    index = chip_of(a.device).index
    made = module.function("vector_add", "add", {"ELEMENT": module.ELEMENTS[a.dtype]}, index)
    block = 256 * 2 * 16 // a.itemsize
    fast = np.int32(aligned(a, b, out))
    module.launch(made, index, -(-out.numel() // block), 256, (a, b, out, np.int64(out.numel()), fast))
    return out
