"""What products cost on a dynamically operated design: both operands are modulated anew at every beat.

A core multiplies [rows, K] by [K, columns] in one beat: `dot.rows` by `array.inputs` by `array.outputs`. Light of the
first operand is shared along the columns of a core, that of the second along its rows and among `dot.groups` groups of
cores. Detectors sum over a beat; charge is summed over `dot.beats_summed` beats and over the cores of a group before
one readout. Operands come from a global buffer through local buffers and registers; only weights come from DRAM, while
the optics work.

    T = max(beats / clock, weights / DRAM bandwidth)        E = sum over parts of events times energy

Source: architecture, device library and buffers of Zhu et al. 2024, Lightening-Transformer (HPCA), arXiv:2305.19533.
The counting of events is this project's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from hal_simulation import ProductSize

from ..profiles.profile import Profile

#: Parts of the energy of a dynamically operated design, in the order of a table.
PARTS = (
    "laser",
    "DAC",
    "modulators",
    "detectors",
    "amplifiers",
    "ADC",
    "adders",
    "registers",
    "network",
    "local buffers",
    "global buffer",
    "DRAM",
)


class Dynamic(NamedTuple):
    """Seconds of the optics, seconds for which DRAM makes them wait, and joules by part (`PARTS`)."""

    optics: float
    waiting: float
    joules: dict[str, float]

    def plus(self, other: Dynamic) -> Dynamic:
        """The sum: one after the other."""
        joules = {part: self.joules[part] + other.joules[part] for part in PARTS}
        return Dynamic(self.optics + other.optics, self.waiting + other.waiting, joules)


def dynamic_cost(profile: Profile, size: ProductSize, *, weights: bool) -> Dynamic:
    """What one product costs.

    Args:
        size: `outputs` lie along the columns of a core, `rows` along its rows. weights: whether the second operand is
            weights, which come from DRAM.
    """
    p, h = profile, size.batch
    columns, rows = math.ceil(size.outputs / p.count("array.outputs")), math.ceil(size.rows / p.count("dot.rows"))
    deep, groups = math.ceil(size.length / p.count("array.inputs")), p.count("dot.groups")
    cores = p.count("array.cores")
    core_beats = h * columns * rows * deep
    # An element of either operand is modulated once for each block of the other's that it meets.
    weight_symbols = h * size.outputs * size.length * rows
    input_symbols = h * size.rows * size.length * columns / groups
    symbols = weight_symbols + input_symbols
    in_group = cores // groups
    summed = min(p.count("dot.beats_summed"), math.ceil(deep / in_group))
    readouts = h * size.outputs * size.rows * math.ceil(math.ceil(deep / summed) / in_group)
    results = h * size.outputs * size.rows
    held = p.count("array.outputs") * size.length * p.count("converters.weight_bits") / 8
    partial = 2 * math.ceil(held / p["dot.local_bytes"]) - 1  # results are read and written again for each refill
    byte = p.count("converters.input_bits") / 8
    operands = h * size.outputs * size.length
    loaded = operands + input_symbols
    from_dram = operands * byte if weights else 0.0
    beats = math.ceil(core_beats / cores) / p["time.clock"]
    joules = {
        "laser": core_beats * p["dot.laser_energy"],
        "DAC": symbols * p["dot.dac_energy"],
        "modulators": symbols * p["dot.modulator_energy"],
        "detectors": results * deep * p["dot.detector_energy"],
        "amplifiers": readouts * p["dot.amplifier_energy"],
        "ADC": readouts * p["dot.adc_energy"],
        "adders": readouts * p["dot.adder_energy"],
        "registers": 2 * (symbols + readouts) * byte * p["dot.register_energy"],
        "network": readouts * byte * p["dot.network_energy"],
        "local buffers": (symbols + loaded + results * partial) * byte * p["dot.local_energy"],
        "global buffer": ((results * partial + loaded) * byte + from_dram) * p["dot.global_energy"],
        "DRAM": from_dram * p["dot.dram_energy"],
    }
    return Dynamic(beats, max(from_dram / p["dot.dram_bandwidth"] - beats, 0.0), joules)
