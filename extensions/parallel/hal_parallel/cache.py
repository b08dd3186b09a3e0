"""A Hugging Face cache that lies on all ranks: the prompt in its layout, new tokens dealt out in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hal_core import HalError

from .layout import Piece, TokenLayout


class ShardedCache(DynamicCache):
    """Every rank holds its own tokens of the prompt, and every `world`-th of the tokens that follow.

    Args:
        prompt: the prompt's layout. rank: whose part this is.

    Attributes:
        seen: tokens of the whole sequence. coming: those that the call under way adds.
    """

    def __init__(self, prompt: TokenLayout, rank: int) -> None:
        super().__init__()
        self.prompt, self.rank = prompt, rank
        self.seen = self.coming = 0

    @property
    def layout(self) -> TokenLayout:
        """Of the tokens that are held, those of the call under way included."""
        prompt, world, new = self.prompt, self.prompt.world, self.seen + self.coming - self.prompt.length
        pieces = tuple(
            (*held, Piece(prompt.local, prompt.length + rank, -(-(new - rank) // world), world)) if new > rank else held
            for rank, held in enumerate(prompt.pieces)
        )
        return TokenLayout("cache", prompt.length + new, prompt.local + -(-new // world), pieces)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep this rank's part of new keys and values, and give all that it holds."""
        if self.seen == 0:
            return super().update(key_states, value_states, layer_idx)
        layer: Any = self.layers[layer_idx]
        world, slots = self.prompt.world, self.layout.local
        missing = slots - layer.keys.shape[2]
        if missing:
            layer.keys, layer.values = (
                torch.cat((held, held.new_zeros((*held.shape[:2], missing, held.shape[3]))), 2)
                for held in (layer.keys, layer.values)
            )
        for i in range(key_states.shape[2]):
            number = self.seen - self.prompt.length + i
            if number % world == self.rank:
                slot = self.prompt.local + number // world
                layer.keys[:, :, slot], layer.values[:, :, slot] = key_states[:, :, i], value_states[:, :, i]
        return layer.keys, layer.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the whole sequence."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, *_: Any, **__: Any) -> None:
        raise HalError("a sharded cache was asked to drop tokens (assisted generation does): generate without it")
