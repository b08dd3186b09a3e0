"""Gradients by the compiled kernels against float64, on every instruction set and as the device's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
native = pytest.importorskip("hal_cpu_native", reason="hal-cpu-native is not built here: make native")

from hal_cpu import paths  # noqa: E402
from torch import Tensor  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SETS = native.instruction_sets() or ("avx2",)
CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"band": (None, 0)},
    "causal, bottom right": {"band": (None, 63)},
    "window": {"band": (-40, 20)},
    "softcap": {"softcap": 3.0},
    "boolean mask": {"mask": "boolean"},
    "additive mask": {"mask": "additive", "band": (None, 63)},
    "gradient of the log-sum-exp": {"grad_lse": True},
    "all at once": {"mask": "boolean", "band": (-70, 63), "softcap": 3.0, "grad_lse": True},
}


@pytest.fixture
def always() -> Iterator[None]:
    """Compiled kernels serve all that they can."""
    with paths.offering("always"):
        yield


def exact(
    operands: tuple[Tensor, ...],
    grad_out: Tensor,
    mask: Tensor | None,
    grad_lse: Tensor | None,
    band: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
) -> tuple[Tensor, ...]:
    """Gradients in float64. Rows without a key have none."""
    leaves = [t.double().requires_grad_() for t in operands]
    group = leaves[0].shape[1] // leaves[1].shape[1]
    query, key, value = leaves[0], *(t.repeat_interleave(group, 1) for t in leaves[1:])
    scores = query @ key.transpose(-1, -2) * query.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(key.shape[2])[None] - torch.arange(query.shape[2])[:, None]
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if band[0] is not None:
        seen &= distance >= band[0]
    if band[1] is not None:
        seen &= distance <= band[1]
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask
    elif mask is not None:
        seen &= mask > -math.inf
        scores = scores + mask.double().clamp_min(-1e9)
    read = seen.any(-1)
    scores = scores.masked_fill(~seen, -1e9)
    weights = scores.softmax(-1) * read[..., None]
    total = (weights @ value * grad_out.double()).sum()
    if grad_lse is not None:
        total = total + (scores.logsumexp(-1) * grad_lse.double())[read].sum()
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_agree_with_float64(name: str, dtype: Any, isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    options = dict(CALLS[name])
    kind, with_lse = options.pop("mask", None), options.pop("grad_lse", False)
    for heads_kv, group, len_q, len_k, dim, dim_v in (
        (2, 2, 130, 193, 40, 64),
        (1, 4, 37, 100, 96, 24),
        (3, 1, 3, 700, 8, 8),
    ):
        heads = heads_kv * group
        query = torch.randn(2, len_q, heads, dim).to(dtype).transpose(1, 2)
        key, value = (torch.randn(2, heads_kv, len_k, size + 8).to(dtype)[..., :size] for size in (dim, dim_v))
        mask = None if kind is None else torch.rand(1, heads, len_q, len_k) < 0.4
        if mask is not None:
            mask[:, :, 0] = False
        if kind == "additive" and mask is not None:
            mask = torch.randn(mask.shape).masked_fill(~mask, -math.inf).to(dtype)
        grad_out = torch.randn(2, heads, len_q, dim_v).to(dtype)
        grad_lse = torch.randn(2, heads, len_q) if with_lse else None
        lse = torch.empty(2, heads, len_q)
        out = native.attention(query, key, value, mask, lse=lse, isa=isa, **options)
        found = native.attention_backward(
            query, key, value, out, lse, grad_out, mask, grad_lse=grad_lse, isa=isa, threads=2, **options
        )
        wanted = exact((query, key, value), grad_out, mask, grad_lse, **options)
        for mine, want in zip(found, wanted, strict=True):
            assert relative_error(mine, want) <= BOUNDS[dtype]


@pytest.mark.parametrize("isa", SETS)
def test_equal_calls_give_equal_bits_for_any_number_of_threads(isa: str, seed: int) -> None:
    """One head, whose keys are divided between tasks."""
    torch.manual_seed(seed)
    query, key, value, grad_out = torch.randn(4, 1, 1, 1100, 32).unbind()
    lse = torch.empty(1, 1, 1100)
    out = native.attention(query, key, value, lse=lse, isa=isa)
    first, *others = (
        native.attention_backward(query, key, value, out, lse, grad_out, isa=isa, threads=n) for n in (1, 2, 3, 8)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("isa", SETS)
def test_the_workspace_is_as_large_as_stated(isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value, grad_out = torch.randn(4, 1, 2, 300, 40).unbind()
    lse = torch.empty(1, 2, 300)
    out = native.attention(query, key, value, lse=lse, isa=isa)
    needed = native.workspace_bytes((1, 2, 2, 300, 300, 40, 40), "float32", 2, isa=isa, backward=True)
    room = torch.full((needed + 4096,), 77, dtype=torch.uint8)
    native.attention_backward(query, key, value, out, lse, grad_out, workspace=room[:needed], threads=2, isa=isa)
    assert bool((room[needed:] == 77).all())
    with pytest.raises(native.NativeRefusal, match="smaller than"):
        native.attention_backward(query, key, value, out, lse, grad_out, workspace=room[: needed - 64], threads=2)


def test_what_has_no_backward_is_refused_by_name() -> None:
    query, key = torch.randn(1, 2, 64, 32), torch.randn(1, 1, 64, 32)
    lse, plan = torch.zeros(1, 2, 64), torch.ones(1, 2, 2, 2, dtype=torch.bool)
    with pytest.raises(native.NativeRefusal, match="block plan"):
        native.attention_backward(query, key, key, query, lse, query, blocks=plan, block_size=(32, 32))
    empty = torch.randn(1, 1, 0, 32)
    with pytest.raises(native.NativeRefusal, match="size"):
        native.attention_backward(query, empty, empty, query, lse, query)
    with pytest.raises(native.NativeRefusal, match="dtype"):
        native.attention_backward(query, key, key, query, lse, query.bfloat16())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 5)}, {"softcap": 3.0}], ids=str)
def test_the_device_trains_by_the_compiled_kernels(options: dict[str, Any], dtype: Any, seed: int) -> None:
    torch.manual_seed(seed)
    leaves = [torch.randn(2, heads, 90, 32).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    out = hal.attention(*leaves, enable_gqa=True, backend="cpu", **options)
    assert "Explicit" in type(out.grad_fn).__name__, "another path than the one this test is of"
    found = torch.autograd.grad(out.sum(), leaves)  # a gradient that is broadcast
    band = {"is_causal": (None, 0), "window": (-20, 5)}.get(next(iter(options), ""), (None, None))
    wanted = exact(
        tuple(t.detach() for t in leaves),
        torch.ones(out.shape),
        None,
        None,
        band=band,
        softcap=options.get("softcap"),
    )
    for mine, want in zip(found, wanted, strict=True):
        assert relative_error(mine, want) <= BOUNDS[dtype]
