"""Triton's interpreter made usable with numpy 2.4, which no longer turns an array of one element into an index."""

from __future__ import annotations

import os
from typing import Any


def prepare() -> None:
    """Call before anything imports Triton. Raises ImportError where Triton is not installed."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    _widen_products(interpreter)
    _round_to_e4m3(interpreter)


def _widen_products(interpreter: Any) -> None:
    """The interpreter keeps bfloat16 as bit patterns and multiplies those; multiply their values instead."""
    import triton.language as tl

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return original(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _round_to_e4m3(interpreter: Any) -> None:
    """The interpreter halves what it rounds up to a power of two; round as torch, which has the GPU's rule."""
    import numpy as np
    import torch
    import triton.language as tl

    original = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, given: Any, kind: Any, rounding: Any) -> Any:
        if (given.dtype.scalar, kind.scalar) != (tl.float32, tl.float8e4nv):
            return original(self, given, kind, rounding)
        numbers = torch.from_numpy(np.ascontiguousarray(given.data)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(numbers.view(torch.uint8).numpy(), tl.float8e4nv)

    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
