"""An honest device in torch, and devices made from it that lie in one thing each: the kit's own test.

Each of FAULTS says which check must find it; "leaves the work to another device" needs the device "honest:0"
registered.
To see what a finding looks like: `print(check_backend(FAULTS["wrong scale"].make()))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import attrs
import torch
from torch import Tensor

from .. import AttentionOutput, AttentionRequest, Causal, Device, Fidelity, MaskKind, SimpleSession, dense_mask, session
from ..capability import FEATURES, Capabilities, Code, Numerics, Range, Refusal
from ..device_info import Basis, Estimate, Provenance, Quantity

_FEATURES: Any = FEATURES - {"packed", "paged", "fp8_cache", "block_plan"}
_NUMERICS: Any = {"float32": Numerics(1e-5, gradient=1e-5), "bfloat16": Numerics(4e-3, gradient=1e-2)}
CLAIMS = Capabilities(
    dtypes=_NUMERICS, numerics=_NUMERICS, head_dim=Range(1, 256), masks=MaskKind, causal=Causal, features=_FEATURES
)


class DenseSession(SimpleSession):
    """Dense attention in float32, differentiated by torch. Each step is a method, so that a lie can replace it."""

    def __init__(self) -> None:
        super().__init__(self.attend, autograd="native")

    def compute_attention(
        self, prepared: Any, mask: Any = None, *, query: Any = None, rng: Any = None, out: Any = None
    ) -> Any:
        first, key, value, request = prepared
        result, lse = self.attend(first if query is None else query, key, value, mask, request, rng)
        return AttentionOutput(result if out is None else out.copy_(result), lse if request.lse else None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, r: AttentionRequest, rng: Any = None) -> Any:
        k, v = (self.grouped(t.float(), r.heads_q // r.heads_kv) for t in (key, value))
        scores = query.float() @ k.transpose(-1, -2) * self.scale(r)
        if r.softcap is not None:
            scores = r.softcap * torch.tanh(scores / r.softcap)
        visible, mask = self.visible(r, query.shape[2], key.shape[2]).to(query.device), self.mask(mask)
        if mask is not None:
            visible = visible & (mask if mask.dtype == torch.bool else mask != -torch.inf)
            scores = scores if mask.dtype == torch.bool else scores + mask.float().masked_fill(~visible, 0)
        fully_masked = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible, -torch.inf).masked_fill(fully_masked, 0)
        lse, weights = (
            self.lse(scores).masked_fill(fully_masked.squeeze(-1), -torch.inf),
            self.weights(scores, fully_masked),
        )
        if r.dropout:
            weights = weights * self.kept(weights, r, rng) / (1 - r.dropout)
        return (weights @ v).to(query.dtype), lse

    def grouped(self, tensor: Tensor, group: int) -> Tensor:
        return tensor.repeat_interleave(group, dim=1)

    def scale(self, r: AttentionRequest) -> float:
        return r.effective_scale

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def visible(self, r: AttentionRequest, len_q: int, len_k: int) -> Tensor:
        visible = dense_mask(r, len_q, len_k)
        return torch.ones(len_q, len_k, dtype=torch.bool) if visible is None else visible

    def lse(self, scores: Tensor) -> Tensor:
        return torch.logsumexp(scores, -1)

    def weights(self, scores: Tensor, fully_masked: Tensor) -> Tensor:
        return torch.softmax(scores, -1).masked_fill(fully_masked, 0)

    def kept(self, weights: Tensor, r: AttentionRequest, rng: tuple[int, int] | None) -> Tensor:
        seed, offset = rng or (0, 0)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)
        return torch.rand(weights.shape, generator=generator).to(weights.device) >= r.dropout


class DenseBackend:
    """An honest device: it computes with torch where the tensors lie, and calls itself emulated.

    Args:
        name: the backend's name; its device is "<name>:0". session: makes a session. claims: what is declared.
        fidelity, family: of the device. seconds: the most time that it estimates for a tiny call. refuses: by its
            check().
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
    ) -> None:
        self._claims, self._session, self._seconds, self._refuses = claims, session, seconds, refuses
        self._device = Device(id=f"{name}:0", family=family, vendor="hal-core", model="dense torch", fidelity=fidelity)

    def devices(self) -> list[Device]:
        return [self._device]

    def capabilities(self, device: Device) -> Capabilities:
        return self._claims

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        return [Refusal(Code.DEVICE, "request", "this", "something else")] * self._refuses(request)

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        most = self._seconds * (1 + request.macs * 1e-7)
        scores = 4 * request.batch * request.heads_q * request.len_q * (2 * request.len_k + request.dim_v)
        return Estimate(time=Quantity(most / 1000, most, Basis.DECLARED, Provenance.ASSUMED), memory=scores)

    def open(self, device: Device) -> Any:
        return self._session()


@attrs.frozen
class Fault:
    """A lying device: the check that must find it, and its backend, named "liar"."""

    check: str
    make: Callable[[], DenseBackend]


def fault(check: str, *, options: Mapping[str, Any] | None = None, **steps: Any) -> Fault:
    """A lie told by replaced steps of the session, or by the backend's options; `check` must find it."""
    kind: Any = type("LyingSession", (DenseSession,), steps)
    return Fault(check, lambda: DenseBackend("liar", kind, **(options or {})))


def _top_left(self: DenseSession, r: AttentionRequest, *sizes: int) -> Tensor:
    top_left = replace(r, causal=Causal.TOP_LEFT) if r.causal is Causal.BOTTOM_RIGHT else r
    return DenseSession.visible(self, top_left, *sizes)


def _program_once(self: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
    """Copies keys to the device once for each tensor, as if nobody ever wrote to one."""
    held = getattr(self, "held", None)
    if held is None or (held[0].data_ptr(), held[0].shape, held[0].dtype) != (key.data_ptr(), key.shape, key.dtype):
        self.held = held = (key, key.detach().clone())
    return DenseSession.prepare_attention(self, query, key if key.requires_grad else held[1], value, *rest, **options)


def _halve_keys(self: DenseSession, query: Tensor, key: Tensor, *rest: Any) -> Any:
    found = DenseSession.attend(self, query, key.clone(), *rest)
    key.detach().mul_(0.5)
    return found


def _keep_weights(self: Any, scores: Tensor, fully_masked: Tensor) -> Tensor:
    self.kept_weights = [*getattr(self, "kept_weights", ()), scores.detach()]
    return DenseSession.weights(self, scores, fully_masked)


_DOUBLE: Any = {**_NUMERICS, "float64": Numerics(1e-12, 1e-12, 1e-12)}
FAULTS: Mapping[str, Fault] = {
    "wrong scale": fault("scale", scale=lambda self, r: r.dim_qk**-0.5),
    "dropped mask": fault("masks", mask=lambda self, mask: None),
    "swapped group heads": fault("grouped_heads", grouped=lambda self, tensor, group: tensor.repeat(1, group, 1, 1)),
    "wrong causal alignment": fault("causal", visible=_top_left),
    "wrong base of the log-sum-exp": fault(
        "log_sum_exp", lse=lambda self, scores: torch.logsumexp(scores, -1) / math.log(2)
    ),
    "NaN in rows without keys": fault(
        "masks", weights=lambda self, scores, fully_masked: torch.softmax(scores / ~fully_masked, -1)
    ),
    "stale keys": fault("stale_keys", prepare_attention=_program_once),
    "changes its inputs": fault("inputs_unchanged", attend=_halve_keys),
    "leaks": fault("leaks", weights=_keep_weights),
    "half a gradient": fault(
        "gradients", grouped=lambda self, t, group: ((t + t.detach()) / 2).repeat_interleave(group, 1)
    ),
    "claims a dtype it lacks": fault(
        "dtypes", options={"claims": attrs.evolve(CLAIMS, dtypes=_DOUBLE, numerics=_DOUBLE)}
    ),
    "refuses what it claims": fault("window", options={"refuses": lambda request: request.window is not None}),
    "ignores rng": fault("repeats", kept=lambda self, weights, r, rng: DenseSession.kept(self, weights, r, None)),
    "wavers where it claims determinism": fault(
        "repeats",
        weights=lambda self, s, fully_masked: torch.softmax(s + 1e-6 * torch.rand_like(s), -1).masked_fill(
            fully_masked, 0
        ),
    ),
    "leaves the work to another device": fault(
        "runs_where_it_says", compute_attention=lambda self, *a, **k: session("honest:0").compute_attention(*a, **k)
    ),
    "calls torch on the host hardware": fault(
        "runs_where_it_says", options={"fidelity": Fidelity.HARDWARE, "family": "accelerator"}
    ),
    "estimates from thin air": fault("estimates", options={"seconds": 1e-9}),
}
