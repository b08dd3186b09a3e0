"""MiniLM with attention, linear layers, or both on the measured photonic chip, calibrated and not; and the cheapest set
of linear layers that has to stay digital for 90% of the nearest neighbours.

Task damage beside the energy: cosine to the float64 embedding, agreement of nearest neighbours, the share of the
model's multiply-accumulates on the optics, modelled time and energy of those, and the host's remainder. Simulated: the
chip's time and energy are modelled from the profile of its published figures, the host's time is measured here.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any, NamedTuple

import hal_nn.huggingface as bridge
import record
import torch
from hal_compare import models, texts
from hal_compare.lanes import LinearOnDevice, put_linear_layers
from hal_nn.sensitivity import DigitalSet, cheapest_digital_set
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hal_core as hal

TEXTS = Path(__file__).resolve().parent.parent / "examples" / "demo" / "texts"


#: Embeddings do not use the pooler, so it is on no device.
POOLER = frozenset({"pooler.dense"})
#: Noise draws by which a set that was found is judged start here: the search has seen none of them.
UNSEEN = 1000


class Sentences(NamedTuple):
    """Token batches of the sentences, their embeddings by the float64 run, and the model's multiply-accumulates."""

    batches: list[dict[str, Tensor]]
    exact: Tensor
    macs: int

    def kept(self, vectors: Tensor) -> float:
        """The share of sentences whose nearest neighbour is that of the float64 run."""
        return float((neighbours(vectors) == neighbours(self.exact)).double().mean())


class Optics(NamedTuple):
    """What runs on a device: attention, linear layers, or both, but for the digital ones."""

    name: str
    attention: bool
    linear: bool
    digital: frozenset[str] = frozenset()

    def network(self, model: models.Model, device: str) -> Any:
        """The model in this way."""
        network = copy.deepcopy(models.variant(model.network, bridge.NAME if self.attention else "sdpa"))
        if self.attention:
            bridge.set_device(network, device)
        if self.linear:
            put_linear_layers(network, device, self.digital | POOLER)
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


def cheapest_set(model: models.Model, device: str, work: Sentences, wanted: float, draws: int) -> DigitalSet:
    """The cheapest set of digital linear layers that keeps this share of the neighbours, over noise draws 0, 1, ..."""
    network = Optics("", attention=False, linear=True).network(model, device)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, LinearOnDevice)}
    known: dict[frozenset[str], list[Tensor]] = {}

    def vectors(digital: frozenset[str]) -> list[Tensor]:
        if digital not in known:
            for name, layer in layers.items():
                layer.digital = name in digital
            known[digital] = [drawn(network, work, draw) for draw in range(draws)]
            print(
                f"{time.strftime('%H:%M:%S')} {len(digital)} of {len(layers)} digital: {kept(digital):.1%}", flush=True
            )
        return known[digital]

    def kept(digital: frozenset[str]) -> float:
        return sum(work.kept(v) for v in vectors(digital)) / draws

    tokens = sum(int(batch["input_ids"].numel()) for batch in work.batches)
    return cheapest_digital_set(
        {name: tokens * layer.weight.numel() for name, layer in layers.items()},
        kept,
        wanted,
        damage=lambda digital: sum(float((v - work.exact).norm()) for v in vectors(digital)),
    )


def drawn(network: Any, work: Sentences, draw: int) -> Tensor:
    """Embeddings with one draw of the noise."""
    torch.manual_seed(draw)
    return embeddings(network, work.batches)


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--devices", default="lightmatter:0,lightmatter:1,luminous:0", help="(default %(default)s)")
    options.add_argument("--texts", type=int, default=64, help="sentences (default %(default)s)")
    options.add_argument("--keep", type=float, default=0.9, help="neighbours that the set keeps (default %(default)s)")
    options.add_argument("--keep-on", default="lightmatter:0", help="devices with a set (default %(default)s)")
    options.add_argument("--draws", type=int, default=2, help="of the noise, in the search (default %(default)s)")
    options.add_argument("--unseen", type=int, default=4, help="draws that judge its result (default %(default)s)")
    options = options.parse_args()
    model = models.load("minilm", "float32")
    listed = [text for file in texts.read([TEXTS / "sentences.txt"]) for text in file.texts][: options.texts]
    parts = [listed[i : i + 8] for i in range(0, len(listed), 8)]
    tokens = [dict(model.tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]
    exact = embeddings(copy.deepcopy(models.in_float64(model.network)), tokens)
    counter = FlopCounterMode(display=False)
    with counter:
        embeddings(model.network, tokens)
    work = Sentences(tokens, exact, counter.get_total_flops() // 2)
    rows, notes = [], []
    for device in options.devices.split(","):
        ways = [Optics("attention", True, False), Optics("linear layers", False, True), Optics("both", True, True)]
        if device in options.keep_on.split(","):
            start = time.process_time()
            found = cheapest_set(model, device, work, options.keep, options.draws)
            ways.append(Optics("linear layers, but for the set below", False, True, frozenset(found.layers)))
            notes.append(_found(found, device, ways[-1].network(model, device), work, options, start))
            print(notes[-1], flush=True)
        session: Any = hal.session(device)
        for way in ways:
            rows.append([device, session.profile.name, way.name, *_row(way, model, device, work)])
            print(time.strftime("%H:%M:%S"), *rows[-1], flush=True)
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
        *notes,
        "Simulated. Modelled time and energy: of what ran on the chip, with transfers; the host's energy is not known.",
        f"{len(listed)} sentences of examples/demo, neighbours among them, against float64. Noise of a row: seed 0.",
    ]
    record.publish(options, "photonics_minilm", "MiniLM on photonic devices", columns, rows, notes)


def _found(found: DigitalSet, device: str, network: Any, work: Sentences, options: Any, start: float) -> str:
    """What the search came to: the set, its work, and what it keeps with noise that the search has not seen."""
    unseen = [work.kept(drawn(network, work, UNSEEN + draw)) for draw in range(options.unseen)]
    return (
        f"{device}: cheapest set of digital linear layers that keeps {options.keep:.0%} of the neighbours: "
        f"{len(found.layers)} of {len(found.damage)}; {found.device_share:.1%} of these layers' multiply-accumulates "
        f"stay on the optics. Kept: {found.score:.1%} over the search's {options.draws} draws of the noise, "
        f"{sum(unseen) / len(unseen):.1%} over {len(unseen)} others ({min(unseen):.1%} to {max(unseen):.1%}). "
        f"{found.tried} sets were scored, after {len(found.damage)} layers alone; {time.process_time() - start:.0f} s "
        f"of processor time. Digital: {', '.join(found.layers)}."
    )


def _row(way: Optics, model: models.Model, device: str, work: Sentences) -> list[str]:
    network = way.network(model, device)
    with hal.meter() as meter:
        start = time.perf_counter()
        vectors = drawn(network, work, 0)
        wall = time.perf_counter() - start
    record_ = meter.records[device]
    cosines = (vectors * work.exact).sum(1)
    assert record_.time is not None
    assert record_.energy is not None
    return [
        f"{float(cosines.mean()):.4f}",
        f"{float(cosines.min()):.4f}",
        f"{work.kept(vectors):.0%}",
        f"{record_.macs / work.macs:.1%}",
        f"{record_.time.middle * 1e3:.3g}",
        f"{(wall - record_.wall) * 1e3:.3g}",
        f"{record_.energy.middle:.3g}",
        f"{record_.time.basis}, {record_.time.provenance}",
    ]


if __name__ == "__main__":
    main()
