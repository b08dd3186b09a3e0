"""Tiles are skipped where the caller asks for it, never otherwise: what can be asked, and which requests it serves.

    with hal.use("cuda", options={"skip_tiles": 12}):
        out = hal.attention(query, key, value)
    hal.session("cuda:0").skipped_tiles()

With 12 a tile of keys adds nothing to a tile of rows where in none of the rows it has a weight of 2^-12 or more of the
largest weight that the row has met so far.
"""

from __future__ import annotations

from collections.abc import Iterator

from hal_core.plugin_api import AttentionRequest, Code, MaskKind, Range, Refusal

OPTIONS = {"skip_tiles": Range(4, 100)}


def threshold_of(request: AttentionRequest) -> int | None:
    """n of the threshold 2^-n that a request asks for; None where it does not ask."""
    found: int | None = dict(request.options).get("skip_tiles")
    return found


def refusals(request: AttentionRequest) -> Iterator[Refusal]:
    """Why a request that asks for skipped tiles is not served."""
    r = request
    if threshold_of(r) is None:
        return
    rows: tuple[tuple[bool, str, str, str], ...] = (  # (refused, field, wanted, offered)
        ("fp8" in dict(r.options), "option", "fp8", "either of them"),
        (r.dtype not in ("float16", "bfloat16"), "dtype", r.dtype, "float16 or bfloat16"),
        (r.mask is not MaskKind.NONE, "mask", str(r.mask), "none"),
        (r.window is not None, "window", str(r.window), "no window"),
        (r.softcap is not None, "softcap", str(r.softcap), "no softcap"),
        (r.dropout > 0, "dropout", str(r.dropout), "no dropout"),
        (r.packed, "packed", "packed lengths", "padded batches"),
        (r.page_size is not None, "page_size", str(r.page_size), "no pages"),
        (r.used, "used", "used lengths", "all keys"),
        (r.cache_dtype is not None, "cache_dtype", str(r.cache_dtype), "the query's dtype"),
        (r.block_plan is not None, "block_plan", str(r.block_plan), "dense"),
        (r.tiling is not None, "tiling", str(r.tiling), "its own tiling"),
        (bool(r.grads), "backward", f"gradients of {', '.join(sorted(r.grads))}", "forward alone"),
        (r.max_error is not None, "max_error", str(r.max_error), "no bound that is known beforehand"),
    )
    for refused, field, wanted, offered in rows:
        if refused:
            yield Refusal(Code.OPTION, field, f"{wanted} with skip_tiles", offered, 'leave "skip_tiles" out')
