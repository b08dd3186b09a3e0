"""Time and energy: parts that add up, the equation, and a component model against a paper."""

from __future__ import annotations

import math

import pytest
import torch
from hal_photonics.cost import ENERGY_PARTS, TIME_PARTS, attention_cost, product_cost, throughput
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator.components import LIGHTENING_BASE, component_power
from hal_photonics.simulator.work import attention_work
from hal_photonics.tiling import narrowed
from hal_simulation import ProductSize

from hal_core import AttentionRequest, Basis, Causal, Provenance


def request(n: int = 512, **changes: object) -> AttentionRequest:
    plain = {
        "batch": 2,
        "heads_q": 8,
        "heads_kv": 4,
        "len_q": n,
        "len_k": n,
        "dim_qk": 96,
        "dim_v": 64,
        "dtype": "float32",
    }
    return AttentionRequest(**(plain | changes))


@pytest.mark.parametrize("duty", [1.0, 0.5])
@pytest.mark.parametrize("causal", list(Causal))
def test_parts_add_to_their_totals_exactly(generic: Profile, duty: float, causal: Causal) -> None:
    cost = attention_cost(generic, request(causal=causal), duty=duty, state="derated")
    assert tuple(cost.seconds) == TIME_PARTS
    assert tuple(cost.joules) == ENERGY_PARTS
    assert cost.time == sum(cost.seconds.values())
    assert cost.energy == sum(cost.joules.values())
    assert all(value >= 0 for value in (*cost.seconds.values(), *cost.joules.values()))
    estimate = cost.estimate()
    assert sum(estimate.parts.values()) == pytest.approx(estimate.time.middle, rel=1e-12)
    assert estimate.time.basis is Basis.MODELLED
    assert estimate.time.provenance is Provenance.ASSUMED


def test_the_time_is_its_equation(generic: Profile) -> None:
    """T = ceil(tiles / cores) (t_w + rows / f) + softmax + host, by hand for 64 x 64 arrays and 2 cores."""
    r = request(300, batch=1, heads_kv=1)
    tiles = math.ceil(300 / 64) * math.ceil(96 / 64) + math.ceil(300 / 64) * math.ceil(64 / 64)
    assert tiles % 2, "the last round fills one core of two"
    optics = math.ceil(tiles / 2) * (
        generic["time.weight_load"] + 8 * 300 / generic["time.clock"] + generic["time.flight"]
    )
    softmax = 8 * 300 * 300 / generic["time.digital_rate"]
    host = generic["time.host_latency"] + r.bytes_moved / generic["time.host_bandwidth"]
    cost = attention_cost(generic, r)
    assert cost.time == pytest.approx(optics + softmax + host, rel=1e-12)
    watts = generic["power.electrical"] + generic["power.laser"] / generic["power.laser_efficiency"]
    digital = generic["power.electrical"] * generic["power.share_digital"]
    assert cost.energy == pytest.approx(watts * optics + digital * softmax + generic["power.host"] * host, rel=1e-12)


@pytest.mark.parametrize(("len_q", "len_k", "window"), [(300, 300, None), (130, 500, (40, 0)), (500, 130, None)])
@pytest.mark.parametrize("causal", [Causal.TOP_LEFT, Causal.BOTTOM_RIGHT])
def test_hidden_rows_are_not_streamed(
    generic: Profile, len_q: int, len_k: int, window: tuple[int, int] | None, causal: Causal
) -> None:
    from hal_core import dense_mask

    r = request(len_q=len_q, len_k=len_k, causal=causal, window=window, dim_qk=64, dim_v=64, heads_kv=8, batch=1)
    visible = dense_mask(r, len_q, len_k)
    assert visible is not None
    seen = [int(part.any(1).sum()) for part in visible.split(64, dim=1)]
    if window is not None:  # 41 keys: PV in tiles of 64 inputs, as wide as the array
        assert narrowed(window, 64) == 64
    work = attention_work(generic, r)
    assert work.rows == 8 * 2 * sum(seen)
    assert work.loads == 8 * 2 * sum(count > 0 for count in seen)


def test_narrow_windows_narrow_the_tiles_of_pv(generic: Profile) -> None:
    """Fewer keys than the array has inputs: narrower tiles, with a readout range to match, and more loads."""
    assert [narrowed(w, 128) for w in (None, (None, 0), (4, 7), (20, 20), (400, 0))] == [128, 128, 32, 64, 128]
    plain = {"dim_qk": 64, "dim_v": 64, "heads_kv": 8, "batch": 1}
    wide, narrow = (attention_work(generic, request(512, window=w, **plain)) for w in ((40, 20), (8, 8)))
    assert narrow.loads == 8 * (8 + 16)
    assert wide.loads == 8 * (8 + 8)


def test_work_grows_with_the_square_of_the_length(generic: Profile) -> None:
    rows = [attention_work(generic, request(n)).rows for n in (1024, 2048)]
    assert rows[1] == 4 * rows[0]


def test_resident_weights_are_not_moved(generic: Profile) -> None:
    moved, resident = (
        product_cost(generic, ProductSize(1, 10, 512, 512, "float32"), resident=r) for r in (False, True)
    )
    assert moved.seconds["host"] - resident.seconds["host"] == pytest.approx(
        512 * 512 * 4 / generic["time.host_bandwidth"]
    )
    assert resident.macs == 10 * 512 * 512


def test_throughput_is_the_array_times_the_clock(generic: Profile) -> None:
    assert throughput(generic) == 2 * 2 * 64 * 64 * generic["time.clock"]


@pytest.mark.parametrize(("bits", "watts"), [(4, 14.75), (8, 50.94)])
def test_component_powers_add_to_the_papers_totals(bits: int, watts: float) -> None:
    """Row 12, an arithmetic check: Lightening-Transformer's base design."""
    assert sum(component_power(LIGHTENING_BASE, bits).values()) == pytest.approx(watts, rel=0.01)


def test_the_digital_part_alone_is_free_of_optics(generic: Profile) -> None:
    alone = attention_cost(generic, request(), host=False)
    assert alone.seconds["host"] == alone.seconds["softmax"] == 0
    assert alone.time == pytest.approx(alone.optics_time)
    assert torch.isfinite(torch.tensor(alone.energy))
