"""What the kernels need to know of a chip, and how they are launched on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

from . import compiled

Launcher = Callable[[tuple[int, int, int], Sequence[Any], list[Any]], None]

_ALIGNED = dict.fromkeys("qkv", 16) | dict.fromkeys(("q_b", "q_h", "q_m", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n"), 8)
_ALIGNED_RESULT = {"out": 16, "o_b": 8, "o_h": 8, "o_m": 8}


@attrs.frozen(kw_only=True)
class Chip:
    """A device as its kernels see it.

    Attributes:
        index: torch's CUDA index. capability: (major, minor). multiprocessors: how many.
        shared_memory: bytes that one program may have. decode_programs: of the decode path that fit on one
            multiprocessor.
        torch_attention: whether torch's own fused attention runs there.
    """

    index: int
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    decode_programs: int = 1
    torch_attention: bool = True

    @classmethod
    def of(cls, index: int) -> Chip:
        """The chip of an initialised CUDA device."""
        facts = torch.cuda.get_device_properties(index)
        return cls(
            index=index,
            capability=(facts.major, facts.minor),
            multiprocessors=facts.multi_processor_count,
            shared_memory=facts.shared_memory_per_block_optin,
        )

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may be launched before the one it waits for has ended."""
        return self.capability >= (9, 0) and not compiled.INTERPRETED

    def stream(self) -> int:
        """Handle of torch's current stream there."""
        return 0 if compiled.INTERPRETED else torch._C._cuda_getCurrentRawStream(self.index)

    def launcher(self, fn: Any, signature: Mapping[str, str], constants: Mapping[str, Any], **options: Any) -> Launcher:
        """A callable (grid, tensors, arguments) that launches on torch's current stream.

        tensors: for the kernel's first arguments, in order; None for unused ones. arguments: the ones after them.
        """
        if compiled.INTERPRETED or not compiled.tested():
            return self._by_triton(fn, constants, options)
        key = (fn.__name__, self.index, tuple(signature.items()), tuple(constants.items()), tuple(options.items()))
        made = compiled.kernel(key, lambda: self._compiled(fn, signature, constants, options))
        tail = [None] * len(constants)
        current = torch._C._cuda_getCurrentRawStream
        index = self.index

        def run(grid: tuple[int, int, int], tensors: Sequence[Any], arguments: list[Any]) -> None:
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            made(grid, current(index), (*pointers, *arguments, *tail))

        return run

    def _compiled(self, fn: Any, signature: Mapping[str, str], constants: Mapping[str, Any], options: Any) -> Any:
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)
        divisible = {"part": 16} if "part" in signature else {}
        if constants.get("ALIGNED"):
            divisible |= _ALIGNED | (_ALIGNED_RESULT if constants["DV"] % 8 == 0 else {})
        return compiled.compile_for(fn, signature, constants, target, divisible, **options)

    @staticmethod
    def _by_triton(fn: Any, constants: Mapping[str, Any], options: Mapping[str, Any]) -> Launcher:
        """Triton's own launch: slower, and the same in the interpreter and in versions this package was not run
        with.
        """

        def run(grid: tuple[int, int, int], tensors: Sequence[Any], arguments: list[Any]) -> None:
            given = [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in tensors]
            fn[grid](*given, *arguments, **constants, **({} if compiled.INTERPRETED else options))

        return run
