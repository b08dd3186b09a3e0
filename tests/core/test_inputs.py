"""hal.attention takes what torch's scaled_dot_product_attention takes: any rank, broadcasting, jagged, meta, vmap."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import hal_core as hal

sdpa: Any = torch._C._nn.scaled_dot_product_attention
#: query, key, value, mask or None, options.
FORMS: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "rank 2": ((5, 8), (6, 8), (6, 8), (5, 6), {}),
    "rank 3": ((3, 5, 8), (3, 6, 8), (3, 6, 4), (3, 5, 6), {}),
    "rank 3, one mask": ((3, 5, 8), (3, 6, 8), (3, 6, 8), (1, 5, 6), {}),
    "rank 3, grouped": ((8, 5, 8), (2, 6, 8), (2, 6, 8), None, {"enable_gqa": True}),
    "rank 5": ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), (3, 1, 5, 6), {}),
    "rank 5, causal": ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 3, 4, 6, 8), None, {"is_causal": True, "scale": 0.3}),
    "rank 5, broadcast": ((2, 3, 4, 5, 8), (1, 3, 4, 6, 8), (2, 1, 1, 6, 8), (2, 1, 4, 5, 6), {}),
    "ranks that differ": ((5, 8), (3, 6, 8), (2, 3, 6, 8), None, {}),
    "one batch of keys": ((2, 4, 5, 8), (1, 4, 6, 8), (1, 4, 6, 8), (4, 5, 6), {}),
    "one batch of queries": ((1, 4, 5, 8), (3, 4, 6, 8), (3, 4, 6, 8), None, {}),
    "one key head": ((2, 4, 5, 8), (2, 1, 6, 8), (2, 1, 6, 8), None, {}),
    "one query head": ((2, 1, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), None, {}),
    "one value head": ((2, 8, 5, 8), (2, 8, 6, 8), (2, 1, 6, 8), None, {}),
    "fewer key heads than value heads": ((2, 8, 5, 8), (2, 2, 6, 8), (2, 4, 6, 8), None, {"enable_gqa": True}),
    "fewer value heads than key heads": ((2, 8, 5, 8), (2, 4, 6, 8), (2, 2, 6, 8), None, {"enable_gqa": True}),
    "a tensor as scale": ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), None, {"scale": torch.tensor(0.3)}),
    "dropout of 1": ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), None, {"dropout_p": 1.0}),
    "rank 3, no batch": ((0, 5, 8), (0, 6, 8), (0, 6, 8), (5, 6), {}),
    "rank 3, no batch of queries": ((0, 5, 8), (1, 6, 8), (6, 8), (1, 5, 6), {"scale": 0.3}),
    "no batch": ((0, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8), None, {}),
}
Call = Callable[..., Tensor]


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def draw(form: str, kind: str = "additive") -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    generator = torch.Generator().manual_seed(sum(map(ord, form)))
    *shapes, mask, options = FORMS[form]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    drawn = None if mask is None else torch.randn(mask, generator=generator)
    return tensors, drawn > -1 if drawn is not None and kind == "boolean" else drawn, options


@pytest.mark.parametrize("kind", ["additive", "boolean"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_torch_s_result_and_gradients(form: str, kind: str) -> None:
    tensors, mask, options = draw(form, kind)
    wanted, found = sdpa(*tensors, mask, **options), hal.attention(*tensors, mask, **options)
    assert error(found, wanted) <= 1e-5
    outer = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, tensors, outer), torch.autograd.grad(wanted, tensors, outer), strict=True)
    assert all(error(mine, theirs) <= 1e-5 for mine, theirs in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_the_log_sum_exp_has_the_result_s_leading_dimensions(form: str) -> None:
    tensors, mask, options = draw(form)
    out, lse = hal.attention(*tensors, mask, return_lse=True, **options)
    assert lse.shape == out.shape[:-1]


@pytest.mark.parametrize("form", FORMS)
def test_tensors_without_data_give_the_shape(form: str) -> None:
    tensors, mask, options = draw(form)
    wanted = sdpa(*tensors, mask, **options).shape
    found = hal.attention(*(t.to("meta") for t in tensors), None if mask is None else mask.to("meta"), **options)
    assert found.is_meta
    assert found.shape == wanted
    if isinstance(options.get("scale"), Tensor):
        return  # its number cannot be read there
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = hal.attention(*map(mode.from_tensor, tensors), mask, window=(None, 100), **options)
    assert found.shape == wanted
    assert error(hal.attention(*tensors, mask, window=(None, 100), **options), sdpa(*tensors, mask, **options)) <= 1e-5


@pytest.mark.parametrize("form", ["rank 2", "rank 5, broadcast", "one key head", "dropout of 1"])
def test_compiled_and_traced_forms_give_torch_s_result(form: str) -> None:
    tensors, mask, options = draw(form)
    wanted = sdpa(*tensors, mask, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: hal.attention(*given, **options), backend="eager", fullgraph=True)
    assert error(compiled(*tensors, mask), wanted) <= 1e-5
    inputs = (*tensors,) if mask is None else (*tensors, mask)
    assert error(torch.jit.trace(lambda *given: hal.attention(*given, **options), inputs)(*inputs), wanted) <= 1e-5


@pytest.mark.parametrize("lower", [False, True])
def test_a_compiled_causal_bias_is_causal(lower: bool) -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    tensors = torch.randn(3, 1, 2, 6, 8).unbind(0)
    query, bias = tensors[0][:, :, :4], (causal_lower_right if lower else causal_upper_left)(4, 6)
    found = torch.compile(hal.attention, backend="eager")(query, *tensors[1:], bias)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2 if lower else 0)
    assert error(found, sdpa(query, *tensors[1:], mask)) <= 1e-5


def test_shapes_that_do_not_go_together_are_refused_with_the_sizes_that_do_not() -> None:
    sentence = (
        r"query \[3, 5, 8\], key \[2, 5, 8\] .* do not go together \(\[3\], \[2\], \[2\]\): make each of them equal"
    )
    tensors = torch.ones(3, 5, 8), torch.ones(2, 5, 8), torch.ones(2, 5, 8)
    with pytest.raises(hal.ContractError, match=sentence):
        hal.attention(*tensors)
    with pytest.raises(hal.ContractError, match=sentence):
        torch.compile(hal.attention, backend="eager")(*tensors)
    with pytest.raises(hal.ContractError, match=r"\(\[3, 2, 2\], \[2, 2, 2\], \[2, 2, 2\]\)"):
        hal.attention(torch.ones(3, 2, 2, 5, 8), torch.ones(2, 2, 2, 5, 8), torch.ones(2, 2, 2, 5, 8))
    with pytest.raises(hal.ContractError, match=r"query has shape \[8\]"):
        hal.attention(torch.ones(8), torch.ones(5, 8), torch.ones(5, 8))


def test_a_mask_that_does_not_broadcast_is_what_is_refused() -> None:
    tensors = torch.ones(3, 2, 5, 8)
    with pytest.raises(hal.ContractError, match=r"attn_mask has shape \[1, 1, 5, 5\]: .* broadcasts to \[2, 5, 5\]"):
        hal.attention(*tensors, torch.ones(1, 1, 5, 5, dtype=torch.bool))


def test_nothing_of_a_fake_call_stays_in_a_device_s_memory() -> None:
    tensors = [torch.randn(1, 2, 40, 8) for _ in range(3)]
    with FakeTensorMode() as mode:
        hal.attention(*map(mode.from_tensor, tensors), window=(3, 0))
    assert not hasattr(hal.attention(*tensors, window=(3, 0)), "fake_mode")


def test_a_scale_that_asks_for_a_gradient_is_refused() -> None:
    with pytest.raises(hal.ContractError, match="scale a Tensor was given"):
        hal.attention(*torch.ones(3, 1, 2, 4, 8), scale=torch.tensor(1.0, requires_grad=True))


def jagged(*lengths: int) -> Tensor:
    rows = [torch.randn(length, 4, 8) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(3, 1, 5), (4, 4), (2,)])
def test_jagged_sequences_do_not_see_each_other(lengths: tuple[int, ...], causal: bool) -> None:
    base = jagged(*lengths)
    query = base.transpose(1, 2)
    out = hal.attention(query, query, query, is_causal=causal)
    rows = [row.detach().transpose(0, 1).requires_grad_() for row in base.unbind()]
    wanted = [sdpa(row, row, row, is_causal=causal) for row in rows]
    assert max(map(error, out.unbind(), wanted)) <= 1e-5
    (out + query).sum()  # the same ragged dimension
    (found,) = torch.autograd.grad(out.values().square().sum(), base)
    torch.autograd.backward([t.square().sum() for t in wanted])
    assert error(found.values(), torch.cat([row.grad.transpose(0, 1) for row in rows])) <= 1e-5


def test_jagged_tensors_of_other_forms() -> None:
    flat = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=torch.jagged)
    for found, row in zip(hal.attention(flat, flat, flat).unbind(), flat.unbind(), strict=True):
        assert error(found, sdpa(row, row, row)) <= 1e-5
    batches = torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(3, 5, 8)], layout=torch.jagged)
    for found, row in zip(hal.attention(batches, batches, batches).unbind(), batches.unbind(), strict=True):
        assert error(found, sdpa(row, row, row)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"attn_mask": torch.ones(5, 5)}, "attn_mask with jagged"), ({"return_lse": True}, "return_lse with jagged")],
)
def test_what_jagged_tensors_cannot_have_is_refused(options: dict[str, Any], sentence: str) -> None:
    query = jagged(3, 2).transpose(1, 2)
    with pytest.raises(hal.ContractError, match=sentence):
        hal.attention(query, query, query, **options)


def looped(call: Call, tensors: Any, dims: Any) -> Any:
    each = [call(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True))) for i in range(3)]
    return torch.stack(each) if isinstance(each[0], Tensor) else tuple(map(torch.stack, zip(*each, strict=True)))


@pytest.mark.parametrize(
    ("dims", "options"),
    itertools.product([(0, 0, 0), (0, None, 0), (2, None, None)], [{}, {"is_causal": True}, {"window": (None, 100)}]),
)
def test_vmap_gives_each_example_s_result_and_gradients(dims: Any, options: dict[str, Any]) -> None:
    drawn = torch.randn(3, 3, 2, 4, 5, 8).unbind(0)
    tensors = [t[0] if d is None else t.movedim(0, d) for t, d in zip(drawn, dims, strict=True)]
    plain = {name: given for name, given in options.items() if name != "window"}

    def mine(*given: Tensor) -> Tensor:
        return hal.attention(*given, **options)  # type: ignore[no-any-return]

    def theirs(*given: Tensor) -> Tensor:
        return sdpa(*given, **plain)  # type: ignore[no-any-return]

    assert error(vmap(mine, dims)(*tensors), looped(theirs, tensors, dims)) <= 1e-5
    inner, wanted = (grad(lambda *given, f=f: f(*given).square().sum(), (0, 1, 2)) for f in (mine, theirs))
    for found, want in zip(vmap(inner, dims)(*tensors), looped(wanted, tensors, dims), strict=True):
        assert error(found, want) <= 1e-5
    outer = grad(lambda *given: vmap(mine, dims)(*given).square().sum(), (0, 1, 2))(*tensors)
    total = grad(lambda *given: looped(theirs, given, dims).square().sum(), (0, 1, 2))(*tensors)
    assert all(error(found, want) <= 1e-5 for found, want in zip(outer, total, strict=True))


@pytest.mark.parametrize(("shape", "dim"), [((3, 5, 5), 0), ((5, 5), None), ((2, 1, 5, 5), None), ((3, 1, 4, 5, 5), 0)])
def test_vmap_gives_the_gradient_of_a_mask_that_broadcasts(shape: tuple[int, ...], dim: int | None) -> None:
    *tensors, mask = *torch.randn(3, 3, 2, 4, 5, 8).unbind(0), torch.randn(shape)
    dims = (0, 0, 0, dim)
    mine = grad(lambda *given: hal.attention(*given).square().sum(), (0, 3))
    theirs = grad(lambda *given: sdpa(*given).square().sum(), (0, 3))
    found, wanted = vmap(mine, dims)(*tensors, mask), looped(theirs, [*tensors, mask], dims)
    assert all(error(one, other) <= 1e-5 for one, other in zip(found, wanted, strict=True))


def test_vmap_draws_dropout_as_it_is_told_to() -> None:
    query = torch.randn(1, 2, 4, 5, 8).expand(2, -1, -1, -1, -1)
    for randomness, equal in (("same", True), ("different", False)):
        first, second = vmap(lambda q: hal.attention(q, q, q, dropout_p=0.5), randomness=randomness)(query)
        assert torch.equal(first, second) is equal


def test_vmap_over_packed_sequences_is_refused() -> None:
    ends = torch.tensor([0, 5], dtype=torch.int32)
    tables = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(hal.ContractError, match="mapped by vmap: loop over it"):
        vmap(lambda q: hal.attention(q, q, q, **tables))(torch.randn(3, 1, 4, 5, 8))


def test_jacrev_runs_through_an_explicit_backward() -> None:
    query = torch.randn(1, 1, 3, 4)
    found = torch.func.jacrev(lambda q: hal.attention(q, query, query, window=(None, 100)))(query)
    assert error(found, torch.func.jacrev(lambda q: sdpa(q, query, query))(query)) <= 1e-5


class Layer(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return hal.attention(query, key, key, **self.options)  # type: ignore[no-any-return]


def export(**options: Any) -> None:
    inputs = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8))
    try:
        torch.onnx.export(Layer(enable_gqa=True, **options), inputs, io.BytesIO(), dynamo=False, opset_version=17)
    except torch.onnx.OnnxExporterError as error:  # after every operator was translated, the file is checked with onnx
        if str(error) != "Module onnx is not installed!":
            raise


@pytest.mark.filterwarnings("ignore")
def test_the_exporter_by_tracing_gets_torch_s_operator() -> None:
    export(is_causal=True, scale=0.5)
    for options in ({"softcap": 3.0}, {"window": (1, 1)}, {"causal": "bottom_right"}):
        with pytest.raises(hal.ContractError, match="ONNX export by tracing"):
            export(**options)
