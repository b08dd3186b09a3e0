"""Energy as counted actions times a table, by memory level, with static energy as a part of its own. No table is
calibrated, which every result states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from hal_core.plugin_api import Provenance

from ..profiles.profile import Profile
from .stats import LEVELS, MOVERS, ExecutionStats

#: No source of the tables names a process node.
NODE = "not stated by the source"


@attrs.frozen(kw_only=True)
class Energy:
    """Joules of one execution.

    Attributes:
        levels: reading and writing, by memory level ("dram", "l3", "l2", "l1"). movers: through what moves bytes
            ("dma", "mover", "streamer"). compute: multiply-accumulates ("mac_fp32" ...) and the vector unit.
        static: power that is drawn whether or not it works, times the time.
        table: where the figures are from. node: process node. provenance: the worst of them. calibrated: always False.
    """

    levels: Mapping[str, float]
    movers: Mapping[str, float]
    compute: Mapping[str, float]
    static: float
    table: str
    provenance: Provenance
    node: str = NODE
    calibrated: bool = False

    @property
    def dynamic(self) -> float:
        return sum(sum(part.values()) for part in (self.levels, self.movers, self.compute))

    @property
    def total(self) -> float:
        return self.dynamic + self.static

    def parts(self) -> dict[str, float]:
        """Everything by name, static last; adds up to `total`."""
        return {**self.levels, **self.movers, **self.compute, "static": self.static}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, joules."""
        return {
            **attrs.asdict(self),
            "provenance": str(self.provenance),
            "dynamic": self.dynamic,
            "total": self.total,
            "unit": "J",
        }


def energy(stats: ExecutionStats, profile: Profile) -> Energy:
    """What an execution draws on the machine it ran on.

    Args:
        stats: its counters. profile: of the machine; its [energy] is in pJ a byte, pJ a multiply-accumulate and pJ an
            operation of the vector unit on one element.
    """
    moved = {key: stats.traffic[key] * profile[f"energy.{key}"] * 1e-12 for key in (*LEVELS, *MOVERS)}
    compute: dict[str, float] = {}
    for dtype, macs in stats.macs_by_dtype.items():
        kind = mac_of(dtype)
        compute[kind] = compute.get(kind, 0.0) + macs * profile[f"energy.{kind}"] * 1e-12
    compute["vector"] = stats.vector_operations * profile["energy.vector"] * 1e-12
    table = profile.figures["energy.dram"]
    return Energy(
        levels={key: moved[key] for key in LEVELS},
        movers={key: moved[key] for key in MOVERS},
        compute=compute,
        static=profile["power.static"] * stats.seconds,
        table=f"{profile.name}: {table.source}",
        provenance=profile.provenance("energy", "power.static"),
    )


def mac_of(dtype: str) -> str:
    """The table's entry for a multiply-accumulate of operands of a dtype."""
    if dtype.startswith(("int", "uint", "bool")):
        return "mac_int8"
    return "mac_bf16" if dtype in ("bfloat16", "float16") else "mac_fp32"
