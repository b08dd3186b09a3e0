"""An honest device in torch, and devices made from it that lie in one thing each: the kit's own test.

Each lie says which check must find it. Author of a kit of your own, or of a device: run `check_backend(LIES[name].make())`
to see what a finding looks like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import attrs
import torch
from torch import Tensor

from ..capabilities import Capabilities, Code, Numerics, Range, Refusal
from ..device import Device, Fidelity
from ..estimate import Basis, Estimate, Provenance, Quantity
from ..memory import PooledMemory
from ..protocols import SimpleSession
from ..registry import registry
from ..request import AttentionOutput, AttentionRequest, Causal, MaskKind
from ..tiling import DenseTiling, TilePlan, dense_mask

CLAIMS = Capabilities(
    dtypes={"float32", "bfloat16"},
    numerics={"float32": Numerics(1e-5, gradient=1e-5), "bfloat16": Numerics(4e-3, gradient=1e-2)},
    head_dim=Range(1, 256), masks=set(MaskKind), causal=set(Causal),
    features={"grouped_heads", "value_dim", "strides", "diagonal", "window", "softcap", "dropout", "lse", "backward",
              "mask_grad", "lse_grad", "deterministic"},
)  # fmt: skip


class DenseSession(SimpleSession):
    """Dense attention in float32, differentiated by torch. Each step is a method, so that a lie can replace it."""

    memory_kind: Callable[[], Any] = PooledMemory
    tiling_kind: Callable[[], Any] = DenseTiling

    def __init__(self) -> None:
        super().__init__(self.attend, autograd="native", memory=self.memory_kind())
        self.tiling = self.tiling_kind()

    def compute_attention(
        self, prepared: Any, mask: Tensor | None = None, *,
        query: Tensor | None = None, rng: tuple[int, int] | None = None, out: Tensor | None = None,
    ) -> AttentionOutput:  # fmt: skip
        request, first = prepared[3], prepared[0] if query is None else query
        result, lse = self.attend(first, *prepared[1:3], mask, request, rng)
        return AttentionOutput(result if out is None else out.copy_(result), lse if request.lse else None)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, r: AttentionRequest, rng: Any = None
    ) -> tuple[Tensor, Tensor]:
        group = r.heads_q // r.heads_kv
        q, k, v = query.float(), self.grouped(key.float(), group), self.grouped(value.float(), group)
        scores = q @ k.transpose(-1, -2) * self.scale(r)
        if r.softcap is not None:
            scores = r.softcap * torch.tanh(scores / r.softcap)
        visible, mask = self.visible(r, query.shape[2], key.shape[2], query), self.mask(mask)
        if mask is not None:
            visible = visible & (mask if mask.dtype == torch.bool else mask != -torch.inf)
            scores = scores if mask.dtype == torch.bool else scores + mask.float().masked_fill(~visible, 0)
        dead = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -torch.inf).masked_fill(dead, 0)
        lse = torch.logsumexp(scores, -1).masked_fill(dead.squeeze(-1), -torch.inf)
        weights = self.weights(scores, dead)
        if r.dropout:
            weights = weights * self.kept(weights, r, rng) / (1 - r.dropout)
        return (weights @ v).to(query.dtype), lse

    def grouped(self, tensor: Tensor, group: int) -> Tensor:
        return tensor.repeat_interleave(group, dim=1)

    def scale(self, r: AttentionRequest) -> float:
        return r.effective_scale

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def visible(self, r: AttentionRequest, len_q: int, len_k: int, query: Tensor) -> Tensor:
        visible = dense_mask(r, len_q, len_k, device=query.device)
        return torch.ones(len_q, len_k, dtype=torch.bool, device=query.device) if visible is None else visible

    def weights(self, scores: Tensor, dead: Tensor) -> Tensor:
        return torch.softmax(scores, -1).masked_fill(dead, 0)

    def kept(self, weights: Tensor, r: AttentionRequest, rng: tuple[int, int] | None) -> Tensor:
        seed, offset = rng or (0, 0)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)
        return torch.rand(weights.shape, generator=generator).to(weights.device) >= r.dropout


class DenseBackend:
    """An honest device: it computes with torch where the tensors lie, and calls itself emulated.

    Args:
        name: the backend's name; its device is "<name>:0". session: makes a session. claims: what is declared.
        fidelity, family: of the device. seconds: the most time that it estimates for a tiny call. refuses: by its check().
    """

    def __init__(
        self, name: str = "honest", session: Callable[[], Any] = DenseSession, claims: Capabilities = CLAIMS, *,
        fidelity: Fidelity = Fidelity.EMULATED, family: str = "torch", seconds: float = 1e-2,
        refuses: Callable[[AttentionRequest], bool] = lambda request: False,
    ) -> None:  # fmt: skip
        self._claims, self._session, self._seconds, self._refuses = claims, session, seconds, refuses
        self._device = Device(id=f"{name}:0", family=family, vendor="hal-core", model="dense torch", fidelity=fidelity)

    def devices(self) -> list[Device]:
        return [self._device]

    def capabilities(self, device: Device) -> Capabilities:
        return self._claims

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        return [Refusal(Code.DEVICE, "request", "this", "something else")] if self._refuses(request) else []

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        most = self._seconds * (1 + request.macs * 1e-7)
        scores = 4 * request.batch * request.heads_q * request.len_q * (2 * request.len_k + request.dim_v)
        return Estimate(time=Quantity(most / 1000, most, Basis.DECLARED, Provenance.ASSUMED), memory=scores)

    def open(self, device: Device) -> Any:
        return self._session()


def _top_left(self: DenseSession, r: AttentionRequest, *sizes: Any) -> Tensor:
    return DenseSession.visible(self, replace(r, causal=min(r.causal, Causal.TOP_LEFT, key=list(Causal).index)), *sizes)


def _program_once(self: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """Copies keys to the device once for each tensor, as if nobody ever wrote to one."""
    held = getattr(self, "held", None)
    if held is None or (held[0].data_ptr(), held[0].shape, held[0].dtype) != (key.data_ptr(), key.shape, key.dtype):
        held = (key, key.detach().clone())
        self.held = held
    return DenseSession.prepare_attention(self, query, key if key.requires_grad else held[1], value, *rest, **options)


def _halve_query(self: DenseSession, query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    found = DenseSession.attend(self, query, *rest)
    query.detach().mul_(0.5)
    return found


def _keep_output(self: Any, *args: Any) -> tuple[Tensor, Tensor]:
    found = DenseSession.attend(self, *args)
    self.kept_outputs = (*getattr(self, "kept_outputs", ()), found[0].detach())
    return found


def _half_constant(self: DenseSession, tensor: Tensor, group: int) -> Tensor:
    return DenseSession.grouped(self, (tensor + tensor.detach()) / 2, group)


def _delegate(self: DenseSession, *args: Any, **options: Any) -> AttentionOutput:
    return registry.session("honest:0").compute_attention(*args, **options)


def _base_two(self: DenseSession, *args: Any) -> tuple[Tensor, Tensor]:
    out, lse = DenseSession.attend(self, *args)
    return out, lse / math.log(2)


def _wavering(self: DenseSession, *args: Any) -> tuple[Tensor, Tensor]:
    out, lse = DenseSession.attend(self, *args)
    return out * (1 + 2e-7 * torch.rand_like(out)), lse


class _OverlappingTiles(DenseTiling):
    def plan(self, *args: Any, **options: Any) -> TilePlan:
        plan = super().plan(*args, **options)
        return plan._replace(tiles=(*plan.tiles, *plan.tiles[:1]))


class _HastyMemory(PooledMemory):
    """Hands a freed block out again at once, whoever still reads it."""

    def free(self, buffer: Any) -> None:
        self._last = buffer.tensor
        super().free(buffer)

    def allocate(self, shape: Any, dtype: str) -> Any:
        buffer, last = super().allocate(shape, dtype), getattr(self, "_last", None)
        if last is not None and last.shape == buffer.shape:
            buffer._tensor = last
        return buffer


class _FailsOpen(Capabilities):
    def refusals(self, request: AttentionRequest) -> list[Refusal]:
        return [refusal for refusal in super().refusals(request) if refusal.code is not Code.PACKED]


@attrs.frozen
class Lie:
    """A lying device: the check that must find it, and its backend, named "liar"."""

    check: str
    make: Callable[[], DenseBackend]


def _lie(check: str, *, claims: Capabilities = CLAIMS, options: Mapping[str, Any] | None = None, **steps: Any) -> Lie:
    """A lie told by replaced steps of the session, by what is claimed, or by the backend's options."""
    kind = type("LyingSession", (DenseSession,), steps)
    return Lie(check, lambda: DenseBackend("liar", kind, claims, **(options or {})))


#: Lies by name. "leaves the work to another device" needs the device "honest:0" registered.
LIES: Mapping[str, Lie] = {
    "wrong scale": _lie("scale", scale=lambda self, r: r.dim_qk**-0.5),
    "dropped mask": _lie("masks", mask=lambda self, mask: None),
    "swapped group heads": _lie("grouped_heads", grouped=lambda self, tensor, group: tensor.repeat(1, group, 1, 1)),
    "wrong causal alignment": _lie("causal", visible=_top_left),
    "wrong base of the log-sum-exp": _lie("log_sum_exp", attend=_base_two),
    "NaN in rows without keys": _lie("masks", weights=lambda self, scores, dead: torch.softmax(scores / ~dead, -1)),
    "stale keys": _lie("stale_keys", prepare_attention=_program_once),
    "changes its inputs": _lie("inputs_unchanged", attend=_halve_query),
    "leaks": _lie("leaks", attend=_keep_output),
    "half a gradient": _lie("gradients", grouped=_half_constant),
    "claims a dtype it lacks": _lie("dtypes", claims=attrs.evolve(
        CLAIMS, dtypes={"float32", "float64"}, numerics=CLAIMS.numerics | {"float64": Numerics(1e-12, 1e-12, 1e-12)})),
    "refuses what it claims": _lie("window", options={"refuses": lambda request: request.window is not None}),
    "runs what it does not claim": _lie("refusals", claims=_FailsOpen(**attrs.asdict(CLAIMS, recurse=False))),
    "ignores rng": _lie("random_numbers", kept=lambda self, weights, r, rng: DenseSession.kept(self, weights, r, None)),
    "wavers where it claims determinism": _lie("deterministic", attend=_wavering),
    "leaves the work to another device": _lie("runs_where_it_says", compute_attention=_delegate),
    "calls torch on the host hardware": _lie("runs_where_it_says", options={"fidelity": Fidelity.HARDWARE, "family": "accelerator"}),
    "tiles that overlap": _lie("tiles", tiling_kind=_OverlappingTiles),
    "memory handed out twice": _lie("dlpack", memory_kind=_HastyMemory),
    "estimates from thin air": _lie("estimates", options={"seconds": 1e-9}),
}  # fmt: skip
