"""A tiling that the caller brings cuts the work, is checked, is part of the decision, and is refused where it cannot
be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes import FakeBackend, FakeSession, full, plain

import hal_core as hal
from hal_core import BlockPlan, ContractError, DenseTiling, Range, TilePlan, UnsupportedError, merge_partials
from hal_core.testing import reference, relative_error


class TiledSession(FakeSession):
    """Computes tile by tile what a tile plan says, and merges: pairs outside the plan are not read."""

    def compute_attention(self, prepared: Any, mask: Any = None, **named: Any) -> hal.AttentionOutput:
        query, key, value, request, plan = prepared
        if isinstance(plan, BlockPlan) or plan is None:
            return super().compute_attention(prepared, mask, **named)
        self.backend.ran.append((self.device.id, request))
        seen = hal.dense_mask(request, query.shape[2], key.shape[2])
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool) if seen is None else seen
        outs, lses = [], []
        for q0, q1, spans in plan.rows():
            rows = query[:, :, q0:q1]
            parts = [reference(rows, key[:, :, a:b], value[:, :, a:b], seen[q0:q1, a:b][None, None]) for a, b in spans]
            if not parts:
                outs.append(query.new_zeros((*rows.shape[:3], value.shape[3])))
                lses.append(query.new_full(rows.shape[:3], -torch.inf))
                continue
            out, lse = merge_partials(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
            outs.append(out.to(query.dtype))
            lses.append(lse.to(query.dtype))
        return hal.AttentionOutput(torch.cat(outs, 2), torch.cat(lses, 2) if request.lse else None)

    def compute_attention_backward(self, prepared: Any, *given: Any, **named: Any) -> hal.Grads:
        query, key, value, request, plan = prepared
        assert isinstance(plan, TilePlan), "the backward is given the plan of the forward"
        return super().compute_attention_backward((query, key, value, request, None), *given, **named)


class Halves:
    """Uneven rows: the first third of the queries, then the rest, each over two key ranges."""

    needs_content = False

    def __init__(self, gap: int = 0, overlap: int = 0, lost_rows: int = 0) -> None:
        self.gap, self.overlap, self.lost_rows = gap, overlap, lost_rows
        self.name = f"halves({gap},{overlap},{lost_rows})"
        self.planned = 0

    def compute_optimal_tile_size(self, sequence_length: int, available_memory: int, backend_constraints: Any) -> int:
        return max(sequence_length // 2, 1)

    def split_into_tiles(self, tensor: torch.Tensor, tile_size: int) -> list[torch.Tensor]:
        return list(tensor.split(tile_size, 2))

    def plan(self, request: hal.AttentionRequest, limits: Any, *, query: Any = None, key: Any = None) -> TilePlan:
        self.planned += 1
        third, half = max(request.len_q // 3, 1), max(request.len_k // 2, 1)
        spans = ((0, half - self.gap), (half - self.overlap, request.len_k))
        rows = [(0, third, spans), (third, request.len_q - self.lost_rows, spans)]
        return TilePlan.uneven(request, rows, cut_by=self.name)


class Banded:
    """Reads content: a query block reads the key blocks of the largest key, and its own."""

    name, needs_content, block_q, block_k, max_blocks = "banded(4)", True, 4, 4, 2

    def plan(self, request: hal.AttentionRequest, limits: Any, *, query: Any = None, key: Any = None) -> BlockPlan:
        largest = key.norm(dim=-1).amax((0, 1)).argmax() // 4
        blocks = -(-query.shape[2] // 4)
        own = torch.arange(blocks).clamp(max=-(-key.shape[2] // 4) - 1)
        indices = torch.stack([largest.expand(blocks), own], -1).sort(-1).values
        counts = torch.where(indices[:, 0] == indices[:, 1], 1, 2)
        return BlockPlan(4, 4, indices[None, None].int(), counts[None, None].int())


@pytest.fixture
def tiled(fake: Any) -> FakeBackend:
    backend: FakeBackend = fake("tiled", capabilities=full(tile_sizes=Range(0, 64)), open=TiledSession)
    return backend


def draw(generator: torch.Generator, len_q: int = 20, len_k: int = 27) -> list[torch.Tensor]:
    return [torch.randn(2, 2, n, 8, generator=generator) for n in (len_q, len_k, len_k)]


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize(
    "tiling", [DenseTiling(4), DenseTiling(3, 5), DenseTiling(64, 1), Halves()], ids=lambda t: t.name
)
def test_a_brought_tiling_gives_the_same_attention(
    tiled: FakeBackend, generator: torch.Generator, tiling: Any, causal: str
) -> None:
    tensors = draw(generator)
    want = reference(*tensors, request=hal.testing.request_of(*tensors, causal=causal))
    out, lse = hal.attention(*tensors, backend="tiled", tiling=tiling, causal=causal, return_lse=True)
    assert relative_error(out, want.out) < 1e-5
    assert relative_error(lse, want.lse) < 1e-5
    assert tiled.ran[-1][1].tiling[0] == tiling.name
    with hal.use("tiled", tiling=tiling):
        assert torch.equal(hal.attention(*tensors, causal=causal), out)
    assert torch.equal(hal.bind(*tensors, backend="tiled", tiling=tiling, causal=causal)(*tensors), out)


def test_a_plan_is_made_once_for_each_exact_shape(tiled: FakeBackend, generator: torch.Generator) -> None:
    tiling, tensors = Halves(), draw(generator)
    for _ in range(3):
        hal.attention(*tensors, backend="tiled", tiling=tiling)
    made = tiling.planned
    for _ in range(3):
        hal.attention(*tensors, backend="tiled", tiling=tiling)
    assert tiling.planned == made
    hal.attention(*draw(generator, 19), backend="tiled", tiling=tiling)
    assert tiling.planned == made + 1


@pytest.mark.parametrize(
    ("tiling", "wrong"),
    [
        (Halves(gap=1), "leaves out the pair of query 5 and key 12"),
        (Halves(overlap=2), "reads the pair of query 0 and key 11 twice"),
        (Halves(lost_rows=1), "leaves out query 19 of 20"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_plan_that_does_not_cover_each_pair_once_is_refused_by_its_first_pair(
    tiled: FakeBackend, generator: torch.Generator, tiling: Any, wrong: str
) -> None:
    with pytest.raises(ContractError) as caught:
        hal.attention(*draw(generator), backend="tiled", tiling=tiling)
    assert wrong in str(caught.value)
    assert tiling.name in str(caught.value)
    assert not tiled.ran


def test_sizes_that_the_device_does_not_take_are_refused_by_name(fake: Any, generator: torch.Generator) -> None:
    backend = fake("fixed", capabilities=full(tile_sizes=hal.Choice({16, 32})), open=TiledSession)
    tensors = draw(generator)
    assert hal.attention(*tensors, backend="fixed", tiling=DenseTiling(16)).shape == tensors[0].shape
    for tiling in (DenseTiling(8), Halves()):
        with pytest.raises(UnsupportedError) as caught:
            hal.attention(*tensors, backend="fixed", tiling=tiling)
        assert "tiles of 16 or 32 offered" in str(caught.value)
        assert tiling.name in str(caught.value)
    fake("own", capabilities=plain())
    with pytest.raises(UnsupportedError, match="its own tiling alone offered"):
        hal.attention(*tensors, backend="own", tiling=DenseTiling(16))
    assert len(backend.ran) == 1


def test_a_tiling_that_reads_content_goes_the_way_of_a_block_plan(
    tiled: FakeBackend, generator: torch.Generator
) -> None:
    query, key, value = draw(generator, 20, 20)
    key[:, :, 13] *= 10
    plan = Banded().plan(hal.testing.request_of(query, key, value), {}, query=query, key=key)
    want = hal.attention(query, key, value, backend="tiled", block_plan=plan)
    assert torch.equal(hal.attention(query, key, value, backend="tiled", tiling=Banded()), want)
    key[:, :, 13] /= 10
    key[:, :, 2] *= 10
    assert not torch.equal(hal.attention(query, key, value, backend="tiled", tiling=Banded()), want)


def test_a_block_plan_of_the_call_wins_over_use_and_excludes_the_argument(
    tiled: FakeBackend, generator: torch.Generator
) -> None:
    tensors = draw(generator, 8, 8)
    plan = BlockPlan(4, 4, torch.tensor([[[[0], [1]]]], dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32))
    want = hal.attention(*tensors, backend="tiled", block_plan=plan)
    with hal.use("tiled", tiling=DenseTiling(4)):
        assert torch.equal(hal.attention(*tensors, block_plan=plan), want)
    with pytest.raises(ContractError, match="pass one of them"):
        hal.attention(*tensors, backend="tiled", block_plan=plan, tiling=DenseTiling(4))


def test_gradients_flow_through_a_brought_tiling(fake: Any, generator: torch.Generator) -> None:
    backend = fake("tiled", capabilities=full(tile_sizes=Range(0, 64)), open=TiledSession, autograd="explicit")
    tensors = [t.double().requires_grad_() for t in draw(generator)]
    hal.attention(*tensors, backend="tiled", tiling=Halves(), is_causal=True).square().sum().backward()
    got = [t.grad for t in tensors]
    again = [t.detach().requires_grad_() for t in tensors]
    torch.nn.functional.scaled_dot_product_attention(*again, is_causal=True).square().sum().backward()
    for grad, other in zip(got, again, strict=True):
        assert relative_error(grad, other.grad) < 1e-10
    assert backend.backwards


def test_explain_prints_the_plan_of_the_exact_lengths(tiled: FakeBackend, generator: torch.Generator) -> None:
    tensors = draw(generator)
    assert "tiles of 4 x 4 over 20 x 27" in str(hal.explain(*tensors, backend="tiled", tiling=DenseTiling(4)))
    assert "over 20 x 27" in hal.explain(*tensors, backend="tiled").plan
    assert "2 uneven row ranges" in hal.explain(*tensors, backend="tiled", tiling=Halves()).plan
    assert "at most 2 a row, by banded(4)" in hal.explain(*tensors, backend="tiled", tiling=Banded()).plan


def test_a_compiled_call_takes_a_tiling_as_argument_and_from_use(
    tiled: FakeBackend, generator: torch.Generator
) -> None:
    tensors, tiling = draw(generator), DenseTiling(5)

    def call(*given: torch.Tensor) -> Any:
        return hal.attention(*given, backend="tiled", tiling=tiling)

    want = call(*tensors)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(*tensors), want)
    assert tiled.ran[-1][1].tiling == ("dense(5x5)", 5, 5)
    torch._dynamo.reset()
    with hal.use("tiled", tiling=DenseTiling(6)):
        torch.compile(lambda *given: hal.attention(*given), backend="eager", fullgraph=True)(*tensors)
    assert tiled.ran[-1][1].tiling == ("dense(6x6)", 6, 6)


def test_a_large_plan_stores_no_tile() -> None:
    request = hal.AttentionRequest(1, 1, 1, 32768, 32768, 64, 64, "float32", causal=hal.Causal.TOP_LEFT)
    plan = DenseTiling(64).plan(request, {})
    assert plan.ranges is None
    first, second = (next(iter(plan.rows())) for _ in range(2))
    assert first == second == (0, 64, ((0, 64),))
    assert sum(1 for _ in plan.tiles()) == 512 * 513 // 2
