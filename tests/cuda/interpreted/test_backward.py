"""The portable Triton backward in Triton's interpreter, against gradients in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hal_cuda.kernels.portable import backward_launch
from hal_cuda.kernels.portable.backward_launch import PortableBackward, backward_memory
from hal_cuda.kernels.portable.dropout import dropout_pattern
from hal_cuda.kernels.portable.launch import PortablePath
from interpreted_device import CHIP, CONTEXT, context
from torch import Tensor
from triton.runtime.errors import OutOfResources

import hal_core as hal
from hal_core import BlockPlan, Grads, SequenceMetadata
from hal_core.testing import reference_gradients, relative_error
from hal_core.testing.reference import request_of

RNG = (5, 1 << 40)
SLOW = pytest.mark.slow


def gradients(
    generator: torch.Generator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    plan: BlockPlan | None = None,
    tables: SequenceMetadata | None = None,
    through_lse: bool = True,
    wanted: str = "qkvm",
    **options: Any,
) -> tuple[Grads, Grads]:
    """(found, wanted in float64) from the portable forward's own output, with a random gradient of it."""
    wants_mask = mask is not None and mask.dtype != torch.bool and "m" in wanted
    grads = frozenset({*wanted} & {*"qkv"}) | ({"mask"} if wants_mask else set())
    request = request_of(query, key, value, mask, plan=plan, tables=tables, grads=grads, **options)
    request = replace(request, lse=True)
    wide = mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
    out, lse = PortablePath(request, CONTEXT)(query, key, value, wide, plan, tables, RNG)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator) if through_lse else None
    backward = PortableBackward(request, CONTEXT)
    found = backward(query, key, value, out, lse, grad_out, mask, plan, tables, grad_lse=grad_lse, rng=RNG)
    keep = None
    if request.dropout:
        keep = dropout_pattern(CHIP, (*out.shape[:3], key.shape[2]), request.dropout, RNG, "cpu")  # type: ignore[arg-type]
    given = {"grad_out": grad_out, "grad_lse": grad_lse, "plan": plan, "tables": tables, "keep": keep}
    return found, reference_gradients(query, key, value, mask, request=request, **given)


def agree(pair: tuple[Grads, Grads], bound: float = 1e-5) -> None:
    for name, found, want in zip(Grads._fields, *pair, strict=True):
        assert (found is None) == (want is None), name
        if found is not None:
            assert relative_error(found, want) <= bound, name


def draw(
    generator: torch.Generator,
    len_q: int,
    len_k: int,
    dim: int = 24,
    dim_v: int = 0,
    heads: tuple[int, int] = (2, 1),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = ((batch, heads[0], len_q, dim), (batch, heads[1], len_k, dim), (batch, heads[1], len_k, dim_v or dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [
        (37, 53, {}),
        pytest.param(*(64, 64, {"causal": "top_left"}), marks=SLOW),
        (70, 33, {"causal": "bottom_right"}),
        (40, 90, {"causal": "bottom_right", "diagonal": -9, "window": (20, 0)}),
        pytest.param(*(33, 47, {"window": (7, 3), "diagonal": 2}), marks=SLOW),
        (70, 80, {"window": (None, 3)}),
        pytest.param(*(80, 70, {"window": (3, None)}), marks=SLOW),
        pytest.param(*(40, 64, {"softcap": 2.0}), marks=SLOW),
        (64, 40, {"softcap": 3.0, "causal": "top_left"}),
        (1, 70, {"causal": "bottom_right"}),
    ],
)
def test_gradients_agree_with_float64(
    generator: torch.Generator, len_q: int, len_k: int, options: dict[str, Any]
) -> None:
    agree(gradients(generator, *draw(generator, len_q, len_k), **options))


@pytest.mark.parametrize(
    ("dim", "dim_v", "heads"), [(40, 17, (2, 2)), (1, 5, (3, 1)), pytest.param(20, 33, (4, 1), marks=SLOW)]
)
def test_head_sizes_and_groups(generator: torch.Generator, dim: int, dim_v: int, heads: tuple[int, int]) -> None:
    agree(gradients(generator, *draw(generator, 33, 40, dim, dim_v, heads, 1), causal="top_left"))


@pytest.mark.parametrize("shape", [(2, 2, 20, 24), (1, 1, 20, 24), (2, 1, 1, 24), (1, 2, 20, 1), (1, 24), (1, 1, 1, 1)])
@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=SLOW), {"causal": "bottom_right", "window": (9, 0), "softcap": 3.0}], ids=str
)
def test_gradients_of_an_additive_mask_of_any_shape(
    generator: torch.Generator, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    mask = torch.randn(shape, generator=generator)
    if mask.numel() > 1:
        mask.view(-1)[::3] = -math.inf
    agree(gradients(generator, *draw(generator, 20, 24, batch=2), mask, **options))


def test_a_mask_is_read_and_its_gradient_written_in_its_own_dtype(generator: torch.Generator) -> None:
    mask = torch.randn(40, 35, generator=generator).half().mT
    found, want = gradients(generator, *draw(generator, 35, 40, dtype=torch.float16), mask)
    assert found.mask.dtype == torch.float16
    assert found.mask.stride() == mask.stride()
    agree((found, want), 2e-3)


@pytest.mark.parametrize(
    "shape", [(2, 1, 35, 40), pytest.param((1, 2, 1, 40), marks=SLOW), pytest.param((35, 1), marks=SLOW)]
)
def test_boolean_masks(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=generator) > 0.3
    if len(shape) == 4 and shape[2] > 1:
        mask[:, :, ::5] = False
    agree(gradients(generator, *draw(generator, 35, 40, batch=2), mask, causal="bottom_right"))


@pytest.mark.parametrize(
    "lowest", [torch.finfo(torch.float32).min, *(pytest.param(n, marks=SLOW) for n in (-65504.0, -1e9))]
)
def test_rows_wholly_at_a_masks_lowest_number_weigh_their_keys_alike(generator: torch.Generator, lowest: float) -> None:
    """The log-sum-exp does not hold the logarithm of how many keys there are: weights from it alone would be 1."""
    mask = torch.zeros(1, 1, 36, 40)
    mask[:, :, 3:20] = lowest
    mask[:, :, 25, ::2] = lowest
    operands = draw(generator, 36, 40, batch=1, heads=(2, 1))
    options: dict[str, Any] = {"through_lse": False, "scale": 2.0**-30}  # scores that no rounding at `lowest` changes
    found, want = gradients(generator, *operands, mask, **options)
    agree((found, want))
    assert float(want.value.norm()) > 0
    agree(gradients(generator, *operands, mask, causal="top_left", **options))


@pytest.mark.parametrize("options", [pytest.param({}, marks=SLOW), {"causal": "top_left"}], ids=str)
@pytest.mark.parametrize("with_mask", [pytest.param(False, marks=SLOW), True])
def test_dropout_repeats_the_forwards_pattern(
    generator: torch.Generator, options: dict[str, Any], with_mask: bool
) -> None:
    mask = torch.randn(1, 2, 20, 16, generator=generator) if with_mask else None
    agree(gradients(generator, *draw(generator, 20, 16), mask, dropout_p=0.3, **options))


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        ((48, 24), {}),
        ((32, 32), {"mask": True}),
        pytest.param((48, 24), {"mask": True}, marks=SLOW),
        pytest.param((16, 16), {"causal": "top_left"}, marks=SLOW),
        pytest.param((7, 5), {}, marks=SLOW),
        pytest.param((7, 5), {"mask": True, "causal": "top_left"}, marks=SLOW),
    ],
)
def test_block_plans(generator: torch.Generator, blocks: tuple[int, int], options: dict[str, Any]) -> None:
    """Lists in any order, with blocks named twice, and blocks that nobody names."""
    options = dict(options)
    rows, columns = -(-64 // blocks[0]), -(-64 // blocks[1])
    most = min(columns, 5)
    indices = torch.randint(0, columns, (1, 2, rows, most), generator=generator, dtype=torch.int32)
    counts = torch.randint(0, most + 1, (1, 1, rows), generator=generator, dtype=torch.int32).expand(1, 2, rows)
    plan = BlockPlan(*blocks, indices, counts)
    mask = torch.randn(1, 1, 64, 64, generator=generator) if options.pop("mask", False) else None
    agree(gradients(generator, *draw(generator, 64, 64), mask, plan=plan, **options))


@pytest.mark.parametrize(
    "options",
    [{"causal": "bottom_right", "window": (9, 0)}, *(pytest.param(o, marks=SLOW) for o in ({}, {"softcap": 3.0}))],
    ids=str,
)
def test_packed_sequences(generator: torch.Generator, options: dict[str, Any]) -> None:
    """Sequences without queries, without keys, and with fewer keys than queries."""
    ends_q, ends_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in ([20, 0, 33, 5, 7], [11, 9, 40, 0, 20]))
    operands = draw(generator, 65, 80, batch=1)
    agree(gradients(generator, *operands, tables=SequenceMetadata(ends_q, ends_k), **options))


def test_packed_block_plans_of_a_spread_table(generator: torch.Generator) -> None:
    ends = torch.tensor([0, -1, 40, -1, 70, -1], dtype=torch.int32)[::2]
    indices = torch.tensor([[[[0, 1], [1, 2], [2, 0]]], [[[1, 0], [0, 1], [0, 0]]]], dtype=torch.int32)
    plan = BlockPlan(16, 16, indices, torch.full((2, 1, 3), 2, dtype=torch.int32))
    operands = draw(generator, 70, 70, batch=1)
    agree(gradients(generator, *operands, plan=plan, tables=SequenceMetadata(ends, ends), causal="bottom_right"))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_16_bit_operands(generator: torch.Generator, dtype: torch.dtype, bound: float) -> None:
    """The interpreter cuts bfloat16 where a GPU rounds: twice the device's bound."""
    agree(gradients(generator, *draw(generator, 40, 64, dtype=dtype), causal="top_left"), bound)


def test_strides_are_taken_as_they_are(generator: torch.Generator) -> None:
    wide = torch.randn(2, 31, 3, 2 * 24 + 5, generator=generator)
    operands = [wide[..., i : i + 48 : 2].transpose(1, 2) for i in (0, 1, 3)]
    agree(gradients(generator, *operands))


@pytest.mark.parametrize("last", ["dim", "length"])
def test_gradients_are_laid_out_as_dense_operands(generator: torch.Generator, last: str) -> None:
    operands = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(generator, 20, 30)]
    if last == "length":
        operands = [t.mT.contiguous().mT for t in operands]
    found, want = gradients(generator, *operands)
    agree((found, want))
    for grad, operand in zip(found, operands, strict=False):
        assert grad.stride() == operand.stride()


@pytest.mark.parametrize("grads", ["q", "k", "v", "qv", "m"])
def test_only_what_is_wanted_is_computed(generator: torch.Generator, grads: str) -> None:
    mask = torch.randn(1, 1, 1, 30, generator=generator)
    agree(gradients(generator, *draw(generator, 20, 30), mask, wanted=grads))


def test_a_gradient_of_zeros_that_are_expanded(generator: torch.Generator) -> None:
    query, key, value = draw(generator, 20, 30)
    request = replace(request_of(query, key, value, grads=frozenset("qkv")), lse=True)
    out, lse = PortablePath(request, CONTEXT)(query, key, value)
    backward = PortableBackward(request, CONTEXT)
    zero = torch.zeros(()).expand(out.shape)
    found = backward(query, key, value, out, lse, zero, grad_lse=torch.zeros(()).expand(lse.shape))
    assert not any(bool(grad.any()) for grad in found[:3])
    ones = torch.ones(()).expand(out.shape)
    agree((backward(query, key, value, out, lse, ones), reference_gradients(query, key, value, grad_out=ones)))


def test_a_fully_masked_row_has_no_gradient_whatever_flows_into_its_lse(generator: torch.Generator) -> None:
    query, key, value = draw(generator, 20, 30)
    mask = torch.ones(20, 30, dtype=torch.bool)
    mask[4:9] = False
    request = replace(request_of(query, key, value, mask, grads=frozenset("qkv")), lse=True)
    out, lse = PortablePath(request, CONTEXT)(query, key, value, mask[None, None])
    grad_lse = torch.where(torch.isneginf(lse), math.nan, 1.0)
    found = PortableBackward(request, CONTEXT)(query, key, value, out, lse, out, mask, grad_lse=grad_lse)
    assert all(bool(torch.isfinite(grad).all()) for grad in found[:3])
    assert not bool(found.query[:, :, 4:9].any())


@pytest.mark.parametrize(("len_q", "len_k"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_read_gives_zeros(len_q: int, len_k: int) -> None:
    shapes = ((1, 2, len_q, 8), (1, 2, len_k, 8), (1, 2, len_k, 8), (1, 1, 1, len_k))
    query, key, value, mask = (torch.ones(shape) for shape in shapes)
    request = replace(request_of(query, key, value, mask, grads=frozenset({"q", "k", "v", "mask"})), lse=True)
    out, lse = torch.zeros(1, 2, len_q, 8), torch.full((1, 2, len_q), -math.inf)
    for grad, given in zip(
        PortableBackward(request, CONTEXT)(query, key, value, out, lse, out, mask),
        (query, key, value, mask),
        strict=True,
    ):
        assert grad.shape == given.shape
        assert not bool(grad.any())


def surrounded(generator: torch.Generator, heads: int, tokens: int, *dim: int) -> Tensor:
    """[1, heads, tokens, dim] of numbers, with NaN before, behind and between."""
    whole = torch.full((heads + 2, tokens + 400, *dim), math.nan)
    whole[1 : heads + 1, 200 : 200 + tokens] = torch.randn(heads, tokens, *dim, generator=generator)
    return whole[None, 1 : heads + 1, 200 : 200 + tokens]


@pytest.mark.parametrize("packed", [False, True])
def test_what_lies_around_the_tensors_is_neither_read_nor_written(
    generator: torch.Generator, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, out, grad_out = (surrounded(generator, 4, 37, 17) for _ in range(3))
    key, value = (surrounded(generator, 2, 41, 17) for _ in range(2))
    lse, grad_lse = (surrounded(generator, 4, 37) for _ in range(2))
    mask = None if packed else surrounded(generator, 1, 37, 41)
    ends = [torch.tensor(n, dtype=torch.int32) for n in ([0, 20, 37], [0, 30, 41])]
    tables = SequenceMetadata(*ends) if packed else None
    grads = frozenset({"q", "k", "v"} | ({"mask"} if mask is not None else set()))
    request = replace(request_of(query, key, value, mask, tables=tables, grads=grads), lse=True)
    rooms: list[Tensor] = []

    def in_a_room(like: Tensor) -> Tensor:
        heads, tokens = like.shape[1:3]
        rooms.append(torch.full((heads + 2, tokens + 400, like.shape[3]), 7.0))
        return rooms[-1][None, 1 : heads + 1, 200 : 200 + tokens]

    monkeypatch.setattr(torch, "empty_like", in_a_room)
    given = (query, key, value, out, lse, grad_out, mask, None, tables)
    found = PortableBackward(request, CONTEXT)(*given, grad_lse=grad_lse)
    for grad, room in zip([grad for grad in found if grad is not None], rooms, strict=True):
        assert bool(torch.isfinite(grad).all())
        assert bool((room[0] == 7.0).all() and (room[-1] == 7.0).all())
        assert bool((room[:, :200] == 7.0).all() and (room[:, -200:] == 7.0).all())


def test_runs_repeat_bit_by_bit(generator: torch.Generator) -> None:
    query, key, value = draw(generator, 20, 40)
    mask = torch.randn(1, 1, 1, 40, generator=generator)
    request = replace(request_of(query, key, value, mask, grads=frozenset({"q", "k", "v", "mask"})), lse=True)
    out, lse = PortablePath(request, CONTEXT)(query, key, value, mask)
    backward = PortableBackward(request, CONTEXT)
    first, second = (backward(query, key, value, out, lse, out, mask) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert len(backward._launches) == 1


def test_dropout_without_the_forwards_words_is_refused(generator: torch.Generator) -> None:
    query, key, value = draw(generator, 4, 5)
    request = replace(request_of(query, key, value, grads=frozenset("qkv"), dropout_p=0.5), lse=True)
    with pytest.raises(hal.ContractError, match="rng"):
        PortableBackward(request, CONTEXT)(query, key, value, query, query[..., 0], query)


@pytest.mark.parametrize("shape", [None, (1, 4, 40, 64)])
@pytest.mark.parametrize("planned", [False, True])
def test_memory_is_what_was_announced(
    generator: torch.Generator, shape: tuple[int, ...] | None, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is borrowed is held to the call's end."""
    query, key, value = draw(generator, 40, 64, heads=(4, 2), batch=2)
    mask = None if shape is None else torch.randn(shape, generator=generator)
    plan = None
    if planned:
        indices = torch.randint(0, 4, (2, 4, 3, 2), generator=generator, dtype=torch.int32)
        plan = BlockPlan(16, 16, indices, torch.full((2, 4, 3), 2, dtype=torch.int32))
    grads = frozenset({"q", "k", "v"} | ({"mask"} if mask is not None else set()))
    request = replace(request_of(query, key, value, mask, plan=plan, grads=grads), lse=True)
    own, borrowed = context(), []
    monkeypatch.setattr(backward_launch, "launcher", lambda *_, **__: lambda *_: None)
    allocate = own.memory.allocate
    monkeypatch.setattr(own.memory, "allocate", lambda *given: borrowed.append(allocate(*given)) or borrowed[-1])
    found = PortableBackward(request, own)(query, key, value, query, query[..., 0], query, mask, plan)
    results = sum(grad.numel() * grad.element_size() for grad in found if grad is not None)
    assert own.memory.stats().in_use == 0
    assert results + sum(buffer.nbytes for buffer in borrowed) == backward_memory(request)


def test_tiles_shrink_until_shared_memory_holds_them(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel on its own; a device that holds none is named."""
    compiled = backward_launch.launcher
    seen: list[tuple[str, int]] = []

    def small(chip: Any, kernel: Any, signature: Any, constants: Any, divisible: Any, **options: Any) -> Any:
        area = constants.get("BN", 0) * constants["BM"]
        seen.append((kernel.__name__, area))
        if kernel.__name__ == "grad_kv" and area > most:
            raise OutOfResources(area, most, "shared memory")
        return compiled(chip, kernel, signature, constants, divisible, **options)

    monkeypatch.setattr(backward_launch, "launcher", small)
    query, key, value = draw(generator, 40, 64)
    request = replace(request_of(query, key, value, grads=frozenset("qkv")), lse=True)
    out, lse = PortablePath(request, CONTEXT)(query, key, value)
    given = (query, key, value, out, lse, out)
    most, own = 256, context()
    agree((PortableBackward(request, own)(*given), reference_gradients(query, key, value, grad_out=out)))
    areas = [area for name, area in seen if name == "grad_kv"]
    assert areas[-1] == 256 < areas[0]
    assert len([name for name, _ in seen if name == "grad_q"]) == 1
    most = 0
    with pytest.raises(hal.DeviceUnavailableError, match="no backward tile"):
        PortableBackward(request, context())(*given)
