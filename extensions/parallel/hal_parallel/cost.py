"""What a call would take under each strategy: the inner device's estimate, and the measured link between ranks."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hal_core import Causal, ContractError, cache_dir
from hal_core.plugin_api import DTYPE_BYTES, write_whole

from .description import Description
from .inner import choose
from .layout import Pieces, joined_ranks
from .strategies import STRATEGIES, why_not
from .topology import Topology, topology_of
from .visible import find_calls

_FORMAT = 1


class LinkRate(NamedTuple):
    """What travels between two ranks.

    Attributes:
        bandwidth: bytes per second in one direction, while both send. latency: seconds of an empty exchange.
        basis: "measured" or "assumed".
    """

    bandwidth: float
    latency: float
    basis: str = "assumed"

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:.3g} GB/s, {self.latency * 1e6:.3g} us ({self.basis})"

    def seconds(self, size: float, messages: int = 1) -> float:
        return size / self.bandwidth + messages * self.latency


#: Of links that nobody measured: a network of processors, and a bus of accelerators.
_ASSUMED = {"cpu": LinkRate(1e9, 2e-4), "": LinkRate(2.5e10, 2e-5)}


def measure_link(mesh: Any = None, size: int = 1 << 23, repeats: int = 7) -> LinkRate:
    """Measure the link between neighbouring ranks, all ranks together, and store it for `auto` and `hal plan`.

    Args:
        size: bytes of the large message. repeats: the least time counts, of the slowest rank.

    Raises:
        ContractError: there is no process group. OSError: the cache cannot be written.
    """
    topology = topology_of(mesh)
    if topology is None:
        raise ContractError("there is no process group to measure: start with torchrun, and init_process_group")
    ring = topology.links[-1]
    times = []
    for count in (1, size):
        send = torch.zeros(count, dtype=torch.uint8, device=ring.device)
        receive = torch.empty_like(send)
        passes = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            ring.shift([send], [receive], 1, "measuring the link").wait()
            receive.sum().item()  # an accelerator is waited for
            passes.append(time.perf_counter() - start)
        times.append(min(passes[1:]))
    own = torch.tensor([*times, 0.0], dtype=torch.float64, device=ring.device)
    latency, whole = ring.all_gather(own, "measuring the link").amax(0).tolist()[:2]
    rate = LinkRate(size / max(whole - latency, whole / 10), latency, "measured")
    values = {"format": _FORMAT, "bandwidth": rate.bandwidth, "latency": rate.latency}
    write_whole(_path(ring.device.type, topology.world), json.dumps(values))
    return rate


def stored_link(kind: str, world: int) -> LinkRate:
    """The measured link of ranks on devices of a kind; of another number of ranks, or assumed, where there is none."""
    folder = cache_dir() / "links"
    others = sorted(folder.glob(f"{kind}-*.json")) if folder.is_dir() else []
    for path in (_path(kind, world), *others):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rate = LinkRate(float(values["bandwidth"]), float(values["latency"]), "measured")
            if values["format"] == _FORMAT and 0 < rate.bandwidth < 1e15 and 0 <= rate.latency < 60:
                return rate
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return _ASSUMED.get(kind, _ASSUMED[""])


def _path(kind: str, world: int) -> Any:
    return cache_dir() / "links" / f"{kind}-{world}.json"


def shape_of(topology: Topology) -> tuple[int, ...]:
    """(ranks,) or (ring, heads)."""
    return (topology.ring.size,) if topology.heads is None else (topology.ring.size, topology.heads.size)


class StrategyEstimate(NamedTuple):
    """What a call takes under a strategy, on the busiest rank; forward and backward where it has gradients.

    Attributes:
        strategy: its name. refusal: why it cannot run the call, then the rest is 0.
        compute, exchange: seconds. total: of both, with what overlaps counted once.
        sent: bytes that a rank sends. memory: bytes beside the rank's own tensors and results.
    """

    strategy: str
    refusal: str = ""
    compute: float = 0.0
    exchange: float = 0.0
    total: float = 0.0
    sent: int = 0
    memory: int = 0

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.strategy}: no, {self.refusal}"
        return (
            f"{self.strategy}: {self.total * 1e3:.3g} ms (compute {self.compute * 1e3:.3g}, exchange "
            f"{self.exchange * 1e3:.3g}), {self.sent:,} bytes sent, {self.memory:,} bytes held"
        )


def least(estimates: tuple[StrategyEstimate, ...]) -> str:
    """The strategy that takes least time; the first of the table where none can, so that its refusal is told."""
    able = [estimate for estimate in estimates if not estimate.refusal]
    return min(able, key=lambda estimate: estimate.total).strategy if able else "ring"


def estimates(d: Description, shape: tuple[int, ...], link: LinkRate) -> tuple[StrategyEstimate, ...]:
    """Every strategy's estimate of a call on a mesh of this shape."""
    return tuple(_estimate(name, d, shape, link) for name in STRATEGIES)


def _estimate(name: str, d: Description, shape: tuple[int, ...], link: LinkRate) -> StrategyEstimate:
    if reason := why_not(name, d, shape):
        return StrategyEstimate(name, reason)
    r, world = d.request, d.queries.world
    size, wide = DTYPE_BYTES[r.dtype], max(DTYPE_BYTES[r.dtype], 4)
    keys = r.batch * r.heads_kv * d.keys.local * (r.dim_qk + r.dim_v)
    queries, rows = r.batch * r.heads_q * d.queries.local * r.dim_qk, r.batch * r.heads_q * d.queries.local
    results, back = rows * r.dim_v, 2 if r.grads else 1
    pair = seconds_per_pair(d)
    work = _work(name, d, shape)
    compute = pair * sum(work)
    if name in ("ring", "ring_ulysses"):
        heads = shape[1] if len(shape) > 1 else 1
        per_step = keys * (2 * size + wide if r.grads else size)
        travelling = [link.seconds(per_step, 2 if r.grads else 1)] * (len(work) - 1)
        exchange, sent = sum(travelling), per_step * len(travelling)
        total = sum(max(pair * each, moved) for each, moved in zip(work, [*travelling, 0.0], strict=True))
        memory = results * wide + keys * size * (2 if len(work) > 1 else 0) + 2 * keys * wide * bool(r.grads)
        if heads > 1:
            traded = int((queries + keys + results) * size * (heads - 1) / heads * back)
            exchange, total = exchange + link.seconds(traded, 4), total + link.seconds(traded, 4)
            sent, memory = sent + traded, memory + (queries + keys) * size
        return StrategyEstimate(name, "", compute, exchange, total, sent, memory)
    if name == "gathered":
        sent = int(keys * (world - 1) * (size + wide * bool(r.grads)))
        memory = keys * world * (size + wide * bool(r.grads)) + results * wide
    elif name == "ulysses":
        sent = int((queries + keys + results) * size * (world - 1) / world * back)
        memory = (queries + keys) * size + results * (size + wide)
    else:
        replicated = d.queries.local == d.queries.length and world > 1
        sent = (results * size + rows * wide) * (world - 1) + (0 if replicated else queries * size * (world - 1))
        sent *= back
        memory = (queries * size + results * (size + wide)) * (1 if replicated else world)
    exchange = link.seconds(sent, {"gathered": 2, "ulysses": 4}.get(name, 3) * back)
    return StrategyEstimate(name, "", compute, exchange, compute + exchange, sent, memory)


def seconds_per_pair(d: Description) -> float:
    """Seconds that the inner device takes for a visible pair of tokens over all heads, with gradients where wanted."""
    request = replace(d.request, causal=Causal.NONE, diagonal=0, window=None)
    request = replace(request, len_q=max(request.len_q, 1), len_k=max(request.len_k, 1))
    estimate = choose(request, d.policy).decision.winner.estimate
    return estimate.time.middle / (request.len_q * request.len_k) if estimate is not None else 0.0


def _work(name: str, d: Description, shape: tuple[int, ...]) -> list[float]:
    """Visible pairs of the busiest rank at each step, in pairs over all heads."""
    world = d.queries.world
    if name in ("ring", "ring_ulysses"):
        heads = shape[1] if len(shape) > 1 else 1
        groups = [tuple(range(i * heads, (i + 1) * heads)) for i in range(world // heads)]
        rows = [joined_ranks(d.queries, group)[0] if heads > 1 else d.queries.pieces[group[0]] for group in groups]
        keys = [joined_ranks(d.keys, group)[0] if heads > 1 else d.keys.pieces[group[0]] for group in groups]
        ring = len(groups)
        steps = [max(_pairs(rows[i], keys[(i - step) % ring], d) for i in range(ring)) for step in range(ring)]
        while len(steps) > 1 and not steps[-1]:
            steps.pop()
        return [pairs / heads for pairs in steps]
    every = tuple(range(world))
    whole_rows, whole_keys = joined_ranks(d.queries, every)[0], joined_ranks(d.keys, every)[0]
    if name == "gathered":
        return [float(max(_pairs(pieces, whole_keys, d) for pieces in d.queries.pieces))]
    if name == "ulysses":
        return [_pairs(whole_rows, whole_keys, d) / world]
    rows_of = d.queries.pieces[0] if d.queries.local == d.queries.length else whole_rows
    return [float(max(_pairs(rows_of, pieces, d) for pieces in d.keys.pieces))]


def _pairs(queries: Pieces, keys: Pieces, d: Description) -> int:
    return sum(call.pairs for call in find_calls(queries, keys, d.rule))
