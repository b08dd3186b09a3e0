"""Checked calls of the kernels beside attention: what a kernel in any language is handed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...discovery import Chip
from .checks import aligned, check_index, check_tensors, listed, refuse, shapes

_MOST = 1 << 31
#: Programs of a reduction that fill a multiprocessor.
PROGRAMS = 8


class Reduction(NamedTuple):
    """A reduction over the middle one of three dimensions of memory.

    Attributes:
        source: contiguous in memory order. outer, length, inner: its sizes. out: the result, in memory order.
        shown: `out` with its dimensions in the caller's order.
    """

    source: Tensor
    outer: int
    length: int
    inner: int
    out: Tensor
    shown: Tensor


#: Reduces [outer, length, inner] into [outer, inner].
Reduce = Callable[[Tensor, Tensor, int, int, int], None]


def reduction(name: str, given: Tensor, dim: int | None, host: bool) -> Reduction:
    """The reduction of `given` over `dim`, None for all of it. Tensors whose elements do not fill their memory, in any
    order of the dimensions, are copied.

    Raises:
        ContractError: a wrong device or dtype, no such dimension, or the maximum of nothing.
    """
    check_tensors(name, host, [given])
    most = max(given.dim(), 1)
    refuse(
        name,
        (
            dim is not None and not -most <= dim < most,
            f"dim {dim} of a tensor of shape {list(given.shape)}: use {-most} to {most - 1}",
        ),
    )
    steps = given.stride()
    order = sorted(range(given.dim()), key=lambda d: (-steps[d], d))
    source = given.permute(order)
    if not source.is_contiguous():
        source, order = given.contiguous(), list(range(given.dim()))
    if dim is None or not given.dim():
        out = given.new_empty(())
        return Reduction(source.reshape(-1), 1, source.numel(), 1, out, out)
    place = order.index(dim % given.dim())
    sizes = source.shape
    out = given.new_empty(sizes[:place] + sizes[place + 1 :])
    left = [d for d in order if d != dim % given.dim()]
    shown = out.permute([left.index(d) for d in sorted(left)])
    return Reduction(source, math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :]), out, shown)


def pieces_of(programs: int, length: int, least: int, chip: Chip) -> tuple[int, int]:
    """(pieces, length of a piece) of a reduction that gives `programs` programs where it is not cut."""
    wanted = min(-(-PROGRAMS * chip.multiprocessors // max(programs, 1)), -(-length // least))
    piece = -(-length // max(wanted, 1))
    return -(-length // max(piece, 1)), piece


def reduce(name: str, given: Tensor, dim: int | None, host: bool, run: Reduce) -> Tensor:
    """`run` over what `reduction` gives; sums of nothing are 0."""
    form = reduction(name, given, dim, host)
    refuse(name, ("max" in name and not form.length, f"shape {list(given.shape)}: nothing has no maximum"))
    if not form.length:
        form.out.zero_()
    elif form.out.numel():
        run(form.source, form.out, form.outer, form.length, form.inner)
    return form.shown


def log_step(head_dim: int, base: float) -> float:
    """log2 of the ratio of a pair's frequency to the one before."""
    return -2.0 / head_dim * math.log2(base)


def check_table(name: str, max_seq_len: int, head_dim: int, base: float) -> None:
    """Refuse sizes of a table that make no sense."""
    refuse(
        name,
        (not 0 <= max_seq_len < _MOST, f"max_seq_len {max_seq_len}: use 0 to {_MOST - 1}"),
        (head_dim < 2 or head_dim % 2 != 0, f"head_dim {head_dim}: use an even number of 2 or more"),
        (not (base > 0 and math.isfinite(base)), f"base {base}: use a number above 0"),
    )


class Rotation(NamedTuple):
    """A checked call: query and key with elements of a head side by side, and their results, contiguous."""

    query: Tensor
    key: Tensor
    query_out: Tensor
    key_out: Tensor


def rotation(
    name: str, query: Tensor, key: Tensor, host: bool, tables: tuple[Tensor, Tensor] | None = None, base: float = 1e4
) -> Rotation:
    """The rotation of query [B, H, N, D] and key [B, H', N, D]; a last dimension with strides is copied.

    Raises:
        ContractError: wrong shapes, dtypes or devices, or tables with fewer positions than N.
    """
    check_tensors(name, host, [query, key], tables or ())
    refuse(
        name,
        (
            query.dim() != 4
            or key.dim() != 4
            or query.shape[0] != key.shape[0]
            or query.shape[2:] != key.shape[2:]
            or query.shape[3] % 2 != 0
            or not query.shape[3],
            f"{shapes(query, key)}: use [B, H, N, D] twice, of one B, N and even D",
        ),
    )
    length, pairs = query.shape[2], query.shape[3] // 2
    if tables is None:
        check_table(name, length, 2 * pairs, base)
    for table in tables or ():
        refuse(
            name,
            (table.dtype != torch.float32, f"tables of {listed(t.dtype for t in tables or ())}: use float32"),
            (
                table.dim() != 2 or table.shape[0] < length or table.shape[1] != pairs,
                f"tables of shape {shapes(*(tables or ()))}: use [L, {pairs}], L {length} or more",
            ),
            (not table.is_contiguous(), "tables with strides: use contiguous ones"),
        )
    query, key = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key))
    return Rotation(query, key, *(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key)))


def strides_of(tensor: Tensor) -> list[int]:
    """All strides but the last; 0 for dimensions of one element, which may have any."""
    return [step if size > 1 else 0 for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]


def steps_by_16(*tensors: Tensor) -> bool:
    """Whether every row of the tensors begins at a multiple of 16 bytes."""
    return aligned(*tensors) and all(step * t.itemsize % 16 == 0 for t in tensors for step in strides_of(t))


def programs_of(batch: int, heads: int, blocks: int) -> int:
    """Programs of a read of pages, one for each block of positions of a head.

    Raises:
        ContractError: more than a launch may have.
    """
    programs = batch * heads * blocks
    refuse("paged_kv_cache_read", (programs >= _MOST, f"{programs} blocks of positions: read fewer sequences"))
    return programs


def check_pool(name: str, pool: Tensor) -> None:
    refuse(
        name,
        (
            pool.dim() != 5 or pool.shape[1] != 2,
            f"a pool of shape {list(pool.shape)}: use [pages, 2, heads, page size, head_dim]",
        ),
        (not pool.is_contiguous(), "a pool with strides: use a contiguous one"),
    )


def check_append(
    name: str, pool: Tensor, slots: Tensor, keys: Tensor, values: Tensor, host: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(slots, keys, values) with elements of a head side by side.

    Raises:
        ContractError: wrong shapes, dtypes or devices.
    """
    check_tensors(name, host, [pool, keys, values], [slots])
    check_pool(name, pool)
    check_index(name, "slot_mapping", slots)
    refuse(
        name,
        (
            slots.dim() != 1
            or keys.shape != values.shape
            or tuple(keys.shape) != (slots.shape[0], pool.shape[2], pool.shape[4]),
            f"slot_mapping {list(slots.shape)} and new keys and values {shapes(keys, values)}: use [T], and "
            f"[T, {pool.shape[2]}, {pool.shape[4]}] twice",
        ),
    )
    keys, values = (t if t.stride(2) == 1 else t.contiguous() for t in (keys, values))
    return slots.contiguous(), keys, values


def check_read(
    name: str, pool: Tensor, table: Tensor, lengths: Tensor, max_seq_len: int, host: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised (keys, values) of a read.

    Raises:
        ContractError: wrong shapes, dtypes or devices.
    """
    check_tensors(name, host, [pool], [table, lengths])
    check_pool(name, pool)
    check_index(name, "block_table", table)
    check_index(name, "seq_lens", lengths)
    refuse(
        name,
        (
            table.dim() != 2 or tuple(lengths.shape) != (table.shape[0],),
            f"block_table and seq_lens of shape {shapes(table, lengths)}: use [B, pages of a sequence] and [B]",
        ),
        (max_seq_len < 0, f"max_seq_len {max_seq_len}: use 0 or more"),
    )
    form = (table.shape[0], pool.shape[2], max_seq_len, pool.shape[4])
    return pool.new_empty(form), pool.new_empty(form)


#: Fills out [M, N] from x [M, K], w [N, K] and bias [N] or None; the last argument: the tanh approximation.
Multiply = Callable[[Tensor, Tensor, "Tensor | None", Tensor, bool], None]


class _GeluLinear(torch.autograd.Function):
    """The kernel's forward; gradients by torch's operations from X W^T + bias, which is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, tanh: bool, run: Multiply) -> Tensor:
        ctx.save_for_backward(x, w, bias)
        ctx.tanh = tanh
        out = x.new_empty(x.shape[0], w.shape[0])
        if out.numel():
            run(x, w, bias, out, tanh)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias = ctx.saved_tensors
        linear = torch.nn.functional.linear(x, w, bias)
        grad = torch.ops.aten.gelu_backward(grad_out, linear, approximate="tanh" if ctx.tanh else "none")
        needs = ctx.needs_input_grad
        return (
            grad @ w if needs[0] else None,
            grad.mT @ x if needs[1] else None,
            grad.sum(0) if needs[2] else None,
            None,
            None,
        )


def gelu_of_product(
    name: str, x: Tensor, w: Tensor, bias: Tensor | None, tanh: bool, host: bool, run: Multiply
) -> Tensor:
    """gelu(x w^T + bias) by `run`, differentiable.

    Raises:
        ContractError: wrong shapes, dtypes or devices.
    """
    given = [t for t in (x, w, bias) if t is not None]
    with torch.no_grad():  # gradients are taken
        check_tensors(name, host, given)
    refuse(
        name,
        (
            x.dim() != 2 or w.dim() != 2 or x.shape[1:] != w.shape[1:],
            f"X and W of shape {shapes(x, w)}: use [M, K] and [N, K]",
        ),
        (
            bias is not None and tuple(bias.shape) != (w.shape[0],),
            f"a bias of shape {shapes(*given[2:])} with W {shapes(w)}: use [{w.shape[0]}]",
        ),
    )
    bias = None if bias is None else bias.contiguous()
    made: Tensor = _GeluLinear.apply(x, w, bias, tanh, run)  # type: ignore[no-untyped-call]
    return made


def unit(matrix: Tensor, rows: str) -> str:
    """The name of the dimension along which a matrix's elements lie side by side: "k", the name of its rows, or ""."""
    return "k" if matrix.stride(1) == 1 else rows if matrix.stride(0) == 1 else ""
