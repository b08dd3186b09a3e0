"""Energy of rows that nothing meters, at a power that the user assumes: a yardstick on request, marked as assumed."""

from __future__ import annotations

import attrs

from hal_core import Basis, Fidelity, Provenance

from .result import Comparison, Costs, Figure, Row


def with_assumed_power(comparison: Comparison, watts: float) -> Comparison:
    """The comparison with energy = watts x time of the row's part, for torch's attention and devices of real hardware
    on this host that state no energy. Emulated devices are left out: their time is not that of the device.

    Args:
        watts: the power that the host is taken to draw meanwhile.

    Returns:
        A copy. Its new figures are declared, assumed, and name the watts as their source.
    """
    rows = tuple(_row(row, watts) if _lacks_meter(row) else row for row in comparison.rows)
    return attrs.evolve(comparison, rows=rows, assumed_power=watts)


def _lacks_meter(row: Row) -> bool:
    hardware = row.baseline or (row.device is not None and row.device.fidelity == Fidelity.HARDWARE)
    return row.costs is not None and row.costs.energy is None and hardware and row.place == "cpu"


def _row(row: Row, watts: float) -> Row:
    assert row.costs is not None
    groups = {name: _costs(costs, watts) for name, costs in row.groups.items()}
    return attrs.evolve(row, costs=_costs(row.costs, watts), groups=groups)


def _costs(costs: Costs, watts: float) -> Costs:
    time = costs.on_device
    energy = Figure(
        watts * time.middle,
        watts * time.low,
        watts * time.high,
        Basis.DECLARED,
        Provenance.ASSUMED,
        f"{watts:g} W assumed, times the time of its part",
    )
    return attrs.evolve(costs, energy=energy)
