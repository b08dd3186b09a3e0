"""How long a request takes on an arm: the device's own estimate, a learned residual on log time, and a load term.

An arm is a device, or a device with one of its own tilings. The logarithm of a call's time is modelled as

    log(time) = log(estimate) + residual(arm, request) + load(device)

The residual is a shrunk mean over levels: device, arm, kind of request, size and shape; a level that has seen few calls
says little beside the level above it, as in empirical Bayes estimation with normal means. The load of a device moves
fast and is learned from the newest calls; while it is high the residual learns little, so that another tenant is not
taken for the device itself.

Times are seconds. Nothing here imports torch or reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from hal_core import AttentionRequest, Causal, MaskKind

#: What one call alone may be wrong by beside noise, in log seconds: a cold start, or an interruption.
OUTLIER = 0.6
#: Calls that the level above counts for.
SHRINKAGE = 1.0
#: Calls that a mean remembers.
MEMORY = 40.0
#: Standard deviation of log(time / estimate) of a device of which nothing was seen: estimates are within about a
#: factor of 6, two standard deviations.
PRIOR_SPREAD = 0.9
#: Share of an innovation that the load follows, and innovations whose median counts: one outlier moves nothing.
LOAD_GAIN = 0.6
#: A load beyond this is taken for one: the residual learns less, and the device is looked at again.
NOTICED_LOAD = 0.25
_MOST_NODES = 20_000


class Keys(NamedTuple):
    """What a residual is learned by: the kind of request, its size in octaves of work, its bucketed shape."""

    kind: str
    size: int
    shape: str

    @classmethod
    def of(cls, request: AttentionRequest) -> Keys:
        r = request
        kind = _kind(
            r.dtype,
            r.len_q * r.heads_q <= 32 * max(r.heads_kv, 1),
            r.causal,
            r.mask,
            r.window is not None,
            r.softcap is not None,
            r.lse,
            bool(r.grads),
            r.packed,
            r.page_size is not None,
            r.cache_dtype,
            r.block_plan is not None,
        )
        shape = f"{r.batch}x{r.heads_q}/{r.heads_kv}x{r.len_q}x{r.len_k}x{r.dim_qk}/{r.dim_v}"
        return cls(kind, max(r.visible_macs, 1).bit_length(), shape)


@cache
def _kind(
    dtype: str,
    decode: bool,
    causal: Causal,
    mask: MaskKind,
    window: bool,
    softcap: bool,
    lse: bool,
    grads: bool,
    packed: bool,
    paged: bool,
    cache_dtype: str | None,
    blocks: bool,
) -> str:
    flags = {
        "decode": decode,
        causal.value[:3]: causal is not Causal.NONE,
        mask.value: mask is not MaskKind.NONE,
        "window": window,
        "softcap": softcap,
        "lse": lse,
        "grads": grads,
        "packed": packed,
        "paged": paged,
        cache_dtype or "": cache_dtype,
        "blocks": blocks,
    }
    return " ".join([dtype, *(name for name, is_set in flags.items() if is_set)])


class Believed(NamedTuple):
    """log(time / estimate), load apart, and its standard deviation; how many calls of this kind were seen."""

    residual: float
    spread: float
    seen: float


class Load:
    """The fast term of one device.

    Attributes:
        value: log of the factor by which the device is slower than usual. seen, missed: the router's call count when
            the device last ran, and when it last would have been the best but for its load.
        calls: that it ran. error: recent mean of |log(measured / believed)|.
    """

    __slots__ = ("_recent", "calls", "error", "missed", "seen", "value")

    def __init__(self) -> None:
        self.value, self.seen, self.missed, self.calls, self.error = 0.0, 0, -1, 0, 0.0
        self._recent: list[float] = []

    def follow(self, innovation: float) -> None:
        """Move with the median of the newest three innovations: log(measured) - log(believed), load included."""
        self._recent = [*self._recent[-2:], innovation]
        ordered = sorted(self._recent)
        middle = ordered[len(ordered) // 2] if len(ordered) == 3 else min(self._recent, key=abs)
        self.error += 0.1 * (abs(innovation) - self.error)
        step = LOAD_GAIN * middle if abs(middle) > 0.15 else 0.1 * middle
        if self.value > NOTICED_LOAD and innovation < -NOTICED_LOAD:
            step = max(innovation, -self.value)  # no call is much faster than its device by accident
        self.value = min(max(self.value + step, -3.0), 3.0)
        self._recent = [each - step for each in self._recent]

    def forget(self) -> None:
        """Nothing is known any more of how busy the device is."""
        self.value, self._recent = 0.0, []


class Estimator:
    """Residuals by arm, and loads by device.

    Attributes:
        nodes: [calls, mean of log(time / estimate) with the load taken out] by level: ("*", device), (arm,), (arm,
            kind), (arm, kind, size), (arm, kind, shape). loads: by device id. version: changes with every residual.
    """

    def __init__(self) -> None:
        self.nodes: dict[tuple[Any, ...], list[float]] = {}
        self.loads: dict[str, Load] = {}
        self.version = 0

    def load(self, device: str) -> Load:
        found = self.loads.get(device)
        if found is None:
            found = self.loads[device] = Load()
        return found

    def believe(self, arm: str, keys: Keys) -> Believed:
        """What is believed of a request on an arm, the device's load apart."""
        get, residual, unknown = self.nodes.get, 0.0, 1.0
        common = get(("*", arm.partition(" ")[0]))  # what all arms of the device share, a host's overhead say
        if common is not None:
            residual = _share(common, 0.0) * common[1]
        node = get((arm,))
        if node is None:
            return Believed(residual, PRIOR_SPREAD if common is None else 0.6 * PRIOR_SPREAD, 0.0)
        share = node[0] / (node[0] + SHRINKAGE)
        residual, unknown = residual + share * (node[1] - residual), 1.0 - share
        spread, seen = 0.5 * PRIOR_SPREAD * unknown, 0.0
        node = get((arm, keys.kind))
        if node is None:
            return Believed(residual, spread + 0.5 * PRIOR_SPREAD, 0.0)
        seen, share = node[0], _share(node, residual)
        residual += share * (node[1] - residual)
        spread += 0.35 * PRIOR_SPREAD * (1.0 - seen / (seen + SHRINKAGE)) + OUTLIER / max(seen, 1.0) ** 2
        near = 0.0
        for step in (-1, 1, 0):  # the next sizes tell where this one was not seen
            node = get((arm, keys.kind, keys.size + step))
            if node is not None:
                share = _share(node, residual) * (0.5 if step else 1.0)
                near = max(near, share)
                residual += share * (node[1] - residual)
        node = get((arm, keys.kind, keys.shape))
        if node is not None:
            share = _share(node, residual)
            near = max(near, share)
            residual += share * (node[1] - residual)
        return Believed(residual, spread + 0.15 * PRIOR_SPREAD * (1.0 - near) + 0.02, seen)

    def learn(
        self, arm: str, device: str, keys: Keys, ratio: float, calls: int = 1, before: Believed | None = None
    ) -> None:
        """Learn from `calls` calls whose mean log(time / estimate) was `ratio`. before: what `believe` gives now, where
        the caller knows.
        """
        load = self.load(device)
        before = before or self.believe(arm, keys)
        self.version += 1
        innovation = ratio - before.residual - load.value
        load.calls += calls
        fresh = before.seen < 3.0  # the residual is not known yet: it learns, the load waits
        if not fresh:
            load.follow(innovation)
        elif load.value:
            load.follow(0.25 * innovation)
        trust = 1.0 if fresh else math.exp(-abs(load.value) / NOTICED_LOAD)
        limit = 3.0 if fresh else 0.5  # an outlier of a known arm moves little
        seen = before.residual + min(max(ratio - load.value - before.residual, -limit), limit)
        if len(self.nodes) > _MOST_NODES:
            self._shrink()
        for key in (("*", device), (arm,), (arm, keys.kind), (arm, keys.kind, keys.size), (arm, keys.kind, keys.shape)):
            node = self.nodes.setdefault(key, [0.0, 0.0])
            weight = min(calls * trust, MEMORY)
            node[0] = min(node[0] + weight, MEMORY)
            if weight:
                node[1] += (seen - node[1]) * weight / node[0]

    def _shrink(self) -> None:
        """Drop the shapes that were seen least."""
        leaves = sorted((key for key in self.nodes if len(key) == 3), key=lambda key: self.nodes[key][0])
        for key in leaves[: len(leaves) // 2]:
            del self.nodes[key]

    def forget(self, devices: Iterable[str]) -> None:
        """Drop what was learned of some devices, for example after another driver was installed."""
        gone = set(devices)
        self.nodes = {key: node for key, node in self.nodes.items() if _device_of(key) not in gone}
        for device in gone:
            self.loads.pop(device, None)

    def to_lists(self) -> list[Any]:
        """Plain data for JSON; loads are of the moment and not kept."""
        return [[*key, round(n, 2), round(mean, 4)] for key, (n, mean) in self.nodes.items()]

    def read(self, rows: Any) -> None:
        """Take `to_lists`' data. Raises ValueError where it is none."""
        nodes = dict[tuple[Any, ...], list[float]]()
        for row in rows if isinstance(rows, list) else [None]:
            if not (isinstance(row, list) and 3 <= len(row) <= 5 and all(isinstance(x, str) for x in row[:-2][:2])):
                raise ValueError(f"{row!r} is no belief")
            *key, n, mean = row
            if not all(type(x) in (int, float) and math.isfinite(x) for x in (n, mean)) or not 0 <= n <= MEMORY:
                raise ValueError(f"{row!r} is no belief")
            if any(type(x) not in (str, int) for x in key):
                raise ValueError(f"{row!r} is no belief")
            nodes[tuple(key)] = [float(n), float(mean)]
        self.nodes = nodes


def _device_of(key: tuple[Any, ...]) -> str:
    return str(key[1] if key[0] == "*" else key[0]).partition(" ")[0]


def _share(node: list[float], above: float) -> float:
    """How much a level says beside the one above it: little where it has seen few calls, and less where those few are
    far off, as outliers are.
    """
    calls, off = node[0], node[1] - above
    return calls / (calls + SHRINKAGE + 4.0 * off * off / calls) if calls else 0.0
