# ruff: noqa: N803
"""gelu(X W^T + bias) in CUDA C++."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..extra.checks import aligned, chip_of
from ..extra.forms import gelu_of_product, unit
from . import module


def _run(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, tanh: bool) -> None:
    """A `forms.Multiply`: on tensor cores where the rows of 16-bit tensors begin at multiples of 16 bytes."""
    chip = chip_of(x.device)
    rows, depth = x.shape
    columns, w_unit = w.shape[0], unit(w, "n")
    stored_by_rows = w_unit == "n"
    steps = (x.stride(0), w.stride(1) if stored_by_rows else w.stride(0), columns if stored_by_rows else depth)
    cores = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and chip.capability >= (8, 0))
    cores = cores and x.stride(1) == 1 and bool(w_unit) and aligned(x, w) and not any(step % 8 for step in steps)
    cores = cores and depth % 8 == 0
    definitions = {"ELEMENT": module.ELEMENTS[x.dtype]}
    if cores:
        definitions["STORED_BY_ROWS"] = str(stored_by_rows).lower()
    made = module.function("gelu_linear", "tensor" if cores else "plain", definitions, chip.index)
    tile = 128 if cores else 64
    sizes = [np.int64(n) for n in (rows, columns, depth, *x.stride(), *w.stride())]
    blocks = -(-rows // tile) * -(-columns // tile)
    module.launch(made, chip.index, blocks, 256, (x, w, bias, out, *sizes, np.int32(tanh)))


def fused_gelu_linear(X: Tensor, W: Tensor, bias: Tensor | None = None, use_tanh_approx: bool = False) -> Tensor:
    """gelu(X W^T + bias) in one kernel; products are added in float32, and rounded once. Differentiable.

    Args:
        X: [M, K], W: [N, K], bias: [N] or None, of one dtype, float32, float16 or bfloat16, on one CUDA device, any
            strides. 16-bit tensors are multiplied on tensor cores where their rows begin at multiples of 16 bytes; W
            may be the transpose of a matrix stored [K, N].
        use_tanh_approx: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), as GPT-2 has it, and not x * Phi(x).

    Returns:
        [M, N] of the inputs' dtype. Gradients are computed by torch's operations.

    Raises:
        ContractError: other shapes, dtypes or devices. DeviceUnavailableError: CuPy or NVRTC is missing.
    """
    return gelu_of_product("fused_gelu_linear", X, W, bias, use_tanh_approx, False, _run)
