"""Every kernel variant compiled without a GPU: registers, spills and ptxas's warnings, for plugins/cuda/compiled.json.

python tests/cuda/compile_table.py --write     after a change that is meant to change them
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from hal_cuda.discovery import Chip
from hal_cuda.kernels.hopper.launch import compile_forward, config_of
from hal_cuda.kernels.portable import backward_launch, launch
from hal_cuda.kernels.portable.block_plans import (
    BLOCKS,
    TILE,
    RowLists,
    list_once,
    list_once_signature,
    list_rows,
    mark_blocks,
    row_signatures,
)
from hal_cuda.memory import StreamWorkspaces
from hal_cuda.runtime.context import Context
from hal_cuda.runtime.launch import compiled
from hal_cuda.tiling import FOREIGN_SIZES, CudaTiling, foreign_excess, hopper_tiles
from triton.backends.compiler import GPUTarget

from hal_core import (
    AttentionRequest,
    BlockPlan,
    Causal,
    Grads,
    MaskKind,
    PooledMemory,
    SequenceMetadata,
    TilePlan,
    quantize_cache,
)

TABLE = Path(__file__).resolve().parents[2] / "plugins" / "cuda" / "compiled.json"
ASSEMBLERS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Figures(NamedTuple):
    """Of one variant: registers of a thread, bytes spilled (stores and loads), lines that ptxas warned with."""

    registers: int
    spilled: int
    warnings: int


_launched: list[Callable[[], Any]] = []


def _recorded(chip: Chip, fn: Any, signature: Any, constants: Any, divisible: Any = None, **options: Any) -> Any:
    """In place of `launcher`: notes what would be launched."""
    _launched.append(lambda: compiled(chip, fn, signature, constants, divisible or {}, options))


def hopper_variants() -> dict[str, Callable[[], Any]]:
    """The Gluon forward: tuned tilings times the edges they may meet."""
    edges: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"right": True, "half": True},
        "full ragged": {"ragged": True},
        "causal shifted": {"right": True, "shifted": True},
        "window": {"right": True, "left": True, "shifted": True},
        "softcap": {"right": True, "softcap": True},
    }
    found: dict[str, Callable[[], Any]] = {}
    shapes = [
        (64, 64, 8192),
        (64, 64, 512),
        (128, 128, 2048),
        (128, 128, 8192),
        (256, 256, 8192),
        (192, 128, 8192),
        (192, 192, 8192),
        (96, 96, 8192),
        (104, 104, 8192),
    ]
    packed: dict[str, dict[str, Any]] = {
        "packed full": {"ragged": True},
        "packed causal": {"right": True, "half": True, "ragged": True},
        "packed causal shifted": {"right": True, "shifted": True, "ragged": True},
    }
    for dim_qk, dim_v, length in shapes:
        whole = dim_qk in (64, 128, 256) and dim_qk == dim_v
        for edge, flags in (edges | packed if whole else edges).items():
            tiles = hopper_tiles(dim_qk, dim_v, length, length, "right" in flags, "left" in flags, lse=True)
            settings = (
                dict.fromkeys(("left", "right", "shifted", "half", "ragged", "softcap"), False) | {"lse": True} | flags
            )
            if edge in packed:
                settings |= {"packed": True, "bottom": "shifted" in flags}
            config = config_of(tiles, dim_qk=dim_qk, dim_v=dim_v, group=1, **settings)
            found[f"sm_90 hopper {dim_qk}/{dim_v} {length} {edge}"] = partial(compile_forward, "bf16", config)
    return found


def masked_variants() -> dict[str, Callable[[], Any]]:
    """The masked Gluon forward: its head sizes times what hides keys."""
    from hal_cuda.kernels.hopper_masked import launch as masked
    from hal_cuda.tiling import masked_tiles

    forms: dict[str, dict[str, Any]] = {
        "plan": {"per_block": 1, "ragged": True},
        "plan causal": {"per_block": 1, "ragged": True, "right": True},
        "plan of 64": {"per_block": 1, "ragged": True},
        "boolean mask": {"mask": 1},
        "boolean mask causal": {"mask": 1, "right": True},
        "additive mask": {"mask": 2},
        "additive mask causal": {"mask": 2, "right": True, "ragged": True},
        "mask of keys": {"mask": 1, "of_keys": True},
        "bias of keys": {"mask": 2, "of_keys": True, "ragged": True},
    }
    nothing: dict[str, Any] = dict.fromkeys(("left", "right", "ragged", "softcap", "of_keys"), False)
    found: dict[str, Callable[[], Any]] = {}
    for dim in (64, 128, 256):
        for form, flags in forms.items():
            settings = nothing | {"mask": 0, "per_block": 0, "lse": True} | flags
            kind = ("u8", "u8", "bf16")[settings["mask"]]
            size = 0 if settings["of_keys"] else settings["mask"]
            block = 64 if form.endswith("of 64") else 128
            tiles = masked_tiles(dim, dim, size, (block, block) if settings["per_block"] else None)
            if tiles is None:
                continue
            settings["per_block"] *= block // tiles.keys
            config = masked.config_of(tiles, group=1, **settings)
            found[f"sm_90 hopper masked {dim}/{dim} {form}"] = partial(masked.compile_masked, "bf16", kind, config)
    return found


def fp8_variants() -> dict[str, Callable[[], Any]]:
    """The FP8 forward with the edges it may meet, and the kernels that quantise for it."""
    from hal_cuda.kernels.fp8 import launch as fp8, operands
    from hal_cuda.kernels.fp8.wish import Wish
    from hal_cuda.memory import borrowing
    from hal_cuda.tiling import fp8_tiles

    plain: dict[str, Any] = dict.fromkeys(("right", "shifted", "ragged", "lse", "mean"), False) | {"blocks": True}
    edges: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"right": True},
        "full ragged": {"ragged": True, "lse": True},
        "causal shifted": {"right": True, "shifted": True, "lse": True, "mean": True},
        "full per head": {"blocks": False, "lse": True},
    }
    found: dict[str, Callable[[], Any]] = {}
    shapes = [(dim, edge) for dim in (64, 128, 256) for edge in edges if dim == 128 or edge in ("full", "causal")]
    for dim, edge in shapes:
        flags = edges[edge]
        tiles = fp8_tiles(dim, whole=not {"shifted", "ragged"} & set(flags))
        config = fp8.config_of(tiles, dim_qk=dim, dim_v=dim, group=1, **(plain | flags))
        found[f"sm_90 fp8 {dim}/{dim} {edge}"] = partial(fp8.compile_forward, "bf16", config)
    chip, memory = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10), PooledMemory("cpu")
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "fp8"))
    given = torch.empty(1, 2, 256, 128, dtype=torch.bfloat16)
    wishes = {"blocks": Wish(), "heads centred": Wish("head", True)}
    for name, wish in wishes.items():
        before = len(_launched)
        with mock.patch.object(operands, "launcher", _recorded_extra), borrowing(memory) as borrow:
            operands.Quantiser(context, wish)(borrow, given, given, given, 1.0, True)
        for place, make in enumerate(_launched[before:]):
            found[f"sm_90 fp8 operands {name} {place}"] = make
    return found


def skipping_variants(capability: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """The kernel that skips tiles."""
    from hal_cuda.kernels.skipping import launch as skipping

    chip, memory = (
        Chip(index=0, capability=capability, multiprocessors=132, shared_memory=163 << 10),
        PooledMemory("cpu"),
    )
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "skipping"))
    found: dict[str, Callable[[], Any]] = {}
    for dim, causal in ((128, Causal.TOP_LEFT), (256, Causal.NONE)):
        request = AttentionRequest(
            batch=1,
            heads_q=8,
            heads_kv=2,
            len_q=512,
            len_k=512,
            dim_qk=dim,
            dim_v=dim,
            dtype="bfloat16",
            causal=causal,
            lse=True,
            options=(("skip_tiles", 10),),
        )
        with mock.patch.object(skipping, "launcher", _recorded_extra):
            skipping.SkippingPath(request, context, skipping.Tally(context))(*_tensors(request)[:3])
        found[f"sm_{capability[0]}{capability[1]} skipping {dim} {causal}"] = _launched[-1]
    return found


def hopper_backward_variants() -> dict[str, Callable[[], Any]]:
    """The Gluon backward: its head sizes times the edges they may meet, and the kernels around it."""
    from hal_cuda.kernels.hopper_backward import launch as backward
    from hal_cuda.tiling import hopper_backward_tiles

    edges: dict[str, dict[str, bool]] = {
        "full": {},
        "causal": {"right": True},
        "full ragged": {"ragged": True},
        "causal ragged": {"right": True, "ragged": True},
        "window": {"right": True, "left": True},
        "softcap": {"right": True, "softcap": True},
    }
    found: dict[str, Callable[[], Any]] = {}
    for dims in ((64, 64), (128, 128), (256, 256), (192, 128)):
        for edge, flags in edges.items():
            settings = dict.fromkeys(("left", "right", "ragged", "softcap"), False) | flags
            config = backward.config_of(hopper_backward_tiles(*dims, settings["right"]), group=1, **settings)
            name = f"sm_90 hopper backward {dims[0]}/{dims[1]} {edge}"
            found[name] = partial(backward.compile_backward, "bf16", config)
            if max(dims) <= 128 and edge in ("full", "causal"):
                ordered = config._replace(ordered=True, engine=True, stages=2, staging=2)
                if edge == "full":
                    found[f"{name} padded"] = partial(backward.compile_backward, "bf16", config._replace(padded=True))
                    dropped = config._replace(dropout=True)
                    found[f"{name} dropout"] = partial(backward.compile_backward, "bf16", dropped)
                    for kind, mask in (("boolean", 1), ("additive", 2))[: 1 if max(dims) <= 64 else 2]:
                        masked = config._replace(mask=mask, stages=2)
                        found[f"{name} {kind} mask"] = partial(backward.compile_backward, "bf16", masked)
                    planned = config._replace(per_block=128 // config.rows)
                    found[f"{name} planned"] = partial(backward.compile_backward, "bf16", planned)
                found[f"{name} ordered"] = partial(backward.compile_backward, "bf16", ordered)
    return found


def portable_variants(capability: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """The plain Triton kernels: one of each feature."""
    chip = Chip(index=0, capability=capability, multiprocessors=132, shared_memory=163 << 10)
    memory = PooledMemory("cpu")
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "portable"))
    base = AttentionRequest(
        batch=2, heads_q=8, heads_kv=2, len_q=1024, len_k=1024, dim_qk=128, dim_v=128, dtype="bfloat16", lse=True
    )
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": Causal.TOP_LEFT},
        "head_dim 64": {"dim_qk": 64, "dim_v": 64},
        "head_dim 256": {"dim_qk": 256, "dim_v": 256},
        "head_dim 80": {"dim_qk": 80, "dim_v": 80},
        "float32": {"dtype": "float32"},
        "boolean mask": {"mask": MaskKind.BOOLEAN},
        "additive mask": {"mask": MaskKind.ADDITIVE},
        "dropout": {"dropout": 0.1},
        "block plan": {"block_plan": (128, 128, 2)},
        "window": {"window": (100, 0)},
        "softcap": {"softcap": 5.0},
        "decode": {"len_q": 1, "len_k": 8192},
        "paged decode": {"len_q": 1, "page_size": 16},
        "joined decode": {"len_q": 1, "len_k": 8192},
        "int8 decode": {"len_q": 1, "len_k": 8192, "cache_dtype": "int8"},
        "int4 decode": {"len_q": 1, "len_k": 8192, "cache_dtype": "int4"},
    }
    if capability >= (8, 9):
        changes["e4m3 decode"] = {"len_q": 1, "len_k": 8192, "cache_dtype": "float8_e4m3fn"}
    found: dict[str, Callable[[], Any]] = {}
    for name, change in changes.items():
        request = replace(base, **change)
        before = len(_launched)
        with mock.patch.object(launch, "launcher", _recorded):
            path = launch.PortablePath(request, context)
            query, key, value, *others = _tensors(request)
            value = value if request.cache_dtype is None else launch.in_words(value)
            path._build(query, key, value, *others, joins=name.startswith("joined"), cut=None)
        made = _launched[-1:] if name.startswith("joined") else _launched[before:]  # behind the two that captures take
        for part, make in zip(("attend", "merge"), made, strict=False):
            found[f"sm_{capability[0]}{capability[1]} {part} {name}"] = make
    _recorded(chip, list_once, list_once_signature(), TILE, num_warps=4)
    found[f"sm_{capability[0]}{capability[1]} list_once"] = _launched[-1]
    return found


#: What `backward_variants` compiles, beside the plain request.
_BACKWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "additive mask": {"mask": MaskKind.ADDITIVE, "grads": frozenset({"q", "k", "v", "mask"})},
    "causal": {"causal": Causal.TOP_LEFT},
    "head_dim 64": {"dim_qk": 64, "dim_v": 64},
    "head_dim 256": {"dim_qk": 256, "dim_v": 256},
    "float32": {"dtype": "float32"},
    "dropout": {"dropout": 0.1},
    "block plan": {"block_plan": (128, 128, 2)},
    "head_dim 64 causal": {"dim_qk": 64, "dim_v": 64, "causal": Causal.TOP_LEFT},
    "head_dim 256 causal": {"dim_qk": 256, "dim_v": 256, "causal": Causal.TOP_LEFT},
    "head_dim 80": {"dim_qk": 80, "dim_v": 80},
    "boolean mask": {"mask": MaskKind.BOOLEAN},
    "window": {"window": (100, 0)},
    "softcap": {"softcap": 5.0},
}


def backward_variants(capability: tuple[int, int], shared_memory: int, features: int) -> dict[str, Callable[[], Any]]:
    """The plain Triton backward: the kernels of a call, for the first `features` of `_BACKWARD`."""
    chip = Chip(index=0, capability=capability, multiprocessors=132, shared_memory=shared_memory)
    memory = PooledMemory("cpu")
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "portable"))
    base = AttentionRequest(
        batch=2,
        heads_q=8,
        heads_kv=2,
        len_q=1024,
        len_k=1024,
        dim_qk=128,
        dim_v=128,
        dtype="bfloat16",
        lse=True,
        grads=frozenset("qkv"),
    )
    found: dict[str, Callable[[], Any]] = {}
    sm = f"sm_{capability[0]}{capability[1]}"
    for name, change in list(_BACKWARD.items())[:features]:
        request = replace(base, **change)
        before = len(_launched)
        with mock.patch.object(backward_launch, "launcher", _recorded):
            backward_launch.PortableBackward(request, context)._build(_form(request))
        kernels = ["grad_kv", "grad_q"]
        if request.mask is MaskKind.ADDITIVE:
            kernels = ["normalise", *kernels, "grad_mask", "sum_parts"]
        if name == "plain":
            kernels = ["prepare", *kernels]
        for kernel, make in zip(reversed(kernels), reversed(_launched[before:]), strict=False):
            found[f"{sm} {kernel} {name}"] = make
    if features < 3:
        return found
    for kernel, signature, block in zip((mark_blocks, list_rows), row_signatures(), BLOCKS, strict=True):
        _recorded(chip, kernel, signature, {"BLOCK": block}, num_warps=4)
        found[f"{sm} {kernel.__name__}"] = _launched[-1]
    return found


def _form(request: AttentionRequest) -> Any:
    """Tensors of a request's backward."""
    query, key, value, mask, plan, _ = _tensors(request)
    lse = torch.empty(query.shape[:3])
    lists = None
    if plan is not None:
        shape = (1, 1, 8, 8)
        lists = RowLists(
            torch.empty(shape, dtype=torch.bool), *(torch.empty(shape[:n], dtype=torch.int32) for n in (4, 3))
        )
    grads = Grads(query, key, value, mask if "mask" in request.grads else None)
    return backward_launch._Form(query, key, value, query, lse, query, None, mask, plan, lists, grads)


def foreign_variants() -> dict[str, tuple[Callable[[], Any], int]]:
    """The portable kernel with the tiles of a caller that an H200 accepts, and the shared memory of one program."""
    chip, found = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10), {}
    memory = PooledMemory("cpu")
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "portable"))
    for dtype, dim in product(("bfloat16", "float32"), (64, 128, 256)):
        for block_q, block_k in product(FOREIGN_SIZES, FOREIGN_SIZES):
            request = AttentionRequest(
                batch=1,
                heads_q=8,
                heads_kv=2,
                len_q=1024,
                len_k=1024,
                dim_qk=dim,
                dim_v=dim,
                dtype=dtype,
                tiling=("theirs", block_q, block_k),
            )
            if foreign_excess(request, block_q, block_k, chip):
                continue
            path, cut = launch.PortablePath(request, context), TilePlan.equal(request, block_q, block_k)
            with mock.patch.object(launch, "launcher", _recorded):
                path._build(*_tensors(request), joins=False, cut=cut)
            found[f"{dtype} {dim} {block_q} x {block_k}"] = _launched[-1], chip.shared_memory
    return found


def extra_variants(capability: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """The Triton kernels beside attention, 16-bit and aligned; the Hopper kernel of fused_gelu_linear on 9.0."""
    from hal_cuda.kernels import triton_paged_kv_cache_append, triton_paged_kv_cache_read, triton_rope_precompute_freqs
    from hal_cuda.kernels.extra import block_choice, block_scores, forms, gelu_linear, paged, reductions, rope
    from hal_cuda.kernels.extra.gelu_config import GeluConfig

    chip = Chip(index=0, capability=capability, multiprocessors=132, shared_memory=99 << 10)
    kind = torch.bfloat16 if capability >= (8, 0) else torch.float16

    def empty(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    q, pool, x, b = empty(2, 8, 1024, 128), empty(16, 2, 8, 16, 128), empty(512, 512), empty(512)
    slots, tables = torch.zeros(64, dtype=torch.int32), (empty(1024, 64, dtype=torch.float32),) * 2
    heads, unmarked = empty(64, 8, 128), torch.zeros(256, 256, dtype=torch.bool)
    choice = empty(1, 2, 256, 256, dtype=torch.float32), unmarked, unmarked
    calls: dict[str, Callable[[], Any]] = {
        "row sums": lambda: reductions._run(empty(4096, 8192), empty(4096), 4096, 8192, 1, largest=False),
        "column sums": lambda: reductions._run(empty(64, 8192, 256), empty(64, 256), 64, 8192, 256, largest=False),
        "rope with tables": lambda: rope._rotate(forms.Rotation(q, q, q, q), tables, 1e4),  # type: ignore[arg-type]
        "rope computed": lambda: rope._rotate(forms.Rotation(q, q, q, q), None, 1e4),
        "rope table": lambda: triton_rope_precompute_freqs(128, 128, device="cpu"),
        "paged append": lambda: triton_paged_kv_cache_append(pool, slots, heads, heads),
        "paged read": lambda: triton_paged_kv_cache_read(pool, slots.view(4, 16), slots[:4], 256),
        "pooled rows": lambda: block_scores.triton_pool_rows(q, 16),
        "pooled extremes": lambda: block_scores.triton_pool_extremes(q, 128),
        "squares": lambda: block_scores.triton_square_sums(empty(1, 2, 64, 2048), 8, 8, 16),
        "squares of long rows": lambda: block_scores.triton_square_sums(empty(1, 2, 64, 8192), 8, 8, 16, None, 0),
        "chosen blocks": lambda: block_choice.triton_choose_blocks(*choice, 100),
        "product": lambda: gelu_linear.portable(x, x, b, x, False),
        "product stored [K, N]": lambda: gelu_linear.portable(x, x.T, None, x, True),
    }
    found: dict[str, Callable[[], Any]] = {}
    with ExitStack() as stack:
        for module in (reductions, rope, paged, gelu_linear, block_scores, block_choice):
            stack.enter_context(mock.patch.object(module, "launcher", _recorded_extra))
            stack.enter_context(mock.patch.object(module, "chip_of", return_value=chip))
            stack.enter_context(mock.patch.object(module.binaries, "INTERPRETED", True))  # tensors on the host
        for name, call in calls.items():
            before = len(_launched)
            call()
            found[name] = _launched[before]
            found |= {f"{name}, {after}": made for after, made in enumerate(_launched[before + 1 :], 1)}
            for made in (block_scores._forms, block_choice._forms):
                made.clear()  # what is kept of a call is launched without its launcher being asked for
    for kept in (block_scores._pooling, block_scores._summing, block_choice._launchers):
        kept.cache_clear()  # of launchers that do nothing
    if capability == (9, 0):
        for config in (GeluConfig(), GeluConfig(tanh=True, w_rows=True), GeluConfig(bias=False)):
            found[f"product hopper {config}"] = partial(gelu_linear.compile_hopper, "bf16", config)
    return found


def _recorded_extra(*given: Any, **options: Any) -> Any:
    _recorded(*given, **options)
    return lambda *launch: None


def _tensors(request: AttentionRequest) -> tuple[Any, ...]:
    r, kind = request, getattr(torch, request.dtype)
    query = torch.empty(r.batch, r.heads_q, r.len_q, r.dim_qk, dtype=kind)
    key = torch.empty(r.batch, r.heads_kv, r.len_k, r.dim_qk, dtype=kind)
    mask = plan = tables = None
    if r.mask is not MaskKind.NONE:
        mask = torch.empty(1, 1, r.len_q, r.len_k, dtype=torch.bool if r.mask is MaskKind.BOOLEAN else torch.float32)
    if r.block_plan is not None:
        plan = BlockPlan(128, 128, torch.zeros(1, 1, 8, 2, dtype=torch.int32), torch.ones(1, 1, 8, dtype=torch.int32))
    if r.cache_dtype is not None:
        made = quantize_cache(torch.ones(key.shape), torch.ones(key.shape), r.cache_dtype)
        return query, *made[:2], mask, plan, SequenceMetadata(None, None, None, None, *made[2:])
    if r.page_size is not None:
        key = torch.empty(64, r.heads_kv, r.page_size, r.dim_qk, dtype=kind)
        held = torch.ones(r.batch, dtype=torch.int32)
        tables = SequenceMetadata(page_table=torch.zeros(r.batch, 64, dtype=torch.int32), cache_seqlens=held)
    return query, key, key, mask, plan, tables


def variants() -> dict[str, Callable[[], Any]]:
    """Every variant by name."""
    found = hopper_variants() | masked_variants() | hopper_backward_variants() | fp8_variants()
    found |= skipping_variants((9, 0)) | skipping_variants((8, 0))
    for capability in ((9, 0), (8, 0), (10, 0)):
        found |= portable_variants(capability)
    found |= backward_variants((9, 0), 227 << 10, 99) | backward_variants((8, 0), 163 << 10, 8)
    found |= backward_variants((8, 6), 99 << 10, 2) | backward_variants((8, 9), 99 << 10, 2)
    return found | backward_variants((10, 0), 227 << 10, 2)


def figures(kernel: Any) -> Figures:
    """What ptxas says about a compiled kernel."""
    target: GPUTarget = kernel.metadata.target
    arch = f"sm_{target.arch}{'a' if target.arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        program = ASSEMBLERS / ("ptxas-blackwell" if target.arch >= 100 else "ptxas")
        command = [str(program), "-v", f"--gpu-name={arch}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    warned = [line for line in said.splitlines() if "warning" in line.lower() or re.search(r"C75\d\d", line)]
    return Figures(registers, spilled, len(warned))


def local_accesses(kernel: Any) -> list[int]:
    """Loads and stores of local memory, where spilled registers lie, in each innermost loop that has products.

    Behind the last store of a result lie the turns of waits, which jump back into the middle of a loop.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        command = [str(ASSEMBLERS / "nvdisasm"), "-c", str(binary)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels = {found[1]: place for place, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = ((re.search(r"BRA.*`\((\.L_x_\d+)\)", line), place) for place, line in enumerate(lines))
    end = max(place for place, line in enumerate(lines) if "UTMASTG" in line)
    loops = [(labels[found[1]], place) for found, place in jumps if found and labels.get(found[1], end) < place < end]
    loops = [loop for loop in loops if any("HGMMA" in line for line in lines[slice(*loop)])]
    innermost = [
        (first, last)
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]
    return [sum(bool(re.search(r" (LDL|STL)", line)) for line in lines[slice(*loop)]) for loop in innermost]


def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", action="store_true")
    options.add_argument("--only", nargs="*", default=[""], help="variants whose names hold one of these texts")
    chosen = options.parse_args()
    every = variants()
    found = {name: figures(make()) for name, make in every.items() if any(text in name for text in chosen.only)}
    for name, each in found.items():
        print(f"{name:40} {each.registers:4} registers {each.spilled:5} bytes spilled {each.warnings} warnings")
    if chosen.write:
        rows = {name: row for name, row in (table()["variants"] if TABLE.exists() else {}).items() if name in every}
        rows |= {name: dict(each._asdict()) for name, each in found.items()}
        TABLE.write_text(
            json.dumps({"triton": triton.__version__, "variants": rows}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
