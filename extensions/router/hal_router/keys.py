"""What a request has in common with others, for a router that learns: its kind, its size, its shape."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from hal_core import AttentionRequest, Causal, MaskKind

_CAUSAL_NONE, _MASK_NONE = Causal.NONE, MaskKind.NONE


class Keys(NamedTuple):
    """What is learned by: the kind of request, its size in octaves of work, its bucketed shape."""

    kind: str
    size: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, request: AttentionRequest) -> Keys:
        r = request
        heads, len_q, len_k = r.heads_q, r.len_q, r.len_k
        kind = _kind(
            r.dtype,
            len_q * heads <= 32 * (r.heads_kv or 1),
            r.causal,
            r.mask,
            r.window is not None,
            r.softcap is not None,
            r.lse,
            bool(r.grads),
            r.packed,
            r.page_size is not None,
            r.cache_dtype,
            r.block_plan is not None,
        )
        dims = r.dim_qk + r.dim_v
        # Where nothing but the causal mask hides pairs, half of them are hidden, and the kind says so already.
        plain = r.window is None and r.block_plan is None
        macs = r.batch * heads * len_q * len_k * dims if plain else r.visible_macs
        shape = (r.batch, heads, r.heads_kv, len_q, len_k, r.dim_qk, r.dim_v)
        return tuple.__new__(cls, (kind, (macs or 1).bit_length(), shape))


@cache
def _kind(
    dtype: str,
    decode: bool,
    causal: Causal,
    mask: MaskKind,
    window: bool,
    softcap: bool,
    lse: bool,
    grads: bool,
    packed: bool,
    paged: bool,
    cache_dtype: str | None,
    blocks: bool,
) -> str:
    flags = {
        "decode": decode,
        causal.value[:3]: causal is not _CAUSAL_NONE,
        mask.value: mask is not _MASK_NONE,
        "window": window,
        "softcap": softcap,
        "lse": lse,
        "grads": grads,
        "packed": packed,
        "paged": paged,
        cache_dtype or "": cache_dtype,
        "blocks": blocks,
    }
    return " ".join([dtype, *(name for name, is_set in flags.items() if is_set)])
