"""Texts of exactly a number of tokens: pieces of the files, or random where the files have too little text.

Texts as people write them have all lengths; a sweep over lengths needs texts of one. The texts of all files are joined
and cut into consecutive pieces. Where they do not suffice, a text is made of tokens that are drawn from the files,
independently of each other, so that each has the frequency that it has there. Either way the model's tokenizer puts
its special tokens around a piece, and they count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch

from hal_core import HalError

from ..batches import Batch, Tokens
from ..models import Model
from ..texts import TextFile

Source = Literal["files", "random"]
#: How the texts of a source were made, for people.
MEANING: dict[Source, str] = {
    "files": "consecutive pieces of the text in the files",
    "random": "tokens drawn independently of each other, with the frequencies that they have in the files",
}


@attrs.frozen
class TokenTexts:
    """Texts of one length.

    Attributes:
        source: how they were made. ids: int64 [texts, length]. sha256: of the ids.
    """

    source: Source
    ids: torch.Tensor
    sha256: str

    def tokens(self, batch_size: int, start: int | None) -> Tokens:
        """The texts as batches of one size; none of them needs a padding mask. start: see `Batch`."""
        count, length = self.ids.shape
        batches = tuple(
            Batch(0, tuple(range(first, min(first + batch_size, count))), ids, torch.ones_like(ids), start=start)
            for first, ids in zip(range(0, count, batch_size), self.ids.split(batch_size), strict=True)
        )
        return Tokens(batches, (length,) * count, (0,))

    def described(self, length: int) -> list[TextFile]:
        """The texts as the one file that a comparison of them names."""
        return [TextFile(f"{length} tokens, {self.source}", ("",) * len(self.ids), self.sha256)]


class TextMaker:
    """Makes texts of any length out of files.

    Args:
        model: whose tokenizer is used. files: the text. always_random: no pieces of the files, so that the texts of
            all lengths are made alike.
    """

    def __init__(self, model: Model, files: Sequence[TextFile], *, always_random: bool = False) -> None:
        tokenizer = model.tokenizer
        texts = [text for file in files for text in file.texts]
        bare = [_ids(tokenizer, text, add_special_tokens=False) for text in texts]
        self._stream = torch.tensor([token for ids in bare for token in ids], dtype=torch.long)
        if not len(self._stream):
            raise HalError("the texts hold no token that the model's tokenizer knows: give other texts by --text FILE")
        at = max(range(len(bare)), key=lambda index: len(bare[index]))
        self._before, self._after = _around(_ids(tokenizer, texts[at]), bare[at])
        self._always_random = always_random

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text: the special ones, and one."""
        return len(self._before) + len(self._after) + 1

    def source(self, count: int, length: int) -> Source:
        """How `count` texts of `length` tokens are made."""
        enough = count * self._inner(length) <= len(self._stream)
        return "files" if enough and not self._always_random else "random"

    def make(self, count: int, length: int, source: Source) -> TokenTexts:
        """`count` texts of `length` tokens, special ones included: always the same, and the first ones of more."""
        inner, stream = self._inner(length), self._stream
        if source == "files":
            pieces = stream[: count * inner].view(count, inner)
        else:
            draws = [torch.Generator().manual_seed(length + (number << 32)) for number in range(count)]
            pieces = torch.stack([stream[torch.randint(len(stream), (inner,), generator=one)] for one in draws])
        before, after = (torch.tensor(ids, dtype=torch.long).expand(count, -1) for ids in (self._before, self._after))
        ids = torch.cat([before, pieces, after], dim=1)
        return TokenTexts(source, ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest())

    def _inner(self, length: int) -> int:
        return length - self.shortest + 1


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    found: list[int] = tokenizer(text, truncation=False, verbose=False, **options)["input_ids"]
    return found


def _around(whole: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return whole[:first], whole[first + len(bare) :]
    return [], []  # the tokenizer changes the text itself: its tokens are used alone
