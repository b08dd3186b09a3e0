"""Parameters stay programmed from call to call; what changes them, or the chip, shows in the next product."""

from __future__ import annotations

import gc

import pytest
import torch
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator import held
from hal_photonics.simulator.chip import Fault, SimulatedDriver
from hal_photonics.simulator.core import PhotonicCore
from torch import Tensor, nn


@pytest.fixture
def operands(draw: torch.Generator) -> tuple[Tensor, nn.Parameter]:
    return torch.randn(5, 100, generator=draw), nn.Parameter(torch.randn(70, 100, generator=draw))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weights that were programmed, a number for each tile."""
    found: list[int] = []
    load = SimulatedDriver.load
    monkeypatch.setattr(
        SimulatedDriver, "load", lambda self, codes: (found.append(codes.shape[1]), load(self, codes))[1]
    )
    return found


def test_a_parameter_is_programmed_once(generic: Profile, operands: tuple[Tensor, nn.Parameter], loads: list[int]):
    x, weight = operands
    core = PhotonicCore.of(generic)
    first, second = (core.linear(x, weight, rng=(1, 2)) for _ in range(2))
    assert loads == [70, 70], "one load for each of two tiles"
    assert torch.equal(first, second)
    assert torch.equal(first, PhotonicCore.of(generic).linear(x, weight.detach(), rng=(1, 2)))


def test_a_tensor_of_one_call_is_not_held(generic: Profile, operands: tuple[Tensor, nn.Parameter], loads: list[int]):
    x, weight = operands
    core = PhotonicCore.of(generic)
    for _ in range(2):
        core.linear(x, weight.detach())
    assert len(loads) == 4


@pytest.mark.parametrize("through", ["data", "parameter"])
def test_changed_weights_are_programmed_anew(generic: Profile, operands: tuple[Tensor, nn.Parameter], through: str):
    """Writing through `.data` leaves the version of a parameter as it is."""
    x, weight = operands
    core = PhotonicCore.of(generic)
    core.linear(x, weight)
    with torch.no_grad():
        (weight.data if through == "data" else weight)[3, 4] += 1
    assert torch.equal(core.linear(x, weight, rng=(1, 2)), PhotonicCore.of(generic).linear(x, weight, rng=(1, 2)))


def test_faults_and_drift_reach_weights_that_are_held(generic: Profile, operands: tuple[Tensor, nn.Parameter]):
    x, weight = operands
    held_before, fresh = PhotonicCore.of(generic), PhotonicCore.of(generic)
    before = held_before.linear(x, weight)
    for core in (held_before, fresh):
        core.driver.inject(Fault.STUCK_WEIGHT, (2, 3))
        core.driver.heat_to(80.0)
    assert torch.equal(held_before.linear(x, weight), fresh.linear(x, weight))
    assert not torch.equal(held_before.linear(x, weight), before)
    for core in (held_before, fresh):
        core.driver.heal()
    assert torch.equal(held_before.linear(x, weight), fresh.linear(x, weight)), "a fault stayed in the held cells"


def test_what_is_kept_is_bounded_and_ends_with_the_parameter(
    generic: Profile, draw: torch.Generator, loads: list[int], monkeypatch: pytest.MonkeyPatch
):
    x = torch.randn(5, 64, generator=draw)
    kept, other = (nn.Parameter(torch.randn(70, 64, generator=draw)) for _ in range(2))
    monkeypatch.setattr(held, "MOST_ELEMENTS", kept.numel())
    core = PhotonicCore.of(generic)
    for weight in (kept, other, kept, other):
        core.linear(x, weight)
    assert len(loads) == 3, "there is room for the first one, and the second is programmed twice"
    del kept, weight
    gc.collect()
    for _ in range(2):
        core.linear(x, other)
    assert len(loads) == 4, "the room of the first one is free again"
