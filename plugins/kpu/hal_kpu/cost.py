"""What attention and products cost on a machine: cycles of the simulator, energy of its counters, bytes on the host.

The simulator runs a movement program whose tiles are those of the values. What lies outside the chip (the host, a
driver, the transfer to the KPU's DRAM) is neither modelled nor counted; nor are gradients, nor the bytes of a mask.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import attrs
from hal_simulation import modelled

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Estimate, pooled_size

from .profiles.profile import Profile
from .simulator.attention.baseline import run
from .simulator.attention.block_plans import Reads, fullest, planned_rounds, sampled, table_bytes
from .simulator.attention.program import fused
from .simulator.attention.workspace import backward_bytes, workspace_size
from .simulator.energy import Energy, energy
from .simulator.opcodes.work import Work
from .simulator.products.lowering import lower
from .simulator.stats import ExecutionStats, new_stats
from .simulator.transactional import run_transactional
from .tiling import Round, filled_up, machine_of, shortened, steps_of, without_values

#: What an estimate simulates at fidelity "cycle_accurate", which steps every DRAM page; see `tiling.LONGEST`.
LONGEST_EXACT = 24
_SIMULATION = {"behavioral": "no", "transactional": "tile-level", "cycle_accurate": "cycle-accurate"}


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
        source = (
            f"profile {self.profile.name}, {_SIMULATION[self.stats.execution_backend.partition(' ')[0]]} simulation"
        )
        return Estimate(
            time=modelled(self.seconds, time, source),
            energy=modelled(
                self.energy.total * self.scale, self.energy.provenance, f"{source}, energies not calibrated"
            ),
            memory=memory,
            parts=busy | {"waiting for tiles": self.seconds - busy["array"]},
        )


def attention_cost(profile: Profile, request: AttentionRequest, reads: Reads | None = None) -> Cost:
    """The cost of one fused attention call, forward, on the machine that the request's options describe.

    Cheap: one simulation serves all requests that are cut into equal tiles.

    Args:
        reads: the key blocks that a request with a block plan reads; None: as many as its plan may list.
    """
    machine, fidelity = machine_of(profile, request), fidelity_of(request)
    if request.block_plan is not None:
        rounds, scale = sampled(planned_rounds(machine, request, fullest(request) if reads is None else reads))
        return attrs.evolve(_planned_cost(machine, _timed(request), rounds, fidelity), scale=scale)
    work = filled_up(machine, request)
    short = shortened(machine, work, None if fidelity == "transactional" else LONGEST_EXACT)
    found = _attention_cost(machine, short, fidelity)
    if short is work or not short.visible_macs:
        return found
    return attrs.evolve(found, scale=work.visible_macs / short.visible_macs)


def fidelity_of(request: AttentionRequest) -> str:
    """The simulator that a request's options ask for."""
    return str(dict(request.options).get("fidelity", "transactional"))


@lru_cache(maxsize=4096)
def _attention_cost(profile: Profile, request: AttentionRequest, fidelity: str) -> Cost:
    stats = new_stats(profile, fidelity)
    stats.add(run(fused(profile, request), profile, fidelity))
    return Cost(stats=_slim(stats), energy=energy(stats, profile), profile=profile)


@lru_cache(maxsize=256)
def _planned_cost(
    profile: Profile, request: AttentionRequest, rounds: tuple[tuple[Round, int], ...], fidelity: str
) -> Cost:
    stats = new_stats(profile, fidelity)
    stats.add(run(fused(profile, request, rounds), profile, fidelity))
    return Cost(stats=_slim(stats), energy=energy(stats, profile), profile=profile)


def _timed(request: AttentionRequest) -> AttentionRequest:
    """A request with a block plan, cut by its blocks, and without what does not change its time."""
    assert request.block_plan is not None
    tiling = ("", *request.block_plan[:2])
    return replace(without_values(request), tiling=tiling, block_plan=None)


def attention_memory(profile: Profile, request: AttentionRequest) -> int:
    """Bytes that a call allocates on the host at its peak: output, log-sum-exp and the workspace of the simulation.

    With gradients: forward and backward together; the workspace stays in the pool meanwhile.
    """
    r, block_k = request, steps_of(machine_of(profile, request), request)[1]
    rows = r.batch * r.heads_q * r.len_q
    forward = rows * (r.dim_v * DTYPE_BYTES[r.dtype] + 4) + pooled_size(4 * workspace_size(r, block_k))
    forward += table_bytes(r)
    return forward + (backward_bytes(r, block_k) if r.grads else 0)


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
