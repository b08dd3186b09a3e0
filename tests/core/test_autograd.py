"""Gradients: those of float64, through every kind of session; what cannot be right is refused."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import FakeBackend, draw, kept
from test_attention import CALLS

import hal_core as hal
from hal_core import UnsupportedError
from hal_core.testing import reference_gradients, relative_error, request_of

Fake = Callable[..., FakeBackend]
DOUBLE = torch.float64


@pytest.fixture(params=["native", "bound", "explicit", "cpu"])
def device(request: pytest.FixtureRequest, fake: Fake) -> str:
    kind: str = request.param
    if kind == "cpu":
        return str(request.getfixturevalue("cpu"))
    fake(kind, bound=kind == "bound", autograd="explicit" if kind == "explicit" else "native")
    return f"{kind}:0"


@pytest.fixture
def explicit(fake: Fake) -> FakeBackend:
    return fake("explicit", autograd="explicit")


def like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_float64(device: str, generator: torch.Generator, name: str, lse: bool) -> None:
    shape, make = CALLS[name]
    tensors, options = draw(generator, **shape, dtype=DOUBLE, grad=True), make(generator)
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double().requires_grad_()
    leaves = [*tensors, *([mask] if mask is not None and mask.requires_grad else [])]
    result = hal.attention(*tensors, mask, **options, return_lse=lse, backend=device)
    out = result.out if lse else result
    flowing = [like(out, generator)] + ([like(result.lse, generator)] if lse else [])
    got = torch.autograd.grad([out, *([result.lse] if lse else [])], leaves, flowing, allow_unused=True)
    given = {key: value for key, value in options.items() if key not in ("block_plan", "enable_gqa")}
    want = reference_gradients(
        *tensors,
        mask,
        grad_out=flowing[0],
        grad_lse=flowing[1] if lse else None,
        plan=options.get("block_plan"),
        **given,
    )
    for gradient, wanted in zip(got, want, strict=False):
        assert gradient is not None
        assert gradient.isfinite().all()
        small = wanted.norm() <= 1e-12 * flowing[0].norm()  # every row reads one key: the gradient cancels to 0
        assert small or relative_error(gradient, wanted) <= 1e-10


@pytest.mark.parametrize(
    "options", [{"softcap": 1.5}, {"is_causal": True, "window": (2, 0)}, {"causal": "bottom_right"}]
)
def test_gradients_pass_torch_s_own_check(
    explicit: FakeBackend, generator: torch.Generator, options: dict[str, Any]
) -> None:
    tensors = draw(generator, 1, 2, 4, 3, 3, dtype=DOUBLE, grad=True)
    assert torch.autograd.gradcheck(lambda *given: hal.attention(*given, backend="explicit", **options), tensors)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "m", "qk", "vm", "qkvm"])
def test_only_the_gradients_that_are_needed_are_asked_for(
    explicit: FakeBackend, generator: torch.Generator, wanted: str
) -> None:
    tensors = dict(
        zip("qkvm", (*draw(generator, dtype=DOUBLE), torch.randn(7, 7, generator=generator, dtype=DOUBLE)), strict=True)
    )
    for name in wanted:
        tensors[name].requires_grad_()
    out = hal.attention(*tensors.values(), backend="explicit")
    out.sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(wanted)
    assert explicit.ran[0][1].grads == {"mask" if name == "m" else name for name in wanted}
    grads = reference_gradients(*tensors.values(), grad_out=torch.ones_like(out))
    for name, want in zip("qkvm", grads, strict=True):
        if name in wanted:
            assert tensors[name].grad is not None
            assert relative_error(tensors[name].grad, want) <= 1e-10


def test_either_result_alone_may_be_differentiated(device: str, generator: torch.Generator) -> None:
    for index in (0, 1):
        tensors = draw(generator, dtype=DOUBLE, grad=True)
        result = hal.attention(*tensors, return_lse=True, is_causal=True, backend=device)
        flowing = like(result[index], generator)
        got = torch.autograd.grad(result[index], tensors, flowing, allow_unused=True, materialize_grads=True)
        zero = torch.zeros_like(result.out)
        want = reference_gradients(
            *tensors, grad_out=zero if index else flowing, grad_lse=flowing if index else None, is_causal=True
        )
        for gradient, wanted in zip(got, want, strict=False):
            assert relative_error(gradient, wanted) <= 1e-10 or (gradient.norm() <= 1e-12 and wanted.norm() <= 1e-12)


@pytest.mark.parametrize("changed", ["query", "key", "value", "mask", "result"])
def test_changing_a_tensor_between_forward_and_backward_never_gives_wrong_gradients(
    device: str, generator: torch.Generator, changed: str
) -> None:
    leaves = [
        *draw(generator, dtype=DOUBLE, grad=True),
        torch.randn(7, 7, generator=generator, dtype=DOUBLE).requires_grad_(),
    ]
    inputs = [leaf * 1 for leaf in leaves]
    out = hal.attention(*inputs, softcap=4.0, backend=device)
    want = reference_gradients(*leaves, grad_out=torch.ones_like(out), softcap=4.0)
    tensor = dict(zip(("query", "key", "value", "mask", "result"), (*inputs, out), strict=True))[changed]
    with torch.no_grad():
        tensor.add_(1.0)
    if device == "explicit:0":  # it saves all of them
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(torch.ones_like(out))
        return
    try:
        out.backward(torch.ones_like(out))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    for leaf, wanted in zip(leaves, want, strict=True):
        assert leaf.grad is not None
        assert relative_error(leaf.grad, wanted) <= 1e-10


def test_a_second_derivative_is_refused_by_name(explicit: FakeBackend, generator: torch.Generator) -> None:
    query, key, value = draw(generator, dtype=DOUBLE, grad=True)
    out = hal.attention(query, key, value, backend="explicit")
    (first,) = torch.autograd.grad((out**2).sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"second derivative of attention was asked for .*batch 2, heads 4"):
        first.sum().backward()


def test_the_cpu_gives_a_second_derivative_right_or_refuses_it(cpu: str, generator: torch.Generator) -> None:
    tensors = draw(generator, 1, 2, 4, 4, 4, dtype=DOUBLE, grad=True)
    flowing, again = torch.randn(1, 2, 4, 4, generator=generator, dtype=DOUBLE), None
    try:
        out = hal.attention(*tensors, backend=cpu)
        (first,) = torch.autograd.grad(out, tensors[0], flowing, create_graph=True)
        (again,) = torch.autograd.grad((first**2).sum(), tensors[0])
    except (hal.HalError, RuntimeError):
        return
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*tensors)
        (first,) = torch.autograd.grad(out, tensors[0], flowing, create_graph=True)
        (want,) = torch.autograd.grad((first**2).sum(), tensors[0])
    assert relative_error(again, want) <= 1e-9


def test_functional_gradients_agree(device: str, generator: torch.Generator) -> None:
    query, key, value = draw(generator, dtype=DOUBLE)

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (hal.attention(q, k, value, is_causal=True, backend=device) ** 2).sum()
        return result

    got = torch.func.grad(loss, argnums=(0, 1))(query, key)
    query.requires_grad_(), key.requires_grad_()
    want = torch.autograd.grad(loss(query, key), (query, key))
    for gradient, wanted in zip(got, want, strict=True):
        assert relative_error(gradient, wanted) <= 1e-12


def test_a_functional_second_derivative_is_refused_by_name(explicit: FakeBackend, generator: torch.Generator) -> None:
    query, key, value = draw(generator, dtype=DOUBLE)

    def loss(q: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (hal.attention(q, key, value, backend="explicit") ** 2).sum()
        return result

    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(query)


def test_dropout_s_gradient_drops_what_the_forward_dropped(device: str, generator: torch.Generator, seed: int) -> None:
    if device == "cpu:0":
        pytest.skip("the reference needs to know which weights were kept")
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    out = hal.attention(*tensors, dropout_p=0.5, rng=(seed, 3), backend=device)
    flowing = like(out, generator)
    got = torch.autograd.grad(out, tensors, flowing)
    keep = kept((2, 4, 7, 7), request_of(*tensors, dropout_p=0.5), (seed, 3)) != 0
    want = reference_gradients(*tensors, grad_out=flowing, dropout_p=0.5, keep=keep)
    for gradient, wanted in zip(got, want, strict=False):
        assert relative_error(gradient, wanted) <= 1e-10


def test_dropout_s_gradient_on_the_cpu_is_the_slope(cpu: str, generator: torch.Generator, seed: int) -> None:
    tensors = draw(generator, 1, 2, 4, 5, 4, dtype=DOUBLE, grad=True)
    call = lambda *given: hal.attention(*given, dropout_p=0.5, rng=(seed, 3), backend=cpu)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)


def test_dropout_without_a_pair_differentiates_its_own_draw(explicit: FakeBackend, generator: torch.Generator) -> None:
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        out = hal.attention(*tensors, dropout_p=0.5, backend="explicit")
        torch.rand(5)  # the default generator moves on before backward
        (got,) = torch.autograd.grad(out.sum(), tensors[2])
    # d(sum of out)/d(value) sums the kept weights of a column: 0 where the forward dropped a whole column.
    assert relative_error((got * tensors[2]).sum(), out.sum()) <= 1e-12  # out is linear in value


def test_recomputation_under_a_checkpoint_repeats_the_draw(device: str, generator: torch.Generator) -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = draw(generator, dtype=DOUBLE, grad=True)
    for pair in (None, (5, 6)):
        call = lambda *given, pair=pair: hal.attention(*given, dropout_p=0.3, rng=pair, backend=device)  # noqa: E731
        found = []
        for run in (call, lambda *given, call=call: checkpoint(call, *given, use_reentrant=False)):
            with torch.random.fork_rng():
                torch.manual_seed(11)
                found.append(torch.autograd.grad((run(*tensors) ** 2).sum(), tensors))
        assert all(relative_error(a, b) <= 1e-12 for a, b in zip(*found, strict=True))


def test_what_is_saved_goes_through_save_for_backward_and_is_freed(
    explicit: FakeBackend, generator: torch.Generator
) -> None:
    query, key, value = (t * 1 for t in draw(generator, grad=True))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = hal.attention(query, key, value, backend="explicit")
    assert sorted(saved) == sorted([(2, 4, 7, 8)] * 4 + [(2, 4, 7)])  # query, key, value, out and lse
    held = weakref.ref(query)
    del query
    gc.collect()
    out.sum().backward()
    del out, key, value
    gc.collect()
    assert held() is None


def test_a_graph_may_be_walked_twice_when_it_is_retained(explicit: FakeBackend, generator: torch.Generator) -> None:
    query, key, value = draw(generator, dtype=DOUBLE, grad=True)
    out = hal.attention(query, key, value, backend="explicit").sum()
    first = torch.autograd.grad(out, query, retain_graph=True)
    second = torch.autograd.grad(out, query)
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, query)


def test_dead_rows_have_no_gradient(device: str, generator: torch.Generator) -> None:
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    mask = torch.zeros(7, 7, dtype=DOUBLE).masked_fill((torch.arange(7) == 2)[:, None], -math.inf).requires_grad_()
    out, lse = hal.attention(*tensors, mask, return_lse=True, backend=device)
    assert (lse[:, :, 2] == -math.inf).all()
    (out.sum() + lse.masked_fill(lse == -math.inf, 0).sum()).backward()
    for tensor in (*tensors, mask):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert (tensors[0].grad[:, :, 2] == 0).all()
    assert (mask.grad[2] == 0).all()


def test_lengths_of_one_bucket_share_a_decision_and_not_a_graph(
    explicit: FakeBackend, generator: torch.Generator
) -> None:
    for length in (9, 12, 16, 10):
        tensors = draw(generator, len_q=length, dtype=DOUBLE, grad=True)
        out = hal.attention(*tensors, is_causal=True, backend="explicit")
        got = torch.autograd.grad(out.sum(), tensors)
        want = reference_gradients(*tensors, grad_out=torch.ones_like(out), is_causal=True)
        assert all(relative_error(g, w) <= 1e-10 for g, w in zip(got, want, strict=False))
    assert [r.len_q for _, r in explicit.backwards] == [9, 12, 16, 10]
