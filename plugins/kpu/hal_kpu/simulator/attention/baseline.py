"""Attention fused on the chip against its baseline: three operations, with scores and weights written to DRAM and read
back.
"""

from __future__ import annotations

from typing import Any

import attrs

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest

from ...profiles.profile import Profile
from ...tiling import softmax_passes
from ..cycle_accurate import run_cycle_accurate
from ..energy import energy
from ..movement import Program
from ..opcodes.work import Work
from ..products.lowering import lower
from ..stats import ExecutionStats, Run, new_stats
from ..transactional import run_transactional
from .program import fused


@attrs.frozen(kw_only=True)
class Comparison:
    """The counters of both, on one machine.

    Attributes:
        request: the call. fused: one program. unfused: QK^T, softmax and PV one after the other; all pairs are
            computed, also those that causal or window hide.
    """

    request: AttentionRequest
    profile: Profile
    fused: ExecutionStats
    unfused: ExecutionStats

    @property
    def speedup(self) -> float:
        """Cycles of the baseline over those of the fused program."""
        return self.unfused.cycles / self.fused.cycles if self.fused.cycles else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        both = {"fused": self.fused, "unfused": self.unfused}
        return {
            "request": self.request.to_dict(),
            "profile": self.profile.name,
            "fidelity": "simulated",
            "basis": "modelled",
            "provenance": str(self.profile.provenance()),
            "speedup": self.speedup,
            **{name: _plain(stats, self.profile) for name, stats in both.items()},
        }


def _plain(stats: ExecutionStats, profile: Profile) -> dict[str, Any]:
    return {
        "cycles": stats.cycles,
        "seconds": stats.seconds,
        "macs": stats.total_macs,
        "external_bytes": stats.external_bytes,
        "utilization": stats.utilization,
        "energy": energy(stats, profile).to_dict(),
        "execution_backend": stats.execution_backend,
    }


def compare(profile: Profile, request: AttentionRequest, fidelity: str = "transactional") -> Comparison:
    """Simulate a call both ways. fidelity: "transactional" or "cycle_accurate"."""
    together = new_stats(profile, fidelity)
    together.add(run(fused(profile, request), profile, fidelity), "attention")
    return Comparison(request=request, profile=profile, fused=together, unfused=unfused(profile, request, fidelity))


def run(program: Program, profile: Profile, fidelity: str) -> Run:
    """A program on the simulator of a fidelity."""
    return (run_cycle_accurate if fidelity == "cycle_accurate" else run_transactional)(program, profile)


def unfused(profile: Profile, request: AttentionRequest, fidelity: str = "transactional") -> ExecutionStats:
    """`works`, one after the other."""
    stats = new_stats(profile, fidelity)
    for label, work in works(request):
        program = lower(work, profile)
        stats.add(None if program is None else run(program, profile, fidelity), label)
    return stats


def works(request: AttentionRequest) -> tuple[tuple[str, Work], ...]:
    """QK^T, softmax and PV as operations of their own, each from DRAM to DRAM, scores and weights in the request's
    dtype.

    Scale, mask and cap are part of the softmax's pass over the scores, as they are in the fused program.
    """
    r, size, heads = request, DTYPE_BYTES[request.dtype], request.batch * request.heads_q
    pairs = heads * r.len_q * r.len_k
    query, key, value = heads * r.len_q * r.dim_qk, heads * r.len_k * r.dim_qk, heads * r.len_k * r.dim_v
    softmax = Work(
        engine="vector",
        elements=pairs,
        passes=softmax_passes(r),
        reads_bytes=pairs * size,
        writes_bytes=pairs * size,
        dtype=r.dtype,
    )
    return (
        ("QK^T", _product(r, r.len_k, r.dim_qk, (query + key) * size, pairs * size)),
        ("softmax", softmax),
        ("PV", _product(r, r.dim_v, r.len_k, (pairs + value) * size, heads * r.len_q * r.dim_v * size)),
    )


def _product(r: AttentionRequest, outputs: int, length: int, reads: int, writes: int) -> Work:
    """A product of every head: [len_q, length] @ [length, outputs]."""
    return Work(
        engine="array",
        batch=r.batch * r.heads_q,
        M=r.len_q,
        N=outputs,
        K=length,
        reads_bytes=reads,
        writes_bytes=writes,
        dtype=r.dtype,
    )
