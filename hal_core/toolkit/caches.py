"""Quantised key and value caches: making them, and reading them as numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import refuse
from ..request import Tensor

#: The largest code of each cache dtype.
LARGEST_CODE = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}


class QuantizedCache(NamedTuple):
    """Keys and values in few bits, as `hal_core.attention` takes them.

    Attributes:
        key, value: codes, [batch, heads_kv, length, dim]; of int4 uint8 with half the head size, the even channel in a
            byte's lower half.
        key_scale: float32 [1 or batch, heads_kv, 1, dim_qk], of a channel.
        value_scale: float32, of a token [batch, heads_kv, length, 1] or of a head [1 or batch, heads_kv, 1, 1].
    """

    key: Any
    value: Any
    key_scale: Any
    value_scale: Any


def quantize_cache(
    key: Tensor,
    value: Tensor,
    dtype: str = "int8",
    *,
    values: str = "token",
    key_scale: Tensor | None = None,
    shared: bool = False,
) -> QuantizedCache:
    """Round keys by channel and values by token or by head to the codes of a cache.

    Args:
        key, value: [batch, heads_kv, length, dim], or pages [pages, heads_kv, page size, dim] with `shared`.
        dtype: "int8", "int4", "float8_e4m3fn" or "float8_e5m2".
        values: "token" for a scale of each token's value, "head" for one of each head.
        key_scale: scales from an earlier call, so that new tokens fit the cache; larger keys are cut off.
        shared: key scales, and value scales of heads, hold for all batch entries (for all pages).

    Raises:
        ContractError: an unknown dtype, an odd head size for int4, or values neither "token" nor "head".

    Source: Liu et al. 2024 (KIVI): keys have outliers in fixed channels, values in tokens; without its zero points.
    """
    refuse(
        (
            any(len(getattr(given, "shape", ())) != 4 for given in (key, value)) or key.shape[:3] != value.shape[:3],
            f"keys of shape {list(getattr(key, 'shape', ()))} and values of {list(getattr(value, 'shape', ()))} were "
            "given: use tensors of [batch, heads_kv, length, dim] that differ in dim alone",
        )
    )
    refuse(
        (dtype not in LARGEST_CODE, f"cache dtype {dtype!r} was given: use {', '.join(LARGEST_CODE)}"),
        (values not in ("token", "head"), f"values {values!r} was given: use 'token' or 'head'"),
        (
            dtype == "int4" and (key.shape[-1] % 2 or value.shape[-1] % 2) != 0,
            f"head sizes {key.shape[-1]} and {value.shape[-1]} were given with int4: two share a byte, use even ones",
        ),
    )
    lead = (0, 2) if shared else (2,)
    key_scale = _scale(key, lead, dtype) if key_scale is None else key_scale
    value_scale = _scale(value, (3,) if values == "token" else (*lead, 3), dtype)
    return QuantizedCache(codes_of(key, key_scale, dtype), codes_of(value, value_scale, dtype), key_scale, value_scale)


def _scale(numbers: Tensor, axes: tuple[int, ...], dtype: str) -> Tensor:
    """Float32 numbers that one code is worth; 1 where all numbers are 0."""
    largest = numbers.detach().float().abs().amax(axes, keepdim=True)
    return (largest / LARGEST_CODE[dtype]).where(largest > 0, 1)


def codes_of(numbers: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """The codes of a cache dtype nearest to numbers [..., dim] over `scale`, which broadcasts to them."""
    import torch

    codes = (numbers.detach().float() / scale).clamp(-LARGEST_CODE[dtype], LARGEST_CODE[dtype])
    if dtype.startswith("float8"):
        return codes.to(getattr(torch, dtype))
    codes = codes.round().to(torch.int8)
    return codes if dtype == "int8" else (codes[..., 0::2] & 15 | codes[..., 1::2] << 4).view(torch.uint8)


def dequantized(codes: Tensor, scale: Tensor | None = None, dtype: Any = None) -> Tensor:
    """A cache's numbers, [..., dim], in a torch dtype (float32 where None is given); `scale` broadcasts to them."""
    import torch

    if codes.dtype == torch.uint8:
        signed = codes.view(torch.int8)
        codes = torch.stack((signed << 4 >> 4, signed >> 4), -1).flatten(-2)
    numbers = codes.to(dtype or torch.float32)
    return numbers if scale is None else numbers * scale.to(numbers.dtype)
