"""The cheapest set of linear layers to keep digital, for a share of the reference's decisions that is to be kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from hal_nn.sensitivity import DigitalSet, cheapest_digital_set
from torch import nn

from hal_core import HalError

from .attention_clock import Clock, clocked
from .lanes import Lane, LinearOnDevice, Scope, linear_names, make_networks
from .measure import batches_of
from .metrics import Outputs, Tally, read_outputs
from .models import Float64Throughout, Model, in_float64
from .texts import TextFile

#: Draws of the noise in the search have seeds from here on, those of the comparison's rows begin at 0: the search picks
#: sets that its own draws happen to favour, so the row that it is for is judged by others.
SEARCH_SEED = 1 << 32


class Chosen(NamedTuple):
    """What was found for one row."""

    name: str
    found: DigitalSet

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        found = self.found
        return (
            f"{self.name}: {len(found.layers)} of {len(found.damage)} linear layers stay digital, "
            f"{found.device_share:.1%} of their multiply-accumulates stay on the device, {found.score:.1%} of the "
            f"decisions are kept in the search ({found.tried} sets were tried; the row has other draws of the noise): "
            f"{', '.join(found.layers) or 'none is digital'}"
        )


def search(
    model: Model, files: Sequence[TextFile], rows: Sequence[Lane], arguments: argparse.Namespace
) -> list[Chosen]:
    """Find the digital layers of every row of linear layers, and note them in the row.

    Args:
        arguments: of the command: keep, batch, max_length, repeats (draws of the noise that are averaged), progress.

    Raises:
        ContractError: not even the model with all linear layers digital keeps so many decisions.
    """
    chosen = []
    judge = _Judge(model, files, arguments)
    for row in rows:
        if row.scope is Scope.LINEAR and row.device is not None:
            found = judge.search(row, arguments.keep)
            row.digital = frozenset(found.layers)
            chosen.append(Chosen(row.name, found))
    return chosen


def sentences(network: nn.Module, rows: Sequence[Lane], chosen: Sequence[Chosen]) -> list[str]:
    """What stays digital in each row of linear layers: the set that was found for it, or the layers that were named."""
    found, names = {one.name: one.sentence for one in chosen}, linear_names(network)
    for row in rows:
        if row.digital and row.name not in found:
            listed = [name for name in names if name in row.digital]
            found[row.name] = (
                f"{row.name}: {len(listed)} of {len(names)} linear layers stay digital: {', '.join(listed)}"
            )
            if len(listed) == len(names):
                what = f"all {len(names)} linear layers stay digital, so only attention runs on the device"
                found[row.name] = f"{row.name}: {what}, as in the row without linear layers"
    return list(found.values())


class _Judge:
    """Runs the model on all texts with any set of digital layers, against the float64 run."""

    def __init__(self, model: Model, files: Sequence[TextFile], arguments: argparse.Namespace) -> None:
        self._tokens = batches_of(model, files, arguments.batch, arguments.max_length)
        self._model, self._draws, self._progress = model, arguments.repeats, arguments.progress
        exact, network = [], in_float64(model.network)
        with torch.no_grad(), Float64Throughout():
            for batch in self._tokens.batches:
                outputs = network(**batch.inputs("cpu", torch.float64), output_hidden_states=True)
                exact.append(read_outputs(outputs, batch, model.kind, model.pooling))
        self._exact: list[Outputs] = exact
        self._reference = Tally(len(self._tokens.lengths))
        for batch, outputs in zip(self._tokens.batches, exact, strict=True):
            self._reference.add(batch, outputs, outputs)

    def search(self, row: Lane, wanted: float) -> DigitalSet:
        names = linear_names(self._model.network)
        lane = Lane(row.name, row.device, row.place, scope=row.scope, options=row.options)
        make_networks(self._model.network, [lane])
        if lane.refusals:
            raise HalError(lane.refusals[0])
        layers = {name: _on_device(lane.network, name) for name in names}
        known: dict[frozenset[str], list[Tally]] = {}

        def tallies(digital: frozenset[str]) -> list[Tally]:
            if digital not in known:
                self._progress(f"{row.name}: {len(digital)} of {len(names)} linear layers digital", 0.0)
                for name, layer in layers.items():
                    layer.digital = name in digital
                known[digital] = [self._run(lane, draw) for draw in range(self._draws)]
            return known[digital]

        tallies(frozenset(names))
        macs = {name: layer.macs for name, layer in layers.items()}
        return cheapest_digital_set(
            macs,
            lambda digital: sum(tally.agreement(self._reference) for tally in tallies(digital)) / self._draws,
            wanted,
            damage=lambda digital: sum(sum(tally.errors.values()) for tally in tallies(digital)),
        )

    def _run(self, lane: Lane, draw: int) -> Tally:
        tally, batches = Tally(len(self._tokens.lengths)), self._tokens.batches
        for number, (batch, exact) in enumerate(zip(batches, self._exact, strict=True)):
            torch.manual_seed(SEARCH_SEED + draw * len(batches) + number)
            with torch.no_grad(), clocked(Clock(lane.place)):
                outputs = lane.forward(batch)
            tally.add(batch, read_outputs(outputs, batch, self._model.kind, self._model.pooling), exact)
        return tally


def _on_device(network: nn.Module, name: str) -> LinearOnDevice:
    layer = network.get_submodule(name)
    assert isinstance(layer, LinearOnDevice)
    return layer
