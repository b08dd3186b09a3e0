"""Which kernel serves a request, decided from its static fields, without torch."""

from __future__ import annotations

from typing import Literal

from hal_core.plugin_api import AttentionRequest, Causal, MaskKind

from .discovery import this_machine

Path = Literal["native", "packed", "fused", "decode", "blocks", "tiled"]

#: Query rows that share a key head (group times len_q) up to which packing them into one product pays.
MOST_PACKED_ROWS = 128
#: Rows up to which all scores of a call are held at once.
MOST_DECODE_ROWS = 32
#: Bytes of key and value from which float16 is better widened chunk by chunk than given to torch's kernel.
FEWEST_WIDENED_BYTES = 1 << 20
#: Smallest blocks of a plan that are multiplied as blocks, and the most scores of the rows of one block.
SMALLEST_BLOCK = 8
MOST_BLOCK_SCORES = 1 << 22


def path_of(request: AttentionRequest) -> Path:
    """The path of a request, from its static fields alone. A packed sequence is asked about by itself.

    native: torch's scaled_dot_product_attention. packed: the same with the heads of a group as rows. fused: torch's
    kernel with its log-sum-exp. decode: few query rows, arranged around reading the keys. blocks: a block plan, many
    query blocks at once. tiled: everything else.
    """
    if _multiplies_blocks(request):
        return "blocks"
    special = bool(
        request.softcap is not None
        or request.window is not None
        or request.cache_dtype is not None
        or request.page_size is not None
        or request.used
        or request.block_plan is not None
        or request.dropout
        or request.tiling is not None
        or "mask" in request.grads
        or request.grad_lse
        or request.effective_scale <= 0  # torch's kernel multiplies the mask's -inf by it
    )
    masked, causal = request.mask is not MaskKind.NONE, sees_less(request)
    shifted = causal and (request.causal is Causal.BOTTOM_RIGHT or request.diagonal != 0)
    tiled = special or (masked and (causal or request.lse))
    rows = request.len_q * (request.heads_q // max(request.heads_kv, 1))
    if not (request.grads or request.dropout or request.block_plan or request.tiling):
        if rows <= MOST_DECODE_ROWS and (tiled or (shifted and rows) or (not causal and _worth_streaming(request))):
            return "decode"
        if not tiled and not causal and not request.lse and rows <= MOST_PACKED_ROWS and _worth_packing(request):
            return "packed"
    if tiled:
        return "tiled"
    return "fused" if request.lse or shifted else "native"


def _multiplies_blocks(request: AttentionRequest) -> bool:
    """Whether a block plan is run as products over gathered blocks: no mask, no dropout, no cache of another form."""
    if request.block_plan is None:
        return False
    block_q, block_k, most = request.block_plan
    most = min(most, -(-request.len_k // max(block_k, 1)))
    scores = block_q * (request.heads_q // max(request.heads_kv, 1)) * block_k * most
    return (
        min(block_q, block_k) >= SMALLEST_BLOCK
        and scores <= MOST_BLOCK_SCORES
        and request.mask is MaskKind.NONE
        and not request.dropout
        and request.cache_dtype is None
        and request.page_size is None
    )


def sees_less(request: AttentionRequest) -> bool:
    """Whether causal hides anything: the last row of a bottom-right diagonal reads every key."""
    if request.causal is Causal.NONE:
        return False
    return not (request.causal is Causal.BOTTOM_RIGHT and request.len_q == 1 and request.diagonal >= 0)


def _worth_packing(request: AttentionRequest) -> bool:
    """Grouped heads, or the one bfloat16 row that torch multiplies by a slow path."""
    return request.heads_q != request.heads_kv or doubles(request)


def doubles(request: AttentionRequest) -> bool:
    """Whether a single query row is computed twice: torch's product of one bfloat16 row takes twice that of two."""
    return request.dtype == "bfloat16" and request.len_q == 1 and request.heads_q == request.heads_kv


def _worth_streaming(request: AttentionRequest) -> bool:
    """Whether widening a float16 cache chunk by chunk beats torch's kernel, which multiplies float16 slowly."""
    size = request.batch * request.heads_kv * request.len_k * (request.dim_qk + request.dim_v)
    return widens(request) and size * 2 >= FEWEST_WIDENED_BYTES


def widens(request: AttentionRequest) -> bool:
    """Whether float16 is computed in float32: without float16 products torch's kernel takes twice float32's time."""
    return request.dtype == "float16" and not this_machine().multiplies_float16


def reads_in_place(request: AttentionRequest) -> bool:
    """Whether keys and values are read where they lie, with nothing converted or gathered."""
    plain = request.dtype in ("float32", "float64") and request.cache_dtype is None and request.page_size is None
    return plain and request.last_dim_contiguous
