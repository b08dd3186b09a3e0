"""Fake devices: plain torch attention behind every kind of session that the core knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import (
    FEATURES,
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Capabilities,
    Causal,
    Device,
    Estimate,
    Fidelity,
    Grads,
    MaskKind,
    Numerics,
    PooledMemory,
    Quantity,
    Range,
    Refusal,
    dense_mask,
    expand_block_plan,
)

NUMERICS = {
    "float64": Numerics(relative=1e-12, lse=1e-12, gradient=1e-11),
    "float32": Numerics(relative=1e-5, lse=1e-5, gradient=1e-4),
    "bfloat16": Numerics(relative=2e-2, lse=2e-2, gradient=5e-2),
    "float16": Numerics(relative=4e-3, lse=4e-3, gradient=1e-2),
}


def full(**changes: Any) -> Capabilities:
    """Everything that `weights_of` can do, with changes."""
    claims: dict[str, Any] = {
        "dtypes": NUMERICS,
        "numerics": NUMERICS,
        "head_dim": Range(1, 512),
        "masks": MaskKind,
        "causal": Causal,
        "features": FEATURES - {"packed", "paged", "used_lengths", "fp8_cache"},
        "block_sizes": Range(1),
        "length": Range(0),
    }
    return Capabilities(**(claims | changes))


def plain(**changes: Any) -> Capabilities:
    """float32 without any feature: what a first version of a device can do."""
    return Capabilities(**({"dtypes": {"float32"}, "numerics": NUMERICS, "head_dim": Range(1, 512)} | changes))


def quantity(low: float, high: float | None = None, basis: str = "declared", provenance: str = "assumed") -> Quantity:
    return Quantity(low, low if high is None else high, basis, provenance)


def scores_of(
    query: Tensor, key: Tensor, mask: Tensor | None, plan: BlockPlan | None, request: AttentionRequest
) -> Tensor:
    """Scaled, capped and masked scores [batch, heads, len_q, len_k]; -inf where the query may not read the key."""
    len_q, len_k = query.shape[2], key.shape[2]
    scores = query @ key.repeat_interleave(request.heads_q // request.heads_kv, 1).mT * request.effective_scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    seen = [dense_mask(request, len_q, len_k)]
    if plan is not None:
        seen.append(expand_block_plan(plan, len_q, len_k))
    if mask is not None and mask.dtype == torch.bool:
        seen.append(mask)
    elif mask is not None:
        scores = scores + mask
    for visible in seen:
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
    return scores


def kept(
    shape: Sequence[int], request: AttentionRequest, rng: tuple[int, int] | None, dtype: torch.dtype = torch.float64
) -> Tensor | float:
    """Dropout's factors: 0 or 1 / (1 - p), from (seed, offset) alone."""
    if not request.dropout:
        return 1.0
    assert rng is not None, "the core must hand a device its rng"
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed((rng[0] + 7919 * rng[1]) % 2**63))
    return (drawn >= request.dropout).to(dtype) / (1 - request.dropout)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    request: AttentionRequest,
    plan: BlockPlan | None = None,
    rng: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable attention, half precision computed in float32: (out, lse)."""
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    scores = scores_of(query, key, mask, plan, request)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)  # a finite row, so that no gradient is NaN; its weights become 0
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    weights = (scores.softmax(-1)).masked_fill(dead, 0.0) * kept(scores.shape, request, rng, scores.dtype)
    out = weights.to(value.dtype) @ value.repeat_interleave(request.heads_q // request.heads_kv, 1)
    return out.to(dtype), lse.masked_fill(dead.squeeze(-1), -math.inf)


class FakeSession:
    """A session without `bind`: prepare and compute. Counts what it ran, and is closed once."""

    def __init__(self, backend: FakeBackend, device: Device) -> None:
        self.backend, self.device, self.closed = backend, device, 0
        self.memory = PooledMemory(name=device.id)
        self.tiling = hal.DenseTiling()

    def autograd(self, request: AttentionRequest) -> Any:
        return self.backend.autograd

    def optimize_tiling(self, sequence_length: int, batch_size: int, num_heads: int) -> dict[str, int]:
        return {"tile_size": sequence_length}

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: int | None = None,
        *,
        request: AttentionRequest,
        plan: BlockPlan | None = None,
        tables: Any = None,
    ) -> Any:
        assert not self.closed, "the core used a closed session"
        assert (query.shape[2], key.shape[2]) == (request.len_q, request.len_k), "the core must pass exact lengths"
        return query, key, value, request, plan

    def compute_attention(
        self,
        prepared: Any,
        mask: Tensor | None = None,
        *,
        query: Tensor | None = None,
        rng: Any = None,
        out: Any = None,
    ) -> AttentionOutput:
        stored, key, value, request, plan = prepared
        self.backend.ran.append((self.device.id, request))
        result, lse = attend(stored if query is None else query, key, value, mask, request, plan, rng)
        return AttentionOutput(self.noisy(result, rng), lse if request.lse else None)

    def noisy(self, result: Tensor, rng: Any) -> Tensor:
        if not self.backend.noise:
            return result
        assert rng is not None, "the core must hand a noisy device its rng"
        drawn = torch.Generator().manual_seed((rng[0] + 104729 * rng[1]) % 2**63)
        return result * (1 + self.backend.noise * torch.randn(result.shape, generator=drawn, dtype=result.dtype))

    def compute_attention_backward(
        self,
        prepared: Any,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: Any = None,
    ) -> Grads:
        """From the given pair (out, lse) alone, as a ring needs it. Dao et al. 2022, appendix B.4, and a softcap."""
        assert self.backend.autograd == "explicit", "the core asked a session for a backward that it does not offer"
        query, key, value, request, plan = prepared
        self.backend.backwards.append((self.device.id, request))
        group = request.heads_q // request.heads_kv
        scores = scores_of(query, key, mask, plan, request)
        weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(scores == -math.inf, 0.0)
        factors = kept(scores.shape, request, rng, scores.dtype)
        grad_value = (weights * factors).mT @ grad_out
        delta = (out * grad_out).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse.unsqueeze(-1)
        grad_scores = weights * (grad_out @ value.repeat_interleave(group, 1).mT * factors - delta)
        grad_mask = None
        if "mask" in request.grads:
            grad_mask = grad_scores.sum_to_size(mask.shape)
        if request.softcap is not None:
            raw = query @ key.repeat_interleave(group, 1).mT * request.effective_scale
            grad_scores = grad_scores * (1 - torch.tanh(raw / request.softcap) ** 2)
        grad_scores = grad_scores * request.effective_scale
        batch, _, len_k, _ = key.shape

        def of_groups(grad: Tensor) -> Tensor:
            return grad.view(batch, request.heads_kv, group, len_k, grad.shape[-1]).sum(2)

        grads = (
            grad_scores @ key.repeat_interleave(group, 1),
            of_groups(grad_scores.mT @ query),
            of_groups(grad_value),
            grad_mask,
        )
        return Grads(
            *(
                grad if name in request.grads else None
                for name, grad in zip(("q", "k", "v", "mask"), grads, strict=True)
            )
        )

    def close(self) -> None:
        self.closed += 1
        self.memory.trim()

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BoundSession(FakeSession):
    """The same with the fast path `bind`."""

    def bind(self, request: AttentionRequest) -> Callable[..., Any]:
        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            assert not self.closed, "the core used a closed session"
            self.backend.ran.append((self.device.id, request))
            out, lse = attend(query, key, value, mask, request, plan, rng)
            out = self.noisy(out, rng)
            return AttentionOutput(out, lse) if request.lse else out

        return run


class FakeBackend:
    """A backend of one or more fake devices.

    Attributes:
        ran, backwards: (device id, request) of every forward and backward. opened: device ids opened.
    """

    def __init__(
        self,
        name: str,
        *,
        capabilities: Capabilities | None = None,
        autograd: str = "native",
        bound: bool = False,
        count: int = 1,
        fidelity: str = "hardware",
        reads: tuple[str, ...] = ("cpu",),
        device_memory: int | None = None,
        time: Any = 1e-9,
        energy: Quantity | None = None,
        error: Quantity | None = None,
        memory: Callable[[AttentionRequest], int] = lambda request: 0,
        check: Callable[[AttentionRequest, Device], Iterable[Refusal]] = lambda request, device: (),
        open: Callable[[FakeBackend, Device], Any] | None = None,
        noise: float = 0.0,
        absent: str = "",
    ) -> None:
        self.name, self.autograd, self.noise = name, autograd, noise
        self._capabilities = capabilities or full()
        self._found = (
            []
            if absent
            else [
                Device(
                    id=f"{name}:{i}",
                    family=name,
                    vendor="fake",
                    model=f"model {i}",
                    fidelity=Fidelity(fidelity),
                    reads=reads,
                    memory=device_memory,
                    driver="1.0",
                )
                for i in range(count)
            ]
        )
        self._time, self.energy, self._error, self._memory, self._check = time, energy, error, memory, check
        self._open = open or (BoundSession if bound else FakeSession)
        self._absent = absent
        self.ran: list[tuple[str, AttentionRequest]] = []
        self.backwards: list[tuple[str, AttentionRequest]] = []
        self.opened: list[str] = []
        self.sessions: list[Any] = []

    def devices(self) -> Sequence[Device]:
        return self._found

    def why_absent(self) -> str:
        return self._absent

    def capabilities(self, device: Device) -> Capabilities:
        return self._capabilities

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        return self._check(request, device)

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        time = self._time(request) if callable(self._time) else self._time
        time = time if isinstance(time, Quantity) else quantity(time)
        return Estimate(time=time, energy=self.energy, error=self._error, memory=self._memory(request))

    def open(self, device: Device) -> Any:
        self.opened.append(device.id)
        session = self._open(self, device)
        self.sessions.append(session)
        return session


def draw(
    generator: torch.Generator,
    batch: int = 2,
    heads: int = 4,
    len_q: int = 7,
    len_k: int | None = None,
    dim: int = 8,
    *,
    heads_kv: int | None = None,
    dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal query, key and value."""
    len_k, heads_kv, dim_v = len_k if len_k is not None else len_q, heads_kv or heads, dim_v or dim
    shapes = ((batch, heads, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim_v))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tuple(t.requires_grad_(grad) for t in made)  # type: ignore[return-value]
