"""Calls of one shape on CUDA whose ordering and planning are captured as a CUDA graph."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import ContractError

from .adaptive import DENSE_FROM, AdaptiveResult, plan_density, request_for
from .orders import topic_orders
from .tiling import AdaptiveTiling, Planner, plan_of_coarse


class CapturedAttention:
    """`adaptive_attention(..., order=True)` for CUDA tensors of one shape, forward alone.

    Ordering and planning are about 280 small operators, which cost the host more time than the device. They are
    captured once and launched together. The object keeps copies of query, key and value and the buffers of planning,
    several times the bytes of the three in float32, until it is deleted. Calls take turns, on any stream and in any
    thread.

    Args:
        query, key, value: [B, H, len_q, d], [B, Hk, len_k, d], [B, Hk, len_k, dim_v]: examples of what calls bring.
        tiling: "certified", without a scorer; None: AdaptiveTiling().
        scale: of the scores; None: d ** -0.5. backend: of the attention itself.

    Raises:
        ContractError: tensors that are not on CUDA, another mode, a scorer; in a call, other shapes, dtypes or devices
            than the examples', or gradients, which are asked of `adaptive_attention`.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiling: AdaptiveTiling | None = None,
        *,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        self.tiling = tiling or AdaptiveTiling()
        if query.device.type != "cuda":
            raise ContractError(
                f"tensors on {query.device} were given: planning is captured on CUDA; call adaptive_attention elsewhere"
            )
        if self.tiling.mode != "certified" or self.tiling.scorer is not None:
            raise ContractError(
                f"tiling {self.tiling.name} was given: 'certified' without a scorer is captured; the rest is for "
                "adaptive_attention"
            )
        self.options: dict[str, Any] = {
            "scale": scale,
            "backend": backend,
            "enable_gqa": query.shape[1] != key.shape[1],
        }
        self.request = request_for(query, key, value, "none", scale)
        self._kept = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in (query, key, value))
        self._turn = threading.Lock()
        with torch.cuda.device(query.device), torch.no_grad():
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # what allocates or loads at a first call must be done before
                    self._prepare()
            torch.cuda.current_stream().wait_stream(aside)
            self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
            with torch.cuda.graph(self._graph):
                self._prepared = self._prepare()
            self._done.record()

    def _prepare(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(query, key and value in their order, the queries' places, what the plan is made of)."""
        query, key, value = self._kept
        rows, keys = topic_orders(query, key)
        ordered = rows.apply(query), keys.apply(key), keys.apply(value)
        return ordered, rows.places(), Planner(self.tiling, self.request, *ordered[:2]).coarse()

    @torch.no_grad()
    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> AdaptiveResult:
        """As `adaptive_attention` with this tiling and order=True."""
        for name, given, kept in zip(("query", "key", "value"), (query, key, value), self._kept, strict=True):
            if (given.shape, given.dtype, given.device) != (kept.shape, kept.dtype, kept.device):
                raise ContractError(
                    f"{name} {list(given.shape)} {given.dtype} on {given.device} was given: this object was made for "
                    f"{list(kept.shape)} {kept.dtype} on {kept.device}"
                )
        if any(t.requires_grad for t in (query, key, value)):
            raise ContractError("tensors that require gradients were given: call adaptive_attention, or detach them")
        ordered, places, (order, count, sums) = self._prepared
        with self._turn, torch.cuda.device(query.device):
            torch.cuda.current_stream().wait_event(self._done)  # of the call before, perhaps on another stream
            for kept, given in zip(self._kept, (query, key, value), strict=True):
                kept.copy_(given)
            self._graph.replay()
            found = plan_of_coarse(self.tiling.block_q, order.shape[-2] * order.shape[-1], order, count, sums)
            if found is None:
                plan = self.tiling.choose(self.request, *ordered[:2])
                found = plan, plan_density(plan, *ordered[:2], self.request)
            plan, density = found
            dense = density > DENSE_FROM
            out = hal.attention(*ordered, block_plan=None if dense else plan, **self.options)
            out = out.flatten(0, 2).index_select(0, places).view(out.shape)
            self._done.record()
        return AdaptiveResult(out, plan, density, dense, None)
