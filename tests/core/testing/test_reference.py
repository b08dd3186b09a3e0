"""The float64 reference against torch's own attention, against loops over single pairs, and against numbers by hand."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hal_core as hal
from hal_core.testing import reference, reference_gradients, relative_error, request_of


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def qkv(seed: int, len_q: int = 5, len_k: int = 7, heads: int = 4, heads_kv: int = 4) -> list[Tensor]:
    return draw(seed, (2, heads, len_q, 8), (2, heads_kv, len_k, 8), (2, heads_kv, len_k, 6))


def by_pairs(q: Tensor, k: Tensor, v: Tensor, sees: Any, score: Any) -> tuple[Tensor, Tensor]:
    """Attention as its definition says, one pair of query and key after the other."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(k.shape[2]) if sees(b, h, i, j)]
        scores = [score(float(q[b, h, i] @ k[b, h // group, j])) for j in keys]
        total = sum(math.exp(s) for s in scores)
        for s, j in zip(scores, keys, strict=True):
            out[b, h, i] += math.exp(s) / total * v[b, h // group, j]
        if keys:
            lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"mask": "boolean"}, {"mask": "additive"}],
    ids=str,
)
def test_agrees_with_torch_in_float64(seed: int, options: dict[str, Any]) -> None:
    q, k, v = qkv(seed, heads_kv=2 if "enable_gqa" in options else 4)
    (mask,) = draw(seed + 1, (2, 1, 5, 7))
    mask = {"boolean": mask > -0.5, "additive": mask, None: None}[options.get("mask")]
    options = {name: value for name, value in options.items() if name != "mask"}
    with sdpa_kernel(SDPBackend.MATH):
        want = scaled_dot_product_attention(q, k, v, mask, **options)
    assert relative_error(reference(q, k, v, mask, **options).out, want) <= 1e-14


SHIFTED = [
    (causal, window, diagonal)
    for causal in ("none", "top_left", "bottom_right")
    for window in (None, (2, 0), (0, 3), (None, 1), (1, None))
    for diagonal in (0, 2, -3)
    if not diagonal or window or causal != "none"  # alone it would shift nothing
]


@pytest.mark.parametrize(("causal", "window", "diagonal"), SHIFTED)
@pytest.mark.parametrize(("len_q", "len_k"), [(5, 7), (7, 5), (1, 4)])
def test_causal_and_window_see_exactly_the_defined_pairs(
    seed: int, causal: str, window: Any, diagonal: int, len_q: int, len_k: int
) -> None:
    q, k, v = qkv(seed, len_q, len_k, heads=2, heads_kv=1)
    offset = diagonal + (len_k - len_q if causal == "bottom_right" else 0)

    def sees(b: int, h: int, i: int, j: int) -> bool:
        left, right = window or (None, None)
        return (
            (causal == "none" or j <= i + offset)
            and (left is None or j >= i + offset - left)
            and (right is None or j <= i + offset + right)
        )

    want, want_lse = by_pairs(q, k, v, sees, lambda dot: dot / math.sqrt(8))
    out, lse = reference(q, k, v, causal=causal, window=window, diagonal=diagonal)
    assert relative_error(out, want) <= 1e-13
    assert relative_error(lse, want_lse) <= 1e-13


def test_softcap_comes_after_scale_and_before_the_mask(seed: int) -> None:
    q, k, v = qkv(seed)
    (bias,) = draw(seed + 1, (2, 4, 5, 7))
    want, want_lse = by_pairs(q, k, v, lambda *_: True, lambda dot: 1.5 * math.tanh(0.4 * dot / 1.5))
    out, lse = reference(q, k, v, scale=0.4, softcap=1.5)
    assert relative_error(out, want) <= 1e-13
    assert relative_error(lse, want_lse) <= 1e-13
    biased = torch.softmax(1.5 * torch.tanh(q @ k.transpose(-1, -2) * 0.4 / 1.5) + bias, -1) @ v
    assert relative_error(reference(q, k, v, bias, scale=0.4, softcap=1.5).out, biased) <= 1e-13


def test_by_hand() -> None:
    q, k, v = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[10.0], [20.0]]]])
    out, lse = reference(q, k, v)  # scores 0 and 2
    assert out.item() == pytest.approx((10 + 20 * math.e**2) / (1 + math.e**2))
    assert lse.item() == pytest.approx(math.log(1 + math.e**2))


def test_a_row_without_keys_gives_zero_and_minus_infinity(seed: int) -> None:
    q, k, v = qkv(seed)
    for mask in (torch.zeros(5, 7, dtype=torch.bool), torch.full((5, 7), -math.inf, dtype=torch.float64)):
        out, lse = reference(q, k, v, mask)
        assert torch.equal(out, torch.zeros_like(out))
        assert bool((lse == -math.inf).all())
    out, lse = reference(q, k[:, :, :0], v[:, :, :0])
    assert torch.equal(out, torch.zeros(2, 4, 5, 6, dtype=torch.float64))
    assert bool((lse == -math.inf).all())


def test_dropout_uses_the_given_weights_and_needs_them(seed: int) -> None:
    q, k, v = qkv(seed)
    keep = draw(seed + 1, (2, 4, 5, 7))[0] > 0
    want = (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) * keep / 0.75) @ v
    assert relative_error(reference(q, k, v, keep=keep, dropout_p=0.25).out, want) <= 1e-14
    with pytest.raises(hal.ContractError, match="keep"):
        reference(q, k, v, dropout_p=0.25)


def test_a_block_plan_shows_its_blocks_and_nothing_else(seed: int) -> None:
    q, k, v = qkv(seed)
    indices = torch.tensor([[[[1, 0], [0, 1], [1, 99]]]], dtype=torch.int32)
    plan = hal.BlockPlan(2, 4, indices, torch.tensor([[[1, 2, 0]]], dtype=torch.int32))
    shown = {0: {1}, 1: {0, 1}, 2: set[int]()}
    want, want_lse = by_pairs(q, k, v, lambda b, h, i, j: j // 4 in shown[i // 2], lambda dot: dot / math.sqrt(8))
    out, lse = reference(q, k, v, plan=plan)
    assert relative_error(out, want) <= 1e-13
    assert relative_error(lse, want_lse) <= 1e-13


def test_packed_sequences_are_attended_alone(seed: int) -> None:
    q, k, v = draw(seed, (1, 4, 9, 8), (1, 2, 8, 8), (1, 2, 8, 6))
    tables = hal.SequenceMetadata(
        cu_seqlens_q=torch.tensor([0, 4, 4, 9], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 3, 5, 8], dtype=torch.int32),
    )
    out, lse = reference(q, k, v, tables=tables, causal="bottom_right")
    for rows, keys in ((slice(0, 4), slice(0, 3)), (slice(4, 9), slice(5, 8))):
        alone = reference(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal="bottom_right")
        assert relative_error(out[:, :, rows], alone.out) <= 1e-14
        assert relative_error(lse[:, :, rows], alone.lse) <= 1e-14


def test_a_paged_cache_is_read_through_its_table_up_to_each_length(seed: int) -> None:
    q, k, v, pages = draw(seed, (2, 4, 1, 8), (2, 2, 6, 8), (2, 2, 6, 6), (5, 2, 4, 8))
    values = torch.full((5, 2, 4, 6), 1e9, dtype=torch.float64)
    table = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
    for s, (first, second) in enumerate(table.tolist()):
        for cache, rows in ((pages, k), (values, v)):
            cache[first], cache[second, :, :2] = rows[s, :, :4], rows[s, :, 4:]
    tables = hal.SequenceMetadata(page_table=table, cache_seqlens=torch.tensor([6, 5], dtype=torch.int32))
    out, _ = reference(q, pages, values, tables=tables)
    assert relative_error(out[:1], reference(q[:1], k[:1], v[:1]).out) <= 1e-14
    assert relative_error(out[1:], reference(q[1:], k[1:, :, :5], v[1:, :, :5]).out) <= 1e-14


def test_an_fp8_cache_is_multiplied_by_its_scales(seed: int) -> None:
    q, k, v = qkv(seed)
    key, value = (t.to(torch.float8_e4m3fn) for t in (k, v))
    scales = [t.abs().float() for t in draw(seed + 1, (2, 4, 1, 1), (2, 4, 1, 1))]
    out, _ = reference(q, key, value, tables=hal.SequenceMetadata(key_scale=scales[0], value_scale=scales[1]))
    assert relative_error(out, reference(q, key.double() * scales[0], value.double() * scales[1]).out) <= 1e-14


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}, {"window": (1, 2)}], ids=str)
def test_gradcheck(seed: int, options: dict[str, Any]) -> None:
    q, k, v, bias = (t.requires_grad_() for t in draw(seed, (1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 3), (3, 4)))
    assert torch.autograd.gradcheck(lambda *t: tuple(reference(*t, **options)), (q, k, v, bias))


def test_gradients_are_those_of_torch(seed: int) -> None:
    q, k, v = qkv(seed)
    mask, grad_out = draw(seed + 1, (2, 1, 5, 7), (2, 4, 5, 6))
    leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
    with sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(*leaves).backward(grad_out)
    grads = reference_gradients(q, k, v, mask, grad_out=grad_out)
    assert all(relative_error(got, leaf.grad) <= 1e-13 for got, leaf in zip(grads, leaves, strict=True))


def test_gradients_through_the_log_sum_exp_are_the_weights(seed: int) -> None:
    q, k, v = qkv(seed)
    grad_lse = draw(seed + 1, (2, 4, 5))[0]
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) * grad_lse.unsqueeze(-1)
    grads = reference_gradients(q, k, v, grad_out=torch.zeros(2, 4, 5, 6), grad_lse=grad_lse)
    assert relative_error(grads.query, weights @ k / math.sqrt(8)) <= 1e-13
    assert relative_error(grads.key, weights.transpose(-1, -2) @ q / math.sqrt(8)) <= 1e-13
    assert torch.equal(grads.value, torch.zeros_like(v))


def test_dead_rows_have_zero_gradients_and_no_nan(seed: int) -> None:
    q, k, v = qkv(seed)
    mask, grad_out, grad_lse = draw(seed + 1, (5, 7), (2, 4, 5, 6), (2, 4, 5))
    mask[2] = -math.inf
    grads = reference_gradients(q, k, v, mask, grad_out=grad_out, grad_lse=grad_lse)
    assert not any(bool(g.isnan().any()) for g in grads)
    assert not grads.query[:, :, 2].any()
    assert not grads.mask[2].any()
    assert grads.mask.shape == mask.shape


def test_a_request_says_which_gradients(seed: int) -> None:
    q, k, v = qkv(seed)
    request = request_of(q, k, v, grads=frozenset({"k"}), is_causal=True)
    grads = reference_gradients(q, k, v, grad_out=torch.ones(2, 4, 5, 6), request=request)
    assert [g is not None for g in grads] == [False, True, False, False]


def test_relative_error() -> None:
    one, inf = torch.ones(3), torch.tensor([1.0, -math.inf, 1.0])
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert relative_error(one, torch.zeros(3)) == math.inf
    assert relative_error(inf, inf) == 0
    assert relative_error(inf * 2, inf) == pytest.approx(1)
    assert relative_error(one, inf) == math.inf
    assert relative_error(-inf, inf) == math.inf
    assert relative_error(torch.tensor([1.0, math.nan, 1.0]), one) == math.inf
    assert relative_error(one, torch.tensor([1.0, math.nan, 1.0])) == math.inf
    with pytest.raises(hal.ContractError, match=r"\(3,\).*\(2,\)"):
        relative_error(one, torch.ones(2))


def test_importing_the_kit_imports_neither_torch_nor_pytest() -> None:
    code = "import sys, hal_core.testing; print([m for m in ('torch', 'pytest', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_is_there() -> None:
    from hal_core import testing

    assert all(callable(getattr(testing, name)) or name == "CHECKS" for name in testing.__all__)
    assert testing.reference is reference
    with pytest.raises(AttributeError, match="nothing_like_it"):
        testing.nothing_like_it  # noqa: B018
