"""A long sequence on one device: batch entries, heads, and blocks of queries and keys one after the other, put together
by the ring's own sums.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, MaskKind, UnsupportedError
from hal_core.plugin_api import DTYPE_BYTES, registry

from .description import Description, Given
from .draws import NOISE_BLOCK, Draws, drawn
from .inner import Inner, choose
from .parts import cut
from .ring import RingPlan, attend

#: Bytes that blocks may take beside inputs and results on a device of host memory, where the call does not say.
MEMORY = 128 << 20
_SMALLEST = 64
_PATTERN = 16  # bytes of a pair under dropout: int32 words, and what mixes them


class Blocks(NamedTuple):
    """What is computed at once, by its device's request, and the bytes that it takes."""

    inner: Inner
    needed: int


def one_device(given: Given, d: Description, rng: Any, memory: int | None) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of a whole sequence. Keys and values may lie in host memory while the query is elsewhere: they
    come block by block.

    Raises:
        UnsupportedError: the smallest blocks take more than `memory`, with the bytes that they take.
    """
    blocks = choose_blocks(d, memory, given.key.device != given.query.device)
    inner, r = blocks.inner, blocks.inner.request
    batch, heads, *most = (1, 1, NOISE_BLOCK, NOISE_BLOCK) if inner.noisy else (r.batch, r.heads_kv, r.len_q, r.len_k)
    random = inner.noisy or d.dropout > 0
    rng = drawn(rng, random)
    draws = Draws(d.dropout, rng) if random else None
    parts, bound = cut(d.request, batch, heads), (most[0], most[1])
    return attend(RingPlan(None, inner, d.queries.pieces, d.keys.pieces, 0, d.rule, bound, draws, parts), given)


def choose_blocks(d: Description, memory: int | None, moved: bool) -> Blocks:
    """The largest blocks whose calls and sums take at most `memory` bytes beside inputs and results.

    Args:
        memory: None for the device's configured limit; without one, `MEMORY` or half of an accelerator's memory for
            the calls, whatever the sums take. moved: whether keys and values lie on another device than the query.

    Raises:
        UnsupportedError: no device runs any, or the smallest take more.
    """
    r, found, limit = d.request, None, memory
    refused: UnsupportedError | None = None
    for request in _smaller(r):
        try:
            inner = choose(request, d.policy)
        except UnsupportedError as error:  # a device has bounds of its own
            refused = error
            continue
        calls, sums = _calls(d, request, inner, moved), _sums(d, request, moved)
        found = Blocks(inner, calls + sums)
        limit = registry.memory_limit(inner.device) if memory is None else memory
        if calls <= _default(r, inner) if limit is None else found.needed <= limit:
            return found
    if found is None:
        assert refused is not None
        raise refused
    if limit is None:
        return found
    raise UnsupportedError(
        f"a limit of {limit:,} bytes was given, and the smallest blocks ({request.len_q} x {request.len_k} of one "
        f"head) take {found.needed:,} with the sums of that head: pass memory={found.needed} or more. Nothing was "
        "allocated"
    )


def _smaller(r: AttentionRequest) -> Iterator[AttentionRequest]:
    """Requests from the whole call down: fewer batch entries, fewer heads, then halves of the longer side."""
    batch, heads, rows, keys, group = (
        r.batch,
        r.heads_kv,
        max(r.len_q, 1),
        max(r.len_k, 1),
        r.heads_q // max(r.heads_kv, 1),
    )
    while True:
        sizes: dict[str, Any] = {
            "batch": batch,
            "heads_q": heads * group,
            "heads_kv": heads,
            "len_q": rows,
            "len_k": keys,
        }
        of_mask: dict[str, Any] = {
            "mask_batch": min(r.mask_batch, batch),
            "mask_heads": min(r.mask_heads, heads * group),
        }
        yield replace(r, **sizes, **of_mask)
        if batch > 1:
            batch = 1
        elif heads > 1:
            heads = next(heads // n for n in range(2, heads + 1) if heads % n == 0)
        elif max(rows, keys) > _SMALLEST:
            rows, keys = (-(-rows // 2), keys) if rows >= keys else (rows, -(-keys // 2))
        else:
            return


def _default(r: AttentionRequest, inner: Inner) -> int:
    """Bytes of calls where nobody set a limit."""
    whole = hal.device(inner.device).memory
    return MEMORY if whole is None or r.device == "cpu" else whole // 2


def _calls(d: Description, call: AttentionRequest, inner: Inner, moved: bool) -> int:
    """Bytes that one call takes, with what is brought and cut out for it."""
    size, estimate = DTYPE_BYTES[call.dtype], inner.decision.winner.estimate
    rows, keys = call.batch * call.heads_q, call.batch * call.heads_kv
    needed = 0 if estimate is None else estimate.memory
    if moved:
        needed += keys * call.len_k * (call.dim_qk + call.dim_v) * size
    if rows > 1:  # of one head they are views
        needed += rows * call.len_q * call.dim_v * size * (2 if call.grads else 1)
    if call.mask is not MaskKind.NONE:
        needed += call.mask_batch * call.mask_heads * call.len_q * call.len_k * size
    needed += rows * call.len_q * call.len_k * _PATTERN * bool(d.dropout)
    # Half of host memory is for what the process has freed and not given back to the system.
    return needed * (2 if call.device == "cpu" else 1)


def _sums(d: Description, call: AttentionRequest, moved: bool) -> int:
    """Bytes of the sums of a call's heads over the whole sequence, where the results themselves do not hold them."""
    narrow, wide = DTYPE_BYTES[call.dtype] < 4, max(DTYPE_BYTES[call.dtype], 4)
    rows, keys = call.batch * call.heads_q * d.request.len_q, call.batch * call.heads_kv * d.request.len_k
    width = 3  # the largest log-sum-exp, the sum below it, and both put together
    if narrow:
        width += max(call.dim_v, call.dim_qk if "q" in call.grads else 0)
    back = (call.dim_qk + call.dim_v) * bool(call.grads) * (narrow or moved)
    return (rows * width + keys * back) * wide
