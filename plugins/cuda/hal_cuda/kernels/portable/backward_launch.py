"""The plain Triton backward: fills in the kernels' arguments for one form of the tensors, launches them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hal_core.plugin_api import (
    DTYPE_BYTES,
    AttentionRequest,
    BlockPlan,
    Causal,
    ContractError,
    DeviceUnavailableError,
    Grads,
    MaskKind,
    SequenceMetadata,
    TilePlan,
)

from ...memory import Borrowed, borrowing
from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from ...tiling import Tiles, power_of_two
from .backward import prepare
from .backward_kv import grad_kv
from .backward_mask import SUM_TILE, grad_mask, normalise, sum_parts
from .backward_q import grad_q
from .block_plans import RowLists, listed_once, rows_of_blocks
from .dropout import random_words
from .launch import TYPES, aligned, extras_of, last_dim_contiguous, mask_strides, plan_strides
from .mask_tiles import mask_constants, mask_form, mask_steps

_MOST_LAUNCHES = 512
#: Triton types of tables and of what is float32 for every dtype.
_TABLES = dict.fromkeys(("cu_q", "cu_k", "plan_index", "plan_count", "row_index", "row_count"), "i32")
_TABLES |= {"lse": "fp32", "numbers": "fp32", "listed": "u8", "part": "fp32"}
_POINTERS = frozenset({"q", "k", "v", "out", "grad_out", "grad_lse", "mask", "dq", "dk", "dv", "dm", *_TABLES})
_MASKS = {MaskKind.NONE: 0, MaskKind.BOOLEAN: 1, MaskKind.ADDITIVE: 2}
#: Programs below which the gradient of a mask is divided among more of them, along what the mask is broadcast over.
_MASK_PROGRAMS = 512


class _Kernel(NamedTuple):
    """A kernel to launch.

    pointers: names of its tensors, in order. arguments: those after them. seed: where the random words are among them;
    -1 for a kernel without.
    """

    run: Launcher
    grid: tuple[int, int, int]
    pointers: tuple[str, ...]
    arguments: list[Any]
    seed: int


class _Filled(NamedTuple):
    """Types and constants that a kernel is compiled for, and its arguments: see `_Kernel`."""

    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: dict[str, int]
    pointers: tuple[str, ...]
    arguments: list[Any]
    seed: int

    def kernel(self, run: Launcher, grid: tuple[int, int, int]) -> _Kernel:
        return _Kernel(run, grid, self.pointers, self.arguments, self.seed)


class _Form(NamedTuple):
    """The tensors of a call, for their sizes, strides and addresses. mask: 4-dimensional."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    mask: Tensor | None
    plan: BlockPlan | None
    lists: RowLists | None
    grads: Grads


class PortableBackward:
    """Gradients for a request by the portable Triton kernels, from a given output and log-sum-exp."""

    def __init__(self, request: AttentionRequest, context: Context) -> None:
        self.request, self.chip, self._context = request, context.chip, context
        self._launches: dict[Any, list[_Kernel]] = {}
        left, right = request.window or (None, None)
        if request.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        self._band = left, right

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        plan: BlockPlan | TilePlan | None = None,
        tables: SequenceMetadata | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        """Gradients of what `request.grads` names; lengths are read from the tensors.

        Args:
            query: [batch, heads_q, len_q, dim_qk]; packed: [1, heads_q, total_q, dim_qk]. key, value: with heads_kv.
            out, lse: of the forward, [batch, heads_q, len_q, dim_v] and float32 [batch, heads_q, len_q], natural.
            grad_out: in the shape and dtype of out, any strides. grad_lse: in the shape of lse; None for zero.
            mask: of up to four dimensions; its gradient has its shape and dtype.
            plan: a block plan; a tile plan is the forward's and is left aside. rng: the forward's, for dropout.

        Returns:
            Grads, each laid out as its operand where that is dense. 0 where a row reads no key, and a key no row.

        Raises:
            ContractError: dropout without rng.
        """
        wanted = self.request.grads
        operands = zip(("q", "k", "v", "mask"), (query, key, value, mask), strict=True)
        given = Grads(*(None if t is None or name not in wanted else torch.empty_like(t) for name, t in operands))
        blocks = plan if isinstance(plan, BlockPlan) else None
        if not query.numel() or not key.numel() or not value.numel():
            return Grads(*(None if grad is None else grad.zero_() for grad in given))
        if self.request.dropout and rng is None:
            raise ContractError("dropout without rng was given: pass rng=(seed, offset) of the forward")
        wide_mask = mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
        with borrowing(self._context.memory) as borrow:
            lists = None
            if blocks is not None:
                if wanted & {"k", "v", "mask"}:
                    len_k = self.request.len_k if self.request.packed else key.shape[2]
                    lists = rows_of_blocks(blocks, len_k, self.chip, borrow)
                blocks = listed_once(blocks, self.chip, borrow)
            if tables is not None:
                tables = SequenceMetadata(*(last_dim_contiguous(t, borrow) for t in tables[:2]))
            extras = extras_of(wide_mask, blocks, None)
            form = (
                query.shape,
                query.stride(),
                key.shape,
                key.stride(),
                value.shape,
                value.stride(),
                out.stride(),
                grad_out.stride(),
                lse.stride(),
                None if grad_lse is None else (grad_lse.stride(), grad_lse.dtype),
                (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15,
                out.data_ptr() & 15,
                grad_out.data_ptr() & 15,
                mask_form(wide_mask),
                extras,
            )
            kernels = self._launches.get(form)
            if kernels is None:
                if len(self._launches) >= _MOST_LAUNCHES:
                    self._launches.clear()
                given_form = _Form(query, key, value, out, lse, grad_out, grad_lse, wide_mask, blocks, lists, given)
                kernels = self._launches[form] = self._build(given_form)
            rows = query.shape[0] * query.shape[1] * query.shape[2]
            tensors: dict[str, Tensor | None] = {
                "q": query,
                "k": key,
                "v": value,
                "out": out,
                "lse": lse,
                "grad_out": grad_out,
                "grad_lse": grad_lse,
                "numbers": borrow((_numbers(self.request), rows), torch.float32),
                "mask": wide_mask,
                "cu_q": None if tables is None else tables.cu_seqlens_q,
                "cu_k": None if tables is None else tables.cu_seqlens_k,
                "plan_index": None if blocks is None else blocks.indices,
                "plan_count": None if blocks is None else blocks.counts,
                "row_index": None if lists is None else lists.indices,
                "row_count": None if lists is None else lists.counts,
                "listed": None if lists is None else lists.listed,
                "dq": given.query,
                "dk": given.key,
                "dv": given.value,
                "dm": given.mask,
                "part": None if given.mask is None else self._parts(wide_mask, given.mask, borrow),
            }
            words = None if rng is None else random_words(rng)
            for kernel in kernels:
                arguments = kernel.arguments
                if words is not None and kernel.seed >= 0:
                    arguments = arguments.copy()
                    arguments[kernel.seed : kernel.seed + 2] = words
                kernel.run(kernel.grid, [tensors[name] for name in kernel.pointers], arguments)
        return given

    def _build(self, form: _Form) -> list[_Kernel]:
        """The kernels of a form, in the order in which they run, with tiles that the chip's shared memory holds."""
        grads, made = form.grads, [self._prepare(form)]
        if form.mask is not None and self.request.mask is MaskKind.ADDITIVE:
            made.append(self._fitting("q", lambda tiles: self._normalise(form, tiles)))
        if grads.key is not None or grads.value is not None:
            made.append(self._fitting("kv", lambda tiles: self._grad_kv(form, tiles)))
        if grads.query is not None:
            made.append(self._fitting("q", lambda tiles: self._grad_q(form, tiles)))
        if grads.mask is not None:
            made.append(self._fitting("mask", lambda tiles: self._grad_mask(form, tiles)))
            if _chunks(self.request, form.mask) > 1:
                made.append(self._sum_parts(form))
        return made

    def _parts(self, wide_mask: Tensor | None, grad_mask: Tensor, borrow: Borrowed) -> Tensor | None:
        """Memory of the sums of a mask's gradient, where several programs share it."""
        chunks = _chunks(self.request, wide_mask)
        return borrow((chunks, grad_mask.numel()), torch.float32) if chunks > 1 else None

    def _fitting(self, kernel: str, make: Callable[[Tiles], _Kernel]) -> _Kernel:
        """The kernel with the device's own tiles, or the largest smaller ones that its shared memory holds."""
        tiling = self._context.tiling
        while True:
            tiles = tiling.backward_tiles(self.request, kernel)
            try:
                return make(tiles)
            except OutOfResources:
                if not tiling.shrink_backward(self.request, kernel, tiles):
                    raise DeviceUnavailableError(
                        f"no backward tile of head_dim {self.request.dim_qk} fits {self.chip.shared_memory:,} bytes of "
                        "shared memory: use another device"
                    ) from None

    def _prepare(self, form: _Form) -> _Kernel:
        rows = min(max(4096 // power_of_two(self.request.dim_v), 16), 128)
        batch, heads, len_q = form.query.shape[:3]
        constants = {"BM": rows, "GRAD_LSE": form.grad_lse is not None, "ALIGNED": aligned(form.out)}
        constants["WORDS"] = _numbers(self.request) - 2 if self.request.dropout and not self.request.packed else 0
        filled = self._filled(prepare, form, constants, {"len_q": len_q})
        run = launcher(self.chip, prepare, filled.signature, filled.constants, filled.divisible, num_warps=4)
        return filled.kernel(run, (-(-len_q // rows), heads, batch))

    def _normalise(self, form: _Form, tiles: Tiles, tiled: int = 0) -> _Kernel:
        filled = self._filled(normalise, form, _sizes(tiles) | {"TILED": tiled}, _plan_values(form.plan))
        run = launcher(
            self.chip, normalise, filled.signature, filled.constants, filled.divisible, num_warps=tiles.warps
        )
        return filled.kernel(run, self._row_grid(form, tiles))

    def normaliser(
        self, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, mask: Tensor | None, tiled: int
    ) -> Callable[[dict[str, Tensor | None]], None]:
        """Launches `normalise` on numbers of another order: float32 [batch * heads, tiles of `tiled` rows, 4, tiled].

        The first of four is the natural log-sum-exp, the third is written.
        """
        lse = torch.empty((), device=query.device).expand(query.shape[:3])
        none = Grads()
        form = _Form(query, key, value, grad_out, lse, grad_out, None, mask, None, None, none)
        kernel = self._fitting("q", lambda tiles: self._normalise(form, tiles, tiled))
        return lambda tensors: kernel.run(kernel.grid, [tensors.get(n) for n in kernel.pointers], kernel.arguments)

    def _grad_q(self, form: _Form, tiles: Tiles) -> _Kernel:
        constants = {**_sizes(tiles), **self._whole_tiles(form, tiles), "RESULT_ALIGNED": aligned(form.grads.query)}
        filled = self._filled(grad_q, form, constants, _plan_values(form.plan))
        run = launcher(self.chip, grad_q, filled.signature, filled.constants, filled.divisible, num_warps=tiles.warps)
        return filled.kernel(run, self._row_grid(form, tiles))

    def _grad_kv(self, form: _Form, tiles: Tiles) -> _Kernel:
        found = [grad for grad in (form.grads.key, form.grads.value) if grad is not None]
        constants = {**_sizes(tiles), **self._whole_tiles(form, tiles), "RESULT_ALIGNED": aligned(*found)}
        constants |= {"KEY": form.grads.key is not None, "VALUE": form.grads.value is not None}
        batch, _, _, len_k = self._lengths(form)
        key_tiles, values = -(-len_k // tiles.keys), _plan_values(None)
        if form.plan is not None and form.lists is not None:
            values = _plan_values(form.plan._replace(indices=form.lists.indices, counts=form.lists.counts))
            key_tiles = -(-len_k // form.plan.block_k) * -(-form.plan.block_k // tiles.keys)
        filled = self._filled(grad_kv, form, constants, values)
        run = launcher(self.chip, grad_kv, filled.signature, filled.constants, filled.divisible, num_warps=tiles.warps)
        return filled.kernel(run, (key_tiles, form.key.shape[1], batch))

    def _grad_mask(self, form: _Form, tiles: Tiles) -> _Kernel:
        batch, heads, len_q, len_k = self._lengths(form)
        assert form.mask is not None
        runs_over = [size > 1 for size in form.mask.shape]
        constants = dict(zip(("OF_BATCH", "OF_HEADS", "OF_ROWS", "OF_KEYS"), runs_over, strict=True)) | _sizes(tiles)
        chunks = _chunks(self.request, form.mask)
        constants |= {**self._whole_tiles(form, tiles), "PARTS": chunks > 1}
        strides = (*(0,) * (4 - form.grads.mask.dim()), *form.grads.mask.stride())
        values = dict(zip(("dm_b", "dm_h", "dm_m", "dm_n"), strides, strict=True)) | {"batches": batch, "heads": heads}
        values["chunks"] = chunks
        listed = (0, 0, 0)
        if form.lists is not None:
            listed = plan_strides(BlockPlan(1, 1, form.lists.listed, form.lists.counts))[:3]  # type: ignore[assignment]
        values |= dict(zip(("listed_b", "listed_h", "listed_n"), listed, strict=True)) | _plan_values(form.plan)
        filled = self._filled(grad_mask, form, constants, values)
        run = launcher(
            self.chip, grad_mask, filled.signature, filled.constants, filled.divisible, num_warps=tiles.warps
        )
        tiles_of = [
            -(-n // size) if over else 1 for n, size, over in zip((len_q, len_k), tiles[:2], runs_over[2:], strict=True)
        ]
        return filled.kernel(run, (tiles_of[0] * tiles_of[1] * chunks, form.mask.shape[1], form.mask.shape[0]))

    def _sum_parts(self, form: _Form) -> _Kernel:
        assert form.mask is not None
        size = form.mask.numel()
        strides = (*(0,) * (4 - form.grads.mask.dim()), *form.grads.mask.stride())
        values = dict(zip(("dm_b", "dm_h", "dm_m", "dm_n"), strides, strict=True))
        values |= {"chunks": _chunks(self.request, form.mask), "size": size, "heads": form.mask.shape[1]}
        values |= {"rows": form.mask.shape[2], "keys": form.mask.shape[3]}
        filled = self._filled(sum_parts, form, dict(SUM_TILE), values)
        signature = filled.signature | {"size": "i64"}
        run = launcher(self.chip, sum_parts, signature, filled.constants, num_warps=4)
        return filled.kernel(run, (-(-size // SUM_TILE["BLOCK"]), 1, 1))

    def _filled(self, kernel: Any, form: _Form, constants: dict[str, Any], values: dict[str, Any]) -> _Filled:
        """A kernel's types, constants and arguments, by the names of its parameters."""
        values, constants = self._values(form) | values, self._constants(form) | constants
        names = [name for name in kernel.arg_names if name not in constants]
        pointers = tuple(name for name in names if name in _POINTERS)
        arguments = [values[name] for name in names[len(pointers) :]]
        dtype, mask = TYPES[form.query.dtype], "u8" if form.mask is None else TYPES[form.mask.dtype]
        lse = torch.float32 if form.grad_lse is None else form.grad_lse.dtype
        return _Filled(
            {name: _type_of(name, dtype, mask, TYPES[lse]) for name in names},
            {name: constants[name] for name in kernel.arg_names if name in constants},
            {name: step for name, step in mask_steps(form.mask).items() if name in names},
            pointers,
            arguments,
            names.index("seed") - len(pointers) if "seed" in names else -1,
        )

    def _values(self, form: _Form) -> dict[str, Any]:
        """Arguments that several kernels take."""
        r, (left, right) = self.request, self._band
        _, _, len_q, len_k = self._lengths(form)
        found: dict[str, Any] = {}
        tensors = {"q": form.query, "k": form.key, "v": form.value, "o": form.out, "g": form.grad_out}
        tensors |= {"dq": form.grads.query, "dk": form.grads.key, "dv": form.grads.value}
        tensors |= {"l": form.lse, "e": form.lse if form.grad_lse is None else form.grad_lse}
        for name, tensor in tensors.items():
            row = "n" if name in ("k", "v", "dk", "dv") else "m"
            strides = (0, 0, 0, 0) if tensor is None else tensor.stride()
            found |= dict(zip((f"{name}_{axis}" for axis in ("b", "h", row, "d")), strides, strict=False))
        found |= dict(zip(("mask_b", "mask_h", "mask_m", "mask_n"), mask_strides(form.mask), strict=True))
        blocks = (1, 1) if form.plan is None else form.plan[:2]
        return found | {
            "count": form.query.shape[0] * form.query.shape[1] * form.query.shape[2],
            "scale": r.effective_scale,
            "softcap": r.softcap or 1.0,
            "probability": r.dropout,
            "seed": 0,
            "offset": 0,
            "len_q": len_q,
            "len_k": len_k,
            "diagonal": r.diagonal,
            "left": left or 0,
            "right": right or 0,
            "block_q": blocks[0],
            "block_k": blocks[1],
            "all_q": form.query.shape[2],
            "all_k": form.key.shape[2],
        }

    def _constants(self, form: _Form) -> dict[str, Any]:
        """Constants that several kernels take."""
        r, (left, right) = self.request, self._band
        return {
            "GROUP": r.heads_q // r.heads_kv,
            "DQ": r.dim_qk,
            "DV": r.dim_v,
            "BDQ": max(16, power_of_two(r.dim_qk)),
            "BDV": max(16, power_of_two(r.dim_v)),
            "MASK": _MASKS[r.mask],
            "BOTTOM": r.causal is Causal.BOTTOM_RIGHT,
            "LEFT": left is not None,
            "RIGHT": right is not None,
            "SOFTCAP": r.softcap is not None,
            "DROPOUT": r.dropout > 0,
            "PACKED": r.packed,
            "PLAN": form.plan is not None,
            "NATURAL": r.mask is MaskKind.ADDITIVE,
            "ALIGNED": aligned(form.query, form.key, form.value),
            "GRAD_ALIGNED": aligned(form.grad_out),
        } | mask_constants(form.mask)

    def _lengths(self, form: _Form) -> tuple[int, int, int, int]:
        """(batch entries or sequences, query heads, queries, keys); of packed sequences the most that one has."""
        r, (batch, heads, len_q, _) = self.request, form.query.shape
        return (r.batch, heads, r.len_q, r.len_k) if r.packed else (batch, heads, len_q, form.key.shape[2])

    def _row_grid(self, form: _Form, tiles: Tiles) -> tuple[int, int, int]:
        batch, heads, len_q, _ = self._lengths(form)
        if form.plan is None:
            return -(-len_q // tiles.rows), heads, batch
        return -(-len_q // form.plan.block_q) * -(-form.plan.block_q // tiles.rows), heads, batch

    def _whole_tiles(self, form: _Form, tiles: Tiles) -> dict[str, bool]:
        """Whether no tile of rows, of keys is cut short."""
        _, _, len_q, len_k = self._lengths(form)
        blocks = tiles[:2] if form.plan is None else form.plan[:2]
        even = [
            not self.request.packed and not length % block and not block % size
            for length, block, size in zip((len_q, len_k), blocks, tiles[:2], strict=True)
        ]
        return {"EVEN_Q": even[0], "EVEN_K": even[1]}


def _sizes(tiles: Tiles) -> dict[str, Any]:
    return {"BM": tiles.rows, "BN": tiles.keys, "STAGES": tiles.stages}


def _plan_values(plan: BlockPlan | None) -> dict[str, Any]:
    """Strides of a plan's lists, or of the lists of a plan turned around."""
    names = ("index_b", "index_h", "index_m", "count_b", "count_h")
    return dict(zip(names, plan_strides(plan), strict=True))


def _type_of(name: str, dtype: str, mask: str, grad_lse: str) -> str:
    """The Triton type of a kernel's run-time argument."""
    if name in _POINTERS:
        return f"*{ {'mask': mask, 'dm': mask, 'grad_lse': grad_lse}.get(name) or _TABLES.get(name, dtype) }"
    if name in ("scale", "softcap", "probability"):
        return "fp32"
    return "i64" if name in ("count", "seed") or name[-2:] in ("_b", "_h", "_m", "_n", "_d") else "i32"


def _numbers(request: AttentionRequest) -> int:
    """Numbers of each row that the kernels pass on, see `backward_step`."""
    return 2 + (request.mask is MaskKind.ADDITIVE) + 2 * (request.dropout > 0 and not request.packed)


def _chunks(request: AttentionRequest, mask: Tensor | None) -> int:
    """Into how many parts the batch entries and heads are cut that a mask with a gradient is broadcast over."""
    if mask is None or "mask" not in request.grads:
        return 1
    return _parts_of(request, *mask.shape)


def _parts_of(request: AttentionRequest, batches: int, heads: int, rows: int, keys: int) -> int:
    """The same of a mask's sizes. A tile has 64 rows and keys."""
    pairs = (request.batch if batches == 1 else 1) * (request.heads_q if heads == 1 else 1)
    programs = batches * heads * -(-rows // 64) * -(-keys // 64)
    return min(pairs, max(_MASK_PROGRAMS // programs, 1))


def backward_memory(request: AttentionRequest) -> int:
    """Bytes that a call of `PortableBackward` allocates at its peak: the gradients, and what it borrows.

    Packed lengths count as if every sequence were the longest, a block plan as if it ran over batch entries and heads.
    """
    r, size = request, DTYPE_BYTES[request.dtype]
    rows, keys = r.batch * r.heads_q * r.len_q, r.batch * r.heads_kv * r.len_k
    gradients = {"q": rows * r.dim_qk, "k": keys * r.dim_qk, "v": keys * r.dim_v}
    needed = sum(gradients[name] for name in gradients if name in r.grads) * size + 4 * _numbers(r) * rows
    if "mask" in r.grads:
        sizes = (r.mask_batch, r.mask_heads, r.len_q, r.len_k)
        parts = _parts_of(r, *sizes)
        needed += r.mask_batch * r.mask_heads * r.len_q * r.len_k * 4 * (1 + parts * (parts > 1))
    if r.block_plan is not None:
        block_q, block_k, most = r.block_plan
        blocks_q, blocks_k = r.batch * r.heads_q * -(-r.len_q // block_q), -(-r.len_k // block_k)
        needed += blocks_q * (most + 1) * 4 * (most > 1)
        if r.grads & {"k", "v", "mask"}:
            needed += blocks_q * blocks_k * 5 + r.batch * r.heads_q * blocks_k * 4
    return needed
