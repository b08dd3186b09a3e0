"""MiniLM with its linear layers on the optics: the neighbours that it keeps, and the layers that must be digital."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hal_compare import models, texts
from hal_nn.sensitivity import DigitalSet, cheapest_digital_set
from hal_photonics import optical_layers, to_optics
from torch import Tensor, nn

from .optics import Products

TEXTS = Path(__file__).resolve().parents[2] / "examples" / "demo" / "texts" / "sentences.txt"


class MiniLM:
    """The model with its sentences as tokens, and the float64 run's neighbours.

    Attributes:
        batches: keyword arguments of the network. exact: embeddings in float64, [sentences, dim].
    """

    def __init__(self, sentences: int) -> None:
        model = models.load("minilm", "float32")
        listed = [text for file in texts.read([TEXTS]) for text in file.texts][:sentences]
        parts = [listed[i : i + 8] for i in range(0, len(listed), 8)]
        self.network: Any = model.network
        self.batches = [
            dict(model.tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts
        ]
        self.exact = self.embeddings(models.in_float64(model.network))

    def embeddings(self, network: Any) -> Tensor:
        """Mean-pooled, normalised sentence vectors, float64."""
        found = []
        with torch.no_grad():
            for batch in self.batches:
                hidden = network(**batch).last_hidden_state.double()
                keep = batch["attention_mask"].unsqueeze(-1)
                found.append((hidden * keep).sum(1) / keep.sum(1))
        return nn.functional.normalize(torch.cat(found), dim=-1)

    def kept(self, vectors: Tensor) -> float:
        """The share of sentences whose nearest neighbour is that of the float64 run."""
        mine, theirs = ((v @ v.T).fill_diagonal_(-2).argmax(1) for v in (vectors, self.exact))
        return float((mine == theirs).double().mean())

    def on_products(self, products: Products) -> Any:
        """The model with every linear layer but the pooler's, which embeddings do not use, by these products."""
        return to_optics(self.network, products, digital=["pooler.*"], passes=products.passes)

    def cheapest_set(self, products: Products, wanted: float, draws: int = 2) -> DigitalSet:
        """The cheapest set of digital layers that keeps this share of the neighbours."""
        network, exact = self.on_products(products), Products()
        layers = dict(optical_layers(network))
        known: dict[frozenset[str], list[Tensor]] = {}

        def vectors(digital: frozenset[str]) -> list[Tensor]:
            if digital not in known:
                for name, layer in layers.items():
                    layer.multiply = exact if name in digital else products
                known[digital] = [self.embeddings(network) for _ in range(draws)]
            return known[digital]

        tokens = sum(int(batch["input_ids"].numel()) for batch in self.batches)
        macs = {name: tokens * layer.weight.numel() for name, layer in layers.items()}
        return cheapest_digital_set(
            macs,
            lambda digital: sum(self.kept(v) for v in vectors(digital)) / draws,
            wanted,
            damage=lambda digital: sum(float((v - self.exact).norm()) for v in vectors(digital)),
        )
