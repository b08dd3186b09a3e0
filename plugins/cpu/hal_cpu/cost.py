"""What a request costs on this processor: from measurements where there are any, else from assumed rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import attrs

from hal_core.plugin_api import AttentionRequest, Basis, Estimate, MaskKind, Provenance, Quantity

from .discovery import Machine
from .kernels.workspace import backward_scratch, decode_scratch, tiled_scratch
from .paths import Path, path_of, widens
from .tiling import DecodeSizes, TileSizes

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

    @classmethod
    def assumed(cls, machine: Machine) -> Rates:
        """From cores, frequency and vector width."""
        lanes = machine.simd_bytes // 4
        peak = machine.cores * machine.frequency * 2 * lanes * _ASSUMED_PEAK_SHARE
        tiled = peak * 0.7
        rates = {
            f"{path} {dtype}": rate * (0.5 if dtype == "float64" else 1.0)
            for path, rate in (("native", peak), ("packed", peak), ("fused", peak), ("decode", tiled), ("tiled", tiled))
            for dtype in _BYTES
        }
        counts = {"native": 1, "packed": 1, "fused": 2, "decode": 10, "tiled": 10}
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
        """From what `calibrate` returned; what it did not measure keeps its assumed value."""
        assumed = cls.assumed(machine)
        return cls(
            bandwidth=values["bandwidth"],
            rates={**assumed.rates, **values["rates"]},
            calls={**assumed.calls, **values["calls"]},
            spread=values["spread"],
            basis=Basis.MEASURED,
            provenance=Provenance.MEASURED_SILICON,
            source="hal calibrate",
        )


def estimate(request: AttentionRequest, rates: Rates, threads: int) -> Estimate:
    """Time of the forward pass, and memory at its peak (of forward and backward, where gradients are asked for)."""
    sequences = request.batch if request.packed or request.page_size is not None else 1
    one = replace(request, packed=False, batch=1) if request.packed else request
    path = path_of(one)
    compute = request.visible_macs / rates.rates[f"{path} {request.dtype}"]
    reading = request.bytes_moved / rates.bandwidth
    host = rates.calls[path] * sequences
    seconds = max(compute, reading) + host
    time = Quantity(seconds / rates.spread, seconds * rates.spread, rates.basis, rates.provenance, rates.source)
    middle = time.middle / seconds
    parts = {"host": host, "compute": max(compute - reading, 0.0), "memory": reading}
    parts = {name: part * middle for name, part in parts.items()}
    return Estimate(time=time, memory=memory(request, path, threads), parts=parts)


def memory(request: AttentionRequest, path: Path, threads: int) -> int:
    """Bytes that a call allocates at its peak: results and scratch. A mask's shape is not known: one per batch
    entry.
    """
    size = _BYTES[request.dtype]
    wide = max(size, 4)
    rows = request.batch * request.heads_q * request.len_q
    keys = request.batch * request.heads_kv * request.len_k
    dims = request.dim_qk + request.dim_v
    out = rows * request.dim_v * size + rows * wide * (request.lse or path == "fused")
    exact = replace(request, packed=False, batch=1) if request.packed or request.page_size is not None else request
    if path in ("native", "packed"):
        kernel = threads * 4 * 512 * (256 + max(request.dim_qk, request.dim_v) * 2)
        copies = (
            (rows + keys) * dims * 4
            if widens(request)
            else (rows + keys) * dims * size * (not request.last_dim_contiguous or request.dim_qk != request.dim_v)
        )
        mask = request.batch * request.len_q * request.len_k * wide if request.mask is MaskKind.BOOLEAN else 0
        scratch = kernel + copies + mask
    elif path == "fused":
        scratch = threads * 4 * 512 * (256 + dims) + 3 * rows * (request.dim_v * size + wide)
        scratch += (rows + keys) * dims * size * (not request.last_dim_contiguous or request.dim_qk != request.dim_v)
    elif path == "decode":
        direct = request.dtype in ("float32", "float64") and request.cache_dtype is None and request.page_size is None
        sizes = DecodeSizes.choose(exact, direct=direct, one_batch=False)
        scratch = _reserved(sum(decode_scratch(exact, sizes, direct=direct)) * wide)
        scratch += sizes.batch * exact.heads_q * exact.len_q * exact.len_k * wide  # the weights
    else:
        tiles = TileSizes.choose(exact, threads)
        scratch = _reserved(sum(tiled_scratch(exact, tiles)) * wide)
        if request.dropout:  # which pairs are kept, as bool and as factors
            scratch += tiles.pairs * (request.heads_q // request.heads_kv) * tiles.rows * tiles.columns * (wide + 1)
        if request.grads:
            scratch += _reserved(sum(backward_scratch(exact, tiles)) * wide)
    if request.grads:
        scratch += (rows + keys) * dims * size
    return out + scratch


def _reserved(nbytes: int) -> int:
    """What the memory pool takes for a block: a power of two, above 4 MiB whole MiB."""
    return 1 << max(nbytes - 1, 0).bit_length() if nbytes <= 1 << 22 else -(-nbytes >> 20) << 20
