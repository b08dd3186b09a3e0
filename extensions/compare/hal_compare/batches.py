"""What a model is called with: texts as token batches, sorted by length, padded on the right, each within one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from .texts import TextFile


@attrs.frozen
class Batch:
    """A few texts, images or clips of one file or folder.

    Attributes:
        group: index of the file. texts: indices of the texts, counted over all files.
        ids, mask: int64 [texts, length]; mask is 1 for a real token. Of images and clips, which have no tokens, [n, 1].
        features: what the model is called with instead of tokens, by name, float32.
        start: the token that a decoder starts with, of an encoder-decoder of text; it is given the text itself,
            one position late. None for any other model.
    """

    group: int
    texts: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    features: dict[str, Tensor] | None = None
    start: int | None = None

    def inputs(self, place: str, dtype: torch.dtype) -> dict[str, Any]:
        """What the model is called with. A batch without padding has no mask."""
        if self.features is not None:
            return {
                name: value.to(place, dtype if value.is_floating_point() else None)
                for name, value in self.features.items()
            }
        inputs: dict[str, Any] = {"input_ids": self.ids.to(place), "use_cache": False}
        if self.start is not None:
            first = torch.full_like(self.ids[:, :1], self.start)
            inputs["decoder_input_ids"] = torch.cat([first, self.ids[:, :-1]], dim=1).to(place)
        return inputs if bool(self.mask.all()) else inputs | {"attention_mask": self.mask.to(place)}


@attrs.frozen
class Tokens:
    """All texts as tokens.

    Attributes:
        batches: in the order to run. lengths: tokens of each text. cut: how many texts of each file were shortened.
    """

    batches: tuple[Batch, ...]
    lengths: tuple[int, ...]
    cut: tuple[int, ...]


def tokenize(
    files: Sequence[TextFile], tokenizer: Any, batch_size: int, longest: int | None, start: int | None = None
) -> Tokens:
    """Tokenize with the model's own tokenizer and cut into batches of neighbours in length.

    Args:
        longest: most tokens of a text, special tokens included; None for no limit. start: see `Batch`.
    """
    batches, lengths, cut, first = [], [], [], 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for group, file in enumerate(files):
        whole = [tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in file.texts]
        if longest is None:
            ids = whole
        else:
            ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in file.texts]
        ids = [one or [pad] for one in ids]  # a text of unknown signs alone may give no token
        cut.append(sum(len(one) < len(all_of_it) for one, all_of_it in zip(ids, whole, strict=True)))
        lengths += [len(one) for one in ids]
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        for place in range(0, len(order), batch_size):
            members = order[place : place + batch_size]
            batches.append(_padded(group, [first + i for i in members], [ids[i] for i in members], pad, start))
        first += len(ids)
    return Tokens(tuple(batches), tuple(lengths), tuple(cut))


def _padded(group: int, texts: list[int], ids: list[list[int]], pad: int, start: int | None) -> Batch:
    length = max(len(one) for one in ids)
    padded = torch.tensor([one + [pad] * (length - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids])
    return Batch(group, tuple(texts), padded, mask, start=start)
