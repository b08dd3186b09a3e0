"""What a call would take under each strategy: the inner device's estimate, and the measured link between ranks."""

import json
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hal_core import Causal, ContractError, UnsupportedError, cache_dir
from hal_core.plugin_api import DTYPE_BYTES, write_whole

from .description import Description
from .inner import NO_BAND, choose
from .layout import REPLICATED, joined_ranks
from .strategies import STRATEGIES, heads_together, why_not
from .topology import topology_of
from .visible import Call, band_options, find_calls

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


#: Forward and backward over forward, where a device estimates the forward alone: seven products over two.
_WITH_GRADIENTS = 3.5
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
            ring.shift([send], [receive], 1, "measuring the link")()
            receive[-1].item()  # an accelerator is waited for
            passes.append(time.perf_counter() - start)
        times.append(min(passes[1:]))
    own = torch.tensor(times, dtype=torch.float64, device=ring.device)
    latency, whole = ring.all_gather(own, "measuring the link").amax(0).tolist()
    rate = LinkRate(size / max(whole - latency, whole / 10), latency, "measured")
    write_whole(_path(ring.device.type, topology.world), json.dumps(rate._asdict() | {"format": _FORMAT}))
    return rate


def stored_link(kind: str, world: int) -> LinkRate:
    """The measured link of ranks on devices of a kind; of another number of ranks, or assumed, where there is none."""
    others = sorted((cache_dir() / "links").glob(f"{kind}-*.json"))
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
    found = []
    for name in STRATEGIES:
        try:
            reason = why_not(name, d, shape)
            found.append(StrategyEstimate(name, reason) if reason else _estimate(name, d, shape, link))
        except UnsupportedError as error:  # no device takes calls of this size
            found.append(StrategyEstimate(name, str(error)))
    return tuple(found)


def _estimate(name: str, d: Description, shape: tuple[int, ...], link: LinkRate) -> StrategyEstimate:
    r, world, replicated = d.request, d.queries.world, d.queries.name == REPLICATED
    size, wide, back = DTYPE_BYTES[r.dtype], max(DTYPE_BYTES[r.dtype], 4), 2 if r.grads else 1
    rows = r.batch * r.heads_q * d.queries.local
    queries, results = rows * r.dim_qk * size, rows * r.dim_v * size
    keys = r.batch * r.heads_kv * d.keys.local * (r.dim_qk + r.dim_v)
    sums = keys * wide * bool(r.grads)  # of their gradients
    work, calls = _work(name, d, shape)
    passed, sent, messages = 0, 0, 0  # bytes of a step of the ring; bytes and messages of what travels at once
    if name == "gathered":
        sent, messages = (keys * size + sums) * (world - 1), 2
        # While a call runs, or while what the group gathers is put in order: of gradients a copy to be summed, and the
        # group's own; before there is a result, the values beside the ordered keys.
        memory = (keys * size + sums) * world + _call_memory(d, calls[0], r.heads_kv)
        memory = max(memory, 2 * (keys * size + sums) * world if r.grads else 3 * keys * size * world // 2 - results)
    elif name == "ulysses":
        traded = queries + keys * size + results
        sent, messages = traded * (world - 1) // world * back, 4
        memory = traded - results + _call_memory(d, calls[0], r.heads_kv // world)
        # With gradients, beside what is kept: the result's, twice. Without: what is sent, came and is put in order.
        memory = memory + 2 * results if r.grads else max(memory, 4 * results)
    elif name == "pass_query":
        sent = back * (results + rows * wide + (0 if replicated else queries)) * (world - 1)
        messages, others = 3, 1 if replicated else world
        # While the parts are computed, or while they are merged: beside the result, what was sent, came and is weighed.
        found = results * others + _call_memory(d, calls[0], r.heads_kv)
        memory = queries * others + max(found, 7 * results * world // 2)
    else:
        heads = shape[1] if len(shape) > 1 else 1
        each, ring = replace(r, heads_q=r.heads_q // heads, heads_kv=r.heads_kv // heads), len(work) > 1
        together = heads_together(each, d.keys.pieces) if name == "ring" or ring else each.heads_kv
        moving, passed = together / max(each.heads_kv, 1), keys * size * back + sums
        # At each step: what comes, what is held after the first one, and from then on three sums of its gradients (own,
        # arriving, sent), beside which the result is not there yet.
        last, later = len(work) - 1, (3 * sums - keys * size) * bool(r.grads)
        memory = max(
            int(moving * (keys * size * ((step < last) + (step > 0)) + later * (step > 0)))
            + _call_memory(d, call, together)
            for step, call in enumerate(calls)
        )
        if heads > 1:
            traded = queries + keys * size + results
            sent, messages, memory = traded * (heads - 1) // heads * back, 4, memory + traded
    pair, moved = seconds_per_pair(d), link.seconds(passed, back)
    steps, once = len(work) - 1, link.seconds(sent, messages * back)
    total = sum(max(pair * each, moved * (step < steps)) for step, each in enumerate(work)) + once
    return StrategyEstimate(name, "", pair * sum(work), moved * steps + once, total, sent + passed * steps, memory)


def _call_memory(d: Description, calls: list[Call], heads_kv: int) -> int:
    """Bytes that the largest of some dense calls takes by the device's estimate, its results included."""
    r, heads_q, found = d.request, heads_kv * (d.request.heads_q // max(d.request.heads_kv, 1)), 0
    for call in calls:
        sizes = {"heads_q": heads_q, "heads_kv": heads_kv, "len_q": call.size[0], "len_k": call.size[1]}
        request = replace(r, **sizes | NO_BAND | band_options(call.low, call.high))
        estimate = choose(request, d.policy).decision.winner.estimate
        # Of some of the rows, the output and its gradient are copied for a backward call.
        copied = 2 * r.batch * heads_q * call.size[0] * r.dim_v * DTYPE_BYTES[r.dtype]
        copied *= bool(r.grads) and call.size[0] < d.queries.local
        found = max(found, copied + (0 if estimate is None else estimate.memory))
    return found


def seconds_per_pair(d: Description) -> float:
    """Seconds that the inner device takes for a visible pair of tokens over all heads, with gradients where wanted."""
    r = d.request
    request = replace(r, causal=Causal.NONE, diagonal=0, window=None, len_q=max(r.len_q, 1), len_k=max(r.len_k, 1))
    forward = replace(request, grads=frozenset(), grad_lse=False)
    both, alone = (choose(each, d.policy).decision.winner.estimate for each in (request, forward))
    if both is None or alone is None:
        return 0.0
    seconds = both.time.middle
    if r.grads and seconds < 2 * alone.time.middle:  # an estimate of the forward pass alone
        seconds = _WITH_GRADIENTS * alone.time.middle
    return seconds / (request.len_q * request.len_k)


def _work(name: str, d: Description, shape: tuple[int, ...]) -> tuple[list[float], list[list[Call]]]:
    """At each step: visible pairs of the busiest rank, in pairs over all heads; the calls of all ranks."""
    world = d.queries.world
    sharing = world if name == "ulysses" else shape[1] if len(shape) > 1 else 1  # ranks that share the heads
    groups = [tuple(range(i, i + sharing)) for i in range(0, world, sharing)]
    whole = [[joined_ranks(layout, tuple(range(world)))[0]] for layout in (d.queries, d.keys)]
    if name == "gathered":
        steps = [[(pieces, whole[1][0]) for pieces in d.queries.pieces]]
    elif name == "pass_query":
        rows = d.queries.pieces[:1] if d.queries.local == d.queries.length else whole[0]
        steps = [[(rows[0], pieces) for pieces in d.keys.pieces]]
    else:
        rows, keys = (
            [joined_ranks(layout, group)[0] if sharing > 1 else layout.pieces[group[0]] for group in groups]
            for layout in (d.queries, d.keys)
        )
        steps = [[(rows[i], keys[i - step]) for i in range(len(rows))] for step in range(len(rows))]
    found = [[find_calls(*pair, d.rule) for pair in step] for step in steps]
    while len(found) > 1 and not any(found[-1]):
        found.pop()
    pairs = [max(sum(call.pairs for call in part) for part in step) / sharing for step in found]
    # Calls of one size and band take the same memory.
    alike = [{(call.size, call.low, call.high): call for part in step for call in part} for step in found]
    return pairs, [list(calls.values()) for calls in alike]
