"""The router against recorded times: every arm's times of each shape, replayed in time order with planning charged.

    python benchmarks/router_replay.py --measure benchmarks/router_times/NAME.json [--gpu]   # minutes: every arm here
    python benchmarks/router_replay.py --record                                      # replays every table there is

A table holds, for each shape and arm, the device's own estimate and repeats of real calls, interleaved with the other
arms, on fresh tensors; for cpu:0 also repeats while other processes keep every core busy. The oracle is the arm of the
smallest median at that moment. A replayed call takes one of the repeats, drawn by a seed.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
from hal_router.choice import Arm, Chooser
from hal_router.estimator import Estimator
from hal_router.keys import Keys
from hal_router.router import CLOSE

import hal_core as hal
from hal_core.plugin_api import AttentionRequest

FOLDER = Path(__file__).resolve().parent / "router_times"
REQUESTS = 2000
#: Seconds charged: a decision of a shape that is met anew or chosen anew, and a decision that is kept.
FRESH, KEPT = 20e-6, 3e-6
#: (heads, key heads, head size, causal) of GPT-2, BERT base, Llama 3.2 1B, Qwen 2.5 0.5B, ViT-B, Whisper small.
MODELS = {
    "GPT-2": (12, 12, 64, True),
    "BERT base": (12, 12, 64, False),
    "Llama 3.2 1B": (32, 8, 64, True),
    "Qwen 2.5 0.5B": (14, 2, 64, True),
    "MiniLM": (12, 12, 32, False),
}
LENGTHS = ((1, 64), (1, 256), (1, 1024), (16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (512, 512))
REPEATS = 9


def requests() -> list[AttentionRequest]:
    """Prefills and decode steps of the models."""
    return [
        AttentionRequest(
            1, heads, kv, q, k, dim, dim, "float32", causal=hal.Causal.TOP_LEFT if causal and q > 1 else hal.Causal.NONE
        )
        for heads, kv, dim, causal in MODELS.values()
        for q, k in LENGTHS
    ]


def burn() -> None:
    while True:
        sum(range(10_000))


def drawn(r: AttentionRequest) -> tuple[Any, Any, Any]:
    """Fresh tensors of a request."""
    import torch

    form = {"dtype": getattr(torch, r.dtype), "device": r.device}
    q = torch.randn(1, r.heads_q, r.len_q, r.dim_qk, **form)
    return q, *(torch.randn(1, r.heads_kv, r.len_k, r.dim_qk, **form) for _ in range(2))


def device_arms(r: AttentionRequest) -> dict[str, tuple[float, Callable[[], float]]]:
    """Each device that runs a request of host tensors, its transfers included: (estimate, a timed call)."""
    found = {}
    for device in hal.devices():
        if device.fidelity is hal.Fidelity.SIMULATED or hal.check_all(r, device, transfer=True):
            continue

        def call(name: str = device.id) -> float:
            q, k, v = drawn(r)
            start = time.perf_counter()
            hal.attention(q, k, v, is_causal=r.causal is not hal.Causal.NONE, enable_gqa=True, backend=name)
            return time.perf_counter() - start

        estimate = hal.explain(*drawn(r), enable_gqa=True, backend=device.id).candidates[0].estimate.time
        found[device.id] = (math.sqrt(estimate.low * estimate.high), call)
    return found


def path_arms(r: AttentionRequest) -> dict[str, tuple[float, Callable[[], float]]]:
    """Each path of cuda:0 that is right for a request of tensors there, by forcing it: (estimate, a timed call)."""
    import torch
    from hal_cuda import cost, paths
    from hal_cuda.calibrate import on_path

    session: Any = hal.session("cuda:0")
    device, found = hal.device("cuda:0"), {}
    for path in paths.candidates(r, session.chip):
        bound = on_path(device, session.chip, session._rates(), path, r)

        def call(bound: Any = bound) -> float:
            q, k, v = drawn(r)
            torch.cuda.synchronize()
            start = time.perf_counter()
            bound(q, k, v, None, None, None, None)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        found[f"cuda:0 {path}"] = (cost.seconds(path, r, session._rates(), session.chip), call)
    return found


def gpu_requests() -> list[AttentionRequest]:
    """Prefills and decode steps of Llama 3 8B and 70B (on eight GPUs), Qwen 2.5 7B, ViT-L and Whisper large."""
    models = ((32, 8, 128, True), (8, 1, 128, True), (28, 4, 128, True), (16, 16, 64, False), (20, 20, 64, False))
    lengths = (
        (1, 512),
        (1, 4096),
        (1, 32768),
        (64, 64),
        (256, 256),
        (512, 512),
        (1024, 1024),
        (2048, 2048),
        (8192, 8192),
    )
    kinds = (hal.Causal.NONE, hal.Causal.TOP_LEFT)
    return [
        AttentionRequest(1, heads, kv, q, k, dim, dim, "bfloat16", "cuda:0", causal=kinds[causal and q > 1])
        for heads, kv, dim, causal in models
        for q, k in lengths
    ]


def measure(path: Path, gpu: bool, seconds: float) -> None:
    """Time every arm on every shape, interleaved, within about so many seconds, and write the table."""
    import torch

    end, rows = time.monotonic() + seconds, []
    every = [(r, (path_arms if gpu else device_arms)(r)) for r in (gpu_requests() if gpu else requests())]
    times: list[dict[str, list[float]]] = [{name: [] for name in arms} for _, arms in every]
    loaded: list[list[float]] = [[] for _ in every]
    with torch.no_grad():
        for repeat in range(REPEATS + 2):  # two of them warm up
            for place, (_, arms) in enumerate(every):
                for name, (_, call) in arms.items():
                    taken = call()
                    times[place][name] += [taken] if repeat > 1 else []
            if time.monotonic() > end and repeat > 3:
                break
        if not gpu:
            burners = [multiprocessing.Process(target=burn, daemon=True) for _ in range(multiprocessing.cpu_count())]
            for burner in burners:
                burner.start()
            time.sleep(1)
            for repeat in range(REPEATS):
                for place, (_, arms) in enumerate(every):
                    loaded[place].append(arms["cpu:0"][1]())
                if time.monotonic() > end + seconds and repeat > 1:
                    break
            for burner in burners:
                burner.terminate()
    for place, (r, arms) in enumerate(every):
        estimates = {name: estimate for name, (estimate, _) in arms.items()}
        rows.append({"request": r.to_dict(), "times": times[place], "loaded": loaded[place], "estimates": estimates})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"conditions": record.conditions(), "rows": rows}), encoding="utf-8")


class Table:
    """A recorded table: estimates, repeats and medians by shape and arm."""

    def __init__(self, path: Path, arms: list[str] | None = None) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.shapes = []
        self.first = next(iter(data["rows"][0]["times"]))
        for row in data["rows"]:
            request = AttentionRequest.from_dict(row["request"])
            times = {n: t for n, t in row["times"].items() if arms is None or n in arms}
            medians = {name: statistics.median(samples) for name, samples in times.items()}
            loaded = medians | ({"cpu:0": statistics.median(row["loaded"])} if row["loaded"] else {})
            self.shapes.append((request, Keys.of(request), times, row["loaded"], row["estimates"], medians, loaded))


def replay(
    table: Table,
    seed: int,
    *,
    shapes: list[int] | None = None,
    loaded: bool = False,
    estimator: Estimator | None = None,
    wrong: Callable[[str], float] = lambda arm: 1.0,
    slow: float = 1.0,
) -> dict[str, float]:
    """Regret of the router and of the baselines over `REQUESTS` requests, as shares of the oracle's time.

    Args:
        loaded: cpu:0 is loaded for the middle third. slow: that cpu:0 is so many times slower then, instead.
        wrong: a factor on each arm's estimate.
    """
    draw = random.Random(seed)
    chooser = Chooser(estimator or Estimator())
    places = shapes or list(range(len(table.shapes)))
    log, met, last, planned = [], list[int](), dict[Keys, str](), 0.0
    for number in range(REQUESTS):
        met.append(draw.choice(places))
        request, keys, times, under_load, estimates, usual, slowed = table.shapes[met[-1]]
        busy = REQUESTS / 3 <= number < 2 * REQUESTS / 3 and (loaded or slow != 1.0)
        now = {name: under_load if busy and loaded and name == "cpu:0" else samples for name, samples in times.items()}
        factor = {name: slow if busy and name == "cpu:0" else 1.0 for name in now}
        median = slowed if busy and loaded else {name: usual[name] * factor[name] for name in now}
        # Paths of one device share its load, except where one of them is made slower here.
        arms = [Arm(n, n if slow != 1.0 else n.split()[0], estimates[n] * wrong(n)) for n in now]
        found = chooser.choose(keys, arms)
        kept = next((each for each in found.ranked if each.arm.name == last.get(keys)), None)
        if kept is not None and not found.why and kept.log_seconds <= found.best.log_seconds + CLOSE:
            found = found._replace(chosen=kept)  # as the router keeps a decision
        name = found.chosen.arm.name
        seconds = draw.choice(now[name]) * factor[name]
        chooser.observe(keys, found.chosen.arm, found.best.log_seconds, math.log(seconds), bool(found.why))
        planning = KEPT if last.get(keys) == name else FRESH
        last[keys] = name
        prior = min(arms, key=lambda arm: arm.seconds).name
        log.append((median[name] + planning, median, prior, request.visible_macs))
        planned += planning
    oracle = [min(median.values()) for _, median, _, _ in log]
    # What planning alone costs a router that chooses as the oracle does: a decision for each shape that is met, and
    # again where the oracle itself changes.
    perfect, chosen = list[float](), dict[int, str]()
    for (_, median, _, _), best, place in zip(log, oracle, met, strict=True):
        name = min(median, key=lambda n: median[n])
        perfect.append(1 + (KEPT if chosen.get(place) == name else FRESH) / best)
        chosen[place] = name
    total = sum(oracle)
    names = sorted({name for _, median, _, _ in log for name in median})
    alone = {n: sum(median[n] for _, median, _, _ in log) for n in names if all(n in m for _, m, _, _ in log)}
    cuts = [*sorted({macs for _, _, _, macs in log}), 1 << 62]
    threshold = min(
        sum(median[a if macs < cut else b] for _, median, _, macs in log) for a in alone for b in alone for cut in cuts
    )
    wins = [min(median, key=lambda n: median[n]) for _, median, _, _ in log]
    return {
        "router": sum(seconds for seconds, _, _, _ in log) / total - 1,
        "geometric": math.exp(statistics.fmean(math.log(row[0] / best) for row, best in zip(log, oracle, strict=True)))
        - 1,
        "of it planning": planned / total,
        "perfect": sum((share - 1) * best for share, best in zip(perfect, oracle, strict=True)) / total,
        "perfect, geometric": math.exp(statistics.fmean(map(math.log, perfect))) - 1,
        "best arm's share": max(wins.count(name) for name in names) / len(wins),
        "best single": min(alone.values()) / total - 1,
        "threshold": threshold / total - 1,
        "estimates only": sum(median[prior] for _, median, prior, _ in log) / total - 1,
        "second arm's share": sorted(wins.count(n) / len(wins) for n in names)[-2] if len(names) > 1 else 0.0,
        "explored": float(chooser.explored),
    }


def mean(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(result[name] for result in results) for name in results[0]}


def halves(table: Table, seed: int) -> dict[str, float]:
    """Learn on one half of the shapes, and be judged on the other."""
    places = list(range(len(table.shapes)))
    random.Random(seed).shuffle(places)
    estimator = Estimator()
    replay(table, seed, shapes=places[::2], estimator=estimator)
    return replay(table, seed + 100, shapes=places[1::2], estimator=estimator)


CASES: dict[str, Callable[..., dict[str, float]]] = {
    "as recorded": lambda table, seed: replay(table, seed),
    "shapes not trained on": halves,
    "cpu:0 loaded for a third": lambda table, seed: replay(table, seed, loaded=True),
    "estimates of the first arm 4x too high": lambda table, seed: replay(
        table, seed, wrong=lambda arm: 4.0 if arm == table.first else 1.0
    ),
    "the first arm 4x slower for a third": lambda table, seed: replay(table, seed, slow=4.0),
}


def taught(table: Table, other: Table, seed: int) -> dict[str, float]:
    """Learn on another machine's table, and be judged on this one."""
    estimator = Estimator()
    replay(other, seed, estimator=estimator)
    estimator.loads.clear()
    return replay(table, seed + 100, estimator=estimator)


COLUMNS = (
    "router",
    "of it planning",
    "geometric",
    "perfect",
    "perfect, geometric",
    "best single",
    "threshold",
    "estimates only",
    "best arm's share",
    "second arm's share",
    "explored",
)


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure every arm here, and write the table")
    parser.add_argument("--gpu", action="store_true", help="measure the paths of cuda:0 instead of devices")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure at least")
    parser.add_argument("--register", nargs="*", default=[], metavar="PACKAGE", help="plugins to register by hand")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if options.measure is not None:
        for spec in options.register:  # where the distributions are not installed
            for backend in importlib.import_module(spec).hal_backends(hal.API_VERSION):
                hal.register(backend)
        measure(options.measure, options.gpu, options.seconds)
        return 0
    rows, tables = [], {path.stem: Table(path) for path in sorted(FOLDER.glob("*.json"))}
    for title, table in tables.items():
        cases = {case: run for case, run in CASES.items() if not case.startswith("cpu:0") or table.shapes[0][3]}
        for name, other in tables.items():  # those that share an arm
            if other is not table and table.shapes[0][2].keys() & other.shapes[0][2].keys():
                cases[f"learned on {name} first"] = partial(taught, other=other)
        for case, run in cases.items():
            found = mean([run(table, seed=seed) for seed in range(options.seeds)])
            shares = [f"{100 * found[name]:.1f}%" for name in COLUMNS[:-1]]
            rows.append([title, case, *shares, f"{found['explored']:.0f}"])
    notes = [
        f"Regret beyond the arm of the smallest median at that moment, over {REQUESTS} requests, means of "
        f"{options.seeds} seeds; planning is charged to the router ({FRESH * 1e6:.0f} us for a new decision, "
        f"{KEPT * 1e6:.0f} us for a kept one). Threshold: the best two arms and length in hindsight. Estimates only: "
        "the devices' own. Perfect: what planning alone costs a router that chooses as the oracle does; no router's "
        "regret can be less under this charge, in total and geometric.",
        "The geometric mean is of each request's time over the oracle's. "
        "While cpu:0 is loaded the other arms keep their unloaded times, as devices of their own would.",
    ]
    columns = ["table", "case", *COLUMNS]
    record.publish(options, "router", "The router on recorded times", columns, rows, notes, section="Replay")
    return 0


if __name__ == "__main__":
    sys.exit(main())
