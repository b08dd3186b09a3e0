"""The driver of a simulated chip: readouts with its errors, its sensors, its time, and faults that can be injected."""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from hal_core.plugin_api import ContractError

from ..profiles.profile import Profile
from ..runtime.driver import Cells, Reading, Telemetry
from .converters import Converters
from .imperfections import Drift, Imperfections, by_core


class Fault(enum.StrEnum):
    """What can be injected into a simulated chip."""

    NAN_SENSOR = "nan_sensor"
    STALE_SENSOR = "stale_sensor"
    DEAD_INPUT = "dead_input"  # one input gives no light
    DEAD_COLUMN = "dead_column"  # one column reads nothing
    STUCK_WEIGHT = "stuck_weight"  # one cell holds one value
    LASER_LOSS = "laser_loss"  # the laser gives a share of its power


class SimulatedDriver:
    """A chip simulated from its profile. Deterministic: equal profiles, chip numbers and calls give equal codes.

    Time passes only through `advance`, so a result depends on the noise that a call is given and on nothing hidden.
    """

    def __init__(self, profile: Profile, *, linearised: bool | None = None) -> None:
        self.profile, self.chip = profile, Imperfections(profile)
        self.linearised = profile.linearised if linearised is None else linearised
        self._temperature = profile["thermal.ambient"]
        self.drift = Drift(profile, self.working_temperature)
        self._clock, self._reading_age, self._on = 0.0, 0.0, True
        self._faults: dict[Fault, tuple[int, ...]] = {}
        self._laser_left = 1.0
        self._lock = threading.Lock()
        self._converters = Converters.of(profile)

    @property
    def working_temperature(self) -> float:
        """degC, at full load: ambient + heat * thermal resistance."""
        p = self.profile
        return p["thermal.ambient"] + p["thermal.heat"] * p["thermal.resistance"]

    # Readouts

    def load(self, weights: Tensor) -> Cells:
        columns = torch.arange(weights.shape[-2]) % len(self.chip.gain)
        return Cells(self.chip.realised(weights / self._converters.weight_levels, columns))

    def read(
        self,
        inputs: Tensor,
        weights: Tensor | Cells,
        *,
        noise: torch.Generator | None,
        averages: int = 1,
        gain: float | None = None,
    ) -> Reading:
        c, chip = self._converters, self.chip
        ratio = 1.0 if gain is None else gain / c.gain
        batch, rows, width = inputs.shape
        held = weights if isinstance(weights, Cells) else self.load(weights)
        outputs = held.values.shape[1]
        columns = torch.arange(outputs) % len(chip.gain)
        light = chip.bent(inputs / c.input_levels, self.linearised).mul_(self._light())
        light, cells = self._damaged(light, held.values, columns)
        scale = ratio * c.gain / c.lsb(width)
        cells = (cells * (chip.gain * self.drift.gain)[columns].unsqueeze(1)).mul_(scale)
        code = torch.matmul(light, cells.transpose(-1, -2))
        cores = len(chip.offset)
        if chip.core_weight is not None:
            for core in range(min(cores, rows)):
                own = chip.core_weight[core][columns, :width] * (chip.gain[columns].unsqueeze(1) * scale)
                code[:, core::cores] += light[:, core::cores] @ own.transpose(-1, -2)
        for some, of_core in by_core(code, (ratio * (chip.offset + self.drift.offset))[:, columns]):
            some += of_core
        if noise is not None:
            # What arises in front of the gain grows with it.
            behind = self.profile["noise.after_gain"]
            grown = math.sqrt(behind + (1 - behind) * ratio * ratio)
            share = 1 / math.sqrt(averages)
            code += torch.randn(code.shape, generator=noise).mul_(chip.noise[columns] * (grown * share))
            code += torch.randn((batch, rows, 1), generator=noise).mul_(chip.shared * ratio * share)
        if averages == 1:
            code.round_()
        top = c.adc_levels
        clipped = 0
        if code.numel():
            low, high = code.aminmax()
            if not max(-float(low), float(high)) <= top:  # a NaN among them leaves the others to be looked at
                clipped = int((code.abs() > top).sum())
                code.clamp_(-top, top)
        return Reading(code, clipped)

    def _damaged(self, light: Tensor, cells: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Dead inputs, dead columns and stuck cells applied."""
        for fault, where in self._faults.items():
            if fault is Fault.DEAD_INPUT and where[0] < light.shape[-1]:
                light = light.clone()
                light[..., where[0]] = 0
            elif fault is Fault.DEAD_COLUMN:
                cells = cells.masked_fill(columns.eq(where[0]).unsqueeze(1), 0.0)
            elif fault is Fault.STUCK_WEIGHT and where[1] < cells.shape[-1]:
                cells = cells.clone()
                cells[:, columns.eq(where[0]), where[1]] = 0.9
        return light, cells

    def _light(self) -> float:
        return self._laser_left if self._on else 0.0

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
        """Inject a fault.

        Args:
            fault: see `Fault`. where: (input,), (column,) or (column, input); for LASER_LOSS the share of
                the power that is left.
        """
        fault = Fault(fault)
        if fault is Fault.LASER_LOSS:
            if not isinstance(where, int | float):
                raise ContractError(f"laser_loss at {where!r} was given: pass the share of the power that is left")
            self._laser_left = float(where)
        elif isinstance(where, int | float):
            raise ContractError(f"{fault} at {where!r} was given: pass the numbers of the place as a tuple")
        else:
            self._faults[fault] = tuple(where)

    def heal(self) -> None:
        """Remove every injected fault."""
        self._faults.clear()
        self._laser_left = 1.0
        self._reading_age = 0.0

    def close(self) -> None:
        self.laser(False)
