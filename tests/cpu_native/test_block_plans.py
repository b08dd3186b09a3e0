"""Block plans by the compiled kernel: agreement with masked float64, unread blocks, the time that skipping saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
native = pytest.importorskip("hal_cpu_native", reason="hal-cpu-native is not built here: make native")

from hal_cpu import paths  # noqa: E402
from torch import Tensor  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core.testing import reference, relative_error, request_of  # noqa: E402

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SETS = native.instruction_sets() or ("avx2",)


@pytest.fixture
def always() -> Iterator[None]:
    """Compiled kernels serve all that they can."""
    with paths.offering("always"):
        yield


def random_blocks(batch: int, heads: int, lengths: tuple[int, int], size: tuple[int, int], density: float) -> Tensor:
    counts = [-(-length // block) for length, block in zip(lengths, size, strict=True)]
    return torch.rand(batch, heads, *counts) < density


def tokens(blocks: Tensor, lengths: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The plan as a mask of tokens."""
    wide = blocks.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    return wide[:, :, : lengths[0], : lengths[1]]


def exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of masked attention in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * query.shape[3] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().masked_fill(~seen, 0.0) @ value, lse


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["one pattern", "a pattern of each head"])
@pytest.mark.parametrize("size", [(64, 64), (32, 16), (16, 100), (48, 24), (10, 7), (128, 256)], ids=str)
def test_planned_attention_is_masked_attention(
    size: tuple[int, int], own: bool, dtype: Any, isa: str, seed: int
) -> None:
    torch.manual_seed(seed)
    for lengths, density in (((130, 300), 0.3), ((257, 200), 0.1), ((3, 65), 0.5)):
        query = torch.randn(2, 4, lengths[0], 32).to(dtype)
        key, value = torch.randn(2, 2, lengths[1], 32).to(dtype), torch.randn(2, 2, lengths[1], 40).to(dtype)
        blocks = random_blocks(2 if own else 1, 4 if own else 1, lengths, size, density)
        mask = torch.rand(1, 1, *lengths) < 0.8 if own else None
        seen = tokens(blocks, lengths, size).expand(2, 4, *lengths).clone()
        distance = torch.arange(lengths[1])[None] - torch.arange(lengths[0])[:, None]
        band = (-150, 20 + lengths[1] - lengths[0])
        seen &= (distance >= band[0]) & (distance <= band[1])
        if mask is not None:
            seen &= mask
        lse = torch.empty(query.shape[:3])
        options: dict[str, Any] = {"blocks": blocks, "block_size": size, "band": band, "isa": isa, "threads": 3}
        out = native.attention(query, key, value, mask, lse=lse, **options)
        want, want_lse = exact(query, key, value, seen)
        empty = want_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty)
        assert bool((out[empty] == 0).all())
        if not bool(empty.all()):
            assert relative_error(out, want) <= BOUNDS[dtype]
            assert float((lse.double() - want_lse)[~empty].abs().max()) <= 2e-5 * max(
                1.0, float(want_lse[~empty].max())
            )


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("own", [False, True], ids=["one pattern", "a pattern of each head"])
def test_blocks_that_no_row_reads_are_not_read(own: bool, isa: str, seed: int) -> None:
    """NaN in keys and values that a plan leaves out reaches nothing: they are skipped, not hidden."""
    torch.manual_seed(seed)
    query, key, value = torch.randn(1, 4, 256, 32), *torch.randn(2, 1, 2, 256, 32).unbind()
    blocks = torch.ones(1, 4 if own else 1, 4, 4, dtype=torch.bool)
    blocks[..., 2] = False
    key[:, :, 128:192], value[:, :, 128:192] = torch.nan, torch.inf
    out = native.attention(query, key, value, blocks=blocks, block_size=(64, 64), isa=isa)
    rest = torch.cat([torch.arange(128), torch.arange(192, 256)])
    want = native.attention(query, key[:, :, rest], value[:, :, rest], isa=isa)
    assert relative_error(out, want.double()) <= 1e-6


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("plan_heads", [1, 4])
@pytest.mark.parametrize("lengths", [(96, 96), (100, 150), (1, 150), (150, 40)])
def test_a_plans_attention_agrees_with_float64(
    lengths: tuple[int, int], plan_heads: int, causal: str, dtype: Any, seed: int
) -> None:
    """Plans whose lists are padded and hold some blocks twice, through the public call."""
    torch.manual_seed(seed)
    len_q, len_k = lengths
    query = torch.randn(2, 4, len_q, 16).to(dtype)
    key, value = torch.randn(2, 2, len_k, 16).to(dtype), torch.randn(2, 2, len_k, 24).to(dtype)
    rows, columns = -(-len_q // 32), -(-len_k // 32)
    indices = torch.randint(0, columns, (2, plan_heads, rows, 2), dtype=torch.int32)
    plan = hal.BlockPlan(32, 32, indices, torch.randint(0, 3, (2, plan_heads, rows), dtype=torch.int32))
    request = request_of(query, key, value, plan=plan, causal=causal, return_lse=True)
    assert paths.path_of(request) == "compiled"
    options: dict[str, Any] = {"block_plan": plan, "causal": causal, "enable_gqa": True, "backend": "cpu"}
    out, lse = hal.attention(query, key, value, return_lse=True, **options)
    wide = [t.double() for t in (query, key, value)]
    mask = hal.expand_block_plan(plan, len_q, len_k)
    want = reference(*wide, mask, request=request_of(*wide, mask, causal=causal))
    assert relative_error(out, want.out) <= BOUNDS[dtype]
    finite = want.lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert relative_error(lse[finite], want.lse[finite]) <= 1e-5


@pytest.mark.parametrize(
    ("blocks", "size", "named"),
    [
        (torch.ones(1, 1, 2, 2), (64, 64), "bool"),
        (torch.ones(1, 1, 1, 2, dtype=torch.bool), (64, 64), "cover"),
        (torch.ones(1, 3, 2, 2, dtype=torch.bool), (64, 64), "do not fit"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), (0, 64), "not taken"),
    ],
)
def test_plans_that_do_not_fit_are_refused_by_name(blocks: Tensor, size: tuple[int, int], named: str) -> None:
    query = torch.randn(1, 2, 128, 32)
    with pytest.raises(native.NativeRefusal, match=named):
        native.attention(query, query, query, blocks=blocks, block_size=size)


def processor_times(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Medians of interleaved rounds in one thread: what other programs do does not count."""
    times: list[list[float]] = [[] for _ in calls]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for place, call in enumerate(calls):
                start = time.process_time()
                call()
                if number:
                    times[place].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(each) for each in times]


@pytest.mark.slow
@pytest.mark.usefixtures("always")
@pytest.mark.skipif("avx512" not in SETS, reason="the bars are those of AVX-512")
@pytest.mark.parametrize(("length", "part", "bar"), [(2048, 4, 3.0), (8192, 10, 7.0)])
def test_skipped_blocks_save_their_time(length: int, part: int, bar: float, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [torch.randn(1, 2, length, 64) for _ in range(3)]
    count = length // 64
    indices = torch.rand(1, 2, count, count).topk(count // part).indices.int()
    plan = hal.BlockPlan(64, 64, indices, torch.full((1, 2, count), count // part, dtype=torch.int32))
    dense, sparse = processor_times(
        [
            lambda: torch.nn.functional.scaled_dot_product_attention(*tensors),
            lambda: hal.attention(*tensors, block_plan=plan, backend="cpu"),
        ],
        5,
    )
    assert dense / sparse >= bar
