"""One run of a model on a device: the error of its result, and the time and energy that the device states."""

from __future__ import annotations

from typing import NamedTuple

import torch

import hal_core as hal
from hal_core import Device, HalError

from ..batches import Tokens
from ..lanes import Lane, Scope, linear_devices, make_networks
from ..metrics import Outputs, Tally, read_outputs
from ..models import Float64Throughout, Model, in_float64


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        error: ||h - reference|| / ||reference|| of the last hidden states, mean over texts and draws.
        time, energy: seconds and joules of the device's part; None where the device states none.
    """

    error: float
    time: float | None
    energy: float | None


#: The results that a figure can move, with their units.
RESULTS = {"error": "", "time": "s", "energy": "J"}


class Trial:
    """A model with its text and float64 run, which devices run one after the other with equal seeds.

    Args:
        draws: of a noisy device's noise, averaged. linear: whether linear layers run on a device that has a kernel.
    """

    def __init__(self, model: Model, tokens: Tokens, *, draws: int, linear: bool) -> None:
        self.model, self.tokens, self.draws, self.linear = model, tokens, draws, linear
        self._exact: list[Outputs] = []
        network = in_float64(model.network)
        with torch.no_grad(), Float64Throughout():
            for batch in tokens.batches:
                outputs = network(**batch.inputs("cpu", torch.float64), output_hidden_states=True)
                self._exact.append(read_outputs(outputs, batch, model.kind, model.pooling))

    def lane(self, device: Device, *, attention: bool = True) -> Lane:
        """The model with the device's part on it.

        Args:
            attention: whether attention runs on the device, and not on torch.

        Raises:
            HalError: the device does not run it.
        """
        wide = self.linear and device.id in linear_devices()
        place = "cpu" if device.reads_from("cpu") else device.reads[0]
        scope = Scope.LINEAR if wide else Scope.ATTENTION
        lane = Lane(device.id, device, place, baseline=not attention, scope=scope)
        make_networks(self.model.network, [lane])
        if lane.refusals:
            raise HalError(lane.refusals[0])
        return lane

    def run(self, lane: Lane, draws: int | None = None) -> Outcome:
        """The outcome of the lane's device, over `draws` of its noise; None for those of the trial.

        Time and energy are those of the first draw: they are modelled from what runs, which noise does not change.
        """
        draws = draws or self.draws
        with hal.meter() as meter:
            errors = [self.error(lane, 0)]
        errors += [self.error(lane, draw) for draw in range(1, draws)]
        record = meter.records[lane.device.id] if lane.device is not None else None
        time, energy = (None, None) if record is None else (record.time, record.energy)
        return Outcome(
            sum(errors) / len(errors),
            None if time is None else time.middle,
            None if energy is None else energy.middle,
        )

    def error(self, lane: Lane, draw: int) -> float:
        """Mean over texts of the error of one draw."""
        tally, batches = Tally(len(self.tokens.lengths)), self.tokens.batches
        for number, (batch, exact) in enumerate(zip(batches, self._exact, strict=True)):
            torch.manual_seed(draw * len(batches) + number)
            with torch.no_grad():
                outputs = lane.forward(batch)
            tally.add(batch, read_outputs(outputs, batch, self.model.kind, self.model.pooling), exact)
        return sum(tally.errors.values()) / len(tally.errors)
