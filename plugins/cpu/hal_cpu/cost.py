"""What a request costs on this processor: from measurements where there are any, else from assumed rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import attrs

from hal_core.plugin_api import AttentionRequest, Basis, Estimate, Provenance, Quantity

from .discovery import Machine, this_machine
from .kernels.footprint import peak_memory
from .paths import Gains, considered, path_of

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# Assumed until calibrated. Each is a plain guess for a server core of these years, and the interval is wide for that.
_ASSUMED_BANDWIDTH = 6e9  # bytes per second and core
_ASSUMED_PEAK_SHARE = 0.4  # of two fused multiply-adds in every cycle
_ASSUMED_CALL = 15e-6  # seconds of host time
_ASSUMED_SPREAD = 4.0  # the truth lies within this factor, both ways


@attrs.frozen(kw_only=True)
class Rates:
    """What estimates are made from.

    Attributes:
        bandwidth: bytes read per second.
        rates: multiply-accumulates per second, by "<path> <dtype>".
        calls: seconds of host time of one call, by path.
        gains: of compiled kernels over torch's, see `paths.Gains`; None where they were not measured.
        spread: the factor within which estimates are expected to hold, both ways.
        basis, provenance, source: as in `Quantity`.
    """

    bandwidth: float
    rates: Mapping[str, float]
    calls: Mapping[str, float]
    spread: float
    basis: Basis
    provenance: Provenance
    source: str
    gains: Gains | None = None

    @classmethod
    def assumed(cls, machine: Machine) -> Rates:
        """From cores, frequency and vector width."""
        lanes = machine.simd_bytes // 4
        peak = machine.cores * machine.frequency * 2 * lanes * _ASSUMED_PEAK_SHARE
        tiled = peak * 0.7
        rates = {
            f"{path} {dtype}": rate * (0.5 if dtype == "float64" else 1.0)
            for path, rate in (
                ("native", peak),
                ("packed", peak),
                ("fused", peak),
                ("decode", tiled),
                ("blocks", tiled),
                ("tiled", tiled),
                ("compiled", peak),
                ("streamed", tiled),
            )
            for dtype in _BYTES
        }
        counts = {
            "native": 1,
            "packed": 1,
            "fused": 2,
            "decode": 10,
            "blocks": 20,
            "tiled": 10,
            "compiled": 2,
            "streamed": 2,
        }
        calls = {path: count * _ASSUMED_CALL for path, count in counts.items()}
        return cls(
            bandwidth=_ASSUMED_BANDWIDTH * machine.cores,
            rates=rates,
            calls=calls,
            spread=_ASSUMED_SPREAD,
            basis=Basis.MODELLED,
            provenance=Provenance.ASSUMED,
            source="cores, frequency and vector width; `hal calibrate` measures instead",
        )

    @classmethod
    def measured(cls, values: Mapping[str, Any], machine: Machine) -> Rates:
        """From what `calibrate` returned; what it did not measure keeps its assumed value.

        Raises:
            ValueError: the values are not those of a calibration.
        """
        check_values(values)
        assumed = cls.assumed(machine)
        return cls(
            bandwidth=values["bandwidth"],
            rates={**assumed.rates, **values["rates"]},
            calls={**assumed.calls, **values["calls"]},
            spread=values["spread"],
            basis=Basis.MEASURED,
            provenance=Provenance.MEASURED_SILICON,
            source="hal calibrate",
            gains=values.get("gains"),
        )


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for stored values that estimates cannot be made from: absent, no numbers, or not above 0."""
    for name in ("bandwidth", "spread"):
        _check_positive(name, values.get(name))
    if values["spread"] < 1:
        raise ValueError(f"spread is {values['spread']!r}: a factor of at least 1 is wanted")
    for name in ("rates", "calls"):
        table = values.get(name)
        if not isinstance(table, Mapping):
            raise ValueError(f"{name} is {table!r}: a table of numbers is wanted")
        for key, value in table.items():
            _check_positive(f"{name}.{key}", value)
    gains = values.get("gains", {})  # absent where hal-cpu-native was
    if not isinstance(gains, Mapping):
        raise ValueError(f"gains is {gains!r}: a table of measured pairs is wanted")
    for key, pairs in gains.items():
        for pair in pairs if isinstance(pairs, Sequence) else [None]:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"gains.{key} is {pairs!r}: pairs of work and gain are wanted")
            for number in pair:
                _check_positive(f"gains.{key}", number)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        raise ValueError(f"{name} is {value!r}: a positive number is wanted")


def estimate(request: AttentionRequest, rates: Rates, threads: int) -> Estimate:
    """Time of the forward pass, and memory at its peak (of forward and backward, where gradients are asked for)."""
    sequences = request.batch if request.packed or request.page_size is not None else 1
    one = replace(request, packed=False, batch=1) if request.packed else request
    path = path_of(one)
    compute = request.visible_macs / rates.rates[f"{path} {request.dtype}"]
    reading = request.bytes_moved / rates.bandwidth
    host = rates.calls[path] * sequences
    seconds = max(compute, reading) + host
    time = Quantity(
        seconds / rates.spread,
        seconds * rates.spread,
        rates.basis,
        rates.provenance,
        f"{rates.source}; {considered(one)}",
    )
    middle = time.middle / seconds if seconds else 1.0
    parts = {"host": host, "compute": max(compute - reading, 0.0), "memory": reading}
    parts = {name: part * middle for name, part in parts.items()}
    return Estimate(time=time, memory=peak_memory(request, threads, this_machine().multiplies_bfloat16), parts=parts)
