"""What a request costs on each path: measured tables, interpolated, and what is assumed of chips not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import attrs

from hal_core.plugin_api import (
    DTYPE_BYTES,
    AttentionRequest,
    Basis,
    Causal,
    Estimate,
    MaskKind,
    Provenance,
    Quantity,
)

from .discovery import Chip
from .kernels.fp8.wish import ERROR
from .kernels.skipping.wish import threshold_of
from .tiling import Splits, choose_splits, choose_tiles, hopper_backward_tiles, packs, split_keys

MEASURED = Path(__file__).with_name("profiles") / "measured.json"
#: Paths whose kernels are this package's own.
OWN = frozenset({"hopper", "masked", "portable", "fp8", "skipping"})
#: What sets requests apart from those of the main table, for gradients; the first that holds names a request.
FORMS = ("float32", "deterministic", "dropout", "mask", "bias", "bias gradient")
#: The same without gradients: what the masked Hopper kernel is measured with.
FORWARD_FORMS = ("mask", "bias", "block plan", "small block plan")
#: Operations of forward and backward together over the forward's: five products beside its two.
GRADIENT_FLOPS = 3.5
#: Share of the matrix rate that a path reaches where nothing was measured, long rows of head size 128.
_ASSUMED_SHARE = {
    "hopper": 0.8,
    "masked": 0.6,
    "fp8": 1.2,
    "portable": 0.5,
    "skipping": 0.4,
    "cudnn": 0.6,
    "flash": 0.45,
    "efficient": 0.3,
    "composed": 0.05,
}
#: Dense 16-bit multiply-adds a cycle of one multiprocessor, from NVIDIA's architecture papers, by compute capability.
_PRODUCTS_A_CYCLE = {(8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (12, 0): 512}


class Rate(NamedTuple):
    """Operations a second of a path, and the spread of the interval around it."""

    flops: float
    spread: float


@attrs.frozen(kw_only=True)
class Rates:
    """A device's speed.

    Attributes:
        bandwidth: bytes a second that a read reaches. matrix: operations a second of a large 16-bit product. launch:
            seconds of the shortest call. decode_share: of the bandwidth that decode reaches. grid: rows of dicts with
            path, dim, causal, length, rate; grads where it is of forward and backward together, form where it is of one
            of `FORMS`, or without grads of `FORWARD_FORMS`. joules_per_flop, joules_per_byte: None where not measured.
            basis, provenance, source: of all of it.
    """

    bandwidth: float
    matrix: float
    launch: float
    decode_share: float
    grid: tuple[Mapping[str, Any], ...]
    joules_per_flop: float | None
    joules_per_byte: float | None
    basis: Basis
    provenance: Provenance
    source: str

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> Rates:
        """From what `hal calibrate` or the shipped table hold."""
        return cls(
            bandwidth=values["bandwidth"],
            matrix=values["matrix"],
            launch=values["launch"],
            decode_share=values["decode_share"],
            grid=tuple(values["grid"]),
            joules_per_flop=values.get("joules_per_flop"),
            joules_per_byte=values.get("joules_per_byte"),
            basis=Basis.MEASURED,
            provenance=Provenance.MEASURED_SILICON,
            source=source,
        )

    @classmethod
    def assumed(cls, capability: tuple[int, int], multiprocessors: int, shipped: Rates | None) -> Rates:
        """For a chip that was not measured: a chip of the shipped table's kind scaled, else datasheet figures."""
        per_cycle = _PRODUCTS_A_CYCLE.get(capability, 512)
        matrix = 2.0 * per_cycle * multiprocessors * 1.5e9
        grid = shipped.grid if shipped is not None and capability == (9, 0) else ()
        return cls(
            bandwidth=2e12 if per_cycle >= 1024 else 7e11,
            matrix=matrix,
            launch=8e-6,
            decode_share=0.8,
            grid=tuple(dict(row, rate=row["rate"] * multiprocessors / 132) for row in grid),
            joules_per_flop=None,
            joules_per_byte=None,
            basis=Basis.MODELLED,
            provenance=Provenance.ASSUMED,
            source="scaled from datasheets",
        )

    def knows(self, path: str, request: AttentionRequest) -> bool:
        """Whether a path was measured with requests of this form, of at most twice the length."""
        asked = path, bool(request.grads), form_of(request)
        rows = (row for row in self.grid if (row["path"], row.get("grads", False), row.get("form", "")) == asked)
        return any(row["length"] <= 2 * request.len_q for row in rows)

    def rate(self, path: str, request: AttentionRequest) -> Rate:
        """Operations a second of a path on a request's lengths, between the nearest lengths measured."""
        causal = request.causal is not Causal.NONE
        dim = max(request.dim_qk, request.dim_v)
        kind, form = (path, bool(request.grads)), form_of(request)
        slower = 8.0 if request.dtype in ("float32", "float64") else 1.0
        rows = [row for row in self.grid if (row["path"], row.get("grads", False)) == kind]
        measured = [row for row in rows if row.get("form", "") == form] if form else []
        if measured:  # where a form has no diagonal measured, its cost is that of the pairs it leaves
            slower = 1.0
            measured = [row for row in measured if row["causal"] == causal] or measured
        else:
            measured = [row for row in rows if row["causal"] == causal and not row.get("form", "")]
        dims = sorted({row["dim"] for row in measured})
        if not dims:
            fill = min(1.0, request.len_q / 2048) * min(1.0, dim / 128)
            return Rate(max(self.matrix * _ASSUMED_SHARE[path] * fill, 1e9) / slower, 2.0)
        nearest = min((d for d in dims if d >= dim), default=dims[-1])
        padded = min(dim / nearest, 1.0) if path in ("hopper", "masked", "portable") else 1.0
        points = sorted((row["length"], row["rate"]) for row in measured if row["dim"] == nearest)
        spread = 1.1 if self.basis is Basis.MEASURED else 2.0
        return Rate(
            _between(points, max(request.len_q, 1)) * padded / slower, spread if dim == nearest else spread * 1.3
        )


def form_of(request: AttentionRequest) -> str:
    """Which of `FORMS`, or without gradients of `FORWARD_FORMS`, a request has; "" for none of them."""
    if not request.grads:
        if request.dtype not in ("float16", "bfloat16") or request.dropout:
            return ""
        if request.block_plan is not None and request.block_plan[0] % 128:
            return "small block plan"  # under a mask too: a kernel of another build serves it
        found = {MaskKind.BOOLEAN: "mask", MaskKind.ADDITIVE: "bias"}.get(request.mask, "")
        return found or ("block plan" if request.block_plan is not None else "")
    holds = (
        request.dtype == "float32",
        request.deterministic,
        request.dropout > 0,
        request.mask is MaskKind.BOOLEAN,
        request.mask is MaskKind.ADDITIVE and "mask" not in request.grads,
        request.mask is MaskKind.ADDITIVE,
    )
    return next((form for form, found in zip(FORMS, holds, strict=True) if found), "")


def _between(points: list[tuple[int, float]], length: int) -> float:
    """Linear in the logarithm of the length, flat beyond the ends; below the shortest, in proportion to the length."""
    if length <= points[0][0]:
        return points[0][1] * length / points[0][0]
    for (low, slow), (high, fast) in pairwise(points):
        if length <= high:
            share = math.log(length / low) / math.log(high / low)
            return slow + (fast - slow) * share
    return points[-1][1]


def shipped() -> tuple[str, Rates] | None:
    """(device model, rates) of the table in this package; None where it holds none."""
    if not MEASURED.exists():
        return None
    values = json.loads(MEASURED.read_text(encoding="utf-8"))
    return values["device"], Rates.of(values, f"measured on {values['device']}, {values['date']}")


class Choice(NamedTuple):
    """The chosen path and every candidate's seconds, fastest first."""

    path: str
    seconds: tuple[tuple[str, float], ...]


def seconds(path: str, request: AttentionRequest, rates: Rates, chip: Chip) -> float:
    """Middle of a path's time on a chip."""
    flops = 2.0 * request.visible_macs
    if request.grads:
        flops *= GRADIENT_FLOPS
    if path == "composed":
        flops = 2.0 * request.macs * (GRADIENT_FLOPS if request.grads else 1.0)
    decoding = packs(request, request.len_q) and not request.grads
    share = rates.decode_share if path == "portable" else 0.8 * rates.decode_share
    reading = request.bytes_moved / (rates.bandwidth * share)
    if decoding and path != "composed":
        return rates.launch * (1.0 if path == "portable" else 1.2) + reading
    launch = rates.launch * (1.0 if path in OWN else 1.3)  # what no length hides: equal rates go to the own kernels
    idle = _idle(request, chip) if path == "hopper" and request.grads else 1.0
    return launch + max(flops / rates.rate(path, request).flops * idle, reading)


def _idle(request: AttentionRequest, chip: Chip) -> float:
    """How much longer the Hopper kernels take because their backward, a program for each block of keys of a key head,
    leaves multiprocessors without work in its last round: few keys, or one key head for many query heads.
    """
    tiles = hopper_backward_tiles(request.dim_qk, request.dim_v, request.causal is not Causal.NONE)
    programs = max(request.batch * request.heads_kv * -(-request.len_k // tiles.keys), 1)
    busy = programs / (-(-programs // chip.multiprocessors) * chip.multiprocessors)
    backward = 1 - 1 / GRADIENT_FLOPS
    return 1 - backward + backward / busy


def estimate(request: AttentionRequest, choice: Choice, rates: Rates, chip: Chip) -> Estimate:
    """What a request costs on the path that was chosen; the time's source names every path with its own time."""
    middle = choice.seconds[0][1]
    spread = 1.3 if packs(request, request.len_q) else rates.rate(choice.path, request).spread
    others = ", ".join(f"{label(path)} {value * 1e3:.4g} ms" for path, value in choice.seconds)
    source = f"{'gradients by ' if request.grads else ''}{others} ({rates.source})"
    time = Quantity(middle / spread, middle * (2 - 1 / spread), rates.basis, rates.provenance, source)
    energy = None
    if (
        rates.joules_per_flop is not None
        and rates.joules_per_byte is not None
        and choice.path in OWN - {"fp8", "skipping"}
    ):
        joules = 2.0 * request.visible_macs * rates.joules_per_flop + request.bytes_moved * rates.joules_per_byte
        energy = Quantity(
            joules / 1.3, joules * 1.3, rates.basis, rates.provenance, f"board energy by NVML ({rates.source})"
        )
    error = None
    if choice.path == "fp8":
        error = Quantity(0.0, ERROR, Basis.DECLARED, Provenance.ASSUMED, label("fp8"))
    elif (threshold := threshold_of(request)) is not None:
        lost = min(request.len_k * 2.0**-threshold, 1.0)
        error = Quantity(0.0, lost, Basis.DECLARED, Provenance.ASSUMED, "what a row may lose of its sum of weights")
    return Estimate(time=time, energy=energy, error=error, memory=memory(request, choice.path, chip))


def label(path: str) -> str:
    """A path's name for people."""
    return {
        "hopper": "own Hopper kernel",
        "masked": "own Hopper kernel for masks and block plans",
        "fp8": "own Hopper kernel in FP8 (e4m3), operands quantised in the call",
        "portable": "own Triton kernel",
        "skipping": "own Triton kernel that skips tiles",
        "cudnn": "torch cuDNN",
        "flash": "torch FlashAttention",
        "efficient": "torch efficient attention",
        "composed": "torch operations",
    }[path]


def memory(request: AttentionRequest, path: str, chip: Chip) -> int:
    """Bytes that a call allocates at its peak, output included, inputs not.

    Where gradients are asked for: of forward and backward together, the gradients included. Packed lengths count as if
    every sequence were the longest, a block plan as if it ran over batch entries and heads.
    """
    r, rows = request, request.batch * request.heads_q * request.len_q
    result = rows * (r.dim_v * DTYPE_BYTES[r.dtype] + (8 if r.dtype == "float64" else 4) * r.lse)
    if path == "composed":
        return result + (max(_differentiable_memory(r), _backward_memory(r)) if r.grads else _in_place_memory(r))
    if path in OWN:
        forward = _own_forward_memory(r, path, chip)
        if not r.grads:
            return result + forward
        backward = _hopper_backward_memory(r) if path == "hopper" else _portable_backward_memory(r, chip)
        return result + 4 * rows * (not r.lse) + max(forward, backward)
    if path == "efficient" and r.mask is not MaskKind.NONE:  # as an additive mask, padded to whole 16 columns
        result += r.mask_batch * r.mask_heads * r.len_q * (r.len_k + 16) * DTYPE_BYTES[r.dtype]
    result += 4 * rows * (path == "flash" or bool(r.grads))  # torch's log-sum-exp
    # FlashAttention's backward copies the output and its gradient, which reach it as transposed views.
    copies = 2 * rows * r.dim_v * DTYPE_BYTES[r.dtype] * (path == "flash")
    return result + (_fused_backward_memory(r) + copies if r.grads else 0)


def _own_forward_memory(request: AttentionRequest, path: str, chip: Chip) -> int:
    """What the own forward kernels borrow."""
    r = request
    if path == "fp8":
        from .kernels.fp8.operands import quantised_bytes

        return quantised_bytes(r)
    if path == "skipping":
        return 0
    if path == "hopper":
        return 32 * (r.batch * r.len_q // 128 + r.batch + 1) if r.packed else 0
    lists = 0
    if r.block_plan is not None and r.block_plan[2] > 1:
        lists = r.batch * r.heads_q * -(-r.len_q // r.block_plan[0]) * (r.block_plan[2] + 1) * 4
    if path == "masked":
        return lists
    tiles, splits = choose_tiles(r, r.len_q, chip), Splits(1, 0)
    if packs(r, r.len_q):
        splits = choose_splits(r, tiles, r.len_q, r.len_k, r.batch, chip)
    split = split_keys(r, tiles, splits, r.len_q, r.batch, not r.deterministic)
    return lists + (0 if split.joined else 4 * split.partial)


def _portable_backward_memory(request: AttentionRequest, chip: Chip) -> int:
    """The most of what the backwards take that may serve a request of the portable path, by its tensors."""
    from .kernels.portable import backward_launch, short_launch

    r = request
    found = backward_launch.backward_memory(r)
    if short_launch.takes(r):
        found = max(found, short_launch.backward_memory(r))
    beside = r.mask is not MaskKind.NONE or r.block_plan is not None or r.dropout > 0
    if chip.capability == (9, 0) and r.dtype in ("float16", "bfloat16") and beside and not r.packed:
        hopper, rows = _hopper_backward_memory(r), r.batch * r.heads_q * (r.len_q + 128)
        if r.mask is MaskKind.ADDITIVE or r.dropout:
            hopper += 8 * rows
        if "mask" in r.grads:
            hopper += backward_launch.backward_memory(replace(r, grads=frozenset({"mask"})))
        if r.block_plan is not None:
            blocks_q, blocks_k = -(-r.len_q // r.block_plan[0]), -(-r.len_k // r.block_plan[1])
            hopper += r.batch * r.heads_q * blocks_k * (5 * blocks_q + 4)
        found = max(found, hopper)
    return found


def _gradients(request: AttentionRequest) -> int:
    """Bytes of the gradients of query, key and value."""
    r, keys = request, request.batch * request.heads_kv * request.len_k
    return (r.batch * r.heads_q * r.len_q * r.dim_qk + keys * (r.dim_qk + r.dim_v)) * DTYPE_BYTES[r.dtype]


def _hopper_backward_memory(request: AttentionRequest) -> int:
    """What `kernels.hopper_backward` allocates: the gradients, in float32 the sums of the query's gradient, and two
    numbers for each row.
    """
    r = request
    right = r.causal is not Causal.NONE or (r.window or (None, None))[1] is not None
    tiles = hopper_backward_tiles(r.dim_qk, r.dim_v, right)
    rows = r.batch * r.heads_q * (-(-r.len_q // tiles.rows) * tiles.rows)
    return _gradients(r) + 4 * rows * (tiles.size // tiles.rows + 2) + 4 * rows // tiles.rows * r.deterministic


def _fused_backward_memory(request: AttentionRequest) -> int:
    """What the backward of torch's FlashAttention allocates beside copies; cuDNN's is taken for the same.

    dq, dk and dv in the operands' dtype, and in float32 the sums of dq and one number for each row; with grouped heads
    also dk and dv of every query head, before they are added up.

    Source: PyTorch, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd.
    """
    r, size = request, DTYPE_BYTES[request.dtype]
    padded = r.batch * r.heads_q * (-(-r.len_q // 128) * 128)
    expanded = r.batch * r.heads_q * r.len_k * (r.dim_qk + r.dim_v) * (r.heads_q != r.heads_kv)
    return _gradients(r) + expanded * size + padded * (-(-r.dim_qk // 32) * 32 + 1) * 4


def _in_place_memory(request: AttentionRequest) -> int:
    """What `kernels.composed` borrows where torch differentiates nothing; packed sequences follow each other."""
    r, size = request, 8 if request.dtype == "float64" else 4
    batch = 1 if r.packed else r.batch
    rows, keys = batch * r.heads_q * r.len_q, batch * r.heads_kv * r.len_k
    pairs = rows * r.len_k
    needed = pairs * size + (2 + r.lse) * rows * size + pairs * (r.dropout > 0)
    if r.packed or DTYPE_BYTES[r.dtype] != size:  # copies of the operands, and the result before it is copied
        needed += (rows * (r.dim_qk + r.dim_v) + keys * (r.dim_qk + r.dim_v)) * size
    if r.window is not None or r.causal is not Causal.NONE:
        needed += r.len_q * r.len_k + 8 * (r.len_q + r.len_k)
    return needed


def _backward_memory(request: AttentionRequest) -> int:
    """What torch's backward of `kernels.composed` holds at its peak beside the results, in the order of its nodes.

    A node frees what it kept once it has run. The last of packed sequences is differentiated first, while torch still
    keeps all that the others need.
    """
    r, size = request, 8 if request.dtype == "float64" else 4
    batch = 1 if r.packed else r.batch
    rows, keys, cells = batch * r.heads_q * r.len_q, batch * r.heads_kv * r.len_k, r.len_q * r.len_k
    cast, scores = DTYPE_BYTES[r.dtype] != size, rows * r.len_k * size
    repeated = batch * r.heads_q * r.len_k * size * (r.heads_q != r.heads_kv)
    softcap, dropout = r.softcap is not None, r.dropout > 0
    alone = cast and not repeated  # converted keys and values are kept as they are, or repeated
    of_keys = (rows * cast + keys * alone) * r.dim_qk * size + repeated * r.dim_qk  # kept by the first product
    of_values = keys * alone * r.dim_v * size + repeated * r.dim_v  # by the second
    masks = rows + cells * (r.window is not None or r.causal is not Causal.NONE)
    masks += r.mask_batch * r.mask_heads * cells * (r.mask is MaskKind.BOOLEAN)
    masks += rows * r.len_k * ((r.block_plan is not None) + dropout)
    kept = of_keys + of_values + masks + scores * (1 + softcap + dropout + r.lse)
    out, grad_v = rows * r.dim_v * size, keys * r.dim_v * size
    peaks = [kept + out + max(scores + (repeated * r.dim_v or grad_v), out * cast)]  # of weights and value
    if r.grad_lse:
        peaks.append(kept + 3 * scores)  # of the scores through the log-sum-exp
    held = kept - of_values - scores * dropout + keys * r.dim_v * DTYPE_BYTES[r.dtype]
    product = r.device.startswith("cuda")  # a GPU's softmax backward multiplies gradient and weights first
    peaks.append(held + (2 + product) * scores)  # of scores; the weights are kept
    grad_mask = r.mask_batch * r.mask_heads * cells * size if "mask" in r.grads else 0
    peaks.append(held + scores + grad_mask)  # of the mask, or of the scores before the scale
    grads = (rows + keys) * r.dim_qk * size + repeated * r.dim_qk + grad_mask
    peaks.append(held - scores * (1 + softcap) + scores + grads)  # of query and key
    left = kept if r.packed else 0
    return max(peaks) + left * (r.batch - 1)


def _differentiable_memory(request: AttentionRequest) -> int:
    """What torch's operations of `kernels.composed` hold at their peak, in the order of its statements.

    Packed sequences follow each other, and torch keeps for the backward what those before have left.
    """
    r, size = request, 8 if request.dtype == "float64" else 4
    batch = 1 if r.packed else r.batch
    rows, keys, cells = batch * r.heads_q * r.len_q, batch * r.heads_kv * r.len_k, r.len_q * r.len_k
    pairs, cast = rows * r.len_k, DTYPE_BYTES[r.dtype] != size
    scores = pairs * size
    repeated = batch * r.heads_q * r.len_k * size * (r.heads_q != r.heads_kv)  # torch.matmul copies grouped keys
    alone = cast and not repeated  # converted keys and values are kept as they are, or repeated
    kept = (rows * cast + keys * alone) * r.dim_qk * size + repeated * r.dim_qk
    peaks = [kept + 2 * scores]
    if r.softcap is not None:
        peaks.append(kept + 3 * scores)
        kept += scores
    if r.mask is MaskKind.BOOLEAN:
        kept += r.mask_batch * r.mask_heads * cells
    if r.window is not None or r.causal is not Causal.NONE:
        peaks.append(kept + scores + 11 * cells)  # distances in int64
        kept += 2 * cells
    if r.block_plan is not None:
        peaks.append(kept + scores + 3 * pairs)
        kept += pairs
    peaks.append(kept + 2 * scores)
    kept += 2 * scores
    if r.dropout:
        peaks.append(kept + 2 * scores + pairs)
        kept += scores + pairs
    kept += keys * r.dim_v * size * alone + repeated * r.dim_v + rows * r.dim_v * size
    peaks.append(kept + rows * r.dim_v * size * cast)
    if r.lse:
        peaks.append(kept + scores)
    if not r.packed:
        return max(peaks)
    left = kept - rows * r.dim_v * size - scores * (not r.lse)  # the log-sum-exp's backward reads the scores
    results = rows * r.dim_v * DTYPE_BYTES[r.dtype] + rows * size * r.lse
    return left * (r.batch - 1) + max(peaks) + results * (r.batch - 1)
