# ruff: noqa: N803, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="attr-defined"
"""Attention in Triton: every feature, any strides, compute capability 8.0 and up; also runs in Triton's interpreter.

One program owns BM query rows of one key head and walks its keys in tiles of BN. With PACK the query heads of a group
share the tile (decode: few queries, so keys are read once for the whole group); with SPLIT the keys are divided among
programs, whose partial results are joined by the last of them (JOIN) or by `merge`.

Sources: Dao 2023 (FlashAttention-2), algorithm 1; Dao et al. 2023 (Flash-Decoding) for split keys.
"""

import triton
import triton.language as tl

from .cache import INT4, PLAIN, added, nothing, of_bytes, of_words, products, scaled_query
from .dropout import kept_pairs, row_words
from .mask_tiles import mask_tile
from .merge import LN2, LOG2E, gathered, settled


@triton.jit
def within(at, low, high):
    """The number at an address, clamped to [low, high], so that a wrong table reads no foreign memory."""
    return tl.minimum(tl.maximum(tl.load(at), low), high)


@triton.jit
def attend(
    q,
    k,
    v,
    out,
    lse,
    part,
    arrived,
    mask,
    cu_q,
    cu_k,
    page_table,
    seqlens,
    key_scale,
    value_scale,
    plan_index,
    plan_count,
    q_b,
    q_h,
    q_m,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    o_b,
    o_h,
    o_m,
    l_b,
    l_h,
    l_m,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    table_b,
    ks_b,
    ks_h,
    ks_d,
    vs_b,
    vs_h,
    vs_n,
    index_b,
    index_h,
    index_m,
    count_b,
    count_h,
    scale,
    softcap,
    probability,
    seed,
    offset,
    heads_kv,
    len_q,
    len_k,
    diagonal,
    left,
    right,
    chunk,
    splits,
    block_q,
    block_k,
    all_q,
    all_k,
    GROUP: tl.constexpr,
    DQ: tl.constexpr,
    DV: tl.constexpr,
    BDQ: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    MASK_UNIT: tl.constexpr,
    BOTTOM: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PACKED: tl.constexpr,
    SEQLENS: tl.constexpr,
    CACHE: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FAST: tl.constexpr,
    REREAD: tl.constexpr,
    PLAN: tl.constexpr,
    PACK: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN: tl.constexpr,
    LSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    SHORT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (row tiles * splits, heads, batch entries or sequences); heads are key heads with PACK, else query heads.

    Pointers may be misaligned and strides anything; ALIGNED says that q, k and v have unit last stride (the launcher
    then knows their addresses and strides as multiples of 16 bytes). len_q, len_k bound packed and paged lengths. left,
    right count keys around the diagonal row + diagonal (+ len_k - len_q with BOTTOM). all_q, all_k: packed queries and
    keys that there are, or pages in all_k. EVEN, EVEN_ROWS: every tile of keys, of rows is whole. MASK_ROWS, MASK_KEYS:
    see `mask_tile`; MASK_UNIT: a mask has unit last stride.
    SHORT: the keys of one head, or of a page, lie within 2^31 elements. REREAD: the query comes with every tile of
    keys, whose loads then do not wait for it.

    CACHE: what keys and values are (see `cache`), with DQ and DV numbers of which int4 has two in a byte; with WORDS
    values are given as words of two bytes. key_scale [batch, heads, dim], value_scale [batch, heads, 1] or with TOKENS
    one for each key, where the key lies.

    With SPLIT part takes the partial results, float32 [batch, heads, len_q, splits, DV], and after them their natural
    log-sum-exp, [batch, heads, len_q, splits]; under an additive mask, whose lowest numbers leave float32 no digits for
    the logarithm, the largest scores and then the sums of weights. With JOIN, the most splits that the last program of
    a tile joins, ROWS rows at a time, there are at most 2^18 numbers, and arrived counts the programs of a tile that
    have theirs written, int32 [batch * heads * row tiles]; it is 0 before the launch and after it.
    """
    if ALIGNED:
        q_d, k_d, v_d = 1, 1, 1
    if SHORT:
        k_n, v_n = k_n.to(tl.int32), v_n.to(tl.int32)
    if MASK_UNIT:
        mask_n = 1
    pid = tl.program_id(0)
    tile, split = pid, 0
    if SPLIT:
        tile, split = pid // splits, pid % splits
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head
    if not PACK:
        kv_head = head // GROUP
    batch64, kv64 = batch.to(tl.int64), kv_head.to(tl.int64)

    q_start, k_start = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    tensor_batch = batch64
    if PACKED:
        first_q, first_k = within(cu_q + batch, 0, all_q), within(cu_k + batch, 0, all_k)
        len_q = within(cu_q + batch + 1, first_q, all_q) - first_q
        if SEQLENS:  # cu_k says where each begins, in any order
            len_k = tl.minimum(len_k, all_k - first_k)
        else:
            len_k = within(cu_k + batch + 1, first_k, all_k) - first_k
        q_start, k_start = first_q.to(tl.int64), first_k.to(tl.int64)
        tensor_batch = tl.zeros([], tl.int64)
    if SEQLENS:
        len_k = within(seqlens + batch, 0, len_k)

    # Rows: query tokens, or with PACK token * GROUP + head in the group.
    plan_row = 0
    if PLAN:
        tiles_in_block = (block_q + BM - 1) // BM
        plan_row = tile // tiles_in_block
        first_row = plan_row * block_q + (tile % tiles_in_block) * BM
        end_row = tl.minimum(plan_row * block_q + block_q, len_q)
    elif PACK:
        first_row = tile * BM
        end_row = len_q * GROUP
    else:
        first_row = tile * BM
        end_row = len_q
    if first_row >= end_row:
        return
    rows = first_row + tl.arange(0, BM)
    row_ok = rows < end_row
    if PACK:
        tokens = rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        first_token, last_token = first_row // GROUP, tl.minimum(first_row + BM - 1, end_row - 1) // GROUP
    else:
        tokens = rows
        heads = tl.zeros([BM], tl.int32) + head
        first_token, last_token = first_row, tl.minimum(first_row + BM, end_row) - 1
    heads64, tokens64 = heads.to(tl.int64), tokens.to(tl.int64)

    shift = diagonal
    if BOTTOM:
        shift = diagonal + len_k - len_q
    low, high = 0, len_k
    if LEFT:
        low = tl.maximum(first_token + shift - left, 0)
    if RIGHT:
        high = tl.maximum(tl.minimum(last_token + shift + right + 1, len_k), 0)
    if SPLIT:
        if SEQLENS:  # a short sequence is shared by all programs too
            chunk = tl.minimum(chunk, ((high - low // BN * BN + BN - 1) // BN + splits - 1) // splits * BN)
        low = low // BN * BN + split * chunk
        high = tl.minimum(high, low + chunk)

    # Numbers of an element of keys and of values, and elements of their rows.
    KEYS: tl.constexpr = 2 if CACHE == INT4 else 1
    VALUES: tl.constexpr = KEYS * (2 if WORDS else 1)
    DK: tl.constexpr = DQ // KEYS
    DW: tl.constexpr = DV // VALUES
    d_k = tl.arange(0, BDQ // KEYS)
    d_v = tl.arange(0, BDV // VALUES)
    k_base = k + kv64 * k_h
    v_base = v + kv64 * v_h
    if PAGE == 0:
        k_base += tensor_batch * k_b + k_start * k_n
        v_base += tensor_batch * v_b + k_start * v_n
    q_row = q + tensor_batch * q_b + heads64[:, None] * q_h + (q_start + tokens64)[:, None] * q_m
    q_ok, k_ok = row_ok[:, None] & (d_k[None, :] < DK), d_k < DK
    COMPUTE: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    if CACHE == PLAIN:
        q_at = q_row + d_k[None, :] * q_d
        if not REREAD:
            q_tile = (tl.load(q_at, mask=q_ok, other=0.0),)
        factor = scale
    else:
        scale_at = key_scale + tensor_batch * ks_b + kv64 * ks_h
        q_tile, largest = scaled_query(q_row, q_d, q_ok, scale_at, ks_d, d_k, k_ok, KEYS, COMPUTE)
        factor = (scale * largest)[:, None]

    if PLAN:
        index_at = plan_index + batch64 * index_b + head.to(tl.int64) * index_h + plan_row.to(tl.int64) * index_m
        steps_in_block = (block_k + BN - 1) // BN
        first_step = 0
        last_step = tl.load(plan_count + batch64 * count_b + head.to(tl.int64) * count_h + plan_row) * steps_in_block
    else:
        first_step = low // BN
        last_step = (high + BN - 1) // BN

    # Scores in base-2 units; a softcap applies to natural ones, which are then converted. Under an additive mask they
    # stay
    # natural: the lowest finite number of a mask times log2(e) would be -inf.
    NATURAL: tl.constexpr = SOFTCAP or MASK == 2
    if not NATURAL:
        factor = factor * LOG2E
    most = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = nothing(BM, BDV // VALUES, VALUES)
    if CACHE != PLAIN:
        value_at, unit = value_scale + kv64 * vs_h, 0.0
        if not TOKENS:
            unit = tl.load(value_at + tensor_batch * vs_b)
        elif PAGE == 0:
            value_at += tensor_batch * vs_b + k_start * vs_n
    step_words, base_words = tokens, tokens
    if DROPOUT:
        step_words, base_words = row_words(seed, offset, batch * (heads_kv * GROUP) + heads, tokens)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        if PLAN:
            block = tl.maximum(tl.load(index_at + step // steps_in_block), 0)
            start = block * block_k + (step % steps_in_block) * BN
            end = tl.minimum((block + 1) * block_k, high)
        else:
            start = step * BN
            end = high
        columns = start + tl.arange(0, BN)
        column_ok = columns < end
        if PAGE > 0:
            page = tl.load(page_table + batch64 * table_b + columns // PAGE, mask=column_ok, other=0)
            page = tl.minimum(page.to(tl.uint32), (all_k - 1).to(tl.uint32)).to(tl.int64)
            slot = columns % PAGE
            k_row, v_row = page * k_b + slot * k_n, page * v_b + slot * v_n
        else:
            k_row, v_row = columns * k_n, columns * v_n
        k_at = k_base + k_row[None, :] + d_k[:, None] * k_d
        v_at = v_base + v_row[:, None] + d_v[None, :] * v_d
        if EVEN and DQ == BDQ and DV == BDV:
            k_tile = tl.load(k_at)
            v_tile = tl.load(v_at)
        else:
            k_tile = tl.load(k_at, mask=column_ok[None, :] & k_ok[:, None], other=0.0)
            v_tile = tl.load(v_at, mask=column_ok[:, None] & (d_v[None, :] < DW), other=0.0)
        if REREAD:  # a mask that says nothing keeps the load in the loop
            q_tile = (tl.load(q_at, mask=q_ok & (step >= 0), other=0.0),)
        scores = products(q_tile, of_bytes(k_tile, CACHE, COMPUTE, FAST), KEYS) * factor
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
        visible = column_ok[None, :]
        if LEFT:
            visible = visible & (columns[None, :] >= (tokens + shift - left)[:, None])
        if RIGHT:
            visible = visible & (columns[None, :] <= (tokens + shift + right)[:, None])
        if MASK > 0:
            mask_at = mask + batch64 * mask_b
            if PACK:
                mask_at = mask_at + heads64[:, None] * mask_h + tokens64[:, None] * mask_m
                mask_at += columns.to(tl.int64)[None, :] * mask_n
                given = tl.load(mask_at, mask=visible & row_ok[:, None], other=0)
            else:
                given = mask_tile(
                    mask_at + head.to(tl.int64) * mask_h,
                    tokens[:, None],
                    columns[None, :],
                    mask_m,
                    mask_n,
                    end_row,
                    end,
                    MASK_ROWS,
                    MASK_KEYS,
                    EVEN_ROWS,
                    EVEN,
                )
            if MASK == 1:
                visible = visible & (given != 0)
            else:
                scores += given.to(tl.float32)
        if NATURAL and MASK != 2:
            scores *= LOG2E
        if not (EVEN and MASK != 1 and not LEFT and not RIGHT):
            scores = tl.where(visible, scores, float("-inf"))
        raised = tl.maximum(most, tl.max(scores, 1))
        anchor = tl.where(raised == float("-inf"), 0.0, raised)  # a row without keys so far: exp2(-inf - 0), not of NaN
        if MASK == 2:
            weights = tl.exp2((scores - anchor[:, None]) * LOG2E)
            shrink = tl.exp2((most - anchor) * LOG2E)
        else:
            weights = tl.exp2(scores - anchor[:, None])
            shrink = tl.exp2(most - anchor)
        total = total * shrink + tl.sum(weights, 1)
        most = raised
        if DROPOUT:
            keep = kept_pairs(step_words[:, None], base_words[:, None], start, probability, BN, False)
            weights = tl.where(keep, weights, 0.0)
        if TOKENS:  # weights take the scales over the largest one so far
            if PAGE > 0:
                scale_row = page * vs_b + slot * vs_n
            else:
                scale_row = columns.to(tl.int64) * vs_n
            scales = tl.load(value_at + scale_row, mask=column_ok, other=0.0)
            grown = tl.maximum(unit, tl.max(tl.abs(scales), 0))
            over = 1.0 / tl.where(grown == 0.0, 1.0, grown)
            shrink *= unit * over
            weights *= (scales * over)[None, :]
            unit = grown
        if WORDS:
            v_planes = of_words(v_tile, CACHE, COMPUTE, FAST)
        else:
            v_planes = of_bytes(v_tile, CACHE, COMPUTE, FAST)
        sums = added(weights.to(v_planes[0].dtype), v_planes, sums, shrink, VALUES)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    dead = total == 0.0
    keep_share = 1.0
    if DROPOUT:
        keep_share = 1.0 - probability
    shorten = 1.0 / tl.where(dead, 1.0, total * keep_share)
    if CACHE != PLAIN:
        shorten *= unit
    d_out, out_ok = VALUES * d_v[None, :], row_ok[:, None] & (d_v[None, :] < DW)
    row_lse = tl.where(dead, float("-inf"), (most + tl.log2(tl.where(dead, 1.0, total))) * LN2)
    if MASK == 2:
        row_lse = tl.where(dead, float("-inf"), most + tl.log2(tl.where(dead, 1.0, total)) * LN2)
    if SPLIT:
        row_place = ((batch64 * tl.num_programs(1) * GROUP + heads64) * len_q + tokens64) * splits
        numbers = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * GROUP * len_q * splits
        lse_part = part + numbers * DV
        at = part + (row_place + split)[:, None] * DV + d_out
        for plane in tl.static_range(VALUES):
            tl.store(at + plane, sums[plane] * shorten[:, None], mask=out_ok)
        if MASK == 2:
            tl.store(lse_part + row_place + split, most, mask=row_ok)
            tl.store(lse_part + numbers + row_place + split, total, mask=row_ok)
        else:
            tl.store(lse_part + row_place + split, row_lse, mask=row_ok)
        if JOIN > 0:
            tl.debug_barrier()  # the whole program's results are written before it counts itself
            counter = arrived + (batch * tl.num_programs(1) + head) * (tl.num_programs(0) // splits) + tile
            if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
                tl.store(counter, 0)
                for start in range(first_row, end_row, ROWS):
                    row = start + tl.arange(0, ROWS)
                    ok, token, row_head = row < end_row, row // GROUP, kv_head * GROUP + row % GROUP
                    place = (batch * tl.num_programs(1) * GROUP + row_head) * len_q + token
                    all_most, all_total, all_sums = gathered(
                        part, lse_part, numbers, place, ok, 0, splits, DV, BDV, JOIN, MASK == 2
                    )
                    joined, whole_lse = settled(all_most, all_total, all_sums)
                    head64, token64 = row_head.to(tl.int64), token.to(tl.int64)
                    o_at = out + batch64 * o_b + head64 * o_h + token64 * o_m
                    d_all = tl.arange(0, BDV)
                    where = ok[:, None] & (d_all[None, :] < DV)
                    tl.store(o_at[:, None] + d_all[None, :], joined.to(out.dtype.element_ty), mask=where)
                    if LSE:
                        tl.store(lse + batch64 * l_b + head64 * l_h + token64 * l_m, whole_lse, mask=ok)
    else:
        row_out = q_start + tokens64
        o_at = (out + tensor_batch * o_b + heads64 * o_h + row_out * o_m)[:, None] + d_out
        for plane in tl.static_range(VALUES):
            tl.store(o_at + plane, (sums[plane] * shorten[:, None]).to(out.dtype.element_ty), mask=out_ok)
        if LSE:
            tl.store(lse + tensor_batch * l_b + heads64 * l_h + row_out * l_m, row_lse, mask=row_ok)
