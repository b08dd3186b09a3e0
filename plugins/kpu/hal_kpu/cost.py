"""What attention and products cost on a machine: cycles of the tile-level simulator, energy of its counters.

The simulator runs a movement program whose tiles are those of the values (`attention_program`, `lowering`). What lies
outside the chip (the host, a driver, the way to the KPU's DRAM) is not modelled and not counted; nor are gradients, nor
the bytes of a mask, whose shape a request does not say.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import attrs

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Basis, Estimate, Provenance, Quantity

from .profiles.profile import Profile
from .simulator.attention.program import fused
from .simulator.energy import Energy, energy
from .simulator.opcodes.work import Work
from .simulator.products.lowering import lower
from .simulator.stats import ExecutionStats, new_stats
from .simulator.transactional import run_transactional
from .tiling import Blocks

#: How far a modelled figure may be off, by the worst origin of what it is made of: half the interval over its middle.
SPREAD = {
    Provenance.MEASURED_SILICON: 0.1,
    Provenance.VENDOR_PUBLISHED: 0.25,
    Provenance.PAPER_PROJECTION: 0.25,
    Provenance.ASSUMED: 0.5,
}
#: What an estimate simulates at most: tiles of scores (the root of their number in a head), and heads for each array. A
#: larger call takes its time from one of this size, by the pairs that both compute.
LONGEST, ROUNDS = 96, 2


@attrs.frozen(kw_only=True)
class Cost:
    """What work costs.

    Attributes:
        stats: counters of the simulated run. energy: joules of it. scale: what both are multiplied by to reach the work
            (1 where all of it was simulated). profile: the machine.
    """

    stats: ExecutionStats = attrs.field(eq=False)
    energy: Energy
    profile: Profile
    scale: float = 1.0

    @property
    def cycles(self) -> int:
        return round(self.stats.cycles * self.scale)

    @property
    def seconds(self) -> float:
        return self.stats.seconds * self.scale

    def estimate(self, memory: int = 0) -> Estimate:
        """Intervals around the modelled values, as wide as the worst origin of the figures makes them."""
        time = self.profile.provenance("array", "clock", "dram", "buffers", "engines")
        busy = {"array": self.stats.busy_cycles / self.profile["clock.frequency"] * self.scale}
        source = f"profile {self.profile.name}, tile-level simulation"
        return Estimate(
            time=_quantity(self.seconds, time, source),
            energy=_quantity(
                self.energy.total * self.scale, self.energy.provenance, f"{source}, energies not calibrated"
            ),
            memory=memory,
            parts=busy | {"waiting for tiles": self.seconds - busy["array"]},
        )


def _quantity(middle: float, provenance: Provenance, source: str) -> Quantity:
    spread = SPREAD[provenance]
    return Quantity(middle * (1 - spread), middle * (1 + spread), Basis.MODELLED, provenance, source)


def attention_cost(profile: Profile, request: AttentionRequest) -> Cost:
    """Of one fused attention call, forward. Cheap: one simulation for all requests that are cut into equal tiles."""
    work = tiled(profile, request)
    short = _shortened(profile, work)
    found = _attention_cost(profile, short)
    if short is work or not short.visible_macs:
        return found
    return attrs.evolve(found, scale=work.visible_macs / short.visible_macs)


@lru_cache(maxsize=4096)
def _attention_cost(profile: Profile, request: AttentionRequest) -> Cost:
    stats = new_stats(profile)
    stats.add(run_transactional(fused(profile, request), profile))
    return Cost(stats=_slim(stats), energy=energy(stats, profile), profile=profile)


def _slim(stats: ExecutionStats) -> ExecutionStats:
    """Without its timelines, which a cache has no room for."""
    stats.parts.clear()
    return stats


def product_cost(profile: Profile, batch: int, rows: int, outputs: int, length: int, dtype: str) -> Cost:
    """Of `batch` products [rows, length] @ [length, outputs], from DRAM to DRAM; rows are filled up to whole tiles."""
    tile = profile.arrays(dtype)[0]
    return _product_cost(profile, batch, -(-rows // tile) * tile, outputs, length, dtype)


@lru_cache(maxsize=4096)
def _product_cost(profile: Profile, batch: int, rows: int, outputs: int, length: int, dtype: str) -> Cost:
    size, stats = DTYPE_BYTES[dtype], new_stats(profile)
    work = Work(
        engine="array",
        batch=batch,
        M=rows,
        N=outputs,
        K=length,
        reads_bytes=batch * (rows + outputs) * length * size,
        writes_bytes=batch * rows * outputs * size,
        dtype=dtype,
    )
    program = lower(work, profile)
    stats.add(None if program is None else run_transactional(program, profile))
    return Cost(stats=_slim(stats), energy=energy(stats, profile), profile=profile)


def tiled(profile: Profile, request: AttentionRequest) -> AttentionRequest:
    """The request with lengths filled up to whole tiles, and without what does not change its cost."""
    r, blocks = request, Blocks.of(profile, request.dtype)
    return replace(
        r,
        len_q=-(-r.len_q // blocks.rows) * blocks.rows,
        len_k=-(-r.len_k // blocks.keys) * blocks.keys,
        scale=None,
        softcap=None if r.softcap is None else 1.0,
        grads=frozenset(),
        lse=False,
        grad_lse=False,
        device="cpu",
        last_dim_contiguous=True,
        deterministic=False,
        max_error=None,
    )


def _shortened(profile: Profile, request: AttentionRequest) -> AttentionRequest:
    """The request itself, or one of the same proportions with at most `LONGEST` squared tiles of scores, and fewer
    heads.
    """
    r, blocks = request, Blocks.of(profile, request.dtype)
    heads, share = r.batch * r.heads_kv, r.heads_q // max(r.heads_kv, 1)
    if heads * share > ROUNDS * blocks.arrays:
        heads = max(ROUNDS * blocks.arrays // share, 1)
        r = replace(r, batch=1, heads_q=heads * share, heads_kv=heads)
    tiles = r.len_q // blocks.rows * (r.len_k // blocks.keys)
    if tiles > LONGEST**2:
        part = LONGEST / tiles**0.5
        len_q = max(round(r.len_q * part / blocks.rows), 1) * blocks.rows
        len_k = max(round(r.len_k * part / blocks.keys), 1) * blocks.keys
        r = replace(r, len_q=len_q, len_k=len_k)
    return r
