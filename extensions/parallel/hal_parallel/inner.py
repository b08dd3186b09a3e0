"""The device inside: a rank's dense calls, forward and backward from a given (out, log-sum-exp), on any hal device."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal, Decision, Grads, MaskKind, UnsupportedError
from hal_core.plugin_api import Policy, decide, moved_to, registry

from .description import Given
from .visible import Call, band_options

#: A request's fields that `band_options` does not set where there is no bound.
NO_BAND: dict[str, Any] = {"causal": Causal.NONE, "diagonal": 0, "window": None}


class Result(NamedTuple):
    """A merged result and its gradients; that of the log-sum-exp may be None."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def rows(self, rows: slice) -> "Result":
        return Result._make(None if tensor is None else tensor[:, :, rows] for tensor in self)


class Inner(NamedTuple):
    """A device that runs the dense calls of a rank.

    Attributes:
        device: its id. request: what all calls have in common; lengths, band and mask are each call's own.
        target: torch device that the tensors are moved to, None where they stay. decision: why this device.
        noisy: whether a call draws noise, from the (seed, offset) that it is given.
    """

    device: str
    request: AttentionRequest
    target: str | None
    decision: Decision
    noisy: bool

    def forward(self, given: Given, call: Call, rng: tuple[int, int] | None) -> tuple[Any, Any]:
        """(out, log-sum-exp) of the rows over the keys of one call, with the noise of `rng`."""
        r = self.request
        options: dict[str, Any] = {
            **{"scale": r.scale, "softcap": r.softcap, "enable_gqa": r.heads_q != r.heads_kv},
            **{"max_error": r.max_error, "deterministic": r.deterministic, **band_options(call.low, call.high)},
        }
        found = hal.attention(*given, return_lse=True, rng=rng, backend=self.device, **options)
        return found.out, found.lse

    def backward(self, given: Given, call: Call, result: Result, grads: frozenset[str]) -> Grads:
        """Gradients of one call from the whole rows' result."""
        batch, heads, rows, _ = given.query.shape
        sizes = {"batch": batch, "heads_q": heads, "heads_kv": given.key.shape[1]}
        sizes |= {"len_q": rows, "len_k": given.key.shape[2]}
        fields = sizes | NO_BAND | mask_fields(given.mask) | band_options(call.low, call.high)
        request = replace(self.request, grads=grads, grad_lse=result.grad_lse is not None, **fields)
        if self.target is not None:
            given = Given._make(moved_to(self.target, tuple(given)))
            result = Result._make(moved_to(self.target, tuple(result)))
        out, lse, grad_out = (tensor.contiguous() for tensor in result[:3])
        grad_lse = None if result.grad_lse is None else result.grad_lse.contiguous()
        session = hal.session(self.device)
        prepared = session.prepare_attention(*given[:3], request=request)
        found = session.compute_attention_backward(prepared, out, lse, grad_out, given.mask, grad_lse=grad_lse)
        return found if self.target is None else Grads(*moved_to(self.request.device, tuple(found)))


def mask_fields(mask: Tensor | None) -> dict[str, Any]:
    """A 4-D mask as the request's fields."""
    if mask is None:
        return {"mask": MaskKind.NONE, "mask_batch": 1, "mask_heads": 1}
    kind = MaskKind.BOOLEAN if mask.dtype == torch.bool else MaskKind.ADDITIVE
    return {"mask": kind, "mask_batch": mask.shape[0], "mask_heads": mask.shape[1]}


@lru_cache(maxsize=512)
def choose(request: AttentionRequest, policy: Policy) -> Inner:
    """The device for the dense calls of a request: with a log-sum-exp, and with gradients from a given pair.

    Raises:
        UnsupportedError: no device can, with every reason; gradients of a noisy device, or of one that differentiates
            only what it computed itself.
    """
    decision = decide(request, policy)
    try:
        winner = decision.winner
    except UnsupportedError as error:
        raise UnsupportedError(f"no device runs a rank's part of this call; inner: {error}", decision) from error
    device = winner.device
    noisy = hal.capabilities(device.id).numerics[request.dtype].noisy
    if request.grads and (noisy or hal.session(device.id).autograd(request) != "explicit"):
        raise UnsupportedError(
            f"inner.backward  gradients from a given output and log-sum-exp asked, gradients of {device.id}'s own call "
            "offered  -> call under torch.no_grad(), or use another device",
            decision,
        )
    return Inner(device.id, request, device.reads[0] if winner.transfer else None, decision, noisy)


registry.on_change.append(choose.cache_clear)
