"""What stands between the core and a chip: the driver protocol, and the driver of a simulated chip.

A card with a public driver would bring its own `Driver`; everything above this file would stay as it is.
"""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hal_core.plugin_api import ContractError

from .blockfloat import Converters
from .imperfections import Drift, Imperfections
from .integers import integer_product
from .profile import Profile


class Telemetry(NamedTuple):
    """What the sensors say.

    Attributes:
        temperature: of the array, degC; NaN from a broken sensor. reading_age: seconds since that was measured.
        laser: optical power over nominal. clock: seconds the device has been on.
    """

    temperature: float
    reading_age: float
    laser: float
    clock: float


class Reading(NamedTuple):
    """Readouts [batch, rows, outputs], whole codes as float32, and how many of them were at the rails."""

    codes: Tensor
    clipped: int


class Driver(Protocol):
    """One chip. `read` may be called from any thread; it depends on its arguments and the chip's state alone."""

    profile: Profile

    def read(
        self, inputs: Tensor, weights: Tensor, *, noise: torch.Generator | None, averages: int = 1, ideal: bool = False
    ) -> Reading:
        """Load weight codes and stream input codes.

        Args:
            inputs: whole numbers as float32, [batch, rows, K]; row r runs on core r mod cores.
            weights: likewise, [batch, outputs, K]; output i runs on column i mod columns, in as many loads as it takes.
            noise: where readout noise is drawn from; None for the chip's own randomness (a simulated one: no noise).
            averages: readouts to average over. ideal: leave the readout's range open, for diagnosis.
        """
        ...

    def telemetry(self) -> Telemetry: ...
    def laser(self, on: bool) -> None: ...
    def close(self) -> None: ...


class Fault(enum.StrEnum):
    """What can be injected into a simulated chip."""

    NAN_SENSOR = "nan_sensor"
    STALE_SENSOR = "stale_sensor"
    DEAD_INPUT = "dead_input"  # one input gives no light
    DEAD_COLUMN = "dead_column"  # one column reads nothing
    STUCK_WEIGHT = "stuck_weight"  # one cell holds one value
    LASER_LOSS = "laser_loss"  # the laser gives a share of its power


class SimulatedDriver:
    """A chip out of its profile. Deterministic: the same profile, chip number and calls give the same codes.

    Time passes only through `advance`, so a result depends on the noise that a call is given and on nothing hidden.
    """

    def __init__(self, profile: Profile, *, linearised: bool | None = None) -> None:
        self.profile, self.chip = profile, Imperfections(profile)
        self.linearised = profile.linearised if linearised is None else linearised
        self._temperature = profile["thermal.ambient"]
        self.drift = Drift(profile, self.working_temperature)
        self._clock, self._reading_age, self._on = 0.0, 0.0, True
        self._faults: dict[Fault, tuple[int, ...] | float] = {}
        self._lock = threading.Lock()
        self._converters = Converters.of(profile)

    @property
    def working_temperature(self) -> float:
        """degC, at full load: ambient + heat * thermal resistance."""
        p = self.profile
        return p["thermal.ambient"] + p["thermal.heat"] * p["thermal.resistance"]

    # Readouts

    def read(
        self, inputs: Tensor, weights: Tensor, *, noise: torch.Generator | None, averages: int = 1, ideal: bool = False
    ) -> Reading:
        c, chip = self._converters, self.chip
        batch, rows, width = inputs.shape
        outputs = weights.shape[1]
        columns = torch.arange(outputs) % len(chip.gain)
        light = chip.bent(inputs / c.input_levels, self.linearised) * self._light()
        cells = chip.realised(weights / c.weight_levels, columns)
        light, cells = self._damaged(light, cells, columns)
        scale = c.gain / c.lsb(width)
        code = torch.matmul(
            light, (cells * (chip.gain * self.drift.gain)[columns].unsqueeze(1) * scale).transpose(-1, -2)
        )
        cores = len(chip.offset)
        if chip.core_weight is not None:
            for core in range(min(cores, rows)):
                own = chip.core_weight[core][columns, :width] * (chip.gain[columns].unsqueeze(1) * scale)
                code[:, core::cores] += light[:, core::cores] @ own.transpose(-1, -2)
        offset = (chip.offset + self.drift.offset)[:, columns]
        code += offset[torch.arange(rows) % cores]
        if noise is not None:
            share = 1 / math.sqrt(averages)
            code += torch.randn(code.shape, generator=noise).mul_(chip.noise[columns] * share)
            code += torch.randn((batch, rows, 1), generator=noise).mul_(chip.shared * share)
        if averages == 1:
            code.round_()
        top = c.adc_levels
        clipped = 0
        if not ideal and code.numel():
            low, high = code.aminmax()
            if max(-float(low), float(high)) > top:
                clipped = int((code.abs() > top).sum())
                code.clamp_(-top, top)
        return Reading(code, clipped)

    def _damaged(self, light: Tensor, cells: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Dead inputs, dead columns and stuck cells applied."""
        for fault, where in self._faults.items():
            if fault is Fault.DEAD_INPUT and where[0] < light.shape[-1]:  # type: ignore[index]
                light = light.clone()
                light[..., where[0]] = 0  # type: ignore[index]
            elif fault is Fault.DEAD_COLUMN:
                cells = torch.where((columns == where[0]).unsqueeze(1), 0.0, cells)  # type: ignore[index]
            elif fault is Fault.STUCK_WEIGHT and where[1] < cells.shape[-1]:  # type: ignore[index]
                cells = cells.clone()
                cells[:, columns == where[0], where[1]] = 0.9  # type: ignore[index]
        return light, cells

    def _light(self) -> float:
        if not self._on:
            return 0.0
        left = self._faults.get(Fault.LASER_LOSS)
        return 1.0 if left is None else float(left)  # type: ignore[arg-type]

    def ideal_codes(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """What a chip without errors would read, before rounding: for tests and calibration targets."""
        c = self._converters
        factor = c.gain / (c.input_levels * c.weight_levels * c.lsb(inputs.shape[-1]))
        return integer_product(inputs, weights, c) * factor

    # Sensors and time

    def telemetry(self) -> Telemetry:
        with self._lock:
            sensed = math.nan if Fault.NAN_SENSOR in self._faults else self._temperature
            return Telemetry(sensed, self._reading_age, self._light(), self._clock)

    def advance(self, seconds: float, *, load: float = 0.0) -> None:
        """Let time pass: dT/dt = (P R_th - (T - T_a)) / tau, solved exactly for a constant load (0 to 1); drift
        follows.

        Raises:
            ContractError: negative time, or a load outside 0 to 1.
        """
        if not seconds >= 0 or not 0 <= load <= 1:
            raise ContractError(f"{seconds} s at load {load} were given: use a time of 0 or more and a load of 0 to 1")
        p = self.profile
        with self._lock:
            power = p["thermal.heat"] * load if self._on else 0.0
            end = p["thermal.ambient"] + power * p["thermal.resistance"]
            keep = math.exp(-seconds / p["thermal.time_constant"])
            self._temperature = end + (self._temperature - end) * keep
            self._clock += seconds
            stale = Fault.STALE_SENSOR in self._faults
            self._reading_age = self._reading_age + seconds if stale else 0.0
            self.drift.advance(seconds, self._temperature)

    def heat_to(self, temperature: float) -> None:
        """Set the array's temperature, degC: for tests and what-if studies."""
        with self._lock:
            self._temperature = temperature
            self.drift.temperature = temperature

    def laser(self, on: bool) -> None:
        self._on = on

    def inject(self, fault: Fault | str, where: Iterable[int] | float = ()) -> None:
        """Break something.

        Args:
            fault: see `Fault`. where: (input,), (column,) or (column, input); for LASER_LOSS the share that is left.
        """
        fault = Fault(fault)
        self._faults[fault] = float(where) if isinstance(where, int | float) else tuple(where)

    def heal(self) -> None:
        """Take every injected fault back."""
        self._faults.clear()
        self._reading_age = 0.0

    def close(self) -> None:
        self.laser(False)
