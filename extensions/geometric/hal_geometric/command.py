"""`hal geometric`: what a model's heads do on real text, and where its attention graph narrows and smooths."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hal_core import ContractError
from hal_core.plugin_api import CommandResult, Table

_ABOUT = "a model's heads by entropy, effective rank and distance, and where its attention narrows and over-smooths"


def add_parser(subparsers: Any) -> None:
    """Add `geometric` to the subparsers of `hal`."""
    parser = subparsers.add_parser("geometric", help=_ABOUT, description=_ABOUT)
    parser.add_argument("model", metavar="MODEL", help="folder with config.json and *.safetensors, or 'minilm'")
    parser.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        type=Path,
        default=[],
        help="a UTF-8 file, or a folder of *.txt: texts divided by blank lines, or one a line; may be repeated "
        "(default: a short sample)",
    )
    parser.add_argument("--texts", metavar="N", type=int, default=8, help="texts that are read (default: 8)")
    parser.add_argument("--length", metavar="N", type=int, default=128, help="tokens of a text (default: 128)")
    parser.add_argument("--top", metavar="N", type=int, default=10, help="heads in the table (default: 10)")
    parser.add_argument("--device", metavar="ID", default="cpu:0", help="that measures the heads (default: cpu:0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> CommandResult:
    """Measure, and show layers and the most redundant heads.

    Raises:
        HalError: a model, text, device or number that cannot be.
    """
    for name, least in (("texts", 1), ("length", 2), ("top", 0)):
        if getattr(options, name) < least:
            raise ContractError(f"--{name} is {getattr(options, name)}: give {least} or more.")
    import hal_core as hal

    from .heads import ModelHeads

    hal.device(options.device)  # refused before a model is loaded
    model = ModelHeads(options.model)
    from hal_compare import texts

    read = [text for file in texts.read(options.text) for text in file.texts][: options.texts]
    tokens = [found for text in read if (found := model.tokens(text, options.length)).shape[1] > 1]
    if not tokens:
        raise ContractError("the texts have no two tokens: give longer ones with --text FILE.")
    layers = measure(model, tokens, options.device, options.progress)
    data = {"model": options.model, "device": options.device, "tokens": [t.shape[1] for t in tokens], "layers": layers}
    text = (
        f"{options.model} on {len(tokens)} texts of {min(data['tokens'])} to {max(data['tokens'])} tokens, measured on "
        f"{options.device}."
    )
    return CommandResult(data, [_layers(layers), _heads(layers, options.top)], [text])


def measure(
    model: Any, tokens: Sequence[Any], device: str, progress: Callable[[str, float], None] = lambda text, share: None
) -> list[dict[str, Any]]:
    """For each layer of a `ModelHeads`: its name, "heads" (a dict each), and the "graph" of the longest text.

    Numbers of heads are means over rows and texts.
    """
    from . import graph, heads

    sums: dict[str, list[Any]] = {}
    longest = max(tokens, key=lambda t: t.shape[1])
    graphs: dict[str, Any] = {}
    for n, each in enumerate(tokens):
        calls = model.read(each)[1]
        for m, call in enumerate(calls):
            progress(f"text {n + 1} of {len(tokens)}, {call.name}", (n + m / len(calls)) / len(tokens))
            sums.setdefault(call.name, []).append(call.numbers(device))
            if each is longest:
                graphs[call.name] = graph.diagnose(call.weights().mean(0))
    words = model.tokenizer.convert_ids_to_tokens(longest[0].tolist())
    layers = []
    for name, found in sums.items():
        numbers = heads.mean(found)
        columns = {key: getattr(numbers, key).tolist() for key in _COLUMNS}
        columns["nearest"] = [d if math.isfinite(d) else None for d in columns["nearest"]]  # a head alone has none
        rows = [{"head": h} | {key: values[h] for key, values in columns.items()} for h in range(len(numbers.rank))]
        seen = graphs[name]
        edges = [
            {"tokens": [words[a], words[b]], "places": [a, b], "curvature": k}
            for (a, b), k in zip(seen.edges.tolist(), seen.curvature.tolist(), strict=True)
        ]
        halving = seen.halving if math.isfinite(seen.halving) else None
        layers.append(
            {"layer": name, "heads": rows, "graph": {"edges": edges, "second": seen.second, "halving": halving}}
        )
    return layers


_COLUMNS = ("entropy", "uniform", "rank", "kept", "nearest", "neighbour")


def _mean(layer: dict[str, Any], key: str) -> float:
    return float(sum(head[key] for head in layer["heads"]) / len(layer["heads"]))


def _layers(layers: list[dict[str, Any]]) -> Table:
    rows = []
    for layer in layers:
        graph = layer["graph"]
        edge = graph["edges"][0] if graph["edges"] else None
        narrow = "no edge" if edge is None else f"{' - '.join(edge['tokens'])} ({edge['curvature']:.2f})"
        rows.append(
            [
                layer["layer"],
                f"{_mean(layer, 'entropy'):.2f} of {_mean(layer, 'uniform'):.2f}",
                f"{_mean(layer, 'rank'):.1f}",
                f"{_mean(layer, 'kept'):.2f}",
                "never" if graph["halving"] is None else f"{graph['halving']:.2f}",
                narrow,
            ]
        )
    notes = [
        "Entropy: mean of the heads, nats, of that of uniform weights. Rank: effective rank of the heads' outputs. "
        "Spread kept: of the values' spread about their mean; near 0, attention makes all tokens alike.",
        "Halves in: applications of the layer's mean weights after which what tells tokens apart has halved. Narrowest "
        "edge: of the graph of weights above uniform ones, by the lower bound of its curvature: the more negative, the "
        "fewer ways around it. Both for the longest text.",
    ]
    columns = ["layer", "entropy", "rank", "spread kept", "halves in", "narrowest edge (curvature)"]
    return Table("Layers", columns, rows, notes)


def _heads(layers: list[dict[str, Any]], top: int) -> Table:
    every = [(layer["layer"], head) for layer in layers for head in layer["heads"] if head["nearest"] is not None]
    rows = [
        [
            name,
            str(head["head"]),
            str(head["neighbour"]),
            f"{head['nearest']:.3f}",
            f"{head['entropy']:.2f}",
            f"{head['rank']:.1f}",
            f"{head['kept']:.2f}",
        ]
        for name, head in sorted(every, key=lambda each: each[1]["nearest"])[:top]
    ]
    note = (
        "Distance: Fisher-Rao, 0 to pi, mean over rows, to the nearest head of the layer: small where a head repeats."
    )
    columns = ["layer", "head", "nearest", "distance", "entropy", "rank", "spread kept"]
    return Table("Most redundant heads", columns, rows, [note])
