"""What `create_attention` builds, as data."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from hal_core import ContractError

from .arguments import is_number, need_parameter_dtype, need_share, need_whole


class AttentionPatterns(Enum):
    """Which keys a row reads."""

    FULL = "full"
    CAUSAL = "causal"
    SLIDING_WINDOW = "sliding_window"  # the keys around a row
    SPARSE = "sparse"  # blocks fixed by `sparse_pattern`
    RING = "ring"  # full or causal, the sequence cut over devices
    LOCAL = "local"  # the row's own block of `window_size` keys
    GLOBAL = "global"  # the first `global_tokens` keys, and the keys around a row; those tokens read everything
    DIFFERENTIAL = "differential"  # the difference of two softmaxes
    DYNAMIC_SPARSE = "dynamic_sparse"  # blocks chosen from query and key at each call


#: Patterns of `register_attention`, and what builds them.
registered: dict[str, Callable[[AttentionConfig], nn.Module]] = {}


def known_patterns() -> list[str]:
    """Names that a configuration's pattern may have."""
    return [*(pattern.value for pattern in AttentionPatterns), *registered]


@dataclass
class AttentionConfig:
    """What `create_attention` builds.

    It is checked when it is made, and again by `create_attention`, because it can be changed in between.

    Attributes:
        embed_dim, num_heads: width, and query heads. head_dim: of a head; embed_dim // num_heads where it is None.
        pattern: an `AttentionPatterns`, its value, or a name that `register_attention` knows.
        causal: no row reads a later key. num_kv_heads: key and value heads, which divide num_heads; num_heads where it
            is None.
        dropout: of the weights, in training. bias: of the projections. scale, softcap: as `hal.attention`'s.
        window_size: keys that a row of a sliding window or of a global pattern reads: itself and those before it, or,
            where not causal, half of them on each side; length of a local block.
        global_tokens: how many first tokens are global. lambda_init: of the differential pattern.
        rotary: rotate query and key by their positions. rotary_base: its base.
        sparsity_ratio: of sparse patterns, 0 to 0.95. sparse_pattern: a `SparsePattern` or its value; None for the
            pattern's usual one. block_size: of sparse patterns.
        max_sequence_length: of the ring.
        device: backend or device of hal; None leaves it to `hal.use` and hal's selection. dtype: of the parameters.

    Raises:
        ContractError: a value that cannot be, or an unknown pattern, with the closest names.
    """

    embed_dim: int
    num_heads: int
    head_dim: int | None = None
    pattern: AttentionPatterns | str = AttentionPatterns.FULL
    causal: bool = False
    num_kv_heads: int | None = None
    dropout: float = 0.0
    bias: bool = True
    scale: float | None = None
    softcap: float | None = None
    window_size: int = 256
    global_tokens: int = 1
    lambda_init: float = 0.8
    rotary: bool = False
    rotary_base: float = 10_000.0
    sparsity_ratio: float = 0.9
    sparse_pattern: Any = None
    block_size: int = 64
    max_sequence_length: int = 1_000_000
    device: str | None = None
    dtype: torch.dtype | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def size(self) -> int:
        """Of a head."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ContractError with one sentence for the first thing that is wrong."""
        if self.name not in (known := known_patterns()):
            close = difflib.get_close_matches(str(self.name).lower(), known, 3)
            hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
            raise ContractError(f"pattern {self.pattern!r} was given{hint}: use one of {', '.join(known)}")
        for name in ("embed_dim", "num_heads", "kv_heads", "window_size", "block_size", "max_sequence_length"):
            need_whole({"kv_heads": "num_kv_heads"}.get(name, name), getattr(self, name))
        need_whole("head_dim", 1 if self.head_dim is None else self.head_dim)
        need_whole("global_tokens", self.global_tokens, 0)
        need_share("dropout", self.dropout)
        need_share("sparsity_ratio", self.sparsity_ratio, 0.95, ", the share of keys that is not read")
        need_parameter_dtype("dtype", self.dtype)
        for wrong, sentence in (
            (
                self.head_dim is None and self.embed_dim % self.num_heads != 0,
                f"embed_dim {self.embed_dim} and num_heads {self.num_heads} were given: num_heads must divide it, or "
                "pass head_dim",
            ),
            (
                self.num_heads % self.kv_heads != 0,
                f"num_heads {self.num_heads} and num_kv_heads {self.kv_heads} were given: the second divides the first",
            ),
            (
                not is_number(self.rotary_base) or self.rotary_base <= 0,
                f"rotary_base {self.rotary_base!r} was given: use a number above 0",
            ),
            (not is_number(self.lambda_init), f"lambda_init {self.lambda_init!r} was given: use a number"),
            (
                self.device is not None and not isinstance(self.device, str),
                f"device {self.device!r} was given: use a backend or a device of hal, such as 'cpu:0', or None",
            ),
        ):
            if wrong:
                raise ContractError(sentence)
        if (self.rotary or self.name == AttentionPatterns.DIFFERENTIAL.value) and self.size % 2 != 0:
            raise ContractError(
                f"a head_dim of {self.size} was given: rotary embedding and the differential pattern halve it, use an "
                "even one"
            )

    @property
    def name(self) -> str:
        """The pattern's name."""
        return self.pattern.value if isinstance(self.pattern, AttentionPatterns) else self.pattern
