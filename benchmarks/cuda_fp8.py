"""Attention in FP8 on a Hopper GPU: its error, its speed with quantisation inside, and what sums in two levels are for.

    python benchmarks/cuda_fp8.py [--record] [--only error,speed,needle,skipping]

Random data, device time, second-level cache flushed before each call, medians, calls interleaved. `speed` times the
call as a user makes it, from bfloat16 to bfloat16, beside this project's 16-bit kernel and cuDNN's. `needle` looks for
one matching key among 131,072 and compares one and two levels of sums in one table. `skipping` is of 16-bit tensors:
what the option "skip_tiles" skips, loses and gains.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from cuda_attention import DEVICE, Bench, conditions, normal
from record import parser, publish
from torch import Tensor

import hal_core as hal
from hal_core.testing import relative_error

SECTIONS = ("error", "speed", "needle", "skipping")
BARS = {False: 1000, True: 950}  # TFLOP/s at head size 128 and 16384 tokens, full and causal
KEYS, NEEDLES = 131072, 256


def compile_one(dim: int, flags: dict[str, Any]) -> None:
    """Put one kernel into Triton's cache."""
    from hal_cuda.kernels.fp8.launch import compile_forward, config_of
    from hal_cuda.tiling import fp8_tiles

    given = dict.fromkeys(("right", "shifted", "ragged", "lse", "mean"), False) | {"blocks": True} | flags
    tiles = fp8_tiles(dim, whole=given.get("two_levels", True))
    compile_forward("bf16", config_of(tiles, dim_qk=dim, dim_v=dim, group=1, **given))


def compile_all() -> None:
    """The kernels of the speed and needle tables, in several processes at once."""
    flags: list[dict[str, Any]] = [{}, {"right": True}, {"blocks": False}, {"blocks": False, "right": True}]
    every = [(dim, each) for dim in (64, 128) for each in flags] + [(128, {"two_levels": False})]
    of_lse = [{"lse": True}, {"lse": True, "blocks": False}, {"lse": True, "mean": True}]
    every += [(128, each | edge) for each in of_lse for edge in ({}, {"right": True})]
    every += [(64, each | {"right": True}) for each in of_lse]
    with ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*every, strict=True)))


def path_of(request: hal.AttentionRequest, levels: int = 2, **wish: Any) -> Any:
    """The FP8 path of a request; levels: of sums, one for comparison alone."""
    from hal_cuda.kernels.fp8.launch import Fp8Path
    from hal_cuda.kernels.fp8.wish import Wish

    session: Any = hal.session(DEVICE)
    return Fp8Path(request, session._context, Wish(**wish), levels=levels)


def output(result: Any) -> Tensor:
    """Of a path, which gives the log-sum-exp beside, or of a bound call, which may not."""
    out: Tensor = result if isinstance(result, Tensor) else result.out
    return out


def error(bench: Bench, options: Any) -> None:
    """Errors against float64 on the operands as given, of normal draws and of keys with a common part."""
    from hal_core.testing import reference

    rows = []
    for dim, length, causal, shift in (
        (128, 2048, False, 0.0),
        (128, 2048, True, 0.0),
        (64, 2048, True, 0.0),
        (128, 2048, False, 4.0),
        (128, 8192, False, 0.0),
    ):
        squares: dict[str, float] = {}
        for seed in range(3):
            torch.manual_seed(1000 * dim + seed)
            query, key, value = (normal(1, 2, length, dim) for _ in range(3))
            key += shift * normal(1, 2, 1, dim)
            request = hal.explain(query, key, value, is_causal=causal, return_lse=True, backend=DEVICE).request
            want = reference(query, key, value, request=request)
            calls = {"bf16": bench.own(bench.forward_path, request)}
            calls |= {"block": path_of(request), "head": path_of(request, scales="head")}
            calls["block, centred"] = path_of(request, scales="block", centred=True)
            for name, call in calls.items():
                out, lse = call(query, key, value)
                squares[name] = squares.get(name, 0.0) + relative_error(out, want.out) ** 2
                of_lse = f"{name} lse"
                squares[of_lse] = max(squares.get(of_lse, 0.0), float((lse.double() - want.lse).abs().max()))
        names = ("bf16", "block", "head", "block, centred")
        shown = [f"{math.sqrt(squares[n] / 3):.2e} / {squares[f'{n} lse']:.1e}" for n in names]
        rows.append([str(dim), str(length), "causal" if causal else "full", f"{shift:g}", *shown])
    notes = ["||x - reference|| / ||reference|| of the output, RMS of 3 draws / largest error of the log-sum-exp."]
    notes += ["Common part: of all keys of a head, in units of their spread.", *conditions(bench)]
    columns = ("head_dim", "tokens", "mask", "common part", "bf16", "block", "head", "block, centred")
    publish(options, "cuda_fp8", "Errors", columns, rows, notes, "Errors")


def speed(bench: Bench, options: Any) -> None:
    """TFLOP/s of whole calls."""
    rows, notes = [], []
    for dim in (128, 64):
        for length in (2048, 4096, 8192, 16384, 32768):
            for causal in (False, True):
                shape = (max(16384 // length, 1), 2048 // dim, length, dim)
                given = (normal(*shape), normal(*shape), normal(*shape))
                request = hal.explain(*given, is_causal=causal, backend=DEVICE).request
                calls: dict[str, Any] = {}
                for scales in ("block", "head"):
                    with hal.use(DEVICE, options={"fp8": scales}):
                        bound = hal.bind(*given, is_causal=causal)
                    calls[scales] = lambda bound=bound, given=given: bound(*given)
                own = bench.own(bench.forward_path, request)
                calls["bf16"] = lambda own=own, given=given: own(*given)
                peers = bench.peers.dense(*given, causal=causal)
                calls |= {"cuDNN bf16": peers["cuDNN"]} if "cuDNN" in peers else {}
                times = bench.times(calls)
                flops = 2.0 * request.visible_macs
                rates = {name: flops / each / 1e9 for name, each in times.items()}
                bar = BARS[causal] if (dim, length) == (128, 16384) else None
                verdict = "" if bar is None else f"{bar}: {'held' if rates['block'] >= bar else 'missed'}"
                shown = [f"{rates[n]:.0f}" if n in rates else "-" for n in ("block", "head", "bf16", "cuDNN bf16")]
                ratio = f"{times['bf16'] / times['block']:.2f}"
                rows.append([str(dim), str(length), "causal" if causal else "full", *shown, ratio, verdict])
    notes += [
        "TFLOP/s of 4 B H S S D operations, half if causal, 16384 tokens (one row of 32768), hidden 2048, bf16 in and "
        "out; FP8 calls quantise query, key and value each time."
    ]
    notes += ["cuDNN's FP8 attention is not run: torch does not offer it.", *conditions(bench)]
    columns = ("head_dim", "tokens", "mask", "block", "head", "bf16", "cuDNN bf16", "bf16 / block", "bar")
    publish(options, "cuda_fp8", "Speed", columns, rows, notes, "Speed")


def needles(margin: float, constant: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(query, key, value, places of the matches) of three draws: each query points at one key, with the score `margin`,
    in units of the spread of the others' scores for a query of unit length.
    """
    for seed in range(3):
        torch.manual_seed(seed)
        key = torch.randn(1, 1, KEYS, 128, device="cuda")
        place = torch.randperm(KEYS, device="cuda")[:NEEDLES]
        match = key[0, 0, place]
        query = (match / match.norm(dim=1, keepdim=True) * margin)[None, None]
        value = (torch.rand if constant else torch.randn)(1, 1, KEYS, 128, device="cuda")
        yield query.bfloat16(), key.bfloat16(), value.bfloat16(), place


def found(call: Any, query: Tensor, key: Tensor, value: Tensor, place: Tensor) -> float:
    """Share of queries whose result leans to the value of their match more than to that of any other query's match.

    What all values have in common is left out of both.
    """
    mean = value[0, 0].float().mean(0)
    leaning = (output(call(query, key, value))[0, 0].float() - mean) @ (value[0, 0, place].float() - mean).mT
    return float((leaning.argmax(1) == torch.arange(NEEDLES, device="cuda")).float().mean())


def needle(bench: Bench, options: Any) -> None:
    """One match among 131,072 keys."""
    rows = []
    for constant in (True, False):
        for margin in (5.0, 6.0, 7.0, 8.0, 9.0):
            total = dict.fromkeys(("bf16", "two", "one"), 0.0)
            for given in needles(margin, constant):
                request = hal.explain(*given[:3], backend=DEVICE).request
                calls = {"bf16": bench.own(bench.forward_path, request)}
                calls |= {"two": path_of(request), "one": path_of(request, 1)}
                for name, call in calls.items():
                    total[name] += found(call, *given) / 3
            values = "uniform in 0 to 1" if constant else "normal"
            rows.append([values, f"{margin:g}", *(f"{share:.3f}" for share in total.values())])
    notes = [
        f"Share found of {NEEDLES} queries among {KEYS} keys, mean of three draws. Margin: score of the match; the "
        "other scores have a standard deviation of margin / 11.3.",
        "Bars, at the least margin where bf16 finds 0.95 of values of one sign: two levels 0.92, one at most 0.7.",
        *conditions(bench),
    ]
    columns = ("values", "margin", "bf16", "FP8, two levels", "FP8, one level")
    publish(options, "cuda_fp8", "Needle", columns, rows, notes, "Needle")


def skipping(bench: Bench, options: Any) -> None:
    """What the option "skip_tiles" does to 8192 tokens of head size 128."""
    rows = []
    for sharpness in (1.0, 6.0):
        for causal in (False, True):
            query, key, value = (normal(1, 16, 8192, 128) for _ in range(3))
            query = query * sharpness
            request = hal.explain(query, key, value, is_causal=causal, backend=DEVICE).request
            plain = {path: bench.own(path, request) for path in ("portable", "hopper")}
            want = output(plain["hopper"](query, key, value)).double()
            for threshold in (6, 10, 16):
                with hal.use(DEVICE, options={"skip_tiles": threshold}):
                    bound = hal.bind(query, key, value, is_causal=causal)
                session: Any = hal.session(DEVICE)
                session.skipped_tiles()
                moved = relative_error(bound(query, key, value), want)
                counted = session.skipped_tiles()
                calls = {"skipping": lambda bound=bound, given=(query, key, value): bound(*given)}
                calls |= {n: lambda c=c, given=(query, key, value): c(*given) for n, c in plain.items()}
                times = bench.times(calls)
                shown = [f"{times[name]:.3f}" for name in ("skipping", "portable", "hopper")]
                share = [f"{counted.share:.3f}", f"{counted.lost:.1e}", f"{moved:.1e}"]
                rows.append([f"{sharpness:g}", "causal" if causal else "full", f"2^-{threshold}", *share, *shown])
    notes = [
        "Normal draws, the query times the sharpness. Share of tiles skipped; bound on what any row lost of its sum of "
        "weights; difference from the Hopper kernel's output; milliseconds of one call.",
        *conditions(bench),
    ]
    columns = ("sharpness", "mask", "threshold", "skipped", "lost", "moved", "skipping ms", "Triton ms", "Hopper ms")
    publish(options, "cuda_fp8", "Skipped tiles", columns, rows, notes, "Skipped tiles")


RUN = {"error": error, "speed": speed, "needle": needle, "skipping": skipping}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(SECTIONS), help="sections to run")
    chosen = options.parse_args()
    compile_all()
    torch.manual_seed(int(time.time()))
    bench = Bench()
    with torch.no_grad():
        for section in chosen.only.split(","):
            RUN[section](bench, chosen)


if __name__ == "__main__":
    main()
