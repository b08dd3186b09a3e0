"""What holds on a GPU: the kernels' own shapes against float64, and how calls live with streams, graphs and full
memory.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_reference import agrees, draw, error, exact, forced
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, MaskKind
from hal_core.registry import registry

HOPPER_CASES = [
    # len_q, len_k, options
    (1000, 1000, {}),
    (1024, 1024, {"causal": "top_left"}),
    (1000, 1000, {"causal": "top_left"}),
    (333, 1500, {"causal": "bottom_right"}),
    (1500, 333, {"causal": "bottom_right"}),
    (700, 700, {"causal": "top_left", "diagonal": 37}),
    (900, 900, {"causal": "top_left", "diagonal": -200}),
    (2048, 2048, {"causal": "top_left", "window": (256, 0)}),
    (1100, 1300, {"window": (100, 70)}),
    (1100, 1300, {"window": (None, 70)}),
    (1100, 1300, {"window": (10, None)}),
    (640, 640, {"softcap": 5.0}),
    (777, 900, {"causal": "bottom_right", "softcap": 20.0, "window": (300, 0)}),
    (65, 40, {}),
    (4096, 64, {"causal": "top_left"}),
    (64, 4096, {"causal": "bottom_right"}),
    (300, 2560, {}),
    (1900, 2500, {}),
    (2304, 2304, {"causal": "top_left"}),
    (2200, 2500, {"causal": "bottom_right", "softcap": 20.0}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256, 40])
def test_hopper_kernel_agrees_with_float64(gpu: str, seed: int, dim: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    for place, (len_q, len_k, options) in enumerate(HOPPER_CASES):
        layout = "heads last" if place % 2 else "heads first"
        query = draw(seed + place, 2, 4, len_q, dim, dtype, layout)
        key, value = (draw(seed + place + i, 2, 2, len_k, dim, dtype, layout) for i in (100, 200))
        for _ in range(3):  # a race shows as an error that moves
            agrees(forced("hopper", gpu, query, key, value, **options), exact(query, key, value, **options), dtype)


@pytest.mark.parametrize(
    ("dim_qk", "dim_v"), [(192, 128), (128, 64), (64, 128), (96, 256), (192, 104), (256, 72), (96, 40), (64, 96)]
)
def test_hopper_kernel_takes_values_of_another_size(gpu: str, seed: int, dim_qk: int, dim_v: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    for length, options in ((1000, {}), (1000, {"causal": "top_left"}), (1300, {"causal": "top_left"}), (2048, {})):
        query, key = (draw(seed + i, 1, 3, length, dim_qk, torch.bfloat16) for i in range(2))
        value = draw(seed + 2, 1, 3, length, dim_v, torch.bfloat16)
        agrees(forced("hopper", gpu, query, key, value, **options), exact(query, key, value, **options), torch.bfloat16)


@pytest.mark.parametrize("dim", [8, 72, 104, 168, 248])
def test_hopper_kernel_takes_head_sizes_between_its_own(gpu: str, seed: int, dim: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    for options in ({}, {"causal": "top_left"}):
        query, key, value = (draw(seed + i, 1, 3, 1100, dim, torch.bfloat16, "heads last") for i in range(3))
        agrees(forced("hopper", gpu, query, key, value, **options), exact(query, key, value, **options), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 192, 256])
def test_hopper_kernel_follows_maxima_that_grow(gpu: str, seed: int, dim: int, dtype: torch.dtype) -> None:
    """Keys are walked from the last to the first: by tiles of 64, a row's maximum grows by a little, by more, by very
    much.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    for growth in (-2.0, 0.5, 2.0, 20.0):
        query, key, value = (draw(seed + i, 1, 4, 1900, dim, dtype) for i in range(3))
        query[..., 0] = 1.0
        key[..., 0] = torch.linspace(growth * 1900 / 64, 0.0, 1900, device="cuda") * dim**0.5
        agrees(forced("hopper", gpu, query, key, value), exact(query, key, value), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_portable_kernel_agrees_with_float64(gpu: str, seed: int, dim: int, dtype: torch.dtype) -> None:
    for place, (len_q, len_k, options) in enumerate(HOPPER_CASES[::3]):
        query = draw(seed + place, 1, 4, len_q, dim, dtype, "heads last")
        key, value = (draw(seed + place + i, 1, 2, len_k, dim, dtype) for i in (100, 200))
        agrees(forced("portable", gpu, query, key, value, **options), exact(query, key, value, **options), dtype)


@pytest.mark.parametrize("kind", ["boolean", "additive", "keys"])
def test_portable_kernel_applies_masks(gpu: str, seed: int, kind: str) -> None:
    query, key, value = (draw(seed + i, 2, 4, 500, 64, torch.bfloat16) for i in range(3))
    shape = (2, 1, 1, 500) if kind == "keys" else (1, 4, 500, 500)
    mask = torch.rand(shape, device="cuda") > 0.4
    mask = torch.randn(shape, device="cuda").masked_fill(~mask, -math.inf) if kind == "additive" else mask
    for options in ({}, {"causal": "top_left"}):
        got = forced("portable", gpu, query, key, value, mask, **options)
        agrees(got, exact(query, key, value, mask, **options), torch.bfloat16)


def test_block_plan_reads_its_blocks_alone(gpu: str, seed: int) -> None:
    query, key, value = (draw(seed + i, 1, 2, 1000, 128, torch.bfloat16) for i in range(3))
    indices = torch.randint(0, 8, (1, 2, 8, 1), device="cuda", dtype=torch.int32)
    plan = BlockPlan(128, 128, indices, torch.ones((1, 2, 8), device="cuda", dtype=torch.int32))
    got = forced("portable", gpu, query, key, value, block_plan=plan)
    agrees(got, exact(query, key, value, hal.expand_block_plan(plan, 1000, 1000)), torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(("batch", "keys"), [(1, 1024), (1, 30000), (5, 3001), (64, 700)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_decode_agrees_with_float64(gpu: str, seed: int, dim: int, batch: int, keys: int, tokens: int) -> None:
    query = draw(seed, batch, 8, tokens, dim, torch.bfloat16)
    key, value = (draw(seed + i, batch, 2, keys, dim, torch.bfloat16) for i in (1, 2))
    for options in ({"causal": "bottom_right"}, {"causal": "bottom_right", "window": (500, 0)}):
        agrees(
            forced("portable", gpu, query, key, value, **options), exact(query, key, value, **options), torch.bfloat16
        )


@pytest.mark.parametrize("page", [16, 48, 256])
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_paged_cache_of_mixed_lengths(gpu: str, seed: int, page: int, tokens: int) -> None:
    lengths = [1000, 5000, 0, 33, 16 * page]
    most = -(-max(lengths) // page)
    total = len(lengths) * most
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = order.view(len(lengths), most).cuda()
    key, value = (draw(seed + i, total, 2, page, 128, torch.bfloat16) for i in (1, 2))
    query = draw(seed, len(lengths), 8, tokens, 128, torch.bfloat16)
    held = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    got = hal.attention(
        query,
        key,
        value,
        causal="bottom_right",
        enable_gqa=True,
        page_table=table,
        cache_seqlens=held,
        return_lse=True,
        backend=gpu,
    )
    for s, length in enumerate(lengths):
        k, v = (t[table[s].long()].transpose(0, 1).reshape(1, 2, -1, 128)[:, :, :length] for t in (key, value))
        want = exact(query[s : s + 1], k, v, causal="bottom_right")
        agrees(hal.AttentionOutput(got.out[s : s + 1], got.lse[s : s + 1]), want, torch.bfloat16)


def test_offsets_past_two_to_the_31_elements(gpu: str, seed: int) -> None:
    """Keys of the last head begin after 2**31 elements: a 32-bit offset would read another head's."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    heads, keys, dim = 66, 1 << 18, 128
    key = torch.zeros(1, heads, keys, dim, device="cuda", dtype=torch.bfloat16)
    value = torch.zeros_like(key)
    key[0, -1, -500:], value[0, -1, -500:] = draw(seed, 500, 1, 1, dim, key.dtype)[:, 0, 0], 1.0
    value[0, -1] += 1.0
    for tokens in (1, 200):
        query = draw(seed + 1, 1, heads, tokens, dim, torch.bfloat16)
        for path in (
            ("hopper", "portable") if tokens > 16 and torch.cuda.get_device_capability() == (9, 0) else ("portable",)
        ):
            got = forced(path, gpu, query, key, value)
            want = exact(query[:, -1:], key[:, -1:], value[:, -1:])
            agrees(hal.AttentionOutput(got.out[:, -1:], got.lse[:, -1:]), want, torch.bfloat16)


def test_graph_replays_with_new_values(gpu: str, seed: int) -> None:
    for length, keys in ((1024, 1024), (1, 4096)):
        query = draw(seed, 2, 4, length, 128, torch.bfloat16)
        key, value = (draw(seed + i, 2, 2, keys, 128, torch.bfloat16) for i in (1, 2))
        options: dict[str, Any] = {"causal": "bottom_right", "enable_gqa": True, "backend": gpu}
        hal.attention(query, key, value, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = hal.attention(query, key, value, **options)
        for again in range(3):
            query.copy_(draw(seed + 10 + again, 2, 4, length, 128, torch.bfloat16))
            graph.replay()
            assert error(out, exact(query, key, value, causal="bottom_right")[0]) <= 4e-3


def test_decode_on_two_streams_at_once_and_in_a_graph(gpu: str, seed: int) -> None:
    """Programs of one call are counted apart from those of another, though calls overlap and a graph is replayed
    beside.
    """
    given = [
        (
            draw(seed + i, 1, 8, 1, 128, torch.bfloat16),
            *(draw(seed + i + j, 1, 2, 20000, 128, torch.bfloat16) for j in (7, 8)),
        )
        for i in range(3)
    ]
    want = [hal.attention(*tensors, enable_gqa=True, backend=gpu) for tensors in given]
    for tensors, out in zip(given, want, strict=True):
        assert error(out, exact(*tensors)[0]) <= 4e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = hal.attention(*given[2], enable_gqa=True, backend=gpu)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[], []]
    for _ in range(100):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[number].append(hal.attention(*given[number], enable_gqa=True, backend=gpu))
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, want[number]) for number in (0, 1) for out in got[number])
    assert error(replayed, want[2].double()) <= 1e-3
    session: Any = hal.session(gpu)
    assert session._context.workspaces.idle


def test_calls_follow_the_current_stream(gpu: str, seed: int) -> None:
    query, key, value = (draw(seed + i, 1, 4, 2048, 64, torch.bfloat16) for i in range(3))
    want = exact(query, key, value)[0]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.empty_like(query)
        torch.cuda._sleep(50_000_000)
        late.copy_(query)
        out = hal.attention(late, key, value, backend=gpu)
    side.synchronize()
    assert error(out, want) <= 4e-3


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"softcap": 4.0, "is_causal": True}, {"window": (50, 10)}]
)
def test_gradients_agree_with_float64(gpu: str, seed: int, options: dict[str, Any]) -> None:
    tensors = [draw(seed + i, 2, 3, 300, 64, torch.bfloat16).requires_grad_() for i in range(3)]
    hal.attention(*tensors, backend=gpu, **options).float().square().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in tensors]
    hal.attention(*wide, backend=gpu, **options).square().sum().backward()
    for got, want in zip(tensors, wide, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert error(got.grad, want.grad) <= 2e-2


def test_explain_names_every_path_with_its_time(gpu: str, seed: int) -> None:
    query = draw(seed, 1, 8, 4096, 128, torch.bfloat16)
    source = hal.explain(query, query, query, is_causal=True, backend=gpu).winner.estimate.time.source
    for name in ("own Triton kernel", "torch FlashAttention"):
        assert name in source
    query.requires_grad_()
    source = hal.explain(query, query, query, is_causal=True, backend=gpu).winner.estimate.time.source
    assert source.startswith("gradients by ")
    for name in ("own Triton kernel", "torch FlashAttention", "torch cuDNN"):
        assert name in source


def test_full_memory_is_named_and_the_pool_stays_usable(gpu: str, seed: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    query = draw(seed, 1, 4, 256, 64, torch.bfloat16)
    session = hal.session(gpu)
    with pytest.raises(hal.MemoryLimitError) as caught:
        session.memory.allocate((2 * free,), "bfloat16")
    assert caught.value.requested == 4 * free
    assert error(hal.attention(query, query, query, backend=gpu), exact(query, query, query)[0]) <= 4e-3


def test_memory_is_shared_by_dlpack_both_ways(gpu: str) -> None:
    cupy = pytest.importorskip("cupy")
    memory = hal.session(gpu).memory
    array = cupy.arange(1000, dtype=cupy.float32)
    taken = memory.to_backend(array)
    assert taken.tensor.data_ptr() == array.data.ptr
    buffer = memory.allocate((16, 16), "float32")
    buffer.tensor.fill_(3.0)
    torch.cuda.synchronize()
    given = cupy.from_dlpack(buffer)
    assert given.data.ptr == buffer.tensor.data_ptr()
    assert float(given.sum()) == 768.0
    assert memory.stats().copies == 0
    memory.free(buffer)
    memory.free(taken)


def test_cupy_pool_serves_buffers_within_its_limit(gpu: str) -> None:
    pytest.importorskip("cupy")
    from hal_cuda.memory import CudaMemory

    memory = CudaMemory(0, source="cupy", limit=1 << 20)
    buffer = memory.allocate((1000,), "bfloat16")
    buffer.tensor.fill_(1.5)
    assert float(buffer.tensor.float().sum()) == 1500.0
    with pytest.raises(hal.MemoryLimitError):
        memory.allocate((1 << 20,), "float32")
    memory.free(buffer)
    assert memory.stats().in_use == 0


def test_every_claim_has_a_path(gpu: str) -> None:
    """Whatever the capabilities accept, dispatch finds a path for."""
    from hal_cuda.backend import CudaBackend
    from hal_cuda.paths import candidates

    backend = registry.backend_of(gpu)
    assert isinstance(backend, CudaBackend)
    chip = backend.chip(registry.find(gpu)[0])
    plain = AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=100, len_k=100, dim_qk=33, dim_v=65, dtype="bfloat16", device="cuda:0"
    )
    for change in (
        {},
        {"mask": MaskKind.ADDITIVE},
        {"dtype": "float64"},
        {"grads": frozenset("qkv")},
        {"packed": True},
    ):
        assert candidates(replace(plain, **change), chip)
