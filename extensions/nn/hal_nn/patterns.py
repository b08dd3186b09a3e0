"""The modules behind `create_attention`, one for each pattern."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hal_core as hal
from hal_core import BlockPlan, ContractError, HalError

from .arguments import need_rows
from .attention_config import AttentionConfig
from .attention_modules import readable_mask
from .placement import mark
from .record import DeviceRecord


class KeyValueCache:
    """Keys and values of the tokens that a `PatternAttention` has read, [batch, kv_heads, length, head_dim] each."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.key is None else self.key.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the given ones last.

        Raises:
            ContractError: key and value do not go together, or with what the cache holds.
        """
        if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (key, value)) or key.shape[:3] != value.shape[:3]:
            said = " and ".join(str(list(t.shape)) if isinstance(t, Tensor) else repr(t) for t in (key, value))
            raise ContractError(
                f"key and value {said} were given: pass two tensors [batch, kv_heads, length, head_dim] of one batch, "
                "heads and length"
            )
        if self.key is not None and self.value is not None:
            if key.shape[0] != self.key.shape[0]:
                raise ContractError(
                    f"a batch of {key.shape[0]} was given to a cache of {self.key.shape[0]}: start another cache"
                )
            for new, held in ((key, self.key), (value, self.value)):
                if (new.shape[1], new.shape[3], new.dtype, new.device) != (
                    *(held.shape[1], held.shape[3]),
                    *(held.dtype, held.device),
                ):
                    raise ContractError(
                        f"{list(new.shape)} {new.dtype} on {new.device} was given to a cache of {list(held.shape)} "
                        f"{held.dtype} on {held.device}: start another cache"
                    )
            key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.key, self.value = key, value
        return key, value


def rotate(tensor: Tensor, first: int, base: float) -> Tensor:
    """Rotary embedding of rows at positions from `first` on, halves paired (Su et al. 2021, section 3.2.2).

    Args:
        tensor: [batch, heads, length, head_dim], head_dim even.
    """
    half = tensor.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=tensor.device, dtype=torch.float32) / half)
    angles = torch.arange(first, first + tensor.shape[2], device=tensor.device)[:, None] * rates
    cos, sin = angles.cos().to(tensor.dtype), angles.sin().to(tensor.dtype)
    left, right = tensor[..., :half], tensor[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class PatternAttention(DeviceRecord, nn.Module):
    """Attention of one pattern, with grouped heads, rotary embedding and a cache of keys and values.

    Attributes:
        config: its configuration. q_proj, k_proj, v_proj, out_proj: its nn.Linear layers.
        last_decision, last_device_used, last_latency_ms, last_energy_mj: of the newest call.
    """

    cached = True  # whether a cache's earlier keys may be read by later rows

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow = config.num_heads * config.size, config.kv_heads * config.size
        options: dict[str, Any] = {"bias": config.bias, "dtype": config.dtype}
        self.q_proj = nn.Linear(config.embed_dim, wide, **options)
        self.k_proj, self.v_proj = (nn.Linear(config.embed_dim, narrow, **options) for _ in range(2))
        self.out_proj = nn.Linear(wide, config.embed_dim, **options)
        if config.device is not None:
            hal.session(config.device)  # an unknown one is refused here, not by the first call
            mark(self, config.device)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Self-attention of new tokens, after those of the cache.

        Args:
            x: [batch, length, embed_dim]. attention_mask: as `PhotonicFlashAttention`'s, over all keys.
            cache: read and extended; its tokens precede x.

        Returns:
            [batch, length, embed_dim].
        """
        config = self.config
        need_rows("x", x, config.embed_dim)
        if cache is not None and not isinstance(cache, KeyValueCache):
            raise ContractError(f"cache is a {type(cache).__name__}: pass a KeyValueCache()")
        if cache is not None and not self.cached:
            raise ContractError(
                f"a cache was given to the pattern {config.name!r}, which reads whole sequences: pass x"
            )
        first = 0 if cache is None else cache.length
        query, key, value = (
            layer(x).unflatten(-1, (-1, config.size)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if config.rotary:
            query, key = (rotate(t, first, config.rotary_base) for t in (query, key))
        if cache is not None:
            key, value = cache.append(key, value)
        shape = (x.shape[0], config.num_heads, query.shape[2], key.shape[2])
        out = self.mix(query, key, value, readable_mask(attention_mask, shape, query.dtype))
        return self.out_proj(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the projected tensors, [batch, heads, length, head_dim]; the last row meets the last key."""
        return self.read(query, key, value, mask, **self.causal(query, key))

    def causal(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        return {"causal": "bottom_right"} if self.config.causal else {}

    def read(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """`hal.attention` with the options of the configuration."""
        config = self.config
        out: Tensor = self.attend(
            query,
            key,
            value,
            mask,
            dropout_p=config.dropout if self.training else 0.0,
            scale=config.scale,
            softcap=config.softcap,
            enable_gqa=query.shape[1] != key.shape[1],
            **options,
        )
        return out

    def extra_repr(self) -> str:
        return f"pattern={self.config.name!r}, heads={self.config.num_heads}/{self.config.kv_heads}"


class CausalAttention(PatternAttention):
    """No row reads a later key."""

    def causal(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        return {"causal": "bottom_right"}


class SlidingWindowAttention(PatternAttention):
    """A row reads `window_size` keys: itself and those before it, or half of them on each side where not causal."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self.read(
            query,
            key,
            value,
            mask,
            window=_sides(self.config),
            diagonal=0 if self.config.causal else key.shape[2] - query.shape[2],
            **self.causal(query, key),
        )


def _sides(config: AttentionConfig) -> tuple[int, int]:
    if config.causal:
        return config.window_size - 1, 0
    return config.window_size // 2, (config.window_size - 1) // 2


class LocalAttention(PatternAttention):
    """A row reads its own block of `window_size` keys: a block plan with one block for each row of blocks."""

    cached = False

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        blocks = -(-query.shape[2] // self.config.window_size)
        indices = torch.arange(blocks, dtype=torch.int32, device=query.device).reshape(1, 1, blocks, 1)
        plan = BlockPlan(self.config.window_size, self.config.window_size, indices, torch.ones_like(indices[..., 0]))
        return self.read(query, key, value, mask, block_plan=plan, **self.causal(query, key))


class GlobalAttention(PatternAttention):
    """A row reads the keys around it and those of the first tokens, which read everything (Beltagy et al. 2020)."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        len_q, len_k = query.shape[2], key.shape[2]
        rows = torch.arange(len_k - len_q, len_k, device=query.device)[:, None]
        keys = torch.arange(len_k, device=query.device)
        left, right = _sides(self.config)
        readable = (keys >= rows - left) & (keys <= rows + right)
        readable |= (rows < self.config.global_tokens) | (keys < self.config.global_tokens)
        if self.config.causal:
            readable &= keys <= rows
        if mask is not None:
            readable = mask & readable if mask.dtype == torch.bool else mask.masked_fill(~readable, -math.inf)
        return self.read(query, key, value, readable)


class DifferentialAttention(PatternAttention):
    """The difference of two softmaxes over halves of each head (Ye et al. 2024, arXiv 2410.05258, equations 1 to 3).

    Attributes:
        lambda_q1, lambda_k1, lambda_q2, lambda_k2: [head_dim / 2], of the weight of the second softmax.
        norm: RMS norm of each head's result.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        drawn = (torch.randn(4, config.size // 2, dtype=config.dtype) * 0.1).unbind(0)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = map(nn.Parameter, drawn)
        self.norm = nn.RMSNorm(config.size, eps=1e-5, dtype=config.dtype)

    def weight(self) -> Tensor:
        """lambda, how much of the second softmax is taken away."""
        first, second = (self.lambda_q1 @ self.lambda_k1).exp(), (self.lambda_q2 @ self.lambda_k2).exp()
        return first - second + self.config.lambda_init

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        first, second = (
            self.read(q, k, value, mask, **self.causal(query, key))
            for q, k in zip(query.chunk(2, -1), key.chunk(2, -1), strict=True)
        )
        return self.norm(first - self.weight() * second) * (1 - self.config.lambda_init)  # type: ignore[no-any-return]


class SparseAttention(PatternAttention):
    """Blocks of keys by a pattern of `hal_nn.sparse`, fixed or chosen from query and key."""

    usual = "block_sparse"

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        if importlib.util.find_spec("hal_nn.sparse") is None:
            raise HalError(f"the pattern {config.name!r} needs hal_nn.sparse, which this hal-nn lacks: upgrade hal-nn")
        sparse = importlib.import_module("hal_nn.sparse")
        pattern = self.usual if config.sparse_pattern is None else config.sparse_pattern
        self.tiling = sparse.tiling_of(pattern, config.sparsity_ratio, config.block_size)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self.read(query, key, value, mask, tiling=self.tiling, **self.causal(query, key))


class DynamicSparse(SparseAttention):
    """`SparseAttention` whose blocks are chosen from query and key."""

    usual = "dynamic_threshold"


MODULES: dict[str, Callable[[AttentionConfig], nn.Module]] = {
    "full": PatternAttention,
    "causal": CausalAttention,
    "sliding_window": SlidingWindowAttention,
    "local": LocalAttention,
    "global": GlobalAttention,
    "differential": DifferentialAttention,
    "sparse": SparseAttention,
    "dynamic_sparse": DynamicSparse,
}
