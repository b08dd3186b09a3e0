"""Masks and block plans on a Hopper GPU: the masked Hopper kernel beside the portable one and torch's own, in one run.

    python benchmarks/cuda_masked.py [--record] [--only masks,plans,flex]

Random data, device time, second-level cache flushed before each call, medians, calls interleaved with the peers'.
Ratios are the best peer's time over ours: above 1 is faster. Peers are torch's efficient attention and cuDNN where they
take the mask, and FlexAttention, compiled for each shape, for block plans.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import torch
from cuda_attention import DEVICE, Bench, conditions
from record import parser, publish
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hal_core as hal
from hal_core.testing import relative_error, request_of

TOKENS, HIDDEN = 16384, 2048
PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
COLUMNS = (
    *("head_dim", "tokens", "what", "masked", "portable", *PEERS),
    *("portable / masked", "best peer / masked", "difference"),
)
OWN = ("masked", "portable")
DIMS, LENGTHS = (128, 64, 256), (2048, 8192)
KINDS = (
    ("boolean", False),
    ("boolean, keys", False),
    ("bias", False),
    ("bias, each head", False),
    ("boolean", True),
    ("bias", True),
)
SHORT_KINDS = (("boolean", False), ("bias, each head", False))
#: Head size, tokens, tokens of a block, share of the blocks that are read, causal.
PLANS = (
    (128, 32768, 128, 0.1, False),
    (128, 32768, 128, 0.5, False),
    (128, 32768, 128, 0.1, True),
    (128, 32768, 64, 0.1, False),
    (64, 32768, 64, 0.1, False),
    (128, 8192, 128, 0.5, False),
    (64, 32768, 128, 0.1, False),
    (64, 8192, 128, 0.5, False),
    (256, 32768, 128, 0.1, False),
    (256, 8192, 128, 0.5, False),
)


def three(batch: int, dim: int, length: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    query, key, value = (
        torch.randn(batch, HIDDEN // dim, length, dim, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    return query, key, value


def drawn(kind: str, batch: int, heads: int, length: int, device: str = "cuda") -> Tensor:
    """The masks of the table: one for all heads, one for each, and one of keys for each batch entry."""
    if kind == "boolean, keys":
        return torch.rand(batch, 1, 1, length, device=device) < 0.9
    shape = (1, heads if "each head" in kind else 1, length, length)
    if kind.startswith("boolean"):
        return torch.rand(shape, device=device) < 0.5
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def compile_case(path: str, dim: int, kind: str | None, causal: bool, block: int) -> int:
    """Compile what a line of the tables runs, on tensors without memory. kind None: a block plan."""
    from hal_cuda.cost import Rates
    from hal_cuda.discovery import Chip
    from hal_cuda.runtime import binaries
    from hal_cuda.session import CudaSession

    from hal_core.plugin_api import Device, Fidelity

    chip = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
    device = Device(id="ahead:0", family="cuda", vendor="NVIDIA", model="", fidelity=Fidelity.HARDWARE, reads=("cpu",))
    given = three(2, dim, 8192, "meta")
    mask = None if kind is None else drawn(kind, 2, HIDDEN // dim, 8192, "meta")
    plan = planned(HIDDEN // dim, 8192, block, 0.1, causal, "meta") if kind is None else None
    request = request_of(*given, mask, plan=plan, is_causal=causal)
    rates, memory = Rates.assumed((9, 0), 132, None), hal.PooledMemory("meta")
    with (
        binaries.compiling_ahead(chip.shared_memory) as count,
        CudaSession(device, chip, lambda: rates, memory=memory, paths=frozenset({path})) as session,
        torch.no_grad(),
    ):
        session.bind(request)(*given, mask, plan, None, None)
        return count()


def compile_all() -> None:
    """Every kernel of the tables, in several processes at once: one after the other they take minutes."""
    cases = [(path, dim, kind, causal, 0) for path in OWN for dim in DIMS for kind, causal in KINDS]
    cases += [(path, dim, None, causal, block) for path in OWN for dim, _, block, _, causal in PLANS]
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        print(sum(pool.map(compile_case, *zip(*dict.fromkeys(cases), strict=True))), "kernels compiled", flush=True)


def under_mask(backend: SDPBackend, given: tuple[Tensor, ...], mask: Tensor, causal: bool) -> Callable[[], Any]:
    """One of torch's kernels; a diagonal goes into the mask."""
    if causal:
        band = torch.ones(mask.shape[-1], mask.shape[-1], device="cuda", dtype=torch.bool).tril()
        mask = mask & band if mask.dtype == torch.bool else mask.masked_fill(~band, -torch.inf)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask)

    return call


def runs(call: Callable[[], Any]) -> bool:
    """Whether a kernel of torch takes a call."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def row(bench: Bench, dim: int, what: str, calls: dict[str, Callable[[], Any]], request: Any) -> list[str]:
    """A line of a table: rates in TFLOP/s of the pairs that diagonals and plans leave."""
    apart = relative_error(calls["masked"](), calls["portable"]())
    times = bench.times(calls)
    peers = [times[name] for name in times if name not in ("masked", "portable")]
    best = f"{min(peers) / times['masked']:.2f}" if peers else "-"
    rates = {name: 2.0 * request.visible_macs / 1e9 / spent for name, spent in times.items()}
    shown = [f"{rates[name]:.0f}" if name in rates else "-" for name in ("masked", "portable", *PEERS)]
    line = [
        str(dim),
        str(request.len_q),
        what,
        *shown,
        f"{times['portable'] / times['masked']:.2f}",
        best,
        f"{apart:.1e}",
    ]
    print(*line, flush=True)
    return line


def masks(bench: Bench, options: Any) -> None:
    rows = []
    for dim, length in product(DIMS, LENGTHS):
        batch = TOKENS // length
        given = three(batch, dim, length)
        for kind, causal in KINDS if length == LENGTHS[-1] else SHORT_KINDS:
            mask = drawn(kind, batch, HIDDEN // dim, length)
            request = hal.explain(*given, mask, is_causal=causal, backend=DEVICE).request
            calls: dict[str, Callable[[], Any]] = {
                name: partial(bench.own(name, request), *given, mask) for name in OWN
            }
            theirs = {name: under_mask(each, given, mask, causal) for name, each in PEERS.items()}
            calls |= {name: call for name, call in theirs.items() if runs(call)}
            rows.append(row(bench, dim, kind + (", causal" if causal else ""), calls, request))
    notes = ["TFLOP/s, bf16, 16384 tokens, hidden size 2048.", *conditions(bench)]
    publish(options, "cuda_masked", "Masks", COLUMNS, rows, notes, "Masks")


def planned(heads: int, length: int, block: int, share: float, causal: bool, device: str = "cuda") -> hal.BlockPlan:
    """Random blocks of each row of blocks, with causal those up to the diagonal alone."""
    blocks = length // block
    order = torch.rand(1, heads, blocks, blocks, device=device)
    if causal:
        order += torch.ones(blocks, blocks, device=device).triu(1) * 2
        order.diagonal(dim1=-2, dim2=-1).fill_(-1)
    kept = max(int(blocks * share), 1)
    indices = order.argsort(-1)[..., :kept].to(torch.int32)
    counts = torch.full((1, heads, blocks), kept, device=device, dtype=torch.int32)
    if causal:
        counts = torch.minimum(counts, torch.arange(1, blocks + 1, device=device, dtype=torch.int32))
    return hal.BlockPlan(block, block, indices, counts)


def plans(bench: Bench, options: Any) -> None:
    rows = []
    for dim, length, block, share, causal in PLANS:
        given, plan = three(1, dim, length), planned(HIDDEN // dim, length, block, share, causal)
        request = hal.explain(*given, block_plan=plan, is_causal=causal, backend=DEVICE).request
        calls: dict[str, Callable[[], Any]] = {
            name: partial(bench.own(name, request), *given, None, plan) for name in OWN
        }
        what = f"{share:.0%} of blocks of {block}" + (", causal" if causal else "")
        rows.append(row(bench, dim, what, calls, request))
    notes = ["TFLOP/s of the blocks that are read; bf16, a plan for each head.", *conditions(bench)]
    publish(options, "cuda_masked", "Block plans", COLUMNS, rows, notes, "Block plans")


def flex(bench: Bench, options: Any) -> None:
    """FlexAttention on the same blocks, all of them whole."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    rows = []
    for dim, length, share in ((128, 8192, 0.5), (64, 8192, 0.5)):
        heads = HIDDEN // dim
        given, plan = three(1, dim, length), planned(heads, length, 128, share, False)
        full = torch.zeros(1, heads, length // 128, length // 128, device="cuda", dtype=torch.int32)
        full[..., : plan.indices.shape[3]] = plan.indices.sort(-1).values
        none = torch.zeros_like(plan.counts)
        blocks = BlockMask.from_kv_blocks(none, torch.zeros_like(full), plan.counts, full, BLOCK_SIZE=128)
        request = hal.explain(*given, block_plan=plan, backend=DEVICE).request
        own, theirs = (
            partial(bench.own("masked", request), *given, None, plan),
            partial(compiled, *given, block_mask=blocks),
        )
        apart, times = relative_error(own(), theirs()), bench.times({"masked": own, "FlexAttention": theirs})
        rates = [f"{2.0 * request.visible_macs / 1e9 / spent:.0f}" for spent in times.values()]
        ratio = times["FlexAttention"] / times["masked"]
        rows.append([str(dim), str(length), f"{share:.0%}", *rates, f"{ratio:.2f}", f"{apart:.1e}"])
        print(*rows[-1], flush=True)
    columns = ("head_dim", "tokens", "blocks read", "masked", "FlexAttention", "ratio", "difference of the results")
    notes = ["TFLOP/s of the blocks of 128 that are read; bf16.", *conditions(bench)]
    publish(options, "cuda_masked", "Block plans beside FlexAttention", columns, rows, notes, "FlexAttention")


RUN = {"masks": masks, "plans": plans, "flex": flex}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(RUN), help="sections to run")
    chosen = options.parse_args()
    torch.manual_seed(int(time.time()))
    compile_all()
    bench = Bench()
    with torch.no_grad():
        for section in chosen.only.split(","):
            RUN[section](bench, chosen)


if __name__ == "__main__":
    main()
