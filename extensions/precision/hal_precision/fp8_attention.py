"""Attention whose keys and values are FP8, by hal's kernels for such operands where a device has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hal_nn
import torch
from hal_nn.attention_config import AttentionConfig
from torch import Tensor, nn

import hal_core as hal
from hal_core import ContractError

from .fp8 import FP8Format

_PATTERN = "fp8"


@dataclass
class FP8AttentionConfig(AttentionConfig):
    """Of an attention with keys and values in FP8: `hal_nn.create_attention(FP8AttentionConfig(512, 8))`.

    Attributes:
        format: of keys and values, with a float32 scale for each batch entry and head.
        Of the others embed_dim, num_heads, head_dim, num_kv_heads, causal, bias, scale, softcap, device and dtype are
        used.
    """

    pattern: str = _PATTERN
    format: FP8Format = FP8Format.E4M3


class FP8Attention(nn.Module):
    """Self attention [batch, length, embed_dim] -> the same, keys and values rounded to FP8.

    Without gradients hal gets FP8 tensors and their scales, so its kernels read one byte a value. With gradients hal
    gets the rounded values in the query's dtype, and the gradient passes the rounding unchanged.
    """

    def __init__(self, config: FP8AttentionConfig) -> None:
        super().__init__()
        if config.dropout or config.rotary:
            raise ContractError("FP8AttentionConfig takes no dropout and no rotary embedding: leave them out.")
        self.config = config
        width, wide = config.num_heads * config.size, config.kv_heads * config.size
        options: dict[str, Any] = {"bias": config.bias, "dtype": config.dtype}
        self.q_proj = nn.Linear(config.embed_dim, width, **options)
        self.k_proj = nn.Linear(config.embed_dim, wide, **options)
        self.v_proj = nn.Linear(config.embed_dim, wide, **options)
        self.out_proj = nn.Linear(width, config.embed_dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        shape = (*x.shape[:-1], -1, config.size)
        query, key, value = (each(x).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        (key8, key_scale), (value8, value_scale) = (self._rounded(each) for each in (key, value))
        options: dict[str, Any] = {
            "is_causal": config.causal,
            "scale": config.scale,
            "softcap": config.softcap,
            "enable_gqa": config.kv_heads != config.num_heads,
            "backend": config.device,
        }
        if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
            key = key + (key8.to(key.dtype) * key_scale.to(key.dtype) - key).detach()
            value = value + (value8.to(value.dtype) * value_scale.to(value.dtype) - value).detach()
            out = hal.attention(query, key, value, **options)
        else:
            out = hal.attention(query, key8, value8, key_scale=key_scale, value_scale=value_scale, **options)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _rounded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(FP8 values, float32 scales [batch, heads, 1, 1])."""
        form = self.config.format
        scale = values.detach().abs().amax((2, 3), keepdim=True).float().clamp_min(1e-30) / form.largest
        return (values.detach().float() / scale).clamp(-form.largest, form.largest).to(form.dtype), scale


def _create(config: AttentionConfig) -> nn.Module:
    if not isinstance(config, FP8AttentionConfig):
        raise ContractError("The pattern 'fp8' is built from an FP8AttentionConfig.")
    return FP8Attention(config)


hal_nn.register_attention(_PATTERN, _create)
