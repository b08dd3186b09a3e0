"""Compiled code runs on the selected device, or refuses: never on another one, and with eager's results and
gradients.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeBackend, FakeSession, attend, draw, full, kept, plain
from torch._dynamo.testing import CompileCounterWithBackend

import hal_core as hal
from hal_core import SelectionChangedError, UnknownBackendError, UnsupportedError
from hal_core.testing import reference, reference_gradients, relative_error, request_of

Fake = Callable[..., FakeBackend]
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair(fake: Fake) -> dict[str, FakeBackend]:
    """Two devices; "one" is the automatic choice."""
    return {"one": fake("one", time=1e-13), "two": fake("two", time=1e-9, autograd="explicit")}


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def counts(pair: dict[str, FakeBackend]) -> list[int]:
    return [len(backend.ran) for backend in pair.values()]


def test_one_function_may_use_two_devices(pair: dict[str, FakeBackend], generator: torch.Generator) -> None:
    def both(q: Any, k: Any, v: Any) -> Any:
        return hal.attention(q, k, v, is_causal=True, backend="one"), hal.attention(
            q, k, v, window=(1, 1), backend="two:0"
        )

    tensors = draw(generator)
    call = compiled(both)
    for _ in range(3):
        first, second = call(*tensors)
    assert counts(pair) == [3, 3]
    assert relative_error(first, reference(*tensors, is_causal=True).out) <= 1e-5
    assert relative_error(second, reference(*tensors, window=(1, 1)).out) <= 1e-5


def test_the_operators_bear_the_names_of_their_backends(
    pair: dict[str, FakeBackend], generator: torch.Generator
) -> None:
    names: list[str] = []

    def watch(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "hal" in str(node.target))
        return graph.forward

    compiled(lambda q, k, v: hal.attention(q, k, hal.attention(q, k, v, backend="one"), backend="two"), watch)(
        *draw(generator)
    )
    assert names == ["hal.one_forward.default", "hal.two_forward.default"]


def test_automatic_selection_works_in_compiled_code(pair: dict[str, FakeBackend], generator: torch.Generator) -> None:
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v, is_causal=True))
    assert relative_error(call(*tensors), reference(*tensors, is_causal=True).out) <= 1e-5
    assert counts(pair) == [1, 0]


def test_another_selection_between_calls_runs_on_the_other_device(
    pair: dict[str, FakeBackend], generator: torch.Generator
) -> None:
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v))
    want = reference(*tensors).out
    seen = []
    for name in ("one", "two", None, "two", "one", "two"):
        with hal.use(name):
            assert relative_error(call(*tensors), want) <= 1e-5
        seen.append(counts(pair))
    assert seen == [[1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    hal.configure("two")
    call(*tensors)
    assert counts(pair) == [3, 4]
    hal.configure()
    call(*tensors)
    assert counts(pair) == [4, 4]
    with hal.prefer(["two", "one"]):
        call(*tensors)
    assert counts(pair) == [4, 5]


def test_a_selection_that_is_back_is_not_compiled_again(
    pair: dict[str, FakeBackend], generator: torch.Generator
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v), counter)
    for _ in range(4):
        for name in ("one", "two"):
            with hal.use(name):
                call(*tensors)
    assert counter.frame_count == 2
    assert counts(pair) == [4, 4]


def test_the_environment_is_followed(
    pair: dict[str, FakeBackend], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v))
    call(*tensors)
    monkeypatch.setenv("HAL_BACKEND", "two")
    hal.configure()
    call(*tensors)
    assert counts(pair) == [1, 1]


def test_threads_with_selections_of_their_own(pair: dict[str, FakeBackend], generator: torch.Generator) -> None:
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v))
    for name in pair:  # compiled before: Dynamo compiles in one thread at a time
        with hal.use(name):
            call(*tensors)
    before = counts(pair)

    def work(name: str) -> tuple[int, int]:
        right = refused = 0
        for _ in range(25):
            with hal.use(name):
                try:
                    call(*tensors)
                    right += 1
                except SelectionChangedError:
                    refused += 1
        return right, refused

    with ThreadPoolExecutor(4) as threads:
        results = dict(zip(["one", "two", "one", "two"], threads.map(work, ["one", "two"] * 2), strict=True))
        ran = [after - was for after, was in zip(counts(pair), before, strict=True)]
    assert ran == [50, 50]
    assert all(refused == 0 for _, refused in results.values())


def test_a_new_thread_starts_without_the_selection_of_its_parent(
    pair: dict[str, FakeBackend], generator: torch.Generator
) -> None:
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v))
    with ThreadPoolExecutor(1) as thread, hal.use("two"):
        call(*tensors)
        thread.submit(call, *tensors).result()
        assert counts(pair) == [1, 1]
        try:  # a context that was handed on: its selection is the truth, and Dynamo cannot see it
            thread.submit(contextvars.copy_context().run, call, *tensors).result()
            assert counts(pair) == [1, 2]
        except SelectionChangedError:
            assert counts(pair) == [1, 1]


def test_tasks_run_on_their_own_device_or_are_refused(pair: dict[str, FakeBackend], generator: torch.Generator) -> None:
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v))
    log: list[tuple[str, list[int]]] = []
    refusals: list[str] = []

    async def task(name: str) -> None:
        with hal.use(name):
            for _ in range(4):
                await asyncio.sleep(0)
                before = counts(pair)
                try:
                    call(*tensors)
                    log.append((name, [now - was for now, was in zip(counts(pair), before, strict=True)]))
                except SelectionChangedError as error:
                    refusals.append(str(error))

    async def both() -> None:
        await asyncio.gather(task("one"), task("two"))

    asyncio.run(both())
    assert len(log) + len(refusals) == 8
    assert all(ran == ([1, 0] if name == "one" else [0, 1]) for name, ran in log)
    assert all("pass backend=" in text for text in refusals)
    with hal.use("two"):  # and the process is as it was
        call(*tensors)
    assert relative_error(call(*tensors), reference(*tensors).out) <= 1e-5


def test_tasks_that_name_their_backend_are_always_right(
    pair: dict[str, FakeBackend], generator: torch.Generator
) -> None:
    tensors = draw(generator)
    calls = {name: compiled(lambda q, k, v, name=name: hal.attention(q, k, v, backend=name)) for name in pair}

    async def task(name: str) -> None:
        for _ in range(4):
            await asyncio.sleep(0)
            calls[name](*tensors)

    async def both() -> None:
        await asyncio.gather(task("one"), task("two"))

    asyncio.run(both())
    assert counts(pair) == [4, 4]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_use_inside_compiled_code_is_right_or_refused(
    pair: dict[str, FakeBackend], generator: torch.Generator, fullgraph: bool
) -> None:
    def inside(q: Any, k: Any, v: Any) -> Any:
        with hal.use("two"):
            return hal.attention(q, k, v)

    call = torch.compile(inside, backend="aot_eager", fullgraph=fullgraph)
    tensors = draw(generator)
    for _ in range(2):
        before = counts(pair)
        try:
            call(*tensors)
            ran = True
        except (SelectionChangedError, torch._dynamo.exc.TorchDynamoException):  # ours, or Dynamo's own refusal
            ran = False
        assert counts(pair) == [before[0], before[1] + ran]
    before = counts(pair)
    hal.attention(*tensors)
    assert counts(pair) == [before[0] + 1, before[1]]  # nothing was left behind


def test_growing_lengths_are_not_compiled_again_and_again(fake: Fake, generator: torch.Generator) -> None:
    backend = fake("one")
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(lambda q, k, v: hal.attention(q, k, v, causal="bottom_right", backend="one"), counter)
    for length in range(20, 40):
        tensors = draw(generator, len_q=3, len_k=length)
        assert relative_error(call(*tensors), reference(*tensors, causal="bottom_right").out) <= 1e-5
    assert counter.frame_count <= 2
    assert [r.len_k for _, r in backend.ran] == list(range(20, 40))


def test_dynamic_shapes_from_the_start(fake: Fake, generator: torch.Generator) -> None:
    fake("one", autograd="explicit")
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(lambda q, k, v: hal.attention(q, k, v, is_causal=True, backend="one"), counter, dynamic=True)
    for batch, length in ((2, 5), (3, 9), (2, 17), (5, 6)):
        tensors = draw(generator, batch, 4, length, dtype=DOUBLE, grad=True)
        out = call(*tensors)
        got = torch.autograd.grad(out.sum(), tensors)
        want = reference_gradients(*tensors, grad_out=torch.ones_like(out), is_causal=True)
        assert all(relative_error(g, w) <= 1e-10 for g, w in zip(got, want, strict=False))
    assert counter.frame_count <= 2


# Results and gradients

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"len_k": 9}, {"causal": "bottom_right", "diagonal": 1}),
    "window and softcap": ({"len_q": 9}, {"window": (3, None), "softcap": 2.0, "scale": 0.4}),
    "grouped heads": ({"heads": 6, "heads_kv": 2, "dim_v": 5}, {"enable_gqa": True}),
}


@pytest.mark.parametrize("autograd", ["native", "explicit"])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_gradients_are_those_of_float64(
    fake: Fake, generator: torch.Generator, name: str, mask: str, lse: bool, autograd: str
) -> None:
    fake("one", autograd=autograd)
    shape, options = CASES[name]
    tensors = draw(generator, **shape, dtype=DOUBLE, grad=True)
    size = (tensors[0].shape[2], tensors[1].shape[2])
    given: torch.Tensor | None = None
    if mask == "boolean":
        given = torch.rand(size, generator=generator) < 0.7
    if mask == "additive":
        given = torch.randn(size, generator=generator, dtype=DOUBLE).requires_grad_()
    leaves = [*tensors, *([given] if mask == "additive" else [])]
    call = compiled(lambda *t: hal.attention(*t, **options, return_lse=lse, backend="one"))
    result = call(*tensors, given)
    outs = [result.out, result.lse] if lse else [result]
    flowing = [torch.randn(o.shape, generator=generator, dtype=DOUBLE) for o in outs]
    finite = [out.masked_fill(out == -torch.inf, 0) for out in outs]
    got = torch.autograd.grad(finite, leaves, flowing)
    plain_options = {k: v for k, v in options.items() if k != "enable_gqa"}
    want_out = reference(*tensors, given, **plain_options)
    want = reference_gradients(
        *tensors, given, grad_out=flowing[0], grad_lse=flowing[1] if lse else None, **plain_options
    )
    assert all(relative_error(o, w) <= 1e-12 for o, w in zip(outs, want_out, strict=False))
    assert all(relative_error(g, w) <= 1e-10 for g, w in zip(got, want, strict=False))


def test_a_compiled_call_on_the_cpu_agrees_with_eager(cpu: str, generator: torch.Generator) -> None:
    for options in ({}, {"is_causal": True}, {"window": (3, 0)}, {"softcap": 3.0}):
        torch._dynamo.reset()
        tensors = draw(generator, len_q=33, len_k=33, grad=True)
        call = lambda *t, options=options: hal.attention(*t, **options, backend="cpu")  # noqa: E731
        eager, fast = call(*tensors), compiled(call)(*tensors)
        assert relative_error(fast, eager) <= 1e-6
        got, want = (torch.autograd.grad((out**2).sum(), tensors) for out in (fast, eager))
        assert all(relative_error(g, w) <= 1e-5 for g, w in zip(got, want, strict=True))


def test_only_the_gradients_that_are_needed_are_computed(fake: Fake, generator: torch.Generator) -> None:
    backend = fake("one", autograd="explicit")
    query, key, value = draw(generator, dtype=DOUBLE)
    key.requires_grad_()
    compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))(query, key, value).sum().backward()
    assert [r.grads for _, r in backend.backwards] == [{"k"}]
    assert query.grad is None
    with torch.no_grad():
        compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))(query, key, value)
    assert backend.ran[-1][1].grads == frozenset()


def test_a_compiled_graph_under_no_grad_and_with_grad(fake: Fake, generator: torch.Generator) -> None:
    fake("one", autograd="explicit")
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    call = compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))
    with torch.no_grad():
        assert not call(*tensors).requires_grad
    out = call(*tensors)
    want = reference_gradients(*tensors, grad_out=torch.ones_like(out))
    assert all(
        relative_error(g, w) <= 1e-10 for g, w in zip(torch.autograd.grad(out.sum(), tensors), want, strict=False)
    )


def test_backward_runs_where_forward_ran(pair: dict[str, FakeBackend], generator: torch.Generator) -> None:
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    call = compiled(lambda q, k, v: hal.attention(q, k, v))
    with hal.use("two"):
        out = call(*tensors)
    assert counts(pair) == [0, 1]
    try:  # the selection has ended: the other device is the automatic choice now
        got = torch.autograd.grad(out.sum(), tensors)
    except SelectionChangedError:
        got = None
    assert len(pair["one"].ran) == 0
    if got is not None:
        assert [name for name, _ in pair["two"].backwards] == ["two:0"]
        want = reference_gradients(*tensors, grad_out=torch.ones_like(out))
        assert all(relative_error(g, w) <= 1e-10 for g, w in zip(got, want, strict=False))


@pytest.mark.parametrize("autograd", ["explicit", "native"])
@pytest.mark.parametrize("in_graph", [True, False], ids=["compiled", "eager"])
def test_forward_and_backward_read_tensors_where_the_device_can(
    fake: Fake, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, in_graph: bool, autograd: str
) -> None:
    read: list[torch.Tensor] = []  # kept, so that no address is used twice

    def watched(name: str) -> None:
        method = getattr(FakeSession, name)

        def watch(self: Any, *given: Any, **named: Any) -> Any:
            read.extend(part for part in (*given, *named.values()) if isinstance(part, torch.Tensor))
            return method(self, *given, **named)

        monkeypatch.setattr(FakeSession, name, watch)

    watched("prepare_attention")
    watched("compute_attention_backward")
    fake("far", reads=("cpu:1",), autograd=autograd)  # .to("cpu:1") copies, as a transfer to another device does
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    mask = torch.randn(tensors[0].shape[2], tensors[1].shape[2], generator=generator, dtype=DOUBLE)

    def function(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return hal.attention(q, k, v, mask, backend="far", transfer=True)

    out = (compiled(function) if in_graph else function)(*tensors, mask)
    grad_out = torch.randn(out.shape, generator=generator, dtype=DOUBLE)
    got = torch.autograd.grad(out, tensors, grad_out)
    want = reference_gradients(*tensors, mask, grad_out=grad_out)
    assert all(relative_error(g, w) <= 1e-10 for g, w in zip(got, want, strict=False))
    assert len(read) >= 3
    given = (
        (*tensors, mask, out, grad_out) if in_graph else (*tensors, mask)
    )  # eager backward starts on the device itself
    assert not {part.data_ptr() for part in given} & {part.data_ptr() for part in read}


def test_a_block_plan_travels_through_the_operator(fake: Fake, generator: torch.Generator) -> None:
    fake("one")
    tensors = draw(generator, len_q=8, len_k=8)
    indices = torch.tensor([[1, 0], [0, 0]], dtype=torch.int32)[None, None]
    plan = hal.BlockPlan(4, 4, indices, torch.tensor([[[2, 1]]], dtype=torch.int32))

    def call(q: Any, k: Any, v: Any, i: Any, c: Any) -> Any:
        return hal.attention(q, k, v, block_plan=hal.BlockPlan(4, 4, i, c), backend="one")

    assert (
        relative_error(compiled(call)(*tensors, plan.indices, plan.counts), reference(*tensors, plan=plan).out) <= 1e-5
    )


def test_packed_sequences_travel_through_the_operator(cpu: str, generator: torch.Generator) -> None:
    query, key, value = draw(generator, 1, 2, 9, 9)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)

    def call(q: Any, k: Any, v: Any, e: Any) -> Any:
        tables = {"cu_seqlens_q": e, "cu_seqlens_k": e, "max_seqlen_q": 5, "max_seqlen_k": 5}
        return hal.attention(q, k, v, **tables, is_causal=True, backend="cpu")

    want = reference(query, key, value, tables=hal.SequenceMetadata(ends, ends), is_causal=True).out
    assert relative_error(compiled(call)(query, key, value, ends), want) <= 1e-5


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_compiled_attention_follows_autocast(
    fake: Fake, generator: torch.Generator, inner: torch.dtype, where: str
) -> None:
    backend = fake("one")
    tensors = draw(generator)

    def call(q: Any, k: Any, v: Any) -> Any:
        if where == "outside":
            return hal.attention(q, k, v, backend="one")
        with torch.autocast("cpu", dtype=inner):
            return hal.attention(q, k, v, backend="one")

    fast = compiled(call)
    for enabled in (True, False, True):
        with torch.autocast("cpu", dtype=inner, enabled=enabled and where == "outside"):
            out = fast(*tensors)
        want = inner if enabled or where == "inside" else torch.float32
        assert out.dtype == want
        assert backend.ran[-1][1].dtype == str(want).removeprefix("torch.")


@pytest.mark.parametrize("autograd", ["native", "explicit"])
def test_dropout_in_compiled_code(fake: Fake, generator: torch.Generator, seed: int, autograd: str) -> None:
    fake("one", autograd=autograd)
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    drawn = compiled(lambda q, k, v: hal.attention(q, k, v, dropout_p=0.5, backend="one"))
    first, second = drawn(*tensors), drawn(*tensors)
    assert not torch.equal(first, second)
    for out in (first, second):  # out is linear in value: backward must drop what its own forward dropped
        (grad,) = torch.autograd.grad(out.sum(), tensors[2])
        assert relative_error((grad * tensors[2]).sum(), out.sum()) <= 1e-10
    given = compiled(lambda q, k, v: hal.attention(q, k, v, dropout_p=0.5, rng=(seed, 1), backend="one"))(*tensors)
    keep = kept((2, 4, 7, 7), request_of(*tensors, dropout_p=0.5), (seed, 1)) != 0
    assert relative_error(given, reference(*tensors, dropout_p=0.5, keep=keep).out) <= 1e-12
    flowing = torch.randn(given.shape, generator=generator, dtype=DOUBLE)
    want = reference_gradients(*tensors, grad_out=flowing, dropout_p=0.5, keep=keep)
    assert all(
        relative_error(g, w) <= 1e-10 for g, w in zip(torch.autograd.grad(given, tensors, flowing), want, strict=False)
    )


def test_noise_in_compiled_code_comes_from_the_pair(fake: Fake, generator: torch.Generator, seed: int) -> None:
    numerics = {"float32": hal.Numerics(relative=0.1, gradient=0.1, noisy=True)}
    fake("noisy", noise=0.05, capabilities=full(dtypes=numerics, numerics=numerics))
    tensors = draw(generator, grad=True)
    eager = hal.attention(*tensors, rng=(seed, 2), backend="noisy")
    call = compiled(lambda q, k, v: hal.attention(q, k, v, rng=(seed, 2), backend="noisy"))
    assert torch.equal(call(*tensors), eager)
    out = call(*tensors)
    (grad,) = torch.autograd.grad(out.sum(), tensors[2])  # out is linear in value, and backward sees the same noise
    assert relative_error((grad * tensors[2]).sum(), out.sum()) <= 1e-4
    drawn = compiled(lambda q, k, v: (hal.attention(q, k, v, backend="noisy"), hal.attention(q, k, v, backend="noisy")))
    with torch.no_grad():
        first, second = drawn(*tensors)
    assert not torch.equal(first, second)
    with pytest.raises(hal.ContractError, match="pass rng="):  # backward could not repeat what forward drew
        drawn(*tensors)


def test_what_a_session_returns_is_laid_out_as_the_fake_promised(fake: Fake, generator: torch.Generator) -> None:
    def strided(query: Any, key: Any, value: Any, mask: Any, request: Any) -> Any:
        out, lse = attend(query, key, value, mask, request)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse

    fake("one", open=lambda backend, device: hal.SimpleSession(strided, autograd="native"))
    tensors = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(generator))
    call = compiled(lambda q, k, v: hal.attention(q, k, v, backend="one").view(-1))
    assert relative_error(call(*tensors), reference(*tensors).out.reshape(-1)) <= 1e-5
    assert not hal.attention(*tensors, backend="one").is_contiguous()  # eager keeps the device's strides


def test_a_meter_counts_compiled_calls(fake: Fake, generator: torch.Generator) -> None:
    fake("one")
    tensors = draw(generator, len_q=5, len_k=6)
    call = compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))
    call(*tensors)
    with hal.meter() as meter:
        call(*tensors)
        call(*tensors)
    assert meter.records["one:0"].calls == 2
    assert meter.records["one:0"].macs == 2 * 2 * 4 * 5 * 6 * 16


# Refusals


def test_a_device_that_cannot_refuses_in_compiled_code_too(fake: Fake, generator: torch.Generator) -> None:
    backend = fake("one", capabilities=plain(length=hal.Range(1, 16)))
    call = compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"), dynamic=True)
    call(*draw(generator, len_q=16))
    with pytest.raises(UnsupportedError, match="17 asked, 1 to 16 offered"):
        call(*draw(generator, len_q=17))
    assert len(backend.ran) == 1


def test_an_unregistered_backend_is_refused_after_compilation(fake: Fake, generator: torch.Generator) -> None:
    fake("one")
    fake("two")
    tensors = draw(generator)
    call = compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))
    call(*tensors)
    hal.unregister("one")
    with pytest.raises(UnknownBackendError, match="unknown backend 'one'"):
        call(*tensors)
    again = fake("one")
    call(*tensors)
    assert len(again.ran) == 1


def test_an_unknown_backend_is_refused(fake: Fake, generator: torch.Generator) -> None:
    fake("one")
    with pytest.raises(UnknownBackendError, match="did you mean 'one'"):
        compiled(lambda q, k, v: hal.attention(q, k, v, backend="onne"))(*draw(generator))


def test_a_backend_registered_after_compilation_is_found(fake: Fake, generator: torch.Generator) -> None:
    one = fake("one", time=1e-12)
    tensors, call = draw(generator), compiled(lambda q, k, v: hal.attention(q, k, v))
    call(*tensors)
    faster = fake("faster", time=1e-15)
    call(*tensors)
    assert (len(one.ran), len(faster.ran)) == (1, 1)


def test_bad_input_is_refused_in_compiled_code(fake: Fake, generator: torch.Generator) -> None:
    fake("one")
    query, key, value = draw(generator)
    with pytest.raises(hal.ContractError, match="scale nan"):
        compiled(lambda q, k, v: hal.attention(q, k, v, scale=float("nan"), backend="one"))(query, key, value)
    with pytest.raises(hal.ContractError, match="batch, heads and length must be equal"):
        compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))(query, key, value[:, :, :3])


# The operators themselves


@pytest.mark.parametrize("autograd", ["native", "explicit"])
@pytest.mark.parametrize("lse", [False, True])
def test_torch_s_own_check_of_the_operators(fake: Fake, generator: torch.Generator, autograd: str, lse: bool) -> None:
    fake("checked", autograd=autograd)
    seen: list[tuple[Any, ...]] = []

    def catch(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        values = dict(zip(placeholders, inputs, strict=True))
        (node,) = [n for n in graph.graph.nodes if str(n.target) == "hal.checked_forward.default"]
        seen.append(tuple(values.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args))
        return graph.forward

    mask = torch.randn(7, 7, generator=generator, dtype=DOUBLE).requires_grad_()
    tensors = draw(generator, dtype=DOUBLE, grad=True)
    call = lambda *t: hal.attention(*t, softcap=3.0, return_lse=lse, backend="checked")  # noqa: E731
    compiled(call, catch)(*tensors, mask)
    torch.library.opcheck(torch.ops.hal.checked_forward.default, seen[0])
    with torch.no_grad():
        compiled(call, catch)(*tensors, mask)
        torch.library.opcheck(torch.ops.hal.checked_forward.default, seen[1])


def test_changing_an_input_between_forward_and_backward_raises(fake: Fake, generator: torch.Generator) -> None:
    fake("one", autograd="explicit")
    query, key, value = (t * 1 for t in draw(generator, grad=True))
    out = compiled(lambda q, k, v: hal.attention(q, k, v, backend="one"))(query, key, value)
    with torch.no_grad():
        key.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


FIRST = """
import torch, hal_core as hal
from fakes import FakeBackend
hal.register(FakeBackend("one", autograd="explicit", time=1e-15))
q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
call = torch.compile(lambda q, k, v: hal.attention(q, k, v, is_causal=True{named}), backend="aot_eager", fullgraph=True)
out = call(q, k, v)
out.sum().backward()
want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
print(bool((out - want).norm() <= 1e-5 * want.norm()), q.grad.isfinite().all().item())
"""


@pytest.mark.parametrize("named", ["", pytest.param(', backend="one"', marks=pytest.mark.slow)])
def test_the_very_first_call_of_a_process_may_be_compiled(named: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "HAL_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FIRST.format(named=named)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None,
    reason="inductor needs a C++ compiler",
)
def test_inductor_gives_the_same(pair: dict[str, FakeBackend], generator: torch.Generator) -> None:
    def block(q: Any, k: Any, v: Any) -> Any:
        first = hal.attention(q * 2, k, v, is_causal=True, backend="one")
        return hal.attention(first.relu(), k, v, backend="two") + 1

    tensors = draw(generator, dtype=DOUBLE, grad=True)
    eager, fast = block(*tensors), compiled(block, "inductor")(*tensors)
    assert relative_error(fast, eager) <= 1e-12
    got, want = (torch.autograd.grad((out**2).sum(), tensors) for out in (fast, eager))
    assert all(relative_error(g, w) <= 1e-10 for g, w in zip(got, want, strict=True))


def test_eager_calls_do_not_go_through_operators(fake: Fake, generator: torch.Generator) -> None:
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    fake("one", open=FakeSession)
    with Watch():
        hal.attention(*draw(generator), backend="one")
    assert not [name for name in seen if name.startswith("hal.")]
