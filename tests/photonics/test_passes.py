"""The device option "passes": noise falls by its square root, time and energy of the optics grow with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_photonics.cost import attention_cost
from hal_photonics.profiles.profile import Profile
from hal_photonics.session import PhotonicSession
from hal_photonics.simulator.chip import SimulatedDriver

import hal_core as hal
from hal_core import AttentionRequest, UnsupportedError


def attend(passes: int | None, operands: list[torch.Tensor], rng: tuple[int, int]) -> torch.Tensor:
    options = {} if passes is None else {"options": {"passes": passes}}
    with hal.use("photonic:0", **options):
        result: torch.Tensor = hal.attention(*operands, rng=rng)
    return result


def test_one_pass_is_no_option_to_the_last_bit(draw: torch.Generator) -> None:
    operands = [torch.randn(1, 2, 40, 32, generator=draw) for _ in range(3)]
    assert torch.equal(attend(1, operands, (1, 2)), attend(None, operands, (1, 2)))
    assert not torch.equal(attend(2, operands, (1, 2)), attend(None, operands, (1, 2)))


@pytest.mark.parametrize("passes", [4, 16])
def test_the_noise_of_a_product_falls_by_the_root_of_the_passes(
    generic: Profile, draw: torch.Generator, passes: int
) -> None:
    """The spread over draws, so without static errors. An uncalibrated chip; 64 x 64 outputs, 12 draws each."""
    core = PhotonicSession(device(), SimulatedDriver(generic)).core
    inputs, weights = torch.randn(1, 64, 64, generator=draw), torch.randn(1, 64, 64, generator=draw)

    def spread(count: int) -> float:
        found = [core.product(inputs, weights, torch.Generator().manual_seed(seed), passes=count) for seed in range(12)]
        return float(torch.stack(found).var(0).mean().sqrt())

    # A single readout is rounded to whole codes: sqrt(sigma^2 + 1/12), where an average is not.
    sigma = generic["noise.readout_noise"]
    rounded = math.sqrt(1 + 1 / 12 / sigma**2)
    assert spread(1) / spread(passes) == pytest.approx(math.sqrt(passes) * rounded, rel=0.06)


def test_attention_over_passes_is_nearer_to_itself(draw: torch.Generator) -> None:
    operands = [torch.randn(1, 2, 60, 32, generator=draw) for _ in range(3)]

    def spread(passes: int) -> float:
        found = torch.stack([attend(passes, operands, (seed, 0)) for seed in range(10)])
        return float(found.var(0).mean().sqrt())

    assert spread(1) / spread(16) == pytest.approx(4, rel=0.25)  # the softmax is not linear, and readouts are rounded


def test_time_and_energy_of_the_optics_grow_with_the_passes(generic: Profile) -> None:
    def cost(*options: tuple[str, int]) -> Any:
        return attention_cost(generic, AttentionRequest(1, 2, 2, 99, 99, 32, 32, "float32", options=options))

    one, four = cost(), cost(("passes", 4))
    assert cost(("passes", 1)).time == one.time
    for part in ("weights", "stream"):
        assert four.seconds[part] == pytest.approx(4 * one.seconds[part], rel=1e-12)
        assert four.joules[part] == pytest.approx(4 * one.joules[part], rel=1e-12)
    for part in ("softmax", "host"):
        assert four.seconds[part] == one.seconds[part], "digital work is done once"


def test_the_estimate_and_the_meter_know_the_passes(draw: torch.Generator) -> None:
    q = torch.randn(1, 2, 64, 32, generator=draw)
    plain = hal.explain(q, q, q, backend="photonic:0").winner.estimate
    with hal.use("photonic:0", options={"passes": 8}), hal.meter() as meter:
        averaged = hal.explain(q, q, q).winner.estimate
        hal.attention(q, q, q)
    assert averaged.parts["stream"] == pytest.approx(8 * plain.parts["stream"])
    assert meter.records["photonic:0"].time.middle == pytest.approx(averaged.time.middle)


@pytest.mark.parametrize("passes", [0, -1, 2000, 1.5, "many"])
def test_other_numbers_of_passes_are_refused(passes: Any, draw: torch.Generator) -> None:
    q = torch.randn(1, 1, 4, 8, generator=draw)
    with pytest.raises(UnsupportedError, match="passes"):
        attend(passes, [q, q, q], (1, 2))


def device() -> Any:
    return hal.Device(id="test:0", family="photonic", vendor="v", model="m", fidelity=hal.Fidelity.SIMULATED)
