"""The functional level: exact codes, the gain's dB, and agreement with two published simulators where they are
installed.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hal_photonics.calibrate import decibels
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator.blockfloat import encode, product
from hal_photonics.simulator.converters import Converters
from hal_photonics.simulator.core import PhotonicCore
from hal_photonics.simulator.integers import HeldWeights, integer_product

from hal_core import ContractError

CHIP = Converters(10, 7, 11, 1.86, 128)


def plain(inputs: torch.Tensor, weights: torch.Tensor, c: Converters) -> torch.Tensor:
    """The equations of the module, element by element."""
    out = torch.zeros(inputs.shape[0], weights.shape[0], dtype=torch.float64)
    for start in range(0, inputs.shape[1], c.inputs):
        x, w = inputs[:, start : start + c.inputs], weights[:, start : start + c.inputs]
        lsb = max(x.shape[1], 32) / c.adc_levels
        for i in range(len(x)):
            for j in range(len(w)):
                sx = float(x[i].abs().max().to(torch.bfloat16)) or 1.0
                sw = float(w[j].abs().max().to(torch.bfloat16)) or 1.0
                p = 0.0
                for a, b in zip((x[i] / sx).tolist(), (w[j] / sw).tolist(), strict=True):
                    qa = round(max(-1, min(1, a)) * c.input_levels) / c.input_levels
                    p += qa * round(max(-1, min(1, b)) * c.weight_levels) / c.weight_levels
                code = max(-c.adc_levels, min(c.adc_levels, round(c.gain * p / lsb)))
                out[i, j] += code * lsb * sx * sw / c.gain
    return out


@pytest.mark.parametrize(("rows", "outputs", "length"), [(3, 4, 128), (2, 3, 150), (1, 1, 1), (4, 2, 33)])
def test_the_product_is_its_equations(draw: torch.Generator, rows: int, outputs: int, length: int) -> None:
    inputs, weights = torch.randn(rows, length, generator=draw), torch.randn(outputs, length, generator=draw)
    got, _ = product(inputs[None], weights[None], CHIP)
    want = plain(inputs, weights, CHIP)
    step = 128 / 1023 * 16 / 1.86
    assert float((got[0].double() - want).abs().max()) <= 1e-5 * max(float(want.abs().max()), step)


def test_zeros_give_exact_zeros(draw: torch.Generator) -> None:
    inputs, weights = torch.randn(1, 5, 140, generator=draw), torch.randn(1, 6, 140, generator=draw)
    inputs[0, 2], weights[0, 3] = 0, 0
    got, _ = product(inputs, weights, CHIP)
    assert not got[0, 2].any()
    assert not got[0, :, 3].any()


def test_no_code_is_beyond_the_largest_where_bfloat16_rounds_the_scale_down() -> None:
    values = torch.tensor([[1.0038, -0.5], [-1.0117, 1.0]])  # bfloat16 has 1.0 and 1.0078 here
    codes, scales = encode(values, 511)
    assert bool((scales[:, 0] < values.abs().amax(1)).any())
    assert float(codes.abs().max()) == 511


def test_integer_products_do_not_depend_on_their_order(draw: torch.Generator) -> None:
    x, _ = encode(torch.randn(1, 64, 128, generator=draw), CHIP.input_levels)
    w, _ = encode(torch.randn(1, 64, 128, generator=draw), CHIP.weight_levels)
    order = torch.randperm(128, generator=draw)
    assert torch.equal(integer_product(x, w, CHIP), integer_product(x[..., order], w[..., order], CHIP))
    exact = x.double() @ w.double().mT
    assert torch.equal(integer_product(x, w, CHIP).double(), exact)


@pytest.mark.parametrize("shape", [(1, 700, 128, 300), (1, 333, 77, 513), (2, 64, 128, 64), (1, 1, 128, 1)])
def test_products_by_blocks_of_rows_are_exact(draw: torch.Generator, shape: tuple[int, int, int, int]) -> None:
    """Large ones go through eight-bit integers, where the largest codes of either sign must survive the splitting."""
    batch, rows, length, columns = shape
    x = torch.randint(-511, 512, (batch, rows, length), generator=draw).float()
    w = torch.randint(-63, 64, (batch, columns, length), generator=draw).float()
    x[:, 0], w[:, 0], x[:, -1] = 511, 63, -511
    held = HeldWeights(w, rows, CHIP)
    got = torch.cat([held.product(x[:, start : start + 128]) for start in range(0, rows, 128)], 1)
    assert torch.equal(got.double(), x.double() @ w.double().mT)


def test_each_doubling_of_the_gain_brings_six_decibels(draw: torch.Generator) -> None:
    """Row 8: 8/8/8 bits, K = 128, gains 1 to 8: 5.9 to 6.0 dB, within 0.3."""
    inputs, weights = torch.randn(1, 512, 1024, generator=draw), torch.randn(1, 512, 1024, generator=draw)
    want = inputs @ weights.mT
    seen = [decibels(want, product(inputs, weights, Converters(8, 8, 8, gain, 128))[0]) for gain in (1, 2, 4, 8)]
    for low, high in itertools.pairwise(seen):
        assert 5.9 - 0.3 <= high - low <= 6.0 + 0.3


def test_too_much_gain_clips_and_is_counted(draw: torch.Generator) -> None:
    inputs, weights = torch.randn(1, 64, 128, generator=draw), torch.randn(1, 64, 128, generator=draw)
    assert product(inputs, weights, CHIP)[1] == 0
    assert product(inputs, weights, CHIP._replace(gain=64.0))[1] > 0.01


def test_dither_is_seeded_and_unbiased(draw: torch.Generator) -> None:
    inputs, weights = torch.randn(1, 8, 128, generator=draw), torch.randn(1, 8, 128, generator=draw)
    first, again = (product(inputs, weights, CHIP, dither=torch.Generator().manual_seed(4))[0] for _ in range(2))
    assert torch.equal(first, again)
    many = product(inputs.expand(400, -1, -1), weights.expand(400, -1, -1), CHIP, dither=draw)[0]
    x, sx = encode(inputs, CHIP.input_levels)
    w, sw = encode(weights, CHIP.weight_levels)
    exact = (x @ w.mT / (CHIP.input_levels * CHIP.weight_levels) * sx * sw.mT)[0]
    step = CHIP.lsb(128) / CHIP.gain * float(sx.max() * sw.max())
    assert float((many.mean(0) - exact).abs().max()) < 5 * step / math.sqrt(12 * 400) + 1e-3 * step


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_operands_that_are_not_finite_are_refused_with_their_position(generic: Profile, bad: float) -> None:
    core, a, b = PhotonicCore.of(generic), torch.randn(3, 20), torch.randn(20, 5)
    b[7, 2] = bad
    with pytest.raises(ContractError, match=r"b holds .* at \[7, 2\]"):
        core.multiply(a, b)
    with pytest.raises(ContractError, match=r"pass \[\.\.\., M, K\]"):
        core.multiply(a, a)


def test_codes_equal_those_of_aihwkit(draw: torch.Generator) -> None:
    """Row 10: aihwkit 1.1.0, deterministic, 10/7/11 bits, G = 1.86, 128 x 128: every code."""
    pytest.importorskip("aihwkit", reason="aihwkit is not installed: pip install --no-deps aihwkit==1.1.0")
    from hal_photonics.simulator.published_simulators import aihwkit_codes

    x, w, ours = codes(draw)
    theirs = aihwkit_codes(x, w, CHIP)
    # They sum fractions in float32, we whole numbers: a sum within that rounding of a tie between two codes may go
    # either way.
    exact = x.double() @ w.double().mT * (CHIP.gain / CHIP.lsb(128))
    tied = ((exact - exact.floor() - 0.5).abs() < 1e-4) & (exact.abs() < CHIP.adc_levels)
    assert float(tied.float().mean()) < 1e-3
    assert torch.equal(ours[~tied], theirs[~tied])


def test_codes_equal_those_of_crosssim(draw: torch.Generator) -> None:
    """Row 11: CrossSim 3.2.0, balanced, sign-magnitude inputs: 99.99% of the codes."""
    pytest.importorskip("simulator", reason="CrossSim is not installed: its source is github.com/sandialabs/cross-sim")
    from hal_photonics.simulator.published_simulators import crosssim_codes

    x, w, ours = codes(draw)
    theirs = crosssim_codes(x, w, CHIP)
    assert float((ours == theirs).float().mean()) >= 0.9999


def codes(draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantised operands in [-1, 1] with scales of 1, [256, 128] and [128, 128], and our readout codes for them."""
    x = (torch.rand(256, 128, generator=draw) * 2 - 1).mul(CHIP.input_levels).round() / CHIP.input_levels
    w = (torch.rand(128, 128, generator=draw) * 2 - 1).mul(CHIP.weight_levels).round() / CHIP.weight_levels
    x[:, 0], w[:, 0] = 1, 1
    got = product(x[None], w[None], CHIP)[0][0]
    return x, w, (got / (CHIP.lsb(128) / CHIP.gain)).round()
