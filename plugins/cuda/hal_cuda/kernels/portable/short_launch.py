"""The launch of attention and gradients of very short rows: see `short`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, Causal, Grads, MaskKind

from ...memory import Borrowed, borrowing
from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from ...tiling import power_of_two
from .backward_mask import sum_parts
from .dropout import random_words
from .launch import TYPES, aligned, empty_result, mask_strides
from .mask_tiles import mask_constants, mask_steps
from .short import attend_short, backward_short

#: Rows and keys of the one tile that there is, and head sizes that leave it registers.
MOST_TOKENS, MOST_DIM = 64, 64
#: Programs that a device of 132 multiprocessors is given at least: fewer leave the other kernels ahead.
FEWEST_PROGRAMS = 264
#: Programs that the batch is divided among: two of the backward run on a multiprocessor at a time.
_PROGRAMS = 264
_WARPS, _STAGES = 4, 2
_SUM_BLOCK = 256
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


class _Short:
    """What forward and backward share: constants and arguments of a request."""

    def __init__(self, request: AttentionRequest, context: Context) -> None:
        self.request, self.chip, self._context = request, context.chip, context
        self._runs: dict[Any, Launcher] = {}

    def _constants(self, query: Tensor, key: Tensor, mask: Tensor | None) -> dict[str, Any]:
        r, (left, right) = self.request, self._band()
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

    def _band(self) -> tuple[int | None, int | None]:
        left, right = self.request.window or (None, None)
        if self.request.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        return left, right

    def _numbers(self, query: Tensor, key: Tensor, rng: tuple[int, int] | None) -> list[Any]:
        """Arguments behind the strides."""
        r, (left, right) = self.request, self._band()
        batch, heads, len_q, _ = query.shape
        shift = r.diagonal + (key.shape[2] - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        words = (0, 0) if rng is None else random_words(rng)
        each = _each(batch, heads)
        edges = shift - (left or 0), shift + (right or 0)
        return [
            r.effective_scale,
            r.softcap or 1.0,
            r.dropout,
            *words,
            batch,
            each,
            len_q,
            key.shape[2],
            *edges,
        ]

    def _launch(
        self, kernel: Any, tensors: dict[str, Tensor | None], arguments: list[Any], constants: dict[str, Any]
    ) -> None:
        query, mask = tensors["q"], tensors["mask"]
        assert query is not None
        steps = mask_steps(mask)
        key = (kernel.__name__, *constants.values(), tuple(steps), None if mask is None else mask.dtype, query.dtype)
        run = self._runs.get(key)
        if run is None:
            names = [name for name in kernel.arg_names if name not in constants]
            pointers = names[: len(tensors)]
            known = dict.fromkeys((p for p in pointers if p not in ("mask", "grad_lse", "lse")), 16) | steps
            known |= {n: 8 for n in names if n[-2:] in ("_b", "_h", "_m", "_n") and n[0] not in ("m", "e", "l")}
            run = self._runs[key] = launcher(
                self.chip, kernel, _types(names, pointers, query, mask), constants, known, num_warps=_WARPS
            )
        batch, heads = query.shape[:2]
        each = _each(batch, heads)
        run((heads, -(-batch // each), 1), list(tensors.values()), arguments)


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
        out = empty_result(query, value.shape[3])
        if not suits(query, key, value, out):
            return self._instead(query, key, value, mask, plan, tables, rng)  # type: ignore[no-any-return]
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self.request.lse else None
        strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *mask_strides(mask)]
        constants = self._constants(query, key, mask) | {"LSE": self.request.lse}
        tensors = {"q": query, "k": key, "v": value, "out": out, "lse": lse, "mask": mask}
        self._launch(attend_short, tensors, strides + self._numbers(query, key, rng), constants)
        return AttentionOutput(out, lse)


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
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        of_mask = mask is not None and "mask" in self.request.grads
        if not suits(query, key, value, out, grad_out, *grads) or (
            grad_lse is not None and grad_lse.dtype != lse.dtype
        ):
            return None
        if of_mask and (mask.shape[0] > 1 or mask.shape[1:] != (query.shape[1], query.shape[2], key.shape[2])):  # type: ignore[union-attr]
            return None
        strides = [number for t in (query, key, value, out, lse, grad_out) for number in t.stride()[:3]]
        strides += [*((0, 0, 0) if grad_lse is None else grad_lse.stride())]
        strides += [number for t in grads for number in t.stride()[:3]] + list(mask_strides(mask))
        constants = self._constants(query, key, mask) | {"GRAD_LSE": grad_lse is not None, "OF_MASK": of_mask}
        tensors: dict[str, Tensor | None] = {"q": query, "k": key, "v": value, "out": out, "lse": lse}
        tensors |= {"grad_out": grad_out, "grad_lse": grad_lse, "mask": mask}
        tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        grad_mask = torch.empty_like(mask) if mask is not None and of_mask else None
        with borrowing(self._context.memory) as borrow:
            tensors["part"] = None if grad_mask is None else self._part(query, grad_mask, borrow)
            self._launch(backward_short, tensors, strides + self._numbers(query, key, rng), constants)
            if grad_mask is not None:
                self._sum(tensors["part"], grad_mask)
        return Grads(grads[0], grads[1], grads[2], grad_mask)

    def _part(self, query: Tensor, grad_mask: Tensor, borrow: Borrowed) -> Tensor:
        batch, heads = query.shape[:2]
        return borrow((-(-batch // _each(batch, heads)), grad_mask.numel()), torch.float32)

    def _sum(self, part: Tensor | None, grad_mask: Tensor) -> None:
        assert part is not None
        types = dict.fromkeys(("dm_b", "dm_h", "dm_m", "dm_n", "size"), "i64")
        types = {"part": "*fp32", "dm": f"*{TYPES[grad_mask.dtype]}"} | types
        types |= dict.fromkeys(("chunks", "heads", "rows", "keys"), "i32")
        types = {name: types[name] for name in sum_parts.arg_names if name in types}
        run = launcher(self.chip, sum_parts, types, {"BLOCK": _SUM_BLOCK}, num_warps=4)
        arguments = [*grad_mask.stride(), part.shape[0], grad_mask.numel(), *grad_mask.shape[1:]]
        run((-(-grad_mask.numel() // _SUM_BLOCK), 1, 1), (part, grad_mask), arguments)


__all__ = ["ShortBackward", "ShortPath", "backward_memory", "mask_groups", "takes"]
