"""Errors against the float64 run, and what they do to the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from hal_core import HalError

from .batches import Batch
from .models import Pooling


@attrs.frozen
class Outputs:
    """What is kept of a model's run over one batch.

    Attributes:
        hidden: one [texts, length, hidden] for the embeddings and for each layer; of an encoder-decoder the encoder's,
            then the decoder's.
        vectors: [texts, hidden], float64: the embedding, or a causal model's last token.
        tokens: int64 [texts, length], the most likely next token, or class; None for an embedding model. losses:
            float64 [texts, length - 1], of the token that follows; None without tokens that follow.
    """

    hidden: tuple[Tensor, ...]
    vectors: Tensor
    tokens: Tensor | None = None
    losses: Tensor | None = None


def read_outputs(outputs: Any, batch: Batch, kind: str, pooling: Pooling) -> Outputs:
    """Keep what the metrics need, on the CPU.

    Raises:
        HalError: the model gives no hidden states.
    """
    names = ("encoder_hidden_states", "decoder_hidden_states", "hidden_states")
    states = [state for name in names for state in getattr(outputs, name, None) or ()]
    if not states:
        raise HalError(f"{type(outputs).__name__} has no hidden states, which compare reads: give another model")
    hidden = tuple(_sequence(state.detach().to("cpu")) for state in states)
    last = pool(hidden[-1].double(), fitted(batch.mask, hidden[-1]), "lasttoken" if kind in NEXT else pooling)
    if kind == "embedding":
        return Outputs(hidden, last)
    logits = outputs.logits.detach().to("cpu")
    logits = logits if logits.ndim == 3 else logits.unsqueeze(1)
    if batch.features is not None:
        return Outputs(hidden, last, logits.argmax(-1))
    guesses = logits[:, :-1] if kind == "causal" else logits[:, 1:]  # an encoder-decoder's are one position late
    losses = torch.nn.functional.cross_entropy(
        guesses.double().flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
    )
    return Outputs(hidden, last, logits.argmax(-1), losses.view(len(batch.texts), -1))


#: Kinds that decide on the next token.
NEXT = ("causal", "seq2seq")


def _sequence(state: Tensor) -> Tensor:
    """Hidden states as [texts, length, hidden]; feature maps [texts, channels, height, width] row by row."""
    if state.ndim == 4:
        return state.flatten(2).transpose(1, 2)
    return state.flatten(1, -2) if state.ndim > 4 else state if state.ndim == 3 else state.unsqueeze(1)


def fitted(mask: Tensor, hidden: Tensor) -> Tensor:
    """The mask for states of a length; all of them where they are no tokens."""
    if mask.shape[1] == hidden.shape[1]:
        return mask
    return torch.ones(hidden.shape[:2], dtype=mask.dtype)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, [texts, hidden], of its real tokens."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def errors(hidden: Tensor, reference: Tensor, mask: Tensor) -> list[float]:
    """||hidden - reference|| / ||reference|| of each text, over its real tokens."""
    real = fitted(mask, hidden).unsqueeze(-1).double()
    distance = ((hidden.double() - reference) * real).flatten(1).norm(dim=1)
    relative: list[float] = (distance / (reference * real).flatten(1).norm(dim=1)).tolist()
    return relative


class Tally:
    """One repeat of one row, summed over batches."""

    def __init__(self, texts: int) -> None:
        self._texts = texts
        self.errors: dict[int, float] = {}
        self.cosines: dict[int, float] = {}
        self.layers: dict[int, list[float]] = {}
        self._vectors: dict[int, Tensor] = {}
        self._same, self._positions = 0, 0
        self._loss, self._followers = 0.0, 0

    def add(self, batch: Batch, got: Outputs, reference: Outputs) -> None:
        """Compare one batch. `got` may be `reference` itself, for the reference's own task figures."""
        by_layer = [errors(mine, theirs, batch.mask) for mine, theirs in zip(got.hidden, reference.hidden, strict=True)]
        cosines = torch.nn.functional.cosine_similarity(got.vectors, reference.vectors, dim=-1).tolist()
        for place, text in enumerate(batch.texts):
            self.errors[text] = by_layer[-1][place]
            self.layers[text] = [layer[place] for layer in by_layer]
            self.cosines[text] = cosines[place]
            self._vectors[text] = got.vectors[place]
        if got.tokens is None or reference.tokens is None:
            return
        real = fitted(batch.mask, got.tokens).bool()
        self._same += int((got.tokens == reference.tokens)[real].sum())
        self._positions += int(real.sum())
        if got.losses is not None:
            self._loss += float(got.losses[real[:, 1:]].sum())
            self._followers += int(real[:, 1:].sum())

    @property
    def decisions(self) -> int:
        return self._positions or self._texts

    @property
    def layer_means(self) -> list[float]:
        """The mean error after each layer."""
        return [sum(column) / len(column) for column in zip(*self.layers.values(), strict=True)]

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None for an embedding model, or texts of one token."""
        return float(torch.tensor(self._loss / self._followers, dtype=torch.float64).exp()) if self._followers else None

    def agreement(self, reference: Tally) -> float:
        """Share of texts whose nearest neighbour, or of positions whose next token, is the reference's."""
        if self._positions:
            return self._same / self._positions
        mine, theirs = neighbours(self._ordered()), neighbours(reference._ordered())
        return float((mine == theirs).double().mean())

    def _ordered(self) -> Tensor:
        return torch.stack([self._vectors[text] for text in range(self._texts)])


def neighbours(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """Index of each vector's nearest other by cosine, [n]."""
    unit = torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(-1)
