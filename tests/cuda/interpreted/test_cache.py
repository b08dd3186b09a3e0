"""Quantised caches in the Triton kernels, against float64 over the numbers that their codes stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_cuda.kernels.portable.launch import PortablePath
from interpreted_device import CONTEXT
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal, SequenceMetadata
from hal_core.testing import reference, relative_error

DTYPES = ("int8", "int4", "float8_e4m3fn", "float8_e5m2")


def request_of(query: Tensor, key: Tensor, cache_dtype: str, **options: Any) -> AttentionRequest:
    batch, heads_q, len_q, dim = query.shape
    sizes = {"batch": batch, "heads_q": heads_q, "heads_kv": key.shape[1], "len_q": len_q, "len_k": key.shape[2]}
    return AttentionRequest(
        **{**sizes, "dim_qk": dim, "dim_v": dim, "lse": True, "cache_dtype": cache_dtype}
        | {"dtype": str(query.dtype).removeprefix("torch."), **options}
    )


def drawn(
    generator: torch.Generator, heads: tuple[int, int], len_q: int, len_k: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; some channels of the keys and one token's value are far larger than the rest."""
    query, key, value = (
        torch.randn(2, count, length, dim, generator=generator)
        for count, length in ((heads[0], len_q), (heads[1], len_k), (heads[1], len_k))
    )
    key[..., 1::9] *= 12.0
    query[..., 1::9] /= 12.0
    value[..., 3, :] *= 30.0
    return query, key, value


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["token", "head"])
@pytest.mark.parametrize(
    ("kind", "heads", "len_q", "len_k", "dim", "options"),
    [
        ("float16", (4, 2), 1, 300, 32, {}),
        ("float16", (8, 1), 3, 130, 48, {"causal": Causal.BOTTOM_RIGHT}),
        ("float32", (2, 2), 1, 70, 24, {}),
        ("float16", (2, 2), 40, 50, 64, {"causal": Causal.BOTTOM_RIGHT, "window": (20, 0)}),
        ("float16", (2, 1), 2, 260, 32, {"softcap": 4.0}),
    ],
)
def test_codes_are_read_as_the_numbers_they_stand_for(
    generator: torch.Generator,
    dtype: str,
    values: str,
    kind: str,
    heads: tuple[int, int],
    len_q: int,
    len_k: int,
    dim: int,
    options: dict[str, Any],
) -> None:
    query, key, value = drawn(generator, heads, len_q, len_k, dim)
    query = query.to(getattr(torch, kind))
    cache = hal.quantize_cache(key, value, dtype, values=values)
    request = request_of(query, key, dtype, **options)
    tables = SequenceMetadata(key_scale=cache.key_scale, value_scale=cache.value_scale)
    out, lse = PortablePath(request, CONTEXT)(query, cache.key, cache.value, tables=tables)
    numbers = [hal.dequantized(c, s, torch.float64) for c, s in zip(cache[:2], cache[2:], strict=True)]
    given = {name: options[name] for name in ("causal", "window", "softcap") if name in options}
    want = reference(query.double(), *numbers, **given)
    bound = 1e-3 if kind == "float16" else 3e-6
    assert relative_error(out, want.out) <= bound
    assert relative_error(lse, want.lse) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_hold_codes_and_their_scales(generator: torch.Generator, dtype: str) -> None:
    """Whatever lies behind a sequence's end, or in a page that the table names wrongly, changes nothing outside it."""
    query, key, value = drawn(generator, (4, 2), 1, 48, 32)
    cache = hal.quantize_cache(key, value, dtype)
    held, table = torch.tensor([37, 16]).int(), torch.tensor([[5, 2, 0], [3, 999, -1]]).int()
    pages = []
    for t in (cache.key, cache.value, cache.value_scale):
        whole = torch.zeros(7, 2, 16, t.shape[-1], dtype=t.dtype)
        for s, number in ((0, 0), (0, 1), (0, 2), (1, 0)):
            whole[int(table[s, number])] = t[s, :, 16 * number : 16 * number + 16]
        pages.append(whole)
    pages[2][0, :, 5:] = math.nan  # behind the first sequence's 37 keys
    request = request_of(query, key, dtype, page_size=16)
    tables = SequenceMetadata(None, None, table, held, cache.key_scale, pages[2])
    out = PortablePath(request, CONTEXT)(query, *pages[:2], tables=tables).out
    numbers = [hal.dequantized(c, s, torch.float64) for c, s in zip(cache[:2], cache[2:], strict=True)]
    for s, count in enumerate(held.tolist()):
        want = reference(query[s, None].double(), *(t[s, None, :, :count] for t in numbers)).out
        assert relative_error(out[s, None], want) <= 3e-6


@pytest.mark.parametrize("layout", ["bytes", "strided"])
def test_codes_may_lie_anywhere(generator: torch.Generator, layout: str) -> None:
    """Odd strides and addresses are read byte by byte."""
    query, key, value = drawn(generator, (4, 2), 1, 70, 32)
    cache = hal.quantize_cache(key, value, "int8")
    if layout == "bytes":
        given = []
        for t in cache[:2]:
            room = torch.zeros(2, 2, 70, 35, dtype=t.dtype)[..., 1:33]
            given.append(room.copy_(t))
    else:
        given = [t.mT.contiguous().mT for t in cache[:2]]
    request = request_of(query, key, "int8", last_dim_contiguous=layout == "bytes")
    tables = SequenceMetadata(key_scale=cache.key_scale, value_scale=cache.value_scale)
    out = PortablePath(request, CONTEXT)(query, *given, tables=tables).out
    numbers = [hal.dequantized(c, s, torch.float64) for c, s in zip(cache[:2], cache[2:], strict=True)]
    assert relative_error(out, reference(query.double(), *numbers).out) <= 3e-6
