"""The Triton kernels beside attention, in Triton's interpreter. Run by tests/cuda/test_interpreted.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_cuda import kernels
from hal_cuda.kernels.extra import provided, references, specs
from interpreted_device import CHIP

from hal_core import ContractError
from hal_core.registry import resolve
from hal_core.testing import relative_error

TRITON = [spec for spec in specs.KERNELS if spec.name.startswith("triton_")]


def _wide(given: Any) -> list[Any]:
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("spec", TRITON, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kernel_agrees_with_the_reference_of_its_specification(
    spec: Any, dtype: str, generator: torch.Generator
) -> None:
    if dtype not in spec.tolerance:
        pytest.skip("the specification does not name this dtype")
    drawn = resolve(spec.sampler)(generator)
    kind = getattr(torch, dtype)
    given = [x.to(kind) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in drawn]
    want = resolve(spec.reference)(*_wide(given))
    call = getattr(kernels, spec.name) if "precompute" in spec.name else provided.kernel(spec.name, CHIP.index)
    got = call(*given)
    for x, y in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        assert relative_error(x, y) <= spec.tolerance[dtype]


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 17, 20), 1), ((3, 17, 20), 0), ((5, 1), 1), ((2, 0, 3), 1), ((), -1), ((6000,), None), ((1, 40000), -1)],
)
def test_sums_of_any_dimension(shape: tuple[int, ...], dim: int | None, generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator)
    want = x.double().sum() if dim is None else x.double().sum(dim)
    got = kernels.triton_reduce_sum(x, dim)
    assert got.shape == want.shape
    assert relative_error(got, want) <= 1e-6


def test_long_columns_are_cut_in_pieces(generator: torch.Generator) -> None:
    x = torch.randn(2, 300, 10, generator=generator)
    assert relative_error(kernels.triton_reduce_sum(x, 1), x.double().sum(1)) <= 1e-6
    assert torch.equal(kernels.triton_reduce_max(x, 1), x.amax(1))


def test_dimensions_in_any_order_are_read_where_they_lie(generator: torch.Generator) -> None:
    x = torch.randn(4, 6, 10, generator=generator).permute(2, 0, 1)
    for given in (x, x[::2], x.expand(10, 4, 6)):
        for dim in (0, 1, 2):
            assert relative_error(kernels.triton_reduce_sum(given, dim), given.double().sum(dim)) <= 1e-6


def test_a_maximum_is_nan_where_an_element_is(generator: torch.Generator) -> None:
    x = torch.randn(3, 40, generator=generator)
    x[1, 7] = math.nan
    x[2] = -math.inf
    got = kernels.triton_reduce_max(x, 1)
    assert math.isnan(got[1])
    assert got[2] == -math.inf
    assert got[0] == x[0].max()


def test_query_and_key_are_turned_where_they_lie(generator: torch.Generator) -> None:
    q = torch.randn(2, 33, 9, 12, generator=generator).transpose(1, 2)
    k = torch.randn(2, 1, 33, 12, generator=generator)
    cos, sin = kernels.triton_rope_precompute_freqs(40, 12, 500.0)
    want = references.rope_forward_fused(q.double(), k.double(), 500.0)
    for got in (kernels.triton_rope_forward(q, k, cos, sin), kernels.triton_rope_forward_fused(q, k, 500.0)):
        assert all(relative_error(x, y) <= 1e-6 for x, y in zip(got, want, strict=True))


def test_angles_of_far_positions_are_exact() -> None:
    """An angle of 70,000 radians in float32 is wrong by up to 4e-3."""
    cos, sin = kernels.triton_rope_precompute_freqs(70000, 2)
    want = torch.arange(70000, dtype=torch.float64)
    assert float((cos[:, 0] - want.cos()).abs().max()) <= 2e-7
    assert float((sin[:, 0] - want.sin()).abs().max()) <= 2e-7


def test_tokens_outside_the_pool_are_left_out(generator: torch.Generator) -> None:
    guarded = torch.full((6, 2, 3, 4, 10), 7.0)
    guarded[1:-1].zero_()
    keys, values = (torch.randn(5, 3, 10, generator=generator) for _ in range(2))
    slots = torch.tensor([-1, 16, 2, -(1 << 31), (1 << 31) - 1], dtype=torch.int32)
    kernels.triton_paged_kv_cache_append(guarded[1:-1], slots, keys, values)
    assert bool((guarded[[0, -1]] == 7.0).all())
    assert torch.equal(guarded[1, :, :, 2], torch.stack((keys[2], values[2])))
    assert int((guarded[1:-1] != 0).sum()) == 2 * keys[2].numel()


def test_pages_outside_the_pool_and_lengths_beyond_the_pages_read_zeros(generator: torch.Generator) -> None:
    pool = torch.randn(4, 2, 3, 4, 10, generator=generator)
    table = torch.tensor([[0, 4, 3], [-1, 2, 1 << 30]], dtype=torch.int32)
    lengths = torch.tensor([100, 7], dtype=torch.int32)
    got = kernels.triton_paged_kv_cache_read(pool, table, lengths, 20)
    want = references.paged_kv_cache_read(pool, table, lengths, 20)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert bool((got[0][:, :, 12:] == 0).all())


def test_a_cache_gives_back_what_was_put_in(generator: torch.Generator) -> None:
    cache = kernels.PagedKVCache(6, 4, 3, 10, torch.float32, "triton", device="cpu")
    keys, values = (torch.randn(11, 3, 10, generator=generator) for _ in range(2))
    cache.append(7, keys[0], values[0])  # one token
    cache.append(2, keys[:3], values[:3])
    cache.append(7, keys[1:9], values[1:9])
    assert [cache.get_seq_len(n) for n in (7, 2, 5)] == [9, 3, 0]
    assert cache.num_free_pages == 2
    got = cache.read([7, 2, 5])
    for row, count in enumerate((9, 3, 0)):
        for found, given in zip(got, (keys, values), strict=True):
            assert torch.equal(found[row, :, :count].transpose(0, 1), given[:count])
            assert bool((found[row, :, count:] == 0).all())
    used = cache.memory_used_mb
    cache.free_sequence(7)
    cache.free_sequence(7)
    assert cache.num_free_pages == 5
    assert used == pytest.approx(4 * cache.memory_used_mb)


def test_a_full_cache_refuses_and_stays_as_it_was(generator: torch.Generator) -> None:
    from hal_core import MemoryLimitError

    cache = kernels.PagedKVCache(2, 4, 1, 2, torch.float32, "triton", device="cpu")
    keys = torch.randn(9, 1, 2, generator=generator)
    cache.append(0, keys[:5], keys[:5])
    with pytest.raises(MemoryLimitError):
        cache.append(0, keys[:4], keys[:4])
    assert (cache.get_seq_len(0), cache.num_free_pages) == (5, 0)
    assert torch.equal(cache.read([0])[0][0, 0], keys[:5, 0])


@pytest.mark.parametrize("stored", ["[N, K]", "[K, N]", "columns apart"])
def test_weights_are_multiplied_where_they_lie(stored: str, generator: torch.Generator) -> None:
    x, w = torch.randn(20, 33, generator=generator), torch.randn(40, 33, generator=generator)
    given = {"[N, K]": w, "[K, N]": w.T.contiguous().T, "columns apart": torch.stack((w, w), 2)[..., 0]}[stored]
    want = references.fused_gelu_linear(x.double(), w.double())
    assert relative_error(kernels.triton_fused_gelu_linear(x, given), want) <= 1e-6


def test_a_fused_product_has_gradients(generator: torch.Generator) -> None:
    drawn = [torch.randn(shape, generator=generator) for shape in ((9, 5), (7, 5), (7,))]
    found = []
    for kind, linear in (
        (torch.float32, kernels.triton_fused_gelu_linear),
        (torch.float64, references.fused_gelu_linear),
    ):
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in drawn]
        linear(*leaves, True).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(relative_error(x, y) <= 1e-5 for x, y in zip(*found, strict=True))


def test_gradients_of_the_others_are_refused_not_lost() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ContractError, match="requires gradients"):
        kernels.triton_reduce_sum(x)
    with torch.no_grad():
        assert kernels.triton_reduce_sum(x) == 3


BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("triton_reduce_sum", (torch.ones(3), 1), "dim 1 of a tensor of shape .3.: use -1 to 0"),
    ("triton_reduce_sum", (torch.ones(3, dtype=torch.int32),), "int32: use float32, float16 or bfloat16"),
    ("triton_reduce_max", (torch.ones(0),), "nothing has no maximum"),
    ("triton_fused_gelu_linear", (torch.ones(2, 3), torch.ones(4, 5)), r"use \[M, K\] and \[N, K\]"),
    ("triton_fused_gelu_linear", (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"use \[4\]"),
    ("triton_fused_gelu_linear", (torch.ones(2, 3), torch.ones(4, 3).half()), "float32 and float16"),
    ("triton_rope_forward_fused", (torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 5)), "even D"),
    ("triton_rope_forward_fused", (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), -1.0), "base -1.0"),
    (
        "triton_rope_forward",
        (*(torch.ones(1, 2, 3, 4) for _ in range(2)), torch.ones(2, 2), torch.ones(2, 2)),
        "L 3 or more",
    ),
    ("triton_rope_precompute_freqs", (10, 7), "head_dim 7"),
    (
        "triton_paged_kv_cache_append",
        (torch.ones(2, 2, 1, 4, 8), torch.zeros(3), torch.ones(3, 1, 8), torch.ones(3, 1, 8)),
        "slot_mapping of float32: use int32",
    ),
    (
        "triton_paged_kv_cache_append",
        (torch.ones(2, 2, 1, 4, 8), torch.zeros(3, dtype=torch.int32), torch.ones(3, 2, 8), torch.ones(3, 1, 8)),
        r"use \[T\], and \[T, 1, 8\] twice",
    ),
    (
        "triton_paged_kv_cache_read",
        (torch.ones(2, 3, 1, 4, 8), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 4),
        "page size, head_dim",
    ),
    ("triton_flash_attention_forward", (*(torch.ones(1, 2, 3, 4) for _ in range(2)), torch.ones(1, 2, 4, 4)), "twice"),
]


@pytest.mark.parametrize(("name", "given", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_with_a_sentence(name: str, given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        getattr(kernels, name)(*given)


def test_gpt2_gives_the_same_patched(generator: torch.Generator) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=50)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 50, (2, 7), generator=generator)
    keep = torch.ones(2, 7, dtype=torch.long)
    keep[1, :3] = 0
    with torch.no_grad():
        want = model(tokens).logits, model(tokens, attention_mask=keep).logits[1, 3:]
        before = set(model.transformer.h[0].mlp.__dict__)
        assert kernels.patch_gpt2_model(model, "triton") is model
        assert kernels.patch_gpt2_model(model, "triton") is model  # twice is once
        got = model(tokens).logits, model(tokens, attention_mask=keep).logits[1, 3:]
        made = model.generate(tokens[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert model.config._attn_implementation == "hal_cuda"
    assert all(relative_error(x, y.double()) <= 1e-5 for x, y in zip(got, want, strict=True))
    kernels.unpatch_gpt2_model(model)
    kernels.unpatch_gpt2_model(model)
    assert model.config._attn_implementation == "sdpa"
    assert set(model.transformer.h[0].mlp.__dict__) == before
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, want[0])
        again = model.generate(tokens[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(made, again)
