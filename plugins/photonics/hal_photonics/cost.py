"""Time and energy of products and of attention, by part. The parts are the model; a total is the sum of its parts.

    T = ceil(tiles / cores) (t_w + rows / f) + T_softmax + T_host        E = P T by part

Converters and laser work while vectors stream and weights load, so they have an energy and no time of their own. The
power of a chip that waits for the host is not published, so it is not counted. Averaging n passes repeats the optics n
times: weights and stream take n times their time and energy; softmax and host take theirs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import attrs
from hal_simulation import ProductSize, modelled, worst

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Estimate, Provenance, visible_keys

from .profiles.profile import Profile
from .tiling import narrowed

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


class Work(NamedTuple):
    """Products with weights held and vectors streamed.

    Attributes:
        loads: weight tiles to load. rows: vectors streamed, over all tiles. macs: multiply-accumulates.
    """

    loads: int
    rows: int
    macs: int


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


def product_work(profile: Profile, size: ProductSize) -> Work:
    """The work of products with the second operand held as weights."""
    across = -(-size.outputs // profile.count("array.outputs"))
    along = -(-size.length // profile.count("array.inputs"))
    tiles = size.batch * across * along
    return Work(tiles, tiles * size.rows, size.macs)


def attention_work(profile: Profile, request: AttentionRequest) -> Work:
    """The work of QK^T with keys held and of PV with values held.

    Rows that causal and window hide from a whole tile are not streamed.
    """
    r = request
    outputs, inputs = profile.count("array.outputs"), profile.count("array.inputs")
    group_size, heads = r.heads_q // max(r.heads_kv, 1), r.batch * r.heads_kv
    deep = -(-r.dim_qk // inputs)  # tiles along the reduction of QK^T
    wide = -(-r.dim_v // outputs)  # tiles along the outputs of PV
    keys, values = _tile_rows(r, outputs), _tile_rows(r, narrowed(r.window, inputs))
    loads = heads * (deep * len(keys) + wide * len(values))
    rows = heads * group_size * (deep * sum(keys) + wide * sum(values))
    return Work(loads, rows, r.visible_macs)


@lru_cache(maxsize=1024)
def _tile_rows(request: AttentionRequest, size: int) -> tuple[int, ...]:
    """For each tile of `size` keys of which some row sees a part, the number of query rows that do."""
    len_q, len_k = request.len_q, request.len_k
    if not len_q or not len_k:
        return ()
    first, last = visible_keys(request, 0, len_q, len_k), visible_keys(request, len_q - 1, len_q, len_k)
    if first == (0, len_k) and last == (0, len_k):
        return (len_q,) * -(-len_k // size)
    changes = [0] * (
        -(-len_k // size) + 1
    )  # at a tile: rows whose first tile it is, minus rows whose last one is before
    for row in range(len_q):
        start, stop = visible_keys(request, row, len_q, len_k)
        if start < stop:
            changes[start // size] += 1
            changes[-(-stop // size)] -= 1
    return tuple(count for count in accumulate(changes) if count)


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
    *,
    passes: int = 1,
    duty: float = 1.0,
    state: str = "",
    host: bool = True,
) -> Cost:
    """Time and energy of one attention call; arguments as for `cost`.

    Both products run on the optics, softmax in the control die; operands and the result pass the host.
    """
    r = request
    pairs = r.visible_macs // max(r.dim_qk + r.dim_v, 1)
    work, moved = attention_work(profile, r), r.bytes_moved
    return cost(profile, work, softmax=pairs, transferred=moved, passes=passes, duty=duty, state=state, host=host)


def product_cost(
    profile: Profile, size: ProductSize, *, resident: bool = False, duty: float = 1.0, state: str = ""
) -> Cost:
    """Time and energy of products; arguments as for `cost`.

    Args:
        resident: the weights are with the device already, so they are not transferred.
    """
    elements = size.batch * (size.rows * size.length + (0 if resident else size.outputs * size.length)) + size.results
    moved = elements * DTYPE_BYTES.get(size.dtype, 4)
    return cost(profile, product_work(profile, size), transferred=moved, duty=duty, state=state)


def throughput(profile: Profile) -> float:
    """Peak operations per second with the weights loaded; a multiply-accumulate is two operations."""
    p = profile
    return 2 * p["array.cores"] * p["array.outputs"] * p["array.inputs"] * p["time.clock"]


def efficiency(profile: Profile) -> float:
    """Peak operations per joule of electrical energy."""
    return throughput(profile) / profile["power.electrical"]
