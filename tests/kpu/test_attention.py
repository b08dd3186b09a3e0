"""Attention tile by tile: the online softmax against float64 for tiles of every size, gradients, and what rounding
there is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_kpu.simulator.attention.values import Operands, backward, forward

from hal_core import AttentionRequest, Causal, MaskKind
from hal_core.testing import reference, reference_gradients, relative_error

_SHAPE: dict[str, Any] = {"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 45, "len_k": 70, "dim_qk": 24, "dim_v": 16}


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{**_SHAPE, "dtype": "float32", "lse": True, **changes})


def drawn(generator: torch.Generator, r: AttentionRequest, mask: torch.Tensor | None = None) -> Operands:
    sizes = ((r.heads_q, r.len_q, r.dim_qk), (r.heads_kv, r.len_k, r.dim_qk), (r.heads_kv, r.len_k, r.dim_v))
    q, k, v = (torch.randn(r.batch, *size, generator=generator).to(getattr(torch, r.dtype)) for size in sizes)
    return Operands(q, k, v, mask, r)


@pytest.mark.parametrize("block_k", [1, 7, 32, 70, 128])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": Causal.BOTTOM_RIGHT},
        {"window": (9, 3)},
        {"softcap": 2.0},
        {"causal": Causal.TOP_LEFT, "diagonal": -6},
    ],
)
def test_every_size_of_tile_gives_attention(generator, block_k, changes):
    call = drawn(generator, request(**changes))
    out, lse = forward(call, block_k)
    want = reference(*call[:3], request=call.request)
    assert relative_error(out, want.out) < 2e-6
    assert relative_error(lse, want.lse) < 1e-6


def test_rows_cut_into_parts_change_nothing(generator, monkeypatch):
    call = drawn(generator, request(causal=Causal.BOTTOM_RIGHT))
    whole = forward(call, 32)
    for most in (40, 1000):  # scores at once: single rows, single heads, some of both
        monkeypatch.setattr("hal_kpu.simulator.attention.workspace._CHUNK", most)
        out, lse = forward(call, 32)
        assert relative_error(out, whole.out.double()) < 1e-6
        assert relative_error(lse, whole.lse.double()) < 1e-6


def test_a_later_larger_score_fades_what_came_before(generator):
    call = drawn(generator, request())
    call.key[:, :, 64:] *= 40.0  # the last tile of keys takes nearly all weight
    want = reference(*call[:3], request=call.request)
    out, lse = forward(call, 32)
    assert relative_error(out, want.out) < 1e-5
    assert relative_error(lse, want.lse) < 1e-6


@pytest.mark.parametrize("kind", [MaskKind.BOOLEAN, MaskKind.ADDITIVE])
def test_rows_without_a_key_give_nothing_and_take_no_gradient(generator, kind):
    visible = torch.rand(2, 1, 45, 70, generator=generator) > 0.4
    visible[:, :, 4] = False
    visible[:, :, 9, :64] = False  # a row whose first tiles are all hidden
    mask = visible if kind is MaskKind.BOOLEAN else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    call = drawn(generator, request(mask=kind), mask)
    out, lse = forward(call, 32)
    want = reference(*call[:3], mask, request=call.request)
    assert not out[:, :, 4].any()
    assert bool((lse[:, :, 4] == -torch.inf).all())
    assert relative_error(out, want.out) < 2e-6
    grads = backward(call, 32, out, lse, torch.randn(out.shape, generator=generator))
    assert not grads.query[:, :, 4].any()
    assert all(bool(g.isfinite().all()) for g in grads[:3])


@pytest.mark.parametrize("block_k", [16, 70])
@pytest.mark.parametrize("changes", [{}, {"causal": Causal.TOP_LEFT}, {"softcap": 1.5}, {"window": (5, 5)}])
def test_gradients_come_from_output_and_log_sum_exp_alone(generator, block_k, changes):
    call = drawn(generator, request(grads=frozenset("qkv"), grad_lse=True, **changes))
    out, lse = forward(call, block_k)
    grad_out, grad_lse = torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    got = backward(call, block_k, out, lse, grad_out, grad_lse)
    want = reference_gradients(*call[:3], grad_out=grad_out, grad_lse=grad_lse, request=call.request)
    for name, x, w in zip("qkv", got, want, strict=False):
        assert relative_error(x, w) < 5e-6, name


def test_a_masks_gradient_is_summed_over_what_it_broadcasts(generator):
    mask = torch.randn(1, 4, 1, 70, generator=generator)
    call = drawn(generator, request(mask=MaskKind.ADDITIVE, grads=frozenset({"q", "mask"})), mask)
    out, lse = forward(call, 32)
    grad_out = torch.randn(out.shape, generator=generator)
    got = backward(call, 32, out, lse, grad_out)
    want = reference_gradients(*call[:3], mask, grad_out=grad_out, request=call.request)
    assert got.key is None
    assert got.mask.shape == mask.shape
    assert relative_error(got.mask, want.mask) < 5e-6


def test_weights_reach_the_array_in_the_operands_type():
    """One row, two keys: the weight of the second, e^-1, is rounded to bfloat16 before PV, and not in the sum."""
    key = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    key[..., 1, 0] = -1.0
    query = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    query[..., 0] = 1.0
    value = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(1, 1, 2, 1)
    r = AttentionRequest(1, 1, 1, 1, 2, 4, 1, "bfloat16", scale=1.0, lse=True)
    out, _ = forward(Operands(query, key, value, None, r), 2)
    rounded = torch.tensor(-1.0).exp().bfloat16().float()
    assert out.item() == (rounded / (1 + torch.tensor(-1.0).exp())).bfloat16().item()


@pytest.mark.parametrize("shape", [{"len_q": 0}, {"len_k": 0}, {"batch": 0}])
def test_empty_operands_give_empty_or_nothing(generator, shape):
    call = drawn(generator, request(**shape))
    out, lse = forward(call, 32)
    assert out.shape == (call.query.shape[0], 4, call.query.shape[2], 16)
    assert not out.any()
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lowest_finite_mask_value_hides_nothing_alone(generator, dtype):
    r = request(mask=MaskKind.ADDITIVE, dtype=dtype)
    lowest = torch.finfo(getattr(torch, dtype)).min
    mask = torch.zeros(2, 4, 45, 70, dtype=getattr(torch, dtype))
    mask[:, :, 7] = lowest
    call = drawn(generator, r, mask)
    out, lse = forward(call, 32)
    mean = call.value.double().mean(2).repeat_interleave(2, 1)
    assert relative_error(out[:, :, 7], mean) < 4e-3
    assert bool((lse[:, :, 7] == float(lowest)).all())


def test_what_is_not_finite_stays_in_its_batch_entry_and_key_head(generator):
    visible = torch.ones(1, 1, 45, 70, dtype=torch.bool)
    visible[..., 3, :] = False
    visible[..., 60:] = False
    call = drawn(generator, request(mask=MaskKind.BOOLEAN, grads=frozenset("qkv")), visible)
    clean, clean_lse = forward(call, 32)
    call.value[0, 1, 65] = torch.nan  # hidden from every row, and read by query heads 2 and 3 of entry 0 alone
    call.value[0, 1, 66] = torch.inf
    out, lse = forward(call, 32)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 2:] = False
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse, clean_lse)
    assert not out[:, :, 3].any()
    grads = backward(call, 32, out, lse, torch.randn(out.shape, generator=generator))
    assert not grads.query[:, :, 3].any()
    assert bool(grads.query[others].isfinite().all())
