"""The device inside: a rank's dense calls, forward and backward from a given (out, log-sum-exp), on any hal device."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal, Decision, Grads, MaskKind, UnsupportedError
from hal_core.plugin_api import Policy, decide, moved_to, registry

from .visible import Call, band_options

_SIZES = ("batch", "heads_q", "heads_kv", "len_q", "len_k")
#: A request's fields that `band_options` does not set where there is no bound.
NO_BAND: dict[str, Any] = {"causal": Causal.NONE, "diagonal": 0, "window": None}


class Inner(NamedTuple):
    """A device that runs the dense calls of a rank.

    Attributes:
        device: its id. request: what all calls have in common; lengths, band and mask are each call's own.
        target: torch device that the tensors are moved to, None where they stay. decision: why this device.
    """

    device: str
    request: AttentionRequest
    target: str | None
    decision: Decision

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> tuple[Any, Any]:
        """(out, log-sum-exp) of the rows over the keys of one call."""
        r = self.request
        options: dict[str, Any] = {
            **{"scale": r.scale, "softcap": r.softcap, "enable_gqa": r.heads_q != r.heads_kv},
            **{"max_error": r.max_error, "deterministic": r.deterministic, **band_options(call.low, call.high)},
        }
        found = hal.attention(query, key, value, mask, return_lse=True, backend=self.device, **options)
        return found.out, found.lse

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        call: Call,
        given: tuple[Tensor, Tensor, Tensor],
        grad_lse: Tensor | None,
        grads: frozenset[str],
    ) -> Grads:
        """Gradients of one call from the whole rows' (out, log-sum-exp, gradient of out)."""
        sizes = zip(_SIZES, (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2]), strict=True)
        fields = dict(sizes) | NO_BAND | mask_fields(mask) | band_options(call.low, call.high)
        request = replace(self.request, grads=grads, grad_lse=grad_lse is not None, **fields)
        if self.target is not None:
            query, key, value, mask, given, grad_lse = moved_to(self.target, (query, key, value, mask, given, grad_lse))
        out, lse, grad_out = (tensor.contiguous() for tensor in given)
        session = hal.session(self.device)
        prepared = session.prepare_attention(query, key, value, request=request)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        found = session.compute_attention_backward(prepared, out, lse, grad_out, mask, grad_lse=grad_lse)
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
        UnsupportedError: no device can, with every reason; the device's results are noisy, or it differentiates only
            what it computed itself.
    """
    decision = decide(request, policy)
    try:
        winner = decision.winner
    except UnsupportedError as error:
        raise UnsupportedError(f"no device runs a rank's part of this call; inner: {error}", decision) from error
    device = winner.device
    if hal.capabilities(device.id).numerics[request.dtype].noisy:
        raise UnsupportedError(
            f"inner.noise  a pattern that is the same for any number of ranks asked, one for each call of {device.id} "
            "offered  -> use a device that is not noisy",
            decision,
        )
    if request.grads and hal.session(device.id).autograd(request) != "explicit":
        raise UnsupportedError(
            f"inner.backward  gradients from a given output and log-sum-exp asked, gradients of {device.id}'s own call "
            "offered  -> call under torch.no_grad(), or use another device",
            decision,
        )
    return Inner(device.id, request, device.reads[0] if winner.transfer else None, decision)


registry.on_change.append(choose.cache_clear)
