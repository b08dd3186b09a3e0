"""PyTorch's attention calls on a GPU with own kernels behind them: results, gradients, compilation, graphs, threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_reference import BOUND, draw, error, exact
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
aten = torch.ops.aten


@pytest.fixture
def own(gpu: str) -> Iterator[None]:
    """Own kernels behind PyTorch's operators wherever they are right."""
    import hal_cuda

    hal_cuda.sdpa_statistics(reset=True)
    with hal_cuda.activate_sdpa(always=True):
        yield
    hal_cuda.sdpa_statistics(reset=True)


def counted() -> dict[str, int]:
    import hal_cuda

    found = hal_cuda.sdpa_statistics()
    assert found.original == {}, found.reasons
    return dict(found.own)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    causal = "top_left" if options.pop("is_causal", False) else "none"
    return exact(query, key, value, mask, causal=causal, **options)


def gradients(tensors: list[Tensor], grad: Tensor, mask: Tensor | None = None, causal: bool = False) -> Any:
    """Gradients in float64."""
    query, key, value = (t.detach().double().requires_grad_() for t in tensors)
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * query.shape[3] ** -0.5
    if causal:
        band = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~band, -math.inf)
    scores = scores if mask is None else scores + mask
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ value.repeat_interleave(group, 1)
    return torch.autograd.grad(out, (query, key, value), grad.double())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_call_and_its_gradients(own: None, seed: int, backend: str, causal: bool, dim: int) -> None:
    layout = "heads first" if dim == 64 else "heads last"
    tensors = [draw(seed + i, 2, 4, 700, dim, torch.bfloat16, layout).requires_grad_() for i in range(3)]
    with sdpa_kernel(BACKENDS[backend]):
        out = F.scaled_dot_product_attention(*tensors, is_causal=causal)
    want, _ = attended(*[t.detach() for t in tensors], is_causal=causal)
    assert error(out.detach(), want) <= BOUND[torch.bfloat16]
    grad = draw(seed + 3, 2, 4, 700, dim, torch.bfloat16)
    for got, exact_grad in zip(
        torch.autograd.grad(out, tensors, grad), gradients(tensors, grad, causal=causal), strict=True
    ):
        assert error(got, exact_grad) <= 2 * BOUND[torch.bfloat16]
    name = f"_scaled_dot_product_{backend}_attention"
    assert counted() == {name: 1, f"{name}_backward": 1}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_forward_and_backward_may_be_of_different_makers(gpu: str, seed: int, backend: str, causal: bool) -> None:
    """Both ways: what an own forward saves serves the original backward, and the reverse."""
    import hal_cuda

    tensors = [draw(seed + i, 2, 4, 333, 64, torch.bfloat16).requires_grad_() for i in range(3)]
    grad = draw(seed + 3, 2, 4, 333, 64, torch.bfloat16)
    want = gradients(tensors, grad, causal=causal)
    for first in (True, False):
        found: list[Tensor] = []
        with sdpa_kernel(BACKENDS[backend]):
            if first:
                with hal_cuda.activate_sdpa(always=True):
                    out = F.scaled_dot_product_attention(*tensors, is_causal=causal)
                found = list(torch.autograd.grad(out, tensors, grad))
            else:
                out = F.scaled_dot_product_attention(*tensors, is_causal=causal)
                with hal_cuda.activate_sdpa(always=True):
                    found = list(torch.autograd.grad(out, tensors, grad))
        for got, exact_grad in zip(found, want, strict=True):
            assert error(got, exact_grad) <= 2 * BOUND[torch.bfloat16], first


def test_rows_without_keys_between_makers(gpu: str, seed: int) -> None:
    """A bias that hides whole rows: 0, and gradients of 0, whichever kernel runs which way."""
    import hal_cuda

    tensors = [draw(seed + i, 1, 2, 64, 64, torch.float16).requires_grad_() for i in range(3)]
    bias = torch.zeros(1, 2, 64, 64, device="cuda", dtype=torch.float16)
    bias[:, :, 5] = -math.inf
    grad = draw(seed + 3, 1, 2, 64, 64, torch.float16)
    found = {}
    for first in (True, False):
        for second in (True, False):
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                if first:
                    with hal_cuda.activate_sdpa(always=True):
                        out = F.scaled_dot_product_attention(*tensors, attn_mask=bias)
                else:
                    out = F.scaled_dot_product_attention(*tensors, attn_mask=bias)
                if second:
                    with hal_cuda.activate_sdpa(always=True):
                        got = torch.autograd.grad(out, tensors, grad)
                else:
                    got = torch.autograd.grad(out, tensors, grad)
            found[first, second] = [bool(t.isfinite().all()) for t in (out, *got)]
    assert found[True, True] == [True] * 4
    assert found[True, False] == found[False, False], found
    assert found[False, True] == found[False, False], found


@pytest.mark.parametrize("kind", ["boolean", "additive", "keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks_and_float32(own: None, seed: int, kind: str, dtype: torch.dtype) -> None:
    tensors = [draw(seed + i, 2, 4, 260, 64, dtype, "heads last").requires_grad_() for i in range(3)]
    seen = torch.rand((2, 1, 1, 260) if kind == "keys" else (2, 4, 260, 260), device="cuda") > 0.4
    mask = torch.zeros(seen.shape, device="cuda", dtype=dtype).masked_fill(~seen, -math.inf)
    given = seen if kind == "boolean" else mask
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = F.scaled_dot_product_attention(*tensors, attn_mask=given)
    assert error(out.detach(), attended(*[t.detach() for t in tensors], mask)[0]) <= BOUND[dtype]
    grad = draw(seed + 3, 2, 4, 260, 64, dtype)
    for got, want in zip(torch.autograd.grad(out, tensors, grad), gradients(tensors, grad, mask), strict=True):
        assert error(got, want) <= max(2 * BOUND[dtype], 1e-5)
    assert sum(counted().values()) == 2


def test_grouped_heads_of_the_default_choice(own: None, seed: int) -> None:
    query = draw(seed, 2, 8, 512, 128, torch.bfloat16).requires_grad_()
    key, value = (draw(seed + i, 2, 2, 512, 128, torch.bfloat16).requires_grad_() for i in (1, 2))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert error(out.detach(), attended(query.detach(), key.detach(), value.detach(), is_causal=True)[0]) <= 4e-3
    out.sum().backward()
    want = gradients([query, key, value], torch.ones_like(out), causal=True)
    assert error(key.grad, want[1]) <= 8e-3
    assert sum(counted().values()) == 2


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_compiled_step_is_one_graph(own: None, seed: int, backend: str) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query * 2, key, value, is_causal=True).transpose(1, 2).flatten(2)

    tensors = [draw(seed + i, 2, 4, 256, 64, torch.bfloat16, "heads last").requires_grad_() for i in range(3)]
    with sdpa_kernel(BACKENDS[backend]):
        want = step(*tensors)
        want_grads = torch.autograd.grad(want.sum(), tensors)
        eager = sum(counted().values())
        out = torch.compile(step, fullgraph=True)(*tensors)
        grads = torch.autograd.grad(out.sum(), tensors)
    assert error(out.detach(), want.detach()) <= 4e-3
    for got, expected in zip(grads, want_grads, strict=True):
        assert error(got, expected) <= 8e-3
    assert sum(counted().values()) == 2 * eager == 4  # of which backend, PyTorch chooses anew when it compiles


def test_a_compiled_step_in_graphs(own: None, seed: int) -> None:
    """torch.compile records graphs of forward and backward by itself, and replays them."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query * 2, key, value, is_causal=True).float().square().sum()

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for turn in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        tensors = [draw(seed + 10 * turn + i, 1, 4, 256, 64, torch.bfloat16).requires_grad_() for i in range(3)]
        grads = [g.clone() for g in torch.autograd.grad(compiled(*tensors), tensors)]
        want = torch.autograd.grad(step(*tensors), tensors)
        for got, expected in zip(grads, want, strict=True):
            assert error(got, expected) <= 1e-2


def test_a_graph_is_replayed_on_new_numbers(own: None, seed: int) -> None:
    query, key, value = (draw(seed + i, 1, 4, 512, 64, torch.bfloat16) for i in range(3))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    query.copy_(draw(seed + 9, 1, 4, 512, 64, torch.bfloat16))
    graph.replay()
    assert error(out, attended(query, key, value, is_causal=True)[0]) <= 4e-3
    assert sum(counted().values()) == 3


def test_autocast_reaches_own_kernels(own: None, seed: int) -> None:
    query, key, value = (draw(seed + i, 1, 4, 300, 64, torch.float32) for i in range(3))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(query, key, value)
    assert out.dtype == torch.bfloat16
    assert error(out, attended(query, key, value)[0]) <= 1e-2
    assert sum(counted().values()) == 1


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0), (30, 20)])
def test_packed_sequences_of_torch(own: None, seed: int, window: tuple[int, int]) -> None:
    from torch.nn.attention.varlen import varlen_attn

    lengths = [100, 1, 400, 130]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    tensors = [
        draw(seed + i, 1, 4, sum(lengths), 64, torch.bfloat16, "heads last")[0].transpose(0, 1).requires_grad_()
        for i in range(3)
    ]
    out = varlen_attn(*tensors, ends, ends, 400, 400, window_size=window)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad)
    assert counted() == {"_flash_attention_forward": 1, "_flash_attention_backward": 1}
    for start, length in zip(ends.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        parts = [t.detach()[rows].transpose(0, 1)[None] for t in tensors]
        apart = torch.arange(length, device="cuda")[None] - torch.arange(length, device="cuda")[:, None]
        seen = torch.ones_like(apart, dtype=torch.bool)
        seen &= apart >= -window[0] if window[0] >= 0 else True
        seen &= apart <= window[1] if window[1] >= 0 else True
        bias = torch.zeros(seen.shape, device="cuda", dtype=torch.float64).masked_fill(~seen, -math.inf)
        assert error(out[rows].detach().transpose(0, 1)[None], attended(*parts, bias)[0]) <= 4e-3
        want = gradients(parts, grad[rows].transpose(0, 1)[None], bias)
        for got, expected in zip(grads, want, strict=True):
            assert error(got[rows].transpose(0, 1)[None], expected) <= 1e-2


def test_dropout_is_the_originals(gpu: str, seed: int) -> None:
    import hal_cuda

    query = draw(seed, 1, 4, 300, 64, torch.bfloat16)
    hal_cuda.sdpa_statistics(reset=True)
    with hal_cuda.activate_sdpa(always=True), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.manual_seed(seed)
        one = F.scaled_dot_product_attention(query, query, query, dropout_p=0.3)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.manual_seed(seed)
        two = F.scaled_dot_product_attention(query, query, query, dropout_p=0.3)
    assert torch.equal(one, two)
    found = hal_cuda.sdpa_statistics(reset=True)
    assert found.own == {}
    assert list(found.original.values()) == [1]
    assert "dropout" in next(iter(found.reasons))


def test_the_faster_kernel_serves(gpu: str, seed: int) -> None:
    """Every call is counted once, on own kernels or with the reason for the original."""
    import hal_cuda

    hal_cuda.sdpa_statistics(reset=True)
    with hal_cuda.activate_sdpa():
        for length in (128, 2048):
            query = draw(seed, 1, 4, length, 128, torch.bfloat16).requires_grad_()
            F.scaled_dot_product_attention(query, query, query).sum().backward()
    found = hal_cuda.sdpa_statistics(reset=True)
    assert sum(found.own.values()) + sum(found.original.values()) == 4
    assert set(found.reasons) <= {"the original is estimated to be faster"}


def test_activations_count_and_end(gpu: str, seed: int) -> None:
    import hal_cuda

    query = draw(seed, 1, 2, 64, 64, torch.bfloat16)

    def own_calls() -> int:
        hal_cuda.sdpa_statistics(reset=True)
        F.scaled_dot_product_attention(query, query, query)
        return sum(hal_cuda.sdpa_statistics(reset=True).own.values())

    assert own_calls() == 0
    assert not hal_cuda.deactivate_sdpa()
    hal_cuda.activate_sdpa(always=True)
    with hal_cuda.activate_sdpa(always=True):
        assert own_calls() == 1
    assert own_calls() == 1
    assert hal_cuda.deactivate_sdpa()
    assert not hal_cuda.deactivate_sdpa()
    assert own_calls() == 0


def test_the_first_call_of_a_thread_may_be_an_own_kernel(gpu: str, seed: int) -> None:
    """Nothing of CUDA's runtime has run in it, and memory comes from torch's cache."""
    import hal_core as hal

    query = draw(seed, 1, 4, 200, 64, torch.bfloat16)
    want = attended(query, query, query)[0]
    torch.empty(1 << 24, device="cuda")
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(hal.attention(query, query, query, return_lse=True, backend=gpu).out)
        except Exception as problem:
            found.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert isinstance(found[0], Tensor), found
    assert error(found[0], want) <= 4e-3


def test_threads_may_activate_and_call_at_once(gpu: str, seed: int) -> None:
    import hal_cuda

    query = draw(seed, 1, 4, 200, 64, torch.bfloat16)
    want = attended(query, query, query)[0]
    failures: list[Any] = []

    def work(toggles: bool) -> None:
        try:
            for _ in range(20):
                if toggles:
                    with hal_cuda.activate_sdpa(always=True):
                        out = F.scaled_dot_product_attention(query, query, query)
                else:
                    out = F.scaled_dot_product_attention(query, query, query)
                torch.cuda.synchronize()
                assert error(out, want) <= 4e-3
        except Exception as problem:
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not hal_cuda.deactivate_sdpa()


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_operators_keep_their_contracts(own: None, seed: int, backend: str) -> None:
    """`torch.library.opcheck`: schema and fake kernel, of forward and backward."""
    query, key, value = (draw(seed + i, 2, 2, 40, 32, torch.float16) for i in range(3))
    name = f"_scaled_dot_product_{backend}_attention"
    forward, backward = (getattr(aten, n).default for n in (name, f"{name}_backward"))
    extra = () if backend == "flash" else (None, True)
    given = (query, key, value, *extra, 0.0, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, given, test_utils=checks)
    result = forward(*given)
    grad = torch.randn_like(result[0])
    if backend == "efficient":
        out, lse, rng, offset = result
        last = (query, key, value, None, out, lse, rng, offset, 0.0, [True, True, True, False], True)
    elif backend == "flash":
        last = (query, key, value, *result[:2], None, None, 40, 40, 0.0, True, *result[6:8])
    else:
        last = (query, key, value, *result[:2], *result[6:8], None, None, None, 40, 40, 0.0, True)
    torch.library.opcheck(backward, (grad, *last), test_utils=checks)
    assert sum(counted().values()) > 2


def test_gradcheck_in_float32(own: None, seed: int) -> None:
    tensors = [draw(seed + i, 1, 2, 5, 8, torch.float32).requires_grad_() for i in range(3)]

    def attend(*given: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(*given, is_causal=True)

    assert torch.autograd.gradcheck(attend, tensors, eps=1e-2, atol=2e-3, rtol=1e-2)
    assert sum(counted().values()) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_portable_path_in_the_memory_of_a_smaller_chip(gpu: str, seed: int, dtype: torch.dtype) -> None:
    """Forward and backward by the plain Triton kernels alone, with 99 KB of shared memory, as on 8.6 and 8.9."""
    import attrs
    from hal_cuda.backend import CudaBackend
    from hal_cuda.session import CudaSession

    import hal_core as hal
    from hal_core.registry import registry

    backend, found = registry.backend_of(gpu), registry.find(gpu)[0]
    assert isinstance(backend, CudaBackend)
    chip = attrs.evolve(backend.chip(found), shared_memory=99 << 10)
    session = CudaSession(found, chip, lambda: backend.rates(found), paths=frozenset({"portable"}))
    for dim in (64, 128, 256):
        tensors = [draw(seed + i, 1, 4, 300, dim, dtype) for i in range(3)]
        request = hal.explain(*tensors, is_causal=True, backend=gpu, return_lse=True).request
        prepared = session.prepare_attention(*tensors, request=request)
        out, lse = session.compute_attention(prepared)
        assert error(out, attended(*tensors, is_causal=True)[0]) <= BOUND[dtype]
        grad = draw(seed + 4, 1, 4, 300, dim, dtype)
        trained = session.prepare_attention(
            *tensors, request=hal.AttentionRequest.from_dict(request.to_dict() | {"grads": ["q", "k", "v"]})
        )
        got = session.compute_attention_backward(trained, out, lse, grad)
        for one, two in zip(got[:3], gradients(tensors, grad, causal=True), strict=True):
            assert error(one, two) <= max(2 * BOUND[dtype], 1e-5)


def test_a_model_of_transformers_trains_unmodified(own: None, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    tokens = torch.randint(0, 1000, (2, 300), device="cuda")
    losses, norms = [], []
    for original in (False, True):
        model.zero_grad()
        if original:
            import hal_cuda

            before = counted()
            hal_cuda.deactivate_sdpa()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss))
        norms.append(float(sum(p.grad.float().norm() ** 2 for p in model.parameters()) ** 0.5))
    assert sum(before.values()) == 4
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
