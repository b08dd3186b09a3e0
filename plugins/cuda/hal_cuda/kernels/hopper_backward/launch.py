"""The launch of the Hopper backward: its configuration, its scratch memory, and tensor maps kept from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, Causal, Grads, MaskKind

from ...memory import Borrowed, borrowing
from ...runtime import binaries
from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from ...tiling import HopperBackwardTiles, hopper_backward_tiles, power_of_two
from ..hopper.launch import LOG2E, add_map, fits, side
from ..portable.block_plans import rows_of_blocks
from ..portable.dropout import random_words
from .config import Config
from .rows import finish, prepare

#: Key heads are worked on together up to these many, and these many blocks: what they read then stays in the cache.
_MOST_BLOCKS, _MOST_TOGETHER = 256, 16
_MOST_KEPT = 1024
_RUN_TIME = ("tiles", "blocks", "together", "heads_kv", "len_k", "below", "above")
_LISTS = ("visible_b", "list_b", "list_h", "list_rows", "list_blocks", "mask_b", "mask_h")
_SCALING = ("scale", "out_scale", "cap_in", "cap_out", "kept")
PREPARE_SIGNATURE = {
    **dict.fromkeys(("lse", "grad_lse", "statistics", "sums"), "*fp32"),
    "arrivals": "*i32",
    **dict.fromkeys(("o_b", "o_h", "o_m", "g_b", "g_h", "g_m", "l_b", "l_h", "l_m"), "i64"),
    **{"seed": "i64", "offset": "i32"},
    **dict.fromkeys(("heads", "len_q", "tiles"), "i32"),
}
FINISH_SIGNATURE = {
    "sums": "*fp32",
    **dict.fromkeys(("g_b", "g_h", "g_m"), "i64"),
    **dict.fromkeys(("heads", "len_q", "tiles"), "i32"),
    "scale": "fp32",
}
#: Of both: addresses by 16 bytes, strides by 8 elements.
ALIGNED = dict.fromkeys(("out", "grad_out", "statistics", "sums", "grad_query"), 16)
ALIGNED |= dict.fromkeys(("o_b", "o_h", "o_m", "g_b", "g_h", "g_m"), 8)


def config_of(
    tiles: HopperBackwardTiles,
    *,
    group: int,
    right: bool,
    left: bool,
    ragged: bool,
    softcap: bool,
    ordered: bool = False,
    padded: bool = False,
    per_block: int = 0,
    mask: int = 0,
    dropout: bool = False,
) -> Config:
    """What the kernel is compiled for; see `Config`."""
    return Config(
        group=group,
        keys=tiles.keys,
        rows=tiles.rows,
        dim_qk=tiles.dim_qk,
        dim_v=tiles.dim_v,
        stages=2 if mask or dropout or ordered else tiles.stages,
        score_stages=2,
        turns=tiles.turns,
        engine=tiles.engine or ordered,
        right=right,
        left=left,
        ragged=ragged,
        softcap=softcap,
        ordered=ordered,
        padded=padded,
        per_block=per_block,
        mask=mask,
        dropout=dropout,
        staging=2 if ordered and not (mask or dropout) else 1,
    )


def kernel_signature(dtype: str, config: Config) -> dict[str, str]:
    """Triton types of the kernel's run-time arguments; dtype "bf16" or "fp16"."""
    from triton.experimental.gluon import language as gl

    kind = gl.float16 if dtype == "fp16" else gl.bfloat16

    def operand(rows: int, dim: int, bytes_alone: bool = False) -> str:
        block, name = [1, 1, rows, dim], "u8" if bytes_alone else dtype
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.uint8 if bytes_alone else kind)
        return f"tensordesc<{name}[{', '.join(map(str, block))}],{layout!r}>"

    def numbers(rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        return f"tensordesc<fp32[{rows}, {columns}],{layout!r}>"

    C = config
    own = C.keys if C.wide else C.keys // 2
    types = {"qd": operand(C.rows, C.space_qk), "od": operand(C.rows, C.space_v), "sd": numbers(C.statistics, C.rows)}
    types |= {"kd": operand(C.keys, C.space_qk), "vd": operand(C.keys, C.space_v)}
    types |= {"dkd": operand(own, C.space_qk), "dvd": operand(own, C.space_v), "dqd": numbers(16, 256)}
    types["md"] = operand(C.rows, C.keys, C.mask == 1) if C.mask else types["qd"]
    types |= {"sums": "*fp32", "arrivals": "*i32", "visible": "*u8", "indices": "*i32", "counts": "*i32"}
    return (
        types
        | dict.fromkeys(_LISTS, "i32")
        | dict.fromkeys(_RUN_TIME, "i32")
        | dict.fromkeys(_SCALING, "fp32")
        | {"least": "i32"}
    )


def compile_backward(dtype: str, config: Config) -> Any:
    """The compiled kernel of a dtype ("bf16" or "fp16") and its configuration; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from .kernel import backward

    target = GPUTarget("cuda", 90, 32)
    return binaries.compile_for(
        backward, kernel_signature(dtype, config), {"C": config}, target, {"sums": 16}, num_warps=4
    )


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    sides: what the tensor maps are made from, in the kernel's order; made: for each of them its arguments by address.
    gradients: shape and strides of those of query, key and value.
    statistics, sums: float32 numbers of scratch memory, arrivals: int32 ones. in_block: blocks of the kernel in a key
    block of the plan. of_keys: the mask, if any, is one of keys alone. normalise: as `PortableBackward.normaliser`.
    tiles: grid of `prepare` and `finish`;
    sizes: their numbers after the strides.
    """

    kernel: binaries.Kernel
    grid: tuple[int, int, int]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...], Any], ...]
    made: tuple[dict[int, list[Any]], ...]
    gradients: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    tail: list[Any]
    statistics: int
    sums: int
    arrivals: int
    of_keys: bool
    normalise: Callable[[dict[str, Tensor | None]], None] | None
    in_block: int
    prepare: Launcher
    finish: Launcher
    tiles: tuple[int, int, int]
    sizes: list[int]


class HopperBackward:
    """Gradients of a request on one chip, from a forward's result.

    A call returns None where the copy engine cannot read a tensor: another path serves it.
    """

    def __init__(self, request: AttentionRequest, context: Context) -> None:
        self.request, self.chip, self._context = request, context.chip, context
        self._launches: dict[Any, Launch | None] = {}
        self._last: tuple[Any, Launch | None] = ((), None)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
        grad_lse: Tensor | None = None, mask: Tensor | None = None, plan: BlockPlan | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads | None:  # fmt: skip
        """out, grad_out: [batch, heads, len_q, dim_v]; lse, grad_lse: float32 [batch, heads, len_q], natural.

        mask: of four dimensions. plan: whose blocks are whole tiles (see `_takes`).
        """
        pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), grad_out.data_ptr())
        if (pointers[0] | pointers[1] | pointers[2] | pointers[3] | out.data_ptr()) & 15:
            return None
        form = (
            *(query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()),
            *(grad_out.stride(), out.stride(), grad_lse is None, None if plan is None else plan[:2]),
            None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.data_ptr() & 15),
        )
        last, launch = self._last
        if form != last:
            launch = self._launch(form, query, key, value, out, grad_out, grad_lse is not None, mask, plan)
            self._last = (form, launch)
        if launch is None:
            return None
        kind, device = query.dtype, query.device
        grads = [torch.empty_strided(shape, step, dtype=kind, device=device) for shape, step in launch.gradients]
        with borrowing(self._context.memory) as borrow:
            scratch = borrow((launch.statistics + launch.sums + launch.arrivals,), torch.float32)
            sums, statistics = scratch[: launch.sums], scratch[launch.sums :]
            arrivals = statistics[launch.statistics :].view(torch.int32) if launch.arrivals else None
            lse = lse if lse.is_contiguous() else borrow(lse.shape, lse.dtype).copy_(lse)
            words = (0, 0) if rng is None else random_words(rng)
            of_lse = (0, 0, 0) if grad_lse is None else grad_lse.stride()
            rows = [*out.stride()[:3], *grad_out.stride()[:3], *of_lse, *words, *launch.sizes]
            launch.prepare(launch.tiles, (out, grad_out, lse, grad_lse, statistics, sums, arrivals), rows)
            if launch.normalise is not None:
                launch.normalise({"q": query, "k": key, "numbers": statistics, "mask": mask})
            addresses = (
                *(pointers[0], pointers[3], statistics.data_ptr(), pointers[1], pointers[2]),
                *(grads[1].data_ptr(), grads[2].data_ptr(), sums.data_ptr()),
                pointers[0] if mask is None or launch.of_keys else mask.data_ptr(),
            )
            arguments: list[Any] = []
            for place, pointer in enumerate(addresses):
                kept = launch.made[place]
                arguments += kept.get(pointer) or add_map(launch.sides[place], kept, pointer)
            arguments += [sums.data_ptr(), 0 if arrivals is None else arrivals.data_ptr()]
            arguments += [
                mask.data_ptr() if mask is not None and launch.of_keys else 0,
                *self._listed(plan, key, mask, launch, borrow),
            ]
            arguments += launch.tail
            launch.kernel(launch.grid, torch._C._cuda_getCurrentRawStream(self.chip.index), arguments)
            numbers = [*grads[0].stride()[:3], *launch.sizes, self.request.effective_scale]
            launch.finish(launch.tiles, (sums, grads[0]), numbers)
        return Grads(grads[0], grads[1], grads[2], None)

    def _launch(
        self, form: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_out: Tensor, of_lse: bool,
        mask: Tensor | None, plan: BlockPlan | None,
    ) -> Launch | None:  # fmt: skip
        """The launch of a form, kept; None where another path serves it."""
        if form not in self._launches:
            if len(self._launches) >= _MOST_KEPT:
                self._launches.clear()
            taken = fits(query, key, value, grad_out, out) and self._takes(query, key, value, mask, plan)
            built = self._build(query, key, value, grad_out, of_lse, mask, plan) if taken else None
            self._launches[form] = built
        return self._launches[form]

    def _takes(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None) -> bool:
        """Whether the kernel is right for a mask and a plan, and for dropout."""
        if self.request.dropout and max(query.shape[3], value.shape[3]) > 128:
            return False
        if mask is not None and not _of_keys(mask):
            additive = self.request.mask is MaskKind.ADDITIVE
            kind, wide = query.dtype if additive else torch.bool, max(query.shape[3], value.shape[3])
            if wide > 128 or (
                additive and (wide <= 64 or self.request.dropout)
            ):  # shared memory does not hold its tiles
                return False
            whole = mask.shape[2] == query.shape[2] > 1 and mask.shape[3] == key.shape[2] > 1
            if mask.dtype != kind or not whole or mask.data_ptr() & 15 or not fits(mask):
                return False
        if plan is not None:
            tiles = hopper_backward_tiles(query.shape[3], value.shape[3], True)
            if tiles.dim_qk > 128 or self.request.deterministic or plan.block_k % tiles.keys:
                return False
            # The last row block may end in the middle of a tile, not before its last one.
            return plan.block_q == tiles.rows or not (plan.block_q % tiles.rows or query.shape[2] % plan.block_q)
        return True

    def _listed(
        self, plan: BlockPlan | None, key: Tensor, mask: Tensor | None, launch: Launch, borrow: Borrowed
    ) -> list[Any]:
        """The kernel's arguments for `Lists`, after the mask."""
        visible_b = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
        runs_over = [0, 0] if mask is None else [int(size > 1) for size in mask.shape[:2]]
        if plan is None:
            return [0, 0, visible_b, 0, 0, 0, 1, *runs_over]
        lists = rows_of_blocks(plan, key.shape[2], self.chip, borrow)
        batch, heads, blocks_k, rows = lists.indices.shape
        steps = 0 if batch == 1 else heads * blocks_k, 0 if heads == 1 else blocks_k
        return [lists.indices.data_ptr(), lists.counts.data_ptr(), visible_b, *steps, rows, launch.in_block, *runs_over]

    def _build(
        self, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, of_lse: bool,
        mask: Tensor | None, plan: BlockPlan | None,
    ) -> Launch:  # fmt: skip
        r, chip = self.request, self.chip
        batch, heads, len_q, dim_qk = query.shape
        heads_kv, len_k, dim_v = key.shape[1], key.shape[2], value.shape[3]
        left, right = r.window or (None, None)
        if r.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        shift = r.diagonal + (len_k - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        tiles, of_keys = hopper_backward_tiles(dim_qk, dim_v, right is not None), mask is not None and _of_keys(mask)
        config = config_of(
            tiles,
            group=heads // heads_kv,
            right=right is not None,
            left=left is not None,
            ragged=len_k % tiles.keys != 0,
            softcap=r.softcap is not None,
            ordered=r.deterministic,
            padded=of_keys,
            dropout=r.dropout > 0,
            mask=0 if mask is None or of_keys else 1 if r.mask is MaskKind.BOOLEAN else 2,
            per_block=0 if plan is None else plan.block_q // tiles.rows,
        )
        dtype = "fp16" if query.dtype == torch.float16 else "bf16"
        made = binaries.kernel(("hopper backward", chip.index, dtype, config), lambda: compile_backward(dtype, config))
        row_tiles, blocks = -(-len_q // tiles.rows), -(-len_k // tiles.keys)
        together, places = 1, batch * heads_kv
        while (
            right is not None
            and plan is None
            and together < _MOST_TOGETHER
            and 2 * together * blocks <= _MOST_BLOCKS
            and places % (2 * together) == 0
        ):
            together *= 2
        unit = 1.0 if config.mask == 2 else LOG2E
        scale, cap_in, cap_out = r.effective_scale * unit, 0.0, 0.0
        if r.softcap is not None:
            cap_in, cap_out = 2 * LOG2E * r.effective_scale / r.softcap, r.softcap * unit
        tail = [
            *(row_tiles, blocks, together, heads_kv, len_k, shift - (left or 0), shift + (right or 0)),
            *(scale, r.effective_scale, cap_in, cap_out),
            *(1 / (1 - r.dropout), int(torch.tensor(r.dropout).mul(65536).add(0.5)), None),
        ]
        all_tiles = batch * heads * row_tiles
        statistics, sums = all_tiles * config.statistics * tiles.rows, all_tiles * tiles.size
        gradients = tuple((tuple(t.shape), _dense_strides(t)) for t in (query, key, value))
        of_scratch = [((statistics // tiles.rows, tiles.rows), (tiles.rows, 1)), ((sums // 256, 256), (256, 1))]
        forms = [side(query), side(grad_out), of_scratch[0], side(key), side(value), *gradients[1:], of_scratch[1]]
        forms.append(side(query if mask is None or of_keys else mask))
        sides = tuple((shape, strides, meta) for (shape, strides), meta in zip(forms, made.maps, strict=True))
        constants = {"DV": dim_v, "BDV": power_of_two(dim_v), "SUMS": tiles.size, "BM": tiles.rows}
        kinds = {"out": f"*{dtype}", "grad_out": f"*{dtype}"}
        constants |= {
            "GRAD_LSE": of_lse,
            "ORDERED": r.deterministic,
            "NATURAL": config.mask == 2,
            "WORDS": config.dropout,
        }
        preparing = launcher(chip, prepare, kinds | PREPARE_SIGNATURE, constants, ALIGNED, num_warps=8)
        finishing = {"D": dim_qk, "BD": config.space_qk, "BM": tiles.rows}
        ending = launcher(chip, finish, {"grad_query": f"*{dtype}"} | FINISH_SIGNATURE, finishing, ALIGNED, num_warps=8)
        return Launch(
            kernel=made,
            grid=(blocks * places, 1, 1),
            sides=sides,
            made=tuple({} for _ in sides),
            gradients=gradients,
            tail=tail,
            statistics=statistics,
            sums=sums,
            of_keys=of_keys,
            normalise=self._normalise(query, key, value, grad_out, mask, tiles.rows) if config.mask == 2 else None,
            in_block=1 if plan is None else plan.block_k // tiles.keys,
            arrivals=batch * heads * row_tiles if r.deterministic else 0,
            prepare=preparing,
            finish=ending,
            tiles=(row_tiles * batch * heads, 1, 1),
            sizes=[heads, len_q, row_tiles],
        )

    def _normalise(
        self, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, mask: Tensor | None, rows: int
    ) -> Callable[[dict[str, Tensor | None]], None]:
        """What writes the corrections of weights into `Maps.statistics`."""
        from ..portable.backward_launch import PortableBackward

        return PortableBackward(self.request, self._context).normaliser(query, key, value, grad_out, mask, rows)


def _of_keys(mask: Tensor) -> bool:
    """Whether a mask says of each key whether rows read it, one byte behind the other."""
    return mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1 < mask.shape[3] and mask.stride(3) == 1


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a gradient: heads lie in memory as in its operand."""
    _, heads, length, dim = tensor.shape
    if tensor.stride(1) < tensor.stride(2) and heads > 1 and length > 1:
        return (heads * length * dim, dim, heads * dim, 1)
    return (heads * length * dim, length * dim, dim, 1)


__all__ = ["HopperBackward", "compile_backward", "config_of", "kernel_signature"]
