"""The power of a photonic accelerator from its components, for designs that state those and no measured total.

A capacitive DAC goes with 2^b / b and its rate, a successive-approximation ADC with b and its rate, the laser with the
loss of the longest path, the detector's sensitivity and 2^b.

Source: Zhu et al. 2024, Lightening-Transformer (HPCA), whose base design is `LIGHTENING_BASE`.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Components(NamedTuple):
    """A dot-product design. Powers in W, rates in Hz, losses in dB.

    Attributes:
        tiles, cores: cores in a tile. height, width, wavelengths: of a core. clock: Hz.
        dac_power at dac_bits and dac_rate; adc_power at adc_bits and adc_rate.
        modulator_energy: J a symbol. router_power: of one ring router; an input has two.
        detector_power: of one, a readout has two. amplifier_power: of one readout. sensitivity: dBm.
        modulator_loss, router_loss, splitter_loss, shifter_loss, coupler_loss: dB. wall_plug: efficiency of the laser.
        adder_power: of one readout. memory_power: of the whole.
    """

    tiles: int
    cores: int
    height: int
    width: int
    wavelengths: int
    clock: float
    dac_power: float
    dac_bits: int
    dac_rate: float
    adc_power: float
    adc_bits: int
    adc_rate: float
    modulator_energy: float
    router_power: float
    detector_power: float
    amplifier_power: float
    sensitivity: float
    modulator_loss: float
    router_loss: float
    splitter_loss: float
    shifter_loss: float
    coupler_loss: float
    wall_plug: float
    adder_power: float
    memory_power: float


#: The base design, LT-B: figures of the paper's published device library (paper projections).
LIGHTENING_BASE = Components(
    tiles=4,
    cores=2,
    height=12,
    width=12,
    wavelengths=12,
    clock=5e9,
    dac_power=50e-3,
    dac_bits=8,
    dac_rate=14e9,
    adc_power=14.8e-3,
    adc_bits=8,
    adc_rate=10e9,
    modulator_energy=450e-15,
    router_power=0.275e-3,
    detector_power=1.1e-3,
    amplifier_power=3e-3,
    sensitivity=-25,
    modulator_loss=1.2,
    router_loss=0.93,
    splitter_loss=0.1,
    shifter_loss=0.33,
    coupler_loss=0.33,
    wall_plug=0.2,
    adder_power=0.2e-3 / 4.39,
    memory_power=316.5e-3,
)


def component_power(c: Components, bits: int) -> dict[str, float]:
    """Watts by part at a resolution. Inputs along the width are shared by all tiles, readouts by the cores of a
    tile.
    """
    inputs = c.wavelengths * c.cores * (c.height * c.tiles + c.width)
    readouts = c.tiles * c.height * c.width
    loss = c.modulator_loss + 2 * c.router_loss + c.splitter_loss * math.ceil(math.log2(max(c.height, c.width)))
    loss += c.splitter_loss + c.shifter_loss + c.coupler_loss + 10 * math.log10(c.height * c.width)
    laser = 1e-3 * 10 ** ((c.sensitivity + loss) / 10) / c.wall_plug * 2**bits
    dac = c.dac_power * (2**bits / bits) / (2**c.dac_bits / c.dac_bits) * c.clock / c.dac_rate
    adc = c.adc_power * (bits / c.adc_bits) * c.clock / c.adc_rate
    return {
        "laser": laser * c.tiles * c.cores,
        "DAC": dac * inputs,
        "ADC": adc * readouts,
        "modulators": (c.modulator_energy * c.clock + 2 * c.router_power) * inputs,
        "detectors": 2 * c.detector_power * readouts * c.cores,
        "amplifiers": c.amplifier_power * readouts,
        "digital": c.adder_power * readouts + c.memory_power,
    }
