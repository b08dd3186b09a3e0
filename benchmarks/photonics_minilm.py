"""MiniLM with attention alone on the measured photonic chip, and with its projections too, calibrated and not.

Task damage beside the energy: cosine to the float64 embedding, agreement of nearest neighbours, the share of the
model's multiply-accumulates on the optics, modelled time and energy of those, and the host's remainder. Simulated: the
chip's time and energy are modelled from the profile of its published figures, the host's time is measured here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hal_nn.huggingface as bridge
import record
import torch
from hal_compare import models, texts
from hal_compare.lanes import LinearOnDevice
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hal_core as hal

TEXTS = Path(__file__).resolve().parent.parent / "examples" / "demo" / "texts"


def with_projections(network: nn.Module, device: str) -> nn.Module:
    """The network with every linear layer on a device."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LinearOnDevice(child, device))
    return network


def embeddings(network: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled, normalised sentence vectors [texts, dim], float64."""
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden = network(**batch).last_hidden_state.double()
            keep = batch["attention_mask"].unsqueeze(-1)
            found.append((hidden * keep).sum(1) / keep.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def neighbours(vectors: Tensor) -> Tensor:
    scores = vectors @ vectors.T
    return scores.fill_diagonal_(-2).argmax(1)


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--devices", default="lightmatter:0,lightmatter:1,luminous:0", help="(default %(default)s)")
    options.add_argument("--texts", type=int, default=64, help="sentences (default %(default)s)")
    options = options.parse_args()
    model = models.load("minilm", "float32")
    listed = [text for file in texts.read([TEXTS / "sentences.txt"]) for text in file.texts][: options.texts]
    parts = [listed[i : i + 8] for i in range(0, len(listed), 8)]
    tokens = [dict(model.tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]
    exact = embeddings(copy.deepcopy(models.in_float64(model.network)), tokens)
    counter = FlopCounterMode(display=False)
    with counter:
        embeddings(model.network, tokens)
    macs = counter.get_total_flops() // 2
    rows = []
    for device in options.devices.split(","):
        for what, change in (("attention alone", None), ("with projections", with_projections)):
            session: Any = hal.session(device)
            rows.append([device, session.profile.name, what, *_row(model, device, change, tokens, exact, macs)])
    columns = [
        "device",
        "profile",
        "on the optics",
        "cosine, mean",
        "cosine, least",
        "same neighbour",
        "share of MACs",
        "modelled ms",
        "host ms, measured",
        "modelled J",
        "origin",
    ]
    notes = [
        "Simulated. Modelled time and energy: of what ran on the chip, with transfers; the host's energy is not known.",
        f"{len(listed)} sentences of examples/demo, neighbours among them, against float64. Noise: torch seed 0.",
    ]
    record.publish(options, "photonics_minilm", "MiniLM on photonic devices", columns, rows, notes)


def _row(
    model: Any,
    device: str,
    change: Callable[[nn.Module, str], nn.Module] | None,
    tokens: list[dict[str, Tensor]],
    exact: Tensor,
    macs: int,
) -> list[str]:
    network = bridge.set_device(models.variant(model.network, bridge.NAME), device)
    if change is not None:
        network = change(copy.deepcopy(network), device)
    torch.manual_seed(0)
    with hal.meter() as meter:
        start = time.perf_counter()
        vectors = embeddings(network, tokens)
        wall = time.perf_counter() - start
    record_ = meter.records[device]
    cosines = (vectors * exact).sum(1)
    agreement = float((neighbours(vectors) == neighbours(exact)).double().mean())
    assert record_.time is not None
    assert record_.energy is not None
    return [
        f"{float(cosines.mean()):.4f}",
        f"{float(cosines.min()):.4f}",
        f"{agreement:.0%}",
        f"{record_.macs / macs:.1%}",
        f"{record_.time.middle * 1e3:.3g}",
        f"{(wall - record_.wall) * 1e3:.3g}",
        f"{record_.energy.middle:.3g}",
        f"{record_.time.basis}, {record_.time.provenance}",
    ]


if __name__ == "__main__":
    main()
