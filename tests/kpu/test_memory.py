"""Host memory: a call takes what its estimate says, and one that cannot fit is refused before it allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_kpu.cost import attention_memory
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.attention.workspace import part_of
from torch.profiler import ProfilerActivity, profile

import hal_core as hal
from hal_core import AttentionRequest, MemoryLimitError


def peak(call: Any) -> int:
    """Bytes that a call holds at its peak, by torch's allocator."""
    call()  # decides and imports
    hal.session("kpu:0").memory.trim()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        call()
    held = highest = 0
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "boolean", "additive of heads", "additive of one row", "causal"])
def test_the_estimate_is_what_the_allocator_gives(kind: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(1, 8, 200, 64).to(dtype), *(torch.randn(1, 2, 300, 64).to(dtype) for _ in range(2))
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "boolean": {"attn_mask": torch.rand(200, 300) > 0.5},
        "additive of heads": {"attn_mask": torch.randn(1, 8, 200, 300).to(dtype)},
        "additive of one row": {"attn_mask": torch.randn(1, 300).to(dtype)},
        "causal": {"causal": "bottom_right"},
    }
    given = {"backend": "kpu:0", "enable_gqa": True, **masks[kind]}
    request = hal.explain(q, k, v, **given).request
    assert peak(lambda: hal.attention(q, k, v, **given)) == pytest.approx(
        attention_memory(load("t64"), request), rel=0.1, abs=1 << 16
    )


def test_everything_beside_the_results_comes_from_the_session() -> None:
    q = torch.randn(1, 4, 256, 64)
    memory = hal.session("kpu:0").memory
    hal.attention(q, q, q, backend="kpu:0")
    memory.trim()
    before = memory.stats()
    hal.attention(q, q, q, backend="kpu:0")
    after = memory.stats()
    assert after.peak - before.in_use >= 4 * 4 * 256 * 64 * 3  # queries, unnormalised output and their update
    assert after.in_use == before.in_use


@pytest.mark.parametrize("shape", [(4, 8, 1 << 32, 64), (1 << 20, 1 << 10, 64, 64)])
def test_a_request_beyond_the_hosts_memory_is_refused_before_it_allocates(shape: tuple[int, ...]) -> None:
    q = torch.zeros(1, 1, 1, 64).expand(shape)
    k = q[:, :, :64]
    held = next(device for device in hal.devices() if device.id == "kpu:0").memory
    assert held is not None
    before = hal.session("kpu:0").memory.stats()
    with pytest.raises(MemoryLimitError, match=f"limit of {held:,}"):
        hal.attention(q, k, k, backend="kpu:0")
    assert hal.session("kpu:0").memory.stats().allocations == before.allocations


@pytest.mark.parametrize("heads", [(8, 8), (8, 1)])
def test_a_part_stays_within_its_bounds(heads: tuple[int, int]) -> None:
    """Short queries of many sequences would otherwise load the keys of all of them at once."""
    request = AttentionRequest(4096, *heads, 1, 4096, 128, 128, "bfloat16")
    part = part_of(request, 64)
    assert part.batch * part.heads * 64 * 256 <= 1 << 22
    assert part.rows == 1
