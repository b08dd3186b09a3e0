"""An honest device in torch: what the conformance kit is tested on, and what the faulty backends are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .. import AttentionOutput, AttentionRequest, Causal, DenseTiling, Device, Fidelity, MaskKind, SimpleSession
from ..capability import FEATURES, Capabilities, Code, Numerics, Range, Refusal
from ..device_info import Basis, Estimate, Provenance, Quantity
from ..plans import TilePlan
from ..request import DTYPE_BYTES

_FEATURES: Any = FEATURES - {"packed", "paged", "used_lengths", "fp8_cache", "block_plan"}
_NUMERICS: Any = {"float32": Numerics(1e-5, gradient=1e-5), "bfloat16": Numerics(4e-3, gradient=1e-2)}
CLAIMS = Capabilities(
    dtypes=_NUMERICS, numerics=_NUMERICS, head_dim=Range(1, 256), masks=MaskKind, causal=Causal, features=_FEATURES
)


class Workspace:
    """Tensors for the intermediate steps of one call, from a session's memory.

    Torch keeps intermediate tensors for its own backward, so a call that it differentiates has no workspace: every
    `out=` is None there, and torch allocates. `plan` is that of a tiling which the caller brought.
    """

    def __init__(self, session: SimpleSession, differentiated: bool, held: ExitStack, plan: TilePlan | None) -> None:
        self.session, self.differentiated, self.plan, self._held = session, differentiated, plan, held

    def room(self, *shape: int, dtype: str = "float32") -> Tensor | None:
        if self.differentiated:
            return None
        return self._held.enter_context(self.session.scratch(shape, dtype))  # type: ignore[no-any-return]

    def flags(self, *shape: int) -> Tensor | None:
        """Room for booleans, in memory of a dtype of one byte."""
        room = self.room(*shape, dtype="float8_e4m3fn")
        return None if room is None else room.view(torch.bool)

    def reuse(self, tensor: Tensor) -> Tensor | None:
        """The tensor itself as `out=`, where it may be overwritten."""
        return None if self.differentiated else tensor

    def single(self, tensor: Tensor) -> Tensor:
        """The tensor in float32."""
        if tensor.dtype == torch.float32:
            return tensor
        room = self.room(*tensor.shape)
        return tensor.float() if room is None else room.copy_(tensor)


class DenseSession(SimpleSession):
    """Dense attention in float32, differentiated by torch. Each step is a method, so that a fault can replace it."""

    def __init__(self) -> None:
        super().__init__(self.attend, autograd="native", tiling=DenseTiling(cut_by="torch"))

    def compute_attention(
        self, prepared: Any, mask: Any = None, *, query: Any = None, rng: Any = None, out: Any = None
    ) -> Any:
        first, key, value, request = prepared
        result, lse = self.attend(first if query is None else query, key, value, mask, request, rng)
        return AttentionOutput(result if out is None else out.copy_(result), lse if request.lse else None)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        r: AttentionRequest,
        rng: Any = None,
        plan: TilePlan | None = None,
    ) -> Any:
        given = (query, key, value) if mask is None else (query, key, value, mask)
        with ExitStack() as held:
            work = Workspace(self, torch.is_grad_enabled() and any(t.requires_grad for t in given), held, plan)
            scores, v = self.scores(query, key, value, mask, r, work)
            peak = scores.detach().amax(-1, keepdim=True)
            peak.masked_fill_(peak == -math.inf, 0)  # a row without keys
            weights = torch.exp(torch.sub(scores, peak, out=work.reuse(scores)), out=work.reuse(scores))
            total = weights.sum(-1, keepdim=True)
            lse = self.lse(peak, total).squeeze(-1)
            weights = torch.div(weights, self.divisor(total), out=work.reuse(weights))
            if r.dropout:
                kept = self.kept(weights, r, rng, work)
                weights = torch.mul(weights, kept, out=work.reuse(weights))
                weights = torch.div(weights, 1 - r.dropout, out=work.reuse(weights))
            half = query.dtype != torch.float32
            room = work.room(*query.shape[:3], value.shape[3]) if half else None
            return torch.matmul(weights, v, out=room).to(query.dtype), lse

    def scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, r: AttentionRequest, work: Workspace
    ) -> tuple[Tensor, Tensor]:
        """Scaled, capped and masked scores, -inf where a query may not read a key, and the values, by query heads."""
        k, v = (self.by_query_heads(work.single(t), r, work) for t in (key, value))
        len_k = key.shape[2]
        room = work.room(*query.shape[:3], len_k)
        scores = torch.matmul(work.single(query), k.transpose(-1, -2), out=room)
        scores = torch.mul(scores, self.scale(r), out=work.reuse(scores))
        if r.softcap is not None:
            scores = torch.tanh(torch.div(scores, r.softcap, out=work.reuse(scores)), out=work.reuse(scores))
            scores = torch.mul(scores, r.softcap, out=work.reuse(scores))
        if (mask := self.mask(mask)) is not None and mask.dtype != torch.bool:
            scores = torch.add(scores, mask, out=work.reuse(scores))
        hidden = torch.full((), -math.inf, device=scores.device)
        for visible in (
            mask if mask is not None and mask.dtype == torch.bool else None,
            self.visible(r, query, len_k, work),
        ):
            if visible is not None:
                scores = torch.where(visible, scores, hidden, out=work.reuse(scores))
        return scores, v

    def by_query_heads(self, tensor: Tensor, r: AttentionRequest, work: Workspace) -> Tensor:
        """Keys or values as every query head reads them."""
        if r.heads_q == r.heads_kv:
            return tensor
        heads = torch.tensor([self.key_head(h, r) for h in range(r.heads_q)], device=tensor.device)
        room = work.room(tensor.shape[0], r.heads_q, *tensor.shape[2:])
        return torch.index_select(tensor, 1, heads, out=room)

    def key_head(self, head: int, r: AttentionRequest) -> int:
        return head // (r.heads_q // r.heads_kv)

    def scale(self, r: AttentionRequest) -> float:
        return r.effective_scale

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def visible(self, r: AttentionRequest, query: Tensor, len_k: int, work: Workspace) -> Tensor | None:
        """What causal and window leave visible, [len_q, len_k]; None for everything."""
        len_q = query.shape[2]
        rows, columns = (torch.arange(n, device=query.device) for n in (len_q, len_k))
        visible = None
        for compare, offset in zip((torch.ge, torch.le), r.band(len_q, len_k), strict=True):
            if offset is not None:
                side = compare(columns, (rows + offset).unsqueeze(1), out=work.flags(len_q, len_k))
                visible = side if visible is None else torch.logical_and(visible, side, out=work.reuse(side))
        return visible

    def lse(self, peak: Tensor, total: Tensor) -> Tensor:
        alive = total > 0
        return torch.where(alive, peak + torch.log(torch.where(alive, total, 1)), -math.inf)

    def divisor(self, total: Tensor) -> Tensor:
        """What the weights are divided by; a row without keys has zeros above and keeps them."""
        return torch.where(total == 0, 1, total)

    def kept(self, weights: Tensor, r: AttentionRequest, rng: tuple[int, int] | None, work: Workspace) -> Tensor:
        seed, offset = rng or (0, 0)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)
        drawn = torch.rand(weights.shape, generator=generator, out=work.room(*weights.shape))
        return torch.ge(drawn.to(weights.device), r.dropout, out=work.flags(*weights.shape))


class TiledSession(DenseSession):
    """Follows the plan of a tiling that the caller brings: each row reads the keys that the plan gives it."""

    def prepare_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tile_size: Any = None,
        *,
        request: Any,
        plan: Any = None,
        **_: Any,
    ) -> Any:
        return (query, key, value, request, plan)

    def compute_attention(
        self, prepared: Any, mask: Any = None, *, query: Any = None, rng: Any = None, out: Any = None
    ) -> Any:
        first, key, value, request, plan = prepared
        result, lse = self.attend(first if query is None else query, key, value, mask, request, rng, plan)
        return AttentionOutput(result if out is None else out.copy_(result), lse if request.lse else None)

    def visible(self, r: AttentionRequest, query: Tensor, len_k: int, work: Workspace) -> Tensor | None:
        visible = super().visible(r, query, len_k, work)
        if work.plan is None:
            return visible
        read = work.flags(query.shape[2], len_k)
        read = torch.zeros(query.shape[2], len_k, dtype=torch.bool) if read is None else read.fill_(False)
        for q_start, q_stop, spans in work.plan.rows():
            for k_start, k_stop in spans:
                read[q_start:q_stop, k_start:k_stop] = True
        return read if visible is None else torch.logical_and(read, visible, out=work.reuse(read))


class DenseBackend:
    """An honest device: it computes with torch where the tensors lie, and calls itself emulated.

    Args:
        name: the backend's name; its device is "<name>:0". session: makes a session. claims: what is declared.
        fidelity, family: of the device. seconds: the most time that it estimates for a tiny call. refuses: by its
            check(). memory: factor on the memory that it estimates.
    """

    def __init__(
        self,
        name: str = "honest",
        session: Callable[[], Any] = DenseSession,
        claims: Capabilities = CLAIMS,
        *,
        fidelity: Fidelity = Fidelity.EMULATED,
        family: str = "torch",
        seconds: float = 1e-2,
        refuses: Callable[[AttentionRequest], bool] = lambda request: False,
        memory: float = 1.0,
    ) -> None:
        self._claims, self._session, self._seconds, self._refuses = claims, session, seconds, refuses
        self._device = Device(id=f"{name}:0", family=family, vendor="hal-core", model="dense torch", fidelity=fidelity)
        self._memory = memory

    def devices(self) -> list[Device]:
        return [self._device]

    def capabilities(self, device: Device) -> Capabilities:
        return self._claims

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        return [Refusal(Code.DEVICE, "request", "this", "something else")] * self._refuses(request)

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        most = self._seconds * (1 + request.macs * 1e-7)
        time = Quantity(most / 1000, most, Basis.DECLARED, Provenance.ASSUMED)
        return Estimate(time=time, memory=int(self._memory * needed_bytes(request)))

    def open(self, device: Device) -> Any:
        return self._session()


def needed_bytes(r: AttentionRequest) -> int:
    """The bytes that a call of `DenseSession` allocates at its peak, by the steps of `attend`."""
    rows, keys, dims = r.batch * r.heads_q * r.len_q, r.batch * r.heads_kv * r.len_k, r.dim_qk + r.dim_v
    needed = 4 * rows * r.len_k + rows * (r.dim_v * DTYPE_BYTES[r.dtype] + 4 * (4 + r.lse))
    if r.dtype != "float32":
        needed += 4 * (rows * dims + keys * dims)
        if r.mask is MaskKind.ADDITIVE:  # torch adds it in float32
            needed += 4 * r.mask_batch * r.mask_heads * r.len_q * r.len_k
    if r.heads_q != r.heads_kv:
        needed += 4 * (r.heads_q // r.heads_kv) * keys * dims
    needed += sum(side is not None for side in r.band(r.len_q, r.len_k)) * r.len_q * r.len_k
    needed += (r.tiling is not None) * r.len_q * r.len_k
    return needed + (5 * rows * r.len_k if r.dropout else 0)
