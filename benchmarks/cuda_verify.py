"""Hold each CUDA kernel to float64 on this GPU and write plugins/cuda/verified.json; or list what changed since the
last time.

python benchmarks/cuda_verify.py            check on the GPU and write
python benchmarks/cuda_verify.py --changed  no GPU: kernels whose source is not the one that was checked
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, Causal, SequenceMetadata
from hal_core.testing import reference, reference_gradients, relative_error, request_of

if TYPE_CHECKING:
    from cuda_attention import Bench

ROOT = Path(__file__).resolve().parent.parent / "plugins" / "cuda"
_HOPPER = tuple(
    f"hopper/{file}"
    for file in ("forward", "producer", "consumer", "step", "pipeline", "softmax", "result", "config", "narrow")
)
_ATTEND = ("portable/attend", "portable/merge", "portable/dropout")
_BACKWARD = (
    *("portable/backward", "portable/backward_kv", "portable/backward_q", "portable/backward_step"),
    *("portable/attend", "portable/merge", "portable/dropout"),
)
_SHORT = ("portable/short", "portable/mask_tiles", "portable/dropout")
_MASKED = (
    *(f"hopper_masked/{file}" for file in ("kernel", "consumer", "pipeline", "config")),
    *(f"hopper/{file}" for file in ("pipeline", "softmax", "result", "config", "step", "layouts")),
)
_HOPPER_BACKWARD = tuple(
    f"hopper_backward/{file}" for file in ("kernel", "consumer", "wide", "pipeline", "config", "rows")
)
_FP8 = (
    *(f"fp8/{file}" for file in ("forward", "producer", "consumer", "wide", "softmax", "result", "layouts", "config")),
    "fp8/quantise",
    *("hopper/pipeline", "hopper/softmax", "hopper/result", "hopper/config"),
)
#: Kernel and the files of hal_cuda/kernels whose source its check vouches for.
KERNELS = {
    "hopper.forward": _HOPPER,
    "hopper.forward_split": _HOPPER,
    "hopper.forward_packed": (*_HOPPER, "hopper/tile_table"),
    "hopper.tile_table": ("hopper/tile_table",),
    "hopper_masked.forward_masked": _MASKED,
    "hopper_backward.backward": _HOPPER_BACKWARD,
    "hopper_backward.prepare": ("hopper_backward/rows",),
    "hopper_backward.finish": ("hopper_backward/rows",),
    "fp8.forward_fp8": _FP8,
    "fp8.quantise_all": ("fp8/quantise",),
    "fp8.quantise_rows": ("fp8/quantise",),
    "fp8.quantise_values": ("fp8/quantise",),
    "fp8.tile_maxima": ("fp8/quantise",),
    "fp8.tile_sums": ("fp8/quantise",),
    "fp8.mean_of_sums": ("fp8/quantise",),
    "skipping.attend_skipping": ("skipping/attend",),
    "portable.attend": _ATTEND,
    "portable.merge": ("portable/merge",),
    "portable.keep_mask": ("portable/dropout",),
    "portable.list_once": ("portable/block_plans",),
    "extra.reduce_rows": ("extra/reductions",),
    "extra.reduce_columns": ("extra/reductions",),
    "extra.rope_heads": ("extra/rope",),
    "extra.rope_table": ("extra/rope",),
    "extra.paged_append": ("extra/paged",),
    "extra.paged_read": ("extra/paged",),
    "extra.pool": ("extra/block_scores",),
    "extra.square_sums": ("extra/block_scores",),
    "extra.count_keys": ("extra/block_choice",),
    "extra.list_chosen": ("extra/block_choice",),
    "extra.gelu_linear": ("extra/gelu_linear",),
    "extra.gelu_linear_hopper": ("extra/gelu_hopper", "extra/gelu_config"),
    "portable.mark_blocks": ("portable/block_plans",),
    "portable.list_rows": ("portable/block_plans",),
    "portable.prepare": _BACKWARD,
    "portable.grad_kv": _BACKWARD,
    "portable.grad_q": _BACKWARD,
    "portable.normalise": (*_BACKWARD, "portable/backward_mask"),
    "portable.grad_mask": (*_BACKWARD, "portable/backward_mask"),
    "portable.sum_parts": (*_SHORT, "portable/backward_mask"),
    "portable.attend_short": _SHORT,
    "portable.backward_short": _SHORT,
}
#: The function by whose cases in cuda_extra.py a kernel beside attention is checked.
BESIDE = {
    "extra.reduce_rows": "triton_reduce_sum",
    "extra.reduce_columns": "triton_reduce_sum",
    "extra.rope_heads": "triton_rope_forward",
    "extra.rope_table": "triton_rope_precompute_freqs",
    "extra.paged_append": "triton_paged_kv_cache_append",
    "extra.paged_read": "triton_paged_kv_cache_read",
    "extra.gelu_linear": "triton_fused_gelu_linear",
}


def source_hash(files: tuple[str, ...]) -> str:
    """A hash of what the files say to Python: their layout, comments and docstrings do not count."""
    said = "\n".join(said_by((ROOT / "hal_cuda" / "kernels" / f"{file}.py").read_text("utf-8")) for file in files)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def said_by(source: str) -> str:
    """The syntax tree of a source text without positions, docstrings and empty lists (Python versions differ there)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
        for name in node._fields:
            if getattr(node, name, None) == []:
                delattr(node, name)
    return ast.dump(tree)


def changed() -> list[str]:
    """Kernels that no check on a GPU has seen as they are now."""
    path = ROOT / "verified.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [name for name, files in KERNELS.items() if known.get(name, {}).get("source") != source_hash(files)]


def measure(only: str = "") -> dict[str, float]:
    """Root mean square over 5 seeds of each kernel's relative error against float64; for tables the share that is
    wrong. only: a text that the names of the kernels hold.
    """
    from cuda_attention import Bench

    bench = Bench()
    checks: dict[str, Callable[[], float]] = {
        "portable.attend": lambda: max(dense(bench, "portable", 4, 500, 1000), dense(bench, "portable", 4, 1, 8000)),
        "portable.merge": lambda: dense(bench, "portable", 1, 4, 20000),
        "portable.keep_mask": lambda: dropped(bench),
        "portable.list_once": lambda: listed(bench),
        "hopper.tile_table": lambda: tabled(bench),
    }
    checks["skipping.attend_skipping"] = lambda: wished(128, {"skip_tiles": 60})
    checks |= {kernel: partial(beside, function) for kernel, function in BESIDE.items()}
    checks["extra.pool"] = lambda: max(planning("triton_pool_rows"), planning("triton_pool_extremes"))
    checks["extra.square_sums"] = lambda: planning("triton_square_sums")
    checks |= dict.fromkeys(("extra.count_keys", "extra.list_chosen"), lambda: planning("triton_choose_blocks"))
    of_masks = ("portable.normalise", "portable.grad_mask")
    checks |= dict.fromkeys(
        ("portable.prepare", "portable.grad_kv", "portable.grad_q"), lambda: backward(bench, "portable")
    )
    checks |= dict.fromkeys(of_masks, lambda: backward(bench, "portable", masked=True))
    of_short = ("portable.attend_short", "portable.backward_short", "portable.sum_parts")
    checks |= dict.fromkeys(of_short, lambda: short(bench))
    checks |= dict.fromkeys(("portable.mark_blocks", "portable.list_rows"), lambda: turned(bench))
    if bench.chip.capability == (9, 0):
        checks["hopper.forward"] = lambda: max(dense(bench, "hopper", 4, 1500, 2000, dim) for dim in (104, 128, 256))
        checks["hopper.forward_split"] = lambda: max(
            dense(bench, "hopper", 4, 1500, 2000, dim, dim_v) for dim, dim_v in ((96, 96), (192, 192), (192, 128))
        )
        of_hopper = ("hopper_backward.backward", "hopper_backward.prepare", "hopper_backward.finish")
        dims = ((64, 64), (128, 128), (256, 256), (192, 128))
        checks |= dict.fromkeys(of_hopper, lambda: max(backward(bench, "hopper", *two) for two in dims))
        checks["hopper_masked.forward_masked"] = lambda: max(masked(bench, dim) for dim in (64, 128, 256))
        checks["extra.gelu_linear_hopper"] = fused_product
        by_blocks, by_heads = {"fp8": "block"}, {"fp8": "head centred"}
        at_once = ("fp8.forward_fp8", "fp8.quantise_all")
        checks |= dict.fromkeys(at_once, lambda: max(wished(dim, by_blocks) for dim in (64, 128, 256)))
        apart = ("quantise_rows", "quantise_values", "tile_maxima", "tile_sums", "mean_of_sums")
        checks |= dict.fromkeys((f"fp8.{name}" for name in apart), lambda: wished(128, by_heads))
        checks["hopper.forward_packed"] = lambda: max(packed(bench, dim) for dim in (104, 128))
    return {name: check() for name, check in checks.items() if only in name}


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Bottom-right causal attention in float64."""
    len_q, len_k = query.shape[2], key.shape[2]
    wide = [t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (query, key, value)]
    reach = torch.arange(len_k, device="cuda") <= torch.arange(len_q, device="cuda")[:, None] + len_k - len_q
    scores = (wide[0] @ wide[1].mT * query.shape[3] ** -0.5).masked_fill(~reach, -torch.inf)
    return torch.softmax(scores, -1) @ wide[2]


def root_mean_square(error: Callable[[], float]) -> float:
    """Of an error drawn with 5 seeds."""
    total = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        total += error() ** 2
    return (total / 5) ** 0.5


def dense(bench: Bench, path: str, heads_kv: int, len_q: int, len_k: int, dim: int = 128, dim_v: int = 0) -> float:
    """Error of a path on 8 query heads; dim_v 0: as dim."""
    from cuda_attention import DEVICE, normal

    request = AttentionRequest(
        batch=1,
        heads_q=8,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim,
        dim_v=dim_v or dim,
        dtype="bfloat16",
        device=DEVICE,
        causal=Causal.BOTTOM_RIGHT,
    )
    call = bench.own(path, request)

    def error() -> float:
        given = normal(1, 8, len_q, dim), normal(1, heads_kv, len_k, dim), normal(1, heads_kv, len_k, dim_v or dim)
        return relative_error(call(*given), exact(*given))

    return root_mean_square(error)


def wished(dim: int, options: dict[str, Any]) -> float:
    """Error of bottom-right causal attention with options of the device."""
    from cuda_attention import DEVICE, normal

    import hal_core as hal

    def error() -> float:
        given = normal(1, 8, 1500, dim), normal(1, 4, 2000, dim), normal(1, 4, 2000, dim)
        with hal.use(DEVICE, options=options):
            out = hal.attention(*given, causal="bottom_right", enable_gqa=True)
        return relative_error(out, exact(*given))

    return root_mean_square(error)


def packed(bench: Bench, dim: int) -> float:
    """Error of the packed Hopper kernel on three sequences, with fewer queries than keys."""
    from cuda_attention import DEVICE, normal

    ends_q, ends_k = [0, 300, 1300, 1500], [0, 700, 1700, 2400]
    tables = SequenceMetadata(*(torch.tensor(ends, dtype=torch.int32, device="cuda") for ends in (ends_q, ends_k)))
    request = AttentionRequest(
        batch=3,
        heads_q=8,
        heads_kv=4,
        len_q=1000,
        len_k=1000,
        dim_qk=dim,
        dim_v=dim,
        dtype="bfloat16",
        device=DEVICE,
        causal=Causal.BOTTOM_RIGHT,
        packed=True,
    )
    call = bench.own("hopper", request)

    def error() -> float:
        query, key, value = normal(1, 8, 1500, dim), normal(1, 4, 2400, dim), normal(1, 4, 2400, dim)
        want = torch.cat(
            [
                exact(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d])
                for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)
            ],
            2,
        )
        return relative_error(call(query, key, value, None, None, tables), want)

    return root_mean_square(error)


def masked(bench: Bench, dim: int) -> float:
    """Largest error of the masked Hopper kernel: a mask of either kind over rows and keys, a block plan, rows without
    keys.
    """
    from cuda_attention import normal
    from hal_cuda.kernels.hopper_masked.launch import HopperMaskedPath
    from hal_cuda.memory import CudaMemory, StreamWorkspaces
    from hal_cuda.runtime.context import Context
    from hal_cuda.tiling import CudaTiling

    memory = CudaMemory(0)
    context = Context(bench.chip, memory, StreamWorkspaces(memory), CudaTiling(bench.chip, lambda request: "masked"))

    def error() -> float:
        given = normal(2, 8, 500, dim), normal(2, 4, 1008, dim), normal(2, 4, 1008, dim)
        visible = torch.rand(1, 8, 500, 1008, device="cuda") > 0.3
        visible[:, :, 30:60] = False
        bias = normal(1, 8, 500, 1008).masked_fill(~visible, -torch.inf)
        indices = torch.randint(0, 8, (1, 8, 4, 3), dtype=torch.int32, device="cuda")
        plan = BlockPlan(128, 128, indices, torch.randint(0, 4, (1, 8, 4), dtype=torch.int32, device="cuda"))
        errors = []
        for mask, blocks in ((visible, None), (bias, None), (None, plan), (visible, plan)):
            request = request_of(*given, mask, plan=blocks, causal="bottom_right", return_lse=True)
            out, _ = HopperMaskedPath(request, context, None)(*given, mask, blocks)  # type: ignore[arg-type]
            errors.append(relative_error(out, reference(*given, mask, plan=blocks, request=request).out))
        return max(errors)

    return root_mean_square(error)


def beside(function: str) -> float:
    """The largest error of a kernel beside attention over its bfloat16 cases, or over all where it has none."""
    from cuda_extra import cases, worst_error

    chosen = [each for each in cases() if each[0].startswith(function)]
    narrow = [each for each in chosen if "bfloat16" in each[0]]
    return max(worst_error(call(), meant()) for _, call, meant, _ in narrow or chosen)


def planning(name: str) -> float:
    """The largest relative error of a kernel that plans sparse attention, over 5 draws of its specification: against
    the reference in float64, or for chosen blocks the share of lists and counts that differ from it.
    """
    from hal_cuda import kernels
    from hal_cuda.kernels.extra import references

    meant = name.removeprefix("triton_")
    reference, draw = getattr(references, meant), getattr(references, f"draw_{meant}")
    worst = 0.0
    for seed in range(5):
        drawn = draw(torch.Generator().manual_seed(seed))
        given = [value.cuda() if isinstance(value, Tensor) else value for value in drawn]
        found = getattr(kernels, name)(*given)
        if isinstance(found, tuple):
            indices, counts = reference(*given)
            listed = torch.arange(indices.shape[-1], device="cuda") < counts.unsqueeze(-1)
            wrong = ((found[0] != indices) & listed).any(-1) | (found[1] != counts)
            worst = max(worst, float(wrong.double().mean()))
        else:
            wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
            worst = max(worst, float(relative_error(found, reference(*wide))))
    return worst


def fused_product() -> float:
    """Error of gelu(X W^T + bias) on the Hopper kernel."""
    from hal_cuda.kernels import triton_fused_gelu_linear

    def error() -> float:
        x, w, bias = (torch.randn(shape, device="cuda").bfloat16() for shape in ((1000, 520), (776, 520), (776,)))
        want = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), w.double(), bias.double()))
        return relative_error(triton_fused_gelu_linear(x, w, bias), want)

    return root_mean_square(error)


def dropped(bench: Bench) -> float:
    """Share of weights dropped, less the share asked for."""
    from hal_cuda.kernels.portable.dropout import dropout_pattern

    keep = dropout_pattern(bench.chip, (2, 2, 1000, 1000), 0.25, (1, 2), "cuda")
    return abs(0.75 - float(keep.float().mean()))


def listed(bench: Bench) -> float:
    """Share of random plans' rows whose list is not that of the host."""
    from hal_cuda.kernels.portable.block_plans import listed_once
    from hal_cuda.memory import CudaMemory, borrowing

    indices = torch.randint(0, 40, (2, 3, 50, 200), dtype=torch.int32, device="cuda")
    counts = torch.randint(0, 201, (2, 3, 50), dtype=torch.int32, device="cuda")
    with borrowing(CudaMemory(0)) as borrow:
        once = listed_once(BlockPlan(128, 128, indices, counts), bench.chip, borrow)
        got = [once.indices.view(-1, 200).tolist(), once.counts.view(-1).tolist()]
    given = [indices.view(-1, 200).tolist(), counts.view(-1).tolist()]
    wrong = [list(dict.fromkeys(row[:n])) != kept[:m] for row, n, kept, m in zip(*given, *got, strict=True)]
    return sum(wrong) / len(wrong)


def short(bench: Bench) -> float:
    """Largest error of the output and of a gradient of short rows, under a bias with a gradient."""
    from cuda_attention import normal
    from hal_cuda.kernels.portable.short_launch import ShortBackward, ShortPath
    from hal_cuda.memory import CudaMemory, StreamWorkspaces
    from hal_cuda.runtime.context import Context
    from hal_cuda.tiling import CudaTiling

    memory = CudaMemory(0)
    context = Context(bench.chip, memory, StreamWorkspaces(memory), CudaTiling(bench.chip, lambda request: "portable"))
    given, bias, grad_out = [normal(256, 4, 49, 32) for _ in range(3)], normal(1, 4, 49, 49), normal(256, 4, 49, 32)
    request = request_of(*given, bias, grads=frozenset({"q", "k", "v", "mask"}), return_lse=True)
    out, lse = ShortPath(request, context, None)(*given, bias)
    found = ShortBackward(request, context)(*given, out, lse, grad_out, bias, None, None)
    want = reference_gradients(*given, bias, grad_out=grad_out, request=request)
    assert found is not None
    errors = [relative_error(got, right) for got, right in zip(found, want, strict=True)]
    return max(*errors, relative_error(out, reference(*given, bias, request=request)[0]))


def backward(bench: Bench, path: str, dim: int = 128, dim_v: int = 128, masked: bool = False) -> float:
    """Largest error of a gradient of an own backward, bottom-right causal; masked: under an additive mask some of whose
    rows are wholly at the lowest number.
    """
    from cuda_attention import normal
    from hal_cuda.kernels.gradients import OwnBackward
    from hal_cuda.kernels.portable.launch import PortablePath
    from hal_cuda.memory import CudaMemory, StreamWorkspaces
    from hal_cuda.runtime.context import Context
    from hal_cuda.tiling import CudaTiling

    memory = CudaMemory(0)
    context = Context(bench.chip, memory, StreamWorkspaces(memory), CudaTiling(bench.chip, lambda request: "portable"))

    def error() -> float:
        given = normal(2, 8, 500, dim), normal(2, 4, 900, dim), normal(2, 4, 900, dim_v)
        mask = None
        if masked:
            mask = torch.randn(1, 8, 500, 900, device="cuda")
            mask[:, :, 30:60] = torch.finfo(torch.float32).min
        grads = frozenset({"q", "k", "v"} | ({"mask"} if masked else set()))
        request = request_of(*given, mask, causal="bottom_right", grads=grads, return_lse=True)
        out, lse = PortablePath(request, context)(*given, mask)
        grad_out = normal(2, 8, 500, dim_v)
        found = OwnBackward(path, request, context)(*given, out, lse, grad_out, mask)
        want = reference_gradients(*given, mask, grad_out=grad_out, request=request)
        pairs = [(one, two) for one, two in zip(found, want, strict=True) if one is not None]
        return max(relative_error(one, two) for one, two in pairs)

    return root_mean_square(error)


def turned(bench: Bench) -> float:
    """Share of random plans' key blocks whose rows are not those of the host."""
    from hal_cuda.kernels.portable.block_plans import rows_of_blocks
    from hal_cuda.memory import CudaMemory, borrowing

    indices = torch.randint(0, 40, (2, 3, 300, 20), dtype=torch.int32, device="cuda")
    counts = torch.randint(0, 21, (2, 3, 300), dtype=torch.int32, device="cuda")
    with borrowing(CudaMemory(0)) as borrow:
        lists = rows_of_blocks(BlockPlan(128, 128, indices, counts), 40 * 128, bench.chip, borrow)
        got = [lists.indices.view(6, 40, 300).tolist(), lists.counts.view(6, 40).tolist()]
    wrong = 0
    for plan, sizes, rows, kept in zip(*(t.flatten(0, 1).tolist() for t in (indices, counts)), *got, strict=True):
        for block in range(40):
            want = [row for row, (named, n) in enumerate(zip(plan, sizes, strict=True)) if block in named[:n]]
            wrong += want != rows[block][: kept[block]]
    return wrong / 240


def tabled(bench: Bench) -> float:
    """Share of random sequences whose tiles are not in the table as the host lists them."""
    from hal_cuda.kernels.hopper.packed import TABLE_SIGNATURE
    from hal_cuda.kernels.hopper.tile_table import tile_table
    from hal_cuda.runtime.launch import launcher

    lengths = torch.randint(0, 700, (200,)).tolist()
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    most = sum(lengths) // 128 + len(lengths)
    table = torch.empty(8 + 8 * most, dtype=torch.int32, device="cuda")
    run = launcher(bench.chip, tile_table, TABLE_SIGNATURE, {"ROWS": 128, "BLOCK": 128}, num_warps=4)
    run((len(lengths), 1, 1), (table, ends, ends), [len(lengths), sum(lengths), sum(lengths), most, 16, 132])
    got: dict[int, list[int]] = {}
    for row, first, _, length, _, *_ in table[8:].view(-1, 8)[: int(table[0])].tolist():
        got.setdefault(first, []).append(row if row < length else -1)
    starts = zip(ends.tolist(), lengths, strict=False)
    return sum(sorted(got.get(at, [])) != list(range(0, n, 128)) for at, n in starts if n) / len(lengths)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--changed", action="store_true", help="list kernels that changed since they were checked")
    options.add_argument("--only", default="", help="check the kernels whose names hold this text")
    chosen = options.parse_args()
    if chosen.changed:
        for name in changed():
            print(f"{name} changed since its last check on a GPU")
        return 1 if changed() else 0
    path = ROOT / "verified.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, error in measure(chosen.only).items():
        known[name] = {
            "source": source_hash(KERNELS[name]),
            "device": torch.cuda.get_device_name(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "error": float(f"{error:.3g}"),
        }
        print(name, known[name])
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
