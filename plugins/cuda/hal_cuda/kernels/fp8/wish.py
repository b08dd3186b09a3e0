"""FP8 is chosen where the caller asks for it, never otherwise: what can be asked, and which requests it serves.

    with hal.use("cuda", options={"fp8": "block"}):
        out = hal.attention(query, key, value)

Query, key and value come in float16 or bfloat16 and are quantised in the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hal_core.plugin_api import AttentionRequest, Code, MaskKind, Refusal

#: Values of the option "fp8": scales per block of 128 tokens or per head; centred: the mean of the keys is subtracted
#: before they are quantised.
OPTIONS = {"fp8": ("block", "head", "block centred", "head centred")}
#: Largest ||x - reference|| / ||reference|| on normally distributed operands, the reference in float64 on operands
#: before they are quantised; keys with a large common part need "block centred".
ERROR = 0.08
MOST_DIM = 256


class Wish(NamedTuple):
    """How operands are quantised: scales per "block" of 128 tokens or per "head"; centred: with the keys' mean
    subtracted.
    """

    scales: str = "block"
    centred: bool = False


def wish_of(request: AttentionRequest) -> Wish | None:
    """What a request asks for; None where it does not ask for FP8."""
    asked: str | None = dict(request.options).get("fp8")
    return None if asked is None else Wish(asked.split()[0], asked.endswith("centred"))


def refusals(request: AttentionRequest, capability: tuple[int, int], tested: bool) -> Iterator[Refusal]:
    """Why a request that asks for FP8 is not served.

    Args:
        capability: of the device. tested: whether the kernel was run with the installed Triton.
    """
    r = request
    if wish_of(r) is None:
        return
    if capability != (9, 0) or not tested:
        has = "9.0" if capability == (9, 0) else f"{capability[0]}.{capability[1]}"
        given = f"fp8 on compute capability {has}" + ("" if tested else " with an untested Triton")
        yield Refusal(Code.OPTION, "option", given, "9.0 (Hopper) with Triton 3.6", 'leave "fp8" out')
        return
    sizes = f"up to {MOST_DIM}, a multiple of 8"
    rows: tuple[tuple[bool, str, str, str, str], ...] = (  # (refused, field, wanted, offered, fix)
        (r.dtype not in ("float16", "bfloat16"), "dtype", r.dtype, "float16 or bfloat16", "cast to bfloat16"),
        (r.dim_qk > MOST_DIM or r.dim_qk % 8 != 0, "head_dim", str(r.dim_qk), sizes, ""),
        (r.dim_v > MOST_DIM or r.dim_v % 8 != 0, "value_dim", str(r.dim_v), sizes, ""),
        (not r.last_dim_contiguous, "strides", "a strided last dimension", "stride 1", "call contiguous()"),
        (r.mask is not MaskKind.NONE, "mask", str(r.mask), "none", ""),
        (r.window is not None, "window", str(r.window), "no window", ""),
        (r.softcap is not None, "softcap", str(r.softcap), "no softcap", ""),
        (r.dropout > 0, "dropout", str(r.dropout), "no dropout", "call eval()"),
        (not 1e-6 <= r.effective_scale <= 1e6, "scale", str(r.scale), "a scale from 1e-6 to 1e6", ""),
        (r.packed, "packed", "packed lengths", "padded batches", ""),
        (r.page_size is not None, "page_size", str(r.page_size), "no pages", ""),
        (r.used, "used", "used lengths", "all keys", ""),
        (r.cache_dtype is not None, "cache_dtype", str(r.cache_dtype), "the query's dtype", ""),
        (r.block_plan is not None, "block_plan", str(r.block_plan), "dense", ""),
        (r.tiling is not None, "tiling", str(r.tiling), "its own tiling", "leave tiling= out"),
        (bool(r.grads), "backward", f"gradients of {', '.join(sorted(r.grads))}", "forward alone", "use no_grad()"),
        (
            r.max_error is not None and r.max_error < ERROR,
            "max_error",
            str(r.max_error),
            f"{ERROR:g} with e4m3 operands",
            "raise max_error",
        ),
    )
    for refused, field, wanted, offered, fix in rows:
        if refused:
            instead = f"{fix}, or leave fp8 out" if fix else 'leave "fp8" out'
            yield Refusal(Code.OPTION, field, f"{wanted} with fp8", offered, instead)
