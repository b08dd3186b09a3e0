"""Calls beyond the work groups of one dispatch: entries, gradients' rows and fields go on in turn, the rest is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.registry import registry, resolve
from hal_core.testing import reference, relative_error

backend_module = pytest.importorskip("hal_vulkan.backend", exc_type=ImportError)
from hal_vulkan import discovery  # noqa: E402
from hal_vulkan.session import VulkanSession  # noqa: E402

MOST = {"X": 6, "Y": 5, "Z": 64}


@pytest.fixture
def narrow(device: hal.Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A session on a driver that takes few work groups, and no more of them."""
    adapter = discovery.find().adapters[device.id]
    limits = {f"maxComputeWorkGroupCount{axis}": most for axis, most in MOST.items()}
    with VulkanSession(device, adapter._replace(limits=adapter.limits | limits)) as session:
        gpu, dispatch = session.recorder.gpu, session.recorder.gpu.dispatch

        def held(commands: Any, pipeline: Any, bound: Any, push: bytes, groups: Any) -> None:
            assert all(n <= most for n, most in zip(groups, MOST.values(), strict=True))
            dispatch(commands, pipeline, bound, push, groups)

        monkeypatch.setattr(gpu, "dispatch", held)
        yield session


def asked(query: torch.Tensor, key: torch.Tensor, **options: Any) -> hal.AttentionRequest:
    batch, heads, len_q, dim = query.shape
    return hal.AttentionRequest(
        batch=batch,
        heads_q=heads,
        heads_kv=key.shape[1],
        len_q=len_q,
        len_k=key.shape[2],
        dim_qk=dim,
        dim_v=dim,
        dtype=str(query.dtype).removeprefix("torch."),
        **options,
    )


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mask", [None, (7, 1, 20, 24), (1, 4, 20, 24), (20, 24), "plan of all", "plan of each"])
def test_more_batch_entries_than_a_dispatch_takes_go_in_turn(narrow: Any, mask: Any, seed: int) -> None:
    query, key, value, scores = drawn(seed, (7, 4, 20, 32), (7, 2, 24, 32), (7, 2, 24, 32), (7, 4, 20, 24))
    plan, hidden, options = None, None, {"lse": True}
    if isinstance(mask, str):
        entries = 1 if mask.endswith("all") else 7
        indices = (scores[:entries, :, :1, :1] > 0).int()  # the first or the second block of 12 keys
        plan = hal.BlockPlan(20, 12, indices, torch.ones(entries, 4, 1, dtype=torch.int32))
        hidden = (torch.arange(24) // 12 == indices).expand(7, 4, 20, 24)
        options["block_plan"] = (20, 12, 1)
    elif mask is not None:
        hidden = scores[tuple(slice(0, n) for n in mask)] > -0.5 if len(mask) == 4 else scores[0, 0] > -0.5
        options["mask"] = hal.MaskKind.BOOLEAN
    run = narrow.bind(asked(query, key, **options))
    want = reference(query, key, value, hidden)
    for _ in range(2):  # recorded, and run again
        out, lse = run(query, key, value, None if plan is not None else hidden, plan)
        assert relative_error(out, want.out) <= 1e-5
        assert relative_error(lse, want.lse) <= 1e-5


def test_parts_of_a_batch_are_written_where_they_belong(narrow: Any, seed: int) -> None:
    query, key, value = drawn(seed, (7, 4, 20, 32), (7, 4, 24, 32), (7, 4, 24, 32))
    out = torch.empty(20, 7, 4, 32).permute(1, 2, 0, 3)
    prepared = narrow.prepare_attention(query, key, value, request=asked(query, key))
    found = narrow.compute_attention(prepared, out=out)
    assert found.out is out
    assert found.lse is None
    assert relative_error(out, reference(query, key, value).out) <= 1e-5
    assert len(narrow.recorder._kept) == 1, "one recording serves every entry"


def test_gradients_of_more_rows_and_entries_than_a_dispatch_takes(narrow: Any, seed: int) -> None:
    query, key, value, grad = drawn(seed, (3, 4, 20, 32), (3, 2, 24, 32), (3, 2, 24, 32), (3, 4, 20, 32))
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True).backward(grad.double())
    prepared = narrow.prepare_attention(query, key, value, request=asked(query, key, lse=True, grads=frozenset("qk")))
    out, lse = narrow.compute_attention(prepared)
    grads = narrow.compute_attention_backward(prepared, out, lse, grad)
    assert grads.value is None
    assert all(relative_error(found, leaf.grad) <= 2e-5 for found, leaf in zip(grads[:2], leaves, strict=False))


def test_parts_of_many_keys_are_merged_beyond_a_dispatch(narrow: Any, seed: int) -> None:
    query, key, value = drawn(seed, (1, 3, 9, 64), (1, 3, 9000, 64), (1, 3, 9000, 64))
    out = narrow.bind(asked(query, key))(query, key, value)
    assert any("merge" in made[0] for made in narrow.recorder.shaders.made)
    assert relative_error(out, reference(query, key, value).out) <= 1e-5


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vector_add", [(3, 1001), (3, 1001)]),
        ("reduce_sum", [(9, 1003)]),
        ("matmul", [(70, 45, 12), (70, 12, 2000)]),
        ("reaction_diffusion_step", [(67, 11, 500), (67, 11, 500)]),
        ("ricci_flow_step", [(67, 11, 500)]),
    ],
)
def test_kernels_beside_attention_go_on_in_turn(narrow: Any, name: str, shapes: Any, seed: int) -> None:
    nothing = torch.full((1 << 17,), torch.nan)
    narrow.kernel("vector_add")(nothing, nothing)  # leaves memory that nobody should read
    narrow.recorder.forget()
    given = drawn(seed, *shapes)
    more = (0.01,) if name == "ricci_flow_step" else ()
    given = [0.2 * t for t in given] if more else given
    spec = registry.kernel_specs()[name]
    want, got = resolve(spec.reference)(*(t.double() for t in given), *more), narrow.kernel(name)(*given, *more)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    assert all(relative_error(x, y) <= spec.tolerance["float32"] for x, y in pairs)


def test_what_cannot_go_in_turn_is_refused_with_the_limit_and_the_fix(narrow: Any) -> None:
    query = torch.randn(1, 7, 4, 32)
    words = (
        r"cannot compute attention .*: forward_\w+\.float32 needs 1 x 7 x 1 work groups .* takes 6 x 5 x 64; split the"
    )
    with pytest.raises(hal.UnsupportedError, match=words):
        narrow.bind(asked(query, query))(query, query, query)
    query = query[:, :2]
    out = narrow.bind(asked(query, query))(query, query, query)
    assert relative_error(out, reference(query, query, query).out) <= 1e-5


def test_heads_and_rows_beyond_the_devices_own_limit_are_refused_before_the_call(device: hal.Device) -> None:
    limits = discovery.find().adapters[device.id].limits
    wide, tall = (limits[f"maxComputeWorkGroupCount{axis}"] for axis in "YX")
    query = torch.empty(1, 1, 1, 32).expand(1, wide + 1, 1, 32)
    with pytest.raises(hal.UnsupportedError, match=rf"heads +{wide + 1} asked.*1 to {wide} offered.*split the heads"):
        hal.attention(query, query, query, backend=device.id)
    if 8 * tall >= 1 << 24:
        return  # the device takes as many rows as attention has
    rows = torch.empty(1, 1, 1, 32).expand(1, 1, 8 * tall + 1, 32)
    with pytest.raises(hal.UnsupportedError, match=rf"len_q .*at most {8 * tall:,} offered.*split the queries"):
        hal.attention(rows, query[:, :1], query[:, :1], backend=device.id)
