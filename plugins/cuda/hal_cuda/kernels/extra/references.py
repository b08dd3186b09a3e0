"""What the kernels beside attention compute, in the precision of their inputs (float64 for a reference), and fresh
inputs for them.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def _normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def row_sums(x: Tensor, dim: int = -1) -> Tensor:
    return x.sum(dim)


def draw_row_sums(generator: Generator) -> tuple[Tensor, int]:
    return _normal(5, 1003, 7, generator=generator) + 0.5, 1


def reduce_max(x: Tensor) -> Tensor:
    return x.max()


def draw_reduce_max(generator: Generator) -> tuple[Tensor]:
    return (_normal(5, 1003, generator=generator),)


def fused_gelu_linear(x: Tensor, w: Tensor, bias: Tensor | None = None, use_tanh_approx: bool = False) -> Tensor:
    """gelu(x w^T + bias)."""
    approximate = "tanh" if use_tanh_approx else "none"
    return torch.nn.functional.gelu(torch.nn.functional.linear(x, w, bias), approximate=approximate)


def draw_fused_gelu_linear(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, w = _normal(130, 72, generator=generator), _normal(88, 72, generator=generator) / 72**0.5
    return x, w, _normal(88, generator=generator)


def rope_precompute_freqs(max_seq_len: int, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * base^(-2 i / head_dim), float64 [max_seq_len, head_dim / 2]."""
    step = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * base**-step
    return angle.cos(), angle.sin()


def draw_rope_precompute_freqs(generator: Generator) -> tuple[int, int, float]:
    return 1000, 48, 500000.0


def rope_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Elements 2 i and 2 i + 1 turned by an angle of the position and i."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd, c, s = x[..., ::2], x[..., 1::2], cos[: x.shape[2]].to(x.dtype), sin[: x.shape[2]].to(x.dtype)
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)


def draw_rope_forward(generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = (table.float() for table in rope_precompute_freqs(50, 24))
    return *draw_rope_forward_fused(generator), cos, sin


def draw_rope_forward_fused(generator: Generator) -> tuple[Tensor, Tensor]:
    """Query and key with grouped heads."""
    return _normal(2, 6, 37, 24, generator=generator), _normal(2, 2, 37, 24, generator=generator)


def rope_forward_fused(q: Tensor, k: Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    cos, sin = (t.to(q.device) for t in rope_precompute_freqs(q.shape[2], q.shape[3], base))
    return rope_forward(q, k, cos, sin)


def paged_kv_cache_append(pool: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The pool with new keys and values in their slots; those of slots that it does not have are left out."""
    out, size = pool.clone(), pool.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < pool.shape[0] * size:
            out[slot // size, 0, :, slot % size] = keys[token]
            out[slot // size, 1, :, slot % size] = values[token]
    return out


def draw_paged_kv_cache_append(generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pages, heads, size, dim, tokens = 7, 3, 8, 24, 20
    slots = torch.randperm(pages * size, generator=generator)[:tokens].to(torch.int32)
    slots[3], slots[11] = -1, pages * size
    keys, values = (_normal(tokens, heads, dim, generator=generator) for _ in range(2))
    return _normal(pages, 2, heads, size, dim, generator=generator), slots, keys, values


def paged_kv_cache_read(pool: Tensor, table: Tensor, lengths: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
    """Keys and values of sequences; 0 behind their ends, and where a page is not listed or not in the pool."""
    pages, _, heads, size, dim = pool.shape
    found = pool.new_zeros(2, len(lengths), heads, max_seq_len, dim)
    for row, (listed, length) in enumerate(zip(table.tolist(), lengths.tolist(), strict=True)):
        for position in range(min(length, max_seq_len, len(listed) * size)):
            if 0 <= (page := listed[position // size]) < pages:
                found[:, row, :, position] = pool[page, :, :, position % size]
    return found[0], found[1]


def draw_paged_kv_cache_read(generator: Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    table = torch.randint(0, 7, (3, 4), generator=generator, dtype=torch.int32)
    table[1, 2] = 7
    lengths = torch.tensor([17, 40, 0], dtype=torch.int32)
    return _normal(7, 2, 3, 8, 24, generator=generator), table, lengths, 35


def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp), one plain step after the other."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def draw_flash_attention_forward(generator: Generator) -> tuple[Tensor, Tensor, Tensor, None, bool]:
    q = _normal(2, 4, 70, 64, generator=generator)
    k, v = (_normal(2, 2, 90, 64, generator=generator) for _ in range(2))
    return q, k, v, None, True


def pool_rows(x: Tensor, size: int, scale: float = 1.0, wide: bool = False) -> Tensor:
    """Means of blocks of rows, times a factor."""
    return torch.stack([part.mean(2) for part in x.split(size, 2)], 2) * scale


def draw_pool_rows(generator: Generator) -> tuple[Tensor, int, float]:
    return _normal(2, 3, 53, 24, generator=generator) + 0.5, 6, 0.7


def pool_extremes(x: Tensor, size: int) -> Tensor:
    """Mean, maximum and minimum of blocks of rows beside one another."""
    return torch.stack([torch.cat([p.mean(2), p.amax(2), p.amin(2)], -1) for p in x.split(size, 2)], 2)


def draw_pool_extremes(generator: Generator) -> tuple[Tensor, int]:
    return _normal(2, 3, 53, 24, generator=generator), 6


def square_sums(
    scores: Tensor,
    per_row: int,
    per_column: int,
    stride: int = 1,
    low: int | None = None,
    high: int | None = None,
    first: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Softmax of rows of squares, summed over a block's columns and averaged over its rows."""
    place = (torch.arange(scores.shape[2], device=scores.device) + first).unsqueeze(1) * stride
    position = torch.arange(scores.shape[3], device=scores.device) * stride
    hidden = torch.zeros_like(place + position, dtype=torch.bool)
    if high is not None:
        hidden |= position > place + stride - 1 + high
    if low is not None:
        hidden |= position + stride - 1 < place + low
    weights = (scores * scale).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    sums = torch.stack([part.sum(3) for part in weights.split(per_column, 3)], 3)
    return torch.stack([part.mean(2) for part in sums.split(per_row, 2)], 2)


def draw_square_sums(generator: Generator) -> tuple[Tensor, int, int, int, int, int, int, float]:
    return 3 * _normal(2, 3, 21, 37, generator=generator), 4, 5, 2, -40, 1, 3, 0.6


def choose_blocks(share: Tensor, hidden: Tensor, forced: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Columns of the largest shares of a batch entry, rising, then the others; and how many are chosen."""
    ranked = share.clamp(min=0).masked_fill(forced, torch.inf).masked_fill(hidden, -torch.inf)
    ordered = ranked.flatten(1).sort(1, descending=True).values
    least = ordered[:, max(total, 1) - 1].view(-1, 1, 1, 1)
    above, equal = ranked > least, (ranked == least) & ~hidden
    wanted = max(total, 1) - above.flatten(1).sum(1).view(-1, 1, 1, 1)
    taken = equal.sum(-1, keepdim=True) * wanted // equal.flatten(1).sum(1).clamp(min=1).view(-1, 1, 1, 1)
    chosen = above | (equal & (equal.cumsum(-1) <= taken))
    return (~chosen).to(torch.int8).sort(dim=-1, stable=True).indices.int(), chosen.sum(-1).int()


def draw_choose_blocks(generator: Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    """Shares with ties, under a causal triangle."""
    share = torch.rand((2, 3, 20, 20), generator=generator)
    share[0] = (share[0] * 8).floor() / 8
    triangle = torch.ones(20, 20, dtype=torch.bool)
    return share, triangle.triu(1), triangle.tril() & triangle.triu(), 200
