"""Reports: energy is counted actions times the table, no roof is passed, and what is not calibrated says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hal_kpu.cost import attention_cost
from hal_kpu.profiles.profile import load, names
from hal_kpu.simulator.attention.program import fused
from hal_kpu.simulator.energy import energy
from hal_kpu.simulator.report import report
from hal_kpu.simulator.stats import new_stats
from hal_kpu.simulator.transactional import run_transactional
from hal_kpu.tiling import ROUNDS, filled_up
from hal_simulation import RELATIVE_UNCERTAINTY

from hal_core import AttentionRequest, Causal

_REQUEST = AttentionRequest(1, 8, 8, 256, 256, 64, 64, "float32")


def made(name="t64", request=_REQUEST, **changes):
    profile = load(name).replace(**changes)
    stats = new_stats(profile)
    stats.add(run_transactional(fused(profile, request), profile), "attention")
    return report("attention", stats, profile)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("bandwidth", [1.0, 0.05])
def test_no_level_passes_its_roof(name, bandwidth):
    r = made(name, replace(_REQUEST, heads_q=3, heads_kv=3), dram__bandwidth=bandwidth * load(name)["dram.bandwidth"])
    assert [roof.level for roof in r.roofs] == ["dram", "l3", "l2", "l1"]
    for roof in r.roofs:
        assert 0 < roof.achieved <= roof.roof <= r.peak
        assert roof.achieved * r.stats.seconds == pytest.approx(r.stats.matmul_flops + r.stats.vector_operations)


def test_a_memory_bound_run_comes_close_to_the_roof_of_its_memory():
    roofs = {roof.level: roof.share for roof in made(dram__bandwidth=2e9, engines__dma_bandwidth=2e9).roofs}
    assert roofs["dram"] > 0.8
    assert max(roofs["l3"], roofs["l2"], roofs["l1"]) < 0.5


def test_energy_is_counts_times_the_table():
    r = made()
    found, p, s = r.energy, r.profile, r.stats
    assert found.levels["dram"] == pytest.approx(s.traffic["dram"] * 10e-12)
    assert found.compute["mac_fp32"] == pytest.approx(s.total_macs * 0.3e-12)
    assert found.static == pytest.approx(p["power.static"] * s.seconds)
    assert sum(found.parts().values()) == pytest.approx(found.total)
    doubled = p.replace(energy__dram=20, power__static=0)
    other = energy(s, doubled)
    assert other.total == pytest.approx(found.total - found.static + found.levels["dram"])


def test_a_report_never_hides_what_it_is():
    data = json.loads(json.dumps(made().to_dict()))
    assert data["fidelity"] == "simulated"
    assert data["basis"] == "modelled"
    assert data["provenance"] == "assumed"
    assert data["energy"]["calibrated"] is False
    assert data["energy"]["table"].startswith("t64: ")
    assert data["energy"]["node"]


def test_the_table_and_the_picture(tmp_path, capsys):
    r = made()
    r.show()
    text = capsys.readouterr().out
    assert "calibrated: false" in text
    assert "no KPU was measured" in text
    pytest.importorskip("matplotlib")
    assert r.draw(tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_equal_tiles_share_one_simulation_and_their_cost():
    profile = load("t64")
    a, b = (attention_cost(profile, replace(_REQUEST, len_q=n, len_k=n)) for n in (225, 256))
    assert a is b
    assert filled_up(profile, replace(_REQUEST, len_q=225)).len_q == 256


@pytest.mark.parametrize("causal", [Causal.NONE, Causal.BOTTOM_RIGHT])
@pytest.mark.parametrize(("name", "heads", "length"), [("t32x32", 3, 2048), ("t64", 40, 512), ("t768", 8, 1024)])
def test_a_call_too_large_to_simulate_costs_what_simulating_it_gives(causal, name, heads, length, monkeypatch):
    profile = load(name)
    large = replace(_REQUEST, heads_q=heads, heads_kv=heads, len_q=length, len_k=length, causal=causal)
    monkeypatch.setattr("hal_kpu.tiling.LONGEST", 1 << 20)
    monkeypatch.setattr("hal_kpu.tiling.ROUNDS", 1 << 20)
    whole = attention_cost(profile, large)
    assert whole.scale == 1
    monkeypatch.setattr("hal_kpu.tiling.LONGEST", 32)
    monkeypatch.setattr("hal_kpu.tiling.ROUNDS", ROUNDS)
    part = attention_cost(profile, large)
    assert part.scale > 1.5
    assert part.seconds == pytest.approx(whole.seconds, rel=0.2)


def test_an_estimate_is_an_interval_as_wide_as_its_worst_figure():
    profile = load("t64")
    estimate = attention_cost(profile, _REQUEST).estimate()
    assert estimate.time.provenance == "assumed"
    assert estimate.time.low == pytest.approx(estimate.time.middle * (1 - RELATIVE_UNCERTAINTY["assumed"]))
    assert sum(estimate.parts.values()) == pytest.approx(estimate.time.middle)
    assert "not calibrated" in estimate.energy.source
