"""The Hopper path: which requests the Gluon kernel takes, its tiles, and its launch with tensor maps that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Causal, MaskKind, SequenceTables

from . import compiled
from .chip import Chip
from .portable import PortablePath, empty_result
from .tiles import packs, power_of_two

ROWS = 64  # of one consumer warpgroup
LOG2E = 1.4426950408889634
_OVERHEAD = 2  # of a tile of rows, in tiles of keys
CACHED = 40 << 20  # bytes of keys and values that the second-level cache keeps beside the rest
_MOST_KEPT = 1024


class Tiling(NamedTuple):
    """How a head size is run.

    keys: of a tile. consumers: warpgroups. turns: they take turns at the tensor cores. arrive: release stages by named
    barriers. own_output: shared memory of its own for the result. stages: of keys and of values. queries: stages of
    query tiles. ring: stages of second parts, where keys and values share them and the `stages` of first parts; 0: they
    do not.
    held: half of the query stays in registers, where no key hangs over the end. lazy: a row's maximum is followed in
    large steps.
    """

    keys: int
    consumers: int
    turns: bool
    arrive: bool
    own_output: bool
    stages: int
    queries: int
    ring: int = 0
    held: bool = False
    lazy: bool = False


_RUN_TIME = ("total", "NT", "HG", "heads", "len_q", "len_k", "shift", "left", "right")
_PACKED_RUN_TIME = ("HG", "heads", "len_q", "shift", "left", "right")


def takes(request: AttentionRequest, chip: Chip) -> bool:
    """Whether the kernel is right for a request; tensors must also suit the copy engine (`fits`)."""
    return (
        chip.capability == (9, 0)
        and compiled.tested()
        and not compiled.INTERPRETED
        and request.dtype in ("float16", "bfloat16")
        and request.mask is MaskKind.NONE
        and not request.dropout
        and (not request.packed or _fills_tiles(request))
        and request.page_size is None
        and request.block_plan is None
        and request.last_dim_contiguous
        and max(request.dim_qk, request.dim_v) <= 256
        and request.dim_qk % 8 == 0
        and request.dim_v % 8 == 0
        and 1e-6 <= request.effective_scale <= 1e6
        and not packs(request, request.len_q)
    )


def _fills_tiles(request: AttentionRequest) -> bool:
    """Whether packed sequences have rows enough for tiles, and head sizes of one part."""
    return request.len_q > ROWS and not parts(request.dim_qk)[1] and not value_parts(request.dim_v)[1]


def fits(*tensors: Tensor) -> bool:
    """Whether the copy engine can step through the tensors: by 16 bytes, never by 0. Addresses are looked at in each
    call.
    """
    for tensor in tensors:
        step = 16 // tensor.itemsize
        if tensor.stride(3) != 1:
            return False
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            if size > 1 and (stride % step or stride <= 0):
                return False
    return True


def parts(dim: int) -> tuple[int, int]:
    """A head size as the kernel cuts it: a power of two from 64 up, and a second part or 0. The rest is read as
    zeros.
    """
    if dim <= 64:
        return 64, 0
    if dim <= 128:
        return (64, 32) if dim <= 96 else (128, 0)
    return (128, 64) if dim <= 192 else (256, 0)


def value_parts(dim: int) -> tuple[int, int]:
    """The same of values. Products leave out padded columns (see narrow.py), so one part serves up to 128."""
    return (128, 0) if parts(dim)[1] == 32 else parts(dim)


def tiling_for(
    dim_qk: int, dim_v: int, len_q: int, len_k: int, right: bool, left: bool = False, lse: bool = False
) -> Tiling:
    """The tiling of a call, measured on one H200 at lengths of 500 to 16384. right: rows end at a diagonal. left: they
    begin at one. lse: the log-sum-exp is asked for.

    Head size 64: three warpgroups, or two where those leave clearly fewer rows empty, the diagonal takes much of a row,
    or registers would not do. Turns pay where rows are short, or where a warpgroup has few registers. Head size 192:
    tiles of 128 keys fit where keys and values share three and a half stages, or where values are of 128; with 64 keys,
    shared memory gives the first product its operands no faster than it is done. Head size 256: so half of the query
    comes from registers. It and 192 with shared stages follow maxima in large steps, as their result is most to
    rescale; that adds 2 to 5% to the error.
    """
    widest = max(sum(parts(dim_qk)), sum(parts(dim_v)))
    same = parts(dim_qk) == value_parts(dim_v)
    long = len_k > 1024
    if widest == 64:
        full, narrow = (len_q / (-(-len_q // rows) * rows) for rows in (3 * ROWS, 2 * ROWS))
        three = full > 0.9 * narrow and (long or not right) and not (left and lse)
        return Tiling(128, 3 if three else 2, three, False, True, 3, 2)
    if widest == 96:
        return Tiling(128, 2, False, True, True, 2, 2)
    if widest == 128:
        return Tiling(128, 2, not long, long, True, 2, 2)
    if widest == 192:
        if same and long and not left:
            return Tiling(128, 2, True, False, False, 4, 1, ring=3, lazy=True)
        if value_parts(dim_v) == (128, 0) and not left and len_k > (1024 if right else 512):
            return Tiling(128, 2, False, True, False, 2, 1)
        return Tiling(64, 2, False, False, not same, 2, 2)
    turns = right or not long or len_k % 64 != 0
    return Tiling(64, 2, turns, False, not same, 2, 1, held=parts(dim_qk) == (256, 0), lazy=True)


class Schedule(NamedTuple):
    """Programs of a launch, and heads that are worked on at a time."""

    programs: int
    together: int


def schedule(costs: Sequence[int], heads: int, multiprocessors: int, most_together: int) -> Schedule:
    """How tiles go to programs: one program a multiprocessor where that balances, else a program a tile.

    Args:
        costs: of the row tiles of a head, in the order they are taken. heads: batch entries times query heads.
        most_together: heads whose keys and values the second-level cache holds.

    A persistent program loads its next tile while it finishes one, which pays as long as no program gets much more than
    the others; tiles of `together` heads are taken longest first, forwards and backwards in turn.
    """
    tiles = len(costs) * heads
    if tiles <= multiprocessors:
        return Schedule(tiles, 1)
    number = torch.arange(min(tiles, 1 << 16))
    turn, place = number // multiprocessors, number % multiprocessors
    program = torch.where(turn % 2 == 1, multiprocessors - 1 - place, place)
    each = torch.tensor(costs, dtype=torch.float64)
    best, least = 1, math.inf
    together = 1
    while together <= heads and together <= max(most_together, 1) and heads % together == 0:
        cost = each[number % (together * len(costs)) // together]
        longest = torch.zeros(multiprocessors, dtype=torch.float64).index_add_(0, program, cost).max().item()
        if longest < 0.99 * least:
            best, least = together, longest
        together *= 2
    mean = each.mean().item() * len(number) / multiprocessors
    if least <= 1.09 * mean or len(set(costs)) == 1:
        return Schedule(multiprocessors, best)
    together = 8
    while heads % together:
        together //= 2
    return Schedule(tiles, together)


def kernel_constants(
    tiling: Tiling,
    *,
    dim_qk: int,
    dim_v: int,
    group: int,
    left: bool,
    right: bool,
    shifted: bool,
    half: bool,
    ragged: bool,
    softcap: bool,
    lse: bool,
) -> dict[str, Any]:
    """The kernel's constexpr arguments."""
    first, second = value_parts(dim_v)
    return {
        "GROUP": group,
        "BM": ROWS,
        "BN": tiling.keys,
        "DQ": parts(dim_qk)[0],
        "DV": first,
        "Q2": parts(dim_qk)[1],
        "V2": second,
        "ST": tiling.stages,
        "S2": tiling.ring or tiling.stages,
        "RING": tiling.ring > 0,
        "QS": tiling.queries,
        "NC": tiling.consumers,
        "LEFT": left,
        "RIGHT": right,
        "SHIFTED": shifted,
        "HALF": half,
        "RAG": ragged,
        "SOFTCAP": softcap,
        "LSE": lse,
        "PING": tiling.turns,
        "EB": tiling.arrive,
        "OSEP": tiling.own_output,
        "HELD": tiling.held and not ragged,
        "VC": dim_v,
        "LAZY": tiling.lazy,
    }


def kernel_signature(dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Triton types of the kernel's run-time arguments; dtype "bf16" or "fp16"."""
    keys, types = constants["BN"], {"lse": "*fp32"}
    first = (constants["DQ"], constants["DV"])
    second = tuple(constants[name] or whole for name, whole in zip(("Q2", "V2"), first, strict=True))
    for (dim_qk, dim_v), number in ((first, ""), (second, "2"))[: 2 if splits(constants) else 1]:
        types |= {f"qd{number}": _descriptor(dtype, ROWS, dim_qk), f"kd{number}": _descriptor(dtype, keys, dim_qk)}
        types |= {f"vd{number}": _descriptor(dtype, keys, dim_v), f"od{number}": _descriptor(dtype, ROWS, dim_v)}
    if "BOTTOM" in constants:
        types |= {"out": f"*{dtype}", "table": "*i32", "out_head": "i64", "out_row": "i64"}
        types |= dict.fromkeys(_PACKED_RUN_TIME, "i32")
    else:
        types |= dict.fromkeys(_RUN_TIME, "i32")
    return types | dict.fromkeys(("scale", "cap_in", "cap_out"), "fp32")


def splits(constants: dict[str, Any]) -> bool:
    """Whether a head size has a second part."""
    return bool(constants["Q2"] or constants["V2"])


def _descriptor(dtype: str, rows: int, dim: int) -> str:
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16 if dtype == "fp16" else gl.bfloat16)
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{layout!r}>"


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    sides: for query, key, value and output (again for second parts: `repeats` is 2), how to make their tensor map and
    the arguments that follow it. made: for each of them the arguments by address.
    """

    kernel: compiled.Kernel
    grid: tuple[int, int, int]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...], Any], ...]
    made: tuple[dict[int, list[Any]], ...]
    tail: list[Any]
    like_query: bool
    repeats: int


class HopperPath:
    """A request bound to the Gluon kernel on one chip; tensors that the copy engine cannot read go to the plain
    path.
    """

    def __init__(self, request: AttentionRequest, chip: Chip, instead: PortablePath) -> None:
        self.request, self.chip, self._instead = request, chip, instead
        self._launches: dict[Any, Launch | None] = {}
        self._stream, self._index, self._lse = torch._C._cuda_getCurrentRawStream, chip.index, request.lse
        self._last: tuple[Any, Launch | None] = ((), None)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        plan: BlockPlan | None = None,
        tables: SequenceTables | None = None,
        rng: tuple[int, int] | None = None,
    ) -> AttentionOutput:
        form = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
        last, launch = self._last
        if form != last:
            launch = self._launch(form, query, key, value)
            self._last = (form, launch)
        pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        if launch is None or (pointers[0] | pointers[1] | pointers[2]) & 15:
            return self._instead(query, key, value, mask, plan, tables, rng)
        out = torch.empty_like(query) if launch.like_query else empty_result(query, value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self._lse else None
        made = launch.made
        arguments: list[Any] = []
        for place, pointer in enumerate((*pointers, out.data_ptr()) * launch.repeats):
            arguments += made[place].get(pointer) or add_map(launch.sides[place], made[place], pointer)
        arguments.append(0 if lse is None else lse.data_ptr())
        arguments += launch.tail
        launch.kernel(launch.grid, self._stream(self._index), arguments)
        return AttentionOutput(out, lse)

    def _launch(self, form: Any, query: Tensor, key: Tensor, value: Tensor) -> Launch | None:
        """The launch of a form; None where the copy engine cannot read it or few rows go to the plain path."""
        if form not in self._launches:
            if len(self._launches) >= _MOST_KEPT:
                self._launches.clear()
            steps_fit = fits(query, key, value) and not packs(self.request, query.shape[2])
            self._launches[form] = self._build(query, key, value) if steps_fit else None
        return self._launches[form]

    def _build(self, query: Tensor, key: Tensor, value: Tensor) -> Launch:
        r, chip = self.request, self.chip
        batch, heads, len_q, dim_qk = query.shape
        len_k, dim_v = key.shape[2], value.shape[3]
        left, right = r.window or (None, None)
        if r.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        shift = r.diagonal + (len_k - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        ends_inside = right is not None and shift + right <= len_k - len_q  # no row reaches past the last key
        tiling = tiling_for(dim_qk, dim_v, len_q, len_k, right is not None, left is not None, r.lse)
        constants = kernel_constants(
            tiling,
            dim_qk=dim_qk,
            dim_v=dim_v,
            group=heads // key.shape[1],
            left=left is not None,
            right=right is not None,
            shifted=right is not None and (shift + right) % ROWS != 0,
            half=right is not None and (shift + right) % tiling.keys == 0 and ends_inside,
            ragged=len_k % tiling.keys != 0 and not ends_inside,
            softcap=r.softcap is not None,
            lse=r.lse,
        )
        dtype = "fp16" if query.dtype == torch.float16 else "bf16"
        key_of = ("hopper", chip.index, dtype, tuple(constants.items()))
        made = compiled.kernel(key_of, lambda: compile_forward(dtype, constants))
        row_tiles = -(-len_q // (ROWS * tiling.consumers))
        rows = ROWS * tiling.consumers
        costs = [
            _OVERHEAD + _key_tiles(first, rows, len_k, shift, left, right, tiling.keys)
            for first in range((row_tiles - 1) * rows, -1, -rows)
        ]
        cached = len_k * (dim_qk + dim_v) * query.itemsize * key.shape[1] // heads
        plan = schedule(costs, batch * heads, chip.multiprocessors, CACHED // max(cached, 1))
        scale, cap_in, cap_out = r.effective_scale * LOG2E, 0.0, 0.0
        if r.softcap is not None:
            cap_in, cap_out, scale = 2 * LOG2E * r.effective_scale / r.softcap, r.softcap * LOG2E, 1.0
        out = empty_result(query, dim_v)
        tail = [
            row_tiles * batch * heads,
            row_tiles,
            plan.together,
            heads,
            len_q,
            len_k,
            shift,
            left or 0,
            right or 0,
            scale,
            cap_in,
            cap_out,
            *[None] * len(constants),
        ]
        repeats = 2 if splits(constants) else 1
        sides = tuple((*side(t), meta) for t, meta in zip((query, key, value, out) * repeats, made.maps, strict=True))
        like_query = dim_qk == dim_v and out.stride() == torch.empty_like(query).stride()
        return Launch(made, (plan.programs, 1, 1), sides, tuple({} for _ in sides), tail, like_query, repeats)


def compile_forward(dtype: str, constants: dict[str, Any]) -> Any:
    """The compiled kernel of a dtype ("bf16" or "fp16") and its constants; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from .kernels import narrow
    from .kernels.hopper import forward, forward_packed, forward_split

    padded, columns = constants["DV"], constants["VC"]
    edit = (lambda ptx: narrow.products(ptx, padded, columns)) if columns < padded else None
    fn = forward_packed if "BOTTOM" in constants else forward_split if splits(constants) else forward
    target = GPUTarget("cuda", 90, 32)
    return compiled.compile_for(fn, kernel_signature(dtype, constants), constants, target, edit=edit, num_warps=4)


def _key_tiles(row: int, rows: int, len_k: int, shift: int, left: int | None, right: int | None, keys: int) -> int:
    """Tiles of keys that a tile of rows reads, as the kernel counts them."""
    end = len_k if right is None else max(min(row + rows + shift + right, len_k), 1)
    last = -(-end // keys)
    return last - (0 if left is None else min(max(row + shift - left, 0) // keys, last - 1))


def add_map(form: tuple[tuple[int, ...], tuple[int, ...], Any], kept: dict[int, list[Any]], pointer: int) -> list[Any]:
    """The arguments of one tensor: its map, which holds addresses alone and so may outlive it, its shape and its
    strides.

    form: shape, strides and the kernel's layout. kept: where they are found again, by address.
    """
    shape, strides, meta = form
    if len(kept) >= _MOST_KEPT:
        kept.clear()
    kept[pointer] = [compiled.tensor_map(pointer, shape, strides, meta), *shape, *strides]
    return kept[pointer]


def side(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides for a tensor map. A dimension of one element may have any stride; the map wants steps of 16
    bytes.
    """
    shape, step = tuple(tensor.shape), max(16 // tensor.itemsize, power_of_two(tensor.shape[3]))
    strides = [step if n == 1 else s for n, s in zip(shape[:3], tensor.stride()[:3], strict=True)]
    return shape, (*strides, 1)
