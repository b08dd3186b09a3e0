"""The device's own cut of the work, and tilings that the caller brings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hal_cuda.kernels.portable import launch
from hal_cuda.session import CudaSession
from hal_cuda.tiling import FOREIGN_SIZES
from interpreted_device import CHIP, DEVICE, RATES, InterpretedBackend
from torch import Tensor

from hal_core import AttentionRequest, Causal, PooledMemory, TilePlan

PLAIN = AttentionRequest(
    batch=1, heads_q=4, heads_kv=2, len_q=70, len_k=90, dim_qk=16, dim_v=16, dtype="float32", causal=Causal.BOTTOM_RIGHT
)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and keys of the tiles that attention kernels are compiled for."""
    found: list[tuple[int, int]] = []
    original = launch.launcher

    def noted(chip: Any, fn: Any, signature: Any, constants: Any, *given: Any, **options: Any) -> Any:
        if fn is launch.attend:
            found.append((constants["BM"], constants["BN"]))
        return original(chip, fn, signature, constants, *given, **options)

    monkeypatch.setattr(launch, "launcher", noted)
    return found


def session() -> CudaSession:
    return CudaSession(DEVICE, CHIP, lambda: RATES, memory=PooledMemory("cpu"))


def drawn(request: AttentionRequest, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((request.heads_q, request.len_q), *[(request.heads_kv, request.len_k)] * 2)
    query, key, value = (torch.randn(request.batch, *shape, request.dim_qk, generator=generator) for shape in shapes)
    return query, key, value


def wanted(request: AttentionRequest, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    wide = [t.double().repeat_interleave(request.heads_q // t.shape[1], 1) for t in (query, key, value)]
    hidden = torch.ones(request.len_q, request.len_k).tril(request.len_k - request.len_q) == 0
    scores = (wide[0] @ wide[1].mT * request.effective_scale).masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1) @ wide[2]


@pytest.mark.parametrize("changes", [{}, {"len_q": 1}, {"len_q": 3, "len_k": 400}])
def test_kernels_are_cut_by_the_session_s_tiling(
    generator: torch.Generator, compiled: list[tuple[int, int]], changes: dict[str, Any]
) -> None:
    request, opened = replace(PLAIN, **changes), session()
    opened.bind(request)(*drawn(request, generator))
    plan = opened.tiling.plan(request, {})
    assert isinstance(plan, TilePlan)
    assert plan.cut_by == "cuda"
    rows, keys = compiled[-1]
    assert keys == plan.block_k
    group = 2 if request.len_q < 16 else 1  # decoding steps take a group's heads as rows of one tile
    assert plan.block_q * group == rows
    plan.check("cuda")


@pytest.mark.parametrize("sizes", [(32, 64), (64, 32), (128, 128)])
def test_a_tiling_of_the_caller_is_followed(
    generator: torch.Generator, compiled: list[tuple[int, int]], sizes: tuple[int, int]
) -> None:
    request = replace(PLAIN, tiling=("mine", *sizes))
    given = drawn(request, generator)
    prepared = session().prepare_attention(*given, request=request, plan=TilePlan.equal(request, *sizes, cut_by="mine"))
    out = session().compute_attention(prepared).out
    assert set(compiled) == {sizes}
    want = wanted(request, *given)
    assert float((out.double() - want).norm() / want.norm()) <= 2e-6


def test_a_decoding_step_follows_a_tiling_of_the_caller(
    generator: torch.Generator, compiled: list[tuple[int, int]]
) -> None:
    request = replace(PLAIN, len_q=1, tiling=("mine", 32, 32))
    given, opened = drawn(request, generator), session()
    prepared = opened.prepare_attention(*given, request=request, plan=TilePlan.equal(request, 32, 32, cut_by="mine"))
    want = wanted(request, *given)
    assert float((opened.compute_attention(prepared).out.double() - want).norm() / want.norm()) <= 2e-6
    assert set(compiled) == {(32, 32)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"grads": frozenset("qkv")}, "the own tiling for gradients"),
        ({"dtype": "float64"}, "the cut of torch's operations for float64"),
    ],
)
def test_a_tiling_is_refused_where_torch_cuts(changes: dict[str, Any], sentence: str) -> None:
    request = replace(PLAIN, tiling=("mine", 32, 32), **changes)
    (refusal,) = InterpretedBackend().check(request, DEVICE)
    assert refusal.code == "tiling"
    assert sentence in str(refusal)


@pytest.mark.parametrize("sizes", [(16, 32), (32, 256), (0, 0)])
def test_a_tiling_of_other_sizes_is_refused_by_data(sizes: tuple[int, int]) -> None:
    (refusal,) = InterpretedBackend().capabilities(DEVICE).refusals(replace(PLAIN, tiling=("mine", *sizes)))
    assert refusal.code == "tiling"
    assert "tiles of 32, 64 or 128" in str(refusal)


@pytest.mark.parametrize(
    ("changes", "path", "cut_by"),
    [({"dtype": "float64"}, "composed", "torch"), ({}, "portable", "cuda")],
)
def test_a_plan_says_who_cuts(changes: dict[str, Any], path: str, cut_by: str) -> None:
    request, opened = replace(PLAIN, **changes), session()
    assert opened.path_of(request) == path
    plan = opened.tiling.plan(request, {})
    assert isinstance(plan, TilePlan)
    assert plan.cut_by == cut_by


def test_choices_begin_with_the_device_s_own_and_fit_its_memory() -> None:
    opened = session()
    first, *others = opened.tiling.choices(replace(PLAIN, dim_qk=256, dim_v=256), {})  # type: ignore[attr-defined]
    assert first is opened.tiling
    assert {size for each in others for size in (each.block_q, each.block_k)} <= set(FOREIGN_SIZES)
    assert (128, 128) not in {(each.block_q, each.block_k) for each in others}  # 384 KiB in float32
