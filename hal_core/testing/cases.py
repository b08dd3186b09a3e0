"""A case: one attention call to try on a device, and its tensors."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from .. import AttentionRequest, BlockPlan, MaskKind, SequenceMetadata
from ..toolkit.caches import LARGEST_CODE, codes_of

QKV = frozenset({"q", "k", "v"})
DTYPES = ("float32", "bfloat16", "float16", "float64")
MASK_SHAPES = ("full", "keys", "shared")
LAYOUTS = ("contiguous", "heads last", "sliced", "expanded", "strided")


class Inputs(NamedTuple):
    """The tensors of a case. A backward starts from `grad_out` and `grad_lse`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    plan: BlockPlan | None
    tables: SequenceMetadata | None
    grad_out: Tensor
    grad_lse: Tensor


@attrs.frozen(kw_only=True)
class Case:
    """One attention call to try.

    Attributes:
        subject: the check it belongs to. request: the call.
        layout: how its tensors lie in memory, one of `LAYOUTS`.
        mask_shape: "full" [batch, heads, len_q, len_k], "keys" [batch, 1, 1, len_k] or "shared" [1, 1, len_q, len_k].
        sequences: (len_q, len_k) of each sequence of a packed or paged call.
    """

    subject: str
    request: AttentionRequest
    layout: str = "contiguous"
    mask_shape: str = "full"
    sequences: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        r = self.request
        parts = [r.describe(), *(f"{name} {getattr(r, name):g}" for name in ("scale", "diagonal") if getattr(r, name))]
        own = {"layout": "contiguous", "mask_shape": "full", "sequences": ()}
        return ", ".join(parts + [f"{n} {getattr(self, n)}" for n, usual in own.items() if getattr(self, n) != usual])

    @property
    def claim(self) -> str:
        """The claim that running the case tests."""
        r = self.request
        causal = "diagonal" if r.diagonal else f"causal {r.causal}"
        about = {"dtypes": r.dtype, "masks": f"mask {r.mask}", "causal": causal, "strides": f"{self.layout} tensors"}
        return about.get(self.subject, self.subject)

    def draw(self, seed: int) -> Inputs:
        """Fresh tensors: standard normal, masks with about a third hidden and some rows without any key.

        The same seed gives the same tensors, wherever the case stands in a run.
        """
        own = int.from_bytes(hashlib.sha256(f"{seed} {self.request.to_dict()} {self}".encode()).digest()[:6])
        return _Drawing(self, torch.Generator().manual_seed(own)).inputs()

    def options(self, inputs: Inputs) -> dict[str, Any]:
        """Keyword arguments of `hal_core.attention`, beside query, key and value."""
        r, tables = self.request, inputs.tables or SequenceMetadata()
        options: dict[str, Any] = {
            "attn_mask": inputs.mask,
            "scale": r.scale,
            "causal": r.causal,
            "diagonal": r.diagonal,
            "window": r.window,
            "softcap": r.softcap,
            "dropout_p": r.dropout,
            "enable_gqa": r.heads_q != r.heads_kv,
            "block_plan": inputs.plan,
            "return_lse": r.lse,
            "deterministic": r.deterministic,
            "max_error": r.max_error,
        }
        if r.packed:
            options |= {"max_seqlen_q": r.len_q, "max_seqlen_k": r.len_k}
        return options | {name: value for name, value in tables._asdict().items() if value is not None}


class _Drawing:
    """Makes a case's tensors. Numbers are drawn on the host, so that every device sees the same."""

    def __init__(self, case: Case, generator: torch.Generator) -> None:
        self.case, self.r = case, case.request
        self.random: dict[str, Any] = {"generator": generator}

    def inputs(self) -> Inputs:
        r, layout, tables = self.r, self.case.layout, SequenceMetadata()
        len_q, len_k = (
            [sum(lengths) for lengths in zip(*self.case.sequences, strict=True)] if r.packed else (r.len_q, r.len_k)
        )
        batch, held = 1 if r.packed else r.batch, self.here([k for _, k in self.case.sequences])
        query = self.laid_out(batch, r.heads_q, len_q, r.dim_qk, layout)
        if r.page_size is not None:
            key, value, table = self.pages(held.tolist(), r.page_size)
            tables = tables._replace(page_table=table, cache_seqlens=held)
        else:
            key, value = (self.laid_out(batch, r.heads_kv, len_k, dim, layout) for dim in (r.dim_qk, r.dim_v))
        if r.used:
            tables = tables._replace(cache_seqlens=held)
            for cache, (s, length) in itertools.product((key, value), enumerate(held.tolist())):
                cache[s, :, length:] = 100.0
        if r.packed:
            totals = [self.here([0, *lengths]).cumsum(0).int() for lengths in zip(*self.case.sequences, strict=True)]
            tables = tables._replace(cu_seqlens_q=totals[0], cu_seqlens_k=totals[1])
        if r.cache_dtype is not None:
            by_token = r.cache_dtype.startswith("int")  # and keys by channel
            code = 4 / LARGEST_CODE[r.cache_dtype] if by_token else 1.0  # about what one is worth
            shapes = [(r.batch, r.heads_kv, 1, r.dim_qk if by_token else 1)]
            shapes.append((*value.shape[:3], 1) if by_token and value.shape[2] > 1 else (r.batch, r.heads_kv, 1, 1))
            key, value = (codes_of(t, torch.full((), code, device=r.device), r.cache_dtype) for t in (key, value))
            scales = [(torch.rand(shape, **self.random).to(r.device) + 0.5) * code for shape in shapes]
            tables = tables._replace(key_scale=scales[0], value_scale=scales[1])
        grad_out = self.laid_out(batch, r.heads_q, len_q, r.dim_v, layout if layout != "sliced" else "contiguous")
        grad_lse = self.normal(batch, r.heads_q, len_q).to(torch.promote_types(query.dtype, torch.float32))
        used = tables if any(t is not None for t in tables) else None
        return Inputs(query, key, value, self.mask(), self.plan(), used, grad_out, grad_lse)

    def here(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.r.device)

    def normal(self, *shape: int) -> Tensor:
        wide = torch.float64 if self.r.dtype == "float64" else torch.float32
        return torch.randn(shape, dtype=wide, **self.random).to(self.r.device, getattr(torch, self.r.dtype))

    def laid_out(self, batch: int, heads: int, length: int, dim: int, layout: str) -> Tensor:
        """[batch, heads, length, dim] that lies in memory as `layout` says."""
        if layout == "heads last":  # as a projection's output is split into heads
            return self.normal(batch, length, heads, dim).transpose(1, 2)
        if layout == "sliced":  # a part of a larger tensor, from an odd offset
            return self.normal(batch, heads, length + 3, dim + 5)[:, :, 2 : length + 2, 3 : dim + 3]
        if layout == "expanded":  # stride 0 over batch and heads
            return self.normal(1, 1, length, dim).expand(batch, heads, length, dim)
        if layout == "strided":
            return self.normal(batch, heads, length, 2 * dim)[..., ::2]
        return self.normal(batch, heads, length, dim)

    def pages(self, lengths: list[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shuffled pages, two of them unused; entries past a sequence's end hold 100, so that reading one shows."""
        needed = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(needed) + 2, **self.random).int()
        key, value = (self.normal(len(order), self.r.heads_kv, size, dim) for dim in (self.r.dim_qk, self.r.dim_v))
        table = torch.zeros(len(lengths), self.r.len_k // size, dtype=torch.int32)
        for s, (count, length) in enumerate(zip(needed, lengths, strict=True)):
            table[s, :count], order = order[:count], order[count:]
            for cache in (key, value):
                cache[int(table[s, count - 1]), :, length - (count - 1) * size :] = 100.0
                cache[order[-2:].tolist()] = 100.0
        return key, value, table.to(self.r.device)

    def mask(self) -> Tensor | None:
        r, shape = self.r, self.case.mask_shape
        if r.mask is MaskKind.NONE:
            return None
        lead = {"full": (r.batch, r.heads_q, r.len_q), "keys": (r.batch, 1, 1), "shared": (1, 1, r.len_q)}[shape]
        visible = (torch.rand(*lead, r.len_k, **self.random) > 0.35).to(r.device)
        if shape != "keys":
            visible[..., 3::5, :] = False  # rows without any key
        return visible if r.mask is MaskKind.BOOLEAN else self.normal(*visible.shape).masked_fill(~visible, -torch.inf)

    def plan(self) -> BlockPlan | None:
        if self.r.block_plan is None:
            return None
        block_q, block_k, most = self.r.block_plan
        lead = (1, 1) if self.case.mask_shape == "shared" else (self.r.batch, self.r.heads_q)
        rows, columns = -(-self.r.len_q // block_q), -(-self.r.len_k // block_k)
        counts = torch.randint(0, most + 1, (*lead, rows), dtype=torch.int32, **self.random)
        indices = torch.rand(*lead, rows, columns, **self.random).argsort(-1)[..., :most].int()
        indices = indices.masked_fill(
            torch.arange(most) >= counts.unsqueeze(-1), columns + 7
        )  # past the count: ignored
        return BlockPlan(block_q, block_k, indices.to(self.r.device), counts.to(self.r.device))
