"""The same product by two published simulators: aihwkit (IBM) and CrossSim (Sandia). Imported where they are
installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .converters import Converters


def aihwkit_configuration(c: Converters, width: int) -> Any:
    """Converters without noise, for tiles `width` deep; inputs and weights are expected in [-1, 1]."""
    from aihwkit.simulator.configs import TorchInferenceRPUConfig
    from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType

    config = TorchInferenceRPUConfig()
    forward = config.forward
    forward.inp_res, forward.inp_bound, forward.inp_noise = 1 / (2 * c.input_levels), 1.0, 0.0
    bound = c.adc_levels * c.lsb(width) / c.gain
    forward.out_res, forward.out_bound, forward.out_noise = 1 / (2 * c.adc_levels), bound, 0.0
    forward.w_noise, forward.ir_drop = 0.0, 0.0
    forward.noise_management, forward.bound_management = NoiseManagementType.NONE, BoundManagementType.NONE
    return config


def aihwkit_tile(w: Tensor, c: Converters) -> Any:
    """aihwkit's analogue product: the weights [outputs, K] are quantised already, inputs and outputs are converted."""
    from aihwkit.simulator.tiles.inference_torch import TorchInferenceTile

    tile = TorchInferenceTile(w.shape[0], w.shape[1], aihwkit_configuration(c, w.shape[1]))
    tile.set_weights(w)
    return tile


def aihwkit_codes(x: Tensor, w: Tensor, c: Converters) -> Tensor:
    """Readout codes [rows, outputs] of x [rows, K] @ w [outputs, K]^T."""
    with torch.no_grad():
        out: Tensor = aihwkit_tile(w, c).forward(x)
    return (out / (c.lsb(w.shape[1]) / c.gain)).round()


def crosssim_codes(x: Tensor, w: Tensor, c: Converters) -> Tensor:
    """Readout codes by CrossSim: balanced core, sign-magnitude inputs, symmetric quantisers."""
    import numpy as np
    from simulator import AnalogCore, CrossSimParameters
    from simulator.parameters.core_parameters import CoreStyle
    from simulator.parameters.xbar_parameters import ADCRangeLimits

    parameters = CrossSimParameters()
    parameters.core.style = CoreStyle.BALANCED
    parameters.core.rows_max, parameters.core.cols_max = w.shape[1], w.shape[0]
    parameters.core.weight_bits = c.weight_bits
    parameters.core.mapping.weights.percentile = 1.0
    parameters.core.mapping.inputs.mvm.percentile = None
    parameters.core.mapping.inputs.mvm.min, parameters.core.mapping.inputs.mvm.max = -1.0, 1.0
    parameters.core.mapping.weights.min, parameters.core.mapping.weights.max = -1.0, 1.0
    parameters.core.mapping.weights.percentile = None
    parameters.xbar.dac.mvm.model, parameters.xbar.dac.mvm.bits = "SignMagnitudeDAC", c.input_bits
    parameters.xbar.dac.mvm.signed = True
    adc = parameters.xbar.adc.mvm
    adc.model, adc.bits, adc.signed = "SignMagnitudeADC", c.adc_bits, True
    bound = c.adc_levels * c.lsb(w.shape[1]) / c.gain
    adc.adc_range_option, adc.calibrated_range = ADCRangeLimits.CALIBRATED, np.array([-bound, bound])
    core = AnalogCore(w.numpy().astype(np.float64), parameters)
    out = torch.from_numpy(np.asarray(core.matmat(x.numpy().astype(np.float64).T))).T
    return (out / (c.lsb(w.shape[1]) / c.gain)).round().float()
