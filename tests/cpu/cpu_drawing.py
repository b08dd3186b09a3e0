"""Random attention calls for the CPU's tests, and what they are held to."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, Causal, SequenceMetadata
from hal_core.testing import reference, reference_gradients, relative_error, request_of

#: ||x - reference|| / ||reference|| of output, log-sum-exp and gradients.
BOUNDS = {
    "float64": (1e-13, 1e-13, 1e-11),
    "float32": (1e-5, 1e-5, 1e-5),
    "bfloat16": (4e-3, 1e-4, 2e-2),
    "float16": (1e-3, 1e-4, 5e-3),
}


class Call(NamedTuple):
    """One call of hal.attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    plan: BlockPlan | None
    tables: SequenceMetadata | None
    options: dict[str, Any]
    grads: frozenset[str]

    @property
    def request(self) -> AttentionRequest:
        return request_of(
            self.query,
            self.key,
            self.value,
            self.mask,
            plan=self.plan,
            tables=self.tables,
            grads=self.grads,
            **self.options,
        )

    def run(self, leaves: dict[str, Tensor | None] | None = None) -> Any:
        tensors = leaves or dict(zip(("q", "k", "v", "mask"), self[:4], strict=True))
        tables = self.tables._asdict() if self.tables is not None else {}
        return hal.attention(
            *tensors.values(), enable_gqa=True, block_plan=self.plan, backend="cpu", **self.options, **tables
        )  # type: ignore[arg-type]


def draw(seed: int, feature: str, dtype: str) -> Call:
    """A call that uses `feature` ("plain", "mask", "window", ..., "packed", "paged", "fp8", "int"), everything else by
    chance.
    """
    chance, generator = random.Random(f"{seed} {feature} {dtype}"), torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    batch, heads_kv, group = chance.randint(1, 3), chance.randint(1, 3), chance.choice([1, 1, 2, 4])
    heads = heads_kv * group
    len_q, len_k = chance.choice([1, 1, 2, 7, 33, 130]), chance.choice([1, 5, 64, 129, 700])
    dim = chance.choice([1, 8, 32, 64])
    dim_v = chance.choice([dim, dim, 16, 80])
    options: dict[str, Any] = {"return_lse": chance.random() < 0.5}
    tables = None
    query = normal(batch, heads, len_q, dim)
    key, value = (normal(batch, heads_kv, len_k, size) for size in (dim, dim_v))
    if feature == "packed":
        lens_q, lens_k = ([chance.choice([0, 1, 5, 40, 130]) for _ in range(batch)] for _ in range(2))
        query, key = normal(1, heads, sum(lens_q), dim), normal(1, heads_kv, sum(lens_k), dim)
        value = normal(1, heads_kv, sum(lens_k), dim_v)
        tables = SequenceMetadata(*(torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)))
        options |= {"max_seqlen_q": max(lens_q), "max_seqlen_k": max(lens_k)}
        len_q, len_k = max(lens_q), max(lens_k)
    elif feature == "paged":
        size, most = chance.choice([1, 4, 16, 64]), chance.choice([1, 3, 9])
        pages, len_k = batch * most + 2, most * size
        key, value = normal(pages, heads_kv, size, dim), normal(pages, heads_kv, size, dim_v)
        order = torch.randperm(pages, generator=generator)[: batch * most].view(batch, most).int()
        held = torch.tensor([chance.randint(0, len_k) for _ in range(batch)]).int()
        tables = SequenceMetadata(page_table=order, cache_seqlens=held)
    elif feature == "fp8":
        narrow = chance.choice([torch.float8_e4m3fn, torch.float8_e5m2])
        key, value = key.to(narrow), value.to(narrow)
        shape = chance.choice([(1, 1, 1, 1), (batch, 1, 1, 1), (batch, heads_kv, 1, 1), (1, heads_kv, 1, 1)])
        scales = (torch.rand(shape, generator=generator) + 0.5 for _ in range(2))
        tables = SequenceMetadata(None, None, None, None, *scales)
    elif feature == "int":
        made = hal.quantize_cache(
            normal(batch, heads_kv, len_k, 2 * dim),
            normal(batch, heads_kv, len_k, 2 * dim_v),
            chance.choice(["int8", "int4"]),
            values=chance.choice(["token", "head"]),
            shared=chance.random() < 0.5,
        )
        query, key, value = normal(batch, heads, len_q, 2 * dim), made.key, made.value
        tables = SequenceMetadata(key_scale=made.key_scale, value_scale=made.value_scale)
    elif feature == "strides":
        key = normal(batch, heads_kv, dim, len_k).mT
        value = normal(batch, len_k, heads_kv, dim_v).transpose(1, 2)
        query = normal(batch, heads, len_q, 2 * dim)[..., ::2]
        if chance.random() < 0.5:
            key, value = key[:1].expand(batch, -1, -1, -1), value[:, :1].expand(-1, heads_kv, -1, -1)
    mask = None
    if feature != "packed" and (feature == "mask" or chance.random() < 0.3):
        shape = tuple(chance.choice([1, size]) for size in (batch, heads, len_q, len_k))[chance.choice([0, 0, 1, 2]) :]
        visible = torch.rand(shape, generator=generator) > 0.3
        mask = visible
        if chance.random() < 0.5:
            mask = torch.randn(shape, generator=generator).masked_fill(~visible, -torch.inf)
            mask = mask.to(chance.choice([kind, torch.float32]))
    if feature == "causal" or chance.random() < 0.4:
        options["causal"] = chance.choice([Causal.TOP_LEFT, Causal.BOTTOM_RIGHT])
        options["diagonal"] = chance.choice([0, 0, chance.randint(-20, 20)])
    if feature == "window" or chance.random() < 0.2:
        options["window"] = (chance.choice([None, 0, 3, 100]), chance.choice([None, 0, 3, 100]))
    if feature == "softcap" or chance.random() < 0.2:
        options["softcap"] = chance.choice([0.5, 5.0, 30.0, 50.0, 200.0])
    if chance.random() < 0.2:
        options["scale"] = chance.choice([1.0, 0.1, 0.0, -0.3])
    plan = None
    if (feature == "plan" or chance.random() < 0.1) and len_q and len_k:
        plan = draw_plan(chance, generator, (batch, heads, len_q, len_k))
    grads: frozenset[str] = frozenset()
    if feature not in ("paged", "fp8", "int") and chance.random() < 0.7:
        grads = frozenset(name for name in "qkv" if chance.random() < 0.8) or frozenset("q")
        if mask is not None and mask.dtype != torch.bool and chance.random() < 0.6:
            grads |= {"mask"}
    return Call(query, key, value, mask, plan, tables, options, grads)


def draw_plan(chance: random.Random, generator: torch.Generator, shape: tuple[int, int, int, int]) -> BlockPlan:
    """A block plan whose lists hold some blocks twice, and rows without any block."""
    batch, heads, len_q, len_k = shape
    block_q, block_k = chance.choice([16, 32]), chance.choice([16, 64])
    blocks_q, blocks_k = -(-len_q // block_q), -(-len_k // block_k)
    most = min(3, blocks_k)
    lead = (chance.choice([1, batch]), chance.choice([1, heads]))
    indices = torch.randint(0, blocks_k, (*lead, blocks_q, most), generator=generator, dtype=torch.int32)
    counts = torch.randint(0, most + 1, (*lead, blocks_q), generator=generator, dtype=torch.int32)
    return BlockPlan(block_q, block_k, indices, counts)


def few_numbers(call: Call, out: Tensor, want: Tensor) -> bool:
    """Whether an output of a few 16-bit numbers is within what rounding alone explains.

    A norm over so few does not average, and a sum over keys may cancel to almost 0. Rounding each weight and each
    output to unit roundoff u moves an output by at most 2u times the sum of weight times |value|.
    """
    if out.numel() >= 64 or out.dtype not in (torch.bfloat16, torch.float16):
        return False
    terms = reference(
        call.query,
        call.key,
        call.value.float().abs().to(call.value.dtype),
        call.mask,
        request=call.request,
        plan=call.plan,
        tables=call.tables,
    ).out
    return bool(((out.double() - want).abs() <= torch.finfo(out.dtype).eps * terms).all())


def hold(call: Call, keep: Tensor | None = None, run: Any = None) -> None:
    """Assert that output, log-sum-exp and gradients are within BOUNDS of float64."""
    request = call.request
    out_bound, lse_bound, grad_bound = BOUNDS[request.dtype]
    leaves: dict[str, Tensor | None] = {}
    for name, tensor in zip(("q", "k", "v", "mask"), call[:4], strict=True):
        leaves[name] = None if tensor is None else tensor.detach().requires_grad_(name in call.grads)
    result = (run or call.run)(leaves)
    out, lse = result if request.lse else (result, None)
    want, want_lse = reference(*call[:4], request=request, plan=call.plan, tables=call.tables, keep=keep)
    assert out.dtype == call.query.dtype
    assert relative_error(out, want) <= out_bound or few_numbers(call, out, want), f"out of {request.describe()}"
    if lse is not None:
        assert relative_error(lse, want_lse) <= lse_bound, f"lse of {request.describe()}"
    if not call.grads:
        return
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    total, grad_lse = (out * grad_out).sum(), None
    if lse is not None and lse.requires_grad:
        grad_lse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype)
        total = total + (lse.masked_fill(lse == -torch.inf, 0) * grad_lse).sum()
    names = sorted(call.grads)
    found = torch.autograd.grad(total, [leaves[name] for name in names])  # type: ignore[misc]
    wanted = reference_gradients(
        *call[:4], request=request, plan=call.plan, tables=call.tables, keep=keep, grad_out=grad_out, grad_lse=grad_lse
    )
    for name, grad in zip(names, found, strict=True):
        exact = dict(zip(("q", "k", "v", "mask"), wanted, strict=True))[name]
        # Rows that read one key give 0 to query and key in exact arithmetic, so error is also allowed in proportion to
        # what flowed in.
        error = float((grad.double() - exact).norm())
        scale = float(exact.norm()) + 0.1 * float(grad_out.double().norm())
        bound = max(
            grad_bound, torch.finfo(grad.dtype).eps
        )  # a float32 mask of float64 operands has a float32 gradient
        assert grad.shape == exact.shape
        assert error <= bound * scale, f"gradient of {name} of {request.describe()}: {error / max(scale, 1e-300)}"
