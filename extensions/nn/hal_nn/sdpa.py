"""torch.nn.functional.scaled_dot_product_attention on hal's devices, for programs that call it themselves."""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias

import hal_core as hal
from hal_core import ContractError, HalError, UnsupportedError


class override_sdpa:  # noqa: N801 - reads as a statement: with hal_nn.override_sdpa() as counted
    """Put `hal.attention` in the place of torch.nn.functional.scaled_dot_product_attention, until `revert`.

    It is active from its construction on, in every thread; as a context manager it ends with the block. Two may be
    active: the later one is reverted first. Modules that hold torch's function under a name of their own keep it, so
    override before importing them. nn.MultiheadAttention and nn.TransformerEncoderLayer are kept off the fused
    inference path on which they do not call it.

    Args:
        fallback: False: what no device can run is refused, with every reason. True: torch's own function runs it, and
            it is counted.
        fused_inference: True leaves torch's modules their fused inference path.

    Attributes:
        calls: how many calls hal ran; those inside compiled code are not counted.
        fallbacks: how many calls torch ran instead, by the reason's first line.

    Raises:
        HalError: by `revert`, where something else has taken the function's place since.
    """

    def __init__(self, *, fallback: bool = False, fused_inference: bool = False) -> None:
        self.calls, self.fallbacks, self._fallback = 0, Counter[str](), fallback
        self._lock, self._original = threading.Lock(), F.scaled_dot_product_attention
        self._fused = torch.backends.mha.get_fastpath_enabled()
        self._function = self._made()
        F.scaled_dot_product_attention = self._function
        if not fused_inference:
            torch.backends.mha.set_fastpath_enabled(False)
        self.active = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def revert(self) -> None:
        """Put back what was there before; a second time is harmless."""
        if not self.active:
            return
        if F.scaled_dot_product_attention is not self._function:
            raise HalError(
                "torch.nn.functional.scaled_dot_product_attention was replaced again after override_sdpa: undo that "
                "first"
            )
        F.scaled_dot_product_attention = self._original
        torch.backends.mha.set_fastpath_enabled(self._fused)
        self.active = False

    def _made(self) -> Any:
        def scaled_dot_product_attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Any:
            if attn_mask is not None and is_causal:  # as torch, which `hal.attention` need not be
                if isinstance(attn_mask, CausalBias):
                    raise ContractError("CausalBias should not be used with causal=True: pass one of them")
                raise ContractError(
                    "Explicit attn_mask should not be set when is_causal=True: pass a mask that holds both"
                )
            if isinstance(query, Tensor) and isinstance(key, Tensor) and not query.is_nested:
                if query.dim() > 2 and query.shape[-3] == 0:  # no head, so that no device has anything to do
                    return self._original(
                        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                    )
                if query.shape[-1:] == key.shape[-1:] == (0,):  # all scores are 0
                    query, key, scale = F.pad(query, (0, 1)), F.pad(key, (0, 1)), 1.0
            try:
                out = hal.attention(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
            except (ContractError, UnsupportedError) as error:
                if not self._fallback:
                    raise
                with self._lock:
                    self.fallbacks[str(error).partition("\n")[0]] += 1
                return self._original(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
            if not torch.compiler.is_compiling():
                with self._lock:
                    self.calls += 1
            return out

        return scaled_dot_product_attention
