"""The launch of attention and gradients of very short rows: see `short`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, Causal, Grads, MaskKind

from ...memory import Borrowed, borrowing
from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from ...tiling import power_of_two
from .backward_mask import SUM_TILE, sum_parts
from .dropout import random_words
from .launch import TYPES, aligned, empty_result, mask_strides
from .mask_tiles import mask_constants, mask_form, mask_steps
from .short import attend_short, backward_short

#: Rows and keys of the one tile that there is, and head sizes that leave it registers.
MOST_TOKENS, MOST_DIM = 64, 64
#: Programs that a device of 132 multiprocessors is given at least: fewer leave the other kernels ahead.
FEWEST_PROGRAMS = 264
#: Programs that the batch is divided among: two of the backward run on a multiprocessor at a time.
_PROGRAMS = 264
_WARPS, _STAGES = 4, 2
_MOST_KEPT = 512
_MASKS = {MaskKind.NONE: 0, MaskKind.BOOLEAN: 1, MaskKind.ADDITIVE: 2}


def takes(request: AttentionRequest) -> bool:
    """Whether the kernels are right for a request and made for its sizes; tensors must suit too (`suits`)."""
    r = request
    return (
        r.dtype in ("float16", "bfloat16")
        and r.heads_q == r.heads_kv
        and 16 < r.len_q <= MOST_TOKENS
        and 16 < r.len_k <= MOST_TOKENS
        and max(r.dim_qk, r.dim_v) <= MOST_DIM
        and r.batch * r.heads_q >= FEWEST_PROGRAMS
        and not r.packed
        and r.page_size is None
        and r.block_plan is None
        and r.tiling is None
    )


def suits(*tensors: Tensor) -> bool:
    """Whether operands can be read 16 bytes at a time, and are no longer than a tile."""
    return aligned(*tensors) and all(t.shape[2] <= MOST_TOKENS for t in tensors) and tensors[0].shape[0] > 0


def mask_groups(request: AttentionRequest) -> int:
    """Programs of a head, each of which has a part of a mask's gradient."""
    return -(-request.batch // _each(request.batch, request.heads_q))


def backward_memory(request: AttentionRequest) -> int:
    """Bytes that a call of `ShortBackward` allocates at its peak. A mask counts as float32."""
    r = request
    rows, keys = r.batch * r.heads_q * r.len_q, r.batch * r.heads_kv * r.len_k
    of_mask = r.mask_heads * r.len_q * r.len_k * 4 * ("mask" in r.grads)
    return (rows * r.dim_qk + keys * (r.dim_qk + r.dim_v)) * 2 + of_mask * (1 + mask_groups(r))


def _each(batch: int, heads: int) -> int:
    """Batch entries of a program."""
    return max(-(-batch * heads // _PROGRAMS), 1)


class _Ready(NamedTuple):
    """A kernel to launch on tensors of one form. seed: where the random words are among the arguments."""

    run: Launcher
    grid: tuple[int, int, int]
    arguments: list[Any]
    seed: int

    def launch(self, tensors: Sequence[Tensor | None], rng: tuple[int, int] | None) -> None:
        arguments = self.arguments
        if rng is not None:
            arguments = arguments.copy()
            arguments[self.seed : self.seed + 2] = random_words(rng)
        self.run(self.grid, tensors, arguments)


class _Short:
    """What forward and backward share: constants and arguments of a request, kept by the tensors' form."""

    def __init__(self, request: AttentionRequest, context: Context) -> None:
        self.request, self.chip, self._context = request, context.chip, context
        self._kept: dict[Any, _Ready | None] = {}
        self._sums: dict[torch.dtype, Launcher] = {}
        left, right = request.window or (None, None)
        if request.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        self._band = left, right

    def _constants(self, query: Tensor, key: Tensor, mask: Tensor | None) -> dict[str, Any]:
        r, (left, right) = self.request, self._band
        found = mask_constants(mask)
        del found["MASK_UNIT"]
        return found | {
            "DQ": r.dim_qk,
            "DV": r.dim_v,
            "BDQ": max(16, power_of_two(r.dim_qk)),
            "BDV": max(16, power_of_two(r.dim_v)),
            "BM": max(16, power_of_two(query.shape[2])),
            "BN": max(16, power_of_two(key.shape[2])),
            "MASK": _MASKS[r.mask],
            "OF_BATCH": mask is not None and mask.shape[0] > 1,
            "LEFT": left is not None,
            "RIGHT": right is not None,
            "SOFTCAP": r.softcap is not None,
            "DROPOUT": r.dropout > 0,
            "STAGES": _STAGES,
        }

    def _ready(
        self,
        kernel: Any,
        pointers: int,
        strides: list[int],
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        **flags: bool,
    ) -> _Ready:
        """A kernel with its arguments. pointers: how many of them are tensors; strides: what follows those."""
        r, (left, right) = self.request, self._band
        batch, heads, len_q, _ = query.shape
        shift = r.diagonal + (key.shape[2] - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        each = _each(batch, heads)
        numbers = [r.effective_scale, r.softcap or 1.0, r.dropout, 0, 0, batch, each, len_q, key.shape[2]]
        constants, steps = self._constants(query, key, mask) | flags, mask_steps(mask)
        names = [name for name in kernel.arg_names if name not in constants]
        known = dict.fromkeys((n for n in names[:pointers] if n not in ("mask", "grad_lse", "lse")), 16) | steps
        known |= {n: 8 for n in names if n[-2:] in ("_b", "_h", "_m", "_n") and n[0] not in ("m", "e", "l")}
        types = _types(names, names[:pointers], query, mask)
        if kernel is attend_short:
            run = launcher(self.chip, attend_short, types, constants, known, num_warps=_WARPS)
        else:
            run = launcher(self.chip, backward_short, types, constants, known, num_warps=_WARPS)
        arguments = [*strides, *numbers, shift - (left or 0), shift + (right or 0)]
        return _Ready(run, (heads, -(-batch // each), 1), arguments, len(strides) + 3)

    def _keep(self, form: Any, ready: _Ready | None) -> _Ready | None:
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[form] = ready
        return ready


def _form(tensors: Sequence[Tensor], mask: Tensor | None) -> tuple[Any, ...]:
    """What a launch depends on."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask_form(mask))
    return (*((tensor.shape, tensor.stride()) for tensor in tensors), addresses & 15, of_mask)


def _types(names: list[str], pointers: list[str], query: Tensor, mask: Tensor | None) -> dict[str, str]:
    """Triton types of a kernel's run-time arguments."""
    dtype, of_mask = TYPES[query.dtype], "u8" if mask is None else TYPES[mask.dtype]
    others = {"lse": "fp32", "grad_lse": "fp32", "part": "fp32", "mask": of_mask}
    found = {name: f"*{others.get(name, dtype)}" for name in pointers}
    for name in names[len(pointers) :]:
        wide = name == "seed" or name[-2:] in ("_b", "_h", "_m", "_n")
        found[name] = "fp32" if name in ("scale", "softcap", "probability") else "i64" if wide else "i32"
    return found


class ShortPath(_Short):
    """Attention of short rows; calls on tensors that do not suit go to `instead`."""

    def __init__(self, request: AttentionRequest, context: Context, instead: Any) -> None:
        super().__init__(request, context)
        self._instead = instead

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        plan: Any = None,
        tables: Any = None,
        rng: tuple[int, int] | None = None,
    ) -> AttentionOutput:
        """As `PortablePath`."""
        form = _form((query, key, value), mask)
        out = empty_result(query, value.shape[3])
        ready = self._kept[form] if form in self._kept else self._keep(form, self._build(query, key, value, out, mask))
        if ready is None:
            return self._instead(query, key, value, mask, plan, tables, rng)  # type: ignore[no-any-return]
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self.request.lse else None
        ready.launch((query, key, value, out, lse, mask), rng)
        return AttentionOutput(out, lse)

    def _build(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mask: Tensor | None) -> _Ready | None:
        if not suits(query, key, value, out):
            return None
        strides = [number for t in (query, key, value, out) for number in t.stride()[:3]] + list(mask_strides(mask))
        return self._ready(attend_short, 6, strides, query, key, mask, LSE=self.request.lse)


class ShortBackward(_Short):
    """Gradients of short rows. A call returns None where another path serves it."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None,
        grad_lse: Tensor | None,
        rng: tuple[int, int] | None,
    ) -> Grads | None:
        """As `OwnBackward`, with a mask of four dimensions."""
        form = (*_form((query, key, value, out, grad_out), mask), lse.stride())
        form += (None if grad_lse is None else (grad_lse.stride(), grad_lse.dtype),)
        of_mask = mask is not None and "mask" in self.request.grads
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if form in self._kept:
            ready = self._kept[form]
        else:
            ready = self._keep(
                form, self._build((query, key, value, out, lse, grad_out), grads, mask, grad_lse, of_mask)
            )
        if ready is None:
            return None
        grad_mask = torch.empty_like(mask) if mask is not None and of_mask else None
        with borrowing(self._context.memory) as borrow:
            part = None if grad_mask is None else self._part(query, grad_mask, borrow)
            ready.launch((query, key, value, out, lse, grad_out, grad_lse, mask, *grads, part), rng)
            if grad_mask is not None:
                self._sum(part, grad_mask)
        return Grads(grads[0], grads[1], grads[2], grad_mask)

    def _build(
        self, given: Sequence[Tensor], grads: list[Tensor], mask: Tensor | None, grad_lse: Tensor | None, of_mask: bool
    ) -> _Ready | None:
        query, key, value, out, lse, grad_out = given
        if not suits(query, key, value, out, grad_out, *grads) or (
            grad_lse is not None and grad_lse.dtype != lse.dtype
        ):
            return None
        if mask is not None and of_mask:
            whole = (query.shape[1], query.shape[2], key.shape[2])
            if mask.shape[0] > 1 or tuple(mask.shape[1:]) != whole or min(whole[1:]) < 2:
                return None
        strides = [number for tensor in given for number in tensor.stride()[:3]]
        strides += [0, 0, 0] if grad_lse is None else list(grad_lse.stride())
        strides += [number for tensor in grads for number in tensor.stride()[:3]] + list(mask_strides(mask))
        flags = {"GRAD_LSE": grad_lse is not None, "OF_MASK": of_mask}
        return self._ready(backward_short, 12, strides, query, key, mask, **flags)

    def _part(self, query: Tensor, grad_mask: Tensor, borrow: Borrowed) -> Tensor:
        batch, heads = query.shape[:2]
        return borrow((-(-batch // _each(batch, heads)), grad_mask.numel()), torch.float32)

    def _sum(self, part: Tensor | None, grad_mask: Tensor) -> None:
        assert part is not None
        run = self._sums.get(grad_mask.dtype)
        if run is None:
            known = dict.fromkeys(("dm_b", "dm_h", "dm_m", "dm_n", "size"), "i64") | {"part": "*fp32"}
            known |= {"dm": f"*{TYPES[grad_mask.dtype]}"} | dict.fromkeys(("chunks", "heads", "rows", "keys"), "i32")
            types = {name: known[name] for name in sum_parts.arg_names if name in known}
            run = launcher(self.chip, sum_parts, types, SUM_TILE, num_warps=4)
            self._sums[grad_mask.dtype] = run
        arguments = [*grad_mask.stride(), part.shape[0], grad_mask.numel(), *grad_mask.shape[1:]]
        run((-(-grad_mask.numel() // SUM_TILE["BLOCK"]), 1, 1), (part, grad_mask), arguments)


__all__ = ["ShortBackward", "ShortPath", "backward_memory", "mask_groups", "takes"]
