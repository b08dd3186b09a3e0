"""Timing a device's part inside a model: two attention implementations that report to the clock of the current context.

They are registered under names of their own, so that no other model in the process is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

import torch
from hal_nn import huggingface
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

HAL, TORCH = "hal_compare", "sdpa_compare"


class Clock:
    """Sums over one pass of what a device runs: attention, and the linear layers that were put on it.

    Attributes:
        seconds: inside attention, head reshaping included, and inside such layers. calls: how many of attention.
        macs: multiply-accumulates of their products, pairs that a mask hides counted.
    """

    def __init__(self, place: str) -> None:
        self.seconds, self.calls, self.macs = 0.0, 0, 0
        self._place = place

    def synchronize(self) -> None:
        """Wait until the tensors' device has done what was asked of it; nothing to do on the host."""
        synchronize(self._place)

    def add(self, seconds: float, macs: int, attention: bool) -> None:
        """One call: of attention, or of a linear layer, which adds to seconds and macs alone."""
        self.seconds += seconds
        self.calls += attention
        self.macs += macs


def synchronize(place: str) -> None:
    """Wait for an accelerator; the host needs no waiting."""
    kind = torch.device(place).type
    if kind != "cpu":
        torch.get_device_module(kind).synchronize()


_clock: ContextVar[Clock | None] = ContextVar("hal_compare_clock", default=None)


@contextmanager
def clocked(clock: Clock) -> Iterator[Clock]:
    """Attention calls inside report to `clock`."""
    token = _clock.set(clock)
    try:
        yield clock
    finally:
        _clock.reset(token)


@contextmanager
def inside(macs: int, *, attention: bool = False) -> Iterator[None]:
    """What runs inside is the device's part of the model; without a clock nothing is timed."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.synchronize()
    start = perf_counter()
    yield
    clock.synchronize()
    clock.add(perf_counter() - start, macs, attention)


def _reporting(inner: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        batch, heads, len_q, dim = query.shape
        macs = batch * heads * len_q * key.shape[2] * (dim + value.shape[3])
        with inside(macs, attention=True):
            return inner(module, query, key, value, attention_mask, **options)

    return attention


def timed(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the arguments of `hal.attention` that reports to the clock."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        batch, heads, len_q, dim = query.shape
        with inside(batch * heads * len_q * key.shape[2] * (dim + value.shape[3]), attention=True):
            return inner(query, key, value, *rest, **options)

    return attention


AttentionInterface.register(HAL, _reporting(huggingface.attention_forward))
AttentionMaskInterface.register(HAL, huggingface.attention_mask)
AttentionInterface.register(TORCH, _reporting(sdpa_attention_forward))
AttentionMaskInterface.register(TORCH, sdpa_mask)
