"""How a Triton kernel is launched: compiled beforehand for a fixed signature, or by Triton's own launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ..discovery import Chip
from . import binaries

Launcher = Callable[[tuple[int, int, int], Sequence[Any], list[Any]], None]

_ALIGNED = dict.fromkeys("qkv", 16) | dict.fromkeys(("q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n"), 8)
_ALIGNED_BYTES = dict.fromkeys(("k_b", "k_h", "k_n"), 16)  # values are words then, or read as they are
_ALIGNED_RESULT = {"out": 16, "o_b": 8, "o_h": 8, "o_m": 8}
_ALIGNED_GRAD = {"grad_out": 16, "g_b": 8, "g_h": 8, "g_m": 8}
_ALIGNED_GRADS = dict.fromkeys(("dq", "dk", "dv"), 16) | {
    f"d{name}": size for name, size in _ALIGNED.items() if size == 8
}


def dependent_launch(chip: Chip) -> bool:
    """Whether a kernel may be launched before the one that it waits for has ended."""
    return chip.capability >= (9, 0) and not binaries.INTERPRETED


def current_stream(chip: Chip) -> int:
    """The handle of torch's current stream on the chip; 0 in Triton's interpreter."""
    return 0 if binaries.INTERPRETED else torch._C._cuda_getCurrentRawStream(chip.index)


def launcher(
    chip: Chip,
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Mapping[str, int] = MappingProxyType({}),
    **options: Any,
) -> Launcher:
    """A callable (grid, tensors, arguments) that launches a kernel on torch's current stream.

    Args:
        chip: the device to launch on.
        fn: the jitted function.
        signature: Triton type of each run-time argument.
        constants: the constexpr arguments.
        divisible: what arguments are known to be multiples of (pointers in bytes).
        options: num_warps, launch_pdl.

    Returns:
        The callable. tensors: for the kernel's first arguments, in order; None for unused ones. arguments: those after
        them.
    """
    if binaries.INTERPRETED or not binaries.tested():
        return _by_triton(fn, constants, options)
    parts = (signature, constants, divisible, options)
    key = (fn.__name__, chip.index, *(tuple(part.items()) for part in parts))
    made = binaries.kernel(key, lambda: compiled(chip, fn, *parts))
    tail = [None] * len(constants)
    current = torch._C._cuda_getCurrentRawStream
    index = chip.index

    def run(grid: tuple[int, int, int], tensors: Sequence[Any], arguments: list[Any]) -> None:
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        made(grid, current(index), (*pointers, *arguments, *tail))

    return run


def compiled(
    chip: Chip,
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Mapping[str, int],
    options: Mapping[str, Any],
) -> Any:
    """The Triton CompiledKernel that `launcher` launches; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * chip.capability[0] + chip.capability[1], 32)
    known = dict(divisible) | ({"part": 16} if "part" in signature else {})
    if constants.get("ALIGNED"):
        known |= _ALIGNED | (_ALIGNED_RESULT if constants.get("DV", 1) % 8 == 0 else {})
    known |= _ALIGNED_BYTES if constants.get("ALIGNED") and constants.get("CACHE") else {}
    known |= _ALIGNED_GRAD if constants.get("GRAD_ALIGNED") else {}
    known |= _ALIGNED_GRADS if constants.get("RESULT_ALIGNED") else {}
    return binaries.compile_for(fn, signature, constants, target, known, **options)


def _by_triton(fn: Any, constants: Mapping[str, Any], options: Mapping[str, Any]) -> Launcher:
    """Triton's own launch: slower, and the same in the interpreter and in versions that this package was not tested
    with.
    """

    def run(grid: tuple[int, int, int], tensors: Sequence[Any], arguments: list[Any]) -> None:
        given = [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in tensors]
        fn[grid](*given, *arguments, **constants, **({} if binaries.INTERPRETED else options))

    return run
