"""FlashAttention's calls on this project's attention, held to float64. They run on any device, so here on the host."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hal_cuda.interop import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

import hal_core as hal
from hal_core.testing import relative_error


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], softcap: float = 0.0) -> Any:
    """FlashAttention's definition, [batch, length, heads, dim], in float64: output and log-sum-exp."""
    group = q.shape[2] // k.shape[2]
    query, key, value = (t.double().transpose(1, 2) for t in (q, k, v))
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * q.shape[3] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(k.shape[1])[None, :] - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    left, right = window
    visible = torch.ones_like(place, dtype=torch.bool)
    if causal:
        visible &= place <= 0
    elif right >= 0:
        visible &= place <= right
    if left >= 0:
        visible &= place >= -left
    scores = scores.masked_fill(~visible, -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ value).transpose(1, 2), torch.logsumexp(scores, -1)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize(("len_q", "len_k"), [(17, 17), (9, 30), (30, 9)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (5, 0), (4, 3), (-1, 2)])
def test_dense_calls_have_flash_attentions_diagonal_and_window(
    len_q: int, len_k: int, causal: bool, window: tuple[int, int]
) -> None:
    q, k, v = draw(2, len_q, 4, 16), draw(2, len_k, 2, 16), draw(2, len_k, 2, 16)
    out, lse, probabilities = flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
    want, want_lse = plain(q, k, v, causal, window)
    assert probabilities is None
    assert relative_error(out, want) <= 1e-5
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    assert relative_error(lse[finite], want_lse[finite]) <= 1e-5


def test_a_dense_call_is_differentiable() -> None:
    leaves = [draw(1, 12, 2, 8).requires_grad_() for _ in range(3)]
    grad = draw(1, 12, 2, 8)
    found = torch.autograd.grad(flash_attn_func(*leaves, causal=True, softcap=3.0), leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = torch.autograd.grad(plain(*exact, True, (-1, -1), 3.0)[0], exact, grad.double())
    assert max(relative_error(one, two) for one, two in zip(found, want, strict=True)) <= 1e-5


def test_sequences_behind_one_another() -> None:
    ends_q, ends_k = [0, 5, 5, 20], [0, 9, 12, 30]
    q, k, v = draw(20, 4, 16), draw(30, 2, 16), draw(30, 2, 16)
    tables = [torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k)]
    out = flash_attn_varlen_func(q, k, v, *tables, 15, 18, causal=True)
    for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        if b > a:
            want = plain(q[None, a:b], k[None, c:d], v[None, c:d], True, (-1, -1))[0][0]
            assert relative_error(out[a:b], want) <= 1e-5


def paged(cache: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A cache [batch, longest, heads, dim] in pages in any order, and their table."""
    batch, longest = cache.shape[:2]
    order = torch.randperm(batch * longest // size)
    table = order.view(batch, -1).to(torch.int32)
    pages = torch.empty(batch * longest // size, size, *cache.shape[2:])
    pages[order] = cache.reshape(-1, size, *cache.shape[2:])
    return pages, table


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("interleaved", [None, True, False])
def test_new_keys_are_written_and_read(in_pages: bool, interleaved: bool | None) -> None:
    held = torch.tensor([7, 0, 12], dtype=torch.int32)
    q, new_k, new_v = draw(3, 4, 4, 16), draw(3, 4, 2, 16), draw(3, 4, 2, 16)
    k_cache, v_cache = draw(3, 16, 2, 16), draw(3, 16, 2, 16)
    given: dict[str, Any] = {"cache_seqlens": held, "causal": True}
    turned_q, turned_k = q, new_k
    if interleaved is not None:
        angles = torch.arange(16)[:, None] / 100.0 ** (torch.arange(4) / 4)
        given |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
        turned_q, turned_k = (rotated(t, angles, held, interleaved) for t in (q, new_k))
    want = []
    for entry in range(3):
        n = int(held[entry])
        keys = torch.cat([k_cache[entry, :n], turned_k[entry]])[None]
        values = torch.cat([v_cache[entry, :n], new_v[entry]])[None]
        want.append(plain(turned_q[entry : entry + 1], keys, values, True, (-1, -1))[0])
    caches = (k_cache.clone(), v_cache.clone())
    if in_pages:
        (pages_k, table), pages_v = paged(k_cache, 4), torch.empty(12, 4, 2, 16)
        pages_v[table.view(-1).long()] = v_cache.reshape(-1, 4, 2, 16)
        caches, given = (pages_k, pages_v), given | {"block_table": table}
    out = flash_attn_with_kvcache(q, *caches, new_k, new_v, **given)
    assert relative_error(out, torch.cat(want)) <= 1e-5
    if not in_pages:
        assert relative_error(caches[0][0, 7:11], turned_k[0]) <= 1e-6
        assert torch.equal(caches[0][0, :7], k_cache[0, :7])


def rotated(x: Tensor, angles: Tensor, first: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding by complex numbers."""
    parts = []
    for entry in range(x.shape[0]):
        turn = torch.polar(torch.ones_like(angles), angles)[int(first[entry]) : int(first[entry]) + x.shape[1], None]
        head = x[entry, ..., :8]
        pairs = head.unflatten(-1, (4, 2)) if interleaved else head.unflatten(-1, (2, 4)).mT
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        flat = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
        parts.append(torch.cat([flat, x[entry, ..., 8:]], -1))
    return torch.stack(parts)


def test_a_cache_may_be_named_by_a_batch_index() -> None:
    q, k_cache, v_cache = draw(2, 1, 2, 8), draw(5, 10, 2, 8), draw(5, 10, 2, 8)
    chosen = torch.tensor([4, 1], dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=6, cache_batch_idx=chosen, return_softmax_lse=True
    )
    want, want_lse = plain(q, k_cache[[4, 1], :6], v_cache[[4, 1], :6], False, (-1, -1))
    assert relative_error(out, want) <= 1e-5
    assert relative_error(lse, want_lse) <= 1e-5


def varlen(q: Tensor, **given: Any) -> Tensor:
    """A call of one sequence."""
    ends, row = torch.tensor([0, q.shape[1]], dtype=torch.int32), q[0]
    found: Tensor = flash_attn_varlen_func(row, row, row, ends, ends, q.shape[1], q.shape[1], **given)
    return found


WINDOWS = [(5, 0), (4, 3), (-1, 2), (6, -1), (0, 0)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("used", [False, True])
def test_each_sequence_has_its_own_diagonal_and_used_keys(window: tuple[int, int], used: bool) -> None:
    ends_q, ends_k, counts = [0, 5, 6, 20], [0, 9, 12, 30], [9, 3, 18]
    if used:
        counts = [4, 0, 11]
    q, k, v = draw(20, 4, 16), draw(30, 2, 16), draw(30, 2, 16)
    tables = [torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k)]
    given: dict[str, Any] = {"seqused_k": torch.tensor(counts, dtype=torch.int32)} if used else {}
    out = flash_attn_varlen_func(q, k, v, *tables, 14, 18, window_size=window, **given)
    for (a, b), c, count in zip(pairwise(ends_q), ends_k, counts, strict=False):
        want = plain(q[None, a:b], k[None, c : c + count], v[None, c : c + count], False, window)[0][0]
        assert relative_error(out[a:b], want) <= 1e-5


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("in_pages", [False, True])
def test_a_cache_has_windows_without_causal(window: tuple[int, int], in_pages: bool) -> None:
    q, k_cache, v_cache = draw(2, 3, 4, 16), draw(2, 16, 2, 16), draw(2, 16, 2, 16)
    held, caches, given = torch.tensor([13, 6], dtype=torch.int32), (k_cache, v_cache), {}
    if in_pages:
        (pages_k, table), pages_v = paged(k_cache, 4), torch.empty(8, 4, 2, 16)
        pages_v[table.view(-1).long()] = v_cache.reshape(-1, 4, 2, 16)
        caches, given = (pages_k, pages_v), {"block_table": table}
    out = flash_attn_with_kvcache(q, *caches, cache_seqlens=held, window_size=window, **given)
    for entry, n in enumerate(held.tolist()):
        want = plain(q[entry, None], k_cache[entry, None, :n], v_cache[entry, None, :n], False, window)[0][0]
        assert relative_error(out[entry], want) <= 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_a_cache_may_begin_behind_padding(causal: bool, appended: bool) -> None:
    q, k_cache, v_cache, new = draw(2, 3, 4, 16), draw(4, 16, 2, 16), draw(4, 16, 2, 16), draw(2, 3, 2, 16)
    held, pad = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([13, 9], [4, 2]))
    chosen = torch.tensor([3, 1], dtype=torch.int32)
    given: dict[str, Any] = {"causal": causal, "cache_batch_idx": chosen, "cache_seqlens": held}
    written = (new, new) if appended else ()
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, *written, cache_leftpad=pad, return_softmax_lse=True, **given
    )
    for entry, n in enumerate(held.tolist()):
        a, row = int(pad[entry]), int(chosen[entry])
        k, v = (t[row, None, a : n + 3 * appended] for t in (k_cache, v_cache))
        want, want_lse = plain(q[entry, None], k, v, causal, (-1, -1))
        assert relative_error(out[entry], want[0]) <= 1e-5
        assert relative_error(lse[entry], want_lse[0]) <= 1e-5
        assert not appended or torch.equal(k_cache[row, n : n + 3], new[entry])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda q: flash_attn_func(q, q, q, alibi_slopes=torch.ones(2)), hal.UnsupportedError, "additive mask"),
        (lambda q: flash_attn_with_kvcache(q, q, q, q, q), hal.ContractError, "cache_seqlens"),
        (lambda q: flash_attn_with_kvcache(q, q, q, q), hal.ContractError, "pass both"),
        (
            lambda q: flash_attn_with_kvcache(q, q, q, cache_leftpad=q, block_table=q),
            hal.UnsupportedError,
            "without pages",
        ),
        (lambda q: flash_attn_with_kvcache(q, q, q, cache_leftpad=q), hal.ContractError, "cache_leftpad"),
        (lambda q: varlen(q, seqused_q=torch.ones(1)), hal.UnsupportedError, "seqused_q"),
        (lambda q: flash_attn_with_kvcache(q, q, q, q, q, cache_seqlens=1), hal.ContractError, "pass room for them"),
        (
            lambda q: flash_attn_with_kvcache(q, q, q, cache_leftpad=torch.zeros(1), cache_seqlens=9),
            hal.ContractError,
            "keys that there are",
        ),
    ],
)
def test_what_cannot_be_said_is_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(draw(1, 4, 2, 8))
