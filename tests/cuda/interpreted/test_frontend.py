"""PyTorch's attention operators on own kernels: on the host, by Triton's interpreter, under the CPU's dispatch key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hal_cuda.frontend.activation import Replacements
from hal_cuda.frontend.operators import Operators, _plain
from hal_cuda.frontend.routing import Router
from hal_cuda.frontend.statistics import Counts
from interpreted_device import InterpretedBackend
from torch import Tensor

import hal_core as hal

FLASH, CUDNN = "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"
EFFICIENT, PACKED = "_scaled_dot_product_efficient_attention", "_flash_attention_forward"
HOST = "_scaled_dot_product_flash_attention_for_cpu"


class HostOperators(Operators):
    """And the operator that PyTorch's attention calls on host tensors."""

    def table(self) -> dict[str, Any]:
        return super().table() | {HOST: self.host, f"{HOST}_backward": self.host_backward}

    def host(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        grads = frozenset("qkv" if query.requires_grad else "")
        result = self._forward(_plain(HOST, "flash", dropout_p, is_causal, scale, grads), query, key, value, attn_mask)
        return None if result is None else tuple(result)

    def host_backward(
        self,
        grad_out: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        if grad_out is None:
            return None, None, None
        call = _plain(f"{HOST}_backward", "flash", dropout_p, is_causal, scale, frozenset("qkv"), backward=True)
        grads = self._backward(call, query, key, value, out, logsumexp.contiguous(), grad_out, attn_mask)
        return None if grads is None else tuple(grads[:3])


@pytest.fixture
def counts() -> Iterator[Counts]:
    """Own kernels behind the operators of host tensors."""
    hal.register(InterpretedBackend(), name="interpreted")
    counted = Counts()
    replaced = Replacements("CPU", HostOperators(Router(lambda tensor: "interpreted:0", False), counted).table())
    yield counted
    replaced.remove()
    hal.unregister("interpreted")


def drawn(generator: torch.Generator, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=generator).requires_grad_(grad)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    q, k, v = (t.double() for t in (query, key, value))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * options.get("scale", q.shape[3] ** -0.5)
    if options.get("is_causal"):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return torch.softmax(scores if mask is None else scores + mask, -1).nan_to_num(0.0) @ v


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).detach().norm() / want.detach().norm())


def test_an_unmodified_call_runs_on_own_kernels(counts: Counts, generator: torch.Generator) -> None:
    query, key, value = (drawn(generator, 2, 2, 33, 16, grad=True) for _ in range(3))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    want = exact(query, key, value, is_causal=True)
    assert error(out, want) <= 2e-6
    grad = drawn(generator, *out.shape)
    got = torch.autograd.grad(out, (query, key, value), grad)
    for one, two in zip(got, torch.autograd.grad(want, (query, key, value), grad.double()), strict=True):
        assert error(one, two.double()) <= 2e-5
    assert counts.read().own == {HOST: 1, f"{HOST}_backward": 1}
    assert counts.read().original == {}


def test_a_compiled_call_runs_on_own_kernels_in_one_graph(counts: Counts, generator: torch.Generator) -> None:
    query = drawn(generator, 1, 2, 20, 16, grad=True)

    def attend(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query * 2, query, query, is_causal=True).sin()

    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(query)
    assert error(out, exact(query * 2, query, query, is_causal=True).sin()) <= 2e-6
    out.sum().backward()
    assert counts.read().own == {HOST: 1, f"{HOST}_backward": 1}


def test_autocast_reaches_own_kernels_in_the_lower_type(counts: Counts, generator: torch.Generator) -> None:
    query = drawn(generator, 1, 2, 20, 16)
    with torch.autocast("cpu", dtype=torch.float16):
        out = F.scaled_dot_product_attention(query, query, query)
    assert out.dtype == torch.float16
    assert counts.read().own == {HOST: 1}


@pytest.mark.parametrize("case", ["dropout", "dtype"])
def test_what_own_kernels_do_not_take_goes_to_the_original(
    counts: Counts, generator: torch.Generator, case: str
) -> None:
    query = drawn(generator, 1, 2, 20, 16)
    if case == "dropout":
        F.scaled_dot_product_attention(query, query, query, dropout_p=0.999999)
    else:
        out = F.scaled_dot_product_attention(query.double(), query.double(), query.double())
        assert torch.allclose(out, exact(query, query, query))
    found = counts.read()
    assert found.own == {}
    assert sum(found.original.values()) == sum(found.reasons.values())
    assert any(case in reason for reason in found.reasons) or case == "dropout"


@pytest.mark.parametrize(
    ("operator", "causal", "layout"),
    [
        pytest.param(*case, marks=() if place % 7 == 0 else pytest.mark.slow)
        for place, case in enumerate(
            product((FLASH, CUDNN, EFFICIENT), (False, True), ("heads first", "heads last", "strided"))
        )
    ],
)
def test_operators_give_what_their_fake_kernels_promise(
    counts: Counts, generator: torch.Generator, operator: str, causal: bool, layout: str
) -> None:
    """Shapes, dtypes and strides; values against float64, and gradients through PyTorch's own formula."""
    made = [drawn(generator, 2, 19, 3, 4, 16).half() for _ in range(3)]
    parts = {"heads first": lambda t: t[:, :, 0].transpose(1, 2).contiguous(), "strided": lambda t: t[:, :, 1].mT.mT}
    pick = parts.get(layout, lambda t: t[:, :, 0].contiguous())
    query, key, value = (pick(t) for t in made)
    if layout != "heads first":
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    query, key, value = (t.detach().requires_grad_() for t in (query, key, value))
    extra = () if operator == FLASH else (None, True)
    call = getattr(torch.ops.aten, operator)
    given = (query, key, value, *extra, 0.0, causal)
    result = call(*given, scale=0.3)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        promised = call(*given, scale=0.3)
    for got, fake in zip(result, promised, strict=True):
        if isinstance(fake, Tensor) and fake.numel():
            assert (got.shape, got.dtype) == (fake.shape, fake.dtype)
            assert got.stride() == fake.stride()
    want = exact(query, key, value, is_causal=causal, scale=0.3)
    assert error(result[0], want) <= 1e-3
    grad = drawn(generator, *want.shape)
    got = torch.autograd.grad(result[0], (query, key, value), grad.half())
    for one, two in zip(got, torch.autograd.grad(want, (query, key, value), grad.double()), strict=True):
        assert error(one, two.double()) <= 2e-3
    assert counts.read().own == {operator: 1, f"{operator}_backward": 1}


def test_a_bias_and_its_gradient(counts: Counts, generator: torch.Generator) -> None:
    """Rows that the bias hides whole give 0, and gradients of 0."""
    query, key, value = (drawn(generator, 2, 2, 20, 16, grad=True) for _ in range(3))
    known = drawn(generator, 1, 2, 20, 20)
    rows = torch.ones(20, 1, dtype=torch.float64)
    rows[3] = 0
    bias = known.masked_fill(rows == 0, -math.inf).requires_grad_()
    wide = bias.expand(2, 2, 20, 20)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, wide, True)
    assert lse.shape == (2, 2, 32)
    known.requires_grad_()
    want = exact(query, key, value, known.double().expand(2, 2, 20, 20)) * rows
    assert error(out, want) <= 2e-6
    grad = drawn(generator, *out.shape)
    got = torch.autograd.grad(out, (query, key, value, bias), grad)
    reference = torch.autograd.grad(want, (query, key, value, known), grad.double())
    for one, two in zip(got, reference, strict=True):
        assert error(one, two.double()) <= 2e-5
    assert counts.read().own == {EFFICIENT: 1, f"{EFFICIENT}_backward": 1}


@pytest.mark.parametrize(
    "window", [(-1, 0), *(pytest.param(each, marks=pytest.mark.slow) for each in ((-1, -1), (5, 0), (3, 2)))]
)
def test_packed_sequences(counts: Counts, generator: torch.Generator, window: tuple[int, int]) -> None:
    ends = torch.tensor([0, 7, 7, 30], dtype=torch.int32)
    query, key, value = (drawn(generator, 30, 2, 16, grad=True) for _ in range(3))
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, 23, 23, 0.0, window == (-1, 0), False, scale=0.3, **sides
    )
    assert lse.shape == (2, 30)
    row = torch.arange(30)
    sequence = torch.bucketize(row, ends[1:].long(), right=True)
    seen = sequence[:, None] == sequence
    apart = row[None] - row[:, None]
    for side, low in ((window[0], True), (window[1], False)):
        if side >= 0:
            seen &= (apart >= -side) if low else (apart <= side)
    bias = torch.zeros(30, 30, dtype=torch.float64).masked_fill(~seen, -math.inf)
    want = exact(*(t.transpose(0, 1)[None] for t in (query, key, value)), bias, scale=0.3)[0].transpose(0, 1)
    assert error(out, want) <= 2e-6
    grad = drawn(generator, *out.shape)
    got = torch.autograd.grad(out, (query, key, value), grad)
    for one, two in zip(got, torch.autograd.grad(want, (query, key, value), grad.double()), strict=True):
        assert error(one, two.double()) <= 2e-5
    assert counts.read().own == {PACKED: 1, "_flash_attention_backward": 1}


def test_what_neither_takes_is_refused_by_name(counts: Counts, generator: torch.Generator) -> None:
    query = drawn(generator, 1, 2, 20, 16)
    with pytest.raises(hal.UnsupportedError, match="PyTorch has no kernel"):
        torch.ops.aten._scaled_dot_product_flash_attention(query, query, query, 0.5)


def test_a_gradient_where_no_log_sum_exp_was_kept(counts: Counts, generator: torch.Generator) -> None:
    query = drawn(generator, 1, 2, 20, 16, grad=True)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(query, query, query, None, False)[0]
    with pytest.raises(hal.ContractError, match="compute_log_sumexp=True"):
        out.sum().backward()
    session = hal.session("interpreted:0")
    request = hal.explain(query, query, query, backend="interpreted").request
    prepared = session.prepare_attention(query.detach(), query.detach(), query.detach(), request=request)
    for lse in (None, torch.zeros(1, 2, 7)):
        with pytest.raises(hal.ContractError, match=r"and (none|one of shape \(1, 2, 7\)) was given: .*return_lse"):
            session.compute_attention_backward(prepared, out.detach(), lse, out.detach())


def test_gradcheck_and_opcheck(counts: Counts, generator: torch.Generator) -> None:
    """Of PyTorch's own function, and of the operators behind it."""
    tensors = [drawn(generator, 1, 2, 5, 8, grad=True) for _ in range(3)]

    def attend(*given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*given, is_causal=True)

    assert torch.autograd.gradcheck(attend, tensors, eps=1e-2, atol=2e-3, rtol=1e-2, fast_mode=True)
    query, key, value = (t.detach() for t in tensors)
    checks = ("test_schema", "test_faketensor")
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    rows = [t[0].transpose(0, 1).contiguous() for t in (query, key, value)]
    calls: dict[str, tuple[Any, ...]] = {
        FLASH: (query, key, value, 0.0, True),
        CUDNN: (query, key, value, None, True, 0.0, True),
        EFFICIENT: (query, key, value, None, True, 0.0, True),
        PACKED: (*rows, ends, ends, 3, 3, 0.0, True, False),
    }
    for name, given in calls.items():
        torch.library.opcheck(getattr(torch.ops.aten, name).default, given, test_utils=checks)
    assert set(counts.read().own) >= calls.keys() | {HOST, f"{HOST}_backward"}
    assert counts.read().original == {}


def test_lengths_of_one_bucket_share_a_route(counts: Counts, generator: torch.Generator) -> None:
    """Each with its own result; tensors that do not match are not covered by a route of others that do."""
    router = Router(lambda tensor: "interpreted:0", True)
    operators = HostOperators(router, counts)
    for length in (17, 30, 32):
        query, key, value = (drawn(generator, 1, 2, length, 16) for _ in range(3))
        out, _ = operators.host(query, key, value, 0.0, True)
        assert error(out, exact(query, key, value, is_causal=True)) <= 2e-6
    assert len(router._routes) == 1
    long = drawn(generator, 1, 2, 31, 16)
    assert operators.host(query, key, long, 0.0, True) is None
    assert operators.host(query, key, value, 0.0, False, attn_mask=torch.zeros(1, 1, 32, 31)) is None
    assert operators.host(query[:, :, :0], key, value) is None
    assert set(counts.read().reasons) == {"shapes that do not match", "empty tensors"}
