"""A call as the bytes of its C struct, and what it needs: no torch."""

from __future__ import annotations

import enum
import math
from typing import Any, NoReturn

from .library import BACKWARD, ISAS, STRUCT, load

#: Pointers, strides and the sizes of a plan's blocks, which come first.
POINTERS = 31
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
#: Most rows (queries times group) of the decode kernel, and what divides its head sizes.
DECODE_ROWS, DECODE_UNIT = 16, 32
#: What divides the prefill kernel's head sizes, and the largest of both kernels.
UNIT, MOST_HEAD_DIM = 8, 512
_NO_BOUND = 1 << 40


class Kernel(enum.IntEnum):
    """Which kernel runs: AUTO takes DECODE for at most 16 rows (queries times group) and PREFILL for more."""

    AUTO = 0
    PREFILL = 1
    DECODE = 2


class MaskKind(enum.IntEnum):
    """What the elements of a mask are: bytes of which 0 hides a key, or numbers added to the scores."""

    BYTES = 0
    FLOAT32 = 1
    OF_DTYPE = 2


class NativeRefusal(ValueError):  # noqa: N818, the house says refusal
    """The compiled kernels do not take this call, or are not there; the message says what they take."""


def sizes_of(
    shapes: tuple[int, int, int, int, int, int, int],
    dtype: str,
    threads: int,
    *,
    scale: float = 1.0,
    band: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    isa: str | None = None,
    kernel: Kernel = Kernel.AUTO,
    mask_kind: MaskKind = MaskKind.BYTES,
) -> tuple[Any, ...]:
    """The call's fields after its pointers and strides; `shapes` are batch, heads_q, heads_kv, len_q, len_k, dim_qk and
    dim_v. Raises NativeRefusal for what the C interface has no number for.
    """
    if dtype not in DTYPES:
        raise NativeRefusal(f"dtype {dtype} is not taken: float32, bfloat16 and float16 are")
    if isa is not None and isa not in ISAS:
        raise NativeRefusal(f"instruction set {isa!r} is unknown: {', '.join(ISAS)} are known")
    if softcap is not None and not 0 < softcap < math.inf:
        raise NativeRefusal(f"softcap {softcap} is not taken: a number above 0 is")
    low, high = band
    return (
        *shapes,
        -_NO_BOUND if low is None else max(-_NO_BOUND, min(low, _NO_BOUND)),
        _NO_BOUND if high is None else max(-_NO_BOUND, min(high, _NO_BOUND)),
        scale,
        0.0 if softcap is None else softcap,
        DTYPES[dtype],
        0 if isa is None else ISAS[isa],
        int(kernel),
        threads,
        int(mask_kind),
    )


def workspace_bytes(
    shapes: tuple[int, int, int, int, int, int, int],
    dtype: str,
    threads: int,
    *,
    isa: str | None = None,
    kernel: Kernel = Kernel.AUTO,
    backward: bool = False,
) -> int:
    """Bytes of workspace of a call, or of its backward pass.

    Args:
        shapes: batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v. dtype: as torch names it.
        threads: that work on it. isa, kernel: as in `attention`.

    Raises:
        NativeRefusal: as `attention` does.
    """
    library = load().library
    if library is None:
        raise NativeRefusal(load().why)
    sizes = sizes_of(shapes, dtype, threads, isa=isa, kernel=kernel)
    call = STRUCT.pack(*[0] * POINTERS, *sizes)
    if backward:
        needed = int(library.hal_cpu_native_backward_workspace(call + bytes(BACKWARD.size)))
    else:
        needed = int(library.hal_cpu_native_workspace(call))
    return needed if needed >= 0 else refuse(-needed)


def refuse(status: int) -> NoReturn:
    """Raise the sentence of a status of the C interface."""
    library = load().library
    assert library is not None
    raise NativeRefusal(library.hal_cpu_native_message(status).decode())
