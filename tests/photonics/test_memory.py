"""What is programmed into the chip lies in the session's memory; a call allocates what its estimate says."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hal_photonics import register_profile
from hal_photonics.backend import BUNDLED

import hal_core as hal
from hal_core import AttentionRequest, MaskKind, PluginError
from hal_core.plugin_api import PooledMemory
from hal_core.registry import registry


@pytest.fixture
def session() -> Any:
    return hal.session("photonic:0")


def prepared(session: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: Any) -> Any:
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    r = AttentionRequest(*sizes, "float32", **changes)
    return session.prepare_attention(q, k, v, request=r)


def test_prepared_operands_lie_in_the_sessions_memory_for_as_long_as_they_are_needed(
    session: Any, draw: torch.Generator
) -> None:
    q, k, v = (torch.randn(1, 2, 60, 16, generator=draw) for _ in range(3))
    gc.collect()
    before = session.memory.stats().in_use
    call = prepared(session, q, k, v)
    assert session.memory.stats().in_use - before >= 2 * k.nbytes
    del call
    gc.collect()
    assert session.memory.stats().in_use == before
    reuses = session.memory.stats().reuses
    prepared(session, q, k, v)
    assert session.memory.stats().reuses == reuses + 3, "blocks go back to the pool"


def test_what_was_programmed_stays_when_the_callers_tensors_change(session: Any, draw: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, 60, 16, generator=draw) for _ in range(3))
    call = prepared(session, q, k, v)
    want = session.compute_attention(call, rng=(1, 2)).out
    k.zero_()
    v.zero_()
    assert torch.equal(session.compute_attention(call, rng=(1, 2)).out, want)


def test_queries_of_another_length_stream_through_prepared_keys(session: Any, draw: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, 60, 16, generator=draw) for _ in range(3))
    causal = hal.Causal.BOTTOM_RIGHT
    call, short = prepared(session, q, k, v, causal=causal), prepared(session, q[:, :, :7], k, v, causal=causal)
    one = session.compute_attention(call, query=q[:, :, :7], rng=(1, 2)).out
    assert torch.equal(one, session.compute_attention(short, rng=(1, 2)).out)


def test_a_memory_manager_that_gives_less_is_a_plugin_error(
    session: Any, draw: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(PooledMemory):
        def allocate(self, shape: Any, dtype: str) -> Any:
            return super().allocate((*shape[:-1], max(shape[-1] - 1, 0)), dtype)

    monkeypatch.setattr(session, "memory", Short())
    q = torch.randn(1, 2, 60, 16, generator=draw)
    with pytest.raises(PluginError, match=r"gave \[1, 2, 60, 15\].*where \[1, 2, 60, 16\]"):
        prepared(session, q, q, q)
    gc.collect()


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes allocated on the CPU at the peak of a call, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    del result
    return peak


CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "square": ((1, 4, 4, 256, 256, 64, 64), {}),
    "mask of eight heads": ((1, 8, 8, 200, 300, 64, 64), {"mask": 8}),
    "bfloat16, mask of eight heads, softcap": ((1, 8, 8, 200, 300, 64, 64), {"mask": 8, "bf16": True, "softcap": 3.0}),
    "boolean mask, grouped": ((2, 8, 2, 128, 512, 96, 40), {"mask": 1, "boolean": True}),
    "decode": ((1, 8, 8, 1, 3000, 64, 64), {}),
    "long, causal, bfloat16": ((1, 2, 2, 1300, 1300, 32, 32), {"is_causal": True, "bf16": True, "return_lse": True}),
    "window": ((1, 8, 8, 512, 64, 128, 128), {"window": (20, 5)}),
    "long heads": ((1, 1, 1, 1500, 40, 1000, 8), {}),
}


#: The mechanisms and the widths of arrays differ in what they need for weights and inputs.
OTHERS = [(device, name) for device in ("lightmatter:4", "luminous:0") for name in ("decode", "long heads")]


@pytest.mark.parametrize(
    ("device", "name"), [*(("photonic:0", name) for name in CALLS), *OTHERS, ("lightmatter:3", "square")]
)
def test_the_peak_of_a_call_is_its_estimate(device: str, name: str, draw: torch.Generator) -> None:
    (batch, heads_q, heads_kv, len_q, len_k, dim, dim_v), options = CALLS[name]
    options = dict(options)
    dtype = torch.bfloat16 if options.pop("bf16", False) else torch.float32
    heads, boolean = options.pop("mask", 0), options.pop("boolean", False)
    shapes = ((batch, heads_q, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim_v))
    operands = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    if heads:
        mask = torch.randn(1, heads, len_q, len_k, generator=draw)
        operands.append(mask > -1 if boolean else mask.to(dtype))
    options["enable_gqa"] = heads_q != heads_kv
    hal.attention(*operands, backend=device, rng=(1, 2), **options)
    hal.session(device).memory.trim()
    peak = peak_of(lambda: hal.attention(*operands, backend=device, rng=(1, 2), **options))
    found = registry.find(device)[0]
    asked = AttentionRequest(
        batch,
        heads_q,
        heads_kv,
        len_q,
        len_k,
        dim,
        dim_v,
        str(dtype).removeprefix("torch."),
        mask=(MaskKind.BOOLEAN if boolean else MaskKind.ADDITIVE) if heads else MaskKind.NONE,
        mask_heads=max(heads, 1),
        softcap=options.get("softcap"),
        window=options.get("window"),
        causal=hal.Causal.TOP_LEFT if options.get("is_causal") else hal.Causal.NONE,
        lse="return_lse" in options,
    )
    stated = registry.backend_of(found).estimate(asked, found).memory
    assert abs(stated - peak) <= 0.1 * peak + 65536, f"{stated:,} stated, {peak:,} allocated"


def test_with_gradients_the_estimate_counts_what_torch_keeps_for_them(draw: torch.Generator) -> None:
    device = register_profile(BUNDLED / "generic.toml", "trained", straight_through=True)
    try:
        q, k, v = (torch.randn(1, 2, 1100, 32, generator=draw).requires_grad_() for _ in range(3))
        hal.attention(q, k, v, is_causal=True, backend=device.id)
        hal.session(device.id).memory.trim()
        peak = peak_of(lambda: hal.attention(q, k, v, is_causal=True, backend=device.id))
        sizes = (1, 2, 2, 1100, 1100, 32, 32, "float32")
        asked = AttentionRequest(*sizes, causal=hal.Causal.TOP_LEFT, grads=frozenset("qkv"))
        stated = registry.backend_of(device).estimate(asked, device).memory
        assert abs(stated - peak) <= 0.1 * peak + 65536, f"{stated:,} stated, {peak:,} allocated"
    finally:
        hal.unregister("trained")
