"""What an execution did, for people: counters, a roofline for each memory level, energy by level. Table, JSON, PNG.

Every report says that it is simulated, which profile and table it is from, and that the energies are not calibrated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from hal_core.plugin_api import HalError, Table

from ..profiles.profile import Profile
from .energy import Energy, energy
from .movement import Opcode, Program
from .stats import LEVELS, ExecutionStats

_COUNTERS = (
    "cycles",
    "compute_cycles",
    "memory_cycles",
    "drain_cycles",
    "busy_cycles",
    "stall_cycles",
    "idle_cycles",
    "ops_executed",
    "total_macs",
    "vector_operations",
    "external_bytes",
    "memory_bytes",
    "page_hits",
    "page_misses",
    "seconds",
    "gflops",
    "utilization",
    "efficiency",
    "memory_bandwidth_gbps",
)
#: What a vector unit's lane may read and write in a cycle: two operands and a result in float32.
_VECTOR_BYTES = 12


@attrs.frozen
class Roof:
    """One memory level against the roofline model.

    Attributes:
        level: "dram", "l3", "l2" or "l1". bytes: read and written there. bandwidth: B/s that what reads and writes it
            can move together. intensity: operations a byte. achieved: operations a second. roof: the most that compute
            and this level allow at this intensity.

    Source: Williams, Waterman & Patterson 2009 (Roofline); by level: Yang, Kurth & Williams 2020.
    """

    level: str
    bytes: int
    bandwidth: float
    intensity: float
    achieved: float
    roof: float

    @property
    def share(self) -> float:
        """Achieved over roof, at most 1."""
        return self.achieved / self.roof if self.roof else 0.0


@attrs.frozen(kw_only=True)
class Report:
    """Counters, roofline and energy of one execution on one profile.

    Attributes:
        title: what ran. stats: its counters. peak: operations a second of all arrays and vector units in use.
    """

    title: str
    stats: ExecutionStats
    profile: Profile
    peak: float
    roofs: tuple[Roof, ...]
    energy: Energy

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: seconds, bytes, joules, operations a second."""
        stats = self.stats
        return {
            "title": self.title,
            "profile": stats.profile,
            "fidelity": "simulated",
            "basis": "modelled",
            "provenance": str(self.profile.provenance()),
            "execution_backend": stats.execution_backend,
            "timing_reused": stats.timing_reused,
            "clock_hz": stats.clock_hz,
            "counters": {name: getattr(stats, name) for name in _COUNTERS},
            "engines": {name: attrs.asdict(time) for name, time in sorted(stats.engines.items())},
            "traffic": dict(stats.traffic),
            "peak": self.peak,
            "roofline": [attrs.asdict(roof) | {"share": roof.share} for roof in self.roofs],
            "energy": self.energy.to_dict(),
        }

    def tables(self) -> list[Table]:
        """Counters, cycles by engine, roofline and energy, for people."""
        stats, whole = self.stats, self.energy.total
        counters = [[name, _shown(getattr(stats, name))] for name in _COUNTERS]
        engines = [
            [name, f"{t.busy:,}", f"{t.stall:,}", f"{t.idle:,}", f"{t.busy / max(stats.cycles, 1):.1%}"]
            for name, t in sorted(stats.engines.items())
        ]
        roofs = [
            [
                r.level,
                _amount(r.bytes, "B"),
                _amount(r.bandwidth, "B/s"),
                f"{r.intensity:.3g}",
                _amount(r.achieved, "op/s"),
                _amount(r.roof, "op/s"),
                f"{r.share:.1%}",
            ]
            for r in self.roofs
        ]
        parts = [
            [name, _amount(j, "J"), f"{j / whole:.1%}" if whole else ""] for name, j in self.energy.parts().items()
        ]
        notes = [
            f"Energy from counted actions x table ({self.energy.table}); process node: {self.energy.node}; "
            "calibrated: false.",
            f"Modelled from a profile whose worst figures are {self.profile.provenance()}: no KPU was measured.",
        ]
        title = f"{self.title} on {self.profile.name} (simulated, {stats.execution_backend})"
        levels = ["level", "moved", "bandwidth", "op/B", "achieved", "roof", "of the roof"]
        peak = _amount(self.peak, "op/s")
        return [
            Table(title, ["counter", "value"], counters),
            Table("Cycles by engine", ["engine", "busy", "stall", "idle", "busy share"], engines),
            Table(f"Roofline by memory level, peak {peak}", levels, roofs),
            Table("Energy by level", ["part", "energy", "share"], [*parts, ["total", _amount(whole, "J"), ""]], notes),
        ]

    def summary(self) -> str:
        """The tables as plain text."""
        return "\n\n".join(map(_text, self.tables()))

    def show(self) -> None:
        """Print the tables to standard output."""
        print(self.summary())

    def draw(self, path: str | Path) -> Path:
        """Roofline and energy as a picture. The file's ending says which kind.

        Raises:
            HalError: matplotlib is not installed. OSError, ValueError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise HalError("a picture needs matplotlib: pip install 'hal-kpu[reports]'") from None
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        self._draw_roofs(left)
        parts = self.energy.parts()
        right.barh(list(parts), [joules * 1e3 for joules in parts.values()])
        right.invert_yaxis()
        right.set(xlabel="mJ", title="energy (modelled, not calibrated)")
        figure.suptitle(f"{self.title} on {self.profile.name}, simulated ({self.stats.execution_backend})")
        figure.savefig(path)
        return Path(path)

    def _draw_roofs(self, axes: Any) -> None:
        drawn = [roof for roof in self.roofs if roof.bytes]
        places = [value for r in drawn for value in (r.intensity, self.peak / r.bandwidth)]
        low, high = min(places, default=1) / 4, max(places, default=1) * 4
        for number, r in enumerate(drawn):
            line = [min(self.peak, x * r.bandwidth) for x in (low, self.peak / r.bandwidth, high)]
            axes.plot([low, self.peak / r.bandwidth, high], line, color=f"C{number}", label=r.level)
            axes.plot(r.intensity, r.achieved, "o", color=f"C{number}")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="operations a byte",
            ylabel="operations a second",
            title="roofline by level",
        )
        axes.legend()


def report(title: str, stats: ExecutionStats, profile: Profile) -> Report:
    """A report of an execution whose runs (`stats.parts`) are kept.

    Args:
        title: what ran. stats: of a timed run on `profile`.
    """
    programs = [part.run.program for part in stats.parts if part.run is not None]
    clock, operations = profile["clock.frequency"], stats.matmul_flops + stats.vector_operations
    most = max((program.arrays for program in programs), default=1)
    peak = clock * (2 * stats.peak_macs + profile["engines.vector_lanes"] * most)
    achieved = operations / stats.seconds if stats.cycles else 0.0
    roofs = []
    for level in LEVELS:
        moved = stats.traffic[level]
        bandwidth = clock * max((level_bandwidth(program, profile)[level] for program in programs), default=1.0)
        intensity = operations / moved if moved else 0.0
        roofs.append(
            Roof(level, moved, bandwidth, intensity, achieved, min(peak, intensity * bandwidth) if moved else peak)
        )
    return Report(
        title=title, stats=stats, profile=profile, peak=peak, roofs=tuple(roofs), energy=energy(stats, profile)
    )


def level_bandwidth(program: Program, profile: Profile) -> dict[str, float]:
    """Bytes in a cycle that the engines of a program can read and write together, by memory level, all arrays in
    step.
    """
    engines = {instruction.engine for instruction, _ in program.instructions()}
    movers = sum(name.startswith("mover") for name in engines) * profile["engines.mover_bandwidth"] * program.arrays
    dram = profile.bytes_per_cycle()
    feeds = sum(_fastest(program, opcode) for opcode in (Opcode.STR_FEED_ROWS, Opcode.STR_FEED_COLS))
    vector = profile["engines.vector_lanes"] * program.arrays * _VECTOR_BYTES if "vector" in engines else 0.0
    level_2 = movers + feeds + _fastest(program, Opcode.STR_DRAIN_OUTPUT) + vector
    return {"dram": dram, "l3": dram + movers, "l2": level_2, "l1": 2 * feeds}


def _fastest(program: Program, opcode: Opcode) -> float:
    """Most bytes in a cycle of the streamer that runs an opcode."""
    rates = (i.bytes / max(i.steps, 1) for i, _ in program.instructions() if i.opcode is opcode)
    return max(rates, default=0.0)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _amount(value: float, unit: str) -> str:
    """With a prefix: 1.23 GB/s."""
    for factor, prefix in (
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "u"),
        (1e-9, "n"),
    ):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _text(table: Table) -> str:
    lines = [list(table.columns), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([table.title, *rows, *table.notes])
