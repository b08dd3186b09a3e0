"""Published latency and energy of whole transformers on Lightening-Transformer, and the same by the cost model."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from hal_photonics.backend import BUNDLED
from hal_photonics.cost import Cost, encoder_cost, product_cost
from hal_photonics.profiles.profile import load
from hal_simulation import ProductSize


class Encoder(NamedTuple):
    """A transformer: its name, tokens, width and heads. Twelve layers each."""

    name: str
    tokens: int
    dim: int
    heads: int


DEIT_T, DEIT_B = Encoder("DeiT-T", 197, 192, 3), Encoder("DeiT-B", 197, 768, 12)
BERT_128, BERT_384 = Encoder("BERT-base, 128", 128, 768, 12), Encoder("BERT-base, 384", 384, 768, 12)
#: Encoder and bits: mJ and ms of the authors' published simulator of the base design, with all optimisations
#: (github.com/zhuhanqing/Lightening-Transformer at 7c3d4ad, run for these figures).
PUBLISHED = {
    (DEIT_T, 4): (0.38430, 0.019353),
    (DEIT_T, 8): (1.20547, 0.019437),
    (DEIT_B, 4): (5.43715, 0.265279),
    (DEIT_B, 8): (16.98198, 0.265615),
    (BERT_128, 4): (3.95167, 0.167447),
    (BERT_128, 8): (11.76653, 0.167463),
    (BERT_384, 4): (9.32392, 0.516114),
    (BERT_384, 8): (30.53457, 0.516130),
}

#: mJ by part of the same, over the twelve layers. What it calls RF holds our registers and network.
PUBLISHED_PARTS = {
    (BERT_128, 4): {
        "laser": 0.12894,
        "DAC": 0.53321,
        "modulators": 0.66886,
        "detectors": 0.41056,
        "amplifiers": 0.095551,
        "ADC": 0.11785,
        "adders": 0.001451,
        "registers, network": 0.12903,
        "local buffers": 0.35841,
        "global buffer": 0.18157,
        "DRAM": 1.325,
    },
    (BERT_128, 8): {
        "laser": 2.063,
        "DAC": 4.2657,
        "modulators": 0.66886,
        "detectors": 0.41056,
        "amplifiers": 0.095551,
        "ADC": 0.23569,
        "adders": 0.001451,
        "registers, network": 0.25807,
        "local buffers": 0.72985,
        "global buffer": 0.38656,
        "DRAM": 2.65,
    },
}


def costs(encoder: Encoder, bits: int) -> list[Cost]:
    """Of the encoder's twelve layers, and of what a DeiT has beside them: the patches' embedding and the classifier."""
    profile = load(BUNDLED / f"lightening-{bits}.toml")
    found = [encoder_cost(profile, tokens=encoder.tokens, dim=encoder.dim, heads=encoder.heads, layers=12)]
    if encoder.name.startswith("DeiT"):
        for rows, length, outputs in ((encoder.tokens - 1, 768, encoder.dim), (1, encoder.dim, 1000)):
            found.append(product_cost(profile, ProductSize(1, rows, outputs, length, "float32"), resident=True))
    return found


def modelled(encoder: Encoder, bits: int) -> tuple[float, float, dict[str, float]]:
    """(mJ, ms, mJ by part) of an encoder. Parts as in PUBLISHED_PARTS; one that costs nothing is left out."""
    parts: dict[str, float] = defaultdict(float)
    each = costs(encoder, bits)
    for cost in each:
        for part, energy in cost.joules.items():
            parts["registers, network" if part in ("registers", "network") else part] += 1e3 * energy
    joules = {part: energy for part, energy in parts.items() if energy}
    return sum(joules.values()), 1e3 * sum(cost.time for cost in each), joules
