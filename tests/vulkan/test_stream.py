"""Long calls on a processor's driver take another kernel: it must agree with float64 like the one it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

stream = pytest.importorskip("hal_vulkan.kernels.stream", exc_type=ImportError)
from hal_vulkan import tiling  # noqa: E402
from hal_vulkan.kernels import attention  # noqa: E402


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU's Vulkan device, where this kernel takes every call that it can."""
    found = [d for d in hal.devices() if d.family == "vulkan" and d.fidelity is hal.Fidelity.EMULATED]
    if not found:
        pytest.skip("no Vulkan driver for a CPU is installed")
    monkeypatch.setattr(tiling, "_STREAM_FROM", 0)
    return found[0].id


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": "top_left"},
    "bottom right": {"causal": "bottom_right", "diagonal": -3},
    "window": {"window": (90, 170)},
    "window behind": {"window": (300, -200)} | {"window": (300, 0), "causal": "top_left", "diagonal": -40},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("len_q", "len_k"), [(192, 1030), (70, 512), (333, 259), (1, 700), (13, 300), (40, 64)])
def test_streamed_attention_agrees_with_float64(device: str, name: str, len_q: int, len_k: int, seed: int) -> None:
    generator, options = torch.Generator().manual_seed(seed), CASES[name]
    query = torch.randn(1, 2, len_q, 32, generator=generator)
    key, value = (torch.randn(1, 1, len_k, 32, generator=generator) for _ in range(2))
    out, lse = hal.attention(query, key, value, backend=device, return_lse=True, enable_gqa=True, **options)
    kinds = {"causal": hal.Causal(options["causal"])} if "causal" in options else {}
    want = reference(query, key, value, **(options | kinds))
    assert relative_error(out, want.out) <= 1e-5
    assert relative_error(lse, want.lse) <= 1e-5


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
def test_every_head_size_agrees_where_several_heads_and_chunks_follow_each_other(
    device: str, dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, 70, dim, generator=generator)
    key, value = (torch.randn(1, 2, 600, dim, generator=generator) for _ in range(2))
    out = hal.attention(query, key, value, backend=device)
    assert relative_error(out, reference(query, key, value).out) <= 1e-5


@pytest.mark.parametrize("kind", ["boolean", "additive", "hidden keys", "softcap"])
@pytest.mark.parametrize(("len_q", "len_k"), [(70, 1030), (5, 300)])
def test_streamed_masks_and_softcaps_agree_with_float64(
    device: str, kind: str, len_q: int, len_k: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[object] = []
    record = attention.record_stream
    monkeypatch.setattr(attention, "record_stream", lambda *given: recorded.append(given[0]) or record(*given))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, len_q, 32, generator=generator)
    key, value = (torch.randn(2, 2, len_k, 32, generator=generator) for _ in range(2))
    mask = torch.rand(2, 4, len_q, len_k, generator=generator) > 0.4
    mask[0, 1, 2] = False  # a row without a key
    if kind == "hidden keys":
        mask = (torch.arange(len_k) < torch.tensor([len_k - 90, 7])[:, None])[:, None, None]
    elif kind == "additive":
        mask = torch.randn(2, 1, len_q, len_k, generator=generator).masked_fill(~mask[:, :1], -torch.inf)
    options: dict[str, Any] = {"softcap": 3.0} if kind == "softcap" else {"attn_mask": mask}
    out, lse = hal.attention(query, key, value, backend=device, return_lse=True, enable_gqa=True, **options)
    want = reference(query, key, value, options.get("attn_mask"), softcap=options.get("softcap"))
    assert recorded
    assert relative_error(out, want.out) <= 1e-5
    assert relative_error(lse[lse > -torch.inf], want.lse[want.lse > -torch.inf]) <= 1e-5
    assert bool(((lse == -torch.inf) == (want.lse == -torch.inf)).all())


def test_the_pieces_of_a_chunk_cover_its_band_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(300):
        draw = [int(torch.randint(0, 400, (1,), generator=generator)) for _ in range(5)]
        len_q, start, count = draw[0] + 1, draw[1], draw[2] + 1
        lower, upper = draw[3] - 300, draw[3] - 300 + draw[4]
        seen = {i for i in range(len_q) if i + lower < start + count and i + upper >= start}
        full = {i for i in range(len_q) if i + lower <= start and i + upper >= start + count - 1}
        pieces = stream._pieces(len_q, (start, count), (lower, upper), 64)
        rows = [row for begin, end, _ in pieces for row in range(begin, end)]
        assert len(rows) == len(set(rows))
        assert seen <= set(rows)
        assert {row for begin, end, banded in pieces if not banded for row in range(begin, end)} <= full
        assert all(begin % 64 == 0 for begin, _, _ in pieces)
