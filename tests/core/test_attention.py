"""`hal.attention` and `hal.bind` on every kind of session: right in float64's eyes, repeatable, and without side
effects.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fakes import FakeBackend, attend, draw, full, kept, plain

import hal_core as hal
from hal_core import AttentionOutput, BlockPlan, Causal, Numerics, UnsupportedError
from hal_core.registry import registry
from hal_core.testing import reference, relative_error, request_of

Fake = Callable[..., FakeBackend]
KINDS = ("native", "bound", "explicit", "simple", "cpu")


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest, fake: Fake) -> str:
    """One device for each kind of session: prepare and compute, bind, an explicit backward, one function, the CPU's."""
    kind: str = request.param
    if kind == "cpu":
        return str(request.getfixturevalue("cpu"))
    if kind == "simple":
        fake(
            kind,
            open=lambda backend, device: hal.SimpleSession(attend, autograd="native"),
            capabilities=full(features=full().features - {"block_plan", "dropout"}),
        )
    else:
        fake(kind, bound=kind == "bound", autograd="explicit" if kind == "explicit" else "native")
    return f"{kind}:0"


def numerics(device: str, dtype: torch.dtype) -> Numerics:
    found = registry.find(device)[0]
    return registry.backend_of(found).capabilities(found).numerics[str(dtype).removeprefix("torch.")]


def claims(device: str, feature: str) -> bool:
    found = registry.find(device)[0]
    return feature in registry.backend_of(found).capabilities(found).features


def a_plan(generator: torch.Generator, len_q: int, len_k: int) -> BlockPlan:
    rows, columns = -(-len_q // 4), -(-len_k // 3)
    indices = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)]).int()[None, None]
    return BlockPlan(4, 3, indices[..., :3].contiguous(), torch.randint(0, 4, (1, 1, rows), generator=generator).int())


#: name -> (shape of `draw`, options made from a generator)
CALLS: dict[str, tuple[dict[str, Any], Callable[[torch.Generator], dict[str, Any]]]] = {
    "plain": ({}, lambda g: {}),
    "cross": ({"len_q": 3, "len_k": 17}, lambda g: {}),
    "decode": ({"len_q": 1, "len_k": 33}, lambda g: {}),
    "scale": ({}, lambda g: {"scale": 0.3}),
    "scale of 0": ({}, lambda g: {"scale": 0.0}),
    "causal": ({"len_q": 9, "len_k": 6}, lambda g: {"is_causal": True}),
    "bottom right": ({"len_q": 4, "len_k": 9}, lambda g: {"causal": "bottom_right"}),
    "bottom right with dead rows": ({"len_q": 9, "len_k": 4}, lambda g: {"causal": Causal.BOTTOM_RIGHT}),
    "diagonal": ({}, lambda g: {"causal": "top_left", "diagonal": -2}),
    "window": ({"len_q": 12}, lambda g: {"window": (3, 1)}),
    "open window": ({"len_q": 12}, lambda g: {"window": (None, 2)}),
    "causal window": ({"len_q": 12}, lambda g: {"is_causal": True, "window": (3, 5)}),
    "window off the end": ({"len_q": 12, "len_k": 3}, lambda g: {"window": (1, 1)}),
    "softcap": ({}, lambda g: {"softcap": 1.5}),
    "boolean mask": ({"len_k": 9}, lambda g: {"attn_mask": torch.rand(2, 4, 7, 9, generator=g) < 0.5}),
    "boolean mask with a dead row": (
        {"len_k": 9},
        lambda g: {"attn_mask": (torch.rand(7, 9, generator=g) < 0.6) & (torch.arange(7) != 3)[:, None]},
    ),
    "additive mask": ({"len_k": 9}, lambda g: {"attn_mask": torch.randn(2, 1, 7, 9, generator=g)}),
    "additive mask with -inf": (
        {"len_k": 9},
        lambda g: {
            "attn_mask": torch.randn(7, 9, generator=g).masked_fill(torch.rand(7, 9, generator=g) < 0.4, -math.inf)
        },
    ),
    "mask and causal": ({}, lambda g: {"attn_mask": torch.rand(7, 7, generator=g) < 0.7, "is_causal": True}),
    "padding mask": ({"len_k": 9}, lambda g: {"attn_mask": torch.tensor([[9], [4]])[:, None, None] > torch.arange(9)}),
    "grouped heads": ({"heads": 6, "heads_kv": 2}, lambda g: {"enable_gqa": True}),
    "one key head": ({"heads": 6, "heads_kv": 1, "len_k": 11}, lambda g: {"enable_gqa": True, "is_causal": True}),
    "value size": ({"dim": 8, "dim_v": 5}, lambda g: {}),
    "block plan": ({"len_q": 11, "len_k": 13}, lambda g: {"block_plan": a_plan(g, 11, 13)}),
    "everything": (
        {"heads": 4, "heads_kv": 2, "len_q": 6, "len_k": 9, "dim_v": 12},
        lambda g: {
            "enable_gqa": True,
            "causal": "bottom_right",
            "diagonal": 1,
            "window": (4, None),
            "softcap": 3.0,
            "scale": 0.7,
            "attn_mask": torch.randn(4, 6, 9, generator=g),
        },
    ),
}


def wanted(tensors: tuple[torch.Tensor, ...], options: dict[str, Any]) -> AttentionOutput:
    given = {name: value for name, value in options.items() if name not in ("attn_mask", "block_plan", "enable_gqa")}
    return reference(*tensors, options.get("attn_mask"), plan=options.get("block_plan"), **given)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_option_gives_the_reference_s_result(
    device: str, generator: torch.Generator, name: str, dtype: torch.dtype
) -> None:
    shape, make = CALLS[name]
    tensors, options = draw(generator, **shape, dtype=dtype), make(generator)
    if "block_plan" in options and not claims(device, "block_plan"):
        with pytest.raises(UnsupportedError, match="expand the plan to a mask"):
            hal.attention(*tensors, **options, backend=device)
        return
    want, bound = wanted(tensors, options), numerics(device, dtype)
    result = hal.attention(*tensors, **options, return_lse=True, backend=device)
    assert isinstance(result, AttentionOutput)
    assert result.out.dtype == dtype
    assert result.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(result.out, want.out) <= bound.relative
    assert relative_error(result.lse, want.lse) <= bound.lse
    alone = hal.attention(*tensors, **options, backend=device)
    assert relative_error(alone, want.out) <= bound.relative


@pytest.mark.parametrize("name", ["plain", "decode", "mask and causal", "everything"])
def test_a_bound_call_is_the_same_call(device: str, generator: torch.Generator, name: str) -> None:
    shape, make = CALLS[name]
    tensors, options = draw(generator, **shape), make(generator)
    mask = options.pop("attn_mask", None)
    for lse in (False, True):
        call = hal.bind(*tensors, mask, **options, return_lse=lse, backend=device, max_len_q=64, max_len_k=64)
        assert call.decision.chosen == device
        for lengths in ((None, None), (3, 12), (None, None)):
            resized = dict(zip(("len_q", "len_k"), lengths, strict=True)) if lengths[0] and mask is None else {}
            given = draw(generator, **(shape | resized))
            got = call(*given, mask)
            got = got.out if lse else got
            assert relative_error(got, wanted(given, options | {"attn_mask": mask}).out) <= 1e-5


@pytest.mark.parametrize("layout", ["interleaved", "strided", "reversed", "expanded", "sliced"])
def test_strides_do_not_matter(device: str, generator: torch.Generator, layout: str) -> None:
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "interleaved": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": lambda t: t.mT.contiguous().mT,
        "reversed": lambda t: torch.stack([t, t], -1)[..., 1],
        "expanded": lambda t: t[:, :1].expand_as(t),
        "sliced": lambda t: torch.cat([t, t], 3)[..., 3 : 3 + t.shape[3]],
    }
    tensors = tuple(change[layout](t) for t in draw(generator, len_q=5, len_k=9))
    assert relative_error(hal.attention(*tensors, backend=device), reference(*tensors).out) <= 1e-5


def test_inputs_are_never_changed(device: str, generator: torch.Generator) -> None:
    tensors = draw(generator, len_q=6, len_k=9)
    mask = torch.randn(6, 9, generator=generator).masked_fill(torch.rand(6, 9, generator=generator) < 0.3, -math.inf)
    before = [t.clone() for t in (*tensors, mask)]
    versions = [t._version for t in (*tensors, mask)]
    hal.attention(*tensors, mask, backend=device, softcap=2.0)
    assert all(torch.equal(t, b) for t, b in zip((*tensors, mask), before, strict=True))
    assert [t._version for t in (*tensors, mask)] == versions


def test_the_first_arguments_are_those_of_scaled_dot_product_attention() -> None:
    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    ours = inspect.signature(hal.attention).parameters
    # torch's schema names no default of query, key and value; Parameter.empty is ours.
    assert [a.name for a in theirs] == list(ours)[: len(theirs)]
    for argument in theirs:
        mine = ours[argument.name]
        assert (mine.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only, argument.name
        if argument.has_default_value():
            assert mine.default == argument.default_value, argument.name
        else:
            assert mine.default is inspect.Parameter.empty
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(ours.values())[6:])


def test_it_replaces_scaled_dot_product_attention(device: str, generator: torch.Generator) -> None:
    query, key, value = draw(generator, len_q=6, len_k=6)
    mask = torch.rand(6, 6, generator=generator) < 0.8
    theirs = torch.nn.functional.scaled_dot_product_attention
    for arguments, options in (((), {}), ((mask,), {}), ((None, 0.0, True), {}), ((mask, 0.0, False), {"scale": 0.2})):
        want = theirs(query, key, value, *arguments, **options)
        got = hal.attention(query, key, value, *arguments, **options, backend=device)
        assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_follows_autocast_as_torch_does(
    device: str, generator: torch.Generator, given: torch.dtype, target: torch.dtype, mask: bool
) -> None:
    tensors = draw(generator, dtype=given)
    added = torch.randn(7, 7, generator=generator) if mask and given == torch.float32 else None
    with torch.autocast("cpu", dtype=target):
        want = torch.nn.functional.scaled_dot_product_attention(*tensors, added)
        got = hal.attention(*tensors, added, backend=device)
        decision = hal.explain(*tensors, added, backend=device)
    assert got.dtype == want.dtype
    assert decision.request.dtype == str(want.dtype).removeprefix("torch.")
    assert relative_error(got, reference(*tensors, added).out) <= 5e-2
    assert hal.attention(*tensors, backend=device).dtype == given


def test_autocast_that_is_off_inside_is_off(device: str, generator: torch.Generator) -> None:
    tensors = draw(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert hal.attention(*tensors, backend=device).dtype == torch.float32


# Dropout and noise


@pytest.fixture(params=["native", "bound", "explicit"])
def dropping(request: pytest.FixtureRequest, fake: Fake) -> str:
    fake("dropping", bound=request.param == "bound", autograd="explicit" if request.param == "explicit" else "native")
    return "dropping:0"


def test_dropout_with_a_pair_is_the_same_in_any_thread(dropping: str, generator: torch.Generator) -> None:
    tensors = draw(generator)

    def run(pair: tuple[int, int]) -> torch.Tensor:
        torch.rand(7)  # another thread's use of the default generator must not matter
        result: torch.Tensor = hal.attention(*tensors, dropout_p=0.4, rng=pair, backend=dropping)
        return result

    pairs = [(3, 0), (3, 1), (4, 0)]
    want = [run(pair) for pair in pairs]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(run, pairs * 10))
    assert all(torch.equal(g, w) for g, w in zip(got, want * 10, strict=True))
    assert not torch.equal(want[0], want[1])
    assert not torch.equal(want[0], want[2])
    keep = kept((2, 4, 7, 7), request_of(*tensors, dropout_p=0.4), (3, 0))
    assert relative_error(want[0], reference(*tensors, dropout_p=0.4, keep=keep != 0).out) <= 1e-5


def test_dropout_without_a_pair_follows_manual_seed(dropping: str, generator: torch.Generator) -> None:
    tensors = draw(generator)
    bound = hal.bind(*tensors, dropout_p=0.4, backend=dropping)
    for call in (lambda: hal.attention(*tensors, dropout_p=0.4, backend=dropping), lambda: bound(*tensors)):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            first, second = call(), call()
            torch.manual_seed(7)
            again = call()
        assert torch.equal(first, again)
        assert not torch.equal(first, second)


def test_a_call_without_randomness_leaves_the_default_generator_alone(device: str, generator: torch.Generator) -> None:
    state = torch.get_rng_state()
    hal.attention(*draw(generator), backend=device)
    hal.attention(*draw(generator), backend=device, dropout_p=0.0, rng=(1, 2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bound", [False, True])
def test_noise_comes_from_the_pair_alone(fake: Fake, generator: torch.Generator, bound: bool) -> None:
    noisy = {"float32": Numerics(relative=0.1, noisy=True)}
    fake("noisy", noise=0.05, bound=bound, capabilities=full(dtypes=noisy, numerics=noisy), fidelity="simulated")
    tensors = draw(generator)
    call = hal.bind(*tensors, backend="noisy")
    one = hal.attention(*tensors, backend="noisy", rng=(5, 0))
    with ThreadPoolExecutor(8) as threads:
        same = list(threads.map(lambda _: hal.attention(*tensors, backend="noisy", rng=(5, 0)), range(16)))
    assert all(torch.equal(one, other) for other in (*same, call(*tensors, rng=(5, 0))))
    other = hal.attention(*tensors, backend="noisy", rng=(5, 1))
    assert 0 < relative_error(other, one) < 0.2
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = hal.attention(*tensors, backend="noisy")
        torch.manual_seed(1)
        assert torch.equal(drawn, hal.attention(*tensors, backend="noisy"))
    assert not torch.equal(drawn, one)


def test_dropout_on_the_cpu_keeps_the_right_share_and_mean(cpu: str, seed: int) -> None:
    query, key = torch.zeros(1, 4, 64, 8), torch.zeros(1, 4, 128, 8)
    value = torch.eye(128).expand(1, 4, 128, 128)
    weights = hal.attention(query, key, value, dropout_p=0.25, rng=(seed, 0), backend=cpu) * 128
    assert set((weights * 3 / 4).round(decimals=4).unique().tolist()) == {0.0, 1.0}
    assert abs((weights == 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / weights.numel())
    again = hal.attention(query, key, value, dropout_p=0.25, rng=(seed, 0), backend=cpu) * 128
    assert torch.equal(weights, again)
    assert not torch.equal(weights, hal.attention(query, key, value, dropout_p=0.25, rng=(seed, 1), backend=cpu) * 128)


# Packed sequences and paged caches


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize(
    "options", [{}, {"causal": "bottom_right"}, {"is_causal": True, "window": (4, 0)}, {"softcap": 2.0}]
)
def test_packed_sequences_are_attended_one_by_one(
    cpu: str, generator: torch.Generator, options: dict[str, Any]
) -> None:
    wish, lengths_q, lengths_k = options, [5, 0, 1, 9], [7, 3, 12, 0]
    query, key, value = draw(generator, 1, 4, sum(lengths_q), sum(lengths_k), 8, heads_kv=2)
    tables = {
        "cu_seqlens_q": cumulative(lengths_q),
        "cu_seqlens_k": cumulative(lengths_k),
        "max_seqlen_q": 9,
        "max_seqlen_k": 12,
    }
    got = hal.attention(query, key, value, enable_gqa=True, return_lse=True, backend=cpu, **tables, **options)
    start_q = start_k = 0
    for len_q, len_k in zip(lengths_q, lengths_k, strict=True):
        rows, columns = slice(start_q, start_q + len_q), slice(start_k, start_k + len_k)
        want = reference(query[:, :, rows], key[:, :, columns], value[:, :, columns], **wish)
        assert relative_error(got.out[:, :, rows], want.out) <= 1e-5
        assert relative_error(got.lse[:, :, rows], want.lse) <= 1e-5
        start_q, start_k = start_q + len_q, start_k + len_k


@pytest.mark.parametrize("options", [{}, {"causal": "bottom_right"}, {"window": (6, None), "causal": "bottom_right"}])
def test_a_paged_cache_is_read_through_its_table(cpu: str, generator: torch.Generator, options: dict[str, Any]) -> None:
    pages, size, held = 9, 4, [10, 0, 4, 1]
    query, _, _ = draw(generator, 4, 4, 2, 1, 8)
    key, value = (torch.randn(pages, 2, size, 8, generator=generator) for _ in range(2))
    order = torch.randperm(pages, generator=generator)
    page_table = torch.full((4, 3), 10**6, dtype=torch.int32)  # what is not used may hold anything
    page_table[0], page_table[2, 0], page_table[3, 0] = order[:3].int(), int(order[3]), int(order[4])
    got = hal.attention(
        query,
        key,
        value,
        enable_gqa=True,
        page_table=page_table,
        cache_seqlens=torch.tensor(held, dtype=torch.int32),
        backend=cpu,
        return_lse=True,
        **options,
    )
    for n, count in enumerate(held):
        used = page_table[n, : -(-count // size)].long()
        keys, values = (t[used].transpose(0, 1).flatten(1, 2)[None, :, :count] for t in (key, value))
        want = reference(query[n : n + 1], keys, values, **options)
        assert relative_error(got.out[n : n + 1], want.out) <= 1e-5
        assert relative_error(got.lse[n : n + 1], want.lse) <= 1e-5


def test_packed_sequences_are_refused_with_a_reason_where_they_are_not_claimed(
    fake: Fake, generator: torch.Generator
) -> None:
    fake("one", capabilities=plain())
    tables = {
        "cu_seqlens_q": cumulative([3, 4]),
        "cu_seqlens_k": cumulative([3, 4]),
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    with pytest.raises(UnsupportedError, match="packed lengths asked, padded batches offered"):
        hal.attention(*draw(generator, 1), backend="one", **tables)


# Sessions of one function


def test_a_session_of_one_function_needs_nothing_else(fake: Fake, generator: torch.Generator) -> None:
    def softmax(query: Any, key: Any, value: Any, mask: Any, request: Any) -> Any:
        assert mask is None
        return (query @ key.mT * request.effective_scale).softmax(-1) @ value, None

    fake("tiny", capabilities=plain(), open=lambda backend, device: hal.SimpleSession(softmax))
    tensors = draw(generator)
    assert relative_error(hal.attention(*tensors, backend="tiny"), reference(*tensors).out) <= 1e-5
    session = hal.session("tiny")
    assert session.autograd(request_of(*tensors)) == "none"
    prepared = session.prepare_attention(*tensors, request=request_of(*tensors))
    later = torch.randn(2, 4, 3, 8, generator=generator)
    streamed = session.compute_attention(prepared, query=later)
    assert relative_error(streamed.out, reference(later, *tensors[1:]).out) <= 1e-5
    with session as same:
        assert same is session


def test_a_device_without_gradients_refuses_them_and_runs_without(fake: Fake, generator: torch.Generator) -> None:
    backend = fake(
        "forward", autograd="none", capabilities=full(features=full().features - {"backward", "mask_grad", "lse_grad"})
    )
    tensors = draw(generator, grad=True)
    with pytest.raises(UnsupportedError, match=r"gradients of k, q, v asked, .* call under torch.no_grad"):
        hal.attention(*tensors, backend="forward")
    assert not backend.ran
    with torch.no_grad():
        out = hal.attention(*tensors, backend="forward")
    assert not out.requires_grad


def test_a_device_that_claims_gradients_and_has_none_is_called_out(fake: Fake, generator: torch.Generator) -> None:
    fake("liar", autograd="none")
    with pytest.raises(hal.PluginError, match="must not claim 'backward'"):
        hal.attention(*draw(generator, grad=True), backend="liar")


def test_threads_give_the_serial_result(device: str, generator: torch.Generator) -> None:
    calls = [draw(generator, len_q=length) for length in range(1, 17)]
    want = [hal.attention(*tensors, is_causal=True, backend=device) for tensors in calls]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda tensors: hal.attention(*tensors, is_causal=True, backend=device), calls * 4))
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(got, want * 4, strict=True))
