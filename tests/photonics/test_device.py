"""photonic devices through hal_core: kernels, meters, gradients, bad operands, profiles at run time, cards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hal_cli import main
from hal_photonics import discovery, register_profile, tiling
from hal_photonics.backend import BUNDLED
from hal_photonics.kernels.attention import attend_exactly

import hal_core as hal
from hal_core import ContractError, UnsupportedError
from hal_core.testing import reference, relative_error


@pytest.fixture
def chip() -> Iterator[str]:
    """A user's own chip, registered at run time with straight-through gradients."""
    yield register_profile(BUNDLED / "generic.toml", "mychip", straight_through=True).id
    hal.unregister("mychip")


def test_every_device_is_simulated_and_says_so() -> None:
    device = next(d for d in hal.devices() if d.id == "photonic:0")
    assert device.fidelity == "simulated"
    assert "simulated from profile" in device.driver
    q = torch.randn(1, 2, 16, 32)
    estimate = hal.explain(q, q, q, backend="photonic:0").winner.estimate
    assert estimate.time.basis == "modelled"
    assert estimate.time.provenance == "assumed"


def test_automatic_selection_never_takes_it_unasked() -> None:
    q = torch.randn(1, 2, 16, 32)
    assert not str(hal.explain(q, q, q).chosen).startswith("photonic")


def test_attention_is_attention_within_the_declared_noise(draw: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 4, 90, 48, generator=draw) for _ in range(3))
    mask = torch.rand(2, 1, 90, 90, generator=draw) > 0.3
    mask[:, :, 5] = False
    out, lse = hal.attention(q, k, v, mask, backend="photonic:0", return_lse=True, rng=(1, 2))
    want = reference(q, k, v, mask)
    assert relative_error(out, want.out) < 0.3
    assert relative_error(lse, want.lse) < 0.05
    assert not out[:, :, 5].any()
    assert bool((lse[:, :, 5] == -math.inf).all())


def test_the_parts_of_a_long_call_are_one_result(draw: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(2, 6, 40, 16, generator=draw), *(torch.randn(2, 3, 50, 16, generator=draw) for _ in range(2))
    request = hal.AttentionRequest(
        2, 6, 3, 40, 50, 16, 16, "float32", causal=hal.Causal.BOTTOM_RIGHT, lse=True, mask=hal.MaskKind.ADDITIVE
    )
    mask = torch.randn(2, 6, 40, 50, generator=draw)
    own = tiling.PhotonicTiling("photonic", 64, 64)
    whole = attend_exactly(q, k, v, mask, request, own.plan(request, {}))
    for scores in (1, 700, 5000, 13000):
        monkeypatch.setattr(tiling, "SCORES", scores)
        parts = attend_exactly(q, k, v, mask, request, own.plan(request, {}))
        assert torch.allclose(parts.out, whole.out, atol=1e-5)
        assert torch.allclose(parts.lse, whole.lse, atol=1e-5)
    want = reference(q, k, v, mask, causal="bottom_right", enable_gqa=True)
    assert relative_error(whole.out, want.out) < 1e-5


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_batch_entry_and_key_head(draw: torch.Generator, name: str, bad: float) -> None:
    tensors = {"query": torch.randn(2, 4, 9, 16, generator=draw)}
    tensors |= {n: torch.randn(2, 2, 12, 16, generator=draw) for n in ("key", "value")}
    mask = torch.ones(9, 12, dtype=torch.bool)
    mask[5] = False
    options = {"attn_mask": mask, "enable_gqa": True, "backend": "photonic:0", "return_lse": True, "rng": (1, 2)}
    clean, clean_lse = hal.attention(*tensors.values(), **options)
    tensors[name][1, -1, 2, 3] = bad
    out, lse = hal.attention(*tensors.values(), **options)
    own = torch.zeros(2, 4, dtype=torch.bool)
    own[1, 2:] = True  # the query heads of the last key head
    assert torch.equal(out[~own], clean[~own])
    assert torch.equal(lse[~own], clean_lse[~own])
    rows = torch.arange(9) != 5
    assert bool(out[1, 2:, rows].isnan().all())
    assert not out[1, 2:, 5].any()
    assert bool((lse[1, 2:, 5] == -math.inf).all())


def test_kernels_refuse_operands_that_no_converter_has_a_code_for() -> None:
    matmul = hal.kernel("matmul", backend="photonic:0")
    a = torch.zeros(3, 4)
    a[1, 2] = math.nan
    with pytest.raises(ContractError, match=r"a holds nan at \[1, 2\]"):
        matmul(a, torch.zeros(4, 2))
    with pytest.raises(ContractError, match="b of int64 on cpu was given"):
        matmul(torch.zeros(3, 4), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ContractError, match=r"rng 5 was given: pass \(seed, offset\)"):
        matmul(torch.zeros(3, 4), torch.zeros(4, 2), rng=5)
    assert not matmul(torch.zeros(3, 4, requires_grad=True), torch.zeros(4, 2)).requires_grad


def test_a_mask_hides_only_by_minus_infinity(draw: torch.Generator) -> None:
    """A row wholly at the lowest finite value gives the mean of the values, and a finite log-sum-exp."""
    q, k, v = (torch.randn(1, 2, 6, 16, generator=draw) for _ in range(3))
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(6, 6)
    mask[2], mask[3] = lowest, -math.inf
    out, lse = hal.attention(q, k, v, mask, backend="photonic:0", return_lse=True, rng=(1, 2))
    assert relative_error(out[:, :, 2], v.mean(2)) < 0.3
    assert bool(lse[:, :, 2].isfinite().all())
    assert not out[:, :, 3].any()
    assert bool((lse[:, :, 3] == -math.inf).all())
    request = hal.AttentionRequest(1, 2, 2, 6, 6, 16, 16, "float32", mask=hal.MaskKind.ADDITIVE, lse=True)
    wide = torch.full((1, 1, 6, 6), -1e300, dtype=torch.float64)  # finite there, -inf in float32
    exact = attend_exactly(q * 1e4, k * 1e4, v, wide, request, hal.session("photonic:0").tiling.plan(request, {}))
    assert bool(exact.lse.isfinite().all())


def test_torchs_own_causal_bias_is_a_mask(draw: torch.Generator) -> None:
    from torch.nn.attention.bias import causal_upper_left

    q = torch.randn(1, 2, 8, 16, generator=draw)
    out = hal.attention(q, q, q, causal_upper_left(8, 8), backend="photonic:0", rng=(1, 2))
    assert type(out) is torch.Tensor
    assert relative_error(out, reference(q, q, q, causal="top_left").out) < 0.3


def test_gradients_are_refused_unless_asked_for(chip: str, draw: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, generator=draw).requires_grad_() for _ in range(3))
    with pytest.raises(UnsupportedError, match="gradients of k, q, v asked"):
        hal.attention(q, k, v, backend="photonic:0")
    out = hal.attention(q, k, v, is_causal=True, backend=chip, rng=(1, 1))
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for got, want in zip(grads, torch.autograd.grad(exact, (q, k, v), torch.ones_like(exact)), strict=True):
        assert float((got - want).norm()) <= 1e-5 * max(float(want.norm()), 1.0)
    assert relative_error(out, exact) > 0.01, "the values are the chip's"


def test_kernels_are_products_with_noise_by_rng(draw: torch.Generator) -> None:
    linear = hal.kernel("linear", backend="photonic:0")
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((3, 7, 80), (30, 80), (30,)))
    got = linear(x, weight, bias, rng=(1, 2))
    assert got.shape == (3, 7, 30)
    assert relative_error(got, torch.nn.functional.linear(x, weight, bias)) < 0.2
    assert torch.equal(got, linear(x, weight, bias, rng=(1, 2)))
    assert not torch.equal(got, linear(x, weight, bias, rng=(1, 3)))
    assert torch.equal(got, linear(x, weight, rng=(1, 2)) + bias), "the bias is digital"
    torch.manual_seed(3)
    first = linear(x, weight, bias)
    torch.manual_seed(3)
    assert torch.equal(first, linear(x, weight, bias)), "without rng torch's generator governs"
    matmul = hal.kernel("matmul", backend="photonic:0")
    assert relative_error(matmul(x, weight.T, rng=(1, 1)), x @ weight.T) < 0.2
    with pytest.raises(ContractError, match=r"pass \[\.\.\., K\] and \[N, K\]"):
        linear(x, weight.T)


def test_the_meter_sums_kernels_and_attention(draw: torch.Generator) -> None:
    linear = hal.kernel("linear", backend="photonic:0")
    x, weight = torch.randn(10, 80, generator=draw), torch.randn(30, 80, generator=draw)
    q = torch.randn(1, 2, 16, 32, generator=draw)
    with hal.meter() as meter:
        linear(x, weight)
        hal.attention(q, q, q, backend="photonic:0")
    record = meter.records["photonic:0"]
    assert record.calls == 2
    assert record.macs == 10 * 80 * 30 + 2 * 2 * 16 * 16 * 32
    both = (
        linear.estimate(x, weight).time.middle + hal.explain(q, q, q, backend="photonic:0").winner.estimate.time.middle
    )
    assert record.time.middle == pytest.approx(both)
    assert record.energy.middle > 0
    assert record.time.provenance == "assumed"


def test_profiles_from_the_environment_become_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hal_photonics.backend import PhotonicBackend

    second = tmp_path / "second.toml"
    second.write_text((BUNDLED / "generic.toml").read_text().replace('name = "generic"', 'name = "second"'))
    monkeypatch.setenv("HAL_PHOTONIC_PROFILES", f"{BUNDLED / 'generic.toml'}:{second}")
    assert [(d.id, d.model) for d in PhotonicBackend().devices()] == [
        ("photonic:0", "generic"),
        ("photonic:1", "second"),
    ]


def bus(folder: Path) -> Path:
    for address, vendor, device in (("0000:01:00.0", "0x1234", "0xABCD"), ("0000:02:00.0", "0x8086", "0x0001")):
        (folder / address).mkdir()
        (folder / address / "vendor").write_text(vendor + "\n")
        (folder / address / "device").write_text(device + "\n")
    (folder / "0000:03:00.0").mkdir()
    return folder


def test_cards_are_found_by_the_users_ids_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = bus(tmp_path)
    monkeypatch.delenv("HAL_PHOTONIC_PCI_IDS", raising=False)
    assert discovery.cards(place) == []
    monkeypatch.setenv("HAL_PHOTONIC_PCI_IDS", "1234:abcd, ffff:0000")
    assert discovery.cards(place) == [discovery.Card("0000:01:00.0", "1234:abcd")]
    assert "no public driver" in discovery.cards(place)[0].remark
    monkeypatch.setattr(discovery, "_BUS", place)
    from hal_photonics.backend import PhotonicBackend

    assert any("no public driver" in feature for feature in PhotonicBackend().devices()[0].features)
    monkeypatch.setenv("HAL_PHOTONIC_PCI_IDS", "lightmatter")
    with pytest.raises(ContractError, match="write vendor:device in hexadecimal"):
        discovery.cards(place)


def test_the_cards_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HAL_PHOTONIC_PCI_IDS", raising=False)
    assert main(["photonics", "cards"]) == 0
    assert "HAL_PHOTONIC_PCI_IDS=vendor:device" in capsys.readouterr().out
    monkeypatch.setenv("HAL_PHOTONIC_PCI_IDS", "fffe:fffe")
    assert main(["photonics", "cards", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"configured": ["fffe:fffe"], "cards": []}


def test_the_sweep_prints_draws_and_says_where_there_is_no_crossover(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sweep.png"
    words = ["photonics", "sweep", "--lengths", "256,1024", "--json", "--plot", str(picture)]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [p["length"] for p in shown["points"]] == [256, 1024]
    assert "no crossover up to 1,024" in shown["crossover"][0]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(words[:4]) == 0
    assert "no crossover" in capsys.readouterr().out


def test_the_sweep_measures_a_device_that_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["photonics", "sweep", "--lengths", "64", "--shape", "1,1,16", "--against", "cpu:0", "--json"]) == 0
    point = json.loads(capsys.readouterr().out)["points"][0]
    assert point["other_time"]["basis"] == "measured"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lengths", "many"], "--lengths 'many' was given"),
        (["--against", "published:tpu"], "published:h200"),
        (["--against", "photonic:0"], "it is simulated"),
        (["--device", "cpu:0"], "not made of a photonic profile"),
        (["--lengths", "9" * 5000], "pass lengths as whole numbers"),
        (["--plot", "sweep.doc"], "ends with .pdf, .png or .svg"),
        (["--plot", "no/where/sweep.png"], "a folder that exists"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["photonics", "sweep", *words]) == 2
    assert said in capsys.readouterr().err
