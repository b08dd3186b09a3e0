"""Time and energy of products and of attention, every part apart. Parts are the model: totals are their sums, nothing
else.

    T = ceil(tiles / cores) (t_w + rows / f) + T_softmax + T_host        E = P T by part

Converters and laser work while vectors stream and weights load, so they have energy and no time of their own. The
chip's power while it waits for the host is not published and not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import attrs

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Basis, Estimate, Quantity, visible_keys

from .blockfloat import narrowed
from .profile import Origin, Profile

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
#: How far a modelled figure may be off, by the worst origin of what it is made of: half the interval over its middle.
SPREAD = {Origin.SILICON: 0.1, Origin.PAPER: 0.25, Origin.ASSUMED: 0.5}


class Work(NamedTuple):
    """Products with weights held and vectors streamed.

    Attributes:
        loads: weight tiles to load. rows: vectors streamed, over all tiles. macs: multiply-accumulates.
    """

    loads: int
    rows: int
    macs: int

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


@attrs.frozen(kw_only=True)
class Cost:
    """What work costs on a profile.

    Attributes:
        seconds, joules: by part, in the order of TIME_PARTS and ENERGY_PARTS. time_origin, energy_origin: the worst
            origin of the figures used. macs: done on the optics. source: the profile and its state, for people.
    """

    seconds: Mapping[str, float]
    joules: Mapping[str, float]
    origins: Mapping[str, Origin]
    time_origin: Origin
    energy_origin: Origin
    macs: int
    source: str

    @property
    def time(self) -> float:
        return sum(self.seconds.values())

    @property
    def energy(self) -> float:
        return sum(self.joules.values())

    @property
    def optics_time(self) -> float:
        """Seconds that the chip works: weights and stream."""
        return self.seconds["weights"] + self.seconds["stream"]

    def estimate(self, memory: int = 0) -> Estimate:
        return Estimate(
            time=_quantity(self.time, self.time_origin, self.source),
            energy=_quantity(self.energy, self.energy_origin, self.source),
            memory=memory,
            parts=dict(self.seconds),
        )


def _quantity(middle: float, origin: Origin, source: str) -> Quantity:
    spread = SPREAD[origin]
    return Quantity(middle * (1 - spread), middle * (1 + spread), Basis.MODELLED, origin.provenance, source)


def product_work(profile: Profile, batch: int, rows: int, outputs: int, length: int) -> Work:
    """Of `batch` products [rows, length] @ [length, outputs]."""
    tiles = batch * -(-outputs // profile.count("array.outputs")) * -(-length // profile.count("array.inputs"))
    return Work(tiles, tiles * rows, batch * rows * outputs * length)


def attention_work(profile: Profile, request: AttentionRequest) -> Work:
    """Of QK^T with keys held, and PV with values held; rows that causal and window hide from a whole tile are not
    streamed.
    """
    r = request
    outputs, inputs = profile.count("array.outputs"), profile.count("array.inputs")
    share, heads = r.heads_q // max(r.heads_kv, 1), r.batch * r.heads_kv
    deep = -(-r.dim_qk // inputs)  # tiles along the reduction of QK^T
    wide = -(-r.dim_v // outputs)  # tiles along the outputs of PV
    keys, values = _tile_rows(r, outputs), _tile_rows(r, narrowed(r.window, inputs))
    loads = heads * (deep * len(keys) + wide * len(values))
    rows = heads * share * (deep * sum(keys) + wide * sum(values))
    return Work(loads, rows, r.visible_macs)


@lru_cache(maxsize=1024)
def _tile_rows(request: AttentionRequest, size: int) -> tuple[int, ...]:
    """For each tile of `size` keys that anybody sees, how many query rows see some of it."""
    len_q, len_k = request.len_q, request.len_k
    if not len_q or not len_k:
        return ()
    first, last = visible_keys(request, 0, len_q, len_k), visible_keys(request, len_q - 1, len_q, len_k)
    if first == (0, len_k) and last == (0, len_k):
        return (len_q,) * -(-len_k // size)
    changes = [0] * (-(-len_k // size) + 1)  # at a tile: rows that begin to see it, less rows that saw the one before
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
    calls: int = 1,
    duty: float = 1.0,
    state: str = "",
    host: bool = True,
) -> Cost:
    """Time and energy of work.

    Args:
        softmax: elements. transferred: bytes to and from the host. calls: started from the host.
        duty: share of the time the chip may work. state: of the chip, where it is not ready. host: count softmax and
            host.
    """
    p = profile
    rounds = -(-work.loads // p.count("array.cores"))
    rows = work.rows / work.loads if work.loads else 0.0
    streaming = rounds * (rows / p["time.clock"] + p["time.flight"])
    loading = rounds * p["time.weight_load"]
    loading -= p["time.overlap"] * min(loading, streaming)
    optics = loading + streaming
    seconds = {
        "weights": loading,
        "stream": streaming,
        "softmax": softmax / p["time.digital_rate"] if host else 0.0,
        "host": (calls * p["time.host_latency"] + transferred / p["time.host_bandwidth"]) if host else 0.0,
        "derating": optics * (1 / duty - 1),
    }
    watts = {part: p["power.electrical"] * p[key] for part, key in _SHARES.items()}
    watts["laser"] = p["power.laser"] / p["power.laser_efficiency"]
    joules = {part: watts[part] * optics for part in ENERGY_PARTS if part in watts}
    joules |= {"softmax": watts["digital"] * seconds["softmax"], "host": p["power.host"] * seconds["host"]}
    origins = {
        "weights": p.origin("time.weight_load", "time.overlap", "array"),
        "stream": p.origin("time.clock", "time.flight", "array"),
        "softmax": p.origin("time.digital_rate"),
        "host": p.origin("time.host_latency", "time.host_bandwidth"),
        "ADC": p.origin("power.electrical", "power.share_adc"),
        "DAC": p.origin("power.electrical", "power.share_dac"),
        "laser": p.origin("power.laser", "power.laser_efficiency"),
        "digital": p.origin("power.electrical", "power.share_digital"),
        "derating": p.origin("thermal.derated_duty"),
    }
    used = [origins[part] for part in TIME_PARTS if seconds[part]]
    total = p.origin("power.electrical", "power.laser")  # how the total is split between its parts does not change it
    spent = [total, *used, *([p.origin("power.host")] if seconds["host"] else [])]
    return Cost(
        seconds=seconds,
        joules={part: joules[part] for part in ENERGY_PARTS},
        origins=origins,
        time_origin=_worst(used),
        energy_origin=_worst(spent),
        macs=work.macs,
        source=f"profile {p.name}" + (f", {state}" if state else ""),
    )


def _worst(origins: Iterable[Origin]) -> Origin:
    return max(origins, key=list(Origin).index, default=Origin.ASSUMED)


def attention_cost(
    profile: Profile, request: AttentionRequest, *, duty: float = 1.0, state: str = "", host: bool = True
) -> Cost:
    """Of one attention call: both products on the optics, softmax in the control die, operands and result over the
    host.
    """
    r = request
    pairs = r.visible_macs // max(r.dim_qk + r.dim_v, 1)
    return cost(
        profile, attention_work(profile, r), softmax=pairs, transferred=r.bytes_moved, duty=duty, state=state, host=host
    )


def product_cost(
    profile: Profile,
    batch: int,
    rows: int,
    outputs: int,
    length: int,
    *,
    dtype: str = "float32",
    resident: bool = False,
    duty: float = 1.0,
    state: str = "",
) -> Cost:
    """Of `batch` products [rows, length] @ [length, outputs]. resident: the weights are with the device already."""
    size = DTYPE_BYTES.get(dtype, 4)
    moved = batch * (rows * length + rows * outputs + (0 if resident else outputs * length)) * size
    return cost(profile, product_work(profile, batch, rows, outputs, length), transferred=moved, duty=duty, state=state)


def throughput(profile: Profile) -> float:
    """Peak operations (two a multiply-accumulate) a second, weights loaded."""
    p = profile
    return 2 * p["array.cores"] * p["array.outputs"] * p["array.inputs"] * p["time.clock"]


def efficiency(profile: Profile) -> float:
    """Peak operations a second and electrical watt: operations a joule."""
    return throughput(profile) / profile["power.electrical"]
