"""The figures of a photonic profile: their units, their possible values, and what they mean."""

from __future__ import annotations

import math

from hal_simulation import Kind, Schema

#: How a weight is held: cells of a crossbar, two interferometer meshes, micro-rings; or not at all: a dot product
#: modulates both operands anew at every beat.
MECHANISMS = ("crossbar", "mesh", "ring", "dot")
#: The most passes of the optics that may be averaged.
MOST_PASSES = 1024

_INF = math.inf

#: Every figure by section and key. The variant of a figure is the mechanism that has it.
FIGURES: Schema = {
    "array": {
        "cores": Kind("count", 1, 1024, "tensor cores that work at once", whole=True),
        "outputs": Kind("count", 1, 4096, "rows of a weight tile: dot products at once in a core", whole=True),
        "inputs": Kind("count", 1, 4096, "columns of a weight tile: products summed as light or current", whole=True),
    },
    "converters": {
        "input_bits": Kind("bit", 2, 16, "resolution of an input, sign included", whole=True),
        "weight_bits": Kind("bit", 2, 16, "resolution of a weight, sign included", whole=True),
        "adc_bits": Kind("bit", 2, 16, "resolution of a readout, sign included", whole=True),
        "gain": Kind("ratio", 0.01, 1024, "analogue gain in front of the readout"),
        "tile_inputs": Kind(
            "count", 0, 4096, "inputs that one readout sums; 0 for all inputs of the array", whole=True, default=0.0
        ),
        "range_inputs": Kind(
            "count",
            0,
            65536,
            "products of full scale in the readout's range at gain 1, for a whole tile; 0 for as many as inputs",
            default=0.0,
        ),
        "zero_share": Kind(
            "ratio", 0, 1, "measured share of exact zeros among readouts of standard normal operands", default=0.0
        ),
    },
    "noise": {
        "readout_noise": Kind("LSB", 0, 1000, "noise of a readout, rms, everything but the parts named below"),
        "readout_noise_spread": Kind("ratio", 0, 2, "how the noise differs by column, sd over mean", default=0.0),
        "after_gain": Kind(
            "ratio", 0, 1, "share of the readout noise's power that arises behind the gain", default=0.0
        ),
        "common_noise": Kind("LSB", 0, 1000, "noise that all columns of a core share, rms", default=0.0),
        "column_gain": Kind("ratio", 0.01, 10, "mean gain of a column before calibration", default=1.0),
        "column_gain_spread": Kind("ratio", 0, 1, "standard deviation of the column gain", default=0.0),
        "column_offset": Kind("LSB", 0, 1000, "offset of a column, standard deviation", default=0.0),
        "core_offset": Kind("LSB", 0, 1000, "offset that all columns of a core share, standard deviation", default=0.0),
        "core_column_offset": Kind("LSB", 0, 1000, "offset of a column in one core, standard deviation", default=0.0),
        "weight_error": Kind("ratio", 0, 1, "static error of a weight cell over full scale, rms", default=0.0),
        "weight_error_spread": Kind("ratio", 0, 2, "how the weight error differs by column, sd over mean", default=0.0),
        "core_weight_error": Kind("ratio", 0, 1, "part of it that differs between the cores, rms", default=0.0),
        "input_bow": Kind(
            "code", 0, 1e4, "integral non-linearity of an input before it is linearised, rms", default=0.0
        ),
        "input_ripple": Kind("code", 0, 1e4, "what a 7th-order fit leaves of it, rms", default=0.0),
        "crosstalk": Kind("ratio", 0, 0.5, "share of a neighbouring input that leaks into an input", default=0.0),
    },
    "light": {
        "full_scale_current": Kind("A", 1e-9, 1, "photocurrent of a column at full scale"),
        "bandwidth": Kind("Hz", 1, 1e12, "bandwidth of the readout"),
        "load": Kind("ohm", 1e-3, 1e9, "load or feedback resistance of the readout"),
        "temperature": Kind("K", 1, 1000, "temperature of the load"),
        "rin": Kind("dB/Hz", -250, -50, "relative intensity noise of the laser"),
    },
    "drift": {
        "relaxation": Kind("s", 1e-6, _INF, "time in which a drift forgets", default=3600.0),
        "gain_drift": Kind("ratio", 0, 1, "long-time standard deviation of a column's gain", default=0.0),
        "offset_drift": Kind("LSB", 0, 1e4, "long-time standard deviation of a column's offset", default=0.0),
        "gain_temperature": Kind("1/K", -1, 1, "relative change of the gain by temperature", default=0.0),
        "offset_temperature": Kind("LSB/K", -1e4, 1e4, "change of the offset by temperature", default=0.0),
    },
    "mesh": {
        "phase_error": Kind("rad", 0, math.pi, "error of every phase after calibration, rms", variant="mesh"),
    },
    "ring": {
        "fwhm": Kind("Hz", 1e6, 1e13, "full width of a resonance at half maximum", variant="ring"),
        "shift": Kind("Hz/K", 0, 1e12, "shift of a resonance by temperature", variant="ring"),
        "temperature_error": Kind("K", 0, 100, "error of a ring's temperature, rms", variant="ring"),
        "thermal_crosstalk": Kind(
            "ratio", 0, 1, "share of a heater's shift that reaches its neighbour", variant="ring"
        ),
        "span": Kind("FWHM", 0.5, 100, "detuning at which a weight counts as fully off resonance", variant="ring"),
    },
    "dot": {
        "rows": Kind(
            "count", 1, 4096, "rows of the first operand that a core takes in a beat", whole=True, variant="dot"
        ),
        "groups": Kind(
            "count", 1, 1024, "groups of cores among which the streamed operand is broadcast", whole=True, variant="dot"
        ),
        "beats_summed": Kind("count", 1, 1024, "beats summed as charge before a readout", whole=True, variant="dot"),
        "laser_energy": Kind("J", 0, 1, "of the laser in one beat of one core", variant="dot"),
        "dac_energy": Kind("J", 0, 1, "of one input conversion", variant="dot"),
        "modulator_energy": Kind("J", 0, 1, "of one modulated symbol, its routers included", variant="dot"),
        "detector_energy": Kind("J", 0, 1, "of the two detectors of one dot product in a beat", variant="dot"),
        "amplifier_energy": Kind("J", 0, 1, "of the amplifier for one readout", variant="dot"),
        "adc_energy": Kind("J", 0, 1, "of the converter for one readout", variant="dot"),
        "adder_energy": Kind("J", 0, 1, "of the digital adder for one readout", variant="dot"),
        "register_energy": Kind("J/B", 0, 1, "of one byte through the registers", variant="dot"),
        "network_energy": Kind("J/B", 0, 1, "of one byte to the adders", variant="dot"),
        "local_energy": Kind("J/B", 0, 1, "of one byte of a local buffer", variant="dot"),
        "global_energy": Kind("J/B", 0, 1, "of one byte of the global buffer", variant="dot"),
        "dram_energy": Kind("J/B", 0, 1, "of one byte from DRAM", variant="dot"),
        "dram_bandwidth": Kind("B/s", 1, 1e15, "from DRAM", variant="dot"),
        "local_bytes": Kind("B", 1, 1e9, "size of a local buffer", variant="dot"),
    },
    "time": {
        "clock": Kind("Hz", 1, 1e13, "vectors a core takes in a second"),
        "weight_load": Kind("s", 0, 10, "loading one weight tile into every core, settling included"),
        "flight": Kind("s", 0, 1, "from an input to its readout", default=0.0),
        "host_latency": Kind("s", 0, 10, "starting one call from the host"),
        "host_bandwidth": Kind("B/s", 1, 1e14, "between the host and the device"),
        "digital_rate": Kind("1/s", 1, 1e16, "softmax elements a second in the control die"),
        "overlap": Kind("ratio", 0, 1, "share of weight loading hidden behind streaming (double buffer)", default=0.0),
    },
    "power": {
        "electrical": Kind("W", 0, 1e5, "at full load, without laser and host"),
        "laser": Kind("W", 0, 1e5, "optical power, as supplied"),
        "laser_efficiency": Kind("ratio", 1e-4, 1, "optical over electrical power of the laser", default=1.0),
        "host": Kind("W", 0, 1e5, "of the host while it feeds the device"),
        "share_weights": Kind("ratio", 0, 1, "part of the electrical power in the weight cells"),
        "share_stream": Kind("ratio", 0, 1, "part in modulators and receivers"),
        "share_adc": Kind("ratio", 0, 1, "part in the readout converters"),
        "share_dac": Kind("ratio", 0, 1, "part in the input converters"),
        "share_digital": Kind("ratio", 0, 1, "part in the control dies"),
    },
    "thermal": {
        "resistance": Kind("K/W", 0, 1e4, "from the array to the ambient"),
        "time_constant": Kind("s", 1e-6, 1e6, "of the array's temperature"),
        "ambient": Kind("degC", -273, 200, "temperature around the package"),
        "heat": Kind("W", 0, 1e5, "heat at the array at full load"),
        "working": Kind("degC", -273, 300, "temperature from which it is warm enough to calibrate"),
        "derate": Kind("degC", -273, 300, "from here the duty is cut"),
        "throttle": Kind("degC", -273, 300, "from here work is sent elsewhere"),
        "trip": Kind("degC", -273, 300, "from here the laser is switched off, latched"),
        "hysteresis": Kind("K", 0, 100, "how far below a limit its state is left again"),
        "derated_duty": Kind("ratio", 0.01, 1, "share of the time it works while derated"),
        "sensor_timeout": Kind("s", 1e-6, 1e6, "a reading older than this counts as a failed sensor"),
    },
    "declared": {
        "attention_error": Kind(
            "ratio", 0, 100, "||x - reference|| / ||reference|| of attention, normal inputs", default=1.0
        ),
        "lse_error": Kind("ratio", 0, 100, "the same of the log-sum-exp", default=0.6),
    },
    "calibration": {
        "max_age": Kind("s", 1, 1e9, "recalibrate after this time"),
        "max_temperature_change": Kind("K", 0.001, 1000, "recalibrate after this change"),
        "pilot_drop": Kind("dB", 0.1, 60, "recalibrate when the pilot signal-to-noise falls by this"),
        "clip_limit": Kind("ratio", 0, 1, "recalibrate when more readouts than this clip"),
        "snr_floor": Kind("dB", -20, 120, "below this after calibration it does not serve"),
        "faults_tolerated": Kind("count", 0, 1e6, "dead channels and stuck cells it still serves with", whole=True),
        "duration": Kind("s", 0, 1e5, "of one calibration on the device"),
    },
}
