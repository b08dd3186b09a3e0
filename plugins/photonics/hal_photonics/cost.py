"""Time and energy of products and of attention, by part. The parts are the model; a total is the sum of its parts.

    T = ceil(tiles / cores) (t_w + rows / f) + T_softmax + T_host        E = P T by part

Converters and laser work while vectors stream and weights load, so they have an energy and no time of their own. The
power of a chip that waits for the host is not published, so it is not counted. Averaging n passes repeats the optics n
times: weights and stream take n times their time and energy; softmax and host take theirs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import attrs
from hal_simulation import ProductSize, modelled, worst

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Causal, Estimate, MaskKind, Provenance, TilePlan

from .profiles.profile import Profile
from .simulator.dynamic import PARTS, Dynamic, dynamic_cost
from .simulator.work import Work, attention_work, product_work
from .tiling import heads_at_once, narrowed, rows_at_once

#: Parts of time (s) and energy (J), in the order of every table.
TIME_PARTS = ("weights", "stream", "softmax", "host", "derating")
ENERGY_PARTS = ("weights", "stream", "ADC", "DAC", "laser", "digital", "softmax", "host")
_SHARES = {
    "weights": "power.share_weights",
    "stream": "power.share_stream",
    "ADC": "power.share_adc",
    "DAC": "power.share_dac",
    "digital": "power.share_digital",
}
#: Tensors of the size of a weight tile that a mechanism needs to realise one.
_CELLS = {"crossbar": 2, "mesh": 6.4, "ring": 7.2, "dot": 2}
#: Size of a pool's block over what was asked for, on average.
_POOLED = 1.03


@attrs.frozen(kw_only=True)
class Cost:
    """What work costs on a profile.

    Attributes:
        seconds, joules: by part, in the order of TIME_PARTS and ENERGY_PARTS. provenances: by part.
        time_provenance, energy_provenance: the worst of the figures used.
        macs: multiply-accumulates on the optics. source: the profile and its state, for people.
    """

    seconds: Mapping[str, float]
    joules: Mapping[str, float]
    provenances: Mapping[str, Provenance]
    time_provenance: Provenance
    energy_provenance: Provenance
    macs: int
    source: str

    @property
    def time(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    @property
    def energy(self) -> float:
        """Joules."""
        return sum(self.joules.values())

    @property
    def optics_time(self) -> float:
        """Seconds in which the optics work: weights and stream."""
        return self.seconds["weights"] + self.seconds["stream"]

    def estimate(self, memory: int = 0) -> Estimate:
        """Intervals around the modelled time and energy, as wide as the worst provenance makes them."""
        return Estimate(
            time=modelled(self.time, self.time_provenance, self.source),
            energy=modelled(self.energy, self.energy_provenance, self.source),
            memory=memory,
            parts=dict(self.seconds),
        )


def cost(
    profile: Profile,
    work: Work,
    *,
    softmax: int = 0,
    transferred: int = 0,
    passes: int = 1,
    duty: float = 1.0,
    state: str = "",
    host: bool = True,
) -> Cost:
    """Time and energy of one call.

    Args:
        softmax: its elements. transferred: bytes to and from the host. passes: of the optics, averaged.
        duty: share of the time the chip may work. state: of the chip, where it is not ready.
        host: whether softmax and the host are counted.
    """
    p = profile
    rounds = passes * -(-work.loads // p.count("array.cores"))
    rows = work.rows / work.loads if work.loads else 0.0
    streaming = rounds * (rows / p["time.clock"] + p["time.flight"])
    loading = rounds * p["time.weight_load"]
    loading -= p["time.overlap"] * min(loading, streaming)
    optics = loading + streaming
    seconds = {
        "weights": loading,
        "stream": streaming,
        "softmax": softmax / p["time.digital_rate"] if host else 0.0,
        "host": (p["time.host_latency"] + transferred / p["time.host_bandwidth"]) if host else 0.0,
        "derating": optics * (1 / duty - 1),
    }
    watts = {part: p["power.electrical"] * p[key] for part, key in _SHARES.items()}
    watts["laser"] = p["power.laser"] / p["power.laser_efficiency"]
    joules = {part: watts[part] * optics for part in ENERGY_PARTS if part in watts}
    joules |= {"softmax": watts["digital"] * seconds["softmax"], "host": p["power.host"] * seconds["host"]}
    provenances = {
        "weights": p.provenance("time.weight_load", "time.overlap", "array"),
        "stream": p.provenance("time.clock", "time.flight", "array"),
        "softmax": p.provenance("time.digital_rate"),
        "host": p.provenance("time.host_latency", "time.host_bandwidth"),
        "ADC": p.provenance("power.electrical", "power.share_adc"),
        "DAC": p.provenance("power.electrical", "power.share_dac"),
        "laser": p.provenance("power.laser", "power.laser_efficiency"),
        "digital": p.provenance("power.electrical", "power.share_digital"),
        "derating": p.provenance("thermal.derated_duty"),
    }
    used = [provenances[part] for part in TIME_PARTS if seconds[part]]
    total = p.provenance("power.electrical", "power.laser")  # its split between parts does not change it
    spent = [total, *used, *([p.provenance("power.host")] if seconds["host"] else [])]
    return Cost(
        seconds=seconds,
        joules={part: joules[part] for part in ENERGY_PARTS},
        provenances=provenances,
        time_provenance=worst(used),
        energy_provenance=worst(spent),
        macs=work.macs,
        source=f"profile {p.name}" + (f", {state}" if state else ""),
    )


def attention_cost(
    profile: Profile,
    request: AttentionRequest,
    plan: TilePlan | None = None,
    *,
    duty: float = 1.0,
    state: str = "",
    host: bool = True,
) -> Cost:
    """Time and energy of one attention call; arguments as for `attention_work` and `cost`.

    Both products run on the optics, softmax in the control die; operands and the result pass the host. The passes are
    those of the request's options.
    """
    r = request
    softmax = r.visible_macs // max(r.dim_qk + r.dim_v, 1)
    if profile.mechanism == "dot":
        scores = ProductSize(r.batch * r.heads_q, r.len_q, r.len_k, r.dim_qk, r.dtype)
        mixed = ProductSize(r.batch * r.heads_q, r.len_q, r.dim_v, r.len_k, r.dtype)
        rest = cost(profile, Work(0, 0, 0), softmax=softmax, transferred=r.bytes_moved, state=state, host=host)
        return _dynamic(profile, [(scores, False), (mixed, False)], rest, passes_of(r), duty, r.macs)
    return cost(
        profile,
        attention_work(profile, r, plan),
        softmax=softmax,
        transferred=r.bytes_moved,
        passes=passes_of(r),
        duty=duty,
        state=state,
        host=host,
    )


def passes_of(request: AttentionRequest) -> int:
    """The passes of the optics that are averaged: the device option "passes", 1 without it."""
    return int(dict(request.options).get("passes", 1))


def product_cost(
    profile: Profile,
    size: ProductSize,
    *,
    resident: bool = False,
    passes: int = 1,
    duty: float = 1.0,
    state: str = "",
    host: bool = True,
) -> Cost:
    """Time and energy of products; arguments as for `cost`.

    Args:
        resident: the weights are with the device already, so they are not transferred.
    """
    elements = size.batch * (size.rows * size.length + (0 if resident else size.outputs * size.length)) + size.results
    moved = elements * DTYPE_BYTES.get(size.dtype, 4)
    if profile.mechanism == "dot":
        rest = cost(profile, Work(0, 0, 0), transferred=moved, state=state, host=host)
        return _dynamic(profile, [(size, resident)], rest, passes, duty, size.macs)
    work = product_work(profile, size)
    return cost(profile, work, transferred=moved, passes=passes, duty=duty, state=state, host=host)


def _dynamic(
    profile: Profile, products: Iterable[tuple[ProductSize, bool]], rest: Cost, passes: int, duty: float, macs: int
) -> Cost:
    """The cost on a design without held weights.

    Args:
        products: each with whether its second operand is weights. rest: softmax and host.
    """
    total = reduce(Dynamic.plus, (dynamic_cost(profile, size, weights=weights) for size, weights in products))
    optics = passes * (total.optics + total.waiting)
    seconds = dict(rest.seconds) | {
        "weights": passes * total.waiting,
        "stream": passes * total.optics,
        "derating": optics * (1 / duty - 1),
    }
    joules = {part: passes * energy for part, energy in total.joules.items()}
    joules |= {part: rest.joules[part] for part in ("softmax", "host")}
    time = [rest.provenances[part] for part in TIME_PARTS if rest.seconds[part]]
    own = profile.provenance("dot", "array", "time.clock")
    return attrs.evolve(
        rest,
        seconds=seconds,
        joules=joules,
        provenances=dict(rest.provenances) | dict.fromkeys(PARTS, own),
        time_provenance=worst([own, *time]),
        energy_provenance=worst([own, *([profile.provenance("power.host")] if joules["host"] else [])]),
        macs=macs,
    )


def throughput(profile: Profile) -> float:
    """Peak operations per second with the weights loaded; a multiply-accumulate is two operations."""
    p = profile
    rows = p.count("dot.rows") if p.mechanism == "dot" else 1
    return rows * 2 * p["array.cores"] * p["array.outputs"] * p["array.inputs"] * p["time.clock"]


def efficiency(profile: Profile) -> float:
    """Peak operations per joule of electrical energy."""
    return throughput(profile) / profile["power.electrical"]


def call_memory(profile: Profile, request: AttentionRequest) -> int:
    """Bytes that the simulation of one call allocates at its peak, the output included.

    What is programmed and the results live through the call. On top comes the largest row range: its scores, with what
    one readout or one step of the softmax needs beside them.
    """
    r = request
    size, inputs = DTYPE_BYTES.get(r.dtype, 4), profile.tile_inputs
    group_size, tiles = r.heads_q // max(r.heads_kv, 1), -(-r.dim_qk // inputs)
    held = int(4 * _POOLED * r.batch * r.heads_kv * r.len_k * (r.dim_qk + tiles + r.dim_v))
    results = r.batch * r.heads_q * r.len_q * (size * r.dim_v + (4 if r.lse else 0))
    batch, heads = (min(most, have) for most, have in zip(heads_at_once(r), (r.batch, r.heads_kv), strict=True))
    peak = 0
    for rows, keys in _largest_ranges(r):
        products = batch * heads
        streamed, scores = group_size * rows, products * group_size * rows * keys
        visible = rows * keys if r.causal is not Causal.NONE or r.window is not None else 0
        converted = 4 * products * streamed * r.dim_qk if size < 4 else 0
        mask = min(r.mask_batch, batch) * min(r.mask_heads, heads * group_size) * rows * keys
        masking = {MaskKind.ADDITIVE: 5 * mask, MaskKind.BOOLEAN: mask}.get(r.mask, 0)
        softmax = 8 * scores + max(4 * scores if r.softcap is not None else 0, masking, visible)
        first = converted + _stream_memory(profile, products, streamed, keys, r.dim_qk, held=True)
        second = 4 * scores + _stream_memory(
            profile, products, streamed, r.dim_v, min(keys, narrowed(r.window, inputs)), held=False
        )
        peak = max(peak, visible + max(first, softmax, second), 9 * visible)
    programming = 4 * r.len_k * min(r.dim_qk, inputs) * (2 if size == 4 else 3)
    return held + max(results + peak, programming, results + _differentiable_memory(r) if r.grads else 0)


def _differentiable_memory(request: AttentionRequest) -> int:
    """Bytes of exact attention beside the chip's: torch keeps the softmax weights of all row ranges for gradients."""
    r = request
    ranges = _largest_ranges(r)
    mean = sum(rows * keys for rows, keys in ranges) / max(sum(rows for rows, _ in ranges), 1)
    batch, heads = heads_at_once(r)
    pairs = int(r.len_q * mean)
    part = min(batch, r.batch) * min(heads, r.heads_kv) * r.heads_q // r.heads_kv * max(n * k for n, k in ranges)
    visible = pairs * r.batch * r.heads_kv // (min(batch, r.batch) * min(heads, r.heads_kv))
    kept = visible if r.causal is not Causal.NONE or r.window is not None else 0
    outputs = 3 * r.batch * r.heads_q * r.len_q * r.dim_v
    return 4 * (r.batch * r.heads_q * pairs + part + outputs) + kept


def _largest_ranges(request: AttentionRequest) -> set[tuple[int, int]]:
    """(query rows, keys) of the row ranges among which the one with most scores is."""
    r = request
    rows = rows_at_once(r) if r.tiling is None or r.tiling[1] < 1 else r.tiling[1]
    plan = TilePlan.equal(r, rows, max(r.len_k, 1))
    count = -(-r.len_q // rows)
    found = set()
    for number in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
        start, stop = number * rows, min((number + 1) * rows, r.len_q)
        found.add((stop - start, max(plan.visible(stop - 1)[1] - plan.visible(start)[0], 1)))
    return found


def _stream_memory(profile: Profile, products: int, rows: int, outputs: int, length: int, *, held: bool) -> int:
    """Bytes at the peak of streaming products [rows, length] through weights [outputs, length], their sum included.

    Args:
        held: the weights are encoded already.
    """
    width = min(length, profile.tile_inputs)
    codes, streamed, weights = products * rows * outputs, products * rows * width, products * outputs * width
    corrected = int(profile.calibrated)
    before = (1 + corrected) * streamed + (corrected + (not held)) * weights
    bent = (2 + bool(profile["noise.crosstalk"])) * streamed
    cells = streamed + _CELLS[profile.mechanism] * weights
    read = 2 * codes + streamed + weights
    return int(4 * (codes + before + max(bent, cells, read)))


def encoder_cost(
    profile: Profile, *, tokens: int, dim: int, heads: int, layers: int, batch: int = 1, dtype: str = "float32"
) -> Cost:
    """The cost of an encoder's products: projections, attention and a feed-forward part of 4 times the width.

    Weights are with the device; softmax and the host between layers are not counted. For BERT-base 768, 12 and 12, for
    DeiT-T 192, 3 and 12.
    """
    rows = batch * tokens
    sizes = [(dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)]
    products = [ProductSize(1, rows, outputs, length, dtype) for length, outputs in sizes]
    request = AttentionRequest(batch, heads, heads, tokens, tokens, dim // heads, dim // heads, dtype)
    parts = [attention_cost(profile, request, host=False)]
    parts += [product_cost(profile, size, resident=True, host=False) for size in products]

    def summed(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {part: layers * sum(one[part] for one in each) for part in each[0]}

    first = parts[0]
    return attrs.evolve(
        first,
        seconds=summed([part.seconds for part in parts]) | {"softmax": 0.0},
        joules=summed([part.joules for part in parts]) | {"softmax": 0.0},
        time_provenance=worst(part.time_provenance for part in parts),
        energy_provenance=worst(part.energy_provenance for part in parts),
        macs=layers * sum(part.macs for part in parts),
    )
